//! What a power loss may leave, enumerated; and what a save makes of operations that fail.
//!
//! A save runs for real, on small files, and everything it does to its directory is [recorded](record): names
//! through the seam in `os::disk`, contents by looking at them before and after every operation, so
//! that mapped writes are seen too. From the record follow the [states] a crash may leave, at every instant:
//! what was made durable, and any subset of what was not. Each is put into a directory and read
//! by the real code, which must find the old model or the new one, whole; and only the new one once the caller
//! has been told that it is durable. From some of them the next save sets out, and crashes as well.
//!
//! The disk of this model:
//!
//! - writes a sector of 512 bytes whole or not at all, and sectors in any order;
//! - keeps a file's length apart from its bytes: what a new length adds reads as zeros until it is written;
//! - does every change of names whole or not at all, any of them without those before it; a renamed file
//!   has its new name even if its creation was lost;
//! - has by fsync(2) of a file its bytes and length, and not its name; by fsync(2) of a directory its names,
//!   and not their files' bytes;
//! - comes in three [kinds](Kind): without files that have no name, with them, and with them but forgetting
//!   what was synced of one by the time it gets a name. A save is told which.
//!
//! That is weaker than ext4, xfs and btrfs promise.
#![cfg(test)]

mod faults;
mod record;
mod scenarios;
mod states;
mod tests;

use crate::error::{Error, Result};
use crate::model::Model;
use record::{Kind, Log, record};
use states::{Budget, State, each_state};
use std::ops::RangeInclusive;
use std::path::Path;

type Save = fn(&Path, u8, &dyn Fn(u8)) -> Result<()>;

/// A way to save, and to see what came of it. Generations are numbered; 0 is that there is no model.
#[derive(Clone, Copy)]
struct Scenario {
    name: &'static str,
    /// The generation that is there before.
    old: u8,
    /// Puts that one there.
    prepare: fn(&Path),
    /// How many generations `save` makes.
    saves: u8,
    /// Saves a generation, over whatever is there, and those behind it (but for the last there is); says of
    /// each that it is durable.
    save: Save,
    /// The generation that is there, or what is wrong with it.
    read: fn(&Path) -> Result<u8, String>,
}

/// What came of looking at a scenario's states.
#[derive(Debug, Default)]
struct Report {
    states: usize,
    /// States within the recovery from others.
    nested: usize,
    violations: Vec<String>,
}

impl Report {
    fn assert_clean(&self, name: &str) {
        let some: Vec<_> = self.violations.iter().take(8).collect();
        assert!(some.is_empty(), "{name}: {} violations, such as {some:#?}", self.violations.len());
    }
}

/// The generation that saves out of a crashed state make: unlike any that the crash may have left.
const NEWEST: u8 = 77;

/// A directory where nothing waits for a disk.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

impl Scenario {
    /// The record of one save in a directory of its own.
    fn record(&self, kind: Kind) -> Log {
        let dir = tempfile::tempdir().unwrap();
        (self.prepare)(dir.path());
        let (done, log) =
            record(dir.path(), kind, None, |saved| (self.save)(dir.path(), self.old + 1, saved));
        done.unwrap();
        assert_eq!((self.read)(dir.path()), Ok(log.saved().unwrap()));
        log
    }

    /// Looks at the states that a crash of its saves may leave. Out of the first few and one in
    /// `sample`, recovery is recorded and looked at as well; 0: out of none.
    fn check(&self, log: &Log, budget: Budget, sample: u64) -> Report {
        self.check_from(log, self.old, self.old + 1..=self.old + self.saves, budget, sample)
    }

    fn check_from(&self, log: &Log, old: u8, new: RangeInclusive<u8>, budget: Budget, sample: u64) -> Report {
        let mut report = Report::default();
        let dir = scratch();
        each_state(log, budget, |state| {
            report.states += 1;
            state.put_into(dir.path());
            let allowed = match state.saved {
                None => [old, *new.start()],
                Some(saved) => [saved, (saved + 1).min(*new.end())],
            };
            let found = (self.read)(dir.path());
            if !found.as_ref().is_ok_and(|found| allowed.contains(found)) {
                let names: Vec<_> = state.files.iter().map(|(name, bytes)| (name, bytes.len())).collect();
                report.violations.push(format!("{found:?}, not one of {allowed:?}: {names:?}"));
                return;
            }
            if sample > 0 && (report.states <= 4 || state.hash.is_multiple_of(sample)) {
                self.recover(log.kind, state, found.unwrap_or_default(), &mut report);
            }
        });
        report
    }

    /// The next save, into what a crash left.
    fn recover(&self, kind: Kind, state: &State, found: u8, report: &mut Report) {
        let dir = scratch();
        state.put_into(dir.path());
        let (done, log) = record(dir.path(), kind, None, |saved| (self.save)(dir.path(), NEWEST, saved));
        if let Err(error) = done {
            return report.violations.push(format!("the next save fails: {error}"));
        }
        let temporary = |name: &String| name.starts_with(".maptensors-");
        if names_in(dir.path()).iter().any(temporary) {
            report.violations.push("the next save leaves a crashed one's temporary".into());
        }
        let inner = self.check_from(&log, found, NEWEST..=NEWEST, Budget::nested(), 0);
        report.nested += inner.states;
        report.violations.extend(inner.violations.into_iter().map(|text| format!("in recovery: {text}")));
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

impl State {
    /// Makes this the content of `dir`.
    fn put_into(&self, dir: &Path) {
        for name in names_in(dir) {
            std::fs::remove_file(dir.join(name)).unwrap();
        }
        for (name, bytes) in &self.files {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }
}

/// The generation of the model at `path`: that of its metadata, which every byte of its tensors repeats
/// (or `data`, where it is given). No model is generation 0.
fn generation(path: &Path, data: Option<u8>) -> Result<u8, String> {
    let model = match Model::read(path) {
        Ok(model) => model,
        Err(Error::Io { .. }) if !path.exists() => return Ok(0),
        Err(error) => return Err(error.to_string()),
    };
    let said = model.metadata().text("generation").and_then(|text| text.parse().ok());
    let said: u8 = said.ok_or("no generation in the metadata")?;
    let expected = data.unwrap_or(said);
    if model.len() != 2 || model.tensors().any(|t| t.as_bytes().iter().any(|&byte| byte != expected)) {
        return Err(format!("generation {said} is a mixture"));
    }
    Ok(said)
}
