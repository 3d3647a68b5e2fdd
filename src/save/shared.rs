//! A file being made whose memory another language has as well.

use super::{Draft, Pending, Target, checksum, fill};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::map::{RawSlice, SharedMemory};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A [`Draft`] whose memory is shared: arrays of another language may lie in it, during the commit and afterwards.
pub(crate) struct SharedDraft {
    layout: Layout,
    memory: Arc<SharedMemory>,
    mapped: bool,
    durable: bool,
    path: PathBuf,
    // Declared last: the mapping goes before the file does.
    pending: Pending,
}

impl SharedDraft {
    /// # Errors
    /// [`Error::Io`] where memory for an unmapped draft cannot be had; [`Error::Argument`] in a fork's child.
    pub(crate) fn new(draft: Draft) -> Result<Self> {
        let path = draft.path().to_owned();
        let (layout, memory, mapped, durable, pending) = draft.into_parts()?;
        let memory = Arc::new(SharedMemory::of(Arc::new(memory)));
        Ok(Self { layout, memory, mapped, durable, path, pending })
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// As [`Draft::is_mapped`].
    pub(crate) fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// As [`Draft::commit`]. What is written to the memory from now on does not reach the file.
    ///
    /// # Errors
    /// As [`Draft::commit`].
    pub(crate) fn commit(self) -> Result<()> {
        let Self { layout, memory, mapped, durable, path, pending } = self;
        if mapped {
            // Before the sync: what is written later must not reach a file others may have mapped.
            let detached = memory.detach(pending.file().file());
            detached.map_err(Error::io(&path, "detaching the new file from memory"))?;
        } else {
            let data = layout.data_range();
            let source: RawSlice<'_> = memory.source(&data);
            fill(Target::File(pending.file()), vec![(data.start, source)], &|_| ())
                .map_err(Error::io(&path, "writing tensor data"))?;
        }
        checksum::seal(&layout, pending.file(), &path)?;
        pending.publish_model(durable)
    }
}
