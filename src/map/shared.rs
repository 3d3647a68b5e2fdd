//! Memory that others may write: Python's arrays, other processes. Raw pointers only, never a `&[u8]`.

#[cfg(feature = "python")]
use super::Pages;
use super::memory::Identity;
use super::{Advice, Backing, Mapping, Memory, RawSlice, Residency, atomic};
use crate::error::{Error, Result};
#[cfg(feature = "python")]
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

#[cfg(feature = "python")]
/// 64 aligned bytes: what a SIMD register, a cache line and JAX ask for.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Keeps the bytes where they are. Nothing looks at them through it.
enum Owner {
    Mapping(Arc<Mapping>),
    #[cfg(feature = "python")]
    Heap {
        _lines: Vec<Line>,
    },
}

/// Bytes that others may be writing: other processes that map the file, or Python's arrays.
///
/// Reads and writes are copies, a machine word at a time by atomic operations (relaxed: neither orders the other,
/// nor anything else). No reference to the bytes is ever made. What is copied while others write is some mixture
/// of old and new words; a word of 8 bytes at a multiple of 8 is never torn.
///
/// Made by [`MapOptions::map_shared`](crate::MapOptions::map_shared), or as part of a
/// [`ModelShared`](crate::ModelShared).
pub struct SharedMemory {
    // INVARIANT: ptr is valid for len bytes as long as owner lives, and for writes unless read-only.
    ptr: *mut u8,
    len: usize,
    owner: Owner,
}

// SAFETY: the owner is Send, and the pointer goes with it.
unsafe impl Send for SharedMemory {}
// SAFETY: methods only copy bytes; Python's own rules cover who copies when, as for any buffer.
unsafe impl Sync for SharedMemory {}

impl Memory for SharedMemory {
    fn now(&self) -> RawSlice<'_> {
        self.source(&(0..self.len))
    }

    fn base(&self) -> Option<RawSlice<'_>> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.base(),
            #[cfg(feature = "python")]
            Owner::Heap { .. } => None,
        }
    }

    fn backing(&self) -> Backing {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.backing,
            #[cfg(feature = "python")]
            Owner::Heap { .. } => Backing::Owned,
        }
    }

    fn in_file(&self) -> Option<(Option<Identity>, Range<u64>)> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.in_file(),
            #[cfg(feature = "python")]
            Owner::Heap { .. } => None,
        }
    }

    fn in_page(&self) -> usize {
        self.ptr.addr() % rustix::param::page_size()
    }

    fn private(&self, part: Range<usize>) -> io::Result<Vec<Range<usize>>> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.private(part),
            #[cfg(feature = "python")]
            Owner::Heap { .. } => Ok(Vec::new()),
        }
    }
}

