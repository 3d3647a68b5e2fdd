//! What /proc/PID/maps and smaps say of a process's mappings (proc(5)), line by line. Pure.

use serde::Serialize;
use std::io::{self, BufRead, Read as _};
use std::ops::AddAssign;

/// A file as these tables name it. Not always what stat(2) says: btrfs and overlays have devices of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Id {
    pub(super) major: u64,
    pub(super) minor: u64,
    pub(super) inode: u64,
}

/// The line that a mapping starts with; its path, which may hold anything, comes behind and is not looked at.
///
/// ```text
/// 7f0c2c000000-7f0c2c021000 r--s 00000000 fe:00 247282        /models/a b.safetensors (deleted)
/// └ start      └ end        │    └ offset └ major:minor inode, both of 0 where there is no file
///                           └ permissions
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heading {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) id: Id,
}

impl Heading {
    /// `None` for a line of another kind.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|&byte| byte == b' ').filter(|word| !word.is_empty());
        let mut word = || std::str::from_utf8(words.next()?).ok();
        let (start, end) = word()?.split_once('-')?;
        let (_permissions, _offset) = (word()?, word()?);
        let (major, minor) = word()?.split_once(':')?;
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            id: Id { major: hex(major)?, minor: hex(minor)?, inode: word()?.trim_end().parse().ok()? },
        })
    }
}

/// Sums over mappings, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(super) struct Usage {
    pub(super) mappings: u64,
    /// Mapped, in memory or not.
    pub(super) size: u64,
    /// In this process's page tables.
    pub(super) rss: u64,
    /// The same, each page divided by the number of processes that have it.
    pub(super) pss: u64,
    /// Of `rss`, what other processes have too.
    pub(super) shared: u64,
    /// Of `rss`, what only this process has, as it is in the file.
    pub(super) private_clean: u64,
    /// Of `rss`, what only this process has, and changed.
    pub(super) private_dirty: u64,
    pub(super) swap: u64,
    pub(super) locked: u64,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        for (sum, part) in self.fields_mut().into_iter().zip(other.fields()) {
            *sum = sum.saturating_add(part);
        }
    }
}

impl Usage {
    fn fields(&self) -> [u64; 9] {
        let Self { mappings, size, rss, pss, shared, private_clean, private_dirty, swap, locked } = *self;
        [mappings, size, rss, pss, shared, private_clean, private_dirty, swap, locked]
    }

    fn fields_mut(&mut self) -> [&mut u64; 9] {
        let Self { mappings, size, rss, pss, shared, private_clean, private_dirty, swap, locked } = self;
        [mappings, size, rss, pss, shared, private_clean, private_dirty, swap, locked]
    }

    /// Takes in a line such as `Private_Dirty:         12 kB`; others say nothing here.
    fn note(&mut self, line: &[u8]) {
        let Some((key, value)) = std::str::from_utf8(line).ok().and_then(|line| line.split_once(':')) else {
            return;
        };
        let sum = match key {
            "Size" => &mut self.size,
            "Rss" => &mut self.rss,
            "Pss" => &mut self.pss,
            "Shared_Clean" | "Shared_Dirty" => &mut self.shared,
            "Private_Clean" => &mut self.private_clean,
            "Private_Dirty" => &mut self.private_dirty,
            "Swap" => &mut self.swap,
            "Locked" => &mut self.locked,
            _ => return,
        };
        let kib = value.trim().strip_suffix(" kB").and_then(|kib| kib.trim().parse::<u64>().ok());
        *sum = sum.saturating_add(kib.unwrap_or(0).saturating_mul(1024));
    }
}

/// The lines of a table, without their ends. The rest of a line that is longer than paths are is skipped.
fn each_line(table: &mut impl BufRead, mut told: impl FnMut(&[u8])) -> io::Result<()> {
    const LONGEST: u64 = 1 << 16;
    let mut line = Vec::new();
    loop {
        line.clear();
        if table.by_ref().take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else {
            table.skip_until(b'\n')?;
        }
        told(&line);
    }
}

/// Tells of every mapping in a table of either kind.
pub(super) fn each_mapping(table: &mut impl BufRead, mut told: impl FnMut(&Heading)) -> io::Result<()> {
    each_line(table, |line| {
        if let Some(header) = Heading::parse(line) {
            told(&header);
        }
    })
}

