//! Tensors of torch.
//!
//! A subclass written in Python may answer what it likes to `shape`, `data_ptr()` and all else. So a tensor is asked
//! through torch's own C functions, once, by DLPack, and what that says is checked against the storage.

use super::base::{Base, base, call_one, known};
use super::refusal::{bad_bool, named, no_memory, outside, refuse_class, refused, resized, unsupported};
use super::storage::{Storage, is_contiguous, place};
use super::{Data, Given, Keep};
use crate::dtype::DType;
use crate::layout::elements;
use crate::python::export::Taken;
use crate::python::frameworks::{is_cpu, torch};
use pyo3::intern;
use pyo3::prelude::*;
use std::ops::Range;

/// What a tensor is, read once.
pub(super) struct Seen<'py> {
    pub(super) py: Python<'py>,
    pub(super) dtype: DType,
    /// As torch counts: two 4-bit floats are one element.
    pub(super) shape: Vec<usize>,
    pub(super) storage: Storage,
    /// From its lowest to its highest byte.
    pub(super) bytes: Range<usize>,
    pub(super) conjugated: bool,
    pub(super) negated: bool,
    pub(super) memory: Memory<'py>,
}

pub(super) enum Memory<'py> {
    /// On the CPU, inside of the storage.
    Taken(Taken),
    Device {
        tensor: Bound<'py, PyAny>,
        strides: Vec<i64>,
    },
}

impl Memory<'_> {
    /// In elements; empty where they are those of C order.
    pub(super) fn strides(&self) -> &[i64] {
        match self {
            Self::Taken(taken) => taken.strides(),
            Self::Device { strides, .. } => strides,
        }
    }
}

/// Looks at a tensor, by its name. To be called out of torch's modes.
///
/// # Errors
/// `MapTensorsError` for one without memory of its own, `DTypeError` for a dtype safetensors does not have.
pub(super) fn look(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Given> {
    let py = object.py();
    let exact = is_exact(py, object)?;
    let seen = see(name, object).map_err(|error| named(py, name, error))?;
    // A class of Python's may yet run code, at which the memory of this one goes.
    let (owner, bytes) = (&seen.storage.object, seen.storage.bytes.clone());
    let storage = (!exact).then(|| Storage { object: owner.clone_ref(py), bytes });
    Ok(Given { storage, ..seen.given(name)? })
}

/// What a tensor is, in few calls where it is what nearly every one is: of torch's own class, on the CPU.
pub(super) fn see<'py>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Seen<'py>> {
    if is_exact(object.py(), object)?
        && let Some(seen) = see_plain(object)?
    {
        return Ok(seen);
    }
    see_any(name, object)
}

/// Whether it is of a class that runs no code of others.
pub(super) fn is_exact(py: Python<'_>, object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let (torch, class) = (torch(py)?, object.get_type());
    Ok(class.is(&torch.class) || class.is(&torch.parameter))
}

/// `None` for what wants a closer look.
fn see_plain<'py>(object: &Bound<'py, PyAny>) -> PyResult<Option<Seen<'py>>> {
    let py = object.py();
    let base = base(py)?;
    // A lazily negated tensor holds other bytes than it means.
    let (Some(exchange), false) = (torch(py)?.exchange, call_one(&base.is_neg, object)?.is_truthy()?) else {
        return Ok(None);
    };
    // A storage that is shared until it is written becomes the tensor's own by being asked for its address,
    // and is therefore asked first.
    let Ok(storage) = Storage::of(base, object) else { return Ok(None) };
    let Ok(taken) = exchange.take(object) else { return Ok(None) };
    let Some(dtype) = plain_dtype(base, object, &taken)? else { return Ok(None) };
    let (Some(shape), true) = (taken.shape(), taken.is_on_cpu()) else { return Ok(None) };
    let at = taken.ptr().addr();
    let Some(bytes) = place(at, &shape, taken.strides(), dtype, &storage) else { return Ok(None) };
    let (conjugated, negated, memory) = (false, false, Memory::Taken(taken));
    Ok(Some(Seen { py, dtype, shape, storage, bytes, conjugated, negated, memory }))
}

