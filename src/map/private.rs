//! Which pages of a copy-on-write mapping became this process's own.
//!
//! The kernel knows without having been told to watch: a page of the file that was written is anonymous from
//! then on. `ioctl(PAGEMAP_SCAN)` (Linux 6.7) lists such pages as ranges; before it, `/proc/self/pagemap` has
//! a word for each page.

use crate::work::each_in_parallel;
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 0xc000_0000 | ((size_of::<ScanArg>() as u64) << 16) | ((b'f' as u64) << 8) | 16;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_HUGE: u64 = 1 << 6;

/// Which pages are asked for.
struct Wanted {
    inverted: u64,
    all_of: u64,
    any_of: u64,
}

/// Not of a file, and either present or swapped out.
const PRIVATE: Wanted =
    Wanted { inverted: PAGE_IS_FILE, all_of: PAGE_IS_FILE, any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED };

/// Mapped by a page-table entry for a huge page.
const HUGE: Wanted = Wanted { inverted: 0, all_of: PAGE_IS_HUGE, any_of: 0 };

/// Ranges asked for at once, and pages where they are asked for one by one.
const REGIONS: usize = 4096;
const PAGES: usize = 1 << 16;
/// The kernel looks at every page: large mappings are cut into pieces of so many bytes, for as many threads as help.
const PIECE: usize = 64 << 20;

/// The private pages among those that hold `len` bytes at `ptr`, as ranges of addresses, in order and apart.
///
/// Where there is no `/proc`, or it may not be read, all of them: exact enough to compare, only slower.
///
/// # Errors
/// What reading `/proc/self/pagemap` answers.
pub(super) fn pages(ptr: *const u8, len: usize) -> io::Result<Vec<Range<usize>>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let page = rustix::param::page_size();
    let span = ptr.addr() / page * page..(ptr.addr() + len).next_multiple_of(page);
    let pagemap = match File::open("/proc/self/pagemap") {
        Err(error) if [ErrorKind::NotFound, ErrorKind::PermissionDenied].contains(&error.kind()) => {
            return Ok(vec![span]);
        }
        pagemap => pagemap?,
    };
    let cuts = span.clone().step_by(PIECE).map(|start| start..(start + PIECE).min(span.end));
    let mut pieces: Vec<(Range<usize>, Vec<Range<usize>>)> = cuts.map(|cut| (cut, Vec::new())).collect();
    each_in_parallel(pieces.iter_mut().collect(), |(cut, found): &mut (Range<usize>, Vec<Range<usize>>)| {
        *found = piece(&pagemap, cut.clone(), page)?;
        Ok::<_, io::Error>(())
    })?;
    let mut found = Vec::new();
    for range in pieces.into_iter().flat_map(|(_, found)| found) {
        push(&mut found, range);
    }
    Ok(found)
}

/// Bytes of the pages in `span` that are mapped by page-table entries for huge pages; 0 where the kernel does
/// not tell, before 6.7.
pub(super) fn huge(pagemap: &File, span: Range<usize>) -> usize {
    let found = scanned(pagemap, span.clone(), &HUGE).unwrap_or_default();
    // A range may reach beyond: a huge page is one.
    found.into_iter().map(|run| run.end.min(span.end).saturating_sub(run.start.max(span.start))).sum()
}

fn piece(pagemap: &File, span: Range<usize>, page: usize) -> io::Result<Vec<Range<usize>>> {
    match scanned(pagemap, span.clone(), &PRIVATE) {
        // An older kernel, or a sandbox that knows no such request.
        Err(error)
            if [Errno::NOTTY, Errno::INVAL, Errno::NOSYS, Errno::PERM]
                .map(Some)
                .contains(&Errno::from_io_error(&error)) =>
        {
            one_by_one(pagemap, span, page)
        }
        answer => answer,
    }
}

/// By `ioctl(PAGEMAP_SCAN)`.
fn scanned(pagemap: &File, span: Range<usize>, wanted: &Wanted) -> io::Result<Vec<Range<usize>>> {
    let mut found = Vec::new();
    let mut regions = vec![Region::default(); REGIONS];
    let mut start = span.start as u64;
    while start < span.end as u64 {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start,
            end: span.end as u64,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: regions.len() as u64,
            category_inverted: wanted.inverted,
            category_mask: wanted.all_of,
            category_anyof_mask: wanted.any_of,
            // Nothing is told about a range but that it matches, so neighbours come as one.
            return_mask: 0,
            ..ScanArg::default()
        };
        // SAFETY: the request reads and writes `arg`, whose layout is the kernel's, and writes at most
        // `vec_len` regions to `vec`, which has room for them. No page is changed: `flags` is 0.
        let answer = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
        let Ok(n) = usize::try_from(answer) else {
            let error = io::Error::last_os_error();
            if error.kind() == ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        let n = n.min(regions.len());
        for region in &regions[..n] {
            push(&mut found, address(region.start)..address(region.end));
        }
        // Where an answer took more than one of the kernel's own buffers of 512 ranges, `walk_end` is where
        // the last but one was full (Linux 6.18): what is behind it has been told already.
        let told = regions[..n].last().map_or(0, |last| last.end).max(arg.walk_end);
        if told <= start {
            return Err(io::Error::other("PAGEMAP_SCAN does not advance"));
        }
        start = told;
    }
    Ok(found)
}

