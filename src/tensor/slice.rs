//! Parts of a tensor along any axes, with steps.

use super::{cast_error, check_dtype};
use crate::dtype::{Block, DType, Element};
use crate::error::{Error, Result};
use crate::layout::TensorInfo;
use std::borrow::Cow;
use std::ops::{Bound, RangeBounds};

/// What to take along one axis: one place, or a range with a step.
///
/// ```
/// use maptensors::Index;
///
/// let row = Index::from(3); // the axis disappears
/// let all = Index::from(..);
/// let every_other = Index::from(0..10).step_by(2);
/// # let _ = (row, all, every_other);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    /// One place; the axis disappears.
    At(usize),
    /// Places `start, start + step, …` below `end` (the axis' length if `None`).
    Range {
        /// First place.
        start: usize,
        /// One past the last place.
        end: Option<usize>,
        /// Distance between places, at least 1.
        step: usize,
    },
}

impl Index {
    /// The same range, every `step`-th place only.
    #[must_use]
    pub fn step_by(self, by: usize) -> Self {
        match self {
            Self::Range { start, end, step } => Self::Range { start, end, step: step.saturating_mul(by) },
            at @ Self::At(_) => at,
        }
    }
}

impl From<usize> for Index {
    fn from(place: usize) -> Self {
        Self::At(place)
    }
}

macro_rules! from_range {
    ($($range:ty),*) => { $(
        impl From<$range> for Index {
            fn from(range: $range) -> Self {
                let bounds: (Bound<&usize>, Bound<&usize>) = (range.start_bound(), range.end_bound());
                let start = match bounds.0 {
                    Bound::Included(&start) => start,
                    Bound::Excluded(&start) => start.saturating_add(1),
                    Bound::Unbounded => 0,
                };
                let end = match bounds.1 {
                    Bound::Included(&end) => Some(end.saturating_add(1)),
                    Bound::Excluded(&end) => Some(end),
                    Bound::Unbounded => None,
                };
                Self::Range { start, end, step: 1 }
            }
        }
    )* };
}

from_range!(
    std::ops::Range<usize>,
    std::ops::RangeInclusive<usize>,
    std::ops::RangeFrom<usize>,
    std::ops::RangeTo<usize>,
    std::ops::RangeToInclusive<usize>,
    std::ops::RangeFull
);

/// Which elements of a C-ordered tensor: pure arithmetic, in elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Selection {
    /// The first element.
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    /// Distance between neighbours along each axis.
    pub(crate) strides: Vec<isize>,
}

