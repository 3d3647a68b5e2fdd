//! `maptensors._native.Publisher` and `Subscriber`: what `maptensors.publish` and `attach` stand on.

use super::import::{Data, Given, collect};
use super::metadata::entries;
use super::model::Model;
use super::save::bring;
use crate::diff::Contents;
use crate::error::Error;
use crate::layout::Metadata;
use crate::map::Backing;
use crate::share::{self, AttachOptions, Candidate, Publication, PublishOptions};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, UNIX_EPOCH};

/// Who waits does so in turns, so that Ctrl-C is seen.
const TURN: Duration = Duration::from_millis(100);

/// Publishes to a place.
#[pyclass(frozen, module = "maptensors._native")]
pub(super) struct Publisher {
    // Never locked for long: whoever publishes has taken the publisher out meanwhile.
    state: Mutex<State>,
    generation: AtomicU64,
    path: PathBuf,
}

enum State {
    Open(Box<share::Publisher>),
    /// A thread is publishing.
    Busy,
    Closed,
}

impl Publisher {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Result<Box<share::Publisher>, Error> {
        let mut state = self.state();
        match std::mem::replace(&mut *state, State::Busy) {
            State::Open(publisher) => Ok(publisher),
            State::Busy => Err(Error::Argument("another thread is publishing through this publisher".into())),
            State::Closed => {
                *state = State::Closed;
                Err(Error::Argument("the publisher is closed".into()))
            }
        }
    }

    /// Publishes through a publisher that was taken out.
    fn through(
        publisher: &mut share::Publisher,
        py: Python<'_>,
        tensors: &Bound<'_, PyAny>,
        metadata: &Metadata,
        changed: Option<&[String]>,
        compare: bool,
    ) -> PyResult<u64> {
        let given = collect(tensors)?;
        let model = tensors.cast::<Model>().ok().filter(|_| changed.is_none() && !compare);
        let parts = model.map(|model| model.get().parts()).transpose()?;
        let mut edits = None;
        let mut chosen = py.detach(|| match (&parts, changed) {
            (Some(parts), _) => {
                let (chosen, edited) = parts.with_contents(|contents| {
                    publisher.edited_since(parts.token, contents, &candidates(&given))
                })?;
                edits = Some(edited);
                Ok(chosen)
            }
            (None, Some(changed)) => named(publisher, &given, changed),
            (None, None) if compare => publisher.differing(&candidates(&given)),
            (None, None) => Ok(vec![true; given.len()]),
        })?;
        if compare {
            // Those that do not lie in one piece, one by one: no two such copies exist together.
            for ((name, given), differs) in given.iter().zip(&mut chosen) {
                if let Data::Strided(object) = &given.data
                    && publisher.has(name, given.dtype, &given.shape)
                {
                    let whole = [(name.clone(), given.gathered(py, name, object)?)];
                    *differs = py.detach(|| publisher.differing(&candidates(&whole)))? != [false];
                }
            }
        }
        let names: HashSet<String> = given.iter().map(|(name, _)| name.clone()).collect();
        let copied: Vec<_> = given.into_iter().zip(chosen).filter(|(_, chosen)| *chosen).collect();
        let copied: Vec<_> = copied.into_iter().map(|(given, _)| given).collect();
        let keeps = |name: &str| names.contains(name);
        let staging = py.detach(|| publisher.stage(&copied, metadata, &keeps))?;
        let brought = bring(py, &copied, &staging.later);
        let generation = py.detach(|| publisher.finish_generation(staging, brought))?;
        if let (Some(edits), Some(parts)) = (edits, &parts) {
            // It is published. What cannot be told is compared the next time.
            let remember = |contents: &Contents<'_>| {
                publisher.remember(edits, contents);
                Ok(())
            };
            py.detach(|| parts.with_contents(remember)).ok();
        }
        Ok(generation)
    }
}

fn candidates(tensors: &[(String, Given)]) -> Vec<Candidate<'_>> {
    let candidates = tensors.iter().map(|(name, given)| Candidate {
        name,
        dtype: given.dtype,
        shape: &given.shape,
        bytes: given.data.source(),
    });
    candidates.collect()
}

