//! One directory, one truth: a whole file, and the sharded set of its name beside it.
//!
//! Of other loaders, some prefer the file and some the index. So what a save replaces goes, once the new model is durable;
//! and as long as both are there, the index says which of them is the model ([`Truth`]): a power loss in between leaves
//! the old model or the new one, and never two. A file over a set is saved in these steps, each durable before the next:
//!
//! 1. the index is replaced by one that says that the file is the model, once there is one;
//! 2. the file is renamed into place;
//! 3. the index is removed;
//! 4. so are the shards it named, if they are named as shards of this model are.

use super::Pending;
use super::sharded::{is_shard_suffix, remove_shards};
use crate::error::{Error, Result};
use crate::format::index::{self, Index, Truth};
use crate::os;
use crate::os::disk::Dir;
use crate::work::cancel;
use rustix::fs::FileType;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The sharded set that a whole file takes the place of.
struct OldSet {
    /// Locked, unless nobody else saves here: no other save changes the set meanwhile.
    dir: Arc<Dir>,
    index: PathBuf,
    name: OsString,
    /// What the index says now; `None` for one that cannot be read, which owns nothing.
    found: Option<(String, Index)>,
    marked: bool,
}

/// Renames a whole model into place, as [`Pending::publish`] does; the sharded set of its name goes.
pub(crate) fn publish_model(pending: Pending, durable: bool) -> Result<()> {
    let path = pending.path().to_owned();
    let Some(name) = index_name(&path) else { return pending.publish(durable) };
    if is_file(pending.dir(), &name) {
        // Whoever has a directory to itself commits one file at a time, and may have locked it for a set that is to come
        // after this one.
        let alone = pending.stays();
        let mut set = OldSet::find(pending.dir(), &path, &name, !alone)?;
        set.give_way(path.file_name().unwrap_or_default(), durable)?;
        return match pending.publish(durable) {
            Ok(()) => set.remove(&path, durable),
            Err(error) => {
                set.restore(&error, durable);
                Err(error)
            }
        };
    }
    let (alone, dir, file) = (pending.stays(), pending.dir().clone(), pending.file().file().metadata());
    let file =
        file.map(|file| (file.dev(), file.ino())).map_err(Error::io(&path, "asking which file it is"))?;
    pending.publish(durable)?;
    if !is_file(&dir, &name) {
        return Ok(());
    }
    // A set was saved meanwhile. It has taken this file away, if it was the later one.
    let set = OldSet::find(&dir, &path, &name, !alone)?;
    let there = dir.stat(path.file_name().unwrap_or_default());
    if there.is_ok_and(|there| (there.st_dev, there.st_ino) == file) {
        return set.remove(&path, durable);
    }
    Ok(())
}

/// Whether there is a file of that name: what else is called like an index is none.
fn is_file(dir: &Dir, name: &OsStr) -> bool {
    dir.stat(name).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_file())
}

/// The files that go when a whole file gets this path: what is there, and the set of its name.
pub(crate) fn replaced_by(path: &Path) -> Vec<PathBuf> {
    let mut replaced = vec![path.to_owned()];
    if let Some(index) = index_beside(path) {
        let parent = path.parent().unwrap_or(Path::new(""));
        let text = os::open_regular(&index).and_then(|(file, len)| {
            let len = usize::try_from(len.min(index::MAX_INDEX_LEN)).unwrap_or_default();
            index::parse(&os::read_exact_at(&file, &index, 0, len)?, &index)
        });
        replaced.push(index);
        let shards = text.map_or(Vec::new(), |index| index.shards);
        replaced
            .extend(shards.iter().filter(|shard| is_shard_of(path, shard)).map(|shard| parent.join(shard)));
    }
    replaced
}

/// The index of the set of a whole file's name, where there is one.
pub(crate) fn index_beside(path: &Path) -> Option<PathBuf> {
    index_name(path).map(|name| path.with_file_name(name)).filter(|index| index.is_file())
}

/// Whether a shard is named as one of the set of this file's name is.
fn is_shard_of(path: &Path, shard: &str) -> bool {
    let stem = path.file_stem().and_then(OsStr::to_str);
    stem.and_then(|stem| shard.strip_prefix(stem)).is_some_and(is_shard_suffix)
}

/// What the index of a set is called whose whole file would have this path; `None` for a shard, of which there is no
/// set.
fn index_name(path: &Path) -> Option<OsString> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".safetensors").filter(|stem| !stem.is_empty())?;
    let is_shard = name.match_indices('-').any(|(at, _)| is_shard_suffix(&name[at..]));
    (!is_shard).then(|| format!("{name}.index.json").into())
}

