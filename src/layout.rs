//! Which tensors there are and where: plain data, the same for a file read and a file about to be written.

mod iter;
#[cfg(feature = "serde")]
mod serialize;

pub use iter::TensorInfos;

use crate::dtype::DType;
use crate::error::{Error, Result};
use hashbrown::{DefaultHashBuilder, HashTable};
use std::collections::BTreeMap;
use std::hash::BuildHasher;
use std::ops::Range;
use std::path::Path;
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
    // INVARIANT: begin <= end <= Layout::data_len, and end - begin is what dims and dtype ask for.
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
    metadata: Option<BTreeMap<String, String>>,
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

    /// Bytes of tensor data.
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Bytes of the whole file.
    pub fn file_len(&self) -> u64 {
        self.data_start + self.data_len
    }

    /// Where the data is in a mapping of the file: its length fits the address space, so this does.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn data_range(&self) -> Range<usize> {
        self.data_start as usize..self.file_len() as usize
    }

    /// The file's string-to-string metadata, empty if it has none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.metadata.as_ref().unwrap_or(&NONE)
    }

    /// Whether the file has a metadata entry at all (it may be there and empty).
    pub fn has_metadata(&self) -> bool {
        self.metadata.is_some()
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
    pub(crate) fn set_metadata(&mut self, metadata: Option<BTreeMap<String, String>>) {
        self.metadata = metadata;
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

/// The number of elements of a shape: zero if any dimension is, whatever the others are.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) { Some(0) } else { shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim)) }
}

/// Bytes that a shape and dtype ask for. A dimension of zero makes it zero, wherever it stands.
///
/// # Errors
/// [`Error::Overflow`] where the count leaves `usize`, [`Error::Align`] where it ends inside a byte.
pub(crate) fn checked_nbytes(path: &Path, tensor: &str, dtype: DType, shape: &[usize]) -> Result<usize> {
    let overflow = || Error::Overflow { path: path.into(), tensor: tensor.into(), shape: shape.to_vec() };
    let elements = elements(shape).ok_or_else(overflow)?;
    let bits = elements.checked_mul(dtype.bits()).ok_or_else(overflow)?;
    if bits % 8 != 0 {
        let what = format!("ends inside a byte: {elements} elements of {} bits", dtype.bits());
        return Err(Error::Align { path: path.into(), tensor: tensor.into(), what });
    }
    Ok(bits / 8)
}

/// Collects what a header says, in the header's order, and checks it once at the end.
///
/// `text` is what names point into: either the header itself, set once it is read
/// ([`Parts::set_text`]), or names copied one by one ([`Parts::intern`]).
#[derive(Default)]
pub(crate) struct Parts {
    text: Text,
    dims: Vec<usize>,
    entries: Vec<Entry>,
    pub(crate) metadata: Option<BTreeMap<String, String>>,
}

impl Parts {
    /// `tensors` is a guess at the number of tensors, to allocate once.
    pub(crate) fn new(tensors: usize) -> Self {
        Self {
            text: Text::default(),
            dims: Vec::with_capacity(tensors * 2),
            entries: Vec::with_capacity(tensors),
            metadata: None,
        }
    }

    /// Names pushed so far are ranges of this text.
    pub(crate) fn set_text(&mut self, text: Text) {
        self.text = text;
    }

    /// Copies a name into the text. `None` if it grows past 4 GiB, or is not ours.
    pub(crate) fn intern(&mut self, name: &str) -> Option<Range<u32>> {
        let Text::Owned(text) = &mut self.text else { return None };
        let start = u32::try_from(text.len()).ok()?;
        let end = u32::try_from(text.len() + name.len()).ok()?;
        text.push_str(name);
        Some(start..end)
    }

    /// Adds a dimension of the tensor about to be [pushed](Parts::push).
    pub(crate) fn push_dim(&mut self, dim: usize) {
        self.dims.push(dim);
    }

    /// Takes back dimensions pushed for a tensor that was not.
    pub(crate) fn truncate_dims(&mut self, len: usize) {
        self.dims.truncate(len);
    }

    /// Dimensions so far, of all tensors.
    pub(crate) fn dims_len(&self) -> usize {
        self.dims.len()
    }

    /// Adds a tensor whose dims are those pushed since `first_dim`. `None` if a place leaves `u32`.
    pub(crate) fn push(
        &mut self,
        name: Range<u32>,
        dtype: DType,
        first_dim: usize,
        begin: u64,
        end: u64,
    ) -> Option<()> {
        let dims = u32::try_from(first_dim).ok()?..u32::try_from(self.dims.len()).ok()?;
        self.entries.push(Entry { name, dims, dtype, begin, end });
        Some(())
    }

    /// Checks names, sizes and contiguity, and makes the layout of a file of `file_len` bytes.
    ///
    /// # Errors
    /// [`Error::Duplicate`], [`Error::Limit`] (rank), [`Error::Overflow`], [`Error::Align`], [`Error::Shape`],
    /// [`Error::Layout`], [`Error::Truncated`].
    pub(crate) fn finish(mut self, path: &Path, data_start: u64, file_len: Option<u64>) -> Result<Layout> {
        // Stable: tensors without bytes keep the header's order among themselves.
        if !self.entries.is_sorted_by_key(|e| (e.begin, e.end)) {
            self.entries.sort_by_key(|e| (e.begin, e.end));
        }
        let text = self.text.as_str();
        let name = |e: &Entry| &text[e.name.start as usize..e.name.end as usize];

        let hasher = DefaultHashBuilder::default();
        let mut lookup = HashTable::with_capacity(self.entries.len());
        for (i, entry) in (0u32..).zip(&self.entries) {
            let hash = hasher.hash_one(name(entry));
            let slot = lookup.entry(
                hash,
                |&j: &u32| name(&self.entries[j as usize]) == name(entry),
                |&j| hasher.hash_one(name(&self.entries[j as usize])),
            );
            match slot {
                hashbrown::hash_table::Entry::Occupied(_) => {
                    return Err(Error::Duplicate {
                        path: path.into(),
                        what: "tensor",
                        name: name(entry).into(),
                    });
                }
                hashbrown::hash_table::Entry::Vacant(slot) => {
                    slot.insert(i);
                }
            }
        }

        let mut next = 0;
        for entry in &self.entries {
            let tensor = name(entry);
            let misplaced = |what, found, expected| Error::Layout {
                path: path.into(),
                tensor: tensor.into(),
                what,
                found,
                expected,
            };
            let shape = &self.dims[entry.dims.start as usize..entry.dims.end as usize];
            if shape.len() > MAX_RANK {
                return Err(Error::Limit {
                    path: path.into(),
                    what: "the rank of a tensor",
                    found: shape.len() as u64,
                    limit: MAX_RANK as u64,
                    hint: None,
                });
            }
            let nbytes = checked_nbytes(path, tensor, entry.dtype, shape)? as u64;
            if entry.end < entry.begin {
                return Err(misplaced("data that ends before it begins", entry.end, entry.begin));
            }
            let found = entry.end - entry.begin;
            if found != nbytes {
                return Err(Error::Shape {
                    path: path.into(),
                    tensor: tensor.into(),
                    found,
                    expected: nbytes,
                });
            }
            if entry.begin != next {
                let what = if entry.begin > next { "a hole before data" } else { "overlapping data" };
                return Err(misplaced(what, entry.begin, next));
            }
            next = entry.end;
        }

        let declared = data_start.checked_add(next);
        match (file_len, declared) {
            (Some(found), Some(expected)) if found > expected => {
                return Err(Error::Layout {
                    path: path.into(),
                    tensor: String::new(),
                    what: "bytes follow the last tensor: the file ends",
                    found: found - data_start,
                    expected: next,
                });
            }
            (Some(found), declared) if declared != Some(found) => {
                let expected = declared.unwrap_or(u64::MAX);
                return Err(Error::Truncated { path: path.into(), found, expected });
            }
            _ => {}
        }
        Ok(Layout {
            text: self.text,
            dims: self.dims,
            entries: self.entries,
            lookup,
            hasher,
            metadata: self.metadata,
            data_start,
            data_len: next,
        })
    }
}

/// Plans a new file: see [`Layout::builder`].
#[derive(Debug, Default, Clone)]
pub struct LayoutBuilder {
    tensors: Vec<(String, DType, Vec<usize>)>,
    metadata: Option<BTreeMap<String, String>>,
}

impl LayoutBuilder {
    /// Adds a tensor of this dtype and shape.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>, dtype: DType, shape: &[usize]) -> Self {
        self.tensors.push((name.into(), dtype, shape.to_vec()));
        self
    }

    /// Adds one metadata entry; a key given again is replaced.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.get_or_insert_default().insert(key.into(), value.into());
        self
    }

    /// Replaces all metadata; `Some` of nothing writes an entry without keys.
    #[must_use]
    pub(crate) fn all_metadata(mut self, metadata: Option<BTreeMap<String, String>>) -> Self {
        self.metadata = metadata;
        self
    }

    /// Orders and places the tensors.
    ///
    /// The format forbids gaps, so alignment comes from order: tensors whose size is a multiple of 4096
    /// come first, then multiples of 64, 8, 4, 2 and the rest; ties keep the caller's order. Each
    /// tensor then starts at a multiple of its own class, hence of its dtype's alignment.
    ///
    /// # Errors
    /// [`Error::Duplicate`] for a name given twice, [`Error::Overflow`], [`Error::Limit`] (rank),
    /// [`Error::Align`] for sub-byte data that ends inside a byte, [`Error::Argument`] for the name
    /// `__metadata__`, which the format reserves.
    pub fn build(self) -> Result<Layout> {
        let path = Path::new("");
        let mut sized = Vec::with_capacity(self.tensors.len());
        for (name, dtype, shape) in self.tensors {
            if name == "__metadata__" {
                return Err(Error::Argument(
                    "a tensor cannot be called __metadata__: safetensors reserves the name".into(),
                ));
            }
            let nbytes = checked_nbytes(path, &name, dtype, &shape)?;
            sized.push((alignment_class(nbytes), name, dtype, shape, nbytes as u64));
        }
        sized.sort_by_key(|(class, ..)| std::cmp::Reverse(*class));

        let mut parts = Parts::new(sized.len());
        let mut begin = 0u64;
        for (_, name, dtype, shape, nbytes) in sized {
            let too_many = || Error::Argument("the tensors' names and shapes take more than 4 GiB".into());
            let overflow =
                || Error::Overflow { path: path.into(), tensor: name.clone(), shape: shape.clone() };
            let end =
                begin.checked_add(nbytes).filter(|&end| i64::try_from(end).is_ok()).ok_or_else(overflow)?;
            let place = parts.intern(&name).ok_or_else(too_many)?;
            let first = parts.dims_len();
            for &dim in &shape {
                parts.push_dim(dim);
            }
            parts.push(place, dtype, first, begin, end).ok_or_else(too_many)?;
            begin = end;
        }
        parts.metadata = self.metadata;
        parts.finish(path, 0, None)
    }
}

