//! From what a user names to a directory.

use crate::error::{Error, Result, printable, quote};
use crate::os::disk::Dir;
use rustix::fs::{Mode, OFlags};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Where publications that have a name lie, in place of the default.
const BASE: &str = "MAPTENSORS_SHARE_DIR";

/// Bytes in a name, at most.
const LONGEST: usize = 200;

/// The directory of a publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Absolute: the process may change its own directory later.
    pub(super) path: PathBuf,
    /// It was named, and lies in the base: nobody but publishers has any business there.
    named: bool,
}

impl Place {
    /// What has no separator is a name, everything else the path of a directory.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that could lead elsewhere, or a base that others have a hand in.
    pub(super) fn of(place: &Path) -> Result<Self> {
        if place.as_os_str().as_encoded_bytes().contains(&b'/') {
            let path = std::path::absolute(place).map_err(Error::io(place, "finding the directory"))?;
            return Ok(Self { path, named: false });
        }
        Self::named(place, true)
    }

    /// As [`Place::of`], and makes nothing: where names lie there may be nothing yet.
    ///
    /// # Errors
    /// As [`Place::of`].
    pub(super) fn existing(place: &Path) -> Result<Self> {
        if place.as_os_str().as_encoded_bytes().contains(&b'/') {
            Self::of(place)
        } else {
            Self::named(place, false)
        }
    }

    /// The directories of all that has a name, whatever they hold.
    ///
    /// # Errors
    /// As [`Place::of`]; [`Error::Io`].
    pub(super) fn all() -> Result<Vec<Self>> {
        let base = base(false)?;
        let dir = match Dir::open(&base) {
            Ok(dir) => dir,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(&base, "opening the directory of publications")(error)),
        };
        let mut names = dir.names().map_err(Error::io(&base, "listing the publications"))?;
        names.sort();
        let names = names.iter().filter(|name| name.to_str().is_some_and(is_name));
        Ok(names.map(|name| Self { path: base.join(name), named: true }).collect())
    }

    /// Its name, if it has one.
    pub(super) fn name(&self) -> Option<&str> {
        self.path.file_name().filter(|_| self.named)?.to_str()
    }

    /// The directory, open to look into: what has a name is no link to elsewhere.
    pub(super) fn open(&self) -> std::io::Result<Dir> {
        if self.named { Dir::open_itself(&self.path) } else { Dir::open(&self.path) }
    }

    fn named(place: &Path, make: bool) -> Result<Self> {
        let name = place.to_str().filter(|name| is_name(name)).ok_or_else(|| {
            Error::Argument(format!(
                "{} is no name for a publication: it has 1 to {LONGEST} bytes, does not start with a dot, and \
                 has no control characters; a path has a separator (./name)",
                quote(&place.to_string_lossy())
            ))
        })?;
        Ok(Self { path: base(make)?.join(name), named: true })
    }

    /// Makes the directory, where there is none, with x where files have r. One that is there, at a path, is opened for
    /// those who are to read its files, but never closed: it may hold more than a publication.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Argument`] where others are to read what lies where they cannot look.
    pub(super) fn make(&self, file_mode: u32) -> Result<Made> {
        let io = |action| Error::io(&self.path, action);
        if self.named && file_mode & 0o077 != 0 && std::env::var_os(BASE).is_none_or(|base| base.is_empty()) {
            return Err(Error::Argument(format!(
                "mode {file_mode:o} is of no use with a name, which stands for a place that only this user can look \
                 into: to share with others, publish to a path (or set {BASE})"
            )));
        }
        let mut made = Made::default();
        if let Some(parent) = self.path.parent() {
            let missing = parent.ancestors().take_while(|parent| !parent.exists());
            made.parents = missing.map(Path::to_owned).collect();
            let done = std::fs::create_dir_all(parent);
            done.inspect_err(|_| made.undo()).map_err(io("making the directory it is to be in"))?;
        }
        let done = self.make_itself(file_mode, &mut made);
        done.inspect_err(|_| made.undo())?;
        Ok(made)
    }

    fn make_itself(&self, file_mode: u32, new: &mut Made) -> Result<()> {
        let io = |action| Error::io(&self.path, action);
        let mode = 0o700 | (file_mode & 0o444) | (file_mode & 0o444) >> 2;
        match std::fs::DirBuilder::new().mode(mode).create(&self.path) {
            Ok(()) => new.itself = Some(self.path.clone()),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && !self.named => {
                return self.open_to_others(mode);
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io("making the directory")(error)),
        }
        // The umask takes from what was asked for, and what is ours may be asked for otherwise now.
        // Ours, not what a link leads to, nor a file that has the name.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&self.path, flags, Mode::empty());
        let dir = std::fs::File::from(dir.map_err(|error| io("opening the directory")(error.into()))?);
        let permissions = std::fs::Permissions::from_mode(mode);
        dir.set_permissions(permissions).map_err(io("setting the directory's mode"))
    }

    /// Gives others what they need to look into a directory that is there.
    fn open_to_others(&self, mode: u32) -> Result<()> {
        let metadata = std::fs::metadata(&self.path);
        let metadata = metadata.map_err(Error::io(&self.path, "looking at the directory"))?;
        let missing = mode & 0o077 & !metadata.mode();
        if missing == 0 || !metadata.is_dir() {
            return Ok(());
        }
        let wanted = metadata.mode() & 0o7777 | missing;
        let set = std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(wanted));
        set.map_err(|error| {
            Error::Argument(format!(
                "{}: others are to read what is published there, but cannot look into the directory, which is user \
                 {}'s and has mode {:o}; it could not be given mode {wanted:o} ({error}): have its owner do so, or \
                 publish elsewhere",
                printable(&self.path.to_string_lossy()),
                metadata.uid(),
                metadata.mode() & 0o7777,
            ))
        })
    }
}

