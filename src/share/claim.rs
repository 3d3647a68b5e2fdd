//! One publisher at a time.

use super::control::{Control, State};
use super::store::{CONTROL, damaged, nothing};
use super::{segment, user};
use crate::error::{Error, Result};
use crate::os::ExclusiveFile;
use crate::os::disk::Dir;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

/// The control page of a publication, this process's alone: the one there is, or a new one.
pub(super) fn take(dir: &Dir, path: &Path, mode: u32) -> Result<(Control, State)> {
    /// Others may take and remove it meanwhile, but not for ever.
    const TRIES: usize = 1000;
    /// Who removes a publication has it for a moment.
    const PATIENCE: Duration = Duration::from_millis(100);
    let io = |action| Error::io(path, action);
    let began = Instant::now();
    for _ in 0..TRIES {
        let control = match Control::open(dir, CONTROL.as_ref(), true) {
            Ok(control) => control,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let names = dir.names().map_err(io("listing the directory"))?;
                if let Some(name) = names.iter().find(|name| segment::number_of(name).is_some()) {
                    let what = format!(
                        "this is no publication, but has {}, which would be taken for a part of one: choose another \
                         directory",
                        name.display()
                    );
                    return Err(Error::Publication { path: path.into(), what });
                }
                match Control::create(dir, CONTROL.as_ref(), mode).map_err(io("making the control page"))? {
                    Some(control) => control,
                    None => continue,
                }
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                return Err(damaged(path, "its control page is no file"));
            }
            Err(error) => {
                return Err(user::told(dir, CONTROL.as_ref(), io("opening the control page")(error)));
            }
        };
        let state = control.read().map_err(io("reading the control page"))?;
        if !control.lock().map_err(io("locking the control page"))? {
            if began.elapsed() < PATIENCE {
                std::thread::sleep(PATIENCE / 50);
                continue;
            }
            let what = held_by(state.unwrap_or_default().writer);
            return Err(Error::Busy { path: path.into(), what });
        }
        if !control.is(dir, CONTROL.as_ref()) {
            continue;
        }
        // Again: whoever had it may have published in between.
        let state = control.read().map_err(io("reading the control page"))?;
        let state = state.ok_or_else(|| damaged(path, "its control page makes no sense"))?;
        if !state.closed {
            return Ok((control, state));
        }
        // A removal that did not come to its end. Who is attached looks at this page, and is told; the next
        // publication has another.
        clear(dir, path)?;
    }
    Err(busy(path))
}

/// The control page of a publication that is to be removed, this process's alone: also of one that is damaged. In a
/// named one that holds nothing but a publisher's files, whatever stands in for the page is taken away, and a page made.
pub(super) fn take_to_remove(dir: &Dir, path: &Path, named: bool) -> Result<Control> {
    const TRIES: usize = 1000;
    let io = |action| Error::io(path, action);
    for _ in 0..TRIES {
        let control = match Control::open(dir, CONTROL.as_ref(), true) {
            Ok(control) if !control.is_one().map_err(io("reading the control page"))? => {
                if !named || !is_ours(dir, path)? {
                    return Err(foreign(path));
                }
                let is_ours_alone = control.lock().map_err(io("locking the control page"))?;
                if is_ours_alone && control.is(dir, CONTROL.as_ref()) {
                    dir.remove(CONTROL.as_ref()).map_err(io("removing the control page"))?;
                }
                continue;
            }
            Ok(control) => control,
            Err(error) if error.kind() == ErrorKind::NotFound && named => {
                if !is_ours(dir, path)? {
                    return Err(foreign(path));
                }
                // Before the page is made: it may take the room that an unfinished file has.
                ExclusiveFile::sweep(dir);
                match Control::create(dir, CONTROL.as_ref(), 0o600).map_err(io("making the control page"))? {
                    Some(control) => control,
                    None => continue,
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(nothing(path)),
            Err(error) => {
                let is_file = dir.lstat(CONTROL.as_ref()).is_ok_and(|stat| {
                    rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
                });
                if is_file {
                    return Err(user::told(dir, CONTROL.as_ref(), io("opening the control page")(error)));
                }
                if !named || !is_ours(dir, path)? {
                    return Err(foreign(path));
                }
                dir.remove(CONTROL.as_ref()).map_err(io("removing the control page"))?;
                continue;
            }
        };
        let state = control.read().map_err(io("reading the control page"))?;
        if !control.lock().map_err(io("locking the control page"))? {
            let what = held_by(state.unwrap_or_default().writer);
            return Err(Error::Busy { path: path.into(), what });
        }
        if control.is(dir, CONTROL.as_ref()) {
            return Ok(control);
        }
    }
    Err(busy(path))
}

/// Ends a publication whose control page is this process's: who is attached is told, its files are removed, and its
/// directory if nothing else is in it, unless that `stays`.
pub(super) fn end(control: &Control, dir: &Dir, path: &Path, stays: bool) -> Result<()> {
    control.close().map_err(Error::io(path, "closing the control page"))?;
    clear(dir, path)?;
    if stays {
        return Ok(());
    }
    dir.stands("what was published there was removed, the directory was not")?;
    match std::fs::remove_dir(path) {
        // Others may have put something there, and it is theirs; or the directory is: it was there before, where this
        // user may not remove one, or is mounted there. It is left as it was.
        Err(error)
            if !matches!(
                error.kind(),
                ErrorKind::NotFound
                    | ErrorKind::DirectoryNotEmpty
                    | ErrorKind::AlreadyExists
                    | ErrorKind::PermissionDenied
                    | ErrorKind::ResourceBusy
            ) =>
        {
            Err(Error::io(path, "removing its directory")(error))
        }
        _ => Ok(()),
    }
}

/// Whether all that is called as segments are is what a publisher wrote.
fn is_ours(dir: &Dir, path: &Path) -> Result<bool> {
    let names = dir.names().map_err(Error::io(path, "listing the publication"))?;
    let mut numbers = names.iter().filter_map(|name| segment::number_of(name));
    Ok(numbers.all(|number| segment::open(dir, path, number).is_ok()))
}

fn foreign(path: &Path) -> Error {
    let what = "it has no control page, and files that may be no publisher's: remove what is yours yourself";
    Error::Publication { path: path.into(), what: what.into() }
}

fn busy(path: &Path) -> Error {
    let what = "others begin and end publications there all the time".into();
    Error::Busy { path: path.into(), what }
}

/// Removes the files of a publication that is over, the control page last.
fn clear(dir: &Dir, path: &Path) -> Result<()> {
    let names = dir.names().map_err(Error::io(path, "listing the publication"))?;
    for name in names.iter().filter(|name| segment::number_of(name).is_some()) {
        let is_directory = dir.lstat(name).is_ok_and(|stat| {
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory
        });
        if is_directory {
            continue; // no publisher's
        }
        dir.remove(name).map_err(Error::io(path, "removing a segment"))?;
    }
    ExclusiveFile::sweep(dir);
    dir.remove(CONTROL.as_ref()).map_err(Error::io(path, "removing the control page"))
}

fn held_by(writer: u64) -> String {
    let pid = i32::try_from(writer).ok().and_then(rustix::process::Pid::from_raw);
    let gone = pid.is_some_and(|pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH));
    if writer == u64::from(std::process::id()) {
        "this process publishes there already".into()
    } else if gone {
        format!("process {writer} published there, and a child that it forked still holds the publication")
    } else {
        format!("process {writer} publishes there, and only one can")
    }
}
