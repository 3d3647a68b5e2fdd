//! The order and the places of the tensors of a new file.

use super::check::checked_nbytes;
use super::{Layout, Metadata, Parts, Rules, Value};
use crate::dtype::DType;
use crate::error::{Error, Result};
use std::path::Path;

/// What is planned lies end to end.
const RULES: Rules = Rules { gaps: false, overlaps: false, trailing: false };

/// Plans a new file: see [`Layout::builder`].
#[derive(Debug, Default, Clone)]
pub struct LayoutBuilder {
    tensors: Vec<(String, DType, Vec<usize>)>,
    metadata: Option<Metadata>,
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
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.metadata.get_or_insert_default().insert(key, value);
        self
    }

    /// Replaces all metadata. Where it has no keys, an entry without keys is written.
    ///
    /// ```
    /// use maptensors::Layout;
    ///
    /// let layout = Layout::builder().all_metadata([("a", "1"), ("b", "2")]).build()?;
    /// assert_eq!(layout.metadata().len(), 2);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[must_use]
    pub fn all_metadata(mut self, metadata: impl Into<Metadata>) -> Self {
        self.metadata = Some(metadata.into());
        self
    }

    /// As [`LayoutBuilder::all_metadata`]; `None` where there is to be no entry at all.
    #[must_use]
    pub(crate) fn with_metadata(mut self, metadata: Option<Metadata>) -> Self {
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
    /// [`Error::Align`] for data that ends inside a block, [`Error::Argument`] for the name
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
        parts.finish(RULES, path, 0, None)
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
