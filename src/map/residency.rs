//! What the kernel says about the pages of a mapping.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// Which pages of a range are in memory, and whose. Counts are pages of [`Residency::page_size`] bytes.
///
/// ```
/// use maptensors::Model;
///
/// // SAFETY: nobody writes to the file while it is mapped.
/// let model = unsafe { Model::open("models/digits.safetensors")? };
/// let pages = model.residency()?;
/// assert_eq!(pages.touched, 0); // opening reads the header, not the data
/// assert_eq!(pages.private, 0);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct Residency {
    /// Bytes in a page.
    pub page_size: usize,
    /// Pages that hold any byte of the range.
    pub pages: usize,
    /// Pages in memory, put there by anyone: the page cache, as mincore(2) counts it. Of a file that this user neither
    /// owns nor may write, those that are touched: of others the kernel does not tell.
    pub resident: usize,
    /// Pages in this process's page tables: touched through this mapping, by it or around it.
    pub touched: usize,
    /// Pages that belong to this process alone: copied because they were written.
    pub private: usize,
    /// Pages that are held in memory by a lock, and there.
    pub locked: usize,
    /// Pages mapped by page-table entries for huge pages; 0 where the kernel does not tell (Linux before 6.7).
    pub huge: usize,
}

impl std::ops::AddAssign for Residency {
    /// Adds the counts of another range.
    fn add_assign(&mut self, other: Self) {
        self.page_size = other.page_size;
        self.pages += other.pages;
        self.resident += other.resident;
        self.touched += other.touched;
        self.private += other.private;
        self.locked += other.locked;
        self.huge += other.huge;
    }
}

// /proc/PID/pagemap, from the kernel's Documentation/admin-guide/mm/pagemap.rst.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// Pages asked about at once, so that asking about a terabyte does not allocate by its size.
const BLOCK: usize = 1 << 16;

/// Whether a page belongs to this process alone, by its word in the pagemap.
pub(super) fn is_private(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0
}

/// Whether a page is in the page tables, by its word in the pagemap. One of a file that the kernel is just moving to
/// another place in memory (compaction does, at any time) reads as swapped, for an instant; no page of a file is ever
/// swapped.
fn is_touched(entry: u64) -> bool {
    entry & PRESENT != 0 || entry & (SWAPPED | FILE_OR_SHARED) == SWAPPED | FILE_OR_SHARED
}

/// Whether mincore(2) tells this process the truth about a file: the kernel's `can_do_mincore`.
pub(crate) fn may_ask(file: &File) -> io::Result<bool> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::MetadataExt as _;
    let user = rustix::process::geteuid();
    let may_write = || {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
    };
    Ok(user.is_root() || file.metadata()?.uid() == user.as_raw() || may_write())
}

/// Asks about the pages that hold `len` bytes at `ptr`, which must be mapped. `told`: whether the kernel says what is in
/// memory; else it says that all is. `locked` are the addresses under a lock, as [`super::mlock::locked`] tells.
pub(super) fn of(ptr: *const u8, len: usize, told: bool, locked: &[Range<usize>]) -> io::Result<Residency> {
    let page_size = rustix::param::page_size();
    let mut found = Residency { page_size, ..Residency::default() };
    if len == 0 {
        return Ok(found);
    }
    let first = ptr.addr() / page_size;
    let last = (ptr.addr() + len - 1) / page_size;
    found.pages = last - first + 1;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut core = vec![0u8; BLOCK.min(found.pages)];
    let mut entries = vec![0u64; BLOCK.min(found.pages)];
    for block in (first..=last).step_by(BLOCK) {
        let n = BLOCK.min(last + 1 - block);
        let start = ptr.wrapping_sub(ptr.addr()).wrapping_add(block * page_size);
        // SAFETY: mincore(2) reads no memory at `start` and writes one byte a page to `core`, which has
        // room for n of them.
        let answer =
            unsafe { libc::mincore(start.cast_mut().cast(), n * page_size, core.as_mut_ptr().cast()) };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        found.resident += core[..n].iter().filter(|&&b| b & 1 == 1).count();
        pagemap.read_exact_at(bytemuck::cast_slice_mut(&mut entries[..n]), (block * 8) as u64)?;
        for (i, &entry) in entries[..n].iter().enumerate() {
            let is_touched = is_touched(entry);
            let at = (block + i) * page_size;
            found.touched += usize::from(is_touched);
            found.private += usize::from(is_private(entry));
            found.locked += usize::from(is_touched && locked.iter().any(|range| range.contains(&at)));
        }
    }
    if !told {
        found.resident = found.touched;
    }
    #[cfg(target_os = "linux")]
    {
        let span = first * page_size..(last + 1) * page_size;
        found.huge = super::private::huge(&pagemap, span) / page_size;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_a_file_that_is_being_moved_is_touched_and_nobodys_own() {
        let words = [
            (0, false, false),
            (FILE_OR_SHARED, false, false),
            (PRESENT, true, true),
            (PRESENT | FILE_OR_SHARED, true, false),
            (SWAPPED, false, true),
            (SWAPPED | FILE_OR_SHARED, true, false),
        ];
        for (word, touched, private) in words {
            assert_eq!((is_touched(word), is_private(word)), (touched, private), "{word:#x}");
        }
    }
}
