//! What an open model consists of.

use super::lazy::Names;
use super::tensor::{Tensor, Watch};
use crate::diff::{Contents, Marks};
use crate::error::Error;
use crate::layout::TensorInfo;
use crate::layout::{Catalog, Select};
use crate::map::{CHUNK, Memory, SharedMemory, not_writable};
use crate::model::{Assembled, Guards, new_token};
use crate::paging::Locks;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// A model's files, opened: where its tensors are, and the memory they are in.
pub(super) struct Parts {
    pub(super) catalog: Arc<Catalog>,
    pub(super) memories: Vec<Arc<SharedMemory>>,
    /// By the mode, also where the memory could be written.
    pub(super) read_only: bool,
    /// Aligned copies of tensors that lie misaligned in their file, made when first asked for and kept, so
    /// that every access sees the same bytes.
    pub(super) copies: Mutex<HashMap<(usize, usize), Arc<SharedMemory>>>,
    /// With `dense_edits`: which tensors have been promoted, or are not to be.
    promoted: Option<Mutex<HashSet<(usize, usize)>>>,
    /// What `changed` compares with in place of the files.
    pub(super) marks: Mutex<Option<Arc<Marks>>>,
    /// What `lock` holds.
    pub(super) locks: Arc<Locks>,
    /// With `guard`.
    guards: Option<Arc<Guards>>,
    /// Like no other's in this process.
    pub(super) token: u64,
}

impl Parts {
    pub(super) fn new(opened: Assembled<SharedMemory>, mode: &'static str, dense_edits: bool) -> Self {
        let Assembled { catalog, memories, guards } = opened;
        let promoted = (dense_edits && mode == "c").then(Mutex::default);
        Self {
            catalog,
            memories,
            read_only: mode == "r",
            copies: Mutex::default(),
            promoted,
            marks: Mutex::default(),
            locks: Arc::default(),
            guards,
            token: new_token(),
        }
    }

    /// The memory that holds a tensor aligned, and its offset there.
    ///
    /// # Errors
    /// [`Error::Align`] for a misaligned tensor of a file that is edited; those of a guard.
    pub(super) fn memory_of(
        &self,
        shard: usize,
        index: usize,
        info: &TensorInfo<'_>,
    ) -> Result<(Arc<SharedMemory>, usize), Error> {
        let memory = &self.memories[shard];
        let range = info.bytes();
        if let Some(guards) = &self.guards {
            let path = &self.catalog.shards()[shard].path;
            guards.hand_out(shard, path, || memory.populate_read(range.clone()))?;
        }
        if range.is_empty() || memory.ptr(&range).addr().is_multiple_of(info.dtype().align()) {
            self.promote_once(shard, index, range.clone());
            return Ok((memory.clone(), range.start));
        }
        if memory.is_shared() {
            return Err(misaligned(&self.catalog.shards()[shard].path, info, memory));
        }
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = copies
            .entry((shard, index))
            .or_insert_with(|| Arc::new(SharedMemory::copy_of(memory.source(&range))));
        Ok((copy.clone(), 0))
    }

    /// Makes all tensor data writable where it lies, in one go for each file.
    ///
    /// # Errors
    /// [`Error::Io`] where the kernel does not promise the memory.
    pub(super) fn make_writable(&self) -> Result<(), Error> {
        for (shard, memory) in self.catalog.shards().iter().zip(&self.memories) {
            let data = shard.layout.data_range();
            let asked = data.len();
            let refused = |error| not_writable(&shard.path, "its tensors", asked, error);
            memory.make_writable(&data).map_err(refused)?;
        }
        Ok(())
    }

    /// Calls `work` with all bytes, to compare and to hash. Copies made meanwhile are not among them.
    ///
    /// # Errors
    /// Those of a guard, and of `work`.
    pub(super) fn with_contents<T>(
        &self,
        work: impl FnOnce(&Contents<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.check()?;
        let copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner).clone();
        work(&Contents {
            catalog: &self.catalog,
            memories: self.memories.iter().map(|memory| memory.as_ref() as &dyn Memory).collect(),
            copies: copies.iter().map(|(&position, copy)| (position, copy.now())).collect(),
            marks: marks.as_deref(),
        })
    }

