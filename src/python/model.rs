//! `maptensors.Model`: a mapping of names to tensors.

use super::changes::Changes;
use super::export;
use super::frameworks::{is_cpu, jax_stays};
use super::interrupt::interruptible;
use super::lazy::{self, Names};
use super::parts::Parts;
use super::results::result;
use super::tensor::Tensor;
use crate::error::Error;
use crate::map::SharedMemory;
use crate::model::Assembled;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::{Arc, PoisonError, RwLock};

/// A model's tensors by name, as a read-only mapping (`model["w"]`, `keys()`, `items()`, `len`, `in`).
///
/// A context manager: closing it ends access through it; tensors and arrays already taken live on.
#[pyclass(frozen, mapping, module = "maptensors")]
pub(super) struct Model {
    open: RwLock<Option<Arc<Parts>>>,
    mode: &'static str,
}

impl Model {
    pub(super) fn new(opened: Assembled<SharedMemory>, mode: &'static str, dense_edits: bool) -> Self {
        Self { open: RwLock::new(Some(Arc::new(Parts::new(opened, mode, dense_edits)))), mode }
    }

    pub(super) fn parts(&self) -> PyResult<Arc<Parts>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.clone().ok_or_else(|| Error::Argument("the model is closed".into()).into())
    }

    fn view<'py>(slf: &Bound<'py, Self>, class: &str) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("collections.abc")?.getattr(class)?.call1((slf,))
    }
}

#[pymethods]
impl Model {
    fn __getitem__(&self, py: Python<'_>, name: &str) -> PyResult<Tensor> {
        let parts = self.parts()?;
        let missing = || py.detach(|| parts.catalog.missing(name));
        let (shard, index) = parts.catalog.find(name).ok_or_else(missing)?;
        let info = parts.catalog.shards()[shard].layout.at(index).ok_or_else(missing)?;
        // A misaligned tensor is copied here, which reads the file; so does a guard.
        Ok(py.detach(|| parts.tensor(shard, index, &info))?)
    }

