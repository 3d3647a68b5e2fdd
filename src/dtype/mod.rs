//! What one element of a tensor is: [`DType`], what is smallest whole of it: [`Block`], and which Rust types may look
//! at it: [`Element`].

mod block;
mod element;
mod packed;
#[cfg(any(feature = "safetensors", test))]
mod reference;
#[cfg(feature = "serde")]
mod serialize;

pub use block::Block;
pub use element::Element;
pub use packed::{F4x2, F6E2M3x4, F6E3M2x4, F8E4M3, F8E4M3Fnuz, F8E5M2, F8E5M2Fnuz, F8E8M0};

use std::fmt;

/// One row of the dtype table; the single place where a dtype's facts are written down.
struct Facts {
    /// Our own name.
    name: &'static str,
    /// What is smallest whole.
    block: Block,
    /// Alignment in bytes of a block.
    align: u8,
    /// Name in a safetensors header.
    safetensors: Option<&'static str>,
    /// Name in `numpy` / `ml_dtypes` / `jax`.
    numpy: Option<&'static str>,
    /// Name in `torch`.
    torch: Option<&'static str>,
}

/// A name in a format or a framework; `-` where it has none.
macro_rules! name {
    (-) => {
        None
    };
    ($name:literal) => {
        Some($name)
    };
}

