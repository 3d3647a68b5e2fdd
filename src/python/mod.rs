//! The extension module `maptensors._native`: argument in, call, result out.
//!
//! Free-threaded Python: not claimed. The module asks for the GIL (`gil_used = true`), which such an
//! interpreter then turns on when it imports it. Classes are immutable or lock inside; memory that Python
//! can write is reached by raw copies only.
//!
//! Subinterpreters: refused when the module is imported ([`interpreter`]).
#![allow(unsafe_code)]
// pyo3's extraction and protocols dictate these signatures.
#![allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps)]
// A method's path is not general enough over the lifetime that a closure's argument has.
#![allow(clippy::redundant_closure_for_method_calls)]

mod changes;
mod checkpoint;
mod collector;
mod delta;
mod draft;
mod error;
mod export;
mod frameworks;
mod import;
mod index;
mod interpreter;
mod interrupt;
mod lazy;
mod metadata;
mod model;
mod number;
mod open;
mod parts;
mod results;
mod save;
mod share;
mod tensor;

use pyo3::prelude::*;

// A function, so that the interpreter is asked for before any class is made for it.
#[pymodule(gil_used = true)]
#[pyo3(name = "_native")]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    interpreter::only_main(module.py())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<changes::Changes>()?;
    module.add_class::<checkpoint::Checkpoints>()?;
    module.add_class::<checkpoint::Saving>()?;
    module.add_class::<draft::Draft>()?;
    module.add_class::<lazy::Prefetch>()?;
    module.add_class::<lazy::Stream>()?;
    module.add_class::<model::Model>()?;
    module.add_class::<share::Publisher>()?;
    module.add_class::<share::Subscriber>()?;
    module.add_class::<tensor::Tensor>()?;
    module.add_function(wrap_pyfunction!(delta::apply_delta, module)?)?;
    module.add_function(wrap_pyfunction!(delta::diff, module)?)?;
    module.add_function(wrap_pyfunction!(delta::materialize, module)?)?;
    module.add_function(wrap_pyfunction!(delta::save_delta, module)?)?;
    module.add_function(wrap_pyfunction!(delta::save_diff, module)?)?;
    module.add_function(wrap_pyfunction!(delta::verify, module)?)?;
    module.add_function(wrap_pyfunction!(draft::create, module)?)?;
    module.add_function(wrap_pyfunction!(import::firsts, module)?)?;
    module.add_function(wrap_pyfunction!(import::torch_memory, module)?)?;
    module.add_function(wrap_pyfunction!(lazy::prefetch, module)?)?;
    module.add_function(wrap_pyfunction!(lazy::rank_view, module)?)?;
    module.add_function(wrap_pyfunction!(lazy::stream, module)?)?;
    module.add_function(wrap_pyfunction!(open::loads, module)?)?;
    module.add_function(wrap_pyfunction!(open::open, module)?)?;
    module.add_function(wrap_pyfunction!(open::open_whole, module)?)?;
    module.add_function(wrap_pyfunction!(save::edit, module)?)?;
    module.add_function(wrap_pyfunction!(save::planned_size, module)?)?;
    module.add_function(wrap_pyfunction!(save::save, module)?)?;
    module.add_function(wrap_pyfunction!(save::dumps, module)?)?;
    module.add_function(wrap_pyfunction!(share::publications, module)?)?;
    module.add_function(wrap_pyfunction!(share::remove_publication, module)?)?;
    #[cfg(feature = "cli")]
    module.add_function(wrap_pyfunction!(cli, module)?)?;
    Ok(())
}

/// Runs the command line with these arguments (the program's name first); returns the exit code.
#[cfg(feature = "cli")]
#[pyfunction]
fn cli(py: Python<'_>, args: Vec<std::ffi::OsString>) -> u8 {
    py.detach(|| crate::cli::run(args))
}