impl Selection {
    /// Everything. Sizes were checked when the layout was made; an empty tensor may have dimensions
    /// whose product overflows, and its strides mean nothing.
    pub(crate) fn all(shape: &[usize]) -> Self {
        let mut strides = vec![1isize; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis].wrapping_mul(shape[axis].cast_signed());
        }
        Self { offset: 0, shape: shape.to_vec(), strides }
    }

    /// Keeps one place of an axis, which disappears. The place is inside.
    pub(crate) fn at(&mut self, axis: usize, place: usize) {
        debug_assert!(place < self.shape[axis]);
        self.shift(axis, place);
        self.shape.remove(axis);
        self.strides.remove(axis);
    }

    /// Keeps `len` places of an axis, from `start` on, `step` apart. All are inside.
    pub(crate) fn range(&mut self, axis: usize, start: usize, step: isize, len: usize) {
        if len > 0 {
            self.shift(axis, start);
        }
        self.shape[axis] = len;
        // Of one place or none the stride is never walked, and the step may be as large as it likes.
        if len > 1 {
            self.strides[axis] = self.strides[axis].wrapping_mul(step);
        }
    }

    fn shift(&mut self, axis: usize, places: usize) {
        // Inside the tensor the sum is the place of an element; in an empty one it is never used.
        let by = self.strides[axis].wrapping_mul(places.cast_signed());
        self.offset = self.offset.wrapping_add_signed(by);
    }

    pub(crate) fn elements(&self) -> usize {
        if self.shape.contains(&0) { 0 } else { self.shape.iter().product() }
    }

    /// How many trailing axes are one unbroken run, and how many elements that run has.
    fn run(&self) -> (usize, usize) {
        let mut len = 1usize;
        for (i, (&dim, &stride)) in self.shape.iter().zip(&self.strides).enumerate().rev() {
            if dim != 1 && stride != len.cast_signed() {
                return (self.shape.len() - 1 - i, len);
            }
            len *= dim;
        }
        (self.shape.len(), len)
    }

    pub(crate) fn is_contiguous(&self) -> bool {
        self.elements() == 0 || self.run().0 == self.shape.len()
    }

    /// Calls `each` with the first element of every unbroken run, in C order; returns the run's length.
    pub(crate) fn for_each_run(&self, mut each: impl FnMut(usize, usize)) {
        if self.elements() == 0 {
            return;
        }
        let (trailing, len) = self.run();
        let outer = self.shape.len() - trailing;
        let mut place = vec![0usize; outer];
        let mut offset = self.offset;
        loop {
            each(offset, len);
            // One step of an odometer over the outer axes.
            let stepped = (0..outer).rev().any(|axis| {
                place[axis] += 1;
                offset = offset.wrapping_add_signed(self.strides[axis]);
                if place[axis] == self.shape[axis] {
                    offset = offset.wrapping_add_signed(-self.strides[axis] * self.shape[axis].cast_signed());
                    place[axis] = 0;
                }
                place[axis] != 0
            });
            if !stepped {
                return;
            }
        }
    }

    /// Whether every run is whole blocks.
    pub(crate) fn is_whole(&self, block: Block) -> bool {
        if self.elements() == 0 || block.elements == 1 {
            return true;
        }
        let (trailing, len) = self.run();
        let whole = |elements: usize| block.is_whole(elements);
        let outer = &self.strides[..self.shape.len() - trailing];
        whole(self.offset) && whole(len) && outer.iter().all(|stride| whole(stride.unsigned_abs()))
    }

    /// # Errors
    /// [`Error::Align`] where a block would be cut.
    pub(crate) fn check_whole(&self, name: &str, dtype: DType) -> Result<()> {
        let block = dtype.block();
        if self.is_whole(block) {
            return Ok(());
        }
        let what = format!("would be cut inside a block, which is {block}");
        Err(Error::Align { path: std::path::PathBuf::new(), tensor: name.into(), what })
    }

    /// What one index for each axis selects of this; axes without one stay whole.
    ///
    /// # Errors
    /// [`Error::Argument`] for more indices than axes, a place past the end or a step of 0.
    pub(super) fn index(mut self, name: &str, indices: &[Index]) -> Result<Self> {
        let rank = self.shape.len();
        if indices.len() > rank {
            let text = format!("{} indices for tensor {name:?} of rank {rank}", indices.len());
            return Err(Error::Argument(text));
        }
        let mut axis = 0;
        for (i, &index) in indices.iter().enumerate() {
            let dim = self.shape[axis];
            let outside =
                |what: String| Error::Argument(format!("{what} is outside axis {i} of length {dim}"));
            match index {
                Index::At(place) if place < dim => self.at(axis, place),
                Index::At(place) => return Err(outside(format!("place {place}"))),
                Index::Range { step: 0, .. } => {
                    return Err(Error::Argument(format!("the step along axis {i} is 0")));
                }
                Index::Range { start, end, step } => {
                    let end = end.unwrap_or(dim);
                    if start > end || end > dim {
                        return Err(outside(format!("range {start}..{end}")));
                    }
                    let len = (end - start).div_ceil(step);
                    self.range(axis, start, isize::try_from(step).unwrap_or(isize::MAX), len);
                    axis += 1;
                }
            }
        }
        Ok(self)
    }

    /// Copies the selected elements of `data` to `to`, in C order. Runs are whole blocks.
    fn gather(&self, data: &[u8], block: Block, to: &mut [u8]) {
        let mut done = 0;
        self.for_each_run(|first, len| {
            let (start, size) = (block.start_of(first), block.start_of(len));
            to[done..done + size].copy_from_slice(&data[start..start + size]);
            done += size;
        });
    }
}

/// A part of a tensor, made by [`TensorView::slice`](crate::TensorView::slice): borrowed where it is
/// contiguous, gathered when asked where it is not.
///
/// ```
/// use maptensors::{Index, Model};
///
/// let model = Model::read("models/digits.safetensors")?;
/// let every_other_row = model.tensor("fc1.weight")?.slice(&[Index::from(..).step_by(2)])?;
/// assert_eq!(every_other_row.shape(), [32, 64]);
/// assert!(every_other_row.as_slice::<f32>().is_err()); // not contiguous
/// assert_eq!(every_other_row.to_vec::<f32>()?.len(), 32 * 64);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone)]
pub struct TensorSlice<'a> {
    info: TensorInfo<'a>,
    data: &'a [u8],
    // INVARIANT: every element lies inside data, and runs are whole blocks.
    selection: Selection,
}