impl OldSet {
    fn find(dir: &Dir, path: &Path, name: &OsStr, lock: bool) -> Result<Self> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let dir = Arc::new(dir.again().map_err(Error::io(path, "opening its directory"))?);
        // Released when dropped, or by the process' death. File systems without locks lose only this.
        if lock {
            dir.flock().ok();
        }
        let index = parent.join(name);
        let bytes = match dir.read(name, index::MAX_INDEX_LEN) {
            Ok(bytes) => bytes,
            // No file, or not there any more.
            Err(error) if matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::NotFound) => Vec::new(),
            Err(error) => return Err(Error::io(&index, "reading the index of the model to replace")(error)),
        };
        let found = String::from_utf8(bytes).ok().and_then(|text| {
            let parsed = index::parse(text.as_bytes(), &index).ok()?;
            Some((text, parsed))
        });
        Ok(Self { dir, index, name: name.into(), found, marked: false })
    }

    /// Has the index say that the file of this name is the model, from the moment that it is there.
    fn give_way(&mut self, file: &OsStr, durable: bool) -> Result<()> {
        match &self.found {
            // Where a file is there already, what the index says of the two now holds until the index goes.
            Some((text, said)) if said.truth.is_none() && !self.dir.contains(file) => {
                self.marked = true;
                self.write(&index::marked(text, Truth::File), durable)
            }
            _ => Ok(()),
        }
    }

    fn write(&self, text: &str, durable: bool) -> Result<()> {
        write_index(&self.dir, &self.index, text, durable)
    }

    /// The save has failed: the index says again what it did.
    fn restore(&self, error: &Error, durable: bool) {
        // One that perhaps is not durable may yet be the model after all.
        if let (Some((text, _)), true, false) =
            (&self.found, self.marked, matches!(error, Error::NotDurable { .. }))
        {
            // Also where the save was cancelled. What it says of a file that is not there changes nothing.
            cancel::under(None, || self.write(text, durable)).ok();
        }
    }

    /// Takes the set away, which must not come back by a power loss.
    fn remove(&self, path: &Path, durable: bool) -> Result<()> {
        match self.dir.remove(&self.name) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Error::io(path, "removing the index of the old model beside it")(error));
            }
            Ok(()) if durable => {
                self.dir.sync().map_err(|source| Error::NotDurable { path: path.into(), source })?;
            }
            Ok(()) => {}
        }
        let shards = self.found.iter().flat_map(|(_, index)| &index.shards);
        let shards = shards.filter(|shard| is_shard_of(path, shard)).map(String::as_str);
        remove_shards(&self.dir, shards, path, path.parent().unwrap_or(Path::new("")))
    }
}

impl Drop for OldSet {
    fn drop(&mut self) {
        self.dir.unlock();
    }
}

/// Writes an index, whole or not at all.
pub(crate) fn write_index(dir: &Arc<Dir>, path: &Path, text: &str, durable: bool) -> Result<()> {
    let pending = Pending::create_in(dir, path, None)?;
    pending.allocate(text.len() as u64)?;
    let written = pending.file().write_all_at(text.as_bytes(), 0);
    written.map_err(Error::io(path, "writing the index"))?;
    pending.publish(durable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn a_whole_file_has_an_index_beside_it_and_a_shard_has_none() {
        for (name, index) in [
            ("d/model.safetensors", Some("model.safetensors.index.json")),
            ("a-1.safetensors", Some("a-1.safetensors.index.json")),
            ("d/model-00001-of-00002.safetensors", None),
            ("model-g2-00001-of-00002.safetensors", None),
            ("d/model", None),
            (".safetensors", None),
            ("..", None),
        ] {
            assert_eq!(index_name(Path::new(name)), index.map(OsString::from), "{name}");
        }
    }

    #[test]
    fn a_set_is_saved_beside_the_index_of_one_that_is_named_after_its_shard() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["m-00001-of-00002", "m-00002-of-00002"] {
            let text = format!(r#"{{"weight_map":{{"a":"{name}-00001-of-00001.safetensors"}}}}"#);
            std::fs::write(dir.path().join(format!("{name}.safetensors.index.json")), text).unwrap();
        }
        let (a, b) = ([1; 100], [2; 100]);
        let options = crate::save::SaveOptions::new().max_shard_size(100);
        // It would wait for itself, did it lock the directory for each shard.
        let tensors = [("a", (DType::U8, [100], a)), ("b", (DType::U8, [100], b))];
        options.save(tensors, dir.path().join("m.safetensors")).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5);
    }
}
