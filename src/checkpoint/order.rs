//! In which order checkpoints were saved.
//!
//! Each carries a number in its metadata, one above all that are there: `maptensors.sequence`. It becomes visible and
//! durable with the checkpoint itself, and goes with it wherever it is copied. A file's time would not do: copying,
//! editing a header and a clock that is set back change it, and file systems count it in steps of up to two seconds.
//! A step would not either: a new run in an old directory begins with low ones.
//!
//! What carries no number (it is of an older version, or another program's) was there before, in the order of steps.

use crate::error::Result;
use crate::format::index::MAX_INDEX_LEN;
use crate::format::safetensors::{MAX_HEADER_LEN, PREFIX_LEN};
use crate::os::disk::Dir;
use crate::os::{open_regular_in, read_exact_at};
use memchr::memmem;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The metadata entry.
pub(super) const KEY: &str = "maptensors.sequence";

/// Where a checkpoint stands among the others, in rising order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// Its number; 0 if it carries none.
    Number(u64),
    /// It is damaged. It may be the last: a caller that loads it is to be told, rather than get an older one.
    Damaged,
}

/// What has been read of files, as long as they stay as they are.
#[derive(Default)]
pub(super) struct Ranks {
    known: Mutex<HashMap<OsString, (Stamp, Rank)>>,
}

/// Inode, time of writing, length.
type Stamp = (u64, i64, i128, i64);

impl Ranks {
    /// The rank of a file or an index.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), [`Error::NotRegular`](crate::Error::NotRegular).
    pub(super) fn of(&self, dir: &Dir, name: &OsStr, path: &Path) -> Result<Rank> {
        let stamp = dir
            .stat(name)
            .ok()
            .map(|stat| (stat.st_ino, stat.st_mtime, i128::from(stat.st_mtime_nsec), stat.st_size));
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, rank)) = lock().get(name).filter(|(before, _)| Some(*before) == stamp) {
            return Ok(*rank);
        }
        let rank = read(dir, name, path)?;
        if let Some(stamp) = stamp {
            lock().insert(name.into(), (stamp, rank));
        }
        Ok(rank)
    }

    /// Forgets all but these names.
    pub(super) fn keep(&self, is_there: impl Fn(&OsStr) -> bool) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| is_there(name));
    }
}

/// Reads a file's header, or an index, as far as it takes.
fn read(dir: &Dir, name: &OsStr, path: &Path) -> Result<Rank> {
    /// Where metadata of ordinary length ends.
    const FIRST: u64 = 64 << 10;
    let (file, len) = open_regular_in(dir, name, path)?;
    let is_index = name.as_encoded_bytes().ends_with(b".json");
    let (start, end, limit) = if is_index {
        (0, len, MAX_INDEX_LEN)
    } else {
        let prefix = PREFIX_LEN as u64;
        if len < prefix {
            return Ok(Rank::Damaged);
        }
        let bytes = read_exact_at(&file, path, 0, PREFIX_LEN)?;
        let header = bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        (prefix, header.saturating_add(prefix), MAX_HEADER_LEN.saturating_add(prefix))
    };
    if end > len || end > limit {
        return Ok(Rank::Damaged);
    }
    for end in [end.min(start + FIRST), end] {
        let text = read_exact_at(&file, path, start, usize::try_from(end - start).unwrap_or_default())?;
        if text.trim_ascii_start().first() != Some(&b'{') {
            return Ok(Rank::Damaged);
        }
        if let Some(number) = number_in(&text) {
            return Ok(Rank::Number(number));
        }
    }
    Ok(Rank::Number(0))
}

/// The number in a header or an index, without parsing it: inside a JSON text, quotes have a backslash, so a name
/// that is followed by a colon is a name. A tensor of that name has an object, and no text.
fn number_in(json: &[u8]) -> Option<u64> {
    let name = format!("\"{KEY}\"");
    memmem::find_iter(json, &name).find_map(|at| {
        let rest = json[at + name.len()..].trim_ascii_start().strip_prefix(b":")?;
        let rest = rest.trim_ascii_start().strip_prefix(b"\"")?;
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let number = str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        (rest.get(digits) == Some(&b'"')).then_some(number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_where_it_is_metadata_and_nowhere_else() {
        for (json, expected) in [
            (r#"{"__metadata__":{"maptensors.sequence":"12"}}"#, Some(12)),
            (r#"{"metadata": {"maptensors.sequence" : "7" , "x": 1}}"#, Some(7)),
            (r#"{"__metadata__":{"a":"\"maptensors.sequence\":\"5\"","maptensors.sequence":"6"}}"#, Some(6)),
            (r#"{"maptensors.sequence":{"dtype":"U8"}}"#, None),
            (r#"{"__metadata__":{"maptensors.sequence":"x"}}"#, None),
            (r#"{"__metadata__":{"maptensors.sequence":"18446744073709551616"}}"#, None),
            (r#"{"__metadata__":{"maptensors.sequence":"18446744073709551615"}}"#, Some(u64::MAX)),
            (r#"{"__metadata__":{"maptensors.sequence":"3"#, None),
            (r#"{"__metadata__":{"x":"maptensors.sequence"}}"#, None),
        ] {
            assert_eq!(number_in(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn what_is_damaged_counts_as_the_last() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = Dir::open(temporary.path()).unwrap();
        let rank = |name: &str, bytes: &[u8]| {
            std::fs::write(temporary.path().join(name), bytes).unwrap();
            Ranks::default().of(&dir, name.as_ref(), Path::new(name)).unwrap()
        };
        for bytes in [&b""[..], b"\0\0\0", &[0; 100], &[255; 100], b"\x05\0\0\0\0\0\0\0abcde"] {
            assert_eq!(rank("m.safetensors", bytes), Rank::Damaged, "{bytes:?}");
        }
        assert_eq!(rank("m.safetensors", b"\x02\0\0\0\0\0\0\0{}"), Rank::Number(0));
        assert_eq!(rank("m.safetensors.index.json", b"not JSON"), Rank::Damaged);
        let long = format!("{{\"x\":\"{}\",\"{KEY}\":\"9\"}}", "x".repeat(100_000));
        assert_eq!(rank("m.safetensors.index.json", long.as_bytes()), Rank::Number(9));
        assert!(Rank::Damaged > Rank::Number(u64::MAX));
    }
}