impl<'a> TensorSlice<'a> {
    pub(super) fn new(info: TensorInfo<'a>, data: &'a [u8], indices: &[Index]) -> Result<Self> {
        let selection = Selection::all(info.shape()).index(info.name(), indices)?;
        selection.check_whole(info.name(), info.dtype())?;
        Ok(Self::selected(info, data, selection))
    }

    /// Every element that is selected lies inside `data`, and runs are whole blocks.
    pub(super) fn selected(info: TensorInfo<'a>, data: &'a [u8], selection: Selection) -> Self {
        Self { info, data, selection }
    }

    /// What one element is.
    pub fn dtype(&self) -> DType {
        self.info.dtype()
    }

    /// Elements along each axis that is left.
    pub fn shape(&self) -> &[usize] {
        &self.selection.shape
    }

    /// Bytes of the part.
    pub fn nbytes(&self) -> usize {
        self.dtype().block().start_of(self.selection.elements())
    }

    /// Whether the part lies in one piece, so that nothing needs copying.
    pub fn is_contiguous(&self) -> bool {
        self.selection.is_contiguous()
    }

    /// The bytes in place, if they lie in one piece.
    pub fn as_bytes(&self) -> Option<&'a [u8]> {
        let (start, size) = (self.dtype().block().start_of(self.selection.offset), self.nbytes());
        match size {
            0 => Some(&[]),
            _ => self.is_contiguous().then(|| &self.data[start..start + size]),
        }
    }

    /// The bytes in C order: borrowed if they lie in one piece, gathered if not.
    pub fn to_bytes(&self) -> Cow<'a, [u8]> {
        self.as_bytes().map_or_else(
            || {
                let mut bytes = vec![0; self.nbytes()];
                self.selection.gather(self.data, self.dtype().block(), &mut bytes);
                Cow::Owned(bytes)
            },
            Cow::Borrowed,
        )
    }

    /// Copies the bytes in C order to `to`, which has their length; returns that.
    pub(crate) fn copy_to(&self, to: &mut [u8]) -> usize {
        self.selection.gather(self.data, self.dtype().block(), to);
        self.nbytes()
    }

    /// The elements in place.
    ///
    /// # Errors
    /// [`Error::Argument`] if the part is not contiguous; otherwise as
    /// [`TensorView::as_slice`](crate::TensorView::as_slice).
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T]> {
        check_dtype::<T>(&self.info)?;
        let bytes = self.as_bytes().ok_or_else(|| {
            Error::Argument(format!(
                "this part of tensor {:?} is not contiguous; to_vec gathers it",
                self.info.name()
            ))
        })?;
        T::cast(bytes).map_err(|e| cast_error::<T>(self.info.name(), bytes, e))
    }

    /// The elements in C order, copied.
    ///
    /// # Errors
    /// As [`TensorView::to_vec`](crate::TensorView::to_vec).
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        check_dtype::<T>(&self.info)?;
        let bytes = self.to_bytes();
        T::collect(&bytes).map_err(|e| cast_error::<T>(self.info.name(), &bytes, e))
    }
}