/// The alignment that a tensor of this size passes on to the one behind it.
fn alignment_class(nbytes: usize) -> usize {
    [4096, 64, 8, 4, 2].into_iter().find(|&class| nbytes.is_multiple_of(class)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_given_twice_is_refused() {
        let twice = Layout::builder().tensor("a", DType::U8, &[1]).tensor("a", DType::U8, &[2]).build();
        assert!(matches!(twice, Err(Error::Duplicate { name, .. }) if name == "a"));
    }

    #[test]
    fn what_is_kept_stays_in_its_place_and_is_found_by_name() {
        let layout = Layout::builder();
        let layout = layout.tensor("a", DType::U8, &[5]).tensor("b", DType::F32, &[2]);
        let layout = layout.tensor("c", DType::U8, &[0]).tensor("d", DType::U8, &[3]).build().unwrap();
        let kept = layout.keeping(|info| info.name() != "a");
        assert_eq!((kept.len(), kept.data_len()), (3, layout.data_len()));
        for info in &layout {
            assert_eq!(kept.get(info.name()), Some(info).filter(|info| info.name() != "a"));
        }
        assert!(layout.keeping(|_| false).is_empty());
    }

    #[test]
    fn sizes_that_cannot_be_counted_are_refused_and_zero_wins_in_any_order() {
        let huge = usize::MAX;
        for shape in [&[huge, 2][..], &[huge / 4], &[1 << 33, 1 << 33]] {
            let built = Layout::builder().tensor("a", DType::F64, shape).build();
            assert!(matches!(built, Err(Error::Overflow { .. })), "{shape:?}");
        }
        for shape in [[0, huge, huge], [huge, huge, 0]] {
            assert_eq!(Layout::builder().tensor("a", DType::F64, &shape).build().unwrap().data_len(), 0);
        }
        let sum =
            Layout::builder().tensor("a", DType::U8, &[1 << 62]).tensor("b", DType::U8, &[1 << 62]).build();
        assert!(matches!(sum, Err(Error::Overflow { .. })));
    }

    #[test]
    fn odd_counts_of_packed_elements_are_refused() {
        for (dtype, shape, ok) in
            [(DType::F4, 3, false), (DType::F4, 4, true), (DType::F6E2M3, 6, false), (DType::F6E3M2, 4, true)]
        {
            let built = Layout::builder().tensor("a", dtype, &[shape]).build();
            assert_eq!(built.is_ok(), ok, "{dtype} {shape}");
        }
    }

    #[test]
    fn the_reserved_name_is_refused() {
        assert!(matches!(
            Layout::builder().tensor("__metadata__", DType::U8, &[1]).build(),
            Err(Error::Argument(_))
        ));
    }

    proptest! {
        #[test]
        fn every_planned_tensor_is_aligned_for_its_dtype_and_found_by_name(
            specs in proptest::collection::vec((0..DType::ALL.len(), proptest::collection::vec(0usize..9, 0..4)), 0..40)
        ) {
            let mut builder = Layout::builder();
            for (i, (dtype, shape)) in specs.iter().enumerate() {
                let dtype = DType::ALL[*dtype];
                let shape: Vec<usize> = shape.iter().map(|d| if dtype.itemsize().is_none() { d * 4 } else { *d }).collect();
                let shape = if shape.is_empty() && dtype.itemsize().is_none() { vec![4] } else { shape };
                builder = builder.tensor(format!("t{i}"), dtype, &shape);
            }
            let layout = builder.build().unwrap();
            let mut next = 0;
            for (i, info) in layout.iter().enumerate() {
                prop_assert_eq!(info.offset(), next);
                prop_assert_eq!(info.offset() % info.dtype().align() as u64, 0);
                prop_assert_eq!(layout.position(info.name()), Some(i));
                next = info.range().end;
            }
            prop_assert_eq!(layout.data_len(), next);
            prop_assert_eq!(layout.len(), specs.len());
        }
    }
}
