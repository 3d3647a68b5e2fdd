//! How much of a file is in memory, asked without touching it.

use super::residency::may_ask;
use crate::os::open_regular;
use memmap2::{Mmap, MmapOptions};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// What the page cache holds of a file: a photograph, in stretches that each are in memory, or not, or in
/// part. However long the file, it takes only so many questions and so much memory.
pub(crate) struct Cached {
    /// Where each stretch starts, and the bytes in memory before it; last the file's length, and all of them.
    // INVARIANT: neither ever decreases; the first is (0, 0).
    marks: Vec<(u64, u64)>,
}

/// So many questions are asked of a file, at most.
const QUESTIONS: usize = 1 << 16;

impl Cached {
    /// Takes the photograph of a file of `len` bytes. `None` where the kernel will not tell: since 5.2 it
    /// tells only who owns a file or may write to it, and mincore(2) answers others that all is there.
    pub(crate) fn of(file: &File, len: u64) -> io::Result<Option<Self>> {
        let taken = if is_stacked(file)? { None } else { Some(Self::by_range(file, len, QUESTIONS)) };
        match taken {
            Some(Ok(cached)) => Ok(Some(cached)),
            Some(Err(error)) if !is_refusal(&error) => Err(error),
            // Pages elsewhere, too old a kernel, a sandbox; or nobody who may know.
            _ if may_ask(file)? => Self::by_page(file, len).map(Some),
            _ => Ok(None),
        }
    }

    /// With cachestat(2), which counts a stretch in one call. A mixed one is taken apart, the longest first,
    /// until questions run out: then as much of each part counts as does of the whole.
    fn by_range(file: &File, len: u64, questions: usize) -> io::Result<Self> {
        const PARTS: usize = 16;
        // Those that its parts would take, with those that wait.
        let runs_out = |asked: usize, waiting: usize| asked + waiting + PARTS > questions;
        let page = page_size();
        let mut size = page;
        while size < len {
            size = size.saturating_mul(PARTS as u64);
        }
        let mut found = Vec::new();
        let mut stretches = VecDeque::from([(0, size)]);
        let mut asked = 0;
        while let Some((start, size)) = stretches.pop_front() {
            if start >= len {
                continue;
            }
            let bytes = start..start.saturating_add(size).min(len);
            let resident = cachestat(file, &bytes)?;
            asked += 1;
            let pages = (bytes.end - bytes.start).div_ceil(page);
            if resident == 0 || resident >= pages || size <= page || runs_out(asked, stretches.len()) {
                found.push((start, share(bytes.end - bytes.start, resident, pages)));
            } else {
                let size = size / PARTS as u64;
                stretches.extend((0..PARTS as u64).map(|i| (start.saturating_add(i * size), size)));
            }
        }
        Ok(Self::new(found, len))
    }

    /// With mincore(2), a byte a page. In stretches of many pages only some are asked about.
    fn by_page(file: &File, len: u64) -> io::Result<Self> {
        /// Pages asked about in a long stretch, as many times as fit.
        const RUN: u64 = 8;
        if len == 0 {
            return Ok(Self::new(Vec::new(), len));
        }
        let page = page_size();
        let pages = Pages::map(file, len)?;
        let size = len.div_ceil(QUESTIONS as u64).next_multiple_of(page);
        let mut found = Vec::new();
        let mut start = 0;
        while start < len {
            let bytes = start..start.saturating_add(size).min(len);
            let all = (bytes.end - bytes.start).div_ceil(page);
            let (run, step) = if all <= Pages::MOST { (all, all) } else { (RUN, all / (Pages::MOST / RUN)) };
            let (mut resident, mut asked, mut at) = (0, 0, 0);
            while at < all && asked < Pages::MOST {
                let n = run.min(all - at);
                resident += pages.resident(start / page + at, n)?;
                asked += n;
                at += step;
            }
            found.push((start, share(bytes.end - bytes.start, resident, asked)));
            start = bytes.end;
        }
        Ok(Self::new(found, len))
    }

