//! Where a file's bytes come from. A format reads through [`Bytes`] and knows nothing else of them: they may be a file,
//! a part of one, or memory.

mod file;
mod head;
mod memory;

pub(crate) use file::FileBytes;
pub(crate) use head::Head;

use crate::error::{Error, Result};
use crate::layout::Text;
use std::ops::Range;
use std::path::Path;

/// Bytes that are read in pieces, by their place. They stay as they are while they are read.
pub(crate) trait Bytes: Send + Sync {
    /// How many there are.
    fn len(&self) -> u64;

    /// What errors call them; empty for memory.
    fn path(&self) -> &Path;

    /// Fills `to` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Truncated`] where they end before, [`Error::Io`].
    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<()>;

    /// The bytes of a range.
    ///
    /// # Errors
    /// As [`Bytes::read_at`]. Nothing is allocated for bytes that are not there.
    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let len = checked_len(self, &range)?;
        let mut bytes = Vec::new();
        let allocated = bytes.try_reserve_exact(len);
        allocated.map_err(|_| Error::io(self.path(), READING)(std::io::ErrorKind::OutOfMemory.into()))?;
        bytes.resize(len, 0);
        self.read_at(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// The text in a range: where it lies, if these bytes can be mapped and it is long; otherwise a copy.
    ///
    /// # Errors
    /// As [`Bytes::read_at`]; [`Error::Utf8`].
    fn text(&self, range: Range<u64>) -> Result<Text> {
        let start = range.start;
        let text = String::from_utf8(self.read(range)?);
        text.map(Text::Owned).map_err(|error| not_utf8(error.utf8_error(), self.path(), start))
    }
}

/// What errors say was being done.
const READING: &str = "reading the header";

/// The length of a range of these bytes.
///
/// # Errors
/// [`Error::Truncated`] where the range ends behind them, or before it begins.
fn checked_len(bytes: &(impl Bytes + ?Sized), range: &Range<u64>) -> Result<usize> {
    let (found, expected) = (bytes.len(), range.end.max(range.start));
    let len = range.end.checked_sub(range.start).and_then(|len| usize::try_from(len).ok());
    len.filter(|_| expected <= found).ok_or_else(|| Error::Truncated {
        path: bytes.path().into(),
        found,
        expected,
    })
}

/// The error of text at `start` that is not UTF-8.
fn not_utf8(error: std::str::Utf8Error, path: &Path, start: u64) -> Error {
    Error::Utf8 { path: path.into(), offset: start + error.valid_up_to() as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::Window;
    use std::fs::File;

    /// A file with `bytes` between others, and the window that they are.
    fn inside(bytes: &[u8]) -> (File, Window) {
        let file = tempfile::tempfile().unwrap();
        let around = [&[0xff; 100], bytes, &[0xff; 100]].concat();
        std::os::unix::fs::FileExt::write_all_at(&file, &around, 0).unwrap();
        (file, Window { offset: 100, len: bytes.len() })
    }

    /// What `check` says of the same bytes, by each way to have them.
    fn every_way(bytes: &[u8], check: impl Fn(&dyn Bytes)) {
        let path = Path::new("");
        check(&bytes);
        let (file, window) = inside(bytes);
        check(&FileBytes::new(&file, path, window));
        check(&FileBytes::stable(crate::map::own_stable_file(&file), path, window));
        check(&Head::of(&bytes).unwrap());
    }

    #[test]
    fn the_same_bytes_are_read_from_wherever_they_are() {
        // No part is like another.
        let text = (0..120_000).map(|i| format!("{i:07}aé")).collect::<Vec<_>>().concat();
        every_way(text.as_bytes(), |bytes| {
            let len = text.len() as u64;
            assert_eq!(bytes.len(), len);
            for range in [0..0, 0..3, 3..8, 600..1200, len - 3..len, 0..len, len..len] {
                let (start, end) =
                    (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
                assert_eq!(bytes.read(range.clone()).unwrap(), text.as_bytes()[start..end], "{range:?}");
                assert_eq!(bytes.text(range.clone()).unwrap().as_str(), &text[start..end], "{range:?}");
                let mut read = vec![0; end - start];
                bytes.read_at(range.start, &mut read).unwrap();
                assert_eq!(read, text.as_bytes()[start..end], "{range:?}");
            }
        });
    }

    #[test]
    fn bytes_that_are_not_there_are_an_error_and_no_allocation() {
        every_way(&[b'x'; 1000], |bytes| {
            #[allow(clippy::reversed_empty_ranges)]
            for range in [0..1001, 1000..1001, 2000..2001, 0..u64::MAX, u64::MAX - 1..u64::MAX, 9..3, 2000..1]
            {
                assert_eq!(bytes.read(range.clone()).unwrap_err().kind().name(), "Truncated", "{range:?}");
                assert_eq!(bytes.text(range.clone()).err().unwrap().kind().name(), "Truncated", "{range:?}");
            }
            for offset in [998, 1000, 1001, u64::MAX] {
                assert_eq!(
                    bytes.read_at(offset, &mut [0; 3]).unwrap_err().kind().name(),
                    "Truncated",
                    "{offset}"
                );
            }
        });
    }

    #[test]
    fn what_is_no_text_says_where_in_the_file() {
        let mut long = vec![b'x'; 600_000];
        long[599_990] = 0xff;
        for bytes in [b"abcdef\xff".to_vec(), long] {
            let at = bytes.iter().position(|&b| b == 0xff).unwrap() as u64;
            every_way(&bytes, |source| {
                let error = source.text(2..source.len()).err().unwrap();
                assert!(matches!(error, Error::Utf8 { offset, .. } if offset == at), "{error}");
            });
        }
    }

    #[test]
    fn a_file_that_has_shrunk_is_an_error() {
        let (file, window) = inside(&vec![b'x'; 600_000]);
        file.set_len(1000).unwrap();
        let bytes = FileBytes::new(&file, Path::new("f"), window);
        assert_eq!(bytes.read(0..2000).unwrap_err().kind().name(), "Io");
        assert_eq!(bytes.read_at(0, &mut [0; 2000]).unwrap_err().kind().name(), "Io");
    }
}
