//! Which tensors there are and where: plain data, the same for a file read and a file about to be written.

mod catalog;
mod check;
mod format;
#[cfg(any(feature = "cli", feature = "python"))]
pub(crate) mod glob;
mod iter;
mod metadata;
mod plan;
mod select;
#[cfg(feature = "serde")]
mod serialize;
mod value;

pub(crate) use catalog::{Catalog, Shard};
pub(crate) use check::{Parts, Rules};
pub(crate) use check::{checked_nbytes, elements};
pub use format::Format;
pub use iter::TensorInfos;
pub use metadata::{Metadata, MetadataIter};
pub use plan::LayoutBuilder;
pub use select::Select;
pub(crate) use select::{Place, Run};
pub use value::{Array, Item, Value};

use crate::dtype::DType;
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;
use std::ops::Range;
use std::sync::Arc;

/// The largest number of dimensions accepted. numpy stops at 64 and torch's kernels well before;
/// a header that goes on for a million is an attack on whoever multiplies the shape out.
pub const MAX_RANK: usize = 1024;

/// One tensor of a [`Layout`]: name, dtype, shape and byte range. A cheap, borrowed copy.
///
/// ```
/// use maptensors::{DType, Layout};
///
/// let layout = Layout::builder().tensor("w", DType::F16, &[2, 3]).build()?;
/// let w = layout.get("w").unwrap();
/// assert_eq!((w.name(), w.dtype(), w.shape(), w.nbytes()), ("w", DType::F16, &[2, 3][..], 12));
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    name: &'a str,
    dtype: DType,
    shape: &'a [usize],
    offset: u64,
    nbytes: u64,
}

impl<'a> TensorInfo<'a> {
    /// `nbytes` is what dtype and shape ask for.
    pub(crate) fn new(name: &'a str, dtype: DType, shape: &'a [usize], offset: u64, nbytes: u64) -> Self {
        Self { name, dtype, shape, offset, nbytes }
    }

    /// The tensor's name.
    pub fn name(&self) -> &'a str {
        self.name
    }
    /// What one element is.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Elements along each axis, outermost first (C order). Empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }
    /// Bytes the tensor takes.
    pub fn nbytes(&self) -> u64 {
        self.nbytes
    }
    /// Where the tensor starts, in bytes from the start of the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }
    /// The tensor's bytes in the file.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.nbytes
    }
    /// As [`TensorInfo::range`], in a mapping of the file: its length fits the address space, so these do.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn bytes(&self) -> Range<usize> {
        self.offset as usize..(self.offset + self.nbytes) as usize
    }
    /// The largest power of two, at most 4096, that divides the tensor's file offset:
    /// its alignment in a mapping, which starts on a page.
    pub fn alignment(&self) -> u64 {
        1 << self.offset.trailing_zeros().min(12)
    }
}

/// A tensor as [`Layout`] keeps it: places in the shared text and dims.
#[derive(Debug, Clone)]
struct Entry {
    // INVARIANT: both ranges lie inside `Layout::text` (on character boundaries) and `Layout::dims`.
    name: Range<u32>,
    dims: Range<u32>,
    dtype: DType,
    // INVARIANT: begin <= end <= Layout::data_len; the entries before begin nowhere later; end - begin is what dims and dtype ask for.
    begin: u64,
    end: u64,
}

/// What names are ranges of: text of our own, or a file's, where it lies.
pub(crate) enum Text {
    Owned(String),
    /// Good as long as the file keeps the contract under which it was mapped: not longer than its model.
    Held(Arc<dyn AsRef<str> + Send + Sync>),
}

impl Clone for Text {
    /// Plain data, which no file can change.
    fn clone(&self) -> Self {
        Self::Owned(self.as_str().to_owned())
    }
}

impl Text {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Owned(text) => text,
            Self::Held(text) => (**text).as_ref(),
        }
    }
}

impl Default for Text {
    fn default() -> Self {
        Self::Owned(String::new())
    }
}

/// Which tensors a file holds, their dtype, shape and byte range, and its metadata.
///
/// A layout comes from parsing a file ([`crate::Model::layout`]) or from planning a new one
/// ([`Layout::builder`]). Tensors are in file order; names are unique.
///
/// ```
/// use maptensors::{DType, Layout};
///
/// let layout = Layout::builder()
///     .metadata("format", "pt")
///     .tensor("bias", DType::F32, &[3])
///     .tensor("weight", DType::F32, &[64, 64])
///     .build()?;
/// // Large, evenly sized tensors come first, so that they start on page boundaries.
/// assert_eq!(layout.iter().map(|t| t.name()).collect::<Vec<_>>(), ["weight", "bias"]);
/// assert_eq!(layout.metadata()["format"], "pt");
/// # Ok::<(), maptensors::Error>(())
/// ```
///
/// A model's own layout may read names where they lie in its mapped file. A clone is plain data: it outlives the model,
/// whatever becomes of the file.
#[derive(Clone)]
pub struct Layout {
    /// Names live here. For a parsed file it is the header itself: no name is copied.
    text: Text,
    dims: Vec<usize>,
    entries: Vec<Entry>,
    lookup: HashTable<u32>,
    hasher: DefaultHashBuilder,
    metadata: Option<Metadata>,
    format: Option<Format>,
    data_start: u64,
    data_len: u64,
}

