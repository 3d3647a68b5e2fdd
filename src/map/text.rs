//! A file's text, read where it lies.

use super::Window;
use memmap2::{Mmap, MmapOptions};
use std::fs::File;
use std::io;
use std::str::Utf8Error;

/// A file whose bytes stay as they are for as long as it is mapped.
#[derive(Clone, Copy)]
pub(crate) struct StableFile<'f> {
    // INVARIANT: the stable-file contract (see `crate::map`) holds for it.
    file: &'f File,
    // INVARIANT: no more bytes than the file has.
    len: u64,
}

impl<'f> StableFile<'f> {
    /// # Safety
    /// The stable-file contract (see [`crate::map`]) holds for `file`, which has at least `len` bytes.
    pub(crate) unsafe fn new(file: &'f File, len: u64) -> Self {
        Self { file, len }
    }

    pub(crate) fn file(&self) -> &'f File {
        self.file
    }

    /// Maps the text in a part of the file, and reads it.
    ///
    /// # Errors
    /// What mmap(2) answers, or reading, where the part ends past the file; within, where it is not UTF-8.
    pub(crate) fn text(&self, part: Window) -> io::Result<Result<FileText, Utf8Error>> {
        if part.offset.checked_add(part.len as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut options = MmapOptions::new();
        options.offset(part.offset).len(part.len);
        // SAFETY: the contract is memmap2's whole requirement, and holds for the file (field invariant), which has the
        // part (checked above).
        let map = unsafe { options.map_copy_read_only(self.file) }?;
        #[cfg(target_os = "linux")]
        match map.advise(memmap2::Advice::PopulateRead) {
            // A kernel before 5.14: pages come when they are touched.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            // Here an I/O error is an error; at a touch it would be SIGBUS.
            done => done?,
        }
        Ok(std::str::from_utf8(&map).map(|_| ()).map(|()| FileText { map }))
    }
}

/// A file of a test's own, for tests in rooms without `unsafe`.
#[cfg(test)]
pub(crate) fn own_stable_file(file: &File) -> StableFile<'_> {
    let len = file.metadata().map_or(0, |metadata| metadata.len());
    // SAFETY: a file that a test has just made, and writes to no more.
    unsafe { StableFile::new(file, len) }
}

/// Text in a mapped file: a long header is neither copied nor given memory.
pub(crate) struct FileText {
    // INVARIANT: UTF-8; the stable-file contract keeps it so.
    map: Mmap,
}

impl AsRef<str> for FileText {
    fn as_ref(&self) -> &str {
        // SAFETY: checked when it was mapped (field invariant).
        unsafe { std::str::from_utf8_unchecked(&self.map) }
    }
}
