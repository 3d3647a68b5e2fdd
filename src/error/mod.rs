//! The one error type.

mod kind;
mod text;

pub use kind::ErrorKind;
pub(crate) use text::{printable, quote};

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use text::{and_others, at, of, of_file, shape_text};

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with what is needed to act on it.
///
/// `path` is the file concerned; it is empty where bytes came from memory. Names and other text from a
/// file are escaped when printed, so an error message cannot drive a terminal.
///
/// Kinds and fields may be added: a pattern ends in `..`, and a `match` has an arm for the rest. [`Error::kind`] is
/// what to match on where the fields do not matter.
///
/// ```
/// use maptensors::{Content, Error, ErrorKind, Model};
///
/// let error = Model::read(Content::new(b"\x3c\0\0\0\0\0\0\0")).unwrap_err();
/// assert!(matches!(error, Error::Truncated { found: 8, expected: 68, .. }));
/// assert_eq!(error.kind(), ErrorKind::Truncated);
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}{action}: {source}", at(path))]
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
    Utf8 {
        /// The file concerned.
        path: PathBuf,
        /// Where the first bad byte is, in bytes from the start of the file.
        offset: u64,
    },

    /// The header or index is not the JSON it should be.
    #[error("{}{what} is not valid: {source}", at(path))]
    #[non_exhaustive]
    Json {
        /// The file concerned.
        path: PathBuf,
        /// Which text.
        what: &'static str,
        /// Line, column and reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// A name is there twice.
    #[error("{}{what} {} is there twice", at(path), quote(name))]
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
    Value {
        /// The tensor concerned.
        tensor: String,
        /// What was found.
        what: String,
    },

    /// A shard that an index names is not in the index's directory, or below it.
    #[error("{}the index names {} as a shard: {reason}", at(path), quote(name))]
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
    Busy {
        /// What is had.
        path: PathBuf,
        /// By whom.
        what: String,
    },

    /// A publication is not there yet, is gone, or is damaged.
    #[error("{}{what}", at(path))]
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
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
    #[non_exhaustive]
    Moved {
        /// The directory, by the path that it was opened by.
        path: PathBuf,
        /// What has become of it, what that means, and what to do.
        what: String,
    },

    /// What was saved is in place and visible; but something that was to go is still there.
    #[error("{}saved and visible, but {} could not be removed: {source}", at(path), printable(&left.to_string_lossy()))]
    #[non_exhaustive]
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
    #[non_exhaustive]
    NotDurable {
        /// The file saved.
        path: PathBuf,
        /// Why the directory could not be synced.
        source: io::Error,
    },
}

impl Error {
    /// What kind of error it is, without what is needed to act on it.
    ///
    /// ```
    /// use maptensors::{ErrorKind, Model};
    ///
    /// let error = Model::read("models/digits-2.safetensors").unwrap_err();
    /// match error.kind() {
    ///     ErrorKind::Io | ErrorKind::NotRegular => println!("not there: {error}"),
    ///     kind => panic!("{kind}: {error}"),
    /// }
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Io,
            Self::NotRegular { .. } => ErrorKind::NotRegular,
            Self::Truncated { .. } => ErrorKind::Truncated,
            Self::Limit { .. } => ErrorKind::Limit,
            Self::Utf8 { .. } => ErrorKind::Utf8,
            Self::Json { .. } => ErrorKind::Json,
            Self::Duplicate { .. } => ErrorKind::Duplicate,
            Self::DType { .. } => ErrorKind::DType,
            Self::Overflow { .. } => ErrorKind::Overflow,
            Self::Layout { .. } => ErrorKind::Layout,
            Self::Shape { .. } => ErrorKind::Shape,
            Self::Align { .. } => ErrorKind::Align,
            Self::Value { .. } => ErrorKind::Value,
            Self::Path { .. } => ErrorKind::Path,
            Self::Missing { .. } => ErrorKind::Missing,
            Self::Argument { .. } => ErrorKind::Argument,
            Self::Busy { .. } => ErrorKind::Busy,
            Self::Publication { .. } => ErrorKind::Publication,
            Self::Checksum { .. } => ErrorKind::Checksum,
            Self::Base { .. } => ErrorKind::Base,
            Self::Delta { .. } => ErrorKind::Delta,
            Self::Changed { .. } => ErrorKind::Changed,
            Self::Moved { .. } => ErrorKind::Moved,
            Self::NotRemoved { .. } => ErrorKind::NotRemoved,
            Self::NotDurable { .. } => ErrorKind::NotDurable,
        }
    }

    /// Whether it is that of work that was canceled.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_found_expected_and_the_likely_cause() {
        let error = Error::Truncated { path: "m.safetensors".into(), found: 10, expected: 30 };
        assert_eq!(
            error.to_string(),
            "m.safetensors: the file has 10 bytes, but 30 are declared: 20 are missing (an interrupted download?)"
        );
    }
}