impl SharedMemory {
    /// The bytes of a mapping, of which no slice is made as long as this lives.
    pub(crate) fn of(mapping: Arc<Mapping>) -> Self {
        Self { ptr: mapping.ptr(), len: mapping.len, owner: Owner::Mapping(mapping) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the bytes at `at` to `to`.
    ///
    /// # Errors
    /// [`Error::Argument`] where they reach past the end.
    pub fn read_at(&self, at: usize, to: &mut [u8]) -> Result<()> {
        let part = self.part(at, to.len())?;
        // SAFETY: inside (checked), and mapped: so are the whole words around, since pages are made of them.
        unsafe { atomic::load(self.ptr(&part), to) };
        Ok(())
    }

    /// Copies `from` to the bytes at `at`. Everyone who maps the file, or reads it, sees them at once.
    ///
    /// # Errors
    /// As [`SharedMemory::read_at`]; [`Error::Argument`] for memory that is not written to.
    pub fn write_at(&self, at: usize, from: &[u8]) -> Result<()> {
        let part = self.part(at, from.len())?;
        if !matches!(&self.owner, Owner::Mapping(mapping) if mapping.backing == Backing::Shared) {
            return Err(Error::Argument("this memory is not written to".into()));
        }
        // SAFETY: as above; a shared mapping is writable.
        unsafe { atomic::store(self.ptr(&part), from) };
        Ok(())
    }

    /// Has the kernel write the pages that hold a part of the bytes to the disk, and waits for it: msync(2) with
    /// `MS_SYNC`. Other processes see what was written without it: it is for power losses.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside; what the disk answers. An error is reported once: the kernel holds the
    /// pages to be clean afterwards, and a second call would say that all is well.
    pub fn flush(&self, part: Range<usize>) -> io::Result<()> {
        self.mapping(&part)?.map_or(Ok(()), |(raw, start)| raw.flush_range(start, part.len()))
    }

    /// As [`SharedMemory::flush`], without waiting: msync(2) with `MS_ASYNC`. On Linux that does nothing; the
    /// kernel writes by itself, within about half a minute.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside.
    pub fn flush_async(&self, part: Range<usize>) -> io::Result<()> {
        self.mapping(&part)?.map_or(Ok(()), |(raw, start)| raw.flush_async_range(start, part.len()))
    }

    /// Which pages of a part of the bytes are in memory.
    ///
    /// # Errors
    /// As [`Mapping::residency`].
    pub fn residency(&self, part: Range<usize>) -> io::Result<Residency> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.residency(part),
            #[cfg(feature = "python")]
            Owner::Heap { .. } => Ok(Residency::default()),
        }
    }

    /// As [`Mapping::advise_range`].
    ///
    /// # Errors
    /// As there.
    pub fn advise_range(&self, advice: Advice, part: Range<usize>) -> io::Result<()> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.advise_range(advice, part),
            #[cfg(feature = "python")]
            Owner::Heap { .. } => Ok(()),
        }
    }

    /// As [`Mapping::populate_read`].
    pub(crate) fn populate_read(&self, part: Range<usize>) -> io::Result<()> {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.populate_read(part),
            #[cfg(feature = "python")]
            Owner::Heap { .. } => Ok(()),
        }
    }

    /// As [`SharedMemory::flush`] or [`SharedMemory::flush_async`], of the file at `path`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Changed`] where another file has that name by now: what is written does not reach it.
    pub(crate) fn flush_to(&self, path: &Path, part: Range<usize>, wait: bool) -> Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let flushed = if wait { self.flush(part) } else { self.flush_async(part) };
        flushed.map_err(Error::io(path, "writing to the disk"))?;
        let (Some((Some((device, inode)), _)), Ok(there)) = (self.in_file(), std::fs::metadata(path)) else {
            return Ok(());
        };
        if (there.dev(), there.ino()) == (device, inode) {
            return Ok(());
        }
        let (found, expected) = (there.ino().to_string(), inode.to_string());
        Err(Error::Changed { path: path.into(), what: "the inode of that name", found, expected })
    }

    fn part(&self, at: usize, len: usize) -> Result<Range<usize>> {
        let end = at.checked_add(len).filter(|&end| end <= self.len);
        end.map(|end| at..end).ok_or_else(|| Error::Argument(format!("bytes {at}.. are outside the memory")))
    }

    /// What a part's bytes are mapped by, and where in it they start; `None` on the heap, and of memory that is lent.
    fn mapping(&self, part: &Range<usize>) -> io::Result<Option<(&memmap2::MmapRaw, usize)>> {
        match &self.owner {
            Owner::Mapping(mapping) => {
                mapping.check(part)?;
                Ok(mapping.raw.map().map(|map| (map, mapping.start + part.start)))
            }
            #[cfg(feature = "python")]
            Owner::Heap { .. } => Ok(None),
        }
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
    pub(crate) fn source(&self, part: &Range<usize>) -> RawSlice<'_> {
        // SAFETY: the part lies inside (`ptr` asserts it) and stays readable while borrowed.
        unsafe { RawSlice::from_raw(self.ptr(part), part.len()) }
    }
}