/// These, and those that are not there yet.
fn named(
    publisher: &share::Publisher,
    tensors: &[(String, Given)],
    changed: &[String],
) -> Result<Vec<bool>, Error> {
    let changed: HashSet<&str> = changed.iter().map(String::as_str).collect();
    let names: HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    if let Some(name) = changed.difference(&names).next() {
        let (name, hint) = ((*name).to_owned(), " in the state that is to be published".into());
        return Err(Error::Missing { path: PathBuf::new(), name, hint });
    }
    let chosen = |(name, given): &(String, Given)| {
        changed.contains(name.as_str()) || !publisher.has(name, given.dtype, &given.shape)
    };
    Ok(tensors.iter().map(chosen).collect())
}

#[pymethods]
impl Publisher {
    #[new]
    #[pyo3(signature = (place, *, permissions = 0o600, recycle = true))]
    fn new(py: Python<'_>, place: PathBuf, permissions: u32, recycle: bool) -> PyResult<Self> {
        let options = PublishOptions::new().mode(permissions).recycle(recycle);
        let publisher = py.detach(|| options.open(&place))?;
        Ok(Self {
            generation: publisher.generation().into(),
            path: publisher.path().to_owned(),
            state: Mutex::new(State::Open(Box::new(publisher))),
        })
    }

    /// Publishes tensors as the next generation, and returns its number.
    #[pyo3(signature = (tensors, *, metadata, changed = None, compare = false))]
    fn publish(
        &self,
        py: Python<'_>,
        tensors: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = entries)] metadata: BTreeMap<String, String>,
        changed: Option<Vec<String>>,
        compare: bool,
    ) -> PyResult<u64> {
        let mut publisher = self.take()?;
        let done = Self::through(&mut publisher, py, tensors, &metadata.into(), changed.as_deref(), compare);
        self.generation.store(publisher.generation(), Ordering::Relaxed);
        *self.state() = State::Open(publisher);
        done
    }

    /// The last generation.
    #[getter]
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// The directory.
    #[getter]
    fn path(&self) -> std::ffi::OsString {
        self.path.clone().into_os_string()
    }

    /// Publishes no more; what is published stays.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        match self.take() {
            Ok(publisher) => {
                *self.state() = State::Closed;
                Ok(py.detach(|| publisher.close())?)
            }
            Err(_) if matches!(*self.state(), State::Closed) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the publication away.
    fn remove(&self, py: Python<'_>) -> PyResult<()> {
        let publisher = self.take()?;
        *self.state() = State::Closed;
        Ok(py.detach(|| publisher.remove())?)
    }
}

/// Holds the current generation of a place.
#[pyclass(frozen, module = "maptensors._native")]
pub(super) struct Subscriber {
    // Locked only while detached from the interpreter: it is held while waiting.
    open: RwLock<Option<share::Subscriber>>,
    /// The generation that is held, and its number.
    held: Mutex<Option<(u64, Py<Model>)>>,
    mode: &'static str,
    path: PathBuf,
}

impl Subscriber {
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        ask: impl FnOnce(&share::Subscriber) -> Result<T, Error> + Send,
    ) -> PyResult<T> {
        Ok(py.detach(|| {
            let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
            ask(open.as_ref().ok_or_else(closed)?)
        })?)
    }

    fn backing(mode: &str) -> Backing {
        if mode == "r" { Backing::ReadOnly } else { Backing::CopyOnWrite }
    }

    fn held(&self) -> MutexGuard<'_, Option<(u64, Py<Model>)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> Error {
    Error::Argument("the subscriber is closed".into())
}

#[pymethods]
impl Subscriber {
    #[new]
    #[pyo3(signature = (place, mode = "c", *, timeout = None))]
    fn new(py: Python<'_>, place: PathBuf, mode: &str, timeout: Option<f64>) -> PyResult<Self> {
        let mode = super::open::mode(mode)?;
        let options = AttachOptions::new().wait(most(timeout).unwrap_or(Duration::MAX));
        // Ctrl-C is seen.
        let go_on = || Python::attach(|py| py.check_signals());
        // SAFETY: the stable-file contract, which Python's documentation puts to the caller; nobody but
        // publishers writes to a publication.
        let subscriber = py.detach(|| unsafe { options.attach_while(&place, go_on) })?;
        let model = py.detach(|| subscriber.mapped(Self::backing(mode)))?;
        let model = Py::new(py, Model::new(model.into_parts().shared(), mode, false))?;
        Ok(Self {
            path: subscriber.path().to_owned(),
            held: Mutex::new(Some((subscriber.generation(), model))),
            open: RwLock::new(Some(subscriber)),
            mode,
        })
    }

