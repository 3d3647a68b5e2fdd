//! What can be saved: [`SaveTensor`].

use crate::dtype::DType;
use crate::layout::elements;
use crate::map::RawSlice;
use crate::tensor::{Tensor, TensorSlice, TensorView, TensorViewMut};
use std::borrow::Cow;
use std::io;

/// A tensor that can be saved: its dtype, its shape, and the way to its bytes.
///
/// [`TensorView`], [`TensorViewMut`], [`TensorSlice`] and [`Tensor`] are. So is `(dtype, shape, bytes)`, for bytes that
/// lie anywhere; and what `safetensors::View` describes, within a `FromView` (feature `safetensors`). Tensors of
/// different types are saved together as `Box<dyn SaveTensor>` or `&dyn SaveTensor`.
///
/// ```
/// use maptensors::{DType, Model, SaveTensor, TensorBytes};
///
/// /// 1, 2, 4, 8, … : computed where the file lies in memory.
/// struct Powers;
///
/// impl SaveTensor for Powers {
///     fn dtype(&self) -> DType {
///         DType::U16
///     }
///     fn shape(&self) -> &[usize] {
///         &[16]
///     }
///     fn bytes(&self) -> TensorBytes<'_> {
///         TensorBytes::written(|to| {
///             for (power, element) in to.chunks_exact_mut(2).enumerate() {
///                 element.copy_from_slice(&(1u16 << power).to_le_bytes());
///             }
///             Ok(to.len())
///         })
///     }
/// }
///
/// let path = std::env::temp_dir().join("maptensors-doc-save-tensor.safetensors");
/// let raw = (DType::U8, [3], [1, 2, 3]);
/// let tensors: [(&str, &dyn SaveTensor); 2] = [("powers", &Powers), ("raw", &raw)];
/// maptensors::save(tensors, &path)?;
/// let model = Model::read(&path)?;
/// assert_eq!(model.tensor("powers")?.as_slice::<u16>()?[15], 1 << 15);
/// assert_eq!(model.tensor("raw")?.as_bytes(), [1, 2, 3]);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
pub trait SaveTensor {
    /// What one element is.
    fn dtype(&self) -> DType;

    /// Elements along each axis, outermost first (C order). Empty for a scalar.
    fn shape(&self) -> &[usize];

    /// The bytes, little endian and in C order: exactly as many as dtype and shape ask for, or the save is
    /// [`Error::Shape`](crate::Error::Shape) and leaves nothing.
    fn bytes(&self) -> TensorBytes<'_>;
}

/// The bytes of a [`SaveTensor`]: where they lie, or how to have them written.
///
/// Those that lie somewhere are copied together, on several threads. The others are brought one after the other, on
/// the thread that saves.
pub struct TensorBytes<'a>(pub(crate) Kind<'a>);

pub(crate) enum Kind<'a> {
    /// In one piece of memory.
    Lying(RawSlice<'a>),
    Owned(Vec<u8>),
    Written(Write<'a>),
    /// Written by the caller, into the memory that staging hands out.
    #[cfg(feature = "python")]
    Later,
}

/// Writes a tensor's bytes, and returns how many.
pub(crate) type Write<'a> = Box<dyn FnOnce(&mut [u8]) -> io::Result<usize> + 'a>;

impl<'a> TensorBytes<'a> {
    /// Bytes that `write` puts where they are to lie, if they can be there at once: in the pages of the new file.
    ///
    /// It is given room for the whole tensor, whatever lay there before, and returns how many bytes it wrote. It is not
    /// called for an empty tensor. Its error ends the save, as the source of an [`Error::Io`](crate::Error::Io).
    pub fn written(write: impl FnOnce(&mut [u8]) -> io::Result<usize> + 'a) -> Self {
        Self(Kind::Written(Box::new(write)))
    }

    /// Of a tensor that the caller writes, where staging hands out its place.
    #[cfg(feature = "python")]
    pub(crate) const LATER: Self = Self(Kind::Later);

    pub(crate) fn lying(bytes: RawSlice<'a>) -> Self {
        Self(Kind::Lying(bytes))
    }
}

impl<'a> From<&'a [u8]> for TensorBytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::lying(RawSlice::from(bytes))
    }
}

impl From<Vec<u8>> for TensorBytes<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Kind::Owned(bytes))
    }
}

impl<'a> From<Cow<'a, [u8]>> for TensorBytes<'a> {
    fn from(bytes: Cow<'a, [u8]>) -> Self {
        match bytes {
            Cow::Borrowed(bytes) => bytes.into(),
            Cow::Owned(bytes) => bytes.into(),
        }
    }
}

