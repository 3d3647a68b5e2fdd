//! Taking checkpoints away: asked for, or because they fall out. What cannot be removed is told.

use super::store::{FILE, INDEX, Store, file_name, shard_of};
use crate::error::{Error, Result};
use crate::os::ExclusiveFile;
use crate::os::disk::Dir;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;

/// What was taken away of a checkpoint.
pub(super) struct Away {
    /// Whether there was any of it.
    pub(super) was_there: bool,
    /// A single file, by the hidden name that it has now: to be used again or removed.
    pub(super) hidden: Option<OsString>,
}

impl Store {
    /// Takes a checkpoint away.
    ///
    /// # Errors
    /// [`Error::Io`]: some of it is still there.
    pub(super) fn take_away(&self, dir: &Dir, step: u64) -> Result<Away> {
        if let Some(known) = &mut *self.known() {
            known.may_be_gone |= known.highest == Some(step);
        }
        let set = self.remove_set(dir, step);
        let name = OsString::from(file_name(step, FILE));
        let file = if Self::has(dir, &name) {
            match ExclusiveFile::hide(dir, &name) {
                Ok(hidden) => Ok(Some(hidden)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Error::io(&self.path.join(name), "removing the checkpoint")(error)),
            }
        } else {
            Ok(None)
        };
        let hidden = match (&set, file) {
            (Err(_), Ok(Some(hidden))) => {
                // What went wrong first is told; a file that is left has no step any more, and is swept.
                self.discard(dir, &hidden).ok();
                None
            }
            (_, file) => file?,
        };
        Ok(Away { was_there: set? || hidden.is_some(), hidden })
    }

    /// Whether there is a file, or a link, of that name. Asked before it is removed: a file system that is read-only
    /// refuses to remove also what is not there. A directory is nobody's checkpoint.
    fn has(dir: &Dir, name: &OsStr) -> bool {
        let is_dir = |stat: rustix::fs::Stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir();
        dir.lstat(name).is_ok_and(|stat| !is_dir(stat))
    }

    /// Removes a file that was taken away, unless a sweep was faster.
    pub(super) fn discard(&self, dir: &Dir, hidden: &OsStr) -> Result<()> {
        match dir.remove(hidden) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::io(&self.path.join(hidden), "removing an old checkpoint")(error))
            }
            _ => Ok(()),
        }
    }

    /// Removes a step's index and shards, if it has any; whether it had.
    ///
    /// # Errors
    /// [`Error::Io`]: some of it is still there.
    pub(super) fn remove_set(&self, dir: &Dir, step: u64) -> Result<bool> {
        let index = OsString::from(file_name(step, INDEX));
        if !Self::has(dir, &index) {
            return Ok(false);
        }
        // Of one that cannot be read the shards are orphans, which go when the next set is saved.
        let shards = self.shards(dir, &index).unwrap_or_default();
        match dir.remove(&index) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            done => done.map_err(Error::io(&self.path.join(&index), "removing the checkpoint"))?,
        }
        // Once durably without its index it is no checkpoint: now shards may go in any order.
        dir.sync().map_err(Error::io(&self.path.join(&index), "making its removal durable"))?;
        let shards = shards.iter().filter(|shard| shard_of(shard) == Some(step));
        self.remove_all(dir, shards.map(String::as_str))?;
        Ok(true)
    }

    /// Removes all of these that are there; the first error is told once the others are gone.
    fn remove_all<'a>(&self, dir: &Dir, names: impl Iterator<Item = &'a str>) -> Result<()> {
        let mut done = Ok(());
        for name in names {
            match dir.remove(name.as_ref()) {
                Err(error) if error.kind() != ErrorKind::NotFound && done.is_ok() => {
                    done = Err(Error::io(&self.path.join(name), "removing a shard")(error));
                }
                _ => {}
            }
        }
        done
    }

    /// Removes shards that no index names: of a save that was killed before its index, or a removal after it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn remove_orphans(&self, dir: &Dir) -> Result<()> {
        let mut named: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        let mut orphans = Vec::new();
        for name in dir.names().map_err(Error::io(&self.path, "listing the checkpoints"))? {
            let Some(name) = name.to_str() else { continue };
            let Some(step) = shard_of(name) else { continue };
            let known = named.entry(step).or_insert_with(|| {
                let index = OsString::from(file_name(step, INDEX));
                // One that cannot be read may name it.
                self.shards(dir, &index)
                    .unwrap_or_else(|_| if dir.contains(&index) { vec![String::new()] } else { Vec::new() })
            });
            let unknown = known.first().is_some_and(String::is_empty);
            if !unknown && !known.iter().any(|known| known == name) {
                orphans.push(name.to_owned());
            }
        }
        self.remove_all(dir, orphans.iter().map(String::as_str))
    }

    /// Which steps `keep` and `keep_every` let go, now that the last of `saved` is there: those that were
    /// there before first, by step, then these in the order of their saving.
    pub(super) fn surplus(
        &self,
        dir: &Dir,
        keep: Option<usize>,
        keep_every: Option<u64>,
        saved: &[u64],
    ) -> Result<Vec<u64>> {
        let (Some(keep), Some(last)) = (keep, saved.last()) else { return Ok(Vec::new()) };
        let for_ever = |step: &u64| keep_every.is_some_and(|every| step.is_multiple_of(every));
        let steps = self.list(dir)?.0.into_keys();
        let mut others: Vec<u64> = steps.filter(|step| step != last && !for_ever(step)).collect();
        others.sort_by_key(|step| (saved.iter().rposition(|saved| saved == step), *step));
        let kept = keep.saturating_sub(usize::from(!for_ever(last)));
        others.truncate(others.len().saturating_sub(kept));
        Ok(others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        store.remove_orphans(store.make().unwrap()).unwrap();
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
        let surplus = |keep, every, saved| store.surplus(store.make().unwrap(), keep, every, saved).unwrap();
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
