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
pub(crate) mod index;
mod json;
mod scan;
mod write;

pub(crate) use edit::{HeaderChanges, Pieces};
pub(crate) use write::{encode, encode_placed, finish, metadata_len, padded, texts};

use crate::error::{Error, Result};
use crate::format::{Read, foreign};
use crate::layout::{Format, Layout, Rules, Text};
use crate::source::Bytes;
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
        return Err(too_long(len, path, foreign::hint(prefix)));
    }
    let expected = PREFIX_LEN as u64 + len;
    if expected > file_len {
        return Err(Error::Truncated { path: path.into(), found: file_len, expected });
    }
    usize::try_from(len).map_err(|_| Error::Truncated { path: path.into(), found: file_len, expected })
}

/// Refuses a file that starts like one of a format that is not read.
///
/// # Errors
/// [`Error::Limit`] where that start is no length of a header, [`Error::Json`] where it may be one; both say what the
/// file probably is.
pub(crate) fn check_foreign(head: &[u8], path: &Path) -> Result<()> {
    let (Some(&start), Some(hint)) = (head.first_chunk::<PREFIX_LEN>(), foreign::hint(head)) else {
        return Ok(());
    };
    let found = u64::from_le_bytes(start);
    if found > MAX_HEADER_LEN {
        return Err(too_long(found, path, Some(hint)));
    }
    Err(Error::Json { path: path.into(), what: "the header", source: hint.into() })
}

fn too_long(found: u64, path: &Path, hint: Option<&'static str>) -> Error {
    Error::Limit { path: path.into(), what: "the header length", found, limit: MAX_HEADER_LEN, hint }
}

/// The reader of safetensors files.
pub(crate) struct Reader;

impl Read for Reader {
    fn format(&self) -> Format {
        Format::Safetensors
    }

    /// There is no signature: a length that may be a header's, and the header's first character.
    fn is_signed(&self, head: &[u8], _len: u64) -> bool {
        let Some((start, rest)) = head.split_first_chunk::<PREFIX_LEN>() else { return false };
        u64::from_le_bytes(*start) <= MAX_HEADER_LEN
            && matches!(rest.first(), Some(b'{' | b' ' | b'\n' | b'\t' | b'\r'))
    }

    fn layout(&self, bytes: &dyn Bytes) -> Result<Layout> {
        let (len, path, start) = (bytes.len(), bytes.path(), PREFIX_LEN as u64);
        let prefix = bytes.read(0..start.min(len))?;
        let header = start..start + header_len(&prefix, len, path)? as u64;
        parse_text(bytes.text(header)?, len, path)
    }
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
fn not_utf8(error: std::str::Utf8Error, path: &Path) -> Error {
    Error::Utf8 { path: path.into(), offset: (PREFIX_LEN + error.valid_up_to()) as u64 }
}

/// As [`parse`], of a header known to be UTF-8.
///
/// # Errors
/// As [`parse`].
fn parse_text(text: Text, file_len: u64, path: &Path) -> Result<Layout> {
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
#[cfg(test)]
fn parse_bytes(file: &[u8], path: &Path) -> Result<Layout> {
    let len = header_len(file, file.len() as u64, path)?;
    parse(file[PREFIX_LEN..PREFIX_LEN + len].to_vec(), file.len() as u64, path)
}

#[cfg(test)]
mod tests;
