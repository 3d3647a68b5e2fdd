//! Arrays of numpy, torch and JAX as memory.

use super::arrays::{Array, NDARRAY, import, is_cpu, torch};
use super::dlpack::Taken;
use super::tensor::Tensor;
use crate::dtype::DType;
use crate::error::{Error, quote};
use crate::layout::elements;
use crate::map::Source;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// An array of Python's, about to be saved.
pub(super) struct Given {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    pub(super) data: Data,
}

pub(super) enum Data {
    /// Contiguous CPU memory, which `_keep` keeps alive.
    Ready { ptr: *const u8, len: usize, _keep: Keep },
    /// To be brought in C order by its framework: strided, swapped, on a device.
    Strided(Py<PyAny>),
}

/// What keeps memory alive.
pub(super) enum Keep {
    Object { _object: Py<PyAny> },
    Taken { _tensor: Taken },
}

impl From<Bound<'_, PyAny>> for Keep {
    fn from(object: Bound<'_, PyAny>) -> Self {
        Self::Object { _object: object.unbind() }
    }
}

// SAFETY: the pointer is only read, and what it points to is kept alive.
unsafe impl Send for Data {}
// SAFETY: as for Send.
unsafe impl Sync for Data {}

impl Data {
    /// The bytes, where they lie in one piece.
    pub(super) fn source(&self) -> Option<Source<'_>> {
        match self {
            // SAFETY: readable as long as `_keep` lives, which `self` owns.
            Self::Ready { ptr, len, .. } => Some(unsafe { Source::from_raw(*ptr, *len) }),
            Self::Strided(_) => None,
        }
    }
}

