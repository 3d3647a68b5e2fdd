//! A place in a [`Layout`](crate::Layout) looked at through a [`Mapping`](crate::Mapping).

mod owned;
#[cfg(feature = "safetensors")]
mod reference;
mod shared;
mod slice;
mod view;
mod view_mut;

pub use owned::Tensor;
pub use shared::TensorShared;
#[cfg(feature = "python")]
pub(crate) use slice::Selection;
pub use slice::{Index, TensorSlice};
pub use view::TensorView;
pub use view_mut::TensorViewMut;

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::layout::TensorInfo;
use bytemuck::PodCastError;
use bytemuck::checked::CheckedCastError;

/// Whether `T` is what the tensor holds.
fn check_dtype<T: Element>(info: &TensorInfo<'_>) -> Result<()> {
    if T::DTYPE == info.dtype() {
        return Ok(());
    }
    Err(Error::DType {
        path: std::path::PathBuf::new(),
        tensor: info.name().into(),
        found: info.dtype().to_string(),
        expected: T::DTYPE.to_string(),
    })
}

/// bytemuck's refusal as ours. `bytes` is what was to be looked at.
fn cast_error<T: Element>(name: &str, bytes: &[u8], error: CheckedCastError) -> Error {
    match error {
        CheckedCastError::InvalidBitPattern => {
            let found = bytes.iter().find(|&&b| b > 1).copied().unwrap_or_default();
            let what = format!("{} cannot be {found}; look at it as bytes", T::DTYPE);
            Error::Value { tensor: name.into(), what }
        }
        CheckedCastError::PodCastError(PodCastError::TargetAlignmentGreaterAndInputNotAligned) => {
            let (align, off) = (align_of::<T>(), bytes.as_ptr().addr() % align_of::<T>());
            let what = format!(
                "starts {off} bytes past a multiple of {align} in memory, and {} needs one; to_vec copies it",
                T::DTYPE
            );
            Error::Align { path: std::path::PathBuf::new(), tensor: name.into(), what }
        }
        // Sizes were checked when the layout was made; a slice's bytes are whole elements.
        CheckedCastError::PodCastError(_) => Error::Shape {
            path: std::path::PathBuf::new(),
            tensor: name.into(),
            found: bytes.len() as u64,
            expected: bytes.len().next_multiple_of(size_of::<T>()) as u64,
        },
    }
}
