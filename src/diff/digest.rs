//! What bytes are, in 16 bytes: the checksum of a tensor, and the identity of a model's content. Pure.
//!
//! A tensor's checksum is the sum, modulo 2^128, over its blocks of 4096 bytes (the last may be shorter), of
//! XXH3-128 of the block with the block's number as seed. A tensor without bytes has checksum 0. A sum, so
//! that a changed block changes it by what the block's own hash changes by, and nothing else is read.
//! It finds damage, and tells contents apart; it is no defence against somebody who means to deceive.

use crate::error::{Error, Result};
use crate::layout::TensorInfo;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use xxhash_rust::xxh3::{Xxh3, xxh3_128_with_seed};

/// Bytes in a block, counted from the start of the tensor.
pub(crate) const BLOCK: usize = 4096;

/// The metadata entry that carries a file's checksums: a JSON object from tensor names to 32 hexadecimal
/// digits each.
pub(crate) const CHECKSUMS: &str = "maptensors.checksums";

/// The hash of one block.
pub(crate) fn block(number: usize, bytes: &[u8]) -> u128 {
    xxh3_128_with_seed(bytes, number as u64)
}

/// The sum of the hashes of the blocks that `bytes` are, of which the first is number `first`.
pub(crate) fn blocks(first: usize, bytes: &[u8]) -> u128 {
    bytes.chunks(BLOCK).zip(first..).fold(0, |sum, (bytes, number)| sum.wrapping_add(block(number, bytes)))
}

/// As text: always as long.
pub(crate) fn hex(sum: u128) -> String {
    format!("{sum:032x}")
}

/// Back from [`hex`].
pub(crate) fn parse_hex(text: &str) -> Option<u128> {
    let is_hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    is_hex.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

/// The text of the metadata entry. Its length depends on the names alone.
pub(crate) fn encode<'a>(sums: impl IntoIterator<Item = (&'a str, u128)>) -> String {
    let sums: BTreeMap<&str, String> = sums.into_iter().map(|(name, sum)| (name, hex(sum))).collect();
    // A map of strings: serializing it cannot fail.
    serde_json::to_string(&sums).unwrap_or_default()
}

/// Back from [`encode`].
///
/// # Errors
/// [`Error::Json`].
pub(crate) fn decode(text: &str, path: &Path) -> Result<HashMap<String, u128>> {
    let json = |source: serde_json::Error| Error::Json {
        path: path.into(),
        what: "the checksum metadata",
        source: source.into(),
    };
    let sums: HashMap<String, String> = serde_json::from_str(text).map_err(json)?;
    sums.into_iter()
        .map(|(name, text)| match parse_hex(&text) {
            Some(sum) => Ok((name, sum)),
            None => Err(json(serde::de::Error::custom("a checksum is 32 hexadecimal digits"))),
        })
        .collect()
}

/// The identity of a model's content: its tensors' names, dtypes, shapes and checksums, in no order.
/// Metadata, order and division into files do not matter.
pub(crate) fn content_id<'a>(tensors: impl IntoIterator<Item = (TensorInfo<'a>, u128)>) -> u128 {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_unstable_by_key(|(info, _)| info.name());
    let mut hash = Xxh3::new();
    for (info, sum) in tensors {
        for text in [info.name(), info.dtype().name()] {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
        hash.update(&(info.shape().len() as u64).to_le_bytes());
        for &dim in info.shape() {
            hash.update(&(dim as u64).to_le_bytes());
        }
        hash.update(&sum.to_le_bytes());
    }
    hash.digest128()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Layout};

    #[test]
    fn a_checksum_is_the_documented_sum_and_follows_a_changed_block() {
        let mut bytes: Vec<u8> = (0..2 * BLOCK + 100).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let part = |i: usize| &bytes[i * BLOCK..bytes.len().min((i + 1) * BLOCK)];
        let sum = (0..3).fold(0u128, |sum, i| sum.wrapping_add(xxh3_128_with_seed(part(i), i as u64)));
        assert_eq!(blocks(0, &bytes), sum);
        assert_eq!(blocks(0, &bytes[..BLOCK]).wrapping_add(blocks(1, &bytes[BLOCK..])), sum);
        assert_eq!(blocks(0, &[]), 0);
        let old = block(2, part(2));
        bytes[2 * BLOCK + 1] ^= 1;
        let new = block(2, &bytes[2 * BLOCK..]);
        assert_eq!(blocks(0, &bytes), sum.wrapping_sub(old).wrapping_add(new));
        assert_ne!(old, new);
        // Blocks that change places are another content.
        assert_ne!(block(0, &bytes[..BLOCK]), block(1, &bytes[..BLOCK]));
    }

    #[test]
    fn the_text_is_of_fixed_width_and_read_back_strictly() {
        let (small, large) = (encode([("a", 0), ("b\"", 1)]), encode([("b\"", u128::MAX), ("a", 7)]));
        assert_eq!(small.len(), large.len());
        let read = decode(&large, Path::new("")).unwrap();
        assert_eq!((read["a"], read["b\""]), (7, u128::MAX));
        for lie in
            ["", "[]", "{\"a\":1}", "{\"a\":\"0\"}", &small.replace('0', "G"), &large.replace('f', "F")]
        {
            assert!(matches!(decode(lie, Path::new("")), Err(Error::Json { .. })), "{lie}");
        }
    }

    #[test]
    fn an_identity_depends_on_names_dtypes_shapes_and_content_and_not_on_order() {
        let id = |tensors: &[(&str, DType, &[usize], u128)]| {
            let mut builder = Layout::builder();
            for (name, dtype, shape, _) in tensors {
                builder = builder.tensor(*name, *dtype, shape);
            }
            let layout = builder.build().unwrap();
            let sum = |name: &str| tensors.iter().find(|t| t.0 == name).unwrap().3;
            content_id(layout.iter().map(|info| (info, sum(info.name()))))
        };
        let base = id(&[("a", DType::U8, &[4], 1), ("b", DType::U8, &[1], 2)]);
        assert_eq!(base, id(&[("b", DType::U8, &[1], 2), ("a", DType::U8, &[4], 1)]));
        for other in [
            id(&[("a", DType::U8, &[4], 1)]),
            id(&[("a", DType::U8, &[4], 1), ("b", DType::U8, &[1], 3)]),
            id(&[("a", DType::I8, &[4], 1), ("b", DType::U8, &[1], 2)]),
            id(&[("a", DType::U8, &[2, 2], 1), ("b", DType::U8, &[1], 2)]),
            id(&[("aa", DType::U8, &[4], 1), ("b", DType::U8, &[1], 2)]),
        ] {
            assert_ne!(base, other);
        }
    }
}
