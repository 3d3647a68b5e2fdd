//! Memory as it is now, next to what it was.

use super::{Backing, Mapping, RawSlice};
use std::io;
use std::ops::Range;

/// Device and inode.
pub(super) type Identity = (u64, u64);

/// Bytes as they are now, and what the kernel remembers of how they were: of Rust's memory and of
/// Python's.
pub(crate) trait Memory: Sync {
    /// All bytes, as they are now.
    fn now(&self) -> RawSlice<'_>;

    /// The file's own bytes, where there is a file and they are still reachable.
    fn base(&self) -> Option<RawSlice<'_>>;

    /// Whether the bytes can differ from the file's.
    fn backing(&self) -> Backing;

    /// Where in its page the first byte lies.
    fn in_page(&self) -> usize;

    /// The file that is mapped, by device and inode, and which bytes of a file these are or were.
    fn in_file(&self) -> Option<(Option<Identity>, Range<u64>)>;

    /// The pages of a part that became this process's own, as ranges of bytes.
    fn private(&self, part: Range<usize>) -> io::Result<Vec<Range<usize>>>;
}

impl Memory for Mapping {
    fn now(&self) -> RawSlice<'_> {
        RawSlice::from(self.as_bytes())
    }

    fn base(&self) -> Option<RawSlice<'_>> {
        match (self.backing, &self.base) {
            (_, Some(base)) => Some(base.now()),
            (Backing::ReadOnly, None) => Some(self.now()),
            _ => None,
        }
    }

    fn backing(&self) -> Backing {
        self.backing
    }

    fn in_file(&self) -> Option<(Option<Identity>, Range<u64>)> {
        Some((self.identity, self.offset..self.offset + self.len as u64))
    }

    fn in_page(&self) -> usize {
        self.ptr().addr() % rustix::param::page_size()
    }

    fn private(&self, part: Range<usize>) -> io::Result<Vec<Range<usize>>> {
        self.check(&part)?;
        let start = self.ptr().addr();
        let pages = super::writable::private(self.backing, self.writable.as_deref(), self.ptr(), &part)?;
        // The first and the last page may reach beyond the bytes.
        let within = |p: Range<usize>| p.start.saturating_sub(start)..(p.end - start).min(self.len);
        Ok(pages.into_iter().map(within).collect())
    }
}
