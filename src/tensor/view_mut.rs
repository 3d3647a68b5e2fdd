//! A tensor, to write in place.

use super::view::TensorView;
use super::{cast_error, check_dtype};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::layout::TensorInfo;

/// A tensor, borrowed to be written where it lies: in copy-on-write memory, or in the file being made.
///
/// ```
/// use maptensors::ModelMut;
///
/// // SAFETY: nobody writes to the file while it is mapped.
/// let mut model = unsafe { ModelMut::open("models/digits.safetensors")? };
/// let mut bias = model.tensor_mut("fc1.bias")?;
/// bias.as_mut_slice::<f32>()?.fill(0.5);
/// assert_eq!(model.tensor("fc1.bias")?.as_slice::<f32>()?[63], 0.5);
/// # Ok::<(), maptensors::Error>(())
/// ```
pub struct TensorViewMut<'a> {
    info: TensorInfo<'a>,
    // INVARIANT: info.nbytes() long.
    data: &'a mut [u8],
}

impl<'a> TensorViewMut<'a> {
    /// `data` holds exactly the tensor's bytes.
    pub(crate) fn new(info: TensorInfo<'a>, data: &'a mut [u8]) -> Self {
        debug_assert_eq!(info.nbytes(), data.len() as u64);
        Self { info, data }
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

    /// The same tensor, to read.
    pub fn as_view(&self) -> TensorView<'_> {
        TensorView::new(self.info, self.data)
    }

    /// The bytes as they are in the file: little endian, C order.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        self.data
    }

    /// The elements, in place.
    ///
    /// # Errors
    /// As [`TensorView::as_slice`].
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        let (info, data) = (self.info, &mut *self.data);
        cast_mut(info, data)
    }

    /// As [`TensorViewMut::as_mut_slice`], for as long as the model or draft is borrowed.
    ///
    /// # Errors
    /// As [`TensorView::as_slice`].
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
    /// let bias: &mut [f32] = model.tensor_mut("fc2.bias")?.into_mut_slice()?;
    /// bias[9] = 0.0;
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn into_mut_slice<T: Element>(self) -> Result<&'a mut [T]> {
        cast_mut(self.info, self.data)
    }

    /// Overwrites all elements; works at any alignment.
    ///
    /// # Errors
    /// [`Error::DType`], and [`Error::Shape`] if `values` is of another length.
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
    /// model.tensor_mut("fc2.bias")?.copy_from_slice(&[0.25f32; 10])?;
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn copy_from_slice<T: Element>(&mut self, values: &[T]) -> Result<()> {
        check_dtype::<T>(&self.info)?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if bytes.len() != self.data.len() {
            return Err(Error::Shape {
                path: std::path::PathBuf::new(),
                tensor: self.name().into(),
                found: bytes.len() as u64,
                expected: self.data.len() as u64,
            });
        }
        self.data.copy_from_slice(bytes);
        Ok(())
    }
}

fn cast_mut<'a, T: Element>(info: TensorInfo<'a>, data: &'a mut [u8]) -> Result<&'a mut [T]> {
    check_dtype::<T>(&info)?;
    // Asked on a shared borrow first: an exclusive one could not come back for the error's text.
    if let Err(error) = T::cast(data) {
        return Err(cast_error::<T>(info.name(), data, error));
    }
    T::cast_mut(data).map_err(|error| cast_error::<T>(info.name(), &[], error))
}

impl AsRef<[u8]> for TensorViewMut<'_> {
    /// The bytes as they are in the file: little endian, C order.
    fn as_ref(&self) -> &[u8] {
        self.data
    }
}

impl AsMut<[u8]> for TensorViewMut<'_> {
    /// As [`TensorViewMut::as_bytes_mut`].
    fn as_mut(&mut self) -> &mut [u8] {
        self.data
    }
}

impl std::fmt::Debug for TensorViewMut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorViewMut({:?}, {}, {:?})", self.name(), self.dtype(), self.shape())
    }
}