/// The dtype, if bytes mean the same whatever else the tensor is. DLPack has one name for each kind of float; what is an
/// integer there may be one of fewer bits to torch.
fn plain_dtype(base: &Base, object: &Bound<'_, PyAny>, taken: &Taken) -> PyResult<Option<DType>> {
    const FLOATS: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F64];
    if let Some(&float) = FLOATS.iter().find(|&&float| taken.is(float)) {
        return Ok(Some(float));
    }
    let dtype = known(base, &object.getattr(intern!(object.py(), "dtype"))?);
    // A complex one may be lazily conjugated; and two 4-bit floats are one element.
    Ok(dtype.filter(|&dtype| dtype != DType::C64 && dtype != DType::F4 && taken.is(dtype)))
}

fn see_any<'py>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Seen<'py>> {
    let py = object.py();
    let (torch, base) = (torch(py)?, base(py)?);
    refuse_class(name, object)?;
    let of = |what: &str| base.class.bind(py).getattr(what);
    let get = |what: &str| of(what)?.call_method1(intern!(py, "__get__"), (object,));
    if get("is_nested")?.is_truthy()? {
        return Err(refused(
            name,
            "is nested, which safetensors cannot hold; .to_padded_tensor(0.0), or its .values() and .offsets(), can be saved",
        ));
    }
    if !get("layout")?.is(&base.strided) {
        return Err(refused(name, "is sparse, which safetensors cannot hold; .to_dense() makes it dense"));
    }
    if get("is_quantized")?.is_truthy()? {
        return Err(refused(
            name,
            "is quantized, which safetensors cannot hold; .dequantize() gives its values, .int_repr() its integers without their scale",
        ));
    }
    let found = base.dtype.bind(py).call_method1(intern!(py, "__get__"), (object,))?;
    let dtype = known(base, &found).ok_or_else(|| unsupported(name, &found.to_string()))?;
    let device = get("device")?.getattr(intern!(py, "type"))?;
    if device.str()? == "meta" {
        return Err(refused(name, "is on the meta device: it has no values"));
    }
    let storage = Storage::of(base, object).map_err(|error| no_memory(name, object, Some(error)))?;
    let flag = |function: &Py<PyAny>| function.bind(py).call1((object,))?.is_truthy();
    let (negated, conjugated) = (flag(&base.is_neg)?, dtype == DType::C64 && flag(&base.is_conj)?);
    let (shape, at, memory) = if is_cpu(&device) {
        let taken = match torch.exchange {
            Some(exchange) => exchange.take(object)?,
            None => Taken::of_capsule(&base.to_dlpack.bind(py).call1((object,))?)?,
        };
        let shape = taken.shape().filter(|_| taken.is(dtype) && taken.is_on_cpu());
        let shape = shape.ok_or_else(|| refused(name, "is not what it says of itself"))?;
        (shape, taken.ptr().addr(), Memory::Taken(taken))
    } else {
        let tensor = of("detach")?.call1((object,))?;
        let shape = of("shape")?.call_method1("__get__", (&tensor,))?.extract()?;
        let strides = of("stride")?.call1((&tensor,))?.extract()?;
        (shape, of("data_ptr")?.call1((&tensor,))?.extract()?, Memory::Device { tensor, strides })
    };
    let Some(bytes) = place(at, &shape, memory.strides(), dtype, &storage) else {
        return Err(if storage.bytes.is_empty() && at == 0 && !is_exact(py, object)? {
            no_memory(name, object, None)
        } else {
            outside(name, &storage, &shape, dtype)
        });
    };
    // A wrapper of empty tensors needs no memory, and yet has none.
    if bytes.is_empty()
        && !is_exact(py, object)?
        && object.get_type().hasattr(intern!(py, "__tensor_flatten__"))?
    {
        return Err(no_memory(name, object, None));
    }
    // Being asked for its numbers, a class of Python's may have run code.
    if !storage.is_as_it_was(py)? {
        return Err(resized(name));
    }
    Ok(Seen { py, dtype, shape, storage, bytes, conjugated, negated, memory })
}

impl<'py> Seen<'py> {
    /// As the file counts: each 4-bit float is an element.
    pub(super) fn shape_in_file(&self, name: &str) -> PyResult<Vec<usize>> {
        let mut shape = self.shape.clone();
        if self.dtype == DType::F4 {
            let odd = || unsupported(name, &format!("float4_e2m1fn_x2 of shape {:?}", self.shape));
            let last = shape.last_mut().ok_or_else(odd)?;
            *last = last.checked_mul(2).ok_or_else(odd)?;
        }
        Ok(shape)
    }

