//! What a file says of its tensors, checked: sizes, names, and places by the rules of its format.

use super::{Entry, Layout, MAX_RANK, Metadata, Text};
use crate::dtype::DType;
use crate::error::{Error, Result};
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;
use std::ops::Range;
use std::path::Path;

/// What a format allows of the places of its tensors. Every format asks that their bytes are there.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rules {
    /// Bytes before or between tensors that belong to none.
    pub(crate) gaps: bool,
    /// Several tensors over the same bytes.
    pub(crate) overlaps: bool,
    /// Bytes behind the last tensor.
    pub(crate) trailing: bool,
}

/// The number of elements of a shape: zero if any dimension is, whatever the others are.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) { Some(0) } else { shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim)) }
}

/// Bytes that a shape and dtype ask for. A dimension of zero makes it zero, wherever it stands.
///
/// # Errors
/// [`Error::Overflow`] where the count leaves `isize`, [`Error::Align`] where it ends inside a block.
pub(crate) fn checked_nbytes(path: &Path, tensor: &str, dtype: DType, shape: &[usize]) -> Result<usize> {
    let overflow = || Error::Overflow { path: path.into(), tensor: tensor.into(), shape: shape.to_vec() };
    let elements = elements(shape).ok_or_else(overflow)?;
    let block = dtype.block();
    if let Some(bytes) = block.nbytes(elements) {
        return Ok(bytes);
    }
    if !block.is_whole(elements) {
        let what = format!("has {elements} elements and ends inside a block, which is {block}");
        return Err(Error::Align { path: path.into(), tensor: tensor.into(), what });
    }
    Err(overflow())
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
    pub(crate) metadata: Option<Metadata>,
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

    /// Checks names, sizes and places, and makes the layout of a file of `file_len` bytes.
    ///
    /// # Errors
    /// [`Error::Duplicate`], [`Error::Limit`] (rank), [`Error::Overflow`], [`Error::Align`], [`Error::Shape`],
    /// [`Error::Layout`], [`Error::Truncated`].
    pub(crate) fn finish(
        mut self,
        rules: Rules,
        path: &Path,
        data_start: u64,
        file_len: Option<u64>,
    ) -> Result<Layout> {
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

        // The end of what the tensors so far reach over.
        let mut reach = 0;
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
            if entry.begin > reach && !rules.gaps {
                return Err(misplaced("a hole before data", entry.begin, reach));
            }
            if entry.begin < reach && !rules.overlaps {
                return Err(misplaced("overlapping data", entry.begin, reach));
            }
            reach = reach.max(entry.end);
        }

        let declared = data_start.checked_add(reach);
        match (file_len, declared) {
            (Some(found), Some(expected)) if found > expected && !rules.trailing => {
                return Err(Error::Layout {
                    path: path.into(),
                    tensor: String::new(),
                    what: "bytes follow the last tensor: the file ends",
                    found: found - data_start,
                    expected: reach,
                });
            }
            (Some(found), declared) if declared.is_none_or(|declared| declared > found) => {
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
            format: None,
            data_start,
            data_len: reach,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One tensor of bytes for each range, called by its place, in a file whose data starts at byte 8.
    fn layout(ranges: &[(u64, u64)], file_len: u64, rules: Rules) -> Result<Layout> {
        let mut parts = Parts::new(ranges.len());
        for (i, &(begin, end)) in ranges.iter().enumerate() {
            let name = parts.intern(&i.to_string()).unwrap();
            let first = parts.dims_len();
            parts.push_dim(usize::try_from(end.saturating_sub(begin)).unwrap());
            parts.push(name, DType::U8, first, begin, end).unwrap();
        }
        parts.finish(rules, Path::new("f"), 8, Some(file_len))
    }

    const STRICT: Rules = Rules { gaps: false, overlaps: false, trailing: false };
    const GAPS: Rules = Rules { gaps: true, ..STRICT };
    const OVERLAPS: Rules = Rules { overlaps: true, ..STRICT };
    const TRAILING: Rules = Rules { trailing: true, ..STRICT };

    #[test]
    fn each_rule_allows_what_it_says_and_nothing_else() {
        const GAP: &[(u64, u64)] = &[(0, 4), (6, 9)];
        const FRONT: &[(u64, u64)] = &[(3, 9)];
        const TIED: &[(u64, u64)] = &[(0, 9), (0, 9)];
        const INSIDE: &[(u64, u64)] = &[(0, 9), (2, 5)];
        const ACROSS: &[(u64, u64)] = &[(0, 6), (4, 9)];
        const PLAIN: &[(u64, u64)] = &[(4, 9), (0, 4), (4, 4)];
        for (ranges, behind, allowed) in [
            (GAP, 0, [false, true, false, false]),
            (FRONT, 0, [false, true, false, false]),
            (TIED, 0, [false, false, true, false]),
            (INSIDE, 0, [false, false, true, false]),
            (ACROSS, 0, [false, false, true, false]),
            (PLAIN, 0, [true; 4]),
            (PLAIN, 1, [false, false, false, true]),
        ] {
            for (rules, allowed) in [STRICT, GAPS, OVERLAPS, TRAILING].into_iter().zip(allowed) {
                let made = layout(ranges, 17 + behind, rules);
                assert_eq!(made.is_ok(), allowed, "{ranges:?} and {behind} bytes behind, {rules:?}");
                match made {
                    Ok(made) => assert_eq!((made.len(), made.data_len()), (ranges.len(), 9)),
                    Err(error) => assert_eq!(error.kind().name(), "Layout"),
                }
            }
        }
    }

    #[test]
    fn tensors_over_the_same_bytes_are_each_at_their_place() {
        let ranges = [(0, 9), (2, 5), (7, 20), (2, 5), (4, 4)];
        let made = layout(&ranges, 28, OVERLAPS).unwrap();
        for (i, (begin, end)) in ranges.into_iter().enumerate() {
            assert_eq!(made.get(&i.to_string()).unwrap().range(), 8 + begin..8 + end, "{i}");
        }
        let order: Vec<&str> = made.iter().map(|info| info.name()).collect();
        assert_eq!(order, ["0", "1", "3", "4", "2"]);
        assert_eq!(made.file_len(), 28);
    }

    #[test]
    fn no_rule_allows_bytes_that_are_not_there() {
        let all = Rules { gaps: true, overlaps: true, trailing: true };
        for ranges in [&[(0, 9), (0, 10)][..], &[(9, 10)], &[(0, 10), (1, 2)], &[(u64::MAX - 2, u64::MAX)]] {
            assert_eq!(layout(ranges, 17, all).unwrap_err().kind().name(), "Truncated", "{ranges:?}");
        }
        assert_eq!(layout(&[(5, 3)], 17, all).unwrap_err().kind().name(), "Layout");
    }
}