/// Tells what smaps says of each mapping of a file that is `wanted`.
pub(super) fn each_usage(
    smaps: &mut impl BufRead,
    wanted: impl Fn(Id) -> bool,
    mut told: impl FnMut(Id, Usage),
) -> io::Result<()> {
    let mut current: Option<(Id, Usage)> = None;
    each_line(smaps, |line| {
        if let Some(header) = Heading::parse(line) {
            let next = wanted(header.id).then(|| (header.id, Usage { mappings: 1, ..Usage::default() }));
            if let Some((id, usage)) = std::mem::replace(&mut current, next) {
                told(id, usage);
            }
        } else if let Some((_, usage)) = &mut current {
            usage.note(line);
        }
    })?;
    if let Some((id, usage)) = current {
        told(id, usage);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
56262631f000-562626321000 r--p 00000000 fe:00 247282                     /usr/bin/head
Size:                  8 kB
Rss:                   8 kB
7f0c2c000000-7f0c2c021000 rw-p 00001000 103:0a 42                        /m/a b:c 1-2.safetensors (deleted)
Size:                132 kB
KernelPageSize:        4 kB
Rss:                  64 kB
Pss:                  22 kB
Pss_Dirty:             7 kB
Shared_Clean:         40 kB
Shared_Dirty:          4 kB
Private_Clean:         8 kB
Private_Dirty:        12 kB
Swap:                  3 kB
SwapPss:               1 kB
Locked:                2 kB
VmFlags: rd mr mw me
7f0c2c021000-7f0c2c022000 r--p 00000000 103:0a 42                        /m/two\\012lines
Size:                  4 kB
Rss:                   4 kB
Pss:                   4 kB
Private_Clean:         4 kB
7ffd0a000000-7ffd0a021000 rw-p 00000000 00:00 0                          [stack]
Rss:                  99 kB
7ffd0a0fd000-7ffd0a101000 r--p 00000000 00:00 0
Rss:                  99 kB";

    const FILE: Id = Id { major: 0x103, minor: 0xa, inode: 42 };

    #[test]
    fn a_mapping_is_known_by_device_and_inode_whatever_its_path() {
        for (line, id) in [
            (&b"1000-2000 r--s 00000000 fe:00 247282 /a b (deleted)"[..], Some((0xfe, 0, 247_282))),
            (b"1000-2000 r--s 00000000 08:1f 7     /1000-2000 r--s 00000000 fe:00 9", Some((8, 0x1f, 7))),
            (b"1000-2000 rw-p 00000000 00:00 0", Some((0, 0, 0))),
            (b"1000-2000 rw-p 00000000 00:00 0 ", Some((0, 0, 0))),
            (b"1000-2000 r--p ffffffff000 00:2a 18446744073709551615 /\xff\xfe", Some((0, 0x2a, u64::MAX))),
            (b"1000-2000 r--p 00000000 00:2a 5 /two\\012lines", Some((0, 0x2a, 5))),
            (b"Size:                  8 kB", None),
            (b"VmFlags: rd mr mw me", None),
            (b"", None),
            (b"1000-2000", None),
            (b"1000-2000 r--p 0 0", None),
            (b"1000-2000 r--p 0 0:0 x", None),
            (b"\xff\xff-2000 r--p 0 0:0 1", None),
        ] {
            let found = Heading::parse(line).map(|h| (h.id.major, h.id.minor, h.id.inode));
            assert_eq!(found, id, "{}", line.escape_ascii());
        }
        let header = Heading::parse(b"7f0c2c000000-7f0c2c021000 r--s 00000000 fe:00 1 /x").unwrap();
        assert_eq!((header.start, header.end), (0x7f0c_2c00_0000, 0x7f0c_2c02_1000));
    }

    #[test]
    fn what_is_wanted_is_summed_and_nothing_else() {
        let mut sum = Usage::default();
        let mut told = 0;
        each_usage(
            &mut SMAPS.as_bytes(),
            |id| id == FILE,
            |id, usage| {
                assert_eq!(id, FILE);
                told += 1;
                sum += usage;
            },
        )
        .unwrap();
        let kib = [136, 68, 26, 44, 12, 12, 3, 2].map(|kib| kib * 1024);
        assert_eq!((told, sum.mappings), (2, 2));
        assert_eq!(sum.fields()[1..], kib);
    }

    #[test]
    fn the_last_mapping_counts_and_an_unfinished_table_is_no_error() {
        let cut = SMAPS.find("Pss_Dirty").unwrap() + 3;
        let mut seen = Vec::new();
        each_usage(&mut &SMAPS.as_bytes()[..cut], |id| id == FILE, |_, usage| seen.push(usage.pss)).unwrap();
        assert_eq!(seen, [22 * 1024]);
        let mut ends = Vec::new();
        each_mapping(&mut SMAPS.as_bytes(), |header| ends.push(header.end)).unwrap();
        assert_eq!(ends.len(), 5);
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let endless = io::repeat(b'x').take(64 << 20);
        let text = b"\nRss: 4 kB\n1000-2000 r--s 00000000 103:0a 42 /".as_slice();
        let after = b"\nRss: 8 kB\n".as_slice();
        let path = io::repeat(b'/').take(1 << 20);
        let mut table = io::BufReader::new(endless.chain(text).chain(path).chain(after));
        let mut seen = Vec::new();
        let mut longest = 0;
        each_line(&mut table, |line| {
            longest = longest.max(line.len());
            seen.push(Heading::parse(line).map(|header| header.id));
        })
        .unwrap();
        assert_eq!(seen, [None, None, Some(FILE), None]);
        assert!(longest <= 1 << 16);
    }
}
