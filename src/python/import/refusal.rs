//! What is refused, by name, and what to call instead.

use super::is_of;
use super::storage::Storage;
use crate::dtype::DType;
use crate::error::{Error, quote};
use pyo3::exceptions::{PyException, PyMemoryError};
use pyo3::prelude::*;
use std::path::PathBuf;

pub(super) fn unsupported(name: &str, found: &str) -> PyErr {
    Error::DType {
        path: PathBuf::new(),
        tensor: name.into(),
        found: format!("of dtype {found}"),
        expected: "a dtype that safetensors has".into(),
    }
    .into()
}

pub(super) fn refused(name: &str, why: &str) -> PyErr {
    Error::Argument(format!("tensor {} {why}", quote(name))).into()
}

pub(in crate::python) fn bad_bool(name: &str, found: u8) -> Error {
    let what = format!("a bool is 0 or 1, not {found}; seen as uint8 its bytes can be saved");
    Error::Value { tensor: name.into(), what }
}

/// An error of a framework's or of an array's own code, with the name of the tensor. What is no fault of the array
/// (an interrupt, no memory), or names it already, stays as it is.
pub(super) fn named(py: Python<'_>, name: &str, error: PyErr) -> PyErr {
    let ours = py.import("maptensors.errors").and_then(|errors| errors.getattr("MapTensorsError"));
    let is_ours = ours.is_ok_and(|class| error.matches(py, class).unwrap_or(false));
    if is_ours || !error.is_instance_of::<PyException>(py) || error.is_instance_of::<PyMemoryError>(py) {
        return error;
    }
    let text = error.value(py).str().map_or_else(|_| String::new(), |text| text.to_string());
    let kind = error.get_type(py).name().map_or_else(|_| "an error".into(), |name| name.to_string());
    // torch puts a trace of its own behind the first line.
    let first = text.lines().next().unwrap_or_default();
    let named = refused(name, &format!("cannot be read: {kind}: {first}"));
    named.set_cause(py, Some(error));
    named
}

pub(super) fn resized(name: &str) -> PyErr {
    refused(name, "was freed or resized while it was looked at")
}

pub(super) fn outside(name: &str, storage: &Storage, shape: &[usize], dtype: DType) -> PyErr {
    let held = storage.bytes.len();
    refused(
        name,
        &format!(
            "is {dtype} {shape:?}, more than the {held} bytes that its storage holds: it was freed or resized"
        ),
    )
}

/// What no look at memory would tell.
pub(super) fn refuse_class(name: &str, object: &Bound<'_, PyAny>) -> PyResult<()> {
    if is_a(object, "torch._subclasses.fake_tensor", "FakeTensor")? {
        return Err(refused(name, "is a FakeTensor: it has no values"));
    }
    if is_a(object, "torch.nn.parameter", "UninitializedTensorMixin")? {
        return Err(refused(
            name,
            "is not initialized yet: a lazy module gets its parameters when it is first called",
        ));
    }
    Ok(())
}

/// By the real type, of a module that may not be imported.
fn is_a(object: &Bound<'_, PyAny>, module: &str, class: &str) -> PyResult<bool> {
    let modules = object.py().import("sys")?.getattr("modules")?;
    let module = modules.call_method1("get", (module,))?;
    Ok(module.getattr(class).is_ok_and(|class| is_of(object, &class)))
}

pub(super) fn no_memory(name: &str, object: &Bound<'_, PyAny>, cause: Option<PyErr>) -> PyErr {
    let py = object.py();
    let class = object.get_type().name().map_or_else(|_| "tensor".into(), |name| name.to_string());
    let text = match class.as_str() {
        "Tensor" | "Parameter" => {
            "has no memory of its own (in vmap, grad or functionalize, or lazy): save it outside of that, or its .clone()".into()
        }
        "DTensor" => "is a DTensor, which has no memory of its own; .full_tensor() gathers it, .to_local() is this process's part".into(),
        "MaskedTensor" => "is a MaskedTensor, which has no memory of its own; .to_tensor(value) says what stands for masked values".into(),
        class => format!(
            "is a {class}, which has no memory of its own: save the tensors that it wraps, or what it makes a plain tensor \
             (.dequantize(), .to_dense(), .full_tensor())"
        ),
    };
    let error = refused(name, &text);
    error.set_cause(py, cause);
    error
}
