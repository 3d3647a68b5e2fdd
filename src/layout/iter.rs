//! Going through a layout, and planning one from what an iterator gives.

use super::{Entry, Layout, LayoutBuilder, TensorInfo};
use crate::dtype::DType;
use std::iter::FusedIterator;

/// The tensors of a layout, in file order: see [`Layout::iter`].
///
/// ```
/// use maptensors::{DType, Layout};
///
/// let layout = Layout::builder().tensor("a", DType::U8, &[4]).tensor("b", DType::U8, &[2]).build()?;
/// let sizes: Vec<u64> = (&layout).into_iter().map(|tensor| tensor.nbytes()).collect();
/// assert_eq!(sizes, [4, 2]);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TensorInfos<'a> {
    layout: &'a Layout,
    left: std::slice::Iter<'a, Entry>,
}

impl<'a> TensorInfos<'a> {
    pub(super) fn new(layout: &'a Layout) -> Self {
        Self { layout, left: layout.entries.iter() }
    }
}

impl<'a> Iterator for TensorInfos<'a> {
    type Item = TensorInfo<'a>;

    fn next(&mut self) -> Option<TensorInfo<'a>> {
        self.left.next().map(|entry| self.layout.info(entry))
    }

    fn nth(&mut self, n: usize) -> Option<TensorInfo<'a>> {
        self.left.nth(n).map(|entry| self.layout.info(entry))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.left.size_hint()
    }
}

impl DoubleEndedIterator for TensorInfos<'_> {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.left.next_back().map(|entry| self.layout.info(entry))
    }
}

impl ExactSizeIterator for TensorInfos<'_> {}

impl FusedIterator for TensorInfos<'_> {}

impl<'a> IntoIterator for &'a Layout {
    type Item = TensorInfo<'a>;
    type IntoIter = TensorInfos<'a>;
    fn into_iter(self) -> TensorInfos<'a> {
        self.iter()
    }
}

impl<N: Into<String>, S: AsRef<[usize]>> Extend<(N, DType, S)> for LayoutBuilder {
    /// Adds tensors by name, dtype and shape.
    fn extend<I: IntoIterator<Item = (N, DType, S)>>(&mut self, tensors: I) {
        let plan = std::mem::take(self);
        *self = tensors
            .into_iter()
            .fold(plan, |plan, (name, dtype, shape)| plan.tensor(name, dtype, shape.as_ref()));
    }
}

impl<N: Into<String>, S: AsRef<[usize]>> FromIterator<(N, DType, S)> for LayoutBuilder {
    fn from_iter<I: IntoIterator<Item = (N, DType, S)>>(tensors: I) -> Self {
        let mut plan = Self::default();
        plan.extend(tensors);
        plan
    }
}
