//! Which pages are in memory and which are to be: what `maptensors._lazy` and `Model` stand on.

use super::interrupt::{TURN, wait_in_turns};
use super::model::Model;
use super::parts::Parts;
use super::results;
use super::tensor::Tensor;
use crate::error::Error;
use crate::layout::{Catalog, Select};
use crate::map::{RawSlice, SharedMemory};
use crate::paging;
use crate::paging::{Order, Paging, ReadAhead, StreamOptions};
use crate::rank::{At, RankParts, RankPlan, Split};
use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::{Arc, Mutex, PoisonError};

/// Names and patterns: one, or a list.
pub(super) struct Names(Vec<String>);

impl Names {
    /// The names that are meant.
    pub(super) fn find(&self, catalog: &Catalog) -> Result<Vec<String>, Error> {
        Select::globs(catalog, &self.0)
    }
}

impl<'py> FromPyObject<'_, 'py> for Names {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(one) = given.extract::<String>() {
            return Ok(Self(vec![one]));
        }
        let each = given.try_iter().and_then(|names| names.map(|name| name?.extract()).collect());
        each.map(Self).map_err(|_| PyTypeError::new_err("names are a str, or a list of them"))
    }
}

/// `maptensors._lazy`.
pub(super) fn module(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import("maptensors._lazy")
}

impl Parts {
    fn paging(&self) -> Paging<'_> {
        let shards = self.catalog.shards().iter().zip(&self.memories);
        let pages = shards.filter_map(|(shard, memory)| memory.pages(&shard.path)).collect();
        Paging { catalog: &self.catalog, pages, locks: &self.locks }
    }

    /// Calls `work` with the pages and what is selected, without the interpreter.
    fn select<T: Send>(
        &self,
        py: Python<'_>,
        names: Option<Names>,
        work: impl FnOnce(&Paging<'_>, &Select<'_>) -> Result<T, Error> + Send,
    ) -> PyResult<T> {
        Ok(py.detach(|| {
            let names = names.map(|names| names.find(&self.catalog)).transpose()?;
            let select = names.as_ref().map_or_else(|| Select::from(..), Select::from);
            work(&self.paging(), &select)
        })?)
    }

    /// Lets go of a misaligned tensor's aligned copy, if nobody has it and nobody wrote to it.
    fn forget_copy(&self, position: (usize, usize)) {
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(copy) = copies.get(&position) else { return };
        // The lock is held, so nobody else can take it now.
        if Arc::strong_count(copy) > 1 {
            return;
        }
        let Some(info) = self.catalog.shards()[position.0].layout.at(position.1) else { return };
        let (file, copy) = (self.memories[position.0].source(&info.bytes()), copy.source(&(0..copy.len())));
        if is_same(file, copy) {
            copies.remove(&position);
        }
    }
}

/// Whether both hold the same bytes.
fn is_same(a: RawSlice<'_>, b: RawSlice<'_>) -> bool {
    const BLOCK: usize = 64 << 10;
    let (mut of_a, mut of_b) = (vec![0; BLOCK], vec![0; BLOCK]);
    a.len() == b.len()
        && (0..a.len()).step_by(BLOCK).all(|start| {
            let part = start..(start + BLOCK).min(a.len());
            let len = part.len();
            a.copy_to(part.clone(), &mut of_a[..len]);
            b.copy_to(part, &mut of_b[..len]);
            of_a[..len] == of_b[..len]
        })
}

pub(super) fn residency<'py>(
    py: Python<'py>,
    parts: &Parts,
    names: Option<Names>,
) -> PyResult<Bound<'py, PyAny>> {
    results::residency(py, &parts.select(py, names, |paging, select| paging.residency(select))?)
}

pub(super) fn residency_by_tensor<'py>(
    py: Python<'py>,
    parts: &Parts,
    names: Option<Names>,
) -> PyResult<Bound<'py, PyDict>> {
    let found = parts.select(py, names, |paging, select| paging.residency_by_tensor(select))?;
    let dict = PyDict::new(py);
    for (position, pages) in &found {
        dict.set_item(parts.catalog.name(*position), results::residency(py, pages)?)?;
    }
    Ok(dict)
}

pub(super) fn evict<'py>(
    py: Python<'py>,
    parts: &Parts,
    names: Option<Names>,
) -> PyResult<Bound<'py, PyAny>> {
    results::evicted(py, &parts.select(py, names, |paging, select| paging.evict(select))?)
}

pub(super) fn lock(py: Python<'_>, parts: &Parts, names: Option<Names>) -> PyResult<()> {
    parts.select(py, names, |paging, select| paging.lock(select))
}

pub(super) fn unlock(py: Python<'_>, parts: &Parts, names: Option<Names>) -> PyResult<()> {
    parts.select(py, names, |paging, select| paging.unlock(select))
}

/// Tensors on their way into memory.
#[pyclass(frozen, module = "maptensors._native")]
pub(super) struct Prefetch {
    inner: paging::Prefetch,
}

/// Begins to bring what is selected into memory.
#[pyfunction]
#[pyo3(signature = (model, names, lock))]
pub(super) fn prefetch(
    py: Python<'_>,
    model: &Bound<'_, Model>,
    names: Option<Names>,
    lock: bool,
) -> PyResult<Prefetch> {
    let parts = model.get().parts()?;
    let inner = parts.select(py, names, |paging, select| paging.prefetch(select, lock))?;
    Ok(Prefetch { inner })
}

