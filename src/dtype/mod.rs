//! What one element of a tensor is: [`DType`], and which Rust types may look at it: [`Element`].

mod element;
mod packed;
#[cfg(feature = "serde")]
mod serialize;

pub use element::Element;
pub use packed::{F4x2, F6E2M3x4, F6E3M2x4, F8E4M3, F8E4M3Fnuz, F8E5M2, F8E5M2Fnuz, F8E8M0};

use std::fmt;

/// One row of the dtype table; the single place where a dtype's facts are written down.
struct Facts {
    /// Name in a safetensors header.
    name: &'static str,
    /// Name in `numpy` / `ml_dtypes` / `jax`, which is also torch's for most.
    numpy: &'static str,
    /// Name in `torch`, where it differs or where `numpy` has none.
    torch: &'static str,
    /// Size of one element in bits.
    bits: u8,
    /// Alignment in bytes of the smallest addressable unit.
    align: u8,
}

macro_rules! dtypes {
    ($( $(#[$doc:meta])* $variant:ident $name:literal $numpy:literal $torch:literal $bits:literal $align:literal $reference:ident; )*) => {
        /// The element type of a tensor, as the safetensors format knows it.
        ///
        /// ```
        /// use maptensors::DType;
        ///
        /// let dtype: DType = "BF16".parse().unwrap();
        /// assert_eq!((dtype, dtype.bits(), dtype.align()), (DType::BF16, 16, 2));
        /// assert_eq!(DType::F4.nbytes(6), Some(3)); // two elements to the byte
        /// assert_eq!(DType::F4.nbytes(5), None); // would end inside a byte
        /// ```
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum DType { $( $(#[$doc])* $variant, )* }

        const FACTS: &[Facts] = &[ $( Facts { name: $name, numpy: $numpy, torch: $torch, bits: $bits, align: $align }, )* ];

        impl DType {
            /// Every dtype, in the order of the enum.
            ///
            /// ```
            /// assert!(maptensors::DType::ALL.contains(&maptensors::DType::F8E4M3));
            /// ```
            pub const ALL: &'static [DType] = &[ $( DType::$variant, )* ];
        }

        impl From<DType> for safetensors::Dtype {
            fn from(dtype: DType) -> Self {
                match dtype { $( DType::$variant => safetensors::Dtype::$reference, )* }
            }
        }

        impl TryFrom<safetensors::Dtype> for DType {
            type Error = UnknownDType;
            /// Fails only for a dtype newer than this crate.
            fn try_from(dtype: safetensors::Dtype) -> Result<Self, UnknownDType> {
                match dtype {
                    $( safetensors::Dtype::$reference => Ok(DType::$variant), )*
                    other => Err(UnknownDType(other.to_string())),
                }
            }
        }
    };
}

dtypes! {
    /// One byte per element, 0 or 1.
    Bool "BOOL" "bool" "bool" 8 1 BOOL;
    /// OCP MX FP4 (E2M1), two elements to the byte, low nibble first.
    F4 "F4" "float4_e2m1fn" "float4_e2m1fn_x2" 4 1 F4;
    /// OCP MX FP6 (E2M3), four elements in three bytes.
    F6E2M3 "F6_E2M3" "float6_e2m3fn" "" 6 1 F6_E2M3;
    /// OCP MX FP6 (E3M2), four elements in three bytes.
    F6E3M2 "F6_E3M2" "float6_e3m2fn" "" 6 1 F6_E3M2;
    /// Unsigned byte.
    U8 "U8" "uint8" "uint8" 8 1 U8;
    /// Signed byte.
    I8 "I8" "int8" "int8" 8 1 I8;
    /// FP8 with infinities, 5 exponent and 2 mantissa bits (arXiv 2209.05433).
    F8E5M2 "F8_E5M2" "float8_e5m2" "float8_e5m2" 8 1 F8_E5M2;
    /// FP8 without infinities, 4 exponent and 3 mantissa bits (arXiv 2209.05433).
    F8E4M3 "F8_E4M3" "float8_e4m3fn" "float8_e4m3fn" 8 1 F8_E4M3;
    /// OCP MX scale: eight exponent bits, no sign, no mantissa.
    F8E8M0 "F8_E8M0" "float8_e8m0fnu" "float8_e8m0fnu" 8 1 F8_E8M0;
    /// FP8 E4M3 with one NaN and no negative zero (arXiv 2206.02915).
    F8E4M3Fnuz "F8_E4M3FNUZ" "float8_e4m3fnuz" "float8_e4m3fnuz" 8 1 F8_E4M3FNUZ;
    /// FP8 E5M2 with one NaN and no negative zero (arXiv 2206.02915).
    F8E5M2Fnuz "F8_E5M2FNUZ" "float8_e5m2fnuz" "float8_e5m2fnuz" 8 1 F8_E5M2FNUZ;
    /// Signed 16-bit integer.
    I16 "I16" "int16" "int16" 16 2 I16;
    /// Unsigned 16-bit integer.
    U16 "U16" "uint16" "uint16" 16 2 U16;
    /// IEEE 754 binary16.
    F16 "F16" "float16" "float16" 16 2 F16;
    /// bfloat16: the upper half of a binary32.
    BF16 "BF16" "bfloat16" "bfloat16" 16 2 BF16;
    /// Signed 32-bit integer.
    I32 "I32" "int32" "int32" 32 4 I32;
    /// Unsigned 32-bit integer.
    U32 "U32" "uint32" "uint32" 32 4 U32;
    /// IEEE 754 binary32.
    F32 "F32" "float32" "float32" 32 4 F32;
    /// Complex number of two binary32.
    C64 "C64" "complex64" "complex64" 64 4 C64;
    /// IEEE 754 binary64.
    F64 "F64" "float64" "float64" 64 8 F64;
    /// Signed 64-bit integer.
    I64 "I64" "int64" "int64" 64 8 I64;
    /// Unsigned 64-bit integer.
    U64 "U64" "uint64" "uint64" 64 8 U64;
}

impl DType {
    const fn facts(self) -> &'static Facts {
        &FACTS[self as usize]
    }

    /// Size of one element in bits.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F6E3M2.bits(), 6);
    /// ```
    pub const fn bits(self) -> usize {
        self.facts().bits as usize
    }

    /// Alignment in bytes that a typed view needs (1 where elements are a byte or less).
    ///
    /// ```
    /// assert_eq!(maptensors::DType::C64.align(), 4);
    /// ```
    pub const fn align(self) -> usize {
        self.facts().align as usize
    }

    /// Size of one element in bytes, or `None` where an element is smaller than a byte.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F16.itemsize(), Some(2));
    /// assert_eq!(maptensors::DType::F4.itemsize(), None);
    /// ```
    pub const fn itemsize(self) -> Option<usize> {
        if self.bits().is_multiple_of(8) { Some(self.bits() / 8) } else { None }
    }

    /// Bytes that `elements` elements take, or `None` on overflow or where they end inside a byte.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F32.nbytes(3), Some(12));
    /// assert_eq!(maptensors::DType::F32.nbytes(usize::MAX), None);
    /// ```
    pub const fn nbytes(self, elements: usize) -> Option<usize> {
        match elements.checked_mul(self.bits()) {
            Some(bits) if bits % 8 == 0 => Some(bits / 8),
            _ => None,
        }
    }

    /// The name in a safetensors header, such as `"F8_E4M3"`.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::Bool.name(), "BOOL");
    /// ```
    pub const fn name(self) -> &'static str {
        self.facts().name
    }

    /// The name in numpy, `ml_dtypes` and jax, such as `"float8_e4m3fn"`.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::C64.numpy_name(), "complex64");
    /// ```
    pub const fn numpy_name(self) -> &'static str {
        self.facts().numpy
    }

    /// The name in torch, or `None` where torch has no such dtype.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F4.torch_name(), Some("float4_e2m1fn_x2"));
    /// assert_eq!(maptensors::DType::F6E2M3.torch_name(), None);
    /// ```
    pub const fn torch_name(self) -> Option<&'static str> {
        let name = self.facts().torch;
        if name.is_empty() { None } else { Some(name) }
    }

    /// The dtype that a framework calls `name` (numpy's or torch's spelling).
    ///
    /// ```
    /// use maptensors::DType;
    /// assert_eq!(DType::from_framework_name("bfloat16"), Some(DType::BF16));
    /// ```
    pub fn from_framework_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|d| d.numpy_name() == name || d.torch_name() == Some(name))
    }

    /// The dtype with this safetensors name, from the bytes of a header.
    pub(crate) fn from_name(name: &[u8]) -> Option<Self> {
        // The order puts the dtypes of most files first: a header names its dtype once per tensor.
        const COMMON: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
        COMMON.iter().chain(Self::ALL).copied().find(|d| d.name().as_bytes() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A dtype name that this crate does not know.
///
/// ```
/// assert_eq!("F128".parse::<maptensors::DType>().unwrap_err().0, "F128");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {0:?}")]
pub struct UnknownDType(pub String);

impl std::str::FromStr for DType {
    type Err = UnknownDType;
    fn from_str(name: &str) -> Result<Self, UnknownDType> {
        Self::from_name(name.as_bytes()).ok_or_else(|| UnknownDType(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_agree_with_the_reference_crate() {
        for &dtype in DType::ALL {
            let reference = safetensors::Dtype::from(dtype);
            assert_eq!(reference.to_string(), dtype.name());
            assert_eq!(reference.bitsize(), dtype.bits());
            assert_eq!(DType::try_from(reference), Ok(dtype));
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert_eq!(DType::ALL.len(), 22);
    }

    #[test]
    fn case_and_near_misses_are_unknown() {
        for name in ["f32", "F128", "", "F32 ", "BOOLEAN"] {
            assert_eq!(name.parse::<DType>(), Err(UnknownDType(name.to_owned())));
        }
    }

    #[test]
    fn every_framework_name_leads_back_to_its_dtype() {
        for &dtype in DType::ALL {
            assert_eq!(DType::from_framework_name(dtype.numpy_name()), Some(dtype));
            if let Some(name) = dtype.torch_name() {
                assert_eq!(DType::from_framework_name(name), Some(dtype));
            }
        }
        assert_eq!(DType::from_framework_name(""), None);
    }
}