impl std::fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedMemory").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(feature = "python")]
impl SharedMemory {
    /// On the heap, 64-byte aligned.
    pub(crate) fn zeroed(len: usize) -> Self {
        let mut lines = vec![Line([0; 64]); len.div_ceil(64)];
        Self { ptr: lines.as_mut_ptr().cast(), len, owner: Owner::Heap { _lines: lines } }
    }

    /// A copy on the heap: for what is misaligned where it lies.
    pub(crate) fn copy_of(source: RawSlice<'_>) -> Self {
        let memory = Self::zeroed(source.len());
        memory.write(&(0..source.len()), source);
        memory
    }

    /// Whether the bytes are a file's pages.
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(&self.owner, Owner::Mapping(mapping) if !matches!(mapping.backing, Backing::Owned | Backing::Lent))
    }

    /// Where in its file the first byte lies.
    pub(crate) fn file_offset(&self) -> u64 {
        match &self.owner {
            Owner::Mapping(mapping) => mapping.offset,
            Owner::Heap { .. } => 0,
        }
    }

    /// Whether what is written reaches a file that others may have.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(&self.owner, Owner::Mapping(mapping) if mapping.backing == Backing::Shared)
    }

    pub(crate) fn is_read_only(&self) -> bool {
        matches!(&self.owner, Owner::Mapping(mapping) if matches!(mapping.backing, Backing::ReadOnly | Backing::Lent))
    }

    /// Makes the pages that hold a part writable, in memory of a file that is not shared: what is written to them
    /// becomes this process's own. So it may be done for read-only memory as well, where it goes to a library that
    /// would write to it all the same.
    ///
    /// # Errors
    /// `ENOMEM` where the kernel does not promise the memory: see [`super::not_writable`].
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn make_writable(&self, part: &Range<usize>) -> io::Result<()> {
        self.ptr(part);
        match &self.owner {
            Owner::Mapping(mapping) => mapping.make_writable(part),
            Owner::Heap { .. } => Ok(()),
        }
    }

    /// Copies into a part that may be written; not for read-only memory.
    ///
    /// # Panics
    /// If the part lies outside, is of another length, or the memory is read-only: a fault of this crate.
    pub(crate) fn write(&self, part: &Range<usize>, from: RawSlice<'_>) {
        assert!(!self.is_read_only() && part.len() == from.len());
        // SAFETY: the part lies inside (`ptr` asserts it) and is writable, as the caller saw to; no Rust reference to it
        // exists.
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
    ///
    /// A child that is forked from now on has the bytes too, as it has all of this process's memory.
    ///
    /// # Errors
    /// What mmap(2) answers: there is no memory for that many pages of this process's own, where the system promises no
    /// more than there is (`vm.overcommit_memory=2`). The memory is as it was then: that is tried elsewhere first. Where
    /// the second time fails all the same, on a kernel that has taken the old pages away by then, nobody may touch
    /// it any more (`SIGSEGV`); what another thread maps in that very instant might come to lie there.
    pub(crate) fn detach(&self, file: &File) -> io::Result<()> {
        use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
        let Owner::Mapping(mapping) = &self.owner else { return Ok(()) };
        if mapping.backing != Backing::Output {
            return Ok(());
        }
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let (ptr, len) = (mapping.raw.as_mut_ptr(), mapping.raw.len());
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
        let elsewhere = unsafe { mmap(std::ptr::null_mut(), len, prot, flags, file, 0) }?;
        // SAFETY: mapped just above, and nobody knows of it.
        unsafe { munmap(elsewhere, len) }?;
        mapping.raw.detached(|| {
            // SAFETY: replaces exactly the pages that `raw` owns and will unmap, by the same pages of the same
            // file; mmap(2) does so atomically, so an access from another thread sees one or the other, and
            // the bytes are equal.
            match unsafe { mmap(ptr.cast(), len, prot, flags | MapFlags::FIXED, file, 0) } {
                Ok(_) => Ok(()),
                Err(error) => {
                    crate::os::fork::close_gap(ptr.addr()..ptr.addr() + len);
                    Err(error.into())
                }
            }
        })
    }
}
