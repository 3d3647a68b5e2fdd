//! A directory of checkpoints, by step.

use super::order::{Rank, Ranks};
use crate::error::{Error, Result};
use crate::format::index;
use crate::os::disk::Dir;
use crate::os::{open_regular_in, read_exact_at};
use crate::save::sharded::is_shard_suffix;
use crate::work::Patience;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

const PREFIX: &str = "step-";
pub(super) const FILE: &str = ".safetensors";
pub(super) const INDEX: &str = ".safetensors.index.json";

/// What to do about a directory that is not where it was.
const ADVICE: &str =
    "nothing is read, saved or removed there; open the checkpoints again, where they are to be";

/// Checkpoints are `step-0000000100.safetensors`, or an index of that stem and its shards.
pub(super) struct Store {
    /// Once it is there: the first save makes it. All that is done is done in this one, and only as long as the path
    /// leads to it.
    dir: OnceLock<Arc<Dir>>,
    pub(super) path: PathBuf,
    ranks: Ranks,
    /// What the saver knows of what is there; `None` until it has looked.
    known: Mutex<Option<Known>>,
}

/// What a saver goes by.
pub(super) struct Known {
    /// The highest number that a checkpoint carries.
    last: u64,
    /// The highest step there is; looked for again where it `may_be_gone`.
    pub(super) highest: Option<u64>,
    pub(super) may_be_gone: bool,
}

/// What a save is given.
pub(super) struct Turn {
    /// The number that it carries.
    pub(super) sequence: u64,
    /// The highest step there is, if that is above the one to be saved.
    pub(super) below: Option<u64>,
}

/// What becomes of a name that is looked at.
enum Seen {
    Whole,
    Incomplete,
    /// Somebody has let it go, or replaced it, meanwhile.
    Gone,
}

impl Store {
    /// Opens a directory, if it is there.
    pub(super) fn open(path: &Path) -> Result<Self> {
        // The process may change its own directory later.
        let absolute = std::path::absolute(path);
        let path = absolute.map_err(Error::io(path, "finding the directory of checkpoints"))?;
        let store = Self { dir: OnceLock::new(), path, ranks: Ranks::default(), known: Mutex::default() };
        store.opened()?;
        Ok(store)
    }

    /// The directory; it is made where it was never there.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Moved`] if it is not where it was opened.
    pub(super) fn make(&self) -> Result<&Arc<Dir>> {
        if let Some(dir) = self.here()? {
            return Ok(dir);
        }
        let made = std::fs::create_dir_all(&self.path);
        made.map_err(Error::io(&self.path, "making the directory of checkpoints"))?;
        let gone =
            || Error::io(&self.path, "opening the directory of checkpoints")(ErrorKind::NotFound.into());
        self.here()?.ok_or_else(gone)
    }

    /// The directory, which is where it was opened; `None` as long as there is none.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Moved`].
    pub(super) fn here(&self) -> Result<Option<&Arc<Dir>>> {
        let dir = self.opened()?;
        if let Some(dir) = dir {
            dir.stands(ADVICE)?;
        }
        Ok(dir)
    }

