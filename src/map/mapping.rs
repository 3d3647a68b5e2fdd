//! A range of memory backed by a file, or owned in the same shape.

use super::Window;
use super::mlock::{self, Moving};
use super::options::{MapOptions, aligning};
#[cfg(target_os = "linux")]
use super::promote;
use super::raw::Raw;
use super::writable::Writable;
use super::{Advice, CHUNK, Residency, residency};
use crate::error::{Error, Result};
use crate::os::ExclusiveFile;
use crate::work::each_in_parallel;
use memmap2::MmapOptions;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

/// What a [`Mapping`] is backed by, and what writing to it does.
///
/// ```
/// use maptensors::{Backing, Model};
///
/// let model = Model::read("models/digits.safetensors")?;
/// assert_eq!(model.mapping(0).unwrap().backing(), Backing::Owned);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Backing {
    /// A file, `MAP_PRIVATE` and `PROT_READ`.
    ReadOnly,
    /// A file, `MAP_PRIVATE`: a page written becomes this process's own; the file never changes. Pages can be written
    /// from when a part is asked for to write.
    CopyOnWrite,
    /// A file that this process is writing, `MAP_SHARED`.
    Output,
    /// A file, `MAP_SHARED`, that others may have as well: what is written reaches it. Reached through
    /// [`SharedMemory`](crate::SharedMemory) only, never as a slice.
    Shared,
    /// Memory of this process, page aligned.
    Owned,
    /// Memory of the caller's, lent to be read: see [`Model::over`](crate::Model::over).
    Lent,
}

/// A range of memory backed by a file, or owned in the same shape.
///
/// A mapping of a file is made by [`Model::open`](crate::Model::open) and its kin, under
/// the stable-file contract stated there, or by hand with [`MapOptions`].
///
/// ```
/// use maptensors::Model;
///
/// let model = Model::read("models/digits.safetensors")?;
/// let mapping = model.mapping(0).unwrap();
/// assert_eq!(mapping.len() as u64, std::fs::metadata("models/digits.safetensors").unwrap().len());
/// assert!(mapping.as_bytes()[8..].starts_with(b"{"));
/// # Ok::<(), maptensors::Error>(())
/// ```
pub struct Mapping {
    // INVARIANT: start + len <= raw.len(); both set only in the constructors below.
    // INVARIANT: readable; writable where `writable` is None, and otherwise the pages that it lists. Exclusively
    // reachable through this value, other processes and descriptors excluded by the stable-file contract. Where backing
    // is Shared, others may write: such a mapping lives inside a SharedMemory, which gives no slices.
    // Counted: what only advises the kernel about these pages may outlive this value, and keeps them mapped.
    pub(super) raw: Arc<Raw>,
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) backing: Backing,
    /// Of a private mapping of a file: which pages may be written. `None` where all may.
    pub(super) writable: Option<Arc<Writable>>,
    /// Under a copy-on-write mapping: the same file, as it is, to compare with. Costs addresses only.
    pub(super) base: Option<Box<Mapping>>,
    /// Of the file: device and inode. Nobody else gets them while it is mapped.
    pub(super) identity: Option<(u64, u64)>,
    /// Whether the kernel tells which of the file's pages are in memory.
    pub(super) told: bool,
    /// Where in the file the first byte lies.
    pub(super) offset: u64,
    /// Whether copies of its pages may be huge.
    pub(super) huge_pages: bool,
    /// Whether all of it was locked when it was made.
    pub(super) locked_whole: bool,
    pub(super) moving: Arc<Moving>,
}

impl Mapping {
    /// Maps the first `len` bytes of `file`, copy-on-write. Reserves no swap, so that a model larger
    /// than memory maps and pays only for pages it writes.
    ///
    /// # Safety
    /// The stable-file contract (see the module) holds for `file`, and it has at least `len` bytes.
    #[cfg(test)]
    pub(crate) unsafe fn open_copy_on_write(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: the caller's promise is passed on.
        unsafe { MapOptions::new().map_window(file, Window { offset: 0, len }, Backing::CopyOnWrite) }
    }

