//! A directory of checkpoints, by step.

use super::super::sharded::is_shard_suffix;
use crate::error::{Error, Result};
use crate::format::index;
use crate::map::disk::Dir;
use crate::map::{ExclusiveFile, open_regular, read_exact_at};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const PREFIX: &str = "step-";
const FILE: &str = ".safetensors";
const INDEX: &str = ".safetensors.index.json";

/// Checkpoints are `step-0000000100.safetensors`, or an index of that stem and its shards.
pub(super) struct Store {
    /// Once it is there: the first save makes it.
    dir: OnceLock<Dir>,
    path: PathBuf,
}

impl Store {
    /// Opens a directory, if it is there.
    pub(super) fn open(path: &Path) -> Result<Self> {
        // The process may change its own directory later.
        let absolute = std::path::absolute(path);
        let path = absolute.map_err(Error::io(path, "finding the directory of checkpoints"))?;
        let store = Self { dir: OnceLock::new(), path };
        store.find_dir()?;
        Ok(store)
    }

    /// Makes the directory where it is not there.
    pub(super) fn make(&self) -> Result<()> {
        if self.find_dir()?.is_none() {
            let made = std::fs::create_dir_all(&self.path);
            made.map_err(Error::io(&self.path, "making the directory of checkpoints"))?;
            self.find_dir()?;
        }
        Ok(())
    }

    /// `None` as long as it is not there.
    fn find_dir(&self) -> Result<Option<&Dir>> {
        if let Some(dir) = self.dir.get() {
            return Ok(Some(dir));
        }
        match Dir::open(&self.path) {
            Ok(dir) => Ok(Some(self.dir.get_or_init(|| dir))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(&self.path, "opening the directory of checkpoints")(error)),
        }
    }

