//! A model edited in its file, which others may have as well.

use super::{Assembled, Guards, OpenFrom, OpenOptions};
use crate::error::{Error, Result};
use crate::layout::{Catalog, Layout, Metadata, TensorInfo};
use crate::map::{Residency, SharedMemory};
use crate::tensor::TensorShared;
use std::path::Path;
use std::sync::Arc;

/// A model, to edit in its file: `MAP_SHARED`. What is written reaches the file, and everyone who maps or reads
/// it sees it at once; [`ModelShared::flush`] has it reach the disk.
///
/// Because others may write at any time, nothing here is ever borrowed as a slice: elements are copied in and out,
/// see [`TensorShared`]. The header is never written: names, shapes and metadata stay, and so do checksums in
/// it, which are then those of the content before. There is nothing to tell changes by, and no way back:
/// [`ModelMut`](crate::ModelMut) edits a copy. A save that replaces the file leaves this model with the old one,
/// which has no name any more. A clone is of the same memory.
///
/// On a full disk, the first write to a part of the file that has no blocks yet (a sparse file, or a copy-on-write
/// file system) is `SIGBUS`.
///
/// ```
/// use maptensors::ModelShared;
///
/// # let path = std::env::temp_dir().join("maptensors-doc-model-shared.safetensors");
/// # std::fs::copy("models/digits.safetensors", &path).unwrap();
/// // SAFETY: nobody truncates the file, or punches holes in it. Others may write to it.
/// let model = unsafe { ModelShared::open(&path)? };
/// model.tensor("fc1.bias")?.fill(0.5_f32)?;
/// let other = maptensors::Model::read(&path)?; // sees it at once
/// assert_eq!(other.tensor("fc1.bias")?.as_slice::<f32>()?, [0.5; 64]);
/// model.flush("fc1.bias")?; // now a power loss does not take it back
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone)]
pub struct ModelShared {
    catalog: Arc<Catalog>,
    // INVARIANT: one for each shard of the catalog, as long as its layout's file.
    memories: Vec<Arc<SharedMemory>>,
    guards: Option<Arc<Guards>>,
}

impl ModelShared {
    /// Maps a model, shared and to be written, from what [`Model::open`](crate::Model::open) takes.
    ///
    /// # Safety
    /// For the life of the model, nobody truncates the *inode* or punches holes in it: the process would get
    /// `SIGBUS`. Others may write to it.
    ///
    /// # Errors
    /// As [`Model::open`](crate::Model::open); [`Error::Io`] also where the file may not be written.
    #[allow(unsafe_code)]
    pub unsafe fn open(from: impl OpenFrom) -> Result<Self> {
        // SAFETY: the caller's promise is passed on.
        unsafe { OpenOptions::new().open_shared(from) }
    }

