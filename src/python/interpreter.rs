//! Which interpreter of the process this is.

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;

/// That this is the main interpreter. Classes, exceptions and types that were looked up once are kept for the process:
/// those of one interpreter are not another's, where an error would be caught by nobody and an object outlive its
/// interpreter.
pub(super) fn only_main(_: Python<'_>) -> PyResult<()> {
    // SAFETY: this thread is attached to an interpreter, as the token proves.
    let current = unsafe { ffi::PyInterpreterState_Get() };
    // SAFETY: the interpreter that this thread is attached to, which lives.
    let id = unsafe { ffi::PyInterpreterState_GetID(current) };
    if id == 0 {
        return Ok(());
    }
    Err(PyImportError::new_err(format!(
        "maptensors can be used in the main interpreter of a process only, and this is subinterpreter {id}: use it \
         there, or in processes"
    )))
}