impl Layout {
    /// Starts planning a new file.
    pub fn builder() -> LayoutBuilder {
        LayoutBuilder::default()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where the data starts, in bytes from the start of the file; 0 for a layout not yet given a header.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Bytes of the data, up to the end of its last tensor.
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Bytes of the file, up to the end of its last tensor.
    pub fn file_len(&self) -> u64 {
        self.data_start + self.data_len
    }

    /// Where the data is in a mapping of the file: its length fits the address space, so this does.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn data_range(&self) -> Range<usize> {
        self.data_start as usize..self.file_len() as usize
    }

    /// The file's metadata, empty if it has none.
    pub fn metadata(&self) -> &Metadata {
        static NONE: Metadata = Metadata::new();
        self.metadata.as_ref().unwrap_or(&NONE)
    }

    /// Whether the file has a metadata entry at all (it may be there and empty).
    pub fn has_metadata(&self) -> bool {
        self.metadata.is_some()
    }

    /// The format of the file that this was read from; `None` for one that was planned.
    ///
    /// ```
    /// assert_eq!(maptensors::Layout::builder().build()?.format(), None);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn format(&self) -> Option<Format> {
        self.format
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.position(name).and_then(|i| self.at(i))
    }

    /// The `index`-th tensor in file order.
    pub fn at(&self, index: usize) -> Option<TensorInfo<'_>> {
        self.entries.get(index).map(|entry| self.info(entry))
    }

    /// The place in file order of the tensor called `name`.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.lookup
            .find(self.hasher.hash_one(name), |&i| self.name_of(&self.entries[i as usize]) == name)
            .map(|&i| i as usize)
    }

    /// All tensors, in file order.
    pub fn iter(&self) -> TensorInfos<'_> {
        TensorInfos::new(self)
    }

    fn name_of(&self, entry: &Entry) -> &str {
        &self.text.as_str()[entry.name.start as usize..entry.name.end as usize]
    }

    fn info<'a>(&'a self, entry: &Entry) -> TensorInfo<'a> {
        TensorInfo {
            name: self.name_of(entry),
            dtype: entry.dtype,
            shape: &self.dims[entry.dims.start as usize..entry.dims.end as usize],
            offset: self.data_start + entry.begin,
            nbytes: entry.end - entry.begin,
        }
    }

    /// This layout with only those of its tensors that `keep` says; their places stay, with bytes between them
    /// that belong to none.
    #[must_use]
    pub(crate) fn keeping(&self, keep: impl Fn(&TensorInfo<'_>) -> bool) -> Self {
        let entries = self.entries.iter().filter(|entry| keep(&self.info(entry))).cloned().collect();
        let mut kept = Self { entries, lookup: HashTable::new(), ..self.clone() };
        let hash = |i: u32| kept.hasher.hash_one(kept.name_of(&kept.entries[i as usize]));
        let mut lookup = HashTable::with_capacity(kept.entries.len());
        for (i, _) in (0u32..).zip(&kept.entries) {
            lookup.insert_unique(hash(i), i, |&j| hash(j));
        }
        kept.lookup = lookup;
        kept
    }

    /// Other metadata, in place of what there is.
    pub(crate) fn set_metadata(&mut self, metadata: Option<Metadata>) {
        self.metadata = metadata;
    }

    /// This layout, of a file of a format.
    pub(crate) fn read_from(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }

    /// This layout with its data moved to start at `data_start`.
    pub(crate) fn placed_at(mut self, data_start: u64) -> Self {
        self.data_start = data_start;
        self
    }

    /// The start of a tensor relative to the data, as a safetensors header states it.
    pub(crate) fn relative(&self, info: &TensorInfo<'_>) -> Range<u64> {
        info.offset - self.data_start..info.offset - self.data_start + info.nbytes
    }
}

impl std::fmt::Debug for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layout")
            .field("tensors", &self.len())
            .field("data_start", &self.data_start)
            .field("data_len", &self.data_len)
            .finish_non_exhaustive()
    }
}

impl PartialEq for Layout {
    /// Same tensors at the same places in the same order, and the same metadata.
    fn eq(&self, other: &Self) -> bool {
        self.data_start == other.data_start && self.metadata == other.metadata && self.iter().eq(other.iter())
    }
}

impl Eq for Layout {}
