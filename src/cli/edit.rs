//! `maptensors edit`.

use crate::error::printable;
use crate::{Edited, HeaderEdit};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;

/// Which files to change, and what.
pub(super) struct Edit {
    pub(super) paths: Vec<PathBuf>,
    pub(super) changes: HeaderEdit,
}

impl Edit {
    /// Changes one file after the other; the first that cannot be changed ends it.
    pub(super) fn run(&self, out: &mut impl Write) -> Result<(), Box<dyn Error>> {
        for path in &self.paths {
            let how = match self.changes.apply(path)? {
                Edited::InPlace => "edited in place",
                Edited::Rewritten => "written anew",
                Edited::Unchanged => "unchanged",
            };
            writeln!(out, "{}: {how}", printable(&path.to_string_lossy()))?;
        }
        Ok(())
    }
}