    fn given(self, name: &str) -> PyResult<Given> {
        let py = self.py;
        let (dtype, shape) = (self.dtype, self.shape_in_file(name)?);
        let len = elements(&shape).and_then(|n| dtype.nbytes(n));
        let len = len.ok_or_else(|| unsupported(name, &format!("{dtype} of shape {shape:?}")))?;
        let plain = !self.conjugated && !self.negated && is_contiguous(&self.shape, self.memory.strides());
        let data = match self.memory {
            Memory::Taken(taken) if plain => {
                Data::Ready { ptr: taken.ptr(), len, _keep: Keep::Taken { _tensor: taken } }
            }
            memory => {
                let seen = Self { memory, ..self };
                Data::Strided(seen.plain().map_err(|error| named(py, name, error))?.unbind())
            }
        };
        Ok(Given { dtype, shape, data, storage: None })
    }

    /// A tensor of torch's own class over the same memory, with the numbers that were checked.
    pub(super) fn plain(self) -> PyResult<Bound<'py, PyAny>> {
        let (py, base) = (self.py, base(self.py)?);
        let mut tensor = match self.memory {
            Memory::Taken(taken) => taken.give(py, torch(py)?.exchange, base.from_dlpack.bind(py))?,
            Memory::Device { tensor, .. } => return Ok(tensor),
        };
        for (lazily, method) in [(self.conjugated, "conj"), (self.negated, "_neg_view")] {
            if lazily {
                tensor = base.class.bind(py).getattr(method)?.call1((tensor,))?;
            }
        }
        Ok(tensor)
    }
}

/// Copies a plain tensor into another.
pub(super) fn copy(to: &Bound<'_, PyAny>, from: &Bound<'_, PyAny>, dtype: DType) -> PyResult<()> {
    let py = to.py();
    let class = base(py)?.class.bind(py);
    if dtype == DType::F4 {
        // torch copies no packed dtypes; bytes it does.
        let (view, bytes) = (class.getattr("view")?, py.import("torch")?.getattr("uint8")?);
        let (to, from) = (view.call1((to, &bytes))?, view.call1((from, &bytes))?);
        class.getattr("copy_")?.call1((to, from))?;
    } else {
        class.getattr("copy_")?.call1((to, from))?;
    }
    Ok(())
}

/// The lowest and the highest of a tensor of integers, or `None` where there are none.
pub(super) fn range_of_integers(tensor: &Bound<'_, PyAny>, dtype: DType) -> PyResult<Option<(i128, i128)>> {
    let py = tensor.py();
    let module = py.import("torch")?;
    let class = base(py)?.class.bind(py);
    // What torch computes least with, it can at least show as something else.
    let wide = if dtype == DType::U64 {
        class.getattr("view")?.call1((tensor, module.getattr("int64")?))?
    } else {
        class.getattr("to")?.call1((tensor, module.getattr("int64")?))?
    };
    if class.getattr("numel")?.call1((&wide,))?.extract::<usize>()? == 0 {
        return Ok(None);
    }
    let end = |which: &str| {
        class.getattr("item")?.call1((class.getattr(which)?.call1((&wide,))?,))?.extract::<i128>()
    };
    let (low, high) = (end("min")?, end("max")?);
    if dtype == DType::U64 && low < 0 {
        // Seen as signed, the upper half is negative.
        return Ok(Some((0, i128::from(u64::MAX))));
    }
    Ok(Some((low, high)))
}

/// Refuses a tensor of torch that is no value of its type.
pub(super) fn check_bools(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = tensor.py();
    let class = base(py)?.class.bind(py);
    let bytes = class.getattr("view")?.call1((tensor, py.import("torch")?.getattr("uint8")?))?;
    if class.getattr("numel")?.call1((&bytes,))?.extract::<usize>()? == 0 {
        return Ok(());
    }
    let most = class.getattr("item")?.call1((class.getattr("max")?.call1((bytes,))?,))?;
    match most.extract::<u8>()? {
        0 | 1 => Ok(()),
        found => Err(bad_bool(name, found).into()),
    }
}

/// Whether torch holds a dtype to become another without a loss of kind: a float no integer, nothing complex real.
pub(super) fn can_cast(py: Python<'_>, from: DType, to: DType) -> PyResult<bool> {
    let base = base(py)?;
    let object =
        |dtype: DType| base.dtypes.iter().find(|(_, known)| *known == dtype).map(|(object, _)| object);
    match (object(from), object(to)) {
        (Some(from), Some(to)) => py.import("torch")?.call_method1("can_cast", (from, to))?.is_truthy(),
        _ => Ok(false),
    }
}
