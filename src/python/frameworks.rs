//! numpy, torch and JAX, of which nothing is imported before it is needed.

use super::export::Exchange;
use crate::dtype::DType;
use crate::error::Error;
use pyo3::exceptions::{PyImportError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;
use std::path::PathBuf;

pub(super) fn is_cpu(device: &Bound<'_, PyAny>) -> bool {
    device.is_none() || device.str().is_ok_and(|text| text == "cpu")
}

/// Whether JAX has arrays that are made for a device in this memory, where it can.
pub(super) fn jax_stays(py: Python<'_>, device: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
    static DEFAULT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let platform = match device {
        Some(device) => device.getattr(intern!(py, "platform")).ok(),
        None => Some(import(py, &DEFAULT, "jax", "default_backend")?.call0()?),
    };
    Ok(platform.is_none_or(|platform| is_cpu(&platform)))
}

pub(super) static NDARRAY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// `module.name`, imported once.
pub(super) fn import<'py>(
    py: Python<'py>,
    cell: &'static PyOnceLock<Py<PyAny>>,
    module: &str,
    name: &str,
) -> PyResult<Bound<'py, PyAny>> {
    let object =
        cell.get_or_try_init(py, || -> PyResult<_> { Ok(py.import(module)?.getattr(name)?.unbind()) })?;
    Ok(object.bind(py).clone())
}

/// torch's ways in, looked up once.
pub(super) struct Torch {
    pub(super) class: Py<PyAny>,
    pub(super) parameter: Py<PyAny>,
    pub(super) exchange: Option<Exchange>,
    pub(super) from_dlpack: Py<PyAny>,
}

pub(super) fn torch(py: Python<'_>) -> PyResult<&'static Torch> {
    static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
    TORCH.get_or_try_init(py, || {
        let module = py.import("torch")?;
        let class = module.getattr("Tensor")?;
        Ok(Torch {
            exchange: Exchange::of(&class),
            class: class.unbind(),
            parameter: module.getattr("nn")?.getattr("Parameter")?.unbind(),
            from_dlpack: module.getattr("utils")?.getattr("dlpack")?.getattr("from_dlpack")?.unbind(),
        })
    })
}

/// numpy's dtype object; beyond numpy's own, `ml_dtypes`'.
pub(super) fn numpy_dtype(py: Python<'_>, dtype: DType) -> PyResult<Bound<'_, PyAny>> {
    static DTYPES: [PyOnceLock<Py<PyAny>>; DType::ALL.len()] =
        [const { PyOnceLock::new() }; DType::ALL.len()];
    let cell = &DTYPES[dtype as usize];
    let object = cell.get_or_try_init(py, || -> PyResult<_> {
        let none = || PyTypeError::new_err(format!("numpy has no dtype for {dtype}"));
        let name = dtype.numpy_name().ok_or_else(none)?;
        let numpy = py.import("numpy")?;
        let own = matches!(
            dtype,
            DType::Bool
                | DType::U8
                | DType::I8
                | DType::U16
                | DType::I16
                | DType::U32
                | DType::I32
                | DType::U64
                | DType::I64
                | DType::F16
                | DType::F32
                | DType::F64
                | DType::C64
        );
        let named = if own {
            PyString::new(py, name).into_any()
        } else {
            let module = py.import("ml_dtypes").map_err(|error| {
                let text = format!("numpy has no {name} of its own: pip install ml_dtypes");
                let wrapped = PyImportError::new_err(text);
                wrapped.set_cause(py, Some(error));
                wrapped
            })?;
            module.getattr(name)?
        };
        Ok(numpy.call_method1("dtype", (named,))?.unbind())
    })?;
    Ok(object.bind(py).clone())
}

/// A dtype as people write it: `"F32"`, `"float32"`, `np.float32`, `np.dtype("float32")`,
/// `torch.float32`, `ml_dtypes.bfloat16`.
pub(super) fn parse_dtype(tensor: &str, dtype: &Bound<'_, PyAny>) -> PyResult<DType> {
    let text = if let Ok(text) = dtype.cast::<PyString>() {
        text.to_string()
    } else if let Ok(name) = dtype.getattr("name").and_then(|name| name.extract::<String>()) {
        name
    } else if let Ok(name) = dtype.getattr("__name__").and_then(|name| name.extract::<String>()) {
        name
    } else {
        dtype.str()?.to_string()
    };
    let name = text.strip_prefix("torch.").unwrap_or(&text);
    name.parse().ok().or_else(|| DType::from_framework_name(name)).ok_or_else(|| {
        Error::DType {
            path: PathBuf::new(),
            tensor: tensor.into(),
            found: format!("of dtype {text}"),
            expected: "one of BOOL, U8, …, F64, or a framework's name for it".into(),
        }
        .into()
    })
}