    /// Whether this is a copy-on-write mapping of `file`.
    pub(crate) fn is_of(&self, file: &File) -> bool {
        self.backing == Backing::CopyOnWrite && self.identity.is_some() && self.identity == identity(file)
    }

    /// Owned zeroed memory of `len` bytes in which byte `data_start` lies on a 64-byte boundary, so that
    /// the tensors of a file read into it are aligned even where they are not in the file.
    pub(crate) fn owned(len: usize, data_start: usize) -> io::Result<Self> {
        MapOptions::new().owned(len, aligning(data_start))
    }

    /// Reads the first `len` bytes of `file` into owned memory, on several threads.
    #[cfg(test)]
    pub(crate) fn read(file: &File, len: usize, data_start: usize) -> io::Result<Self> {
        let mut mapping = Self::owned(len, data_start)?;
        super::options::read_all_at(mapping.as_bytes_mut(), file, 0)?;
        Ok(mapping)
    }

    /// `start + len` bytes lie inside `raw`, and are writable, or `writable` is set.
    pub(super) fn new(raw: impl Into<Raw>, start: usize, len: usize, backing: Backing) -> Self {
        let raw = raw.into();
        debug_assert!(start + len <= raw.len());
        Self {
            raw: Arc::new(raw),
            start,
            len,
            backing,
            writable: None,
            base: None,
            identity: None,
            told: true,
            offset: 0,
            huge_pages: true,
            locked_whole: false,
            moving: Arc::default(),
        }
    }

    /// The bytes of a value, where they lie: nothing is copied, and nothing is written to them.
    pub(crate) fn lent(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let raw = Raw::lent(owner);
        let len = raw.len();
        // No page is listed as writable, nor ever will be.
        Self { writable: Some(Arc::default()), ..Self::new(raw, 0, len, Backing::Lent) }
    }

    /// Only the window of these bytes that `find` says, given how many there are.
    pub(super) fn narrowed(mut self, find: impl FnOnce(u64) -> Result<Window>) -> Result<Self> {
        let window = find(self.len as u64)?;
        let inside = usize::try_from(window.offset)
            .ok()
            .filter(|start| start.checked_add(window.len).is_some_and(|end| end <= self.len));
        self.start += inside.ok_or_else(|| Error::Truncated {
            path: std::path::PathBuf::new(),
            found: self.len as u64,
            expected: window.offset.saturating_add(window.len as u64),
        })?;
        (self.len, self.offset) = (window.len, window.offset);
        Ok(self)
    }

    /// Maps a whole file, of `len` bytes, to be written. [`ExclusiveFile::allocate`] came before and said yes.
    pub(crate) fn output(file: &ExclusiveFile, len: usize) -> io::Result<Self> {
        // Mapping raw is safe: what makes reading and writing it sound is that this process alone knows the file
        // (type invariant), which stays so as long as the mapping is ours to write.
        let raw = Raw::withheld(|| MmapOptions::new().len(len).map_raw(file.file()))?;
        Ok(Self::huge(raw, len, Backing::Output))
    }

    pub(super) fn huge(raw: Raw, len: usize, backing: Backing) -> Self {
        let mapping = Self::new(raw, 0, len, backing);
        // Before the first touch, or the page tables fill with 4 KiB entries. Only advice: a kernel
        // without huge pages for files says no, and nothing changes.
        mapping.advise(Advice::HugePage).ok();
        mapping
    }

