//! Whose the files of a publication are, and who may have them.

use crate::error::{Error, Result, printable};
use crate::os::disk::{self, Dir};
use rustix::fs::{Gid, Uid};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct User {
    user: u32,
    group: u32,
}

impl User {
    /// Whom root publishes for, in a place that is another user's: made root's, the files would lock that user out.
    pub(super) fn of(dir: &Dir, control: &File) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let page = control.metadata().map(|page| Self { user: page.uid(), group: page.gid() }).ok();
        let place = || dir.stat(OsStr::new(".")).map(|dir| Self { user: dir.st_uid, group: dir.st_gid }).ok();
        page.filter(|page| page.user != 0).or_else(place).filter(|found| found.user != 0)
    }

    /// Gives that user a file.
    ///
    /// # Errors
    /// [`Error::Argument`] where even root cannot.
    pub(super) fn give(self, file: &File, path: &Path) -> Result<()> {
        if file.metadata().is_ok_and(|found| found.uid() == self.user) {
            return Ok(());
        }
        let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.group));
        rustix::fs::fchown(file, Some(user), Some(group)).map_err(|error| {
            Error::Argument(format!(
                "{} could not be given to user {} ({error}), whose place it is in, and who could not publish there any \
                 more: publish as that user, or to another place",
                printable(&path.to_string_lossy()),
                self.user
            ))
        })
    }
}

/// Gives a file that may be another user's a mode.
///
/// # Errors
/// [`Error::Argument`] where it is, and so only that user can; [`Error::Io`].
pub(super) fn set_mode(file: &File, path: &Path, mode: u32) -> Result<()> {
    disk::set_mode(file, mode).map_err(Error::io(path, "setting its mode"))?;
    let found = file.metadata().map_err(Error::io(path, "asking for its mode"))?;
    let is_ours = found.uid() == rustix::process::geteuid().as_raw();
    // One of ours that has another mode lies where there are no modes.
    if found.mode() & 0o777 == mode || is_ours {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "{} is user {}'s and has mode {:o}, and only that user can give it mode {mode:o}: publish as that user, or with \
         the permissions that it has",
        printable(&path.to_string_lossy()),
        found.uid(),
        found.mode() & 0o777,
    )))
}

/// For what may not be opened: whose it is, and the way out.
pub(super) fn told(dir: &Dir, name: &OsStr, error: Error) -> Error {
    let Error::Io { path, action, source } = error else { return error };
    let Ok(found) = dir.lstat(name).map(|stat| (stat.st_uid, stat.st_mode & 0o777)) else {
        return Error::Io { path, action, source };
    };
    if source.kind() != std::io::ErrorKind::PermissionDenied {
        return Error::Io { path, action, source };
    }
    let (user, mode) = found;
    let action = format!(
        "{action}: {} is user {user}'s and has mode {mode:o}; that user can publish for others with other permissions, \
         and that user or root can remove it",
        printable(&name.to_string_lossy())
    );
    Error::Io { path, action: action.into(), source }
}