    /// The tensor called `name`, or `default`.
    #[pyo3(signature = (name, default = None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        default: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        if self.__contains__(&pyo3::types::PyString::new(py, name).into_any())? {
            return Ok(Some(Bound::new(py, self.__getitem__(py, name)?)?.into_any()));
        }
        Ok(default)
    }

    fn __contains__(&self, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        let parts = self.parts()?;
        Ok(name.extract::<&str>().is_ok_and(|name| parts.catalog.find(name).is_some()))
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.parts()?.catalog.len())
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let parts = self.parts()?;
        PyList::new(py, parts.infos().map(|(_, _, info)| info.name()).collect::<Vec<_>>())?
            .call_method0("__iter__")
    }

    /// The names, in file order.
    fn keys<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::view(slf, "KeysView")
    }

    /// The tensors, in file order.
    fn values<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::view(slf, "ValuesView")
    }

    /// Names and tensors, in file order.
    fn items<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::view(slf, "ItemsView")
    }

    /// The file's string metadata; of a sharded set, of all its files together.
    #[getter]
    fn metadata(&self) -> PyResult<BTreeMap<String, String>> {
        let parts = self.parts()?;
        let texts = parts.catalog.metadata().texts();
        Ok(texts.map(|(key, text)| (key.to_owned(), text.to_owned())).collect())
    }

    /// Whether any file has a metadata entry at all (it may be there and empty).
    #[getter]
    fn has_metadata(&self) -> PyResult<bool> {
        Ok(self.parts()?.catalog.shards().iter().any(|shard| shard.layout.has_metadata()))
    }

    /// "r", "c" or "r+".
    #[getter]
    fn mode(&self) -> &'static str {
        self.mode
    }

    /// The paths of the files, as opened; empty for bytes.
    #[getter]
    fn paths(&self) -> PyResult<Vec<OsString>> {
        let parts = self.parts()?;
        let paths = parts.catalog.shards().iter().map(|shard| shard.path.as_os_str());
        Ok(paths.filter(|path| !path.is_empty()).map(ToOwned::to_owned).collect())
    }

    /// Whether the model has been closed.
    #[getter]
    fn closed(&self) -> bool {
        self.open.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Where a tensor is, without touching it: a `TensorInfo` of name, dtype, shape, path, offset (in the file)
    /// and nbytes.
    fn info<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let parts = self.parts()?;
        let (shard, index) = parts.catalog.find(name).ok_or_else(|| parts.catalog.missing(name))?;
        let (place, shard) = (shard, &parts.catalog.shards()[shard]);
        let info = shard.layout.at(index).ok_or_else(|| parts.catalog.missing(name))?;
        let shape = pyo3::types::PyTuple::new(py, info.shape())?;
        let offset = parts.memories[place].file_offset() + info.offset();
        let path = shard.path.as_os_str();
        result(py, "TensorInfo", (info.name(), info.dtype().name(), shape, path, offset, info.nbytes()))
    }

    /// Pages of the tensors, or of those that `names` selects: a `Residency` of `page_size`, and of numbers of `pages`,
    /// `resident` in memory, `touched` by this process, `private` to it, `locked`, and `huge`.
    #[pyo3(signature = (names = None))]
    fn residency<'py>(&self, py: Python<'py>, names: Option<Names>) -> PyResult<Bound<'py, PyAny>> {
        lazy::residency(py, &*self.parts()?, names)
    }

    /// As `residency`, for each tensor by its name. A page of several tensors counts for each.
    #[pyo3(signature = (names = None))]
    fn residency_by_tensor<'py>(
        &self,
        py: Python<'py>,
        names: Option<Names>,
    ) -> PyResult<Bound<'py, PyDict>> {
        lazy::residency_by_tensor(py, &*self.parts()?, names)
    }

    /// Brings tensors into memory in the background: all, or those that `names` selects, a name, a pattern
    /// (`"*.mlp.*"`) or a list of them. Returns a `Prefetch` to `wait()` for, ask for its `progress`, or `cancel()`;
    /// dropped, it goes on. Errors are raised by `wait()`. `wait` waits here; `progress` is called with the bytes
    /// done and their total, and what it raises ends the prefetch; True shows a bar (a line
    /// on stderr where `tqdm` is not installed). `lock`
    /// locks them then.
    #[pyo3(signature = (names = None, *, wait = false, progress = None, lock = false))]
    fn prefetch<'py>(
        slf: &Bound<'py, Self>,
        names: Option<Bound<'py, PyAny>>,
        wait: bool,
        progress: Option<Bound<'py, PyAny>>,
        lock: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        lazy::module(slf.py())?.call_method1("prefetch", (slf, names, wait, progress, lock))
    }

    /// Gives the memory of tensors back to the system: all pages that hold nothing else. They are read again when
    /// they are touched. What was edited stays. Returns the bytes that were `freed`, those `kept` because they were
    /// edited, and those `remaining` because others use them.
    #[pyo3(signature = (names = None))]
    fn evict<'py>(&self, py: Python<'py>, names: Option<Names>) -> PyResult<Bound<'py, PyAny>> {
        lazy::evict(py, &*self.parts()?, names)
    }

    /// Reads tensors in and holds them in memory, until `unlock` or the end of the last array. They are not copied.
    /// Where it fails, `RLIMIT_MEMLOCK` reached say, exactly what was locked before still is.
    #[pyo3(signature = (names = None))]
    fn lock(&self, py: Python<'_>, names: Option<Names>) -> PyResult<()> {
        lazy::lock(py, &*self.parts()?, names)
    }

    /// Ends `lock`. A page that another tensor has a part of stays locked as long as that is.
    #[pyo3(signature = (names = None))]
    fn unlock(&self, py: Python<'_>, names: Option<Names>) -> PyResult<()> {
        lazy::unlock(py, &*self.parts()?, names)
    }

    /// Names and tensors, one after the other, through a bounded part of memory: read ahead in the background,
    /// given back behind, edits excepted. `budget` is bytes, or text like "2GiB"; `order` is "file", "name", or a list
    /// of names. `progress` as for `prefetch`: what it raises ends the stream. A tensor that is kept stays valid.
    #[pyo3(signature = (*, budget = None, names = None, order = None, progress = None))]
    fn stream<'py>(
        slf: &Bound<'py, Self>,
        budget: Option<Bound<'py, PyAny>>,
        names: Option<Bound<'py, PyAny>>,
        order: Option<Bound<'py, PyAny>>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        lazy::module(slf.py())?.call_method1("stream", (slf, budget, names, order, progress))
    }

    /// A rank's view of the model, of `world` ranks, under a plan of tensor parallelism: a `RankView`, names to tensors. `plan`
    /// maps patterns of names to "column" (axis 0), "row" (axis 1), another axis, or "replicate"; the first that
    /// matches holds, and `default` for the rest.
    #[pyo3(signature = (rank, world, plan, *, default = None))]
    fn rank_view<'py>(
        slf: &Bound<'py, Self>,
        rank: usize,
        world: usize,
        plan: Bound<'py, PyAny>,
        default: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        lazy::module(slf.py())?.call_method1("rank_view", (slf, rank, world, plan, default))
    }

    /// Which tensors changed since opening, or the last `mark()`: exact, bit by bit. Empty, and so false, if
    /// none did; a write of the same value is no change.
    fn changed(&self, py: Python<'_>) -> PyResult<Changes> {
        let parts = self.parts()?;
        Ok(interruptible(py, || parts.with_contents(|contents| contents.changes()))??.into())
    }

    /// From now on, `changed()` and `save_delta` tell what changed since now. Takes a copy of the pages that
    /// were written so far, as much memory as they take already.
    fn mark(&self, py: Python<'_>) -> PyResult<()> {
        let parts = self.parts()?;
        let marks = py.detach(|| parts.with_contents(|contents| contents.mark()))?;
        *parts.marks.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(marks));
        Ok(())
    }

    /// Makes tensors this process's own in bulk (all, or those of `names`), before they are written all
    /// over: several times as fast as copying each page when it is first written. Takes their size in
    /// memory at once. Nobody may write to them meanwhile: a write could be lost.
    #[pyo3(signature = (names = None))]
    fn promote(&self, py: Python<'_>, names: Option<Names>) -> PyResult<()> {
        if self.mode != "c" {
            return Err(PyValueError::new_err(format!(
                "a model of mode {:?} has no pages of its own; open it with mode=\"c\"",
                self.mode
            )));
        }
        let parts = self.parts()?;
        Ok(py.detach(|| -> Result<(), Error> {
            parts.check()?;
            let ranges = parts.ranges(names.as_ref())?;
            for (shard, range) in ranges {
                // SAFETY: nobody writes meanwhile, as the documentation asks; a write would be lost, not more.
                let promoted = unsafe { parts.memories[shard].promote(&range) };
                promoted.map_err(Error::io(&parts.catalog.shards()[shard].path, "copying its pages"))?;
            }
            Ok(())
        })?)
    }

    /// In mode "r+", has what was written reach the disk: all tensors, or those of `names` (a name or several).
    /// Others see it without. `wait=False` only tells the kernel, which writes within half a minute by itself.
    ///
    /// An error of the disk is raised once: the pages count as written afterwards. Where another file has taken
    /// the file's name, `ChangedError` says that what is written does not reach it.
    #[pyo3(signature = (names = None, *, wait = true))]
    fn flush(&self, py: Python<'_>, names: Option<Names>, wait: bool) -> PyResult<()> {
        if self.mode != "r+" {
            return Err(PyValueError::new_err(format!(
                "a model of mode {:?} writes nothing to its file; open it with mode=\"r+\"",
                self.mode
            )));
        }
        let parts = self.parts()?;
        Ok(py.detach(|| -> Result<(), Error> {
            for (shard, range) in parts.ranges(names.as_ref())? {
                parts.memories[shard].flush_to(&parts.catalog.shards()[shard].path, range, wait)?;
            }
            Ok(())
        })?)
    }

    /// With `guard=True`, whether the files are as they were when they were opened: raises `ChangedError` if not.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let parts = self.parts()?;
        Ok(py.detach(|| parts.check())?)
    }

    /// All tensors as numpy arrays of the same memory.
    fn numpy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        export::arrays(py, &*self.parts()?, true, |array| array.ready_numpy(py))
    }

    /// All tensors as torch tensors of the same memory; on another `device`, copies there.
    #[pyo3(signature = (device = None))]
    fn torch<'py>(&self, py: Python<'py>, device: Option<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyDict>> {
        let stays = device.as_ref().is_none_or(is_cpu);
        export::arrays(py, &*self.parts()?, stays, |array| array.ready_torch(py, device.as_ref()))
    }

    /// All tensors as JAX arrays, of the same memory where it is aligned to 64 bytes.
    #[pyo3(signature = (device = None))]
    fn jax<'py>(&self, py: Python<'py>, device: Option<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyDict>> {
        let stays = jax_stays(py, device.as_ref())?;
        export::arrays(py, &*self.parts()?, stays, |array| array.ready_jax(py, device.as_ref()))
    }

    /// Writes all tensors and the metadata, edits included, as `maptensors.save` does; also onto the model's
    /// own file, unless it is edited in that (mode "r+"), or is only a part of it (`offset`).
    #[pyo3(signature = (path, *, metadata = None, durable = true, mapped = true, max_shard_size = None, checksums = false))]
    fn save<'py>(
        slf: &Bound<'py, Self>,
        path: Bound<'py, PyAny>,
        metadata: Option<Bound<'py, PyAny>>,
        durable: bool,
        mapped: bool,
        max_shard_size: Option<Bound<'py, PyAny>>,
        checksums: bool,
    ) -> PyResult<()> {
        let options = PyDict::new(slf.py());
        options.set_item("metadata", metadata)?;
        options.set_item("durable", durable)?;
        options.set_item("mapped", mapped)?;
        options.set_item("max_shard_size", max_shard_size)?;
        options.set_item("checksums", checksums)?;
        slf.py().import("maptensors")?.call_method("save", (slf, path), Some(&options))?;
        Ok(())
    }

    /// Ends access through the model. Tensors and arrays taken from it keep their memory.
    fn close(&self) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, _exc: &Bound<'_, pyo3::types::PyTuple>) {
        self.close();
    }

    fn __repr__(&self) -> String {
        match self.parts() {
            Ok(parts) => {
                let path =
                    parts.catalog.shards().first().map_or(String::new(), |s| s.path.display().to_string());
                let (tensors, files) = (parts.catalog.len(), parts.catalog.shards().len());
                format!(
                    "Model({}, {tensors} tensors, {files} files, mode {:?})",
                    crate::error::quote(&path),
                    self.mode
                )
            }
            Err(_) => "Model(closed)".into(),
        }
    }
}
