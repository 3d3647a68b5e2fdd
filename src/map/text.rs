//! A file's text, read where it lies.

use memmap2::{Mmap, MmapOptions};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::str::Utf8Error;

/// Text in a mapped file: a long header is neither copied nor given memory.
pub(crate) struct FileText {
    // INVARIANT: `range` lies inside `map`, and is UTF-8; the stable-file contract keeps it so.
    map: Mmap,
    range: Range<usize>,
}

impl FileText {
    /// Maps the text at `range` of a file, and reads it.
    ///
    /// # Errors
    /// What mmap(2) answers, or reading, where the range ends past the file; within, where it is not UTF-8.
    ///
    /// # Safety
    /// The stable-file contract (see [`crate::map`]) holds for `file`, which has the range.
    pub(crate) unsafe fn map(file: &File, range: Range<usize>) -> io::Result<Result<Self, Utf8Error>> {
        // SAFETY: the caller vouches for the file; that is memmap2's whole requirement.
        let map = unsafe { MmapOptions::new().len(range.end).map_copy_read_only(file) }?;
        #[cfg(target_os = "linux")]
        match map.advise(memmap2::Advice::PopulateRead) {
            // A kernel before 5.14: pages come when they are touched.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            // Here an I/O error is an error; at a touch it would be SIGBUS.
            done => done?,
        }
        Ok(std::str::from_utf8(&map[range.clone()]).map(|_| ()).map(|()| Self { map, range }))
    }
}

impl AsRef<str> for FileText {
    fn as_ref(&self) -> &str {
        // SAFETY: checked when it was mapped (field invariant).
        unsafe { std::str::from_utf8_unchecked(&self.map[self.range.clone()]) }
    }
}
