//! Memory that Python holds as well: raw pointers only, never a `&[u8]`.

use super::{Backing, Mapping, Source};
use std::fs::File;
use std::io;
use std::ops::Range;

/// A mapping whose bytes are reachable, and perhaps being written, from outside Rust.
///
/// Reads are copies; no reference to the bytes is ever made.
pub(crate) struct SharedMapping(Mapping);

impl From<Mapping> for SharedMapping {
    fn from(mapping: Mapping) -> Self {
        Self(mapping)
    }
}

impl SharedMapping {
    pub(crate) fn backing(&self) -> Backing {
        self.0.backing
    }

    /// The address of a part, which stays mapped as long as this value.
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn ptr(&self, part: &Range<usize>) -> *mut u8 {
        assert!(part.start <= part.end && part.end <= self.0.len);
        self.0.ptr().wrapping_add(part.start)
    }

    /// A part, to copy from.
    pub(crate) fn source(&self, part: &Range<usize>) -> Source<'_> {
        // SAFETY: the part lies inside (`ptr` asserts it) and stays mapped and readable while borrowed.
        unsafe { Source::from_raw(self.ptr(part), part.len()) }
    }

    pub(crate) fn residency(&self, part: Range<usize>) -> io::Result<super::Residency> {
        self.0.residency(part)
    }

    /// Copies into a part; for a mapping that is not read-only.
    ///
    /// # Panics
    /// If the part lies outside, is of another length, or the mapping is read-only: a fault of this crate.
    pub(crate) fn write(&self, part: &Range<usize>, from: Source<'_>) {
        assert!(self.0.backing != Backing::ReadOnly && part.len() == from.len());
        // SAFETY: the part lies inside (`ptr` asserts it), is writable, and no other reference to it
        // exists in Rust: this type makes none, and this one ends with the statement.
        let to = unsafe { std::slice::from_raw_parts_mut(self.ptr(part), part.len()) };
        from.copy_to(0..to.len(), to);
    }

    /// Cuts an output off from its file, in place: the same bytes at the same address, from now on
    /// copy-on-write. What is written later through arrays still held stays in this process.
    pub(crate) fn detach(&self, file: &File) -> io::Result<()> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let ptr = self.0.raw.as_mut_ptr().cast();
        // SAFETY: replaces exactly the pages that `raw` owns and will unmap, by the same pages of the same
        // file; mmap(2) does so atomically, so an access from another thread sees one or the other, and
        // the bytes are equal.
        unsafe { mmap(ptr, self.0.raw.len(), prot, flags, file, 0) }?;
        Ok(())
    }
}