impl std::fmt::Debug for TensorSlice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorSlice({:?}, {}, {:?})", self.info.name(), self.dtype(), self.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use proptest::prelude::*;

    /// A tensor whose i-th 16-bit element is i.
    fn counting(shape: &[usize]) -> (Layout, Vec<u8>) {
        let layout = Layout::builder().tensor("t", DType::U16, shape).build().unwrap();
        let n: usize = shape.iter().product();
        (layout, (0..u16::try_from(n).unwrap()).flat_map(u16::to_le_bytes).collect())
    }

    /// The slow, obvious answer.
    fn expected(shape: &[usize], indices: &[Index]) -> Vec<u16> {
        let mut wanted: Vec<usize> = vec![0];
        for (axis, &dim) in shape.iter().enumerate() {
            let places: Vec<usize> = match indices.get(axis) {
                None => (0..dim).collect(),
                Some(&Index::At(place)) => vec![place],
                Some(&Index::Range { start, end, step }) => {
                    (start..end.unwrap_or(dim)).step_by(step).collect()
                }
            };
            wanted = wanted.iter().flat_map(|&base| places.iter().map(move |p| base * dim + p)).collect();
        }
        wanted.into_iter().map(|i| u16::try_from(i).unwrap()).collect()
    }

    fn index(dim: usize) -> impl Strategy<Value = Index> {
        let range = (0..=dim, 0..=dim, 1usize..4).prop_map(|(a, b, step)| Index::Range {
            start: a.min(b),
            end: Some(a.max(b)),
            step,
        });
        if dim == 0 { range.boxed() } else { prop_oneof![range, (0..dim).prop_map(Index::At)].boxed() }
    }

    fn case() -> impl Strategy<Value = (Vec<usize>, Vec<Index>)> {
        proptest::collection::vec(0usize..6, 0..4).prop_flat_map(|shape| {
            let indices: Vec<_> = shape.iter().map(|&dim| index(dim)).collect();
            let rank = shape.len();
            (Just(shape), indices, 0..=rank).prop_map(|(shape, indices, n)| (shape, indices[..n].to_vec()))
        })
    }

    proptest! {
        #[test]
        fn any_slice_holds_the_elements_the_obvious_way_finds((shape, indices) in case()) {
            let (layout, data) = counting(&shape);
            let slice = TensorSlice::new(layout.at(0).unwrap(), &data, &indices).unwrap();
            let want = expected(&shape, &indices);
            prop_assert_eq!(slice.shape().iter().product::<usize>(), want.len());
            let bytes: Vec<u8> = want.iter().flat_map(|v| v.to_le_bytes()).collect();
            prop_assert_eq!(&*slice.to_bytes(), &bytes[..]);
            if let Some(borrowed) = slice.as_bytes() {
                prop_assert_eq!(borrowed, &bytes[..]);
                if !borrowed.is_empty() {
                    prop_assert!(data.as_ptr_range().contains(&borrowed.as_ptr()), "borrowed, not copied");
                }
            }
        }
    }

    #[test]
    fn a_slice_in_one_piece_is_borrowed() {
        let (layout, data) = counting(&[4, 5, 6]);
        let slice = |indices: &[Index]| TensorSlice::new(layout.at(0).unwrap(), &data, indices).unwrap();
        for (indices, contiguous) in [
            (&[Index::from(1..3)][..], true),
            (&[Index::At(2), Index::from(..), Index::from(..)], true),
            (&[Index::At(2), Index::from(1..4)], true),
            (&[Index::from(1..2), Index::from(2..5)], true),
            (&[Index::from(0..4).step_by(2)], false),
            (&[Index::from(..), Index::At(0)], false),
            (&[Index::At(0), Index::At(0), Index::from(0..6).step_by(5)], false),
        ] {
            assert_eq!(slice(indices).is_contiguous(), contiguous, "{indices:?}");
            assert_eq!(slice(indices).as_bytes().is_some(), contiguous);
        }
    }

    #[test]
    fn what_is_outside_is_refused() {
        let (layout, data) = counting(&[4, 5]);
        #[allow(clippy::reversed_empty_ranges)]
        for indices in [
            &[Index::At(4)][..],
            &[Index::from(0..5)],
            &[Index::from(3..2)],
            &[Index::from(..), Index::from(..), Index::from(..)],
            &[Index::from(..).step_by(0)],
            &[Index::from(0..=usize::MAX)],
        ] {
            let sliced = TensorSlice::new(layout.at(0).unwrap(), &data, indices);
            assert!(matches!(sliced, Err(Error::Argument(_))), "{indices:?}");
        }
    }

    #[test]
    fn packed_elements_are_sliced_at_whole_bytes_only() {
        let layout = Layout::builder().tensor("t", DType::F4, &[3, 4]).build().unwrap();
        let data = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba];
        let slice = |indices: &[Index]| TensorSlice::new(layout.at(0).unwrap(), &data, indices);
        assert_eq!(*slice(&[Index::At(1)]).unwrap().to_bytes(), [0x54, 0x76]);
        assert_eq!(*slice(&[Index::from(..), Index::from(2..4)]).unwrap().to_bytes(), [0x32, 0x76, 0xba]);
        for indices in [
            [Index::from(..), Index::from(1..3)],
            [Index::from(..), Index::from(..).step_by(2)],
            [Index::from(..), Index::At(0)],
        ] {
            assert!(matches!(slice(&indices), Err(Error::Align { .. })), "{indices:?}");
        }
    }
}