    /// The generation that is held.
    #[getter]
    fn model(&self, py: Python<'_>) -> PyResult<Py<Model>> {
        let held = self.held();
        held.as_ref().map(|(_, model)| model.clone_ref(py)).ok_or_else(|| closed().into())
    }

    /// Its number.
    #[getter]
    fn generation(&self) -> PyResult<u64> {
        self.held().as_ref().map(|(generation, _)| *generation).ok_or_else(|| closed().into())
    }

    /// The number of the last generation published.
    #[getter]
    fn latest(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, share::Subscriber::latest)
    }

    /// The directory.
    #[getter]
    fn path(&self) -> std::ffi::OsString {
        self.path.clone().into_os_string()
    }

    /// Sleeps until there is a newer generation, at most so many seconds.
    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let mut left = Left::of(timeout);
        loop {
            let turn = left.turn();
            if self.with(py, |subscriber| subscriber.wait(Some(turn)))? {
                return Ok(true);
            }
            py.check_signals()?;
            if left.is_over() {
                return Ok(false);
            }
        }
    }

    /// Goes on to the newest generation; the names that differ, or None if it is held already.
    fn refresh(&self, py: Python<'_>) -> PyResult<Option<Vec<String>>> {
        let refreshed = py.detach(|| -> PyResult<_> {
            let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
            let subscriber = open.as_mut().ok_or_else(closed)?;
            let refreshed = subscriber.refresh_mapped(Self::backing(self.mode))?;
            let Some((refreshed, model)) = refreshed else { return Ok(None) };
            // Still locked: what another thread goes on to comes after this. Who is attached waits for no lock.
            let before = Python::attach(|py| -> PyResult<_> {
                let model = Py::new(py, Model::new(model.into_parts().shared(), self.mode, false))?;
                Ok(self.held().replace((refreshed.generation, model)))
            })?;
            Ok(Some((refreshed, before)))
        })?;
        let Some((refreshed, before)) = refreshed else { return Ok(None) };
        drop(before);
        let mut names = refreshed.changed;
        names.extend(refreshed.removed);
        Ok(Some(names))
    }

    /// Lets go.
    fn close(&self, py: Python<'_>) {
        // First what a refresh would hold the next one by.
        py.detach(|| self.open.write().unwrap_or_else(PoisonError::into_inner).take());
        let held = self.held().take();
        drop(held);
    }
}

/// A time to wait, in seconds.
fn most(timeout: Option<f64>) -> Option<Duration> {
    timeout.map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX))
}

/// What is published at these places, or all that has a name: the fields of `maptensors.Publication`.
#[pyfunction]
pub(super) fn publications(py: Python<'_>, places: Option<Vec<PathBuf>>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let found = py.detach(|| match places {
        None => Publication::all(),
        Some(places) => places.iter().map(Publication::at).collect(),
    })?;
    let facts = |found: Publication| {
        let dict = PyDict::new(py);
        dict.set_item("name", found.name)?;
        dict.set_item("path", found.path.into_os_string())?;
        dict.set_item("generation", found.generation)?;
        dict.set_item("tensors", found.tensors)?;
        dict.set_item("nbytes", found.nbytes)?;
        dict.set_item("allocated", found.allocated)?;
        dict.set_item("spare", found.spare)?;
        dict.set_item("unfinished", found.unfinished)?;
        dict.set_item("publishing", found.publishing)?;
        dict.set_item("process", found.process)?;
        let since = found.published.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        dict.set_item("published", since.map(|since| since.as_secs_f64()))?;
        dict.set_item("damage", found.damage)?;
        Ok(dict)
    };
    found.into_iter().map(facts).collect()
}

/// Takes away what nobody publishes any more; bytes that its files took.
#[pyfunction]
pub(super) fn remove_publication(py: Python<'_>, place: PathBuf) -> PyResult<u64> {
    Ok(py.detach(|| Publication::at(place)?.remove())?)
}

/// What is left of a time to wait.
struct Left {
    /// `None`: for ever.
    until: Option<Instant>,
}

impl Left {
    /// So many seconds. Longer than the clock can count is for ever.
    fn of(timeout: Option<f64>) -> Self {
        Self { until: most(timeout).and_then(|most| Instant::now().checked_add(most)) }
    }

    fn left(&self) -> Duration {
        self.until.map_or(TURN, |until| until.saturating_duration_since(Instant::now()))
    }

    fn turn(&mut self) -> Duration {
        self.left().min(TURN)
    }

    fn is_over(&self) -> bool {
        self.left().is_zero()
    }
}
