//! The files of a model, watched: see [`OpenOptions::guard`](super::OpenOptions::guard).

use crate::error::Result;
use crate::layout::Catalog;
use crate::os::Guard;
use std::io;
use std::path::Path;

/// A guard for each shard.
#[derive(Debug)]
pub(crate) struct Guards(Vec<Guard>);

impl Guards {
    pub(crate) fn new(guards: Vec<Guard>) -> Self {
        Self(guards)
    }

    /// # Errors
    /// [`Error::Changed`](crate::Error::Changed), [`Error::Io`](crate::Error::Io).
    pub(crate) fn check(&self, catalog: &Catalog) -> Result<()> {
        catalog.shards().iter().zip(&self.0).try_for_each(|(shard, guard)| guard.check(&shard.path))
    }

    /// See [`Guard::hand_out`].
    pub(crate) fn hand_out(
        &self,
        shard: usize,
        path: &Path,
        read: impl FnOnce() -> io::Result<()>,
    ) -> Result<()> {
        self.0.get(shard).map_or(Ok(()), |guard| guard.hand_out(path, read))
    }
}