    /// Of what cannot be opened there are no checkpoints to take away.
    fn dir(&self) -> Option<&Dir> {
        self.find_dir().ok().flatten()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the checkpoint of a step is written; sharded, what its files are named after.
    pub(super) fn target(&self, step: u64) -> PathBuf {
        self.path.join(file_name(step, FILE))
    }

    /// What to open for a step: its file, or its index.
    pub(super) fn find(&self, step: u64) -> Option<PathBuf> {
        let names = [file_name(step, FILE), file_name(step, INDEX)];
        names.iter().find(|name| self.is_complete(name.as_ref())).map(|name| self.path.join(name))
    }

    /// The steps whose checkpoints are complete, in order.
    pub(super) fn steps(&self) -> Result<BTreeSet<u64>> {
        let Some(dir) = self.find_dir()? else { return Ok(BTreeSet::new()) };
        let names = dir.names().map_err(Error::io(&self.path, "listing the checkpoints"))?;
        Ok(names.iter().filter(|name| self.is_complete(name)).filter_map(|name| step_of(name)).collect())
    }

    /// Whether a name is a whole checkpoint: a file gets its name last, an index may have lost shards to
    /// someone who removes files.
    fn is_complete(&self, name: &OsStr) -> bool {
        // Links are followed: an archived checkpoint counts, unless the archive is not there.
        let is_file = |stat: rustix::fs::Stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
        let Some(dir) = self.dir() else { return false };
        if step_of(name).is_none() || !dir.stat(name).is_ok_and(is_file) {
            return false;
        }
        let is_index = name.to_str().is_some_and(|name| name.ends_with(INDEX));
        !is_index
            || self.shards(name).is_ok_and(|shards| shards.iter().all(|shard| dir.contains(shard.as_ref())))
    }

    /// The files that an index names.
    fn shards(&self, index: &OsStr) -> Result<Vec<String>> {
        let path = self.path.join(index);
        let (file, len) = open_regular(&path)?;
        let len = usize::try_from(len.min(index::MAX_INDEX_LEN)).unwrap_or_default();
        Ok(index::parse(&read_exact_at(&file, &path, 0, len)?, &path)?.shards)
    }

    /// Takes a checkpoint away. What is returned is a single file, by the hidden name that it has now: to be
    /// used again or removed.
    pub(super) fn take_away(&self, step: u64) -> Option<PathBuf> {
        self.remove_set(step);
        let file = OsString::from(file_name(step, FILE));
        ExclusiveFile::hide(self.dir()?, &file).ok().map(|hidden| self.path.join(hidden))
    }

    /// Removes a step's index and shards, if it has any.
    pub(super) fn remove_set(&self, step: u64) {
        let index = OsString::from(file_name(step, INDEX));
        let Some(dir) = self.dir() else { return };
        let shards = self.shards(&index).unwrap_or_default();
        if dir.remove(&index).is_ok() {
            // Once durably without its index it is no checkpoint: now shards may go in any order.
            dir.sync().ok();
            for shard in shards.iter().filter(|shard| shard_of(shard) == Some(step)) {
                dir.remove(shard.as_ref()).ok();
            }
        }
    }

    /// Removes shards that no index names: of a save that was killed before its index, or a removal after it.
    pub(super) fn remove_orphans(&self) {
        let Some(dir) = self.dir() else { return };
        let mut named: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for name in dir.names().unwrap_or_default() {
            let Some(name) = name.to_str() else { continue };
            let Some(step) = shard_of(name) else { continue };
            let known = named.entry(step).or_insert_with(|| {
                let index = OsString::from(file_name(step, INDEX));
                // One that cannot be read may name it.
                self.shards(&index)
                    .unwrap_or_else(|_| if dir.contains(&index) { vec![String::new()] } else { Vec::new() })
            });
            let unknown = known.first().is_some_and(String::is_empty);
            if !unknown && !known.iter().any(|known| known == name) {
                dir.remove(name.as_ref()).ok();
            }
        }
    }

    /// Which steps `keep` and `keep_every` let go, now that the last of `saved` is there: those that were
    /// there before first, by step, then these in the order of their saving.
    pub(super) fn surplus(
        &self,
        keep: Option<usize>,
        keep_every: Option<u64>,
        saved: &[u64],
    ) -> Result<Vec<u64>> {
        let (Some(keep), Some(last)) = (keep, saved.last()) else { return Ok(Vec::new()) };
        let for_ever = |step: &u64| keep_every.is_some_and(|every| step.is_multiple_of(every));
        let mut others: Vec<u64> =
            self.steps()?.into_iter().filter(|step| step != last && !for_ever(step)).collect();
        others.sort_by_key(|step| (saved.iter().rposition(|saved| saved == step), *step));
        let kept = keep.saturating_sub(usize::from(!for_ever(last)));
        others.truncate(others.len().saturating_sub(kept));
        Ok(others)
    }
}

/// The step whose shard a file is, by its name.
fn shard_of(name: &str) -> Option<u64> {
    let rest = name.strip_prefix(PREFIX)?;
    let (digits, suffix) = rest.split_at(rest.find('-')?);
    let step = step_of(format!("{PREFIX}{digits}{FILE}").as_ref())?;
    is_shard_suffix(suffix).then_some(step)
}

fn file_name(step: u64, suffix: &str) -> String {
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

    #[test]
    fn shards_that_no_index_names_are_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let there = |name: &str| dir.path().join(name).exists();
        let index = r#"{"weight_map":{"a":"step-0000000001-g2-00001-of-00001.safetensors"}}"#;
        write("step-0000000001.safetensors.index.json", index);
        write("step-0000000003.safetensors.index.json", "not to be read");
        let named = "step-0000000001-g2-00001-of-00001.safetensors";
        let orphans =
            ["step-0000000001-00001-of-00002.safetensors", "step-0000000002-00001-of-00002.safetensors"];
        let others = [
            named,
            "step-0000000003-00001-of-00002.safetensors",
            "step-0000000004-notes.safetensors",
            "step-4-00001-of-00002.safetensors",
            "model-00001-of-00002.safetensors",
        ];
        for name in orphans.iter().chain(&others) {
            write(name, "");
        }
        store.remove_orphans();
        assert!(orphans.iter().all(|name| !there(name)));
        assert!(others.iter().all(|name| there(name)));
    }

    #[test]
    fn the_oldest_fall_out_and_milestones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for step in [100, 150, 200, 250, 300] {
            std::fs::write(store.target(step), []).unwrap();
        }
        let surplus = |keep, every, saved| store.surplus(keep, every, saved).unwrap();
        assert_eq!(surplus(None, None, &[300]), [0; 0]);
        assert_eq!(surplus(Some(2), None, &[300]), [100, 150, 200]);
        assert_eq!(surplus(Some(1), Some(100), &[300]), [150]);
        assert_eq!(surplus(Some(1), Some(100), &[250]), [150]);
        assert_eq!(surplus(Some(1), None, &[100]), [150, 200, 250, 300], "what was just saved stays");
        assert_eq!(surplus(Some(9), None, &[300]), [0; 0]);
        // Gone back to 100 and on from there: what this run saved outlives what another did.
        assert_eq!(surplus(Some(2), None, &[100, 150]), [200, 250, 300]);
        assert_eq!(surplus(Some(2), None, &[300, 100, 150]), [200, 250, 300]);
    }
}
