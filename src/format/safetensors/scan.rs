//! The fast way through a header: one pass, no allocation per tensor.
//!
//! It knows the plain form that every writer produces and gives up (`None`) at anything else: escapes
//! in names, unknown fields, unusual numbers, errors. It accepts nothing that [`super::json`] would not
//! read the same way; a test holds the two together.

use super::json::MetadataMap;
use crate::dtype::DType;
use crate::layout::{Metadata, Parts};
use std::ops::Range;

pub(super) fn scan(text: &str) -> Option<Parts> {
    // An entry of a real header is 90 bytes or so; guessing low only costs a reallocation.
    let mut parts = Parts::new(text.len() / 96);
    let mut at = Cursor { text, pos: 0 };
    at.expect(b'{')?;
    if !at.accept(b'}') {
        loop {
            let name = at.string()?;
            if &text[name.clone()] == "__metadata__" {
                at.expect(b':')?;
                if parts.metadata.is_some() {
                    return None;
                }
                parts.metadata = Some(at.metadata()?);
            } else if at.usual(&name, &mut parts).is_none() {
                at.expect(b':')?;
                at.entry(name, &mut parts)?;
            }
            if !at.accept(b',') {
                break;
            }
        }
        at.expect(b'}')?;
    }
    at.skip_space();
    (at.pos == text.len()).then_some(parts)
}

/// A place in the header. Every step checks its bounds; `None` means "not the plain form".
struct Cursor<'a> {
    text: &'a str,
    pos: usize,
}

impl Cursor<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.pos).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\t' | b'\r')) {
            self.pos += 1;
        }
    }

    fn accept(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        self.pos += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.accept(byte).then_some(())
    }

    /// A string without escapes or control characters: where it stands, without its quotes.
    fn string(&mut self) -> Option<Range<usize>> {
        self.expect(b'"')?;
        let start = self.pos;
        let rest = &self.text.as_bytes()[start..];
        let len = memchr::memchr2(b'"', b'\\', rest)?;
        if rest[..len].iter().any(|&b| b < 0x20) {
            return None;
        }
        self.pos = start + len + 1;
        (rest[len] == b'"').then_some(start..start + len)
    }

    /// A non-negative integer without sign, fraction, exponent or leading zero.
    fn number(&mut self) -> Option<u64> {
        self.skip_space();
        self.digits()
    }

    fn digits(&mut self) -> Option<u64> {
        let rest = &self.text.as_bytes()[self.pos..];
        let mut value = 0u64;
        let mut len = 0;
        for &b in rest {
            if !b.is_ascii_digit() {
                break;
            }
            value = value.checked_mul(10)?.checked_add(u64::from(b - b'0'))?;
            len += 1;
        }
        let plain =
            len > 0 && (len == 1 || rest[0] != b'0') && !matches!(rest.get(len), Some(b'.' | b'e' | b'E'));
        self.pos += len;
        plain.then_some(value)
    }

    /// Steps over this very text.
    fn literal(&mut self, text: &str) -> Option<()> {
        let found = self.text.as_bytes()[self.pos..].starts_with(text.as_bytes());
        self.pos += if found { text.len() } else { 0 };
        found.then_some(())
    }

    /// What stands behind a name in nearly every header there is, read without looking for alternatives.
    /// If it is anything else, nothing has happened.
    fn usual(&mut self, name: &Range<usize>, parts: &mut Parts) -> Option<()> {
        let (start, first_dim) = (self.pos, parts.dims_len());
        let read = self.usual_entry(name, first_dim, parts);
        if read.is_none() {
            self.pos = start;
            parts.truncate_dims(first_dim);
        }
        read
    }

    fn usual_entry(&mut self, name: &Range<usize>, first_dim: usize, parts: &mut Parts) -> Option<()> {
        self.literal(":{\"dtype\":\"")?;
        let rest = &self.text.as_bytes()[self.pos..];
        let len = rest.iter().take(16).position(|&b| b == b'"')?;
        let dtype = DType::from_safetensors_name(&rest[..len])?;
        self.pos += len;
        self.literal("\",\"shape\":[")?;
        if self.peek() != Some(b']') {
            loop {
                parts.push_dim(usize::try_from(self.digits()?).ok()?);
                if self.literal(",").is_none() {
                    break;
                }
            }
        }
        self.literal("],\"data_offsets\":[")?;
        let begin = self.digits()?;
        self.literal(",")?;
        let end = self.digits()?;
        self.literal("]}")?;
        parts.push(
            u32::try_from(name.start).ok()?..u32::try_from(name.end).ok()?,
            dtype,
            first_dim,
            begin,
            end,
        )
    }

    fn entry(&mut self, name: Range<usize>, parts: &mut Parts) -> Option<()> {
        let (mut dtype, mut offsets, mut shaped) = (None, None, false);
        let first_dim = parts.dims_len();
        self.expect(b'{')?;
        for field in 0..3 {
            if field > 0 {
                self.expect(b',')?;
            }
            let key = self.string()?;
            self.expect(b':')?;
            match &self.text[key] {
                "dtype" if dtype.is_none() => {
                    let value = self.string()?;
                    dtype = Some(DType::from_safetensors_name(self.text[value].as_bytes())?);
                }
                "shape" if !shaped => {
                    self.shape(parts)?;
                    shaped = true;
                }
                "data_offsets" if offsets.is_none() => offsets = Some(self.offsets()?),
                _ => return None,
            }
        }
        self.expect(b'}')?;
        let (begin, end) = offsets?;
        let name = u32::try_from(name.start).ok()?..u32::try_from(name.end).ok()?;
        parts.push(name, dtype?, first_dim, begin, end)
    }

    fn shape(&mut self, parts: &mut Parts) -> Option<()> {
        self.expect(b'[')?;
        if self.accept(b']') {
            return Some(());
        }
        loop {
            parts.push_dim(usize::try_from(self.number()?).ok()?);
            if !self.accept(b',') {
                return self.expect(b']');
            }
        }
    }

    fn offsets(&mut self) -> Option<(u64, u64)> {
        self.expect(b'[')?;
        let begin = self.number()?;
        self.expect(b',')?;
        let end = self.number()?;
        self.expect(b']')?;
        Some((begin, end))
    }

    /// Free-form strings are full of escapes, and rare: left to the JSON crate.
    fn metadata(&mut self) -> Option<Metadata> {
        let mut values =
            serde_json::Deserializer::from_str(&self.text[self.pos..]).into_iter::<MetadataMap>();
        let map = values.next()?.ok()?;
        self.pos += values.byte_offset();
        Some(map.0)
    }
}