    /// Makes every page present and writable, on several threads, so that writing them faults no more. For an
    /// output: its content stays, and its pages count as written.
    pub(crate) fn populate_write(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        return each_in_parallel((0..self.len.div_ceil(CHUNK)).collect(), |i: usize| {
            let range = i * CHUNK..((i + 1) * CHUNK).min(self.len);
            let start = self.start + range.start;
            match self.raw.advise_range(memmap2::Advice::PopulateWrite, start, range.len()) {
                // A kernel before 5.14: pages come when they are touched.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                done => done,
            }
        });
        #[cfg(not(target_os = "linux"))]
        Ok(())
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What the bytes are backed by.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    pub(super) fn ptr(&self) -> *mut u8 {
        self.raw.as_mut_ptr().wrapping_add(self.start)
    }

    /// Where in the file the first byte lies: the start of the window that is mapped.
    ///
    /// ```
    /// # let file = std::fs::File::open("models/digits.safetensors").unwrap();
    /// // SAFETY: nobody writes to the file while it is mapped.
    /// let mapping = unsafe { maptensors::MapOptions::new().window(8..100).map(&file)? };
    /// assert_eq!((mapping.offset(), mapping.len()), (8, 92));
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// All bytes, from the start of the file, or of the window that is mapped.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: start + len <= raw.len() (field invariant), the memory is mapped readable for the life
        // of `raw`, which `self` owns, and only `as_bytes_mut(&mut self)` or a breach of the contract
        // could change it while the slice lives. File lengths fit isize: the kernel mapped them.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }
    }

    /// All bytes, to write.
    ///
    /// # Errors
    /// [`Error::Argument`] for a mapping that is read-only; [`Error::Io`] (`ENOMEM`) where the kernel does not promise
    /// memory for all pages of a copy-on-write mapping: with `vm.overcommit_memory` at 2.
    pub fn try_as_bytes_mut(&mut self) -> Result<&mut [u8]> {
        if matches!(self.backing, Backing::ReadOnly | Backing::Lent) {
            return Err(Error::Argument(
                "a read-only mapping cannot be written: map it copy-on-write".into(),
            ));
        }
        let len = self.len;
        self.part_mut(0..len).map_err(|error| super::not_writable(Path::new(""), "the mapping", len, error))
    }

    /// All bytes of memory that is writable from the start, as an output and owned memory are; none of any other.
    pub(crate) fn as_bytes_mut(&mut self) -> &mut [u8] {
        let len = if self.writable.is_some() { 0 } else { self.len };
        // SAFETY: as in `as_bytes`; the memory is writable (field invariant) or the slice empty, and `&mut self` makes
        // it the only one.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(), len) }
    }

