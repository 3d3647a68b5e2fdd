//! Whether a directory that is open still is where it was opened.

use super::disk::Dir;
use crate::error::{Error, Result, printable};
use rustix::io::Errno;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// When the names in a directory changed last, as far as its times tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Names {
    written: (i64, i64),
    changed: (i64, i64),
}

impl Dir {
    /// That the path this was opened by still leads to it. What is done in a directory that was moved reaches it where
    /// it is now, and not what its path names: what reports a path, or removes by one, asks first.
    ///
    /// A path that cannot be looked at (for want of permission, say) is taken to lead here.
    ///
    /// # Errors
    /// [`Error::Moved`], which ends with `advice`: what was done or not, and what to do.
    pub(crate) fn stands(&self, advice: &str) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let Ok(here) = rustix::fs::fstat(&self.fd) else { return Ok(()) };
        let there = match rustix::fs::stat(path) {
            Ok(there) if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino) => return Ok(()),
            Ok(_) => ", and another is here",
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => "",
            Err(_) => return Ok(()),
        };
        let now = self.now();
        let removed = here.st_nlink == 0 || now.as_ref().is_some_and(|now| now.ends_with(" (deleted)"));
        let what = match now {
            _ if removed => format!("the directory that was opened here was removed{there}: {advice}"),
            Some(now) => format!(
                "the directory that was opened here is {} now (it was moved, or a link points elsewhere){there}: {advice}",
                printable(&now)
            ),
            None => format!(
                "the directory that was opened here was moved, or a link points elsewhere{there}: {advice}"
            ),
        };
        Err(Error::Moved { path: path.clone(), what })
    }

    /// Where it is now, as the kernel has it.
    fn now(&self) -> Option<String> {
        use std::os::fd::AsRawFd as _;
        let link = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        std::fs::read_link(link).ok().map(|path| path.to_string_lossy().into_owned())
    }

    /// When its names changed last.
    pub(crate) fn names_changed(&self) -> Option<Names> {
        let stat = rustix::fs::fstat(&self.fd).ok()?;
        let time = |seconds: i64, nanoseconds| (seconds, i64::try_from(nanoseconds).unwrap_or_default());
        Some(Names {
            written: time(stat.st_mtime, stat.st_mtime_nsec),
            changed: time(stat.st_ctime, stat.st_ctime_nsec),
        })
    }

    /// Whether names may have changed since they were asked for when `before` was so: the times say so, or are too
    /// fresh to tell, for many kernels count them in steps of some milliseconds.
    pub(crate) fn may_have_changed(&self, before: Option<Names>) -> bool {
        /// Longer than any kernel's step.
        const STEP: Duration = Duration::from_millis(20);
        let (Some(before), Some(now)) = (before, self.names_changed()) else { return false };
        let (seconds, rest) = now.changed;
        let changed = u64::try_from(seconds).ok().zip(u32::try_from(rest).ok());
        let changed =
            changed.and_then(|(seconds, rest)| UNIX_EPOCH.checked_add(Duration::new(seconds, rest)));
        // Another machine's clock may be ahead: then it tells nothing.
        let age = changed.and_then(|changed| SystemTime::now().duration_since(changed).ok());
        before != now || age.is_some_and(|age| age < STEP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_directory_that_is_moved_removed_or_linked_away_does_not_stand() {
        let temporary = tempfile::tempdir().unwrap();
        let at = |name: &str| temporary.path().join(name);
        let moved = |dir: &Dir, expected: &str| {
            let error = dir.stands("do this").unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, Error::Moved { .. }) && text.contains(expected), "{text}");
            assert!(text.ends_with(": do this"), "{text}");
        };
        std::fs::create_dir(at("a")).unwrap();
        let dir = Dir::open(&at("a")).unwrap();
        dir.stands("").unwrap();
        std::fs::rename(at("a"), at("b")).unwrap();
        moved(&dir, &format!("is {} now", at("b").canonicalize().unwrap().display()));
        std::fs::create_dir(at("a")).unwrap();
        moved(&dir, "and another is here");
        std::fs::remove_dir(at("a")).unwrap();
        std::fs::rename(at("b"), at("a")).unwrap();
        dir.stands("").unwrap();
        std::fs::remove_dir(at("a")).unwrap();
        moved(&dir, "was removed: do this");

        std::fs::create_dir(at("one")).unwrap();
        std::fs::create_dir(at("two")).unwrap();
        symlink("one", at("link")).unwrap();
        let dir = Dir::open(&at("link")).unwrap();
        dir.stands("").unwrap();
        std::fs::remove_file(at("link")).unwrap();
        symlink("two", at("link")).unwrap();
        moved(&dir, "a link points elsewhere");
    }
}
