//! torch's own functions.

use super::{is_imported, is_of};
use crate::dtype::DType;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// torch's C functions, looked up once, where no subclass can stand in front of them.
pub(super) struct Base {
    pub(super) class: Py<PyAny>,
    pub(super) is_neg: Py<PyAny>,
    pub(super) is_conj: Py<PyAny>,
    pub(super) untyped_storage: Py<PyAny>,
    pub(super) nbytes: Py<PyAny>,
    pub(super) data_ptr: Py<PyAny>,
    pub(super) dtype: Py<PyAny>,
    pub(super) to_dlpack: Py<PyAny>,
    pub(super) from_dlpack: Py<PyAny>,
    pub(super) strided: Py<PyAny>,
    pub(super) dtypes: Vec<(Py<PyAny>, DType)>,
}

static BASE: PyOnceLock<Base> = PyOnceLock::new();

pub(super) fn base(py: Python<'_>) -> PyResult<&'static Base> {
    BASE.get_or_try_init(py, || {
        let module = py.import("torch")?;
        let c = module.getattr("_C")?;
        let (class, storage) = (c.getattr("TensorBase")?, c.getattr("StorageBase")?);
        let of = |name: &str| class.getattr(name).map(Bound::unbind);
        let mut dtypes = Vec::new();
        for &dtype in DType::ALL {
            // An older torch may lack the newer ones.
            if let Some(Ok(object)) = dtype.torch_name().map(|name| module.getattr(name)) {
                dtypes.push((object.unbind(), dtype));
            }
        }
        Ok(Base {
            is_neg: of("is_neg")?,
            is_conj: of("is_conj")?,
            untyped_storage: of("untyped_storage")?,
            nbytes: storage.getattr("nbytes")?.unbind(),
            data_ptr: storage.getattr("data_ptr")?.unbind(),
            dtype: of("dtype")?,
            to_dlpack: c.getattr("_to_dlpack")?.unbind(),
            from_dlpack: c.getattr("_from_dlpack")?.unbind(),
            strided: module.getattr("strided")?.unbind(),
            class: class.unbind(),
            dtypes,
        })
    })
}

/// Calls a function with one argument. (Through the stable ABI of Python 3.11, `PyO3` makes a tuple for each call.)
pub(super) fn call_one<'py>(
    function: &Py<PyAny>,
    argument: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let end = std::ptr::null_mut::<pyo3::ffi::PyObject>();
    // SAFETY: attached, as `argument` shows; an object to call, one object, and the end of the list.
    let result =
        unsafe { pyo3::ffi::PyObject_CallFunctionObjArgs(function.as_ptr(), argument.as_ptr(), end) };
    // SAFETY: a reference that is ours, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(argument.py(), result) }
}

/// Whether an object is a tensor of torch, by its real type: `__class__` may say anything. Only a process that has
/// imported torch can hold one.
pub(super) fn is_tensor(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = object.py();
    if BASE.get(py).is_none() && !is_imported(py, "torch", "Tensor")? {
        return Ok(false);
    }
    Ok(is_of(object, base(py)?.class.bind(py)))
}

pub(super) fn known(base: &Base, dtype: &Bound<'_, PyAny>) -> Option<DType> {
    base.dtypes.iter().find(|(object, _)| object.is(dtype)).map(|(_, dtype)| *dtype)
}