/// Looks at an array: where its bytes are, and what they mean.
///
/// # Errors
/// `DTypeError` for a dtype safetensors does not have, `MapTensorsError` for what is no array.
pub(super) fn look_at(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Given> {
    let py = object.py();
    if let Ok(tensor) = object.cast::<Tensor>() {
        tensor.get().look(py)?;
        let array = tensor.get().array();
        let (dtype, shape) = (array.dtype, array.shape.to_vec());
        let keep = if array.strides.is_none() {
            object.clone()
        } else {
            object.call_method0(intern!(py, "tobytes"))?
        };
        let ptr = if array.strides.is_none() { array.ptr() } else { keep.extract::<&[u8]>()?.as_ptr() };
        let data = Data::Ready { ptr, len: array.nbytes(), _keep: keep.into() };
        return Ok(Given { dtype, shape, data });
    }
    // Exactly numpy's: a subclass may say anything of itself.
    if object.get_type().is(&import(py, &NDARRAY, "numpy", "ndarray")?) {
        return look_at_numpy(name, object);
    }
    if is_torch(object)? {
        return look_at_torch(name, object);
    }
    if object.hasattr("mask")? && object.hasattr("filled")? {
        let text =
            format!("tensor {} is a masked array; .filled() says what stands for masked values", quote(name));
        return Err(Error::Argument(text).into());
    }
    // Subclasses, numpy scalars, JAX arrays on the CPU, anything with __array__ or __dlpack__.
    let numpy = py.import("numpy")?;
    let array = if object.hasattr("__array__")? {
        numpy.call_method1("asarray", (object,))?
    } else if object.hasattr("__dlpack__")? {
        numpy.call_method1("from_dlpack", (object,))?
    } else {
        let text = format!("tensor {} is a {}, expected an array", quote(name), object.get_type().name()?);
        return Err(Error::Argument(text).into());
    };
    look_at_numpy(name, &array)
}

/// Only a process that has imported torch can hold a tensor of it.
fn is_torch(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    static MODULES: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = object.py();
    let imported = import(py, &MODULES, "sys", "modules")?.call_method1(intern!(py, "get"), ("torch",))?;
    Ok(!imported.is_none()
        && imported.hasattr(intern!(py, "Tensor"))?
        && object.is_instance(torch(py)?.class.bind(py))?)
}

fn unsupported(name: &str, found: &str) -> PyErr {
    Error::DType {
        path: PathBuf::new(),
        tensor: name.into(),
        found: format!("of dtype {found}"),
        expected: "a dtype that safetensors has".into(),
    }
    .into()
}

/// What nearly every tensor is, read with one call: plain, in C order, on the CPU. `None` for any other.
fn look_at_plain_torch(object: &Bound<'_, PyAny>) -> PyResult<Option<Given>> {
    let py = object.py();
    let torch = torch(py)?;
    let class = object.get_type();
    let exact = class.is(torch.class.bind(py)) || class.is(torch.parameter.bind(py));
    // A lazily negated tensor holds other bytes than it means.
    let (Some(exchange), true) =
        (torch.exchange, exact && !object.call_method0(intern!(py, "is_neg"))?.is_truthy()?)
    else {
        return Ok(None);
    };
    // Sparse tensors and their like are refused here, and named below.
    let Ok(tensor) = exchange.take(object) else { return Ok(None) };
    // So is a complex one that may be conjugated.
    let Some(dtype) = tensor.dtype().filter(|&dtype| dtype != DType::C64 && dtype != DType::F4) else {
        return Ok(None);
    };
    let (ptr, shape) = (tensor.ptr(), tensor.shape());
    let Some(len) = elements(&shape).and_then(|n| dtype.nbytes(n)) else { return Ok(None) };
    if !tensor.is_on_cpu() || !tensor.is_contiguous() || ptr.is_null() && len > 0 {
        return Ok(None);
    }
    Ok(Some(Given { dtype, shape, data: Data::Ready { ptr, len, _keep: Keep::Taken { _tensor: tensor } } }))
}

fn look_at_torch(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Given> {
    if let Some(given) = look_at_plain_torch(object)? {
        return Ok(given);
    }
    let py = object.py();
    let strided = py.import("torch")?.getattr(intern!(py, "strided"))?;
    if !object.getattr(intern!(py, "layout"))?.is(&strided) {
        return Err(PyValueError::new_err(format!(
            "tensor {} is sparse, which safetensors cannot hold; .to_dense() makes it dense",
            quote(name)
        )));
    }
    let text = object.getattr(intern!(py, "dtype"))?.str()?.to_string();
    let dtype = text.strip_prefix("torch.").and_then(DType::from_framework_name);
    let dtype = dtype.filter(|dtype| dtype.torch_name().is_some()).ok_or_else(|| unsupported(name, &text))?;
    let mut shape: Vec<usize> = object.getattr(intern!(py, "shape"))?.extract()?;
    let on_cpu = is_cpu(&object.getattr(intern!(py, "device"))?.getattr(intern!(py, "type"))?);
    // Lazily conjugated or negated tensors hold other bytes than they mean.
    let plain = !object.call_method0(intern!(py, "is_neg"))?.is_truthy()?
        && (dtype != DType::C64 || !object.call_method0(intern!(py, "is_conj"))?.is_truthy()?)
        && object.call_method0(intern!(py, "is_contiguous"))?.is_truthy()?;
    let elements = elements(&shape).ok_or_else(|| unsupported(name, &text))?;
    if dtype == DType::F4 {
        let last = shape.last_mut().ok_or_else(|| unsupported(name, "float4_e2m1fn_x2 of rank 0"))?;
        *last *= 2;
    }
    let len = match dtype {
        DType::F4 => elements,
        _ => dtype.nbytes(elements).ok_or_else(|| unsupported(name, &text))?,
    };
    let data = if on_cpu && plain {
        // A tensor of our own over the same storage: `object.data = …` by someone else frees nothing.
        let object = object.call_method0(intern!(py, "detach"))?;
        let ptr: usize = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        if ptr == 0 && len > 0 {
            let text = format!("tensor {} has no memory of its own (meta, fake or wrapped)", quote(name));
            return Err(Error::Argument(text).into());
        }
        Data::Ready { ptr: std::ptr::without_provenance(ptr), len, _keep: object.into() }
    } else {
        let meta: String = object.getattr("device")?.getattr("type")?.extract()?;
        if meta == "meta" {
            let text = format!("tensor {} is on the meta device: it has no values", quote(name));
            return Err(Error::Argument(text).into());
        }
        Data::Strided(object.clone().unbind())
    };
    Ok(Given { dtype, shape, data })
}

/// numpy's `PyArrayInterface`, from its documentation of the array interface protocol.
#[repr(C)]
struct ArrayInterface {
    two: c_int,
    nd: c_int,
    typekind: c_char,
    itemsize: c_int,
    flags: c_int,
    shape: *const isize,
    strides: *const isize,
    data: *const u8,
}

fn look_at_numpy(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Given> {
    const CONTIGUOUS: c_int = 0x1;
    const NOT_SWAPPED: c_int = 0x200;
    let py = object.py();
    let dtype = known_dtype(name, &object.getattr(intern!(py, "dtype"))?)?;
    let capsule = object.getattr(intern!(py, "__array_struct__"))?;
    // SAFETY: the protocol: an unnamed capsule holding a PyArrayInterface, as long as it lives.
    let interface = unsafe { pyo3::ffi::PyCapsule_GetPointer(capsule.as_ptr(), std::ptr::null()) };
    // SAFETY: as above; null is an exception.
    let Some(interface) = (unsafe { interface.cast::<ArrayInterface>().as_ref() }) else {
        return Err(PyErr::fetch(py));
    };
    let dims = if interface.nd == 0 {
        &[]
    } else {
        // SAFETY: the protocol: `nd` integers, as long as the capsule lives.
        unsafe {
            std::slice::from_raw_parts(interface.shape, usize::try_from(interface.nd).unwrap_or_default())
        }
    };
    let shape: Vec<usize> = dims.iter().map(|dim| dim.unsigned_abs()).collect();
    if dtype.itemsize().is_none() {
        return pack(name, dtype, shape, object);
    }
    let len = elements(&shape).and_then(|n| dtype.nbytes(n));
    let len = len.ok_or_else(|| unsupported(name, dtype.numpy_name()))?;
    let ready =
        interface.flags & CONTIGUOUS != 0 && (interface.flags & NOT_SWAPPED != 0 || interface.itemsize == 1);
    let data = if ready || len == 0 {
        Data::Ready { ptr: interface.data, len, _keep: object.clone().into() }
    } else {
        Data::Strided(object.clone().unbind())
    };
    Ok(Given { dtype, shape, data })
}

/// What a numpy dtype object is here; each is asked for its name once.
fn known_dtype(name: &str, object: &Bound<'_, PyAny>) -> PyResult<DType> {
    static KNOWN: Mutex<Vec<(Py<PyAny>, DType)>> = Mutex::new(Vec::new());
    const MOST: usize = 64;
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, dtype)) = known.iter().find(|(seen, _)| seen.is(object)) {
        return Ok(*dtype);
    }
    drop(known);
    let text: String = object.getattr(intern!(object.py(), "name"))?.extract()?;
    let dtype = DType::from_framework_name(&text).ok_or_else(|| unsupported(name, &text))?;
    known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() < MOST {
        known.push((object.clone().unbind(), dtype));
    }
    Ok(dtype)
}

/// `ml_dtypes` holds 4-bit floats one to the byte; the file two.
fn pack(name: &str, dtype: DType, shape: Vec<usize>, object: &Bound<'_, PyAny>) -> PyResult<Given> {
    let py = object.py();
    if dtype != DType::F4 {
        return Err(unsupported(name, dtype.numpy_name()));
    }
    let bytes: Vec<u8> = object.call_method0("tobytes")?.extract()?;
    if !bytes.len().is_multiple_of(2) {
        let what = format!("ends inside a byte: {} elements of 4 bits", bytes.len());
        return Err(Error::Align { path: PathBuf::new(), tensor: name.into(), what }.into());
    }
    let packed: Vec<u8> = bytes.chunks_exact(2).map(|pair| pair[0] & 0xf | pair[1] << 4).collect();
    let keep = PyBytes::new(py, &packed);
    let (ptr, len) = (keep.as_bytes().as_ptr(), packed.len());
    Ok(Given { dtype, shape, data: Data::Ready { ptr, len, _keep: keep.into_any().into() } })
}

/// Writes `value` into `to`, converting as the value's own framework does.
pub(super) fn assign(py: Python<'_>, to: &Array<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
    if is_torch(value)? {
        let value = value.call_method0("detach")?;
        let out = to.torch(py, None)?;
        if to.dtype == DType::F4 {
            // torch copies no packed dtypes; bytes it does.
            let bytes = py.import("torch")?.getattr("uint8")?;
            out.call_method1("view", (&bytes,))?
                .call_method1("copy_", (value.call_method1("view", (bytes,))?,))?;
            return Ok(());
        }
        if out.getattr("shape")?.ne(value.getattr("shape")?)?
            && value.call_method0("dim")?.extract::<usize>()? > 0
        {
            return Err(shape_error(to, &value)?);
        }
        out.call_method1("copy_", (value,))?;
        return Ok(());
    }
    if to.dtype.itemsize().is_none() {
        let given = look_at(to.name, value)?;
        let (true, Some(source)) = (given.dtype == to.dtype && given.shape == to.shape, given.data.source())
        else {
            return Err(shape_error(to, value)?);
        };
        let Some(_) = to.source() else {
            return Err(PyTypeError::new_err("packed elements are written in one piece"));
        };
        to.memory.write(&(to.offset..to.offset + to.nbytes()), source);
        return Ok(());
    }
    let numpy = py.import("numpy")?;
    let typed = value.hasattr("dtype")?;
    let value = numpy.call_method1("asarray", (value,))?;
    if value.getattr("dtype")?.getattr("kind")?.extract::<char>()? == 'O' {
        return Err(PyTypeError::new_err("a tensor is assigned numbers or an array of them"));
    }
    if value.getattr("ndim")?.extract::<usize>()? > 0
        && value.getattr("shape")?.ne(PyTuple::new(py, to.shape)?)?
    {
        return Err(shape_error(to, &value)?);
    }
    let options = PyDict::new(py);
    // Python's numbers have no dtype of their own, and become the tensor's as in numpy's `a[...] = 1`.
    options.set_item("casting", if typed { "same_kind" } else { "unsafe" })?;
    numpy.call_method("copyto", (to.numpy(py)?, value), Some(&options))?;
    Ok(())
}

fn shape_error(to: &Array<'_>, value: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    let shape = value
        .getattr("shape")
        .map_or_else(|_| Ok("no shape".into()), |shape| Ok::<_, PyErr>(shape.str()?.to_string()))?;
    let text = format!("tensor {} has shape {:?}, the value {shape}", quote(to.name), to.shape);
    Ok(Error::Argument(text).into())
}