    /// From where each stretch starts, and how many bytes of it are in memory.
    fn new(mut found: Vec<(u64, u64)>, len: u64) -> Self {
        found.sort_unstable();
        let mut total = 0;
        let mut marks: Vec<(u64, u64)> = found
            .into_iter()
            .map(|(start, resident)| {
                let before = total;
                total += resident;
                (start, before)
            })
            .collect();
        marks.push((len, total));
        Self { marks }
    }

    /// Bytes of this range that are in memory; a part of a mixed stretch counts as its share of the bytes.
    pub(crate) fn bytes(&self, range: &Range<u64>) -> u64 {
        self.up_to(range.end).saturating_sub(self.up_to(range.start))
    }

    /// Bytes of the whole file that are in memory.
    pub(crate) fn total(&self) -> u64 {
        self.marks.last().map_or(0, |&(_, total)| total)
    }

    fn up_to(&self, at: u64) -> u64 {
        let next = self.marks.partition_point(|&(start, _)| start <= at);
        let Some((&(start, before), &(end, after))) =
            next.checked_sub(1).and_then(|i| self.marks.get(i)).zip(self.marks.get(next))
        else {
            return self.total();
        };
        before + share(after - before, at - start, end - start)
    }
}

/// So much of an amount as `part` is of `whole`.
fn share(amount: u64, part: u64, whole: u64) -> u64 {
    let whole = whole.max(1);
    let share = u128::from(amount) * u128::from(part.min(whole)) / u128::from(whole);
    u64::try_from(share).unwrap_or(amount)
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// Whether the file's pages may be those of another, in a file system below: cachestat(2) looks at the file
/// itself, and finds nothing; a mapping leads to the pages.
#[cfg(target_os = "linux")]
fn is_stacked(file: &File) -> io::Result<bool> {
    use rustix::fs::FsWord;
    // <linux/magic.h>. Containers have overlays; FUSE may pass through (since 6.9).
    const OVERLAYFS: FsWord = 0x794c_7630;
    const FUSE: FsWord = 0x6573_5546;
    let kind = rustix::fs::fstatfs(file)?.f_type;
    Ok([OVERLAYFS, FUSE].into_iter().any(|stacked| kind == stacked))
}

#[cfg(not(target_os = "linux"))]
fn is_stacked(_: &File) -> io::Result<bool> {
    Ok(false)
}

fn is_refusal(error: &io::Error) -> bool {
    [libc::ENOSYS, libc::EPERM, libc::EOPNOTSUPP].into_iter().any(|code| error.raw_os_error() == Some(code))
}

/// Pages of the file that are in memory and hold any of these bytes, which are not none.
#[cfg(target_os = "linux")]
fn cachestat(file: &File, bytes: &Range<u64>) -> io::Result<u64> {
    use std::os::fd::AsRawFd as _;
    // The same wherever numbers are shared; elsewhere (mips) it is nobody's, and answered with ENOSYS.
    // libc names it for some architectures only.
    const NUMBER: libc::c_long = 451;
    // <linux/mman.h>: struct cachestat_range (offset, length), and struct cachestat, of which the first is
    // nr_cache; dirty, in write-back, evicted and recently evicted follow.
    let range = [bytes.start, bytes.end - bytes.start];
    let mut found = [0u64; 5];
    // SAFETY: the kernel reads two words and writes five; that is what the pointers lead to.
    let answer = unsafe { libc::syscall(NUMBER, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0u32) };
    if answer == 0 { Ok(found[0]) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn cachestat(_: &File, _: &Range<u64>) -> io::Result<u64> {
    Err(io::Error::from_raw_os_error(libc::ENOSYS))
}

/// A file's pages, to ask about and never to touch.
struct Pages {
    // INVARIANT: no byte of it is looked at, so that no page comes in, and nobody's writes matter.
    map: Mmap,
}

impl Pages {
    /// The most that are asked about at once.
    const AT_ONCE: usize = 64;
    const MOST: u64 = Self::AT_ONCE as u64;

    fn map(file: &File, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: what the contract protects is the bytes, and none is looked at (field invariant).
        let map = unsafe { MmapOptions::new().len(len).map(file) }?;
        Ok(Self { map })
    }

    /// How many of `n` pages from the `first` on are in memory.
    fn resident(&self, first: u64, n: u64) -> io::Result<u64> {
        let page = rustix::param::page_size();
        let mut core = [0u8; Self::AT_ONCE];
        let n = usize::try_from(n.min(Self::MOST)).unwrap_or(0);
        let start = usize::try_from(first).ok().and_then(|first| first.checked_mul(page));
        let start = start.filter(|&start| start < self.map.len()).ok_or(io::ErrorKind::InvalidInput)?;
        let at = self.map.as_ptr().wrapping_add(start).cast_mut().cast();
        // SAFETY: mincore(2) reads no memory at `at` and writes one byte a page to `core`, which has room.
        let answer = unsafe { libc::mincore(at, n * page, core.as_mut_ptr().cast()) };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(core[..n].iter().filter(|&&byte| byte & 1 == 1).count() as u64)
    }
}

/// Photographs of the files that a path may stand for, taken before a model is opened: reading its header
/// brings pages in, and some behind it.
pub(crate) struct Album(HashMap<(u64, u64), Option<Cached>>);

impl Album {
    pub(crate) fn of(path: &Path) -> Self {
        let mut album = Self(HashMap::new());
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let dir = match path.parent() {
            _ if path.is_dir() => path,
            // The shards lie beside their index.
            Some(parent) if name.ends_with(".index.json") => parent,
            _ => {
                album.add(path);
                return album;
            }
        };
        let here = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        // What cannot be looked at now, opening the model will complain about.
        for entry in std::fs::read_dir(here).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().ends_with(b".safetensors") {
                album.add(&entry.path());
            }
        }
        album
    }

    fn add(&mut self, path: &Path) {
        if let Ok((id, cached)) = take(path) {
            self.0.insert(id, cached);
        }
    }

    /// The photograph of the file at `path`, or one taken now.
    pub(crate) fn find(&mut self, path: &Path) -> crate::Result<Option<Cached>> {
        let id = std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()));
        match id.ok().and_then(|id| self.0.remove(&id)) {
            Some(cached) => Ok(cached),
            None => take(path).map(|(_, cached)| cached),
        }
    }
}