    /// The directory that was opened, wherever it is now; `None` as long as there was none.
    pub(super) fn opened(&self) -> Result<Option<&Arc<Dir>>> {
        if let Some(dir) = self.dir.get() {
            return Ok(Some(dir));
        }
        match Dir::open(&self.path) {
            Ok(dir) => Ok(Some(self.dir.get_or_init(|| Arc::new(dir)))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(&self.path, "opening the directory of checkpoints")(error)),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the checkpoint of a step is written; sharded, what its files are named after.
    pub(super) fn target(&self, step: u64) -> PathBuf {
        self.path.join(file_name(step, FILE))
    }

    /// What to open for a step: its file, or its index.
    pub(super) fn find(&self, step: u64) -> Result<Option<PathBuf>> {
        let Some(dir) = self.here()? else { return Ok(None) };
        let mut patience = Patience::new();
        loop {
            let before = dir.names_changed();
            for suffix in [FILE, INDEX] {
                let name = OsString::from(file_name(step, suffix));
                if matches!(self.look(dir, &name), Seen::Whole) {
                    return Ok(Some(self.path.join(name)));
                }
            }
            // One may have become the other between the two looks.
            if !(dir.may_have_changed(before) && patience.again()) {
                return Ok(None);
            }
        }
    }

    /// The steps whose checkpoints are complete, in order.
    pub(super) fn steps(&self) -> Result<Vec<u64>> {
        let Some(dir) = self.here()? else { return Ok(Vec::new()) };
        Ok(self.list_patiently(dir)?.into_keys().collect())
    }

    /// The step that was saved last.
    pub(super) fn latest(&self) -> Result<Option<u64>> {
        let Some(dir) = self.here()? else { return Ok(None) };
        let mut patience = Patience::new();
        loop {
            match self.last_of(dir, &self.list_patiently(dir)?) {
                // Let go since it was listed.
                Err(error) if error.is_not_found() && patience.again() => {}
                done => return done,
            }
        }
    }

    fn last_of(&self, dir: &Dir, names: &BTreeMap<u64, OsString>) -> Result<Option<u64>> {
        let mut last = None;
        if names.len() == 1 {
            return Ok(names.keys().next().copied());
        }
        for (step, name) in names {
            last = last.max(Some((self.ranks.of(dir, name, &self.path.join(name))?, *step)));
        }
        self.ranks.keep(|known| names.values().any(|name| name == known));
        Ok(last.map(|(_, step)| step))
    }

    /// What is complete, by step, and by what name it is opened. Beside a saver, this is what was there at some time
    /// or other.
    fn list_patiently(&self, dir: &Dir) -> Result<BTreeMap<u64, OsString>> {
        let mut patience = Patience::new();
        loop {
            let before = dir.names_changed();
            let (found, has_gone) = self.list(dir)?;
            // A long listing may also miss both of a name that goes and one that comes.
            let again = has_gone || found.is_empty() && dir.may_have_changed(before);
            if !(again && patience.again()) {
                return Ok(found);
            }
        }
    }

    /// One look: what is complete, and whether something has gone since it was listed.
    pub(super) fn list(&self, dir: &Dir) -> Result<(BTreeMap<u64, OsString>, bool)> {
        let (mut found, mut has_gone) = (BTreeMap::new(), false);
        for name in dir.names().map_err(Error::io(&self.path, "listing the checkpoints"))? {
            let Some(step) = step_of(&name) else { continue };
            match self.look(dir, &name) {
                // A file goes before an index of the same step.
                Seen::Whole if is_index(&name) => drop(found.entry(step).or_insert(name)),
                Seen::Whole => drop(found.insert(step, name)),
                Seen::Incomplete => {}
                Seen::Gone => has_gone = true,
            }
        }
        Ok((found, has_gone))
    }

    /// Whether a name is a whole checkpoint: a file gets its name last, an index may have lost shards to
    /// someone who removes files.
    fn look(&self, dir: &Dir, name: &OsStr) -> Seen {
        // Links are followed: an archived checkpoint counts, unless the archive is not there.
        match dir.stat(name) {
            Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() => {}
            Err(rustix::io::Errno::NOENT) if !dir.contains(name) => return Seen::Gone,
            _ => return Seen::Incomplete,
        }
        if !is_index(name) {
            return Seen::Whole;
        }
        let is_there = |shards: &[String]| shards.iter().all(|shard| dir.contains(shard.as_ref()));
        let shards = match self.shards(dir, name) {
            Ok(shards) if is_there(&shards) => return Seen::Whole,
            Ok(shards) => shards,
            Err(error) if error.is_not_found() => return Seen::Gone,
            Err(_) => return Seen::Incomplete,
        };
        // Shards go after their index: if it has others now, or is gone, a saver was faster.
        match self.shards(dir, name) {
            Ok(now) if now == shards => Seen::Incomplete,
            Err(error) if !error.is_not_found() => Seen::Incomplete,
            _ => Seen::Gone,
        }
    }

    /// The files that an index names.
    pub(super) fn shards(&self, dir: &Dir, index: &OsStr) -> Result<Vec<String>> {
        let path = self.path.join(index);
        let (file, len) = open_regular_in(dir, index, &path)?;
        let len = usize::try_from(len.min(index::MAX_INDEX_LEN)).unwrap_or_default();
        Ok(index::parse(&read_exact_at(&file, &path, 0, len)?, &path)?.shards)
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the save of a step is to carry, and whether it goes below what is there. What is there is looked at once, and
    /// again when the highest step goes.
    pub(super) fn turn(&self, dir: &Dir, step: u64) -> Result<Turn> {
        let mut known = self.known();
        let known = match &mut *known {
            Some(known) => known,
            unknown => unknown.insert(self.look_around(dir)?),
        };
        if std::mem::take(&mut known.may_be_gone) {
            known.highest = self.list(dir)?.0.into_keys().next_back();
        }
        known.last = known.last.saturating_add(1);
        Ok(Turn { sequence: known.last, below: known.highest.filter(|highest| *highest > step) })
    }

    fn look_around(&self, dir: &Dir) -> Result<Known> {
        let (names, _) = self.list(dir)?;
        let mut last = 0;
        for name in names.values() {
            // What cannot be read is told to who looks for the last one. It is no reason not to save.
            if let Ok(Rank::Number(number)) = self.ranks.of(dir, name, &self.path.join(name)) {
                last = last.max(number);
            }
        }
        Ok(Known { last, highest: names.into_keys().next_back(), may_be_gone: false })
    }

    /// That a step is there now.
    pub(super) fn is_saved(&self, step: u64) {
        if let Some(known) = &mut *self.known() {
            known.highest = known.highest.max(Some(step));
        }
    }
}

fn is_index(name: &OsStr) -> bool {
    name.as_encoded_bytes().ends_with(INDEX.as_bytes())
}

/// The step whose shard a file is, by its name.
pub(super) fn shard_of(name: &str) -> Option<u64> {
    let rest = name.strip_prefix(PREFIX)?;
    let (digits, suffix) = rest.split_at(rest.find('-')?);
    let step = step_of(format!("{PREFIX}{digits}{FILE}").as_ref())?;
    is_shard_suffix(suffix).then_some(step)
}

pub(super) fn file_name(step: u64, suffix: &str) -> String {
    format!("{PREFIX}{step:010}{suffix}")
}

/// The step that a file or an index belongs to; `None` for any other name.
fn step_of(name: &OsStr) -> Option<u64> {
    let name = name.to_str()?;
    let digits = name.strip_prefix(PREFIX)?;
    let digits = digits.strip_suffix(INDEX).or_else(|| digits.strip_suffix(FILE))?;
    let step = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    // One name for each step.
    (file_name(step, "") == format!("{PREFIX}{digits}")).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_written_here_are_checkpoints() {
        for (name, expected) in [
            ("step-0000000100.safetensors", Some(100)),
            ("step-0000000100.safetensors.index.json", Some(100)),
            ("step-12345678901.safetensors", Some(12_345_678_901)),
            ("step-18446744073709551615.safetensors", Some(u64::MAX)),
            ("step-18446744073709551616.safetensors", None),
            ("step-100.safetensors", None),
            ("step-0000000100-00001-of-00002.safetensors", None),
            ("step-+000000100.safetensors", None),
            ("step-.safetensors", None),
            ("step-0000000100.safetensors.tmp", None),
            ("model.safetensors", None),
        ] {
            assert_eq!(step_of(name.as_ref()), expected, "{name}");
        }
    }
}
