//! How to map: [`MapOptions`].

use super::mapping::identity;
use super::raw::Raw;
use super::residency::may_ask;
use super::{Advice, Backing, CHUNK, Mapping, SharedMemory, mlock};
#[cfg(target_os = "linux")]
use super::{Memfd, SealedMemfd};
use crate::error::{Error, Result};
use crate::work::{cancel, each_in_parallel};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

#[doc = include_str!("options.md")]
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)] // each an option independent of the others
pub struct MapOptions {
    populate: bool,
    lock: bool,
    /// `None`: for anonymous memory, not for copy-on-write.
    reserve_swap: Option<bool>,
    huge_pages: bool,
    /// Whether a read-only mapping has the file beside it to compare with, too.
    compared: bool,
    /// Whether all of it is about to be taken to be written.
    taken: bool,
    start: u64,
    /// To the end of the file if missing.
    end: Option<u64>,
}

impl Default for MapOptions {
    fn default() -> Self {
        Self {
            populate: false,
            lock: false,
            reserve_swap: None,
            huge_pages: true,
            compared: false,
            taken: false,
            start: 0,
            end: None,
        }
    }
}

/// A part of a file that is mapped: inside the file as long as it was when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

impl MapOptions {
    /// The defaults: the whole file, huge pages where there are any, nothing read ahead, nothing locked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Read all pages in before returning, on several threads; an I/O error is then an error here instead of
    /// a later `SIGBUS`. Copies nothing: pages of a copy-on-write mapping stay shared until they are written.
    #[must_use]
    pub fn populate(mut self, populate: bool) -> Self {
        self.populate = populate;
        self
    }

    /// Keep all pages in RAM, from before this returns until the mapping is gone: no read, and no fault that
    /// waits for a disk, from then on. Copies nothing either; a page that becomes this process's own is kept
    /// in RAM too. (Where a huge page of the file is taken apart, by a write or by the kernel to make memory
    /// contiguous, its other pages, 2 MiB at most, are let go until they are touched again.) Where `RLIMIT_MEMLOCK` does not allow it, [`Error::Limit`] says what was asked for and what
    /// the limit is.
    #[must_use]
    pub fn lock(mut self, lock: bool) -> Self {
        self.lock = lock;
        self
    }

    /// Whether memory is promised for every page that may become this process's own, all at once, so that none of
    /// those writes can find memory exhausted later. By default not for copy-on-write, where a model larger than
    /// memory maps and pays only for the pages that are written, and done for anonymous memory. Where
    /// `vm.overcommit_memory` is 2 the kernel promises memory for what is asked for to write, when it is.
    #[must_use]
    pub fn reserve_swap(mut self, reserve: bool) -> Self {
        self.reserve_swap = Some(reserve);
        self
    }

    /// Whether to ask for huge pages before the first touch (default), or for none; what
    /// [`promote`](Mapping::promote) copies is then of small ones too.
    #[must_use]
    pub fn huge_pages(mut self, huge: bool) -> Self {
        self.huge_pages = huge;
        self
    }

    /// Has a read-only mapping know, as a copy-on-write one does, what was written to it all the same: by a library that
    /// passes over what it was told.
    #[cfg(feature = "python")]
    pub(crate) fn compared(mut self) -> Self {
        self.compared = true;
        self
    }

    /// Has a copy-on-write mapping be writable as a whole from the start: for all of it is taken at once, which then
    /// needs no mprotect(2). Where the kernel does not promise the memory, it starts read-only as others do.
    #[cfg(feature = "python")]
    pub(crate) fn taken(mut self) -> Self {
        self.taken = true;
        self
    }

    /// The part of the file to map, in bytes, at any byte: a model stored inside another file. What lies
    /// before it in its first page, and behind it in its last, is not reachable.
    ///
    /// ```
    /// # let file = std::fs::File::open("models/digits.safetensors").unwrap();
    /// // SAFETY: nobody writes to the file while it is mapped.
    /// let mapping = unsafe { maptensors::MapOptions::new().window(3..).map(&file)? };
    /// assert_eq!(mapping.as_bytes()[5], b'{'); // byte 8 of the file
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[must_use]
    pub fn window(mut self, part: impl RangeBounds<u64>) -> Self {
        self.start = match part.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        self.end = match part.end_bound() {
            Bound::Included(&last) => Some(last.saturating_add(1)),
            Bound::Excluded(&end) => Some(end),
            Bound::Unbounded => None,
        };
        self
    }

