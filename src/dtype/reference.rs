//! Our dtypes and those of the `safetensors` crate.

use super::{DType, UnknownDType};

macro_rules! same {
    ($( $ours:ident $theirs:ident; )*) => {
        impl From<DType> for safetensors::Dtype {
            fn from(dtype: DType) -> Self {
                match dtype { $( DType::$ours => safetensors::Dtype::$theirs, )* }
            }
        }

        impl TryFrom<safetensors::Dtype> for DType {
            type Error = UnknownDType;
            /// Fails only for a dtype newer than this crate.
            fn try_from(dtype: safetensors::Dtype) -> Result<Self, UnknownDType> {
                match dtype {
                    $( safetensors::Dtype::$theirs => Ok(DType::$ours), )*
                    other => Err(UnknownDType(other.to_string())),
                }
            }
        }
    };
}

same! {
    Bool BOOL;
    F4 F4;
    F6E2M3 F6_E2M3;
    F6E3M2 F6_E3M2;
    U8 U8;
    I8 I8;
    F8E5M2 F8_E5M2;
    F8E4M3 F8_E4M3;
    F8E8M0 F8_E8M0;
    F8E4M3Fnuz F8_E4M3FNUZ;
    F8E5M2Fnuz F8_E5M2FNUZ;
    I16 I16;
    U16 U16;
    F16 F16;
    BF16 BF16;
    I32 I32;
    U32 U32;
    F32 F32;
    C64 C64;
    F64 F64;
    I64 I64;
    U64 U64;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_agree_with_the_reference_crate() {
        for &dtype in DType::ALL {
            let reference = safetensors::Dtype::from(dtype);
            let block = dtype.block();
            assert_eq!(reference.to_string(), dtype.name());
            assert_eq!(Some(&*reference.to_string()), dtype.safetensors_name());
            assert_eq!(reference.bitsize() * block.elements, block.bytes * 8);
            assert_eq!(DType::try_from(reference), Ok(dtype));
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert_eq!(DType::ALL.len(), 22);
    }
}
