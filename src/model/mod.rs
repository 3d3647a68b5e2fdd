//! A model: one file or a sharded set, its tensors by name.

mod again;
mod assemble;
mod diff;
mod guards;
mod lazy;
mod locate;
mod model_mut;
mod model_ref;
mod model_shared;
mod open;
mod source;
mod stream;
mod tensors;
mod verify;

pub(crate) use assemble::{Assembled, layout_of};
pub use diff::diff;
pub(crate) use guards::Guards;
pub(crate) use locate::{Location, locate};
pub use model_mut::ModelMut;
#[cfg(feature = "python")]
pub(crate) use model_mut::new_token;
pub(crate) use model_mut::split;
pub use model_ref::ModelRef;
pub use model_shared::ModelShared;
#[cfg(feature = "python")]
pub(crate) use open::Into;
pub use open::OpenOptions;
pub(crate) use source::Readable;
pub use source::{Content, Files, OpenFrom, OverMemory, ReadFrom};
pub use stream::Stream;
pub use tensors::Tensors;

use crate::diff::Contents;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::layout::{Catalog, Layout, Metadata, Shard, TensorInfo};
use crate::map::{Mapping, Memory};
use crate::paging::Locks;
use crate::tensor::{Tensor, TensorView};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// A model, to read. Opening costs the header; data pages are read when they are touched.
///
/// A clone is of the same memory: it copies no data, and what is locked, guarded and in memory is one for both.
///
/// ```
/// use maptensors::Model;
///
/// // SAFETY: nobody writes to these files while they are mapped.
/// let model = unsafe { Model::open("models/digits-sharded")? };
/// assert_eq!(model.len(), 4);
/// for tensor in model.tensors() {
///     println!("{} {} {:?}", tensor.name(), tensor.dtype(), tensor.shape());
/// }
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone)]
pub struct Model {
    pub(crate) catalog: Arc<Catalog>,
    // INVARIANT: one for each shard of the catalog, as long as its layout's file.
    // Counted: generations of a publication share theirs, and so do clones.
    pub(crate) mappings: Vec<Arc<Mapping>>,
    /// What [`Model::lock`] holds.
    locks: Arc<Locks>,
    /// Under [`OpenOptions::guard`].
    guards: Option<Arc<Guards>>,
}

impl Model {
    /// Maps a model: a `.safetensors` file, a `*.safetensors.index.json`, a directory that holds either, or
    /// [`Files`], each named. Read-only; [`ModelMut::open`] is the writable twin.
    ///
    /// A directory that holds a file and an index of one name is refused, unless they are one model: of other loaders,
    /// some take the file and some the index. No save here leaves both.
    ///
    /// # Safety
    /// For the life of a mapping and everything derived from it, nobody — this process through another
    /// descriptor included — writes to, truncates or punches holes in that *inode*. Renaming over it and
    /// unlinking it are fine; that is how every save here replaces a file. Break it and the bytes under a
    /// `&[T]` change (undefined behaviour) or the process gets `SIGBUS`. `MAP_PRIVATE` does **not**
    /// protect: pages not yet written still show the file.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::NotRegular`] for the files; for their headers [`Error::Truncated`],
    /// [`Error::Limit`], [`Error::Utf8`], [`Error::Json`], [`Error::Duplicate`], [`Error::DType`],
    /// [`Error::Overflow`], [`Error::Layout`], [`Error::Shape`], [`Error::Align`]; for an index also
    /// [`Error::Path`] and [`Error::Missing`]; [`Error::Argument`] for a directory with a file and an index of one name;
    /// [`Error::Duplicate`] for a tensor that is in two files.
    #[allow(unsafe_code)]
    pub unsafe fn open(from: impl OpenFrom) -> Result<Self> {
        // SAFETY: the caller's promise is passed on.
        unsafe { OpenOptions::new().open(from) }
    }