    pub(super) fn of(opened: Assembled<SharedMemory>) -> Self {
        let Assembled { catalog, memories, guards } = opened;
        debug_assert_eq!(catalog.shards().len(), memories.len());
        Self { catalog, memories, guards }
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.catalog.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.catalog.find(name).is_some()
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`Error::Missing`], with near names; those of [`OpenOptions::guard`] where that is on.
    pub fn tensor(&self, name: &str) -> Result<TensorShared<'_>> {
        self.get(name)?.ok_or_else(|| self.catalog.missing(name))
    }

    /// The tensor called `name`, if there is one.
    ///
    /// # Errors
    /// Those of [`OpenOptions::guard`] where that is on; otherwise none.
    ///
    /// ```
    /// # let path = std::env::temp_dir().join("maptensors-doc-shared-get.safetensors");
    /// # std::fs::copy("models/digits.safetensors", &path).unwrap();
    /// // SAFETY: nobody truncates the file.
    /// let model = unsafe { maptensors::ModelShared::open(&path)? };
    /// assert!(model.get("fc1.weight")?.is_some() && model.get("lm_head.weight")?.is_none());
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn get(&self, name: &str) -> Result<Option<TensorShared<'_>>> {
        let Some((shard, info)) = self.lookup(name) else { return Ok(None) };
        if let Some(guards) = &self.guards {
            let memory = &self.memories[shard];
            guards.hand_out(shard, self.path_of(shard), || memory.populate_read(info.bytes()))?;
        }
        Ok(Some(TensorShared::new(info, &self.memories[shard], self.path_of(shard))))
    }

    /// All tensors, shard by shard, in file order. This asks no [`OpenOptions::guard`], as it gives no error.
    pub fn tensors(&self) -> impl Iterator<Item = TensorShared<'_>> {
        self.catalog
            .infos()
            .map(|(shard, info)| TensorShared::new(info, &self.memories[shard], self.path_of(shard)))
    }

    /// All names, shard by shard, in file order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.catalog.infos().map(|(_, info)| info.name())
    }

    /// The metadata, as for [`Model::metadata`](crate::Model::metadata).
    pub fn metadata(&self) -> &Metadata {
        self.catalog.metadata()
    }

    /// Number of files.
    pub fn shards(&self) -> usize {
        self.memories.len()
    }

    /// The path of the `shard`-th file, as it was opened.
    pub fn path(&self, shard: usize) -> Option<&Path> {
        self.catalog.shards().get(shard).map(|shard| shard.path.as_path())
    }

    /// The layout of the `shard`-th file.
    pub fn layout(&self, shard: usize) -> Option<&Layout> {
        self.catalog.shards().get(shard).map(|shard| &shard.layout)
    }

    /// The memory behind the `shard`-th file, header included: writing there is writing a file's header.
    pub fn memory(&self, shard: usize) -> Option<&SharedMemory> {
        self.memories.get(shard).map(AsRef::as_ref)
    }

    /// Has one tensor's pages written to the disk, and waits: see [`TensorShared::flush`].
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Io`], once.
    pub fn flush(&self, name: &str) -> Result<()> {
        let (shard, info) = self.find(name)?;
        TensorShared::new(info, &self.memories[shard], self.path_of(shard)).flush()
    }

    /// As [`ModelShared::flush`], without waiting.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Io`].
    pub fn flush_async(&self, name: &str) -> Result<()> {
        let (shard, info) = self.find(name)?;
        TensorShared::new(info, &self.memories[shard], self.path_of(shard)).flush_async()
    }

    /// Has all pages that were written brought to the disk, and waits.
    ///
    /// # Errors
    /// [`Error::Io`], once; [`Error::Changed`] where another file has taken a file's name: that one is not written to.
    pub fn flush_all(&self) -> Result<()> {
        self.flush_shards(true)
    }

    /// As [`ModelShared::flush_all`], without waiting.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush_all_async(&self) -> Result<()> {
        self.flush_shards(false)
    }

    /// Under [`OpenOptions::guard`], whether the files still have the lengths they had.
    ///
    /// # Errors
    /// [`Error::Changed`], [`Error::Io`].
    pub fn check(&self) -> Result<()> {
        self.guards.as_ref().map_or(Ok(()), |guards| guards.check(&self.catalog))
    }

    /// Pages of all tensor data. None is private: see [`Model::residency`](crate::Model::residency).
    ///
    /// # Errors
    /// [`Error::Io`] where the kernel does not tell.
    pub fn residency(&self) -> Result<Residency> {
        let mut total = Residency { page_size: rustix::param::page_size(), ..Residency::default() };
        for (shard, memory) in self.catalog.shards().iter().zip(&self.memories) {
            let pages = memory.residency(shard.layout.data_range());
            total += pages.map_err(Error::io(&shard.path, "asking about its pages"))?;
        }
        Ok(total)
    }

    fn find(&self, name: &str) -> Result<(usize, TensorInfo<'_>)> {
        self.lookup(name).ok_or_else(|| self.catalog.missing(name))
    }

    fn lookup(&self, name: &str) -> Option<(usize, TensorInfo<'_>)> {
        let (shard, index) = self.catalog.find(name)?;
        Some((shard, self.catalog.shards()[shard].layout.at(index)?))
    }

    fn path_of(&self, shard: usize) -> &Path {
        self.path(shard).unwrap_or(Path::new(""))
    }

    fn flush_shards(&self, wait: bool) -> Result<()> {
        for (shard, memory) in self.catalog.shards().iter().zip(&self.memories) {
            memory.flush_to(&shard.path, shard.layout.data_range(), wait)?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for ModelShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelShared").field("shards", &self.shards()).field("tensors", &self.len()).finish()
    }
}
