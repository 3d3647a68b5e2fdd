//! The one error type.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with what is needed to act on it.
///
/// `path` is the file concerned; it is empty where bytes came from memory. Names and other text from a
/// file are escaped when printed, so an error message cannot drive a terminal.
///
/// ```
/// use maptensors::{Error, Model};
///
/// let error = Model::from_bytes(b"\x3c\0\0\0\0\0\0\0").unwrap_err();
/// assert!(matches!(error, Error::Truncated { found: 8, expected: 68, .. }));
/// assert_eq!(error.kind(), "Truncated");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}{action}: {source}", at(path))]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What was being done; where there was no room for it, also how much it takes and what to do.
        action: Cow<'static, str>,
        /// The refusal, whole.
        source: io::Error,
    },

    /// The path is a directory, FIFO, device or socket.
    #[error("{}not a regular file but {found}", at(path))]
    NotRegular {
        /// The path concerned.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },

    /// The file ends before what its header declares.
    #[error(
        "{}the file has {found} bytes, but {expected} are declared: {} are missing (an interrupted download?)",
        at(path), expected.saturating_sub(*found)
    )]
    Truncated {
        /// The file concerned.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },

    /// A number is larger than any sound file has, or than this process may have.
    #[error("{}{what} is {found}, more than the limit of {limit}{}", at(path), hint.map(|h| format!(" ({h})")).unwrap_or_default())]
    Limit {
        /// The file concerned.
        path: PathBuf,
        /// What the number counts.
        what: &'static str,
        /// The number.
        found: u64,
        /// The largest accepted.
        limit: u64,
        /// What the file probably is instead, or what to do.
        hint: Option<&'static str>,
    },

    /// The header is not UTF-8.
    #[error("{}the header is not UTF-8 at file offset {offset}", at(path))]
    Utf8 {
        /// The file concerned.
        path: PathBuf,
        /// Where the first bad byte is, in bytes from the start of the file.
        offset: u64,
    },

    /// The header or index is not the JSON it should be.
    #[error("{}{what} is not valid: {source}", at(path))]
    Json {
        /// The file concerned.
        path: PathBuf,
        /// Which text.
        what: &'static str,
        /// Line, column and reason.
        source: serde_json::Error,
    },

    /// A name is there twice.
    #[error("{}{what} {} is there twice", at(path), quote(name))]
    Duplicate {
        /// The file concerned.
        path: PathBuf,
        /// What is there twice.
        what: &'static str,
        /// Its name.
        name: String,
    },

    /// A dtype is unknown, or not the one asked for.
    #[error("{}tensor {} is {}, expected {expected}", at(path), quote(tensor), printable(found))]
    DType {
        /// The file concerned; empty where a view was asked for a type it does not have.
        path: PathBuf,
        /// The tensor concerned.
        tensor: String,
        /// The dtype there is.
        found: String,
        /// The dtype there should be.
        expected: String,
    },

    /// A shape describes more bytes than can be counted.
    #[error("{}tensor {} has shape {}: its size overflows", at(path), quote(tensor), shape_text(shape))]
    Overflow {
        /// The file concerned.
        path: PathBuf,
        /// The tensor concerned.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },

    /// Tensor data overlaps, leaves a hole, runs backwards, or does not fill the file.
    #[error("{}{what} at data offset {found}, expected {expected}{}", at(path), of(tensor))]
    Layout {
        /// The file concerned.
        path: PathBuf,
        /// The tensor concerned; empty where it is the end of the file.
        tensor: String,
        /// What is misplaced.
        what: &'static str,
        /// Offset found, in bytes from the start of the data.
        found: u64,
        /// Offset expected.
        expected: u64,
    },

    /// A byte range does not have the length that shape and dtype ask for.
    #[error(
        "tensor {} takes {expected} bytes by shape and dtype, found {found}{}",
        quote(tensor),
        of_file(path)
    )]
    Shape {
        /// The file concerned.
        path: PathBuf,
        /// The tensor concerned.
        tensor: String,
        /// Bytes found.
        found: u64,
        /// Bytes expected.
        expected: u64,
    },

    /// An address, or a sub-byte boundary, is not where a typed view needs it.
    #[error("tensor {} {what}{}", quote(tensor), of_file(path))]
    Align {
        /// The file concerned.
        path: PathBuf,
        /// The tensor concerned.
        tensor: String,
        /// What is misaligned, found and expected.
        what: String,
    },

    /// A bit pattern that is no value of the type: a `bool` that is neither 0 nor 1.
    #[error("tensor {}: {what}", quote(tensor))]
    Value {
        /// The tensor concerned.
        tensor: String,
        /// What was found.
        what: String,
    },

    /// A shard that an index names is not in the index's directory, or below it.
    #[error("{}the index names {} as a shard: {reason}", at(path), quote(name))]
    Path {
        /// The index.
        path: PathBuf,
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// There is no such tensor.
    #[error("{}there is no tensor {}{hint}", at(path), quote(name))]
    Missing {
        /// The file searched.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// The likely cause, or near names.
        hint: String,
    },

    /// An argument cannot be used.
    #[error("{0}")]
    Argument(String),

    /// Somebody else has it, and only one can.
    #[error("{}{what}", at(path))]
    Busy {
        /// What is had.
        path: PathBuf,
        /// By whom.
        what: String,
    },

    /// A publication is not there yet, is gone, or is damaged.
    #[error("{}{what}", at(path))]
    Publication {
        /// The publication's directory.
        path: PathBuf,
        /// What was found, and what to do.
        what: String,
    },

    /// Content is not what its checksum says.
    #[error(
        "{}tensor {} is damaged: its checksum is {found}, expected {expected}{}",
        at(path),
        quote(tensor),
        and_others(others)
    )]
    Checksum {
        /// The file concerned.
        path: PathBuf,
        /// The first tensor that differs.
        tensor: String,
        /// The checksum its bytes have.
        found: String,
        /// The checksum the file states.
        expected: String,
        /// The other tensors that differ.
        others: Vec<String>,
    },

    /// A delta is applied to a model that it was not made against.
    #[error(
        "{}the delta was made against content {expected}, but is applied to {found}{}",
        at(path),
        of_file(base)
    )]
    Base {
        /// The delta.
        path: PathBuf,
        /// What it was to be applied to.
        base: PathBuf,
        /// The identity of that.
        found: String,
        /// The identity that the delta states.
        expected: String,
    },

    /// A file is no delta, or one that contradicts itself.
    #[error("{}not a valid delta: {what}{}", at(path), of(tensor))]
    Delta {
        /// The file concerned.
        path: PathBuf,
        /// The tensor concerned; empty where it is the whole.
        tensor: String,
        /// What is wrong.
        what: String,
    },

    /// A file is not as it was when it was opened under a guard.
    #[error("{}the file has changed since it was opened: {what} is {found}, and was {expected}", at(path))]
    Changed {
        /// The file concerned.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// As it is now.
        found: String,
        /// As it was.
        expected: String,
    },

    /// A directory is not where it was opened any more: it was moved or removed, or a link on the way to it points
    /// elsewhere.
    #[error("{}{what}", at(path))]
    Moved {
        /// The directory, by the path that it was opened by.
        path: PathBuf,
        /// What has become of it, what that means, and what to do.
        what: String,
    },

    /// What was saved is in place and visible; but something that was to go is still there.
    #[error("{}saved and visible, but {} could not be removed: {source}", at(path), printable(&left.to_string_lossy()))]
    NotRemoved {
        /// What was saved.
        path: PathBuf,
        /// What is still there.
        left: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The new file is in place and visible, but the directory could not be synced:
    /// after a power loss the old file may be back.
    #[error("{}saved and visible, but perhaps not durable: syncing its directory failed: {source}", at(path))]
    NotDurable {
        /// The file saved.
        path: PathBuf,
        /// Why the directory could not be synced.
        source: io::Error,
    },
}