    /// With `dense_edits`, makes a large tensor this process's own before it is first handed out.
    /// As [`Parts::memory_of`], of a tensor that is handed out without waiting for anything: no guard looks, nothing is
    /// promoted, nothing copied.
    pub(super) fn memory_at_once(
        &self,
        shard: usize,
        info: &TensorInfo<'_>,
    ) -> Option<(&Arc<SharedMemory>, usize)> {
        let (memory, range) = (&self.memories[shard], info.bytes());
        let aligned = || range.is_empty() || memory.ptr(&range).addr().is_multiple_of(info.dtype().align());
        let waits = self.guards.is_some() || self.promoted.is_some();
        (!waits && aligned()).then_some((memory, range.start))
    }

    fn promote_once(&self, shard: usize, index: usize, range: Range<usize>) {
        let Some(promoted) = self.promoted.as_ref().filter(|_| range.len() >= CHUNK) else { return };
        // Held until it is done: whoever else asks for this tensor must not write to it meanwhile.
        let mut promoted = promoted.lock().unwrap_or_else(PoisonError::into_inner);
        if promoted.insert((shard, index)) {
            let memory = &self.memories[shard];
            // SAFETY: nobody has an array of these pages yet: they are this tensor's alone, and it is being
            // handed out for the first time. Where it fails, pages are copied as they are written.
            unsafe { memory.promote(&memory.whole_pages(&range)) }.ok();
        }
    }

    /// A part of a tensor's pages is handed out to be written: from now on it is not promoted.
    pub(super) fn keep_in_place(&self, position: (usize, usize)) {
        if let Some(promoted) = &self.promoted {
            promoted.lock().unwrap_or_else(PoisonError::into_inner).insert(position);
        }
    }

    pub(super) fn tensor(&self, shard: usize, index: usize, info: &TensorInfo<'_>) -> Result<Tensor, Error> {
        let (memory, offset) = self.memory_of(shard, index, info)?;
        // A copy is nothing of the file's any more.
        let watch = if Arc::ptr_eq(&memory, &self.memories[shard]) { self.watch(shard) } else { None };
        let tensor = Tensor::whole(memory, offset, info.dtype(), info.shape(), info.name(), self.read_only);
        Ok(tensor.watched(watch))
    }

    /// What a tensor of a shard asks before it is handed out again: with `guard`.
    pub(super) fn watch(&self, shard: usize) -> Option<Arc<Watch>> {
        let guards = self.guards.clone()?;
        Some(Arc::new(Watch { guards, shard, path: self.catalog.shards()[shard].path.as_path().into() }))
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        self.guards.as_ref().map_or(Ok(()), |guards| guards.check(&self.catalog))
    }

    /// The shards and bytes of these tensors, or of all.
    pub(super) fn ranges(&self, names: Option<&Names>) -> Result<Vec<(usize, Range<usize>)>, Error> {
        let names = names.map(|names| names.find(&self.catalog)).transpose()?;
        let select = names.as_ref().map_or_else(|| Select::from(..), Select::from);
        Ok(self.catalog.runs(&self.catalog.select(&select)?))
    }

    /// Every tensor's shard, position in it, and info, in file order.
    pub(super) fn infos(&self) -> impl Iterator<Item = (usize, usize, TensorInfo<'_>)> {
        let shards = self.catalog.shards().iter().enumerate();
        shards.flat_map(|(s, shard)| shard.layout.iter().enumerate().map(move |(i, info)| (s, i, info)))
    }
}

/// Why a tensor of a file that is edited is not handed out: a copy's writes would not reach the file.
fn misaligned(path: &Path, info: &TensorInfo<'_>, memory: &SharedMemory) -> Error {
    let align = info.dtype().align();
    let off = memory.ptr(&info.bytes()).addr() % align;
    let what = format!(
        "starts {off} bytes past a multiple of {align}, where arrays of {} cannot lie, and an aligned copy would not be \
         the file: it cannot be edited in place; saving the model (open it with mode=\"c\") aligns every tensor",
        info.dtype()
    );
    Error::Align { path: path.into(), tensor: info.name().into(), what }
}