#[pymethods]
impl Prefetch {
    /// Waits at most `timeout` seconds: whether all is there, or None if it goes on.
    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<bool>> {
        Ok(wait_in_turns(py, timeout, |most| self.inner.wait_for(most))?.transpose()?)
    }

    /// Whether it has ended.
    fn done(&self) -> bool {
        self.inner.is_done()
    }

    /// Ends it early.
    fn cancel(&self) {
        self.inner.cancel();
    }

    /// Bytes that are there, and all that will be.
    fn progress(&self) -> (u64, u64) {
        self.inner.progress()
    }
}

/// A model's tensors, one after the other.
#[pyclass(frozen, module = "maptensors._native")]
pub(super) struct Stream {
    parts: Arc<Parts>,
    ahead: Mutex<Option<Ahead>>,
}

struct Ahead {
    reads: ReadAhead,
    /// The tensor that was handed out last.
    out: Option<(usize, usize)>,
}

/// Begins to read what is selected ahead.
#[pyfunction]
#[pyo3(signature = (model, names, budget, order))]
pub(super) fn stream(
    py: Python<'_>,
    model: &Bound<'_, Model>,
    names: Option<Names>,
    budget: u64,
    order: Option<Vec<String>>,
) -> PyResult<Stream> {
    let parts = model.get().parts()?;
    let reads = py.detach(|| -> Result<_, Error> {
        let names = names.map(|Names(names)| Select::globs(&parts.catalog, &names)).transpose()?;
        let mut options = StreamOptions::new().budget(budget);
        if let Some(names) = &names {
            options = options.select(names);
        }
        match order.as_deref() {
            None => {}
            // The wrapper's word for it: no list of a user's is empty here.
            Some([]) => options = options.order(Order::Name),
            Some(order) => {
                options = options.order(Order::Given(order.iter().map(String::as_str).collect()));
            }
        }
        parts.paging().read_ahead(&options)
    })?;
    Ok(Stream { parts, ahead: Mutex::new(Some(Ahead { reads, out: None })) })
}

#[pymethods]
impl Stream {
    /// The next name and tensor, once it is in memory; None at the end.
    fn next(&self, py: Python<'_>) -> PyResult<Option<(String, Tensor)>> {
        loop {
            let next = py.detach(|| {
                let mut ahead = self.ahead.try_lock().map_err(|_| ())?;
                let Some(Ahead { reads, out }) = ahead.as_mut() else { return Ok(None) };
                if let Some(position) = out.take() {
                    self.parts.forget_copy(position);
                }
                let next = reads.next(&self.parts.catalog, TURN);
                if let Some(Ok(Some(position))) = &next {
                    *out = Some(*position);
                }
                Ok::<_, ()>(next)
            });
            let next = next.map_err(|()| PyRuntimeError::new_err("another thread is taking a tensor"))?;
            match next.transpose()? {
                None => return Ok(None),
                Some(None) => py.check_signals()?,
                Some(Some((shard, index))) => {
                    let Some(info) = self.parts.catalog.shards()[shard].layout.at(index) else {
                        return Ok(None);
                    };
                    let tensor = py.detach(|| self.parts.tensor(shard, index, &info))?;
                    return Ok(Some((info.name().to_owned(), tensor)));
                }
            }
        }
    }

    /// Bytes of tensors that have passed, and of all that will.
    fn progress(&self, py: Python<'_>) -> (u64, u64) {
        py.detach(|| {
            let ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            ahead.as_ref().map_or((0, 0), |ahead| ahead.reads.progress())
        })
    }

    /// Ends reading ahead.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// The part of a rank: a dict of tensors, and the bytes asked for, touched, and read into the view's own memory.
#[pyfunction]
pub(super) fn rank_view<'py>(
    py: Python<'py>,
    model: &Bound<'py, Model>,
    rank: usize,
    world: usize,
    rules: Vec<(String, Option<usize>)>,
) -> PyResult<(Bound<'py, PyDict>, u64, u64, u64)> {
    let split = |axis: Option<usize>| axis.map_or(Split::Replicate, Split::Axis);
    let parts = model.get().parts()?;
    let RankParts { pieces, memory, sizes } = py.detach(|| -> Result<_, Error> {
        let mut plan = RankPlan::new();
        for (pattern, axis) in &rules {
            plan = plan.glob(pattern, split(*axis))?;
        }
        let found = parts.with_contents(|contents| parts.paging().rank_view(contents, rank, world, &plan))?;
        // Under a guard: what was read was read of the files as they had been.
        parts.check()?;
        for piece in found.pieces.iter().filter(|piece| matches!(piece.at, At::Mapped(_))) {
            parts.keep_in_place(piece.position);
        }
        Ok(found)
    })?;
    let memory = Arc::new(SharedMemory::of(Arc::new(memory)));
    let dict = PyDict::new(py);
    for piece in pieces {
        let (shard, index) = piece.position;
        let Some(info) = parts.catalog.shards()[shard].layout.at(index) else { continue };
        let (memory, start, watch) = match piece.at {
            At::Mapped(part) => (&parts.memories[shard], part.start, parts.watch(shard)),
            At::Gathered(part) => (&memory, part.start, None),
        };
        let tensor = Tensor::whole(
            memory.clone(),
            start,
            info.dtype(),
            &piece.cut.shape,
            info.name(),
            parts.read_only,
        );
        dict.set_item(info.name(), tensor.watched(watch))?;
    }
    Ok((dict, sizes.asked, sizes.touched, sizes.gathered))
}