impl Error {
    /// The variant's name, as in `docs` and as Python's exception classes are called.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Io { .. } => "Io",
            Self::NotRegular { .. } => "NotRegular",
            Self::Truncated { .. } => "Truncated",
            Self::Limit { .. } => "Limit",
            Self::Utf8 { .. } => "Utf8",
            Self::Json { .. } => "Json",
            Self::Duplicate { .. } => "Duplicate",
            Self::DType { .. } => "DType",
            Self::Overflow { .. } => "Overflow",
            Self::Layout { .. } => "Layout",
            Self::Shape { .. } => "Shape",
            Self::Align { .. } => "Align",
            Self::Value { .. } => "Value",
            Self::Path { .. } => "Path",
            Self::Missing { .. } => "Missing",
            Self::Argument(_) => "Argument",
            Self::Busy { .. } => "Busy",
            Self::Publication { .. } => "Publication",
            Self::Checksum { .. } => "Checksum",
            Self::Base { .. } => "Base",
            Self::Delta { .. } => "Delta",
            Self::Changed { .. } => "Changed",
            Self::Moved { .. } => "Moved",
            Self::NotRemoved { .. } => "NotRemoved",
            Self::NotDurable { .. } => "NotDurable",
        }
    }

    /// Whether it is that of work that was called off.
    pub(crate) fn is_canceled(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.raw_os_error() == Some(libc::ECANCELED))
    }

    /// Whether it is that a file is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// For `map_err`: an [`Error::Io`] that says what was being done to which file.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), action: action.into(), source }
    }
}

