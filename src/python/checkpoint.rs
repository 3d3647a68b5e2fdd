//! `maptensors._native.Checkpoints`: what `maptensors.Checkpointer` stands on.

use super::import::collect;
use super::interrupt::{GRACE, wait_in_turns};
use super::metadata::{Metadata, metadata as read_metadata};
use super::save::{bring, stage};
use crate::checkpoint;
use crate::checkpoint::{CheckpointOptions, Checkpointer, Ready};
use crate::error::Error;
use crate::work::cancel::Cancel;
use pyo3::exceptions::{PyFileNotFoundError, PyKeyboardInterrupt};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// The checkpoints of a directory.
#[pyclass(frozen, module = "maptensors._native")]
pub(super) struct Checkpoints {
    open: Mutex<Option<Arc<Checkpointer>>>,
}

impl Checkpoints {
    fn checkpointer(&self) -> PyResult<Arc<Checkpointer>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.clone().ok_or_else(|| Error::Argument("the checkpointer is closed".into()).into())
    }

    fn start(
        &self,
        py: Python<'_>,
        tensors: &Bound<'_, PyAny>,
        step: u64,
        metadata: Metadata,
        alone: bool,
        cancel: &Cancel,
    ) -> PyResult<checkpoint::Saving> {
        let checkpointer = self.checkpointer()?;
        let tensors = collect(tensors)?;
        if let Some(room) = wait_in_turns(py, None, |most| checkpointer.room_within(alone, most))? {
            room?;
        }
        let metadata = metadata.unwrap_or_default();
        let staging = stage(py, &tensors, || checkpointer.stage(&tensors, metadata, step, false))?;
        bring(py, &tensors, &staging.later)?;
        let staging = staging.under(cancel.clone());
        Ok(py.detach(|| checkpointer.submit(staging, false)))
    }
}

#[pymethods]
impl Checkpoints {
    #[new]
    #[pyo3(signature = (directory, *, keep = None, keep_every = None, durable = true, prepare = true, max_shard_size = None, checksums = false, progress = None))]
    #[allow(clippy::too_many_arguments)] // Python's keyword arguments
    fn new(
        py: Python<'_>,
        directory: PathBuf,
        keep: Option<usize>,
        keep_every: Option<u64>,
        durable: bool,
        prepare: bool,
        max_shard_size: Option<u64>,
        checksums: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let mut options = CheckpointOptions::new().durable(durable).prepare(prepare).checksums(checksums);
        if let Some(keep) = keep {
            options = options.keep(keep);
        }
        if let Some(steps) = keep_every {
            options = options.keep_every(steps);
        }
        if let Some(bytes) = max_shard_size {
            options = options.max_shard_size(bytes);
        }
        if let Some(told) = progress {
            options = options.progress(move |done, total| {
                Python::attach(|py| {
                    match told.call1(py, (done, total)) {
                        // SAFETY: the interpreter is attached. The main thread will see it, as it would have.
                        Err(error) if error.is_instance_of::<PyKeyboardInterrupt>(py) => unsafe {
                            pyo3::ffi::PyErr_SetInterrupt();
                        },
                        Err(error) => error.write_unraisable(py, Some(told.bind(py))),
                        Ok(_) => {}
                    }
                });
            });
        }
        let checkpointer = py.detach(|| options.open(directory))?;
        Ok(Self { open: Mutex::new(Some(Arc::new(checkpointer))) })
    }

