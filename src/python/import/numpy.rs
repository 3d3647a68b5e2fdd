//! Arrays of numpy.
//!
//! Only what is exactly numpy's own class is looked at: that one's numbers are numpy's. A subclass is seen as its base,
//! and what offers `__array__` or `__dlpack__` is asked for an array first.

use super::refusal::{bad_bool, named, refused, unsupported};
use super::{Data, Given, Keep, is_imported, is_of};
use crate::dtype::DType;
use crate::error::Error;
use crate::layout::elements;
use crate::python::frameworks::{NDARRAY, import};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

pub(super) fn is_exact(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = object.py();
    if NDARRAY.get(py).is_none() && !is_imported(py, "numpy", "ndarray")? {
        return Ok(false);
    }
    Ok(object.get_type().is(&import(py, &NDARRAY, "numpy", "ndarray")?))
}

/// An array of exactly numpy's class, out of an instance of a subclass, or of what offers `__array__` or
/// `__dlpack__`. What those say cannot be checked further: an array that a foreign library makes over memory is as long as
/// it says.
///
/// # Errors
/// `MapTensorsError` for what is no array.
pub(super) fn base<'py>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    base_of(name, object).map_err(|error| named(object.py(), name, error))
}

fn base_of<'py>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = object.py();
    let numpy = py.import("numpy")?;
    let ndarray = import(py, &NDARRAY, "numpy", "ndarray")?;
    if object.hasattr("mask")? && object.hasattr("filled")? {
        return Err(refused(name, "is a masked array; .filled() says what stands for masked values"));
    }
    let array = if is_of(object, &ndarray) {
        object.clone()
    } else if object.hasattr("__array__")? {
        object.call_method0("__array__")?
    } else if object.hasattr("__dlpack__")? {
        numpy.call_method1("from_dlpack", (object,))?
    } else {
        let text = format!("is a {}, expected an array", object.get_type().name()?);
        return Err(refused(name, &text));
    };
    if !is_of(&array, &ndarray) {
        let text = format!("has an __array__ that gives a {}, no array of numpy", array.get_type().name()?);
        return Err(refused(name, &text));
    }
    // Of a subclass it makes a view of the base class, and calls nothing of it.
    numpy.call_method1("asarray", (array,))
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

/// Looks at an array of exactly numpy's class.
pub(super) fn look(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Given> {
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
    let rank = usize::try_from(interface.nd).unwrap_or_default();
    let dims = if rank == 0 || interface.shape.is_null() {
        &[]
    } else {
        // SAFETY: the protocol: `nd` integers, as long as the capsule lives.
        unsafe { std::slice::from_raw_parts(interface.shape, rank) }
    };
    let shape: Option<Vec<usize>> = dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
    // 4-bit floats lie one to the byte.
    let size = dtype.itemsize().unwrap_or(1);
    let (Some(shape), true) = (shape, usize::try_from(interface.itemsize) == Ok(size)) else {
        return Err(refused(name, "is not what it says of itself"));
    };
    if dtype.itemsize().is_none() {
        return pack(name, dtype, shape, object);
    }
    let len = elements(&shape).and_then(|n| dtype.nbytes(n));
    let len = len.ok_or_else(|| unsupported(name, dtype.numpy_name().unwrap_or(dtype.name())))?;
    let ready =
        interface.flags & CONTIGUOUS != 0 && (interface.flags & NOT_SWAPPED != 0 || interface.itemsize == 1);
    let data = if ready || len == 0 {
        Data::Ready { ptr: interface.data, len, _keep: object.clone().into() }
    } else {
        Data::Strided(object.clone().unbind())
    };
    Ok(Given { dtype, shape, data, storage: None })
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
        return Err(unsupported(name, dtype.numpy_name().unwrap_or(dtype.name())));
    }
    let bytes: Vec<u8> = object.call_method0("tobytes")?.extract()?;
    if !bytes.len().is_multiple_of(2) {
        let what =
            format!("has {} elements and ends inside a block, which is {}", bytes.len(), dtype.block());
        return Err(Error::Align { path: PathBuf::new(), tensor: name.into(), what }.into());
    }
    let packed: Vec<u8> = bytes.chunks_exact(2).map(|pair| pair[0] & 0xf | pair[1] << 4).collect();
    let keep = PyBytes::new(py, &packed);
    let (ptr, len) = (keep.as_bytes().as_ptr(), packed.len());
    let data = Data::Ready { ptr, len, _keep: Keep::from(keep.into_any()) };
    Ok(Given { dtype, shape, data, storage: None })
}

/// Refuses an array of bools that are not all 0 or 1.
pub(super) fn check_bools(name: &str, array: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = array.py();
    let options = PyDict::new(py);
    options.set_item("initial", 0)?;
    let most = array.call_method1(intern!(py, "view"), ("uint8",))?.call_method("max", (), Some(&options))?;
    match most.extract::<u8>()? {
        0 | 1 => Ok(()),
        found => Err(bad_bool(name, found).into()),
    }
}