/// Text from a file or a user, made safe to print: quoted, control characters escaped, cut when long.
pub(crate) fn quote(text: &str) -> String {
    format!("\"{}\"", printable(text))
}

/// As [`quote`], without the quotes.
pub(crate) fn printable(text: &str) -> String {
    const LONGEST: usize = 200;
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == LONGEST {
            let _ = write!(out, "… ({} characters)", text.chars().count());
            break;
        }
        // Bidirectional controls reorder what surrounds them; the rest drive a terminal.
        let reorders =
            matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || reorders {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

fn at(path: &Path) -> String {
    if path.as_os_str().is_empty() {
        String::new()
    } else {
        format!("{}: ", printable(&path.to_string_lossy()))
    }
}

fn of_file(path: &Path) -> String {
    if path.as_os_str().is_empty() {
        String::new()
    } else {
        format!(" in {}", printable(&path.to_string_lossy()))
    }
}

fn of(tensor: &str) -> String {
    if tensor.is_empty() { String::new() } else { format!(" (tensor {})", quote(tensor)) }
}

fn and_others(names: &[String]) -> String {
    const MOST: usize = 5;
    let listed: Vec<String> = names.iter().take(MOST).map(|name| quote(name)).collect();
    match names.len() {
        0 => String::new(),
        n if n > MOST => format!("; so are {} and {} more", listed.join(", "), n - MOST),
        _ => format!("; so are {}", listed.join(", ")),
    }
}

fn shape_text(shape: &[usize]) -> String {
    if shape.len() <= 8 {
        format!("{shape:?}")
    } else {
        format!("{:?}… of rank {}", &shape[..8], shape.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_a_file_cannot_drive_a_terminal() {
        assert_eq!(quote("a\u{1b}[31m\0é"), "\"a\\u{1b}[31m\\u{0}é\"");
        assert_eq!(printable("\u{202e}x"), "\\u{202e}x");
        let long = quote(&"x".repeat(1_000_000));
        assert!(long.len() < 300 && long.contains("1000000 characters"), "{long}");
    }

    #[test]
    fn a_message_says_found_expected_and_the_likely_cause() {
        let error = Error::Truncated { path: "m.safetensors".into(), found: 10, expected: 30 };
        assert_eq!(
            error.to_string(),
            "m.safetensors: the file has 10 bytes, but 30 are declared: 20 are missing (an interrupted download?)"
        );
    }
}