impl std::fmt::Debug for TensorBytes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Kind::Lying(bytes) => write!(f, "TensorBytes({} bytes)", bytes.len()),
            Kind::Owned(bytes) => write!(f, "TensorBytes({} bytes, owned)", bytes.len()),
            Kind::Written(_) => f.write_str("TensorBytes(written)"),
            #[cfg(feature = "python")]
            Kind::Later => f.write_str("TensorBytes(later)"),
        }
    }
}

/// The bytes that dtype and shape ask for; 0 for what no file could hold, which planning refuses.
pub(crate) fn nbytes(tensor: &(impl SaveTensor + ?Sized)) -> u64 {
    elements(tensor.shape()).and_then(|n| tensor.dtype().nbytes(n)).unwrap_or_default() as u64
}

macro_rules! forward {
    ($($outer:ty),*) => { $(
        impl<T: SaveTensor + ?Sized> SaveTensor for $outer {
            fn dtype(&self) -> DType {
                (**self).dtype()
            }
            fn shape(&self) -> &[usize] {
                (**self).shape()
            }
            fn bytes(&self) -> TensorBytes<'_> {
                (**self).bytes()
            }
        }
    )* };
}

forward!(&T, Box<T>);

/// A dtype, a shape, and bytes that lie anywhere.
impl<S: AsRef<[usize]>, B: AsRef<[u8]>> SaveTensor for (DType, S, B) {
    fn dtype(&self) -> DType {
        self.0
    }
    fn shape(&self) -> &[usize] {
        self.1.as_ref()
    }
    fn bytes(&self) -> TensorBytes<'_> {
        self.2.as_ref().into()
    }
}

impl SaveTensor for TensorView<'_> {
    fn dtype(&self) -> DType {
        self.dtype()
    }
    fn shape(&self) -> &[usize] {
        self.shape()
    }
    fn bytes(&self) -> TensorBytes<'_> {
        self.as_bytes().into()
    }
}

impl SaveTensor for TensorViewMut<'_> {
    fn dtype(&self) -> DType {
        self.dtype()
    }
    fn shape(&self) -> &[usize] {
        self.shape()
    }
    fn bytes(&self) -> TensorBytes<'_> {
        self.as_ref().into()
    }
}

/// A part that does not lie in one piece is gathered into the new file.
impl SaveTensor for TensorSlice<'_> {
    fn dtype(&self) -> DType {
        self.dtype()
    }
    fn shape(&self) -> &[usize] {
        self.shape()
    }
    fn bytes(&self) -> TensorBytes<'_> {
        self.as_bytes().map_or_else(|| TensorBytes::written(|to| Ok(self.copy_to(to))), TensorBytes::from)
    }
}

/// One that does not lie in one piece is gathered into the new file.
impl SaveTensor for Tensor {
    fn dtype(&self) -> DType {
        self.dtype()
    }
    fn shape(&self) -> &[usize] {
        self.shape()
    }
    fn bytes(&self) -> TensorBytes<'_> {
        let part = self.as_part();
        match part.as_bytes() {
            Some(bytes) => bytes.into(),
            None => TensorBytes::written(move |to| Ok(part.copy_to(to))),
        }
    }
}

/// A tensor that is a `View` of the `safetensors` crate, to save it. (Feature `safetensors`, for version 0.8 of that
/// crate.)
///
/// ```
/// use maptensors::{FromView, Model};
/// use safetensors::{Dtype, tensor::TensorView};
///
/// let theirs = TensorView::new(Dtype::U8, vec![3], &[1, 2, 3]).unwrap();
/// let path = std::env::temp_dir().join("maptensors-doc-from-view.safetensors");
/// maptensors::save([("w", FromView::new(theirs)?)], &path)?;
/// assert_eq!(Model::read(&path)?.tensor("w")?.as_bytes(), [1, 2, 3]);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[cfg(feature = "safetensors")]
#[derive(Debug, Clone)]
pub struct FromView<V> {
    view: V,
    dtype: DType,
}

#[cfg(feature = "safetensors")]
impl<V: safetensors::View> FromView<V> {
    /// Looks at its dtype.
    ///
    /// # Errors
    /// For a dtype that is newer than this crate.
    pub fn new(view: V) -> Result<Self, crate::dtype::UnknownDType> {
        Ok(Self { dtype: view.dtype().try_into()?, view })
    }
}

#[cfg(feature = "safetensors")]
impl<V: safetensors::View> SaveTensor for FromView<V> {
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        self.view.shape()
    }
    fn bytes(&self) -> TensorBytes<'_> {
        self.view.data().into()
    }
}