macro_rules! dtypes {
    ($( $(#[$doc:meta])* $variant:ident $name:literal $elements:literal/$bytes:literal $align:literal $safetensors:tt $numpy:tt $torch:tt; )*) => {
        /// The element type of a tensor: of every format that is read, and of the frameworks.
        ///
        /// ```
        /// use maptensors::{Block, DType};
        ///
        /// let dtype: DType = "BF16".parse().unwrap();
        /// assert_eq!((dtype, dtype.itemsize(), dtype.align()), (DType::BF16, Some(2), 2));
        /// assert_eq!(DType::F4.block(), Block { elements: 2, bytes: 1 });
        /// assert_eq!(DType::F4.nbytes(6), Some(3));
        /// assert_eq!(DType::F4.nbytes(5), None); // would end inside a block
        /// ```
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum DType { $( $(#[$doc])* $variant, )* }

        const FACTS: &[Facts] = &[ $( Facts {
            name: $name,
            block: Block { elements: $elements, bytes: $bytes },
            align: $align,
            safetensors: name!($safetensors),
            numpy: name!($numpy),
            torch: name!($torch),
        }, )* ];

        impl DType {
            /// Every dtype, in the order of the enum.
            ///
            /// ```
            /// assert!(maptensors::DType::ALL.contains(&maptensors::DType::F8E4M3));
            /// ```
            pub const ALL: &'static [DType] = &[ $( DType::$variant, )* ];
        }
    };
}

// Our name, the elements and bytes of a block, its alignment; the names in safetensors, numpy and torch.
dtypes! {
    /// One byte per element, 0 or 1.
    Bool "BOOL" 1/1 1 "BOOL" "bool" "bool";
    /// OCP MX FP4 (E2M1), two elements to the byte, low nibble first.
    F4 "F4" 2/1 1 "F4" "float4_e2m1fn" "float4_e2m1fn_x2";
    /// OCP MX FP6 (E2M3), four elements in three bytes.
    F6E2M3 "F6_E2M3" 4/3 1 "F6_E2M3" "float6_e2m3fn" -;
    /// OCP MX FP6 (E3M2), four elements in three bytes.
    F6E3M2 "F6_E3M2" 4/3 1 "F6_E3M2" "float6_e3m2fn" -;
    /// Unsigned byte.
    U8 "U8" 1/1 1 "U8" "uint8" "uint8";
    /// Signed byte.
    I8 "I8" 1/1 1 "I8" "int8" "int8";
    /// FP8 with infinities, 5 exponent and 2 mantissa bits (arXiv 2209.05433).
    F8E5M2 "F8_E5M2" 1/1 1 "F8_E5M2" "float8_e5m2" "float8_e5m2";
    /// FP8 without infinities, 4 exponent and 3 mantissa bits (arXiv 2209.05433).
    F8E4M3 "F8_E4M3" 1/1 1 "F8_E4M3" "float8_e4m3fn" "float8_e4m3fn";
    /// OCP MX scale: eight exponent bits, no sign, no mantissa.
    F8E8M0 "F8_E8M0" 1/1 1 "F8_E8M0" "float8_e8m0fnu" "float8_e8m0fnu";
    /// FP8 E4M3 with one NaN and no negative zero (arXiv 2206.02915).
    F8E4M3Fnuz "F8_E4M3FNUZ" 1/1 1 "F8_E4M3FNUZ" "float8_e4m3fnuz" "float8_e4m3fnuz";
    /// FP8 E5M2 with one NaN and no negative zero (arXiv 2206.02915).
    F8E5M2Fnuz "F8_E5M2FNUZ" 1/1 1 "F8_E5M2FNUZ" "float8_e5m2fnuz" "float8_e5m2fnuz";
    /// Signed 16-bit integer.
    I16 "I16" 1/2 2 "I16" "int16" "int16";
    /// Unsigned 16-bit integer.
    U16 "U16" 1/2 2 "U16" "uint16" "uint16";
    /// IEEE 754 binary16.
    F16 "F16" 1/2 2 "F16" "float16" "float16";
    /// bfloat16: the upper half of a binary32.
    BF16 "BF16" 1/2 2 "BF16" "bfloat16" "bfloat16";
    /// Signed 32-bit integer.
    I32 "I32" 1/4 4 "I32" "int32" "int32";
    /// Unsigned 32-bit integer.
    U32 "U32" 1/4 4 "U32" "uint32" "uint32";
    /// IEEE 754 binary32.
    F32 "F32" 1/4 4 "F32" "float32" "float32";
    /// Complex number of two binary32.
    C64 "C64" 1/8 4 "C64" "complex64" "complex64";
    /// IEEE 754 binary64.
    F64 "F64" 1/8 8 "F64" "float64" "float64";
    /// Signed 64-bit integer.
    I64 "I64" 1/8 8 "I64" "int64" "int64";
    /// Unsigned 64-bit integer.
    U64 "U64" 1/8 8 "U64" "uint64" "uint64";
}

impl DType {
    const fn facts(self) -> &'static Facts {
        &FACTS[self as usize]
    }

    /// The block that its elements come in: how many elements, in how many bytes.
    ///
    /// ```
    /// use maptensors::{Block, DType};
    ///
    /// assert_eq!(DType::F32.block(), Block { elements: 1, bytes: 4 });
    /// assert_eq!(DType::F6E3M2.block(), Block { elements: 4, bytes: 3 });
    /// ```
    pub const fn block(self) -> Block {
        self.facts().block
    }

    /// Alignment in bytes that a typed view needs (1 where elements are a byte or less).
    ///
    /// ```
    /// assert_eq!(maptensors::DType::C64.align(), 4);
    /// ```
    pub const fn align(self) -> usize {
        self.facts().align as usize
    }

    /// Size of one element in bytes, or `None` where a block has several elements.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F16.itemsize(), Some(2));
    /// assert_eq!(maptensors::DType::F4.itemsize(), None);
    /// ```
    pub const fn itemsize(self) -> Option<usize> {
        let block = self.block();
        if block.elements == 1 { Some(block.bytes) } else { None }
    }

    /// Bytes that `elements` elements take, or `None` where they are no whole number of blocks, or more bytes than
    /// memory has addresses.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F32.nbytes(3), Some(12));
    /// assert_eq!(maptensors::DType::F32.nbytes(usize::MAX), None);
    /// ```
    pub const fn nbytes(self, elements: usize) -> Option<usize> {
        self.block().nbytes(elements)
    }

    /// Our own name, such as `"F8_E4M3"`: the one that a safetensors header has, where it has one.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::Bool.name(), "BOOL");
    /// ```
    pub const fn name(self) -> &'static str {
        self.facts().name
    }

    /// The name in a safetensors header, or `None` where safetensors has no such dtype.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F8E4M3.safetensors_name(), Some("F8_E4M3"));
    /// ```
    pub const fn safetensors_name(self) -> Option<&'static str> {
        self.facts().safetensors
    }

    /// The name in numpy, `ml_dtypes` and jax, such as `"float8_e4m3fn"`, or `None` where they have no such dtype.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::C64.numpy_name(), Some("complex64"));
    /// ```
    pub const fn numpy_name(self) -> Option<&'static str> {
        self.facts().numpy
    }

    /// The name in torch, or `None` where torch has no such dtype.
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F4.torch_name(), Some("float4_e2m1fn_x2"));
    /// assert_eq!(maptensors::DType::F6E2M3.torch_name(), None);
    /// ```
    pub const fn torch_name(self) -> Option<&'static str> {
        self.facts().torch
    }

    /// The dtype that a framework calls `name` (numpy's or torch's spelling).
    ///
    /// ```
    /// use maptensors::DType;
    /// assert_eq!(DType::from_framework_name("bfloat16"), Some(DType::BF16));
    /// ```
    pub fn from_framework_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|d| d.numpy_name() == Some(name) || d.torch_name() == Some(name))
    }

    /// The dtype with this safetensors name, from the bytes of a header.
    pub(crate) fn from_safetensors_name(name: &[u8]) -> Option<Self> {
        // The order puts the dtypes of most files first: a header names its dtype once per tensor.
        const COMMON: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
        let is_named = |d: &DType| d.safetensors_name().is_some_and(|known| known.as_bytes() == name);
        COMMON.iter().chain(Self::ALL).copied().find(is_named)
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
        let found = Self::ALL.iter().copied().find(|dtype| dtype.name() == name);
        found.ok_or_else(|| UnknownDType(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_our_own_lead_back_and_are_those_of_safetensors_where_it_has_one() {
        for &dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
            let Some(name) = dtype.safetensors_name() else { continue };
            assert_eq!(name, dtype.name());
            assert_eq!(DType::from_safetensors_name(name.as_bytes()), Some(dtype));
        }
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
            for name in [dtype.numpy_name(), dtype.torch_name()].into_iter().flatten() {
                assert_eq!(DType::from_framework_name(name), Some(dtype));
            }
        }
        assert_eq!(DType::from_framework_name(""), None);
    }
}