/// By the words of `/proc/self/pagemap`.
fn one_by_one(pagemap: &File, span: Range<usize>, page: usize) -> io::Result<Vec<Range<usize>>> {
    let mut found = Vec::new();
    let (first, last) = (span.start / page, span.end / page);
    let mut entries = vec![0u64; PAGES.min(last - first)];
    for block in (first..last).step_by(PAGES) {
        let n = PAGES.min(last - block);
        pagemap.read_exact_at(bytemuck::cast_slice_mut(&mut entries[..n]), (block * 8) as u64)?;
        for (i, &entry) in entries[..n].iter().enumerate() {
            if super::residency::is_private(entry) {
                let start = (block + i) * page;
                push(&mut found, start..start + page);
            }
        }
    }
    Ok(found)
}

/// Adds a range, to the last one where they touch.
fn push(found: &mut Vec<Range<usize>>, range: Range<usize>) {
    match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.push(range),
    }
}

/// An address of this process, as the kernel writes it.
#[allow(clippy::cast_possible_truncation)]
fn address(kernel: u64) -> usize {
    kernel as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{CHUNK, Mapping};

    #[test]
    fn both_ways_of_asking_find_exactly_the_pages_written_and_promoted() {
        let page = rustix::param::page_size();
        let len = 4 * CHUNK + 100;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; len], 0).unwrap();
        // SAFETY: a file of our own, unlinked, not written any more.
        let mut mapping = unsafe { Mapping::open_copy_on_write(&file, len) }.unwrap();
        // Reading makes no page private.
        assert!(mapping.as_bytes().iter().all(|&b| b == 7));
        let base = mapping.as_bytes().as_ptr().addr();
        let of = |mapping: &Mapping| -> Vec<Range<usize>> {
            let ptr = mapping.as_bytes().as_ptr();
            let by_word = one_by_one(
                &File::open("/proc/self/pagemap").unwrap(),
                base..(base + len).next_multiple_of(page),
                page,
            );
            let by_word = by_word.unwrap();
            let asked = pages(ptr, len).unwrap();
            assert_eq!(asked, by_word);
            match scanned(
                &File::open("/proc/self/pagemap").unwrap(),
                base..(base + len).next_multiple_of(page),
                &PRIVATE,
            ) {
                Ok(scanned) => assert_eq!(scanned, by_word),
                Err(error) => crate::skipped(
                    "both_ways_of_asking_find_exactly_the_pages_written_and_promoted",
                    format!("PAGEMAP_SCAN: {error}"),
                ),
            }
            asked.into_iter().map(|run| run.start - base..run.end - base).collect()
        };
        assert!(of(&mapping).is_empty());
        for at in [0, 3 * page, 4 * page + 5, CHUNK - 1, len - 1] {
            mapping.try_as_bytes_mut().unwrap()[at] = 8;
        }
        let last = len / page * page;
        assert_eq!(of(&mapping), [0..page, 3 * page..5 * page, CHUNK - page..CHUNK, last..last + page]);
        mapping.promote(2 * CHUNK..3 * CHUNK).unwrap();
        assert_eq!(of(&mapping)[3], 2 * CHUNK..3 * CHUNK);
        // More ranges than one request brings.
        for at in (0..len).step_by(2 * page) {
            mapping.try_as_bytes_mut().unwrap()[at] = 9;
        }
        assert!(of(&mapping).len() > 500);
    }

    #[test]
    fn a_run_across_pieces_is_one() {
        let page = rustix::param::page_size();
        let len = 2 * PIECE + 5;
        let file = tempfile::tempfile().unwrap();
        file.set_len(len as u64).unwrap();
        // SAFETY: a file of our own, unlinked, not written any more.
        let mut mapping = unsafe { Mapping::open_copy_on_write(&file, len) }.unwrap();
        for at in [PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 4] {
            mapping.try_as_bytes_mut().unwrap()[at] = 1;
        }
        let base = mapping.as_bytes().as_ptr();
        let found = pages(base, len).unwrap();
        let expected = [PIECE - page..PIECE + page, 2 * PIECE - page..2 * PIECE + page];
        assert_eq!(found, expected.map(|run| base.addr() + run.start..base.addr() + run.end));
    }
}
