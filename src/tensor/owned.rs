//! A tensor that owns its share of the memory that it lies in.

use super::slice::Selection;
use super::{Index, TensorSlice, TensorView};
use crate::dtype::{DType, Element};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::layout::TensorInfo;
use crate::map::Mapping;
use std::borrow::Cow;
use std::sync::Arc;

/// A tensor, or a part of one, that keeps the memory it lies in: a file's pages, mapped, as long as any tensor of it lives.
///
/// Cloning copies no data, and a clone may go to any thread. [`Model::owned`](crate::Model::owned) makes one. A model
/// whose tensors are held so cannot be edited meanwhile ([`ModelMut::tensor_mut`](crate::ModelMut::tensor_mut) refuses).
///
/// ```
/// use maptensors::{Model, Tensor};
///
/// let bias: Tensor = Model::read("models/digits.safetensors")?.owned("fc1.bias")?; // the model is gone
/// let sum: f32 = std::thread::spawn(move || bias.as_slice::<f32>().map(|b| b.iter().sum())).join().unwrap()?;
/// assert!(sum.is_finite());
/// # Ok::<(), maptensors::Error>(())
/// ```
pub struct Tensor<M = Mapping> {
    // INVARIANT: every element that offset, dtype, shape and strides describe lies inside memory.
    memory: Arc<M>,
    /// Of the first element, in bytes.
    offset: usize,
    dtype: DType,
    shape: Vec<usize>,
    /// In elements; `None` in C order.
    strides: Option<Vec<isize>>,
    name: Arc<str>,
}

impl<M> Clone for Tensor<M> {
    fn clone(&self) -> Self {
        Self {
            memory: self.memory.clone(),
            offset: self.offset,
            dtype: self.dtype,
            shape: self.shape.clone(),
            strides: self.strides.clone(),
            name: self.name.clone(),
        }
    }
}

impl<M> Tensor<M> {
    /// A whole tensor in C order, which lies inside `memory`.
    pub(crate) fn whole(memory: Arc<M>, offset: usize, dtype: DType, shape: &[usize], name: &str) -> Self {
        Self { memory, offset, dtype, shape: shape.to_vec(), strides: None, name: name.into() }
    }

    /// The name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What one element is.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Elements along each axis, outermost first. Empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The distance between neighbours along each axis, in elements; `None` in C order.
    pub fn strides(&self) -> Option<&[isize]> {
        self.strides.as_deref()
    }

    /// Whether the elements lie in C order, in one piece.
    pub fn is_contiguous(&self) -> bool {
        self.strides.is_none()
    }

    /// Bytes of all elements.
    pub fn nbytes(&self) -> usize {
        // Checked for the whole tensor, of which this is no more than a part.
        self.dtype.nbytes(self.selection().elements()).unwrap_or_default()
    }

    /// A part of the tensor, of the same memory: as [`TensorView::slice`].
    ///
    /// # Errors
    /// As [`TensorView::slice`].
    ///
    /// ```
    /// use maptensors::{Index, Model};
    ///
    /// let weight = Model::read("models/digits.safetensors")?.owned("fc1.weight")?;
    /// let column = weight.slice(&[Index::from(..), Index::from(3)])?;
    /// assert_eq!((column.shape(), column.is_contiguous()), (&[64][..], false));
    /// assert_eq!(column.to_vec::<f32>()?[1], weight.as_slice::<f32>()?[64 + 3]);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn slice(&self, indices: &[Index]) -> Result<Self> {
        self.part(self.selection().index(&self.name, indices)?)
    }

    /// All elements, counted from the first.
    pub(crate) fn selection(&self) -> Selection {
        let mut all = Selection::all(&self.shape);
        if let Some(strides) = &self.strides {
            all.strides.clone_from(strides);
        }
        all
    }

    /// Some of the elements of [`Tensor::selection`], of the same memory.
    ///
    /// # Errors
    /// [`Error::Align`] where a block would be cut.
    pub(crate) fn part(&self, selection: Selection) -> Result<Self> {
        selection.check_whole(&self.name, self.dtype)?;
        let contiguous = selection.is_contiguous();
        Ok(Self {
            offset: if selection.elements() == 0 {
                self.offset
            } else {
                // Behind a negative step the offset is negative.
                self.offset
                    .wrapping_add_signed(self.dtype.block().start_of_signed(selection.offset.cast_signed()))
            },
            strides: (!contiguous).then_some(selection.strides),
            shape: selection.shape,
            ..self.clone()
        })
    }

    /// The same bytes, looked at in another way. They lie inside of what this has.
    #[cfg(feature = "python")]
    pub(crate) fn looked_at_as(&self, dtype: DType, shape: Vec<usize>) -> Self {
        Self { dtype, shape, ..self.clone() }
    }

    #[cfg(feature = "python")]
    pub(crate) fn memory(&self) -> &Arc<M> {
        &self.memory
    }

    /// Of the first element, in bytes.
    #[cfg(feature = "python")]
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    #[cfg(feature = "python")]
    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.name
    }
}

impl Tensor {
    pub(crate) fn as_part(&self) -> TensorSlice<'_> {
        let info =
            TensorInfo::new(&self.name, self.dtype, &self.shape, self.offset as u64, self.nbytes() as u64);
        TensorSlice::selected(info, &self.memory.as_bytes()[self.offset..], self.selection())
    }

    /// As a view; `None` where it does not lie in one piece.
    pub fn view(&self) -> Option<TensorView<'_>> {
        let info =
            TensorInfo::new(&self.name, self.dtype, &self.shape, self.offset as u64, self.nbytes() as u64);
        self.as_bytes().map(|bytes| TensorView::new(info, bytes))
    }

    /// The bytes in place, if they lie in one piece.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        self.as_part().as_bytes()
    }

    /// The bytes in C order: borrowed if they lie in one piece, gathered if not.
    pub fn to_bytes(&self) -> Cow<'_, [u8]> {
        self.as_part().to_bytes()
    }

    /// The elements in place.
    ///
    /// # Errors
    /// As [`TensorSlice::as_slice`].
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.as_part().as_slice()
    }

    /// The elements in C order, copied.
    ///
    /// # Errors
    /// As [`TensorView::to_vec`].
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.as_part().to_vec()
    }
}

impl<M> std::fmt::Debug for Tensor<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?}, {}, {:?})", self.name(), self.dtype(), self.shape())
    }
}
