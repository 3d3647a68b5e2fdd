//! An output made ready before it is needed.

use super::draft::map_output;
use crate::error::{Error, Result};
use crate::format::safetensors;
use crate::layout::Layout;
use crate::map::Mapping;
use crate::os::disk::Dir;
use crate::save::{Draft, DraftOptions, Pending, checksum};
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

/// A file without a name yet, its blocks allocated and its pages in memory, so that saving into it is
/// copying and nothing else: new, or a checkpoint that nobody has any more.
pub(crate) struct Slot {
    memory: Mapping,
    recycled: bool,
    // Declared last: the mapping goes before the file does.
    pending: Pending,
}

impl Slot {
    /// A new file of `len` bytes in a directory, whose path is for errors. `None` where the file system cannot allocate
    /// ahead.
    pub(crate) fn fresh(dir: &Arc<Dir>, directory: &Path, len: u64) -> Result<Option<Self>> {
        let Some(slot) = Self::new(Pending::unnamed(dir, directory)?, len, false)? else { return Ok(None) };
        // Blocks are given zeroed pages now, which is most of what writing a new file costs.
        let populated = slot.memory.populate_write();
        populated.map_err(Error::io(slot.pending.path(), "bringing its pages into memory"))?;
        Ok(Some(slot))
    }

    /// Out of a file that was [hidden](crate::os::ExclusiveFile::hide), which is gone afterwards. `None` where somebody
    /// still has it, or its pages have left memory: writing a part of a page that is not there would read it first.
    #[cfg(target_os = "linux")]
    pub(crate) fn recycle(
        dir: &Arc<Dir>,
        directory: &Path,
        hidden: &OsStr,
        len: u64,
    ) -> Result<Option<Self>> {
        let Some(pending) = Pending::adopt(dir, directory, hidden)? else { return Ok(None) };
        let slot = Self::new(pending, len, true)?;
        // Its pages are not touched here: that would make them dirty, and have old content written out.
        Ok(slot.filter(|slot| {
            let pages = slot.memory.residency(0..slot.memory.len());
            pages.is_ok_and(|pages| pages.resident >= pages.pages - pages.pages / 16)
        }))
    }

    fn new(pending: Pending, len: u64, recycled: bool) -> Result<Option<Self>> {
        let io = |action| Error::io(pending.path(), action);
        if !pending.file().resize(len).map_err(io("allocating space for it"))? {
            return Ok(None);
        }
        let memory = map_output(&pending, len)?;
        Ok(Some(Self { memory, recycled, pending }))
    }

    pub(crate) fn is_recycled(&self) -> bool {
        self.recycled
    }

    /// A draft in it, of a file at `path` in the same directory. `None` where somebody waits for the file
    /// that this was, or has removed it.
    pub(crate) fn draft(
        mut self,
        path: &Path,
        layout: &Layout,
        options: &DraftOptions,
    ) -> Result<Option<Draft>> {
        if self.recycled && !self.pending.file().is_undisputed() {
            return Ok(None);
        }
        if !self.pending.is_in_place() {
            return Ok(None);
        }
        let declared = checksum::declare(layout, options.wants_checksums());
        let (header, layout) = safetensors::encode(declared.as_ref().unwrap_or(layout), path)?;
        self.pending.aim(path)?;
        if let Some(mode) = options.wanted_mode() {
            self.pending.set_mode(mode);
        }
        let len = layout.file_len();
        if self.memory.len() as u64 != len {
            // Its pages stay in memory; only the table of them is made anew.
            drop(self.memory);
            let resized = self.pending.file().resize(len);
            resized.map_err(Error::io(path, "allocating space for it"))?;
            self.memory = map_output(&self.pending, len)?;
        }
        if self.recycled && !self.pending.file().is_overwritten_in_place() {
            let populated = self.memory.populate_write();
            populated.map_err(Error::io(path, "allocating space for it"))?;
        }
        Ok(Some(Draft::within(&header, layout, self.memory, options, self.pending)))
    }
}