fn take(path: &Path) -> crate::Result<((u64, u64), Option<Cached>)> {
    let asking = "asking what of it is in memory";
    let (file, len) = open_regular(path)?;
    let metadata = file.metadata().map_err(crate::Error::io(path, asking))?;
    let cached = Cached::of(&file, len).map_err(crate::Error::io(path, asking))?;
    Ok(((metadata.dev(), metadata.ino()), cached))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skipped;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    /// A new file of so many bytes beside this test binary: on a disk, not in a tmpfs.
    fn file(bytes: &[u8]) -> (File, tempfile::TempPath) {
        let dir = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let mut file = tempfile::NamedTempFile::new_in(dir).unwrap();
        file.write_all(bytes).unwrap();
        file.as_file().sync_all().unwrap();
        file.into_parts()
    }

    fn evict(file: &File, range: &Range<u64>) {
        let len = std::num::NonZero::new(range.end - range.start);
        rustix::fs::fadvise(file, range.start, len, rustix::fs::Advice::DontNeed).unwrap();
    }

    /// By page, as the kernel says.
    fn truth(file: &File, len: u64) -> Vec<bool> {
        let pages = Pages::map(file, len).unwrap();
        (0..len.div_ceil(page_size())).map(|page| pages.resident(page, 1).unwrap() == 1).collect()
    }

    #[test]
    fn both_ways_to_ask_agree_with_every_page_and_change_none() {
        let len = 5_000_123u64;
        let (file, _) = file(&vec![7; usize::try_from(len).unwrap()]);
        #[cfg(target_os = "linux")]
        if rustix::fs::fstatfs(&file).unwrap().f_type == 0x0102_1994 {
            return skipped(
                "both_ways_to_ask_agree_with_every_page_and_change_none",
                "nothing can be evicted from a tmpfs",
            );
        }
        // All of it, then holes of several sizes: at a start, in the middle, to the end; then nothing.
        for hole in [0..0, 0..4096, 400_000..480_000, 1 << 20..2 << 20, 4_500_000..len, 0..len] {
            if !hole.is_empty() {
                evict(&file, &hole);
            }
            let before = truth(&file, len);
            let taken = Cached::of(&file, len).unwrap().unwrap();
            let by_page = Cached::by_page(&file, len).unwrap();
            assert_eq!(truth(&file, len), before, "looking changed something");
            assert_eq!(taken.total(), by_page.total());
            for (i, &resident) in (0u64..).zip(&before) {
                let page = i * page_size()..((i + 1) * page_size()).min(len);
                let expected = if resident { page.end - page.start } else { 0 };
                for cached in [&taken, &by_page] {
                    assert_eq!(cached.bytes(&page), expected, "page {i} after {hole:?}");
                }
            }
        }
        assert_eq!(Cached::of(&file, len).unwrap().unwrap().total(), 0, "all of it was evicted");
    }

    #[test]
    fn a_terabyte_of_holes_takes_few_questions_either_way() {
        let (file, _) = file(&vec![7; 40_000]);
        let len = 1 << 40;
        if let Err(error) = file.set_len(len) {
            return skipped("a_terabyte_of_holes_takes_few_questions_either_way", error);
        }
        let cached = Cached::of(&file, len).unwrap().unwrap();
        assert_eq!((cached.bytes(&(0..40_960)), cached.total()), (40_960, 40_960));
        let by_page = Cached::by_page(&file, len).unwrap();
        assert!(by_page.marks.len() <= QUESTIONS + 1 && by_page.total() >= 32_768);
        assert_eq!(by_page.bytes(&(1 << 39..len)), 0);
    }

    #[test]
    fn where_questions_run_out_stretches_count_by_their_share() {
        const PAGES: u64 = 1 << 12;
        let (file, _) = file(&[]);
        let len = PAGES * page_size();
        file.set_len(len).unwrap();
        for page in (0..PAGES).step_by(2) {
            file.write_all_at(b"every other page", page * page_size()).unwrap();
        }
        let exact = truth(&file, len).iter().filter(|&&resident| resident).count() as u64 * page_size();
        assert!(exact >= len / 2 && exact < len, "{exact}");
        let cached = match Cached::by_range(&file, len, 300) {
            Err(error) if is_refusal(&error) => {
                return skipped("where_questions_run_out_stretches_count_by_their_share", error);
            }
            cached => cached.unwrap(),
        };
        assert!((200..=301).contains(&cached.marks.len()), "{}", cached.marks.len());
        assert_eq!(cached.total(), exact);
        assert_eq!(Cached::of(&file, len).unwrap().unwrap().total(), exact);
    }

    #[test]
    fn an_empty_file_has_nothing_in_memory() {
        let (file, _) = file(&[]);
        assert_eq!(Cached::of(&file, 0).unwrap().unwrap().total(), 0);
        assert_eq!(Cached::by_page(&file, 0).unwrap().bytes(&(0..10)), 0);
    }

    #[test]
    fn a_mixed_stretch_counts_by_its_share() {
        let cached = Cached::new(vec![(100, 50), (0, 100)], 300);
        assert_eq!(cached.marks, [(0, 0), (100, 100), (300, 150)]);
        assert_eq!(
            (cached.bytes(&(50..100)), cached.bytes(&(100..200)), cached.bytes(&(0..999))),
            (50, 25, 150)
        );
        assert_eq!(share(u64::MAX, u64::MAX - 1, u64::MAX), u64::MAX - 1);
    }
}
