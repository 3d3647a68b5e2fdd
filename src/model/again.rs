//! Looking again, where a save replaces a model's files while they are being opened.
//!
//! A save makes the new files visible before the old ones go, so whoever has read an old index, or listed the
//! directory before, may find a file gone that it named. The index that is there now names others, which are. What
//! is named still, and is not there, is missing.

use super::Location;
use crate::error::{Error, Result};
use crate::work::Patience;
use std::path::Path;

/// How often a directory is listed again in which there seems to be no model, or several.
const LISTINGS: u32 = 3;

/// Finds the files that `path` stands for, and remembers it; again if what a directory had listed is gone, or if it had
/// listed what a save was just changing: a listing may have the old names of some files and the new ones of others.
pub(super) fn find(path: &Path, look: impl Fn(&Path) -> Result<Location>) -> Result<Location> {
    let (mut patience, mut listings) = (Patience::new(), 0);
    loop {
        match look(path) {
            Ok(found) => return Ok(Location { found_by: Some(path.into()), ..found }),
            Err(error) if error.is_not_found() && path.is_dir() && patience.again() => {}
            Err(Error::NotRegular { .. }) if listings < LISTINGS && path.is_dir() => listings += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Opens the files of a location; others if a save has put others in their stead meanwhile.
pub(super) fn open<T>(location: &Location, open: impl Fn(&Location) -> Result<T>) -> Result<T> {
    let mut patience = Patience::new();
    let mut now = None;
    loop {
        let location = now.as_ref().unwrap_or(location);
        let done = open(location);
        // Shards go, and others may get their names, only once their index is another or gone. As long as it is the
        // one that was read, all that was opened is of one set.
        let is_replaced = location.is_replaced();
        let is_in_doubt = is_replaced || done.as_ref().is_err_and(Error::is_not_found);
        let Some(path) = location.found_by.as_ref().filter(|_| is_in_doubt) else { return done };
        let found = super::locate(path)?;
        // A directory had listed it just now: it has come back, or gone again. A link to nothing stays one.
        let is_back =
            found.index.is_none() && path.is_dir() && !found.files.iter().any(|file| file.is_symlink());
        if !is_replaced && !is_back && found.files == location.files {
            return done;
        }
        if !patience.again() {
            let what = "it is being replaced, faster than it can be opened".into();
            return done.and_then(|_| Err(Error::Busy { path: path.clone(), what }));
        }
        now = Some(found);
    }
}
