//! The extension module `maptensors._native`: argument in, call, result out.
//!
//! Free-threaded Python: not claimed. The module asks for the GIL (`gil_used = true`), which such an
//! interpreter then turns on when it imports it. Classes are immutable or lock inside; memory that Python
//! can write is reached by raw copies only.
#![allow(unsafe_code)]
// pyo3's extraction and protocols dictate these signatures.
#![allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps)]
// A method's path is not general enough over the lifetime that a closure's argument has.
#![allow(clippy::redundant_closure_for_method_calls)]

mod arrays;
mod buffer;
mod changes;
mod checkpoint;
mod delta;
mod dlpack;
mod draft;
mod error;
mod given;
mod interrupt;
mod lazy;
mod metadata;
mod model;
mod number;
mod open;
mod parts;
mod save;
mod share;
mod tensor;

use pyo3::prelude::*;

#[pymodule(gil_used = true)]
#[pyo3(name = "_native")]
mod native {
    #[pymodule_export]
    use crate::python::changes::Changes;
    #[pymodule_export]
    use crate::python::checkpoint::{Checkpoints, Saving};
    #[pymodule_export]
    use crate::python::delta::{apply_delta, diff, materialize, save_delta, save_diff, verify};
    #[pymodule_export]
    use crate::python::draft::{Draft, create};
    #[pymodule_export]
    use crate::python::given::{firsts, torch_memory};
    #[pymodule_export]
    use crate::python::lazy::{Prefetch, Stream, prefetch, shard, stream};
    #[pymodule_export]
    use crate::python::model::Model;
    #[pymodule_export]
    use crate::python::open::{load_bytes, open};
    #[pymodule_export]
    use crate::python::save::{edit, planned_size, save, save_bytes};
    #[pymodule_export]
    use crate::python::share::{Publisher, Subscriber, publications, remove_publication};
    #[pymodule_export]
    use crate::python::tensor::Tensor;

    #[cfg(feature = "cli")]
    use pyo3::prelude::*;

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Runs the command line with these arguments (the program's name first); returns the exit code.
    #[cfg(feature = "cli")]
    #[pyfunction]
    fn cli(py: Python<'_>, args: Vec<std::ffi::OsString>) -> u8 {
        py.detach(|| crate::cli::run(args))
    }
}
