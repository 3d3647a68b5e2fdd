//! Memory that Python holds as well: raw pointers only, never a `&[u8]`.

use super::{Backing, Mapping, Memory, Pages, Source};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// 64 aligned bytes: what a SIMD register, a cache line and JAX ask for.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Keeps the bytes where they are. Nothing looks at them through it.
enum Owner {
    Mapping(Arc<Mapping>),
    Heap { _lines: Vec<Line> },
}

/// Bytes that are reachable, and perhaps being written, from outside Rust.
///
/// Reads and writes are copies; no reference to the bytes is ever kept.
pub(crate) struct SharedMemory {
    // INVARIANT: ptr is valid for len bytes as long as owner lives, and for writes unless read-only.
    ptr: *mut u8,
    len: usize,
    owner: Owner,
}

// SAFETY: the owner is Send, and the pointer goes with it.
unsafe impl Send for SharedMemory {}
// SAFETY: methods only copy bytes; Python's own rules cover who copies when, as for any buffer.
unsafe impl Sync for SharedMemory {}

impl From<Arc<Mapping>> for SharedMemory {
    fn from(mapping: Arc<Mapping>) -> Self {
        Self { ptr: mapping.ptr(), len: mapping.len, owner: Owner::Mapping(mapping) }
    }
}

impl Memory for SharedMemory {
    fn now(&self) -> Source<'_> {
        self.source(&(0..self.len))
    }

    fn base(&self) -> Option<Source<'_>> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.base(),
            Owner::Heap { .. } => None,
        }
    }

    fn backing(&self) -> Backing {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.backing,
            Owner::Heap { .. } => Backing::Owned,
        }
    }

    fn private(&self, part: Range<usize>) -> io::Result<Vec<Range<usize>>> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.private(part),
            Owner::Heap { .. } => Ok(Vec::new()),
        }
    }
}

impl SharedMemory {
    /// A copy on the heap, 64-byte aligned: for what is misaligned where it lies.
    pub(crate) fn copy_of(source: Source<'_>) -> Self {
        let mut lines = vec![Line([0; 64]); source.len().div_ceil(64)];
        let memory =
            Self { ptr: lines.as_mut_ptr().cast(), len: source.len(), owner: Owner::Heap { _lines: lines } };
        memory.write(&(0..source.len()), source);
        memory
    }

    /// Whether the bytes are a file's pages.
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(&self.owner, Owner::Mapping(mapping) if mapping.backing != Backing::Owned)
    }

    pub(crate) fn is_read_only(&self) -> bool {
        matches!(&self.owner, Owner::Mapping(mapping) if mapping.backing == Backing::ReadOnly)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of a part, which stays valid as long as this value.
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn ptr(&self, part: &Range<usize>) -> *mut u8 {
        assert!(part.start <= part.end && part.end <= self.len);
        self.ptr.wrapping_add(part.start)
    }

    /// A part, to copy from.
    pub(crate) fn source(&self, part: &Range<usize>) -> Source<'_> {
        // SAFETY: the part lies inside (`ptr` asserts it) and stays readable while borrowed.
        unsafe { Source::from_raw(self.ptr(part), part.len()) }
    }

    /// Copies into a part; not for read-only memory.
    ///
    /// # Panics
    /// If the part lies outside, is of another length, or the memory is read-only: a fault of this crate.
    pub(crate) fn write(&self, part: &Range<usize>, from: Source<'_>) {
        assert!(!self.is_read_only() && part.len() == from.len());
        // SAFETY: the part lies inside (`ptr` asserts it) and is writable; no Rust reference to it exists.
        unsafe { from.copy_to_raw(self.ptr(part)) };
    }

    /// As [`Mapping::pages`]; none for a copy on the heap.
    pub(crate) fn pages(&self, path: &Path) -> Option<Pages> {
        match &self.owner {
            Owner::Mapping(mapping) => Some(mapping.pages(path)),
            Owner::Heap { .. } => None,
        }
    }

    /// As [`Mapping::promote`].
    ///
    /// # Safety
    /// Nobody writes to the pages of `part` meanwhile: a write could be lost. (It would be to these bytes
    /// only; Python's documentation says so, and memory stays sound.)
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) unsafe fn promote(&self, part: &Range<usize>) -> io::Result<()> {
        self.ptr(part);
        match &self.owner {
            // SAFETY: inside (asserted by `ptr`), and the caller's promise.
            Owner::Mapping(mapping) => unsafe { mapping.promote_shared(part.clone()) },
            Owner::Heap { .. } => Ok(()),
        }
    }

    /// As [`Mapping::whole_pages`].
    pub(crate) fn whole_pages(&self, part: &Range<usize>) -> Range<usize> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.whole_pages(part),
            Owner::Heap { .. } => part.start..part.start,
        }
    }

    /// Cuts an output off from its file, in place: the same bytes at the same address, from now on
    /// copy-on-write. What is written later through arrays still held stays in this process.
    pub(crate) fn detach(&self, file: &File) -> io::Result<()> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let Owner::Mapping(mapping) = &self.owner else { return Ok(()) };
        if mapping.backing != Backing::Output {
            return Ok(());
        }
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let ptr = mapping.raw.as_mut_ptr().cast();
        // SAFETY: replaces exactly the pages that `raw` owns and will unmap, by the same pages of the same
        // file; mmap(2) does so atomically, so an access from another thread sees one or the other, and
        // the bytes are equal.
        unsafe { mmap(ptr, mapping.raw.len(), prot, flags, file, 0) }?;
        Ok(())
    }
}