    /// Maps a file to read: `PROT_READ`, `MAP_PRIVATE`.
    ///
    /// # Safety
    /// The stable-file contract: see [`Model::open`](crate::Model::open).
    ///
    /// # Errors
    /// [`Error::Truncated`] for a window past the end of the file, [`Error::Argument`] for one that ends before
    /// it starts, [`Error::Limit`] for memory that may not be locked, [`Error::Io`]. There is no path in them.
    pub unsafe fn map(&self, file: &File) -> Result<Mapping> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.map_all_of(file, Backing::ReadOnly) }
    }

    /// Maps a file copy-on-write: `MAP_PRIVATE`. A page that is written becomes this process's own; the file never
    /// changes. It is mapped `PROT_READ`, and what is asked for to write is made `PROT_WRITE` then, so that only that is
    /// charged where the kernel promises memory for all that may be written (`vm.overcommit_memory` at 2).
    ///
    /// # Safety
    /// As [`MapOptions::map`].
    ///
    /// # Errors
    /// As [`MapOptions::map`].
    ///
    /// ```
    /// # let file = std::fs::File::open("models/digits.safetensors").unwrap();
    /// // SAFETY: nobody writes to the file while it is mapped.
    /// let mut mapping = unsafe { maptensors::MapOptions::new().map_copy_on_write(&file)? };
    /// mapping.try_as_bytes_mut()?.fill(0); // the file is as it was
    /// # assert_ne!(std::fs::read("models/digits.safetensors").unwrap()[0], 0);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub unsafe fn map_copy_on_write(&self, file: &File) -> Result<Mapping> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.map_all_of(file, Backing::CopyOnWrite) }
    }

    /// Maps a file to be read and written in place, by this process and others: `PROT_READ | PROT_WRITE`,
    /// `MAP_SHARED`. `file` is open to be read and written.
    ///
    /// # Safety
    /// As long as the memory lives, nobody truncates the file or punches holes in it: the process would get
    /// `SIGBUS`. Others may write to it: no slice of these bytes is ever made.
    ///
    /// # Errors
    /// As [`MapOptions::map`].
    ///
    /// ```
    /// # let path = std::env::temp_dir().join("maptensors-doc-map-shared");
    /// # std::fs::write(&path, [0; 10]).unwrap();
    /// let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    /// // SAFETY: nobody truncates the file.
    /// let memory = unsafe { maptensors::MapOptions::new().map_shared(&file)? };
    /// memory.write_at(3, b"abc")?;
    /// assert_eq!(&std::fs::read(&path).unwrap()[3..6], b"abc"); // at once, for every reader
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub unsafe fn map_shared(&self, file: &File) -> Result<SharedMemory> {
        // SAFETY: the caller's promise is passed on; the mapping goes into a SharedMemory, which makes no slices.
        let mapping = unsafe { self.map_all_of(file, Backing::Shared) }?;
        Ok(SharedMemory::of(Arc::new(mapping)))
    }

    /// Maps sealed memory to read. Nobody can change or truncate it, so this needs no promise.
    ///
    /// # Errors
    /// As [`MapOptions::map`].
    #[cfg(target_os = "linux")]
    pub fn map_sealed(&self, memfd: &SealedMemfd) -> Result<Mapping> {
        let path = Path::new("");
        self.bring_sealed(memfd, path, self.window_of(memfd.len()?, path)?, Backing::ReadOnly)
    }

    /// Maps sealed memory copy-on-write.
    ///
    /// # Errors
    /// As [`MapOptions::map`].
    #[cfg(target_os = "linux")]
    pub fn map_sealed_copy_on_write(&self, memfd: &SealedMemfd) -> Result<Mapping> {
        let path = Path::new("");
        self.bring_sealed(memfd, path, self.window_of(memfd.len()?, path)?, Backing::CopyOnWrite)
    }

    /// Memory without a file, zeroed: `MAP_PRIVATE | MAP_ANONYMOUS`. The window has no meaning here.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Limit`].
    ///
    /// ```
    /// let mut memory = maptensors::MapOptions::new().anonymous(10_000)?;
    /// memory.try_as_bytes_mut()?[9_999] = 1;
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn anonymous(&self, len: usize) -> Result<Mapping> {
        let mapping = self.owned(len, 0).map_err(Error::io(Path::new(""), "allocating memory"))?;
        self.settled(mapping, Path::new(""))
    }

    /// Whether a part of the file is asked for, and not the whole.
    pub(crate) fn has_window(&self) -> bool {
        self.start != 0 || self.end.is_some()
    }

    /// The part of a file of `file_len` bytes.
    ///
    /// # Errors
    /// [`Error::Truncated`], [`Error::Argument`], [`Error::Io`].
    pub(crate) fn window_of(&self, file_len: u64, path: &Path) -> Result<Window> {
        let end = self.end.unwrap_or(file_len.max(self.start));
        if end > file_len || self.start > file_len {
            let expected = end.max(self.start);
            return Err(Error::Truncated { path: path.into(), found: file_len, expected });
        }
        let Some(len) = end.checked_sub(self.start) else {
            let text = format!("a window from byte {} to byte {end} ends before it starts", self.start);
            return Err(Error::Argument(text));
        };
        let too_large = || Error::io(path, "mapping the file")(io::ErrorKind::OutOfMemory.into());
        let len = isize::try_from(len).map_err(|_| too_large())?.cast_unsigned();
        Ok(Window { offset: self.start, len })
    }

    /// # Safety
    /// As [`MapOptions::bring`].
    unsafe fn map_all_of(&self, file: &File, backing: Backing) -> Result<Mapping> {
        let path = Path::new("");
        let len = file.metadata().map_err(Error::io(path, "asking for the file's length"))?.len();
        let window = self.window_of(len, path)?;
        // SAFETY: the caller vouches for the file, which has the window.
        unsafe { self.bring(file, path, window, backing) }
    }

    /// Maps a part of a file, and does with its pages what is asked for.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Limit`].
    ///
    /// # Safety
    /// The stable-file contract (see the module) holds for `file`, which has the window. Where `backing` is
    /// Shared, only that nobody truncates it or punches holes; then the mapping goes into a `SharedMemory`.
    pub(crate) unsafe fn bring(
        &self,
        file: &File,
        path: &Path,
        window: Window,
        backing: Backing,
    ) -> Result<Mapping> {
        // SAFETY: the caller's promise is passed on.
        let mapping = unsafe { self.map_window(file, window, backing) };
        self.settled(mapping.map_err(Error::io(path, "mapping the file"))?, path)
    }

    /// Owned memory for the bytes of `window`, which `fill` writes; byte `data_start` lies on a 64-byte boundary.
    ///
    /// # Errors
    /// As [`MapOptions::bring`]; those of `fill`.
    pub(crate) fn read(
        &self,
        path: &Path,
        window: Window,
        data_start: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> Result<Mapping> {
        let mapping = self.owned(window.len, aligning(data_start));
        let mapping = mapping.map_err(Error::io(path, "allocating memory for the model"))?;
        // Reading brings every page; what is to be locked is so before it is filled, in case it may not be.
        let mut mapping = Self { populate: false, ..self.clone() }.settled(mapping, path)?;
        fill(mapping.as_bytes_mut()).map_err(Error::io(path, "reading the file"))?;
        mapping.offset = window.offset;
        Ok(mapping)
    }

    /// As [`MapOptions::read`], into memory that is then sealed, and mapped read-only or copy-on-write.
    ///
    /// # Errors
    /// As [`MapOptions::read`].
    #[cfg(target_os = "linux")]
    pub(crate) fn read_sealed(
        &self,
        path: &Path,
        window: Window,
        data_start: usize,
        backing: Backing,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> Result<Mapping> {
        let start = aligning(data_start);
        let too_large =
            || Error::io(path, "allocating memory for the model")(io::ErrorKind::OutOfMemory.into());
        let size = window.len.checked_add(start).ok_or_else(too_large)?;
        let memfd = Memfd::create_with(self, "maptensors", size);
        let mut memfd = memfd.map_err(Error::io(path, "allocating memory for the model"))?;
        fill(&mut memfd.as_bytes_mut()[start..]).map_err(Error::io(path, "reading the file"))?;
        let inside = Window { offset: start as u64, len: window.len };
        let mut mapping = self.bring_sealed(&memfd.seal()?, path, inside, backing)?;
        mapping.offset = window.offset;
        Ok(mapping)
    }

    /// The window of bytes that are lent, where they lie.
    ///
    /// # Errors
    /// [`Error::Argument`] where something is asked for that is their owner's to do; as [`MapOptions::window_of`].
    pub(crate) fn lent(&self, owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Mapping> {
        if self.lock || self.populate {
            let what = if self.lock { "lock" } else { "populate" };
            return Err(Error::Argument(format!(
                "{what}: memory that is lent is its owner's to lock and to read in; reading the model copies it into \
                 memory that can be"
            )));
        }
        Mapping::lent(owner).narrowed(|len| self.window_of(len, Path::new("")))
    }

    /// # Errors
    /// As [`MapOptions::bring`].
    #[cfg(target_os = "linux")]
    pub(crate) fn bring_sealed(
        &self,
        memfd: &SealedMemfd,
        path: &Path,
        window: Window,
        backing: Backing,
    ) -> Result<Mapping> {
        debug_assert!(matches!(backing, Backing::ReadOnly | Backing::CopyOnWrite));
        let (found, expected) = (memfd.len()?, window.offset.saturating_add(window.len as u64));
        if expected > found {
            return Err(Error::Truncated { path: path.into(), found, expected });
        }
        // SAFETY: the seals keep the contract for the kernel's part (invariant of SealedMemfd), and the length;
        // memory that is written becomes this process's own.
        unsafe { self.bring(memfd.file(), path, window, backing) }
    }

    /// Maps a part of a file; touches nothing.
    ///
    /// # Safety
    /// As [`MapOptions::bring`].
    pub(super) unsafe fn map_window(
        &self,
        file: &File,
        window: Window,
        backing: Backing,
    ) -> io::Result<Mapping> {
        // SAFETY: the caller's promise is passed on.
        let mut mapping = unsafe { self.map_alone(file, window, backing) }?;
        mapping.identity = identity(file);
        mapping.told = may_ask(file).unwrap_or(true);
        if backing == Backing::CopyOnWrite || self.compared && backing == Backing::ReadOnly {
            let plain = Self { huge_pages: self.huge_pages, ..Self::new() };
            // SAFETY: as above. Where there are no addresses for it, nothing is lost but being told changes.
            mapping.base = unsafe { plain.map_alone(file, window, Backing::ReadOnly) }.ok().map(Box::new);
        }
        Ok(mapping)
    }

    /// As [`MapOptions::map_window`], of a file that nothing is asked about.
    ///
    /// # Safety
    /// As [`MapOptions::bring`].
    unsafe fn map_alone(&self, file: &File, window: Window, backing: Backing) -> io::Result<Mapping> {
        let page = rustix::param::page_size() as u64;
        // Less than a page, which fits.
        let start = usize::try_from(window.offset % page).unwrap_or_default();
        let mut options = MmapOptions::new();
        options.offset(window.offset - start as u64).len(start + window.len);
        let (mut writable, mut taken) = (None, false);
        let raw: Raw = match backing {
            // All of it is to be promised at once.
            Backing::CopyOnWrite if self.reserve_swap == Some(true) => {
                // SAFETY: the caller vouches for the file; that is memmap2's whole requirement.
                MmapRaw::from(unsafe { options.map_copy(file) }?).into()
            }
            Backing::ReadOnly | Backing::CopyOnWrite => {
                writable = Some(Arc::default());
                // Kept by pages that are made writable: the kernel then promises memory for none, where it may choose.
                options.no_reserve_swap();
                let at_once = (self.taken && backing == Backing::CopyOnWrite).then(|| {
                    // SAFETY: as above.
                    unsafe { options.map_copy(file) }
                });
                if let Some(Ok(map)) = at_once {
                    taken = true;
                    MmapRaw::from(map).into()
                } else {
                    // What the kernel does not promise is refused by the tensor, once that is taken.
                    // SAFETY: as above.
                    MmapRaw::from(unsafe { options.map_copy_read_only(file) }?).into()
                }
            }
            Backing::Output => Raw::withheld(|| options.map_raw(file))?,
            _ => options.map_raw(file)?.into(),
        };
        let mut mapping = Mapping::new(raw, start, window.len, backing);
        mapping.writable = writable;
        if taken {
            mapping.note_writable(&(0..window.len));
        }
        mapping.offset = window.offset;
        self.advise_huge(&mut mapping);
        Ok(mapping)
    }

    /// Memory of this process, whose first byte lies `start` bytes (less than a page) behind a page boundary.
    pub(super) fn owned(&self, len: usize, start: usize) -> io::Result<Mapping> {
        let size = len.checked_add(start).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mut options = MmapOptions::new();
        options.len(size.max(1));
        if self.reserve_swap == Some(false) {
            options.no_reserve_swap();
        }
        let mut mapping = Mapping::new(MmapRaw::from(options.map_anon()?), start, len, Backing::Owned);
        self.advise_huge(&mut mapping);
        Ok(mapping)
    }

    /// Before the first touch, or the page tables fill with 4 KiB entries. Only advice: a kernel without huge
    /// pages for files says no, and nothing changes.
    fn advise_huge(&self, mapping: &mut Mapping) {
        mapping.huge_pages = self.huge_pages;
        if self.huge_pages {
            mapping.advise(Advice::HugePage).ok();
        } else {
            #[cfg(target_os = "linux")]
            mapping.raw.advise(memmap2::Advice::NoHugePage).ok();
        }
    }

    /// Locks and fills, as asked for.
    fn settled(&self, mut mapping: Mapping, path: &Path) -> Result<Mapping> {
        if self.lock {
            // Before anything is read: a limit shows at once, and no page can go again between.
            mlock::lock_pages(mapping.ptr(), mapping.len)
                .map_err(|error| mlock::refused(path, mapping.len, error))?;
            mapping.locked_whole = true;
            mapping.moving.note_locked();
        }
        if self.populate || self.lock {
            let filled = if mapping.backing == Backing::Owned {
                mapping.populate_write()
            } else {
                mapping.populate_read(0..mapping.len)
            };
            filled.map_err(Error::io(path, "reading its pages in"))?;
        }
        Ok(mapping)
    }
}

/// Fills memory with as many bytes of `file`, from an offset, on several threads.
pub(crate) fn read_all_at(to: &mut [u8], file: &File, offset: u64) -> io::Result<()> {
    let chunks: Vec<_> = to.chunks_mut(CHUNK).enumerate().collect();
    each_in_parallel(chunks, |(i, chunk)| {
        cancel::check()?;
        file.read_exact_at(chunk, offset + (i * CHUNK) as u64)
    })
}

/// How far behind a page boundary memory has to start for byte `data_start` to lie on a 64-byte boundary.
pub(super) fn aligning(data_start: usize) -> usize {
    data_start.next_multiple_of(64) - data_start
}

impl Mapping {
    /// Reads the pages that hold a part of the bytes in, on several threads, cut at huge pages so that the
    /// page cache stays made of them. Copies nothing.
    ///
    /// # Errors
    /// `EIO` where a page cannot be read, or lies past the end of a file that has shrunk; `InvalidInput` for a
    /// range outside the mapping.
    pub(crate) fn populate_read(&self, range: std::ops::Range<usize>) -> io::Result<()> {
        self.check(&range)?;
        // Where in its huge page the first byte of the mapping lies, in the file.
        let shift = usize::try_from(self.offset % CHUNK as u64).unwrap_or_default();
        let chunks = (shift + range.start) / CHUNK..(shift + range.end).div_ceil(CHUNK);
        each_in_parallel(chunks.collect(), |i: usize| {
            let start = (i * CHUNK).saturating_sub(shift).max(range.start);
            let end = ((i + 1) * CHUNK - shift).min(range.end);
            match self.advise_range(Advice::PopulateRead, start..end) {
                // A kernel before 5.14: pages come when they are touched.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                // madvise(2)'s word for what would be SIGBUS at a touch.
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    Err(io::Error::from_raw_os_error(libc::EIO))
                }
                done => done,
            }
        })
    }
}
