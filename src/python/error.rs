//! [`Error`] as Python exceptions: the classes live in `maptensors.errors`.

use crate::error::Error;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::io;
use std::path::Path;

static BY_KIND: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| match convert(py, &error) {
            Ok(error) | Err(error) => error,
        })
    }
}

fn convert(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    if let Error::Io { path, action, source } = error {
        return os_error(py, path, action, source);
    }
    let classes = BY_KIND.get_or_try_init(py, || -> PyResult<_> {
        Ok(py.import("maptensors.errors")?.getattr("BY_KIND")?.unbind())
    })?;
    let exception = classes.bind(py).get_item(error.kind().name())?.call1((error.to_string(),))?;
    if let Error::NotRegular { path, .. }
    | Error::NotDurable { path, .. }
    | Error::NotRemoved { path, .. }
    | Error::Moved { path, .. } = error
    {
        exception.setattr("filename", path.as_os_str())?;
    }
    if let Error::NotRemoved { left, source, .. } = error {
        exception.setattr("filename2", left.as_os_str())?;
        exception.setattr("errno", source.raw_os_error())?;
    }
    if let Error::Checksum { tensor, others, .. } = error {
        let tensors: Vec<&String> = std::iter::once(tensor).chain(others).collect();
        exception.setattr("tensors", tensors)?;
    }
    if let Error::Value { tensor, .. } = error {
        exception.setattr("tensors", [tensor])?;
    }
    Ok(PyErr::from_value(exception))
}

/// `OSError(errno, strerror, filename)`, which Python turns into the subclass of its errno.
fn os_error(py: Python<'_>, path: &Path, action: &str, source: &io::Error) -> PyResult<PyErr> {
    let error = match source.raw_os_error() {
        Some(errno) => {
            let text = py.import("os")?.call_method1("strerror", (errno,))?;
            let class = py.get_type::<PyOSError>();
            // What is in memory has no path.
            let exception = match path.as_os_str() {
                path if path.is_empty() => class.call1((errno, text)),
                path => class.call1((errno, text, path)),
            };
            PyErr::from_value(exception?)
        }
        None => PyOSError::new_err(format!("{}: {source}", path.display())),
    };
    error.value(py).call_method1("add_note", (format!("while {action}"),))?;
    Ok(error)
}
