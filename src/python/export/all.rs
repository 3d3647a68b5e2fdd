//! All tensors of a model at once.

use super::Array;
use crate::python::collector::PausedCollector;
use crate::python::parts::Parts;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// One array for each tensor, of memory that is writable if they are `writable`.
pub(in crate::python) fn arrays<'py>(
    py: Python<'py>,
    parts: &Parts,
    writable: bool,
    make: impl Fn(&Array<'_>) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    if writable && !parts.read_only {
        py.detach(|| parts.make_writable())?;
    }
    let _paused = PausedCollector::new(py);
    let dict = PyDict::new(py);
    let mut bad = Vec::new();
    for (shard, index, info) in parts.infos() {
        let waited_for;
        let (memory, offset) = if let Some(at_once) = parts.memory_at_once(shard, &info) {
            at_once
        } else {
            waited_for = py.detach(|| parts.memory_of(shard, index, &info))?;
            (&waited_for.0, waited_for.1)
        };
        let array = Array {
            memory,
            offset,
            dtype: info.dtype(),
            shape: info.shape(),
            strides: None,
            read_only: parts.read_only,
            name: info.name(),
        };
        match make(&array) {
            Ok(one) => dict.set_item(info.name(), one)?,
            Err(error) if is_bad_value(py, &error) => bad.push((info.name().to_owned(), error)),
            Err(error) => return Err(error),
        }
    }
    if bad.is_empty() { Ok(dict) } else { Err(bad_values(py, bad)?) }
}

/// Whether a tensor alone is at fault: its bytes are no values.
fn is_bad_value(py: Python<'_>, error: &PyErr) -> bool {
    let kind = error.value(py).getattr("kind").and_then(|kind| kind.extract::<String>());
    kind.is_ok_and(|kind| kind == "Value")
}

/// One error for all tensors that cannot be had, and how to get the others.
fn bad_values(py: Python<'_>, bad: Vec<(String, PyErr)>) -> PyResult<PyErr> {
    let (names, errors): (Vec<String>, Vec<PyErr>) = bad.into_iter().unzip();
    let first = errors.first().map_or_else(|| Ok(String::new()), |error| error.value(py).str()?.extract())?;
    let more =
        if names.len() > 1 { format!(" (and {} more tensors)", names.len() - 1) } else { String::new() };
    let text = format!("{first}{more}; the others can be had by name, of what maptensors.open gives");
    let class = py.import("maptensors.errors")?.getattr("BitPatternError")?;
    let error = class.call1((text,))?;
    error.setattr("tensors", names)?;
    Ok(PyErr::from_value(error))
}
