//! The safetensors format.
//!
//! ```text
//!  0        8                       8+n                                    file length
//!  ├────────┼────────────────────────┼───────────────────────────────────────┤
//!  │ n: u64 │ JSON header, n bytes   │ tensor data, no gaps                  │
//!  │ little │ {"name": {"dtype":…,   │ data_offsets are relative to 8+n      │
//!  │ endian │  "shape":…,            │                                       │
//!  │        │  "data_offsets":[b,e]}}│                                       │
//!  └────────┴────────────────────────┴───────────────────────────────────────┘
//! ```
//!
//! What is accepted is what the reference crate accepts (`safetensors` 0.8), with these exceptions, each
//! held by a test:
//!
//! - Stricter, as its specification is stricter than its code: a name that is there twice is refused
//!   (tensors, metadata keys); an entry must be a JSON object and its dtype a JSON string (serde also
//!   takes arrays and `{"F32":null}`).
//! - Stricter, for safety: a tensor's rank is at most [`MAX_RANK`](crate::layout::MAX_RANK).
//! - More lenient: a shape with a zero dimension is empty whatever stands before the zero. (The reference
//!   takes `[0, M, M]` and calls `[M, M, 0]` an overflow.)

mod edit;
mod json;
mod scan;
mod write;

pub(crate) use edit::{Changes, Pieces};
pub(crate) use write::{encode, encode_placed, finish, metadata_len, padded};

use crate::error::{Error, Result};
use crate::layout::{Layout, Rules, Text};
use std::path::Path;

/// Each byte of the data is one tensor's.
const RULES: Rules = Rules { gaps: false, overlaps: false, trailing: false };

/// Bytes of the header's length field.
pub(crate) const PREFIX_LEN: usize = 8;

/// The longest header accepted, as in the reference implementation.
pub(crate) const MAX_HEADER_LEN: u64 = 100_000_000;

/// Reads the length field and holds it against the limit and the file's length, before anything of that
/// size is allocated.
///
/// # Errors
/// [`Error::Truncated`], [`Error::Limit`].
pub(crate) fn header_len(prefix: &[u8], file_len: u64, path: &Path) -> Result<usize> {
    let Some(&bytes) = prefix.first_chunk::<PREFIX_LEN>() else {
        return Err(Error::Truncated { path: path.into(), found: file_len, expected: PREFIX_LEN as u64 });
    };
    let len = u64::from_le_bytes(bytes);
    if len > MAX_HEADER_LEN {
        return Err(Error::Limit {
            path: path.into(),
            what: "the header length",
            found: len,
            limit: MAX_HEADER_LEN,
            hint: hint(bytes),
        });
    }
    let expected = PREFIX_LEN as u64 + len;
    if expected > file_len {
        return Err(Error::Truncated { path: path.into(), found: file_len, expected });
    }
    usize::try_from(len).map_err(|_| Error::Truncated { path: path.into(), found: file_len, expected })
}

/// What a file that starts like this probably is.
fn hint(start: [u8; PREFIX_LEN]) -> Option<&'static str> {
    const SIGNS: [(&[u8], &str); 9] = [
        (b"version ", "this is a Git LFS pointer, not the weights: run `git lfs pull`"),
        (b"PK\x03\x04", "this is a zip archive, perhaps a PyTorch checkpoint; it is not loaded as one"),
        (b"\x80\x02", "this is a Python pickle; it is not loaded as one"),
        (b"\x80\x04", "this is a Python pickle; it is not loaded as one"),
        (b"\x80\x05", "this is a Python pickle; it is not loaded as one"),
        (b"GGUF", "this is a GGUF file"),
        (b"\x93NUMPY", "this is a numpy array file"),
        (b"{", "this is JSON, not weights; is it the index of a sharded model?"),
        (b"<", "this is HTML or XML: an error page saved in place of the weights?"),
    ];
    let sign = SIGNS.iter().find(|(sign, _)| start.starts_with(sign)).map(|&(_, hint)| hint);
    let text = start.iter().all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace());
    sign.or(text.then_some("this is text, not weights"))
}

/// Parses a header (the bytes behind the length field) of a file that is `file_len` bytes long.
///
/// # Errors
/// [`Error::Utf8`], [`Error::Json`], [`Error::DType`], and those of
/// [`Parts::finish`](crate::layout::Parts::finish).
pub(crate) fn parse(header: Vec<u8>, file_len: u64, path: &Path) -> Result<Layout> {
    let text = String::from_utf8(header).map_err(|error| not_utf8(error.utf8_error(), path))?;
    parse_text(Text::Owned(text), file_len, path)
}

/// The error of a header that is not UTF-8.
pub(crate) fn not_utf8(error: std::str::Utf8Error, path: &Path) -> Error {
    Error::Utf8 { path: path.into(), offset: (PREFIX_LEN + error.valid_up_to()) as u64 }
}

/// As [`parse`], of a header known to be UTF-8.
///
/// # Errors
/// As [`parse`].
pub(crate) fn parse_text(text: Text, file_len: u64, path: &Path) -> Result<Layout> {
    let data_start = (PREFIX_LEN + text.as_str().len()) as u64;
    let parts = match scan::scan(text.as_str()) {
        Some(mut parts) => {
            parts.set_text(text);
            parts
        }
        // Not the plain form that writers produce: unusual, or wrong. The JSON crate is the judge.
        None => json::read(text.as_str(), path)?,
    };
    parts.finish(RULES, path, data_start, Some(file_len))
}

/// Parses a whole file in memory.
///
/// # Errors
/// Those of [`header_len`] and [`parse`].
pub(crate) fn parse_bytes(file: &[u8], path: &Path) -> Result<Layout> {
    let file_len = file.len() as u64;
    let len = header_len(file, file_len, path)?;
    parse(file[PREFIX_LEN..PREFIX_LEN + len].to_vec(), file_len, path)
}

#[cfg(test)]
mod tests;
