//! A tensor, to read.

use super::slice::{Index, TensorSlice};
use super::{cast_error, check_dtype};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::layout::{TensorInfo, checked_nbytes};

/// A tensor, borrowed from where it lies. Copying the view copies no data.
///
/// ```
/// use maptensors::Model;
///
/// let model = Model::read("models/digits.safetensors")?;
/// let w = model.tensor("fc1.weight")?;
/// let values: &[f32] = w.as_slice()?;
/// assert_eq!(values.len(), 64 * 64);
/// assert!(w.as_slice::<f64>().is_err()); // it is F32
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    info: TensorInfo<'a>,
    // INVARIANT: info.nbytes() long.
    data: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// `data` holds exactly the tensor's bytes.
    pub(crate) fn new(info: TensorInfo<'a>, data: &'a [u8]) -> Self {
        debug_assert_eq!(info.nbytes(), data.len() as u64);
        Self { info, data }
    }

    /// A tensor of bytes that lie anywhere, little endian and in C order. It has no name.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more or fewer than dtype and shape ask for; [`Error::Overflow`] and
    /// [`Error::Align`] for a shape that no tensor of the dtype has.
    ///
    /// ```
    /// use maptensors::{DType, TensorView};
    ///
    /// let bytes: Vec<u8> = [1.0f32, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    /// let view = TensorView::from_bytes(DType::F32, &[2], &bytes)?;
    /// assert_eq!(view.to_vec::<f32>()?, [1.0, 2.0]);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn from_bytes(dtype: DType, shape: &'a [usize], bytes: &'a [u8]) -> Result<Self> {
        let expected = checked_nbytes(std::path::Path::new(""), "", dtype, shape)? as u64;
        let found = bytes.len() as u64;
        if found != expected {
            let (path, tensor) = (std::path::PathBuf::new(), String::new());
            return Err(Error::Shape { path, tensor, found, expected });
        }
        Ok(Self::new(TensorInfo::new("", dtype, shape, 0, expected), bytes))
    }

    /// A tensor of elements that lie in memory. It has no name.
    ///
    /// # Errors
    /// As [`TensorView::from_bytes`].
    ///
    /// ```
    /// use maptensors::TensorView;
    ///
    /// let view = TensorView::from_slice(&[2, 2], &[1.0f32, 2.0, 3.0, 4.0])?;
    /// assert_eq!((view.dtype().name(), view.shape()), ("F32", &[2, 2][..]));
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn from_slice<T: Element>(shape: &'a [usize], elements: &'a [T]) -> Result<Self> {
        Self::from_bytes(T::DTYPE, shape, bytemuck::cast_slice(elements))
    }

    /// Where the tensor is, and what.
    pub fn info(&self) -> TensorInfo<'a> {
        self.info
    }

    /// The tensor's name.
    pub fn name(&self) -> &'a str {
        self.info.name()
    }

    /// What one element is.
    pub fn dtype(&self) -> DType {
        self.info.dtype()
    }

    /// Elements along each axis, outermost first (C order). Empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        self.info.shape()
    }

    /// The bytes as they are in the file: little endian, C order.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.data
    }

    /// Whether the address suits the dtype, so that [`TensorView::as_slice`] works. Some files put
    /// every tensor at an odd offset; [`TensorView::to_vec`] reads those.
    pub fn is_aligned(&self) -> bool {
        self.data.is_empty() || self.data.as_ptr().addr().is_multiple_of(self.dtype().align())
    }

    /// The elements, in place. For a packed dtype each value is a group of elements
    /// ([`Element::PER_VALUE`]).
    ///
    /// # Errors
    /// [`Error::DType`](crate::Error::DType) if `T` is another type,
    /// [`Error::Align`](crate::Error::Align) if the address does not suit `T`,
    /// [`Error::Value`](crate::Error::Value) if a `bool` is neither 0 nor 1 (for `bool` alone every
    /// byte is looked at).
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T]> {
        check_dtype::<T>(&self.info)?;
        T::cast(self.data).map_err(|e| cast_error::<T>(self.name(), self.data, e))
    }

    /// The elements, copied; at any alignment.
    ///
    /// # Errors
    /// [`Error::DType`](crate::Error::DType), [`Error::Value`](crate::Error::Value), as
    /// [`TensorView::as_slice`].
    ///
    /// ```
    /// # let model = maptensors::Model::read("models/digits.safetensors")?;
    /// let bias: Vec<f32> = model.tensor("fc2.bias")?.to_vec()?;
    /// assert_eq!(bias.len(), 10);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        check_dtype::<T>(&self.info)?;
        T::collect(self.data).map_err(|e| cast_error::<T>(self.name(), self.data, e))
    }

    /// A part of the tensor: one [`Index`] per axis, missing ones whole. Nothing is copied yet; where the
    /// part is contiguous, nothing ever is.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for more indices than axes, a place past the end or a
    /// step of 0; [`Error::Align`](crate::Error::Align) where packed elements would be cut inside a block.
    ///
    /// ```
    /// use maptensors::Index;
    ///
    /// # let model = maptensors::Model::read("models/digits.safetensors")?;
    /// let w = model.tensor("fc1.weight")?;
    /// let rows = w.slice(&[Index::from(8..16)])?;
    /// assert_eq!((rows.shape(), rows.is_contiguous()), (&[8, 64][..], true));
    /// let column = w.slice(&[Index::from(..), Index::from(3)])?;
    /// assert_eq!(column.to_vec::<f32>()?[1], w.as_slice::<f32>()?[64 + 3]);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn slice(&self, indices: &[Index]) -> Result<TensorSlice<'a>> {
        TensorSlice::new(self.info, self.data, indices)
    }
}

impl AsRef<[u8]> for TensorView<'_> {
    /// As [`TensorView::as_bytes`].
    fn as_ref(&self) -> &[u8] {
        self.data
    }
}

impl std::fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorView({:?}, {}, {:?})", self.name(), self.dtype(), self.shape())
    }
}