/// The directories that were made for a publication.
#[derive(Debug, Default)]
pub(super) struct Made {
    itself: Option<PathBuf>,
    /// Those that it is in, the innermost first.
    parents: Vec<PathBuf>,
}

impl Made {
    /// Whether the publication's own directory was.
    pub(super) fn itself(&self) -> bool {
        self.itself.is_some()
    }

    /// Takes them away again, after something went wrong that is told: a directory that is left is empty, and one that
    /// is not has come to be somebody's.
    pub(super) fn undo(&self) {
        for made in self.itself.iter().chain(&self.parents) {
            std::fs::remove_dir(made).ok();
        }
    }
}

fn is_name(name: &str) -> bool {
    (1..=LONGEST).contains(&name.len()) && !name.starts_with('.') && !name.chars().any(char::is_control)
}

/// Where publications that have a name lie: made, or only looked at, if it is there.
fn base(make: bool) -> Result<PathBuf> {
    match std::env::var_os(BASE).filter(|base| !base.is_empty()).map(PathBuf::from) {
        None => {
            let shared = Path::new("/dev/shm");
            let memory = cfg!(target_os = "linux") && shared.is_dir();
            let parent = if memory { shared.to_owned() } else { std::env::temp_dir() };
            let base = parent.join(format!("maptensors-{}", rustix::process::geteuid().as_raw()));
            own(&base, make)?;
            Ok(base)
        }
        Some(base) if base.is_absolute() => {
            if make {
                let done = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&base);
                done.map_err(Error::io(&base, "making the directory of publications"))?;
            }
            Ok(base)
        }
        Some(base) => Err(Error::Argument(format!(
            "{BASE} is {}, but is to be an absolute path",
            quote(&base.to_string_lossy())
        ))),
    }
}

/// Looks at a directory of our own among everybody's, and makes it if asked to. Somebody else may have made one of that
/// name: whose then could read and exchange all that is published.
fn own(base: &Path, make: bool) -> Result<()> {
    let io = |action| Error::io(base, action);
    match if make { std::fs::DirBuilder::new().mode(0o700).create(base) } else { Ok(()) } {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(io("making the directory of publications")(error));
        }
        _ => {}
    }
    let refuse = |found: &str| {
        Err(Error::Argument(format!(
            "{} {found}: publications go to a directory that is this user's alone; remove it, or name another \
             with {BASE}",
            base.display()
        )))
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(base, flags, Mode::empty()) {
        Ok(fd) => std::fs::File::from(fd),
        Err(rustix::io::Errno::NOENT) if !make => return Ok(()),
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => return refuse("is no directory"),
        Err(rustix::io::Errno::ACCESS) => return refuse("is another user's"),
        Err(error) => return Err(io("opening the directory of publications")(error.into())),
    };
    let stat = fd.metadata().map_err(io("looking at the directory of publications"))?;
    match stat {
        _ if stat.uid() != rustix::process::geteuid().as_raw() => refuse("is another user's"),
        _ if stat.mode() & 0o077 != 0 => refuse("is open to others"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_lead_anywhere_else() {
        for (name, expected) in [
            ("weights", true),
            ("Ünïcode name", true),
            ("a..b", true),
            ("", false),
            (".", false),
            ("..", false),
            (".hidden", false),
            ("a\0b", false),
            ("a\nb", false),
            ("a\u{85}b", false),
            (&"n".repeat(200), true),
            (&"n".repeat(201), false),
        ] {
            assert_eq!(is_name(name), expected, "{name:?}");
        }
        for path in ["a/b", "./a", "/a", "a/", "../a"] {
            let place = Place::of(Path::new(path)).unwrap();
            assert!(place.path.is_absolute() && !place.named, "{path}");
        }
    }

    #[test]
    fn a_base_that_others_have_a_hand_in_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        own(&at("new"), false).unwrap();
        assert!(!at("new").exists(), "only looked at");
        own(&at("new"), true).unwrap();
        assert_eq!(std::fs::metadata(at("new")).unwrap().mode() & 0o7777, 0o700);
        own(&at("new"), true).unwrap();
        std::os::unix::fs::symlink(at("new"), at("link")).unwrap();
        std::fs::write(at("file"), b"").unwrap();
        for (name, found) in [("link", "no directory"), ("file", "no directory")] {
            for make in [false, true] {
                let error = own(&at(name), make).unwrap_err().to_string();
                assert!(error.contains(found), "{error}");
            }
        }
        for mode in [0o710, 0o701, 0o777, 0o1777] {
            std::fs::set_permissions(at("new"), std::fs::Permissions::from_mode(mode)).unwrap();
            let error = own(&at("new"), true).unwrap_err().to_string();
            assert!(error.contains("open to others"), "{mode:o}: {error}");
        }
        if rustix::process::geteuid().is_root() {
            std::fs::set_permissions(at("new"), std::fs::Permissions::from_mode(0o700)).unwrap();
            std::os::unix::fs::chown(at("new"), Some(65_534), None).unwrap();
            let error = own(&at("new"), true).unwrap_err().to_string();
            assert!(error.contains("another user's"), "{error}");
        } else {
            crate::skipped(
                "a_base_that_others_have_a_hand_in_is_refused",
                "another user's directory takes root",
            );
        }
    }
}