    /// Saves, and returns what was saved, as a dict.
    fn save<'py>(
        &self,
        py: Python<'py>,
        tensors: &Bound<'py, PyAny>,
        step: u64,
        #[pyo3(from_py_with = read_metadata)] metadata: Metadata,
    ) -> PyResult<Bound<'py, PyDict>> {
        let cancel = Cancel::default();
        let saving = self.start(py, tensors, step, metadata, true, &cancel)?;
        match wait_in_turns(py, None, |most| saving.wait_for(most)) {
            Ok(Some(outcome)) => saved(py, &outcome?),
            Ok(None) => Err(Error::Argument("the save did not end".into()).into()),
            Err(raised) => {
                py.detach(|| {
                    cancel.cancel();
                    saving.wait_for(GRACE)
                });
                Err(raised)
            }
        }
    }

    /// Stages, and returns what waits for the rest.
    fn save_async(
        &self,
        py: Python<'_>,
        tensors: &Bound<'_, PyAny>,
        step: u64,
        #[pyo3(from_py_with = read_metadata)] metadata: Metadata,
    ) -> PyResult<Saving> {
        Ok(Saving { saving: self.start(py, tensors, step, metadata, false, &Cancel::default())? })
    }

    /// Makes an output of so many bytes ready.
    fn prepare(&self, py: Python<'_>, bytes: u64) -> PyResult<()> {
        let checkpointer = self.checkpointer()?;
        Ok(py.detach(|| checkpointer.prepare(bytes))?)
    }

    /// Removes the checkpoint of a step, and says whether there was one.
    fn remove(&self, py: Python<'_>, step: u64) -> PyResult<bool> {
        let checkpointer = self.checkpointer()?;
        Ok(py.detach(|| checkpointer.remove(step))?)
    }

    /// The steps there are, in order.
    fn steps(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        let checkpointer = self.checkpointer()?;
        Ok(py.detach(|| checkpointer.steps())?)
    }

    /// The step that was saved last.
    fn latest(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let checkpointer = self.checkpointer()?;
        Ok(py.detach(|| checkpointer.latest())?)
    }

    /// Has `open` called with the path of a step, or of the latest; again if it is let go before it is opened.
    fn open(&self, py: Python<'_>, step: Option<u64>, open: Py<PyAny>) -> PyResult<Py<PyAny>> {
        let checkpointer = self.checkpointer()?;
        py.detach(|| {
            let is_gone =
                |error: &PyErr| Python::attach(|py| error.is_instance_of::<PyFileNotFoundError>(py));
            checkpointer
                .open_with(step, is_gone, |path| Python::attach(|py| open.call1(py, (path.as_os_str(),))))
        })
    }

    /// What to open for a step, or for the latest.
    #[pyo3(signature = (step = None))]
    fn find(&self, py: Python<'_>, step: Option<u64>) -> PyResult<std::ffi::OsString> {
        let checkpointer = self.checkpointer()?;
        Ok(py.detach(|| checkpointer.find(step))?.into_os_string())
    }

    /// Waits for saves under way; an error nobody was told of comes here.
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        let checkpointer = self.checkpointer()?;
        finished(py, &checkpointer)
    }

    /// Waits for saves under way, and ends the background thread.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(checkpointer) = open else { return Ok(()) };
        if !checkpointer.is_own() {
            // A fork's child: what is under way is its parent's.
            return Ok(());
        }
        let done = finished(py, &checkpointer);
        if done.as_ref().is_err_and(|error| error.is_instance_of::<PyKeyboardInterrupt>(py)) {
            // What is under way is finished all the same, when this is closed again.
            *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(checkpointer);
            return done;
        }
        py.detach(|| drop(checkpointer));
        done
    }
}

/// A checkpoint on its way.
#[pyclass(frozen, module = "maptensors._native")]
pub(super) struct Saving {
    saving: checkpoint::Saving,
}

#[pymethods]
impl Saving {
    /// Waits at most so many seconds; what was saved, as a dict, or None if it is not yet.
    #[pyo3(signature = (timeout = None))]
    fn wait<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Option<Bound<'py, PyDict>>> {
        match wait_in_turns(py, timeout, |most| self.saving.wait_for(most))? {
            Some(outcome) => saved(py, &outcome?).map(Some),
            None => Ok(None),
        }
    }

    /// Whether it is saved, or has failed.
    fn done(&self) -> bool {
        self.saving.is_done()
    }

    /// The highest step that was there, if this one is below it.
    #[getter]
    fn below(&self) -> Option<u64> {
        self.saving.below
    }

    /// Seconds that staging took.
    #[getter]
    fn staged(&self) -> f64 {
        self.saving.staged.as_secs_f64()
    }
}

/// Waits for what is under way.
fn finished(py: Python<'_>, checkpointer: &Checkpointer) -> PyResult<()> {
    match wait_in_turns(py, None, |most| checkpointer.wait_for(most))? {
        Some(done) => Ok(done?),
        None => Ok(()),
    }
}

fn saved<'py>(py: Python<'py>, saved: &checkpoint::Saved) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("step", saved.step)?;
    dict.set_item("path", saved.path.as_os_str())?;
    dict.set_item("nbytes", saved.bytes)?;
    let output = match saved.ready {
        Ready::No => "new",
        Ready::Prepared => "prepared",
        Ready::Recycled => "recycled",
    };
    dict.set_item("output", output)?;
    dict.set_item("staged", saved.staged.as_secs_f64())?;
    dict.set_item("finished", saved.finished.as_secs_f64())?;
    dict.set_item("durable", saved.durable)?;
    dict.set_item("below", saved.below)?;
    Ok(dict)
}