    /// Tells the kernel how the bytes will be used.
    ///
    /// # Errors
    /// What madvise(2) answers.
    ///
    /// ```
    /// use maptensors::{Advice, Model};
    ///
    /// let model = Model::read("models/digits.safetensors")?;
    /// model.mapping(0).unwrap().advise(Advice::Sequential).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn advise(&self, advice: Advice) -> io::Result<()> {
        self.advise_range(advice, 0..self.len)
    }

    /// As [`Mapping::advise`], for the pages that hold a part of the bytes.
    ///
    /// # Errors
    /// As [`Mapping::advise`]; a range outside the mapping is `InvalidInput`.
    pub fn advise_range(&self, advice: Advice, range: Range<usize>) -> io::Result<()> {
        self.check(&range)?;
        match advice.kernel() {
            Some(advice) => self.raw.advise_range(advice, self.start + range.start, range.len()),
            None => Ok(()),
        }
    }

    /// Which pages of a part of the bytes are in memory, and whose.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside the mapping; what mincore(2) or reading
    /// `/proc/self/pagemap` answers.
    ///
    /// ```
    /// use maptensors::ModelMut;
    ///
    /// // SAFETY: nobody writes to the file while it is mapped.
    /// let mut model = unsafe { ModelMut::open("models/digits.safetensors")? };
    /// let before = model.residency()?;
    /// model.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] += 1.0;
    /// let after = model.residency()?;
    /// assert_eq!((before.private, after.private), (0, 1)); // one page became ours
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn residency(&self, range: Range<usize>) -> io::Result<Residency> {
        self.check(&range)?;
        residency::of(self.ptr().wrapping_add(range.start), range.len(), self.told, &mlock::locked()?)
    }

    /// Makes the pages that hold a part of the bytes this process's own, in bulk: for a range that will be
    /// written all over, several times as fast as the kernel's copying of each page as it is first written.
    /// Takes that much memory at once. Nothing to do, and nothing done, for memory that is owned already.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside the mapping; what mmap(2) and mremap(2) answer, with the bytes
    /// as they were.
    ///
    /// ```
    /// use maptensors::ModelMut;
    ///
    /// // SAFETY: nobody writes to the file while it is mapped.
    /// let mut model = unsafe { ModelMut::open("models/digits.safetensors")? };
    /// model.promote()?;
    /// let pages = model.residency()?;
    /// assert_eq!(pages.private, pages.pages);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn promote(&mut self, range: Range<usize>) -> io::Result<()> {
        self.check(&range)?;
        // SAFETY: `&mut self`: nobody else writes meanwhile.
        unsafe { self.promote_shared(range) }
    }

    /// The part of a range that is whole pages: what no neighbour has a share in.
    pub(crate) fn whole_pages(&self, range: &Range<usize>) -> Range<usize> {
        let page = rustix::param::page_size();
        let base = self.ptr().addr();
        let start = (base + range.start).next_multiple_of(page) - base;
        let end = ((base + range.end) / page * page).saturating_sub(base);
        start..end.max(start)
    }

    /// # Safety
    /// The range lies inside, and nobody writes to its pages meanwhile.
    pub(super) unsafe fn promote_shared(&self, range: Range<usize>) -> io::Result<()> {
        if self.backing != Backing::CopyOnWrite {
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        {
            let (ptr, len) = (self.ptr().wrapping_add(range.start), range.len());
            let _moving = self.moving.wait();
            let locked = mlock::locked()?;
            // SAFETY: pages of `raw`, private and writable because the backing is copy-on-write; the last page
            // of a file's mapping is mapped whole.
            let promoted = unsafe { promote::promote(ptr, len, self.huge_pages) };
            if promoted.is_ok() {
                self.note_writable(&range);
            }
            // The new pages are of a mapping of their own, which nobody has locked. There are some where it failed
            // midway, too.
            let mut kept = Ok(());
            for run in locked {
                let (start, end) = (run.start.max(ptr.addr()), run.end.min(ptr.addr() + len));
                if start < end {
                    kept = kept.and(mlock::lock_pages(ptr.with_addr(start), end - start));
                }
            }
            promoted.and(kept)?;
        }
        #[cfg(not(target_os = "linux"))]
        drop(range);
        Ok(())
    }

    pub(super) fn check(&self, range: &Range<usize>) -> io::Result<()> {
        if range.start <= range.end && range.end <= self.len {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "a range outside the mapping"))
        }
    }
}

/// Device and inode of a file.
pub(super) fn identity(file: &File) -> Option<(u64, u64)> {
    file.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl AsRef<[u8]> for Mapping {
    /// As [`Mapping::as_bytes`].
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapping")
            .field("backing", &self.backing)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn owned_memory_puts_the_data_on_a_64_byte_boundary() {
        for data_start in [8, 64, 11_409, 4096] {
            let mapping = Mapping::owned(20_000, data_start).unwrap();
            let data = &mapping.as_bytes()[data_start..];
            assert_eq!(data.as_ptr().addr() % 64, 0);
            assert_eq!(mapping.len(), 20_000);
        }
    }

    #[test]
    fn reading_equals_the_file_at_every_chunk_boundary() {
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5] {
            let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            assert!(Mapping::read(&file, len, 7).unwrap().as_bytes() == bytes, "{len}");
            assert!(Mapping::read(&file, len + 1, 0).is_err());
        }
    }

    #[test]
    fn a_range_outside_the_mapping_is_refused() {
        let mapping = Mapping::owned(10, 0).unwrap();
        #[allow(clippy::reversed_empty_ranges)]
        for range in [0..11, 11..11, 5..4, usize::MAX..usize::MAX] {
            assert!(mapping.residency(range.clone()).is_err(), "{range:?}");
            assert!(mapping.advise_range(Advice::Normal, range).is_err());
        }
        assert!(mapping.residency(10..10).is_ok());
    }
}
