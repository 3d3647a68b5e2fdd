//! A file, or a part of one.

use super::{Bytes, READING, checked_len, not_utf8};
use crate::error::{Error, Result};
use crate::layout::Text;
use crate::map::{StableFile, Window};
use crate::os::read_exact_at;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

/// A part of a file, perhaps all of it.
pub(crate) struct FileBytes<'f> {
    file: &'f File,
    /// The same file, where it may be mapped.
    stable: Option<StableFile<'f>>,
    path: &'f Path,
    window: Window,
}

impl<'f> FileBytes<'f> {
    /// What is read is copied.
    pub(crate) fn new(file: &'f File, path: &'f Path, window: Window) -> Self {
        Self { file, stable: None, path, window }
    }

    /// Long text is mapped where it lies: most of what opening many tensors cost was memory to copy it to.
    pub(crate) fn stable(stable: StableFile<'f>, path: &'f Path, window: Window) -> Self {
        Self { file: stable.file(), stable: Some(stable), path, window }
    }

    /// Where a range of these bytes is in the file.
    fn part(&self, range: &Range<u64>) -> Result<Window> {
        let len = checked_len(self, range)?;
        Ok(Window { offset: self.window.offset + range.start, len })
    }
}

impl Bytes for FileBytes<'_> {
    fn len(&self) -> u64 {
        self.window.len as u64
    }

    fn path(&self) -> &Path {
        self.path
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let part = self.part(&(offset..offset.saturating_add(to.len() as u64)))?;
        self.file.read_exact_at(to, part.offset).map_err(Error::io(self.path, READING))
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let part = self.part(&range)?;
        read_exact_at(self.file, self.path, part.offset, part.len)
    }

    fn text(&self, range: Range<u64>) -> Result<Text> {
        const LONG: usize = 256 << 10;
        let part = self.part(&range)?;
        let not_utf8 = |error| not_utf8(error, self.path, range.start);
        if let Some(stable) = self.stable.filter(|_| part.len >= LONG) {
            let text = stable.text(part).map_err(Error::io(self.path, "mapping the header"))?;
            return Ok(Text::Held(Arc::new(text.map_err(not_utf8)?)));
        }
        let text = String::from_utf8(read_exact_at(self.file, self.path, part.offset, part.len)?);
        text.map(Text::Owned).map_err(|error| not_utf8(error.utf8_error()))
    }
}
