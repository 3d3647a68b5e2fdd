//! The Rust types that may look at a tensor's bytes.

use super::{DType, F4x2, F6E2M3x4, F6E3M2x4, F8E4M3, F8E4M3Fnuz, F8E5M2, F8E5M2Fnuz, F8E8M0};
use bytemuck::{CheckedBitPattern, NoUninit, PodCastError, checked::CheckedCastError};
use half::{bf16, f16};
use num_complex::Complex;

mod sealed {
    /// Keeps [`super::Element`] ours: a new element type needs a row in the dtype table.
    pub trait Sealed {}
}

/// A Rust type that is one element (or one packed group of elements) of a tensor.
///
/// Sealed: implemented for `f64 f32 f16 bf16`, `i8`–`i64`, `u8`–`u64`, `bool`, `Complex<f32>`, the
/// [`F8E4M3`] family, and the packed groups [`F4x2`], [`F6E2M3x4`], [`F6E3M2x4`].
///
/// ```
/// use maptensors::{DType, Element};
///
/// fn dtype_of<T: Element>(_: &[T]) -> DType { T::DTYPE }
/// assert_eq!(dtype_of(&[half::bf16::ONE]), DType::BF16);
/// ```
pub trait Element: CheckedBitPattern + NoUninit + Send + Sync + sealed::Sealed {
    /// The dtype this type stands for.
    const DTYPE: DType;
    /// Elements of the dtype in one value: 1, or 2 and 4 for the packed groups.
    const PER_VALUE: usize = 1;

    /// Reinterprets bytes; fails on a wrong address, length or (for `bool`) bit pattern.
    #[doc(hidden)]
    fn cast(bytes: &[u8]) -> Result<&[Self], CheckedCastError>;
    /// As [`Element::cast`], for writing.
    #[doc(hidden)]
    fn cast_mut(bytes: &mut [u8]) -> Result<&mut [Self], CheckedCastError>;
    /// Copies out of bytes at any address.
    #[doc(hidden)]
    fn collect(bytes: &[u8]) -> Result<Vec<Self>, CheckedCastError>;
}

/// Types of which every bit pattern is a value: no byte has to be looked at to make a view.
macro_rules! plain {
    ($($t:ty => $dtype:ident $(x $n:literal)?),* $(,)?) => { $(
        impl sealed::Sealed for $t {}
        impl Element for $t {
            const DTYPE: DType = DType::$dtype;
            $( const PER_VALUE: usize = $n; )?
            fn cast(bytes: &[u8]) -> Result<&[Self], CheckedCastError> {
                // An empty tensor has no address that could be wrong.
                if bytes.is_empty() { return Ok(&[]); }
                Ok(bytemuck::try_cast_slice(bytes)?)
            }
            fn cast_mut(bytes: &mut [u8]) -> Result<&mut [Self], CheckedCastError> {
                if bytes.is_empty() { return Ok(&mut []); }
                Ok(bytemuck::try_cast_slice_mut(bytes)?)
            }
            fn collect(bytes: &[u8]) -> Result<Vec<Self>, CheckedCastError> {
                const SIZE: usize = size_of::<$t>();
                if !bytes.len().is_multiple_of(SIZE) {
                    return Err(PodCastError::OutputSliceWouldHaveSlop.into());
                }
                let mut values = vec![<$t as bytemuck::Zeroable>::zeroed(); bytes.len() / SIZE];
                bytemuck::cast_slice_mut::<$t, u8>(&mut values).copy_from_slice(bytes);
                Ok(values)
            }
        }
    )* };
}

plain! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f16 => F16, bf16 => BF16, f32 => F32, f64 => F64, Complex<f32> => C64,
    F8E4M3 => F8E4M3, F8E5M2 => F8E5M2, F8E8M0 => F8E8M0, F8E4M3Fnuz => F8E4M3Fnuz, F8E5M2Fnuz => F8E5M2Fnuz,
    F4x2 => F4 x 2, F6E2M3x4 => F6E2M3 x 4, F6E3M2x4 => F6E3M2 x 4,
}

impl sealed::Sealed for bool {}
impl Element for bool {
    const DTYPE: DType = DType::Bool;
    fn cast(bytes: &[u8]) -> Result<&[Self], CheckedCastError> {
        bytemuck::checked::try_cast_slice(bytes)
    }
    fn cast_mut(bytes: &mut [u8]) -> Result<&mut [Self], CheckedCastError> {
        bytemuck::checked::try_cast_slice_mut(bytes)
    }
    fn collect(bytes: &[u8]) -> Result<Vec<Self>, CheckedCastError> {
        Self::cast(bytes).map(<[bool]>::to_vec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits<T: Element>() {
        assert_eq!(T::DTYPE.nbytes(T::PER_VALUE), Some(size_of::<T>()));
        assert_eq!(T::DTYPE.align(), align_of::<T>());
    }

    #[test]
    fn every_element_has_the_size_and_alignment_of_its_dtype() {
        fits::<bool>();
        fits::<u8>();
        fits::<i8>();
        fits::<u16>();
        fits::<i16>();
        fits::<u32>();
        fits::<i32>();
        fits::<u64>();
        fits::<i64>();
        fits::<f16>();
        fits::<bf16>();
        fits::<f32>();
        fits::<f64>();
        fits::<Complex<f32>>();
        fits::<F8E4M3>();
        fits::<F8E5M2>();
        fits::<F8E8M0>();
        fits::<F8E4M3Fnuz>();
        fits::<F8E5M2Fnuz>();
        fits::<F4x2>();
        fits::<F6E2M3x4>();
        fits::<F6E3M2x4>();
    }

    #[test]
    fn a_byte_that_is_neither_0_nor_1_is_no_bool() {
        assert_eq!(bool::cast(&[0, 1]), Ok(&[false, true][..]));
        assert_eq!(bool::cast(&[0, 2]), Err(CheckedCastError::InvalidBitPattern));
        assert_eq!(bool::collect(&[2]), Err(CheckedCastError::InvalidBitPattern));
        assert_eq!(bool::cast_mut(&mut [3]), Err(CheckedCastError::InvalidBitPattern));
    }

    #[test]
    fn collect_takes_any_address_and_cast_only_an_aligned_one() {
        let words = [1u64, 2, 3];
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        assert_eq!(u64::cast(&bytes[8..]), Ok(&[2u64, 3][..]));
        assert!(matches!(
            u64::cast(&bytes[1..17]),
            Err(CheckedCastError::PodCastError(PodCastError::TargetAlignmentGreaterAndInputNotAligned))
        ));
        let shifted: Vec<u8> = [&[0u8], bytes].concat();
        assert_eq!(u64::collect(&shifted[1..]), Ok(words.to_vec()));
        assert!(u64::collect(&bytes[..7]).is_err());
        assert_eq!(u64::cast(&bytes[1..1]), Ok(&[][..]));
    }
}
