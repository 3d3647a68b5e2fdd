//! Whether a file is still as it was when it was opened.

use crate::error::{Error, Result};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// How a file was: its length, and where that is to be compared, when it was last written.
///
/// Not when its inode last changed (ctime): a new name, mode or owner is no change of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    len: u64,
    /// Seconds and nanoseconds.
    written: Option<(i64, i64)>,
}

impl Stamp {
    /// `edited`: this process and others write to the file, so that only its length is to stay.
    pub(crate) fn of(file: &File, edited: bool) -> io::Result<Self> {
        Ok(Self::from(&file.metadata()?, edited))
    }

    fn from(metadata: &Metadata, edited: bool) -> Self {
        let written = (metadata.mtime(), metadata.mtime_nsec());
        Self { len: metadata.len(), written: (!edited).then_some(written) }
    }
}

/// A descriptor of a mapped file, kept to ask whether the file has changed.
#[derive(Debug)]
pub(crate) struct Guard {
    file: File,
    stamp: Stamp,
}

impl Guard {
    /// `stamp` was taken of `file` before anything was read from it.
    pub(crate) fn new(file: File, stamp: Stamp) -> Self {
        Self { file, stamp }
    }

    /// # Errors
    /// [`Error::Changed`] with what differs first, [`Error::Io`].
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let now = Stamp::of(&self.file, self.stamp.written.is_none());
        let now = now.map_err(Error::io(path, "asking whether it has changed"))?;
        if now == self.stamp {
            return Ok(());
        }
        let changed = |what, found, expected| Error::Changed { path: path.into(), what, found, expected };
        if now.len != self.stamp.len {
            return Err(changed("its length in bytes", now.len.to_string(), self.stamp.len.to_string()));
        }
        let text = |stamp: Stamp| stamp.written.map_or_else(String::new, |(s, n)| format!("{s}.{n:09}"));
        Err(changed("its time of writing (seconds since 1970)", text(now), text(self.stamp)))
    }

    /// Calls `read` to bring pages in between two checks, so that what is handed out then was read while the file
    /// was as it had been.
    ///
    /// # Errors
    /// As [`Guard::check`]; what `read` answers as [`Error::Io`].
    pub(crate) fn hand_out(&self, path: &Path, read: impl FnOnce() -> io::Result<()>) -> Result<()> {
        self.check(path)?;
        if let Err(error) = read() {
            // Where the file was cut off meanwhile, that is the reason.
            self.check(path)?;
            return Err(Error::io(path, "reading its pages in")(error));
        }
        self.check(path)
    }
}