    /// Reads a model into owned memory: everything [`Model::open`] does, without its contract, at the
    /// price of reading every byte. Data is 64-byte aligned, even where it is not in the file. The bytes of a file that
    /// are in memory already are a [`Content`].
    ///
    /// # Errors
    /// As [`Model::open`].
    ///
    /// ```
    /// use maptensors::{Content, Model};
    ///
    /// let model = Model::read("models/digits.safetensors")?;
    /// assert_eq!(model.tensor("fc1.weight")?.shape(), [64, 64]);
    /// let bytes = std::fs::read("models/digits.safetensors").unwrap();
    /// assert_eq!(Model::read(Content::new(&bytes))?.len(), 4);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn read(from: impl ReadFrom) -> Result<Self> {
        OpenOptions::new().read(from)
    }

    /// A model over memory that nobody changes, for as long as the model or a [`Tensor`] of it lives: the bytes of one file
    /// that somebody else holds, or a `&SealedMemfd`. Nothing is copied. For a slice that is only borrowed there is
    /// [`ModelRef`](crate::ModelRef).
    ///
    /// Tensors may be misaligned for their dtype, as the bytes lie: [`TensorView::as_slice`] then refuses, and `to_vec`
    /// copies.
    ///
    /// # Errors
    /// As [`Model::open`]; the path in errors is empty.
    ///
    /// ```
    /// use maptensors::Model;
    /// use std::sync::Arc;
    ///
    /// let bytes: Arc<[u8]> = std::fs::read("models/digits.safetensors").unwrap().into();
    /// let model = Model::over(bytes.clone())?; // an Arc<[u8]>, a Vec<u8>, the `bytes` crate's Bytes, …
    /// assert!(bytes.as_ptr_range().contains(&model.tensor("fc1.bias")?.as_bytes().as_ptr()));
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn over(memory: impl OverMemory) -> Result<Self> {
        OpenOptions::new().over(memory)
    }

    pub(crate) fn new(catalog: Catalog, mappings: Vec<Arc<Mapping>>) -> Self {
        Self::of(Assembled { catalog: Arc::new(catalog), memories: mappings, guards: None })
    }

    pub(crate) fn of(opened: Assembled<Mapping>) -> Self {
        let Assembled { catalog, memories: mappings, guards } = opened;
        debug_assert_eq!(catalog.shards().len(), mappings.len());
        Self { catalog, mappings, locks: Arc::default(), guards }
    }

    /// Under [`OpenOptions::guard`], whether the files are still as they were when they were opened. Otherwise it is
    /// not known, and this answers that all is well.
    ///
    /// # Errors
    /// [`Error::Changed`], [`Error::Io`].
    pub fn check(&self) -> Result<()> {
        self.guards.as_ref().map_or(Ok(()), |guards| guards.check(&self.catalog))
    }

    /// Under [`OpenOptions::guard`], brings a tensor's pages in while its file is as it was.
    fn hand_out(&self, shard: usize, info: &TensorInfo<'_>) -> Result<()> {
        let Some(guards) = &self.guards else { return Ok(()) };
        let path = &self.catalog.shards()[shard].path;
        guards.hand_out(shard, path, || self.mappings[shard].populate_read(info.bytes()))
    }

    /// What there is, and where it lies in memory.
    #[cfg(feature = "python")]
    pub(crate) fn into_parts(self) -> Assembled<Mapping> {
        Assembled { catalog: self.catalog, memories: self.mappings, guards: self.guards }
    }

    /// Its bytes, to compare and to hash.
    pub(crate) fn contents(&self) -> Contents<'_> {
        Contents {
            catalog: &self.catalog,
            memories: self.mappings.iter().map(|mapping| mapping.as_ref() as &dyn Memory).collect(),
            copies: HashMap::new(),
            marks: None,
        }
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
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name)?.ok_or_else(|| self.catalog.missing(name))
    }

    /// The tensor called `name`, if there is one.
    ///
    /// # Errors
    /// Those of [`OpenOptions::guard`] where that is on; otherwise none.
    ///
    /// ```
    /// let model = maptensors::Model::read("models/digits.safetensors")?;
    /// assert!(model.get("fc1.weight")?.is_some() && model.get("lm_head.weight")?.is_none());
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn get(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        let found = self.catalog.find(name);
        let found = found.and_then(|(s, i)| Some((s, self.catalog.shards()[s].layout.at(i)?)));
        let Some((shard, info)) = found else { return Ok(None) };
        self.hand_out(shard, &info)?;
        Ok(Some(view(info, &self.mappings[shard])))
    }

    /// What the tensor called `name` is, and where.
    pub(crate) fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let (shard, index) = self.catalog.find(name)?;
        self.catalog.shards()[shard].layout.at(index)
    }

    /// The tensor called `name`, with its own share of the memory: it may outlive the model, and go to other threads.
    ///
    /// # Errors
    /// As [`Model::tensor`].
    ///
    /// ```
    /// let bias = maptensors::Model::read("models/digits.safetensors")?.owned("fc2.bias")?;
    /// assert_eq!(bias.to_vec::<f32>()?.len(), 10);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn owned(&self, name: &str) -> Result<Tensor> {
        let info = self.tensor(name)?.info();
        let shard = self.catalog.find(name).map_or(0, |(shard, _)| shard);
        let mapping = self.mappings[shard].clone();
        Ok(Tensor::whole(mapping, info.bytes().start, info.dtype(), info.shape(), info.name()))
    }

    /// All tensors, shard by shard, in file order.
    ///
    /// This asks no [`OpenOptions::guard`], as it gives no error: [`Model::stream`] asks for each tensor, and
    /// [`Model::check`] for all files.
    pub fn tensors(&self) -> Tensors<'_> {
        Tensors::new(self)
    }

    /// All names, shard by shard, in file order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.catalog.infos().map(|(_, info)| info.name())
    }

    /// The metadata of the file; of a sharded set, of all files together (the first shard to name a key
    /// wins).
    pub fn metadata(&self) -> &Metadata {
        self.catalog.metadata()
    }

    /// Whether any file has a metadata entry at all.
    pub(crate) fn has_metadata(&self) -> bool {
        self.catalog.shards().iter().any(|s| s.layout.has_metadata())
    }

    /// Number of files.
    pub fn shards(&self) -> usize {
        self.mappings.len()
    }

    /// The path of the `shard`-th file, as it was opened; empty for bytes.
    pub fn path(&self, shard: usize) -> Option<&Path> {
        self.catalog.shards().get(shard).map(|s| s.path.as_path())
    }

    /// The layout of the `shard`-th file.
    pub fn layout(&self, shard: usize) -> Option<&Layout> {
        self.catalog.shards().get(shard).map(|s| &s.layout)
    }

    /// The memory behind the `shard`-th file.
    pub fn mapping(&self, shard: usize) -> Option<&Mapping> {
        self.mappings.get(shard).map(AsRef::as_ref)
    }
}

fn view<'a>(info: TensorInfo<'a>, mapping: &'a Mapping) -> TensorView<'a> {
    TensorView::new(info, &mapping.as_bytes()[info.bytes()])
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("shards", &self.shards()).field("tensors", &self.len()).finish()
    }
}

#[cfg(test)]
pub(crate) use open::open_own_file;
