//! A file's text, read where it lies.

use super::Window;
use memmap2::{Mmap, MmapOptions};
use std::fs::File;
use std::io;
use std::str::Utf8Error;

/// Text in a mapped file: a long header is neither copied nor given memory.
pub(crate) struct FileText {
    // INVARIANT: UTF-8; the stable-file contract keeps it so.
    map: Mmap,
}

impl FileText {
    /// Maps the text in a part of a file, and reads it.
    ///
    /// # Errors
    /// What mmap(2) answers, or reading, where the part ends past the file; within, where it is not UTF-8.
    ///
    /// # Safety
    /// The stable-file contract (see [`crate::map`]) holds for `file`, which has the part.
    pub(crate) unsafe fn map(file: &File, part: Window) -> io::Result<Result<Self, Utf8Error>> {
        // SAFETY: the caller vouches for the file; that is memmap2's whole requirement.
        let map = unsafe { MmapOptions::new().offset(part.offset).len(part.len).map_copy_read_only(file) }?;
        #[cfg(target_os = "linux")]
        match map.advise(memmap2::Advice::PopulateRead) {
            // A kernel before 5.14: pages come when they are touched.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            // Here an I/O error is an error; at a touch it would be SIGBUS.
            done => done?,
        }
        Ok(std::str::from_utf8(&map).map(|_| ()).map(|()| Self { map }))
    }
}

impl AsRef<str> for FileText {
    fn as_ref(&self) -> &str {
        // SAFETY: checked when it was mapped (field invariant).
        unsafe { std::str::from_utf8_unchecked(&self.map) }
    }
}
