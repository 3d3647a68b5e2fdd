//! File formats: bytes to [`Layout`] and back. Pure: no I/O but through [`Bytes`], no mapping, no `unsafe`.
//!
//! A format is a folder here, with its [`Read`], and a line in [`READERS`].

pub(crate) mod foreign;
pub(crate) mod safetensors;

pub(crate) use safetensors::index;

use crate::error::Result;
use crate::layout::{Format, Layout};
use crate::source::{Bytes, Head};
use serde::de::{DeserializeSeed, Deserializer, Visitor};
use std::borrow::Cow;
use std::fmt;

/// The reader of one format.
pub(crate) trait Read: Sync {
    fn format(&self) -> Format;

    /// Whether these are the first bytes of a file of the format, which has `len`.
    fn is_signed(&self, head: &[u8], len: u64) -> bool;

    /// Which tensors there are and where.
    ///
    /// # Errors
    /// Those of the format, for what contradicts itself or the bytes that are there; those of [`Bytes`].
    fn layout(&self, bytes: &dyn Bytes) -> Result<Layout>;
}

/// Every format that is read.
const READERS: &[&dyn Read] = &[&safetensors::Reader];

/// The format of a file of `len` bytes that starts like this; `None` for one that is not read.
pub(crate) fn sniff(head: &[u8], len: u64) -> Option<&'static dyn Read> {
    READERS.iter().copied().find(|reader| reader.is_signed(head, len))
}

/// The layout of a file of any format that is read.
///
/// # Errors
/// Those of the format's reader. What is no format that is read has the errors of safetensors, the one without a
/// signature, with a hint at what it probably is.
pub(crate) fn read(bytes: &dyn Bytes) -> Result<Layout> {
    let head = Head::of(bytes)?;
    let reader = match sniff(head.as_slice(), head.len()) {
        Some(reader) => reader,
        None => safetensors::check_foreign(head.as_slice(), head.path()).map(|()| &safetensors::Reader)?,
    };
    Ok(reader.layout(&head)?.read_from(reader.format()))
}

/// For serde: a string, borrowed where it holds no escapes.
#[derive(Clone, Copy)]
pub(crate) struct JsonString;

impl<'de> DeserializeSeed<'de> for JsonString {
    type Value = Cow<'de, str>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Cow<'de, str>, D::Error> {
        d.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for JsonString {
    type Value = Cow<'de, str>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }
    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Borrowed(text))
    }
    fn visit_str<E>(self, text: &str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_known_by_its_content_alone() {
        let format = |bytes: &[u8]| sniff(bytes, bytes.len() as u64).map(Read::format);
        for (bytes, expected) in [
            (&b"\x02\0\0\0\0\0\0\0{}"[..], Some(Format::Safetensors)),
            (b"\x05\0\0\0\0\0\0\0 \n{} ", Some(Format::Safetensors)),
            (b"\x1f\x8b\x08\0\0\0\0\0{", Some(Format::Safetensors)),
            (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", None),
            (b"\x02\0\0\0\0\0\0\0[]", None),
            (b"\x02\0\0\0\0\0\0", None),
            (b"\x02\0\0\0\0\0\0\x80{}", None),
            (b"GGUF\x03\0\0\0", None),
            (b"", None),
        ] {
            assert_eq!(format(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn a_format_that_is_read_is_never_taken_for_a_foreign_one() {
        // The lengths of headers that look like signatures.
        for length in [
            *b"\x80\x02}\0\0\0\0\0",
            *b"\x1f\x8b\x08\0\0\0\0\0",
            *b"{\"\0\0\0\0\0\0",
            *b"\x08\x07\x12\0\0\0\0\0",
        ] {
            let len = usize::try_from(u64::from_le_bytes(length)).unwrap();
            let mut bytes = length.to_vec();
            bytes.extend(b"{}");
            bytes.resize(8 + len, b' ');
            assert_eq!(read(&&*bytes).unwrap().format(), Some(Format::Safetensors), "{length:?}");
        }
    }
}
