//! Elements that Rust has no type for: 8-bit floats, and groups of 6- and 4-bit floats.
//!
//! Each is a transparent newtype over its bytes: any bit pattern is a value, nothing is converted
//! until asked.

use bytemuck::{Pod, Zeroable};

/// How an 8-bit float spends its bits, and what its special patterns mean.
struct Format {
    mantissa: u32,
    bias: i32,
    special: Special,
}

enum Special {
    /// As IEEE 754: the top exponent holds infinities and NaN.
    Ieee,
    /// Only all-ones is NaN; no infinities.
    Finite,
    /// Only negative zero is NaN; no infinities.
    Unsigned0,
}

impl Format {
    fn decode(&self, bits: u8) -> f32 {
        let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
        let magnitude = u32::from(bits & 0x7f);
        let exponent = magnitude >> self.mantissa;
        let top = 0x7f_u32 >> self.mantissa;
        let fraction = magnitude & ((1 << self.mantissa) - 1);
        match self.special {
            Special::Ieee if exponent == top => {
                return if fraction == 0 { sign * f32::INFINITY } else { f32::NAN };
            }
            Special::Finite if magnitude == 0x7f => return f32::NAN,
            Special::Unsigned0 if bits == 0x80 => return f32::NAN,
            _ => {}
        }
        // Three mantissa bits at most: every step below is exact in f32.
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_wrap)]
        let value = if exponent == 0 {
            fraction as f32 * exp2(1 - self.bias - self.mantissa as i32)
        } else {
            (fraction | 1 << self.mantissa) as f32 * exp2(exponent as i32 - self.bias - self.mantissa as i32)
        };
        sign * value
    }
}

/// 2^n, exact, for the exponents an 8-bit float can have (-149 <= n <= 127).
fn exp2(n: i32) -> f32 {
    if n >= -126 {
        f32::from_bits(u32::try_from(n + 127).unwrap_or(0) << 23)
    } else {
        f32::from_bits(1 << (n + 149).max(0))
    }
}

macro_rules! float8 {
    ($($(#[$doc:meta])* $name:ident => $decode:expr;)*) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
        #[repr(transparent)]
        pub struct $name(
            /// The bit pattern.
            pub u8,
        );

        impl $name {
            /// The value, exact.
            pub fn to_f32(self) -> f32 {
                let decode: fn(u8) -> f32 = $decode;
                decode(self.0)
            }
        }

        impl From<$name> for f32 {
            fn from(value: $name) -> f32 {
                value.to_f32()
            }
        }
    )* };
}

float8! {
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities (`float8_e4m3fn`).
    ///
    /// ```
    /// assert_eq!(maptensors::F8E4M3(0x38).to_f32(), 1.0);
    /// assert_eq!(maptensors::F8E4M3(0x7e).to_f32(), 448.0);
    /// ```
    F8E4M3 => |b| Format { mantissa: 3, bias: 7, special: Special::Finite }.decode(b);
    /// 8-bit float, 5 exponent and 2 mantissa bits, IEEE-like (`float8_e5m2`).
    ///
    /// ```
    /// assert_eq!(maptensors::F8E5M2(0x7c).to_f32(), f32::INFINITY);
    /// ```
    F8E5M2 => |b| Format { mantissa: 2, bias: 15, special: Special::Ieee }.decode(b);
    /// 8-bit float, E4M3, one NaN, no negative zero (`float8_e4m3fnuz`).
    ///
    /// ```
    /// assert!(maptensors::F8E4M3Fnuz(0x80).to_f32().is_nan());
    /// ```
    F8E4M3Fnuz => |b| Format { mantissa: 3, bias: 8, special: Special::Unsigned0 }.decode(b);
    /// 8-bit float, E5M2, one NaN, no negative zero (`float8_e5m2fnuz`).
    ///
    /// ```
    /// assert_eq!(maptensors::F8E5M2Fnuz(0x40).to_f32(), 1.0);
    /// ```
    F8E5M2Fnuz => |b| Format { mantissa: 2, bias: 16, special: Special::Unsigned0 }.decode(b);
    /// A power of two: the scale of an OCP MX block (`float8_e8m0fnu`).
    ///
    /// ```
    /// assert_eq!(maptensors::F8E8M0(127).to_f32(), 1.0);
    /// ```
    F8E8M0 => |b| if b == 0xff { f32::NAN } else { exp2(i32::from(b) - 127) };
}

/// Two 4-bit floats (OCP MX E2M1) in one byte, the first in the low nibble.
///
/// ```
/// assert_eq!(maptensors::F4x2(0x72).to_f32(), [1.0, 6.0]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct F4x2(
    /// The bit pattern.
    pub u8,
);

impl F4x2 {
    /// Both values, exact, in order.
    pub fn to_f32(self) -> [f32; 2] {
        const MAGNITUDE: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        [self.0 & 0xf, self.0 >> 4].map(|nibble| {
            let magnitude = MAGNITUDE[usize::from(nibble & 7)];
            if nibble & 8 == 0 { magnitude } else { -magnitude }
        })
    }
}

/// Four 6-bit floats (OCP MX E2M3) in three bytes.
///
/// The formats' papers do not say which bits come first, so they are kept packed.
///
/// ```
/// assert_eq!(size_of::<[maptensors::F6E2M3x4; 2]>(), 6);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct F6E2M3x4(
    /// The bit pattern.
    pub [u8; 3],
);

/// Four 6-bit floats (OCP MX E3M2) in three bytes, kept packed as [`F6E2M3x4`] is.
///
/// ```
/// assert_eq!(align_of::<maptensors::F6E3M2x4>(), 1);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct F6E3M2x4(
    /// The bit pattern.
    pub [u8; 3],
);

#[cfg(test)]
#[allow(clippy::float_cmp)] // every value here is exact
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_each_range_are_the_published_ones() {
        // Largest finite, smallest normal and smallest subnormal, from the OCP 8-bit specification.
        assert_eq!(F8E4M3(0x7e).to_f32(), 448.0);
        assert_eq!(F8E4M3(0x08).to_f32(), 2f32.powi(-6));
        assert_eq!(F8E4M3(0x01).to_f32(), 2f32.powi(-9));
        assert!(F8E4M3(0xff).to_f32().is_nan());
        assert_eq!(F8E5M2(0x7b).to_f32(), 57344.0);
        assert_eq!(F8E5M2(0x01).to_f32(), 2f32.powi(-16));
        assert_eq!(F8E5M2(0xfc).to_f32(), f32::NEG_INFINITY);
        assert!(F8E5M2(0x7d).to_f32().is_nan());
        assert_eq!(F8E4M3Fnuz(0x7f).to_f32(), 240.0);
        assert_eq!(F8E5M2Fnuz(0x7f).to_f32(), 57344.0);
        assert_eq!(F8E8M0(0).to_f32(), 2f32.powi(-127));
        assert_eq!(F8E8M0(254).to_f32(), 2f32.powi(127));
        assert!(F8E4M3(0x80).to_f32().is_sign_negative());
        assert_eq!(F4x2(0xf9).to_f32(), [-0.5, -6.0]);
    }
}
