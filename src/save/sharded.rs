//! A model over several files: shards first, index last.

use super::beside::write_index;
use super::over::Kind;
use super::pending::{file_name, replaced_mode};
use crate::error::{Error, Result};
use crate::format::index::{self, Index, Truth};
use crate::format::safetensors;
use crate::layout::Metadata;
use crate::map::Mapping;
use crate::os;
use crate::os::disk::Dir;
use crate::os::fork::Owner;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What makes one file visible. What it returns is the file's memory, to be unmapped when there is time.
pub(crate) type Commit = Box<dyn FnOnce() -> Result<Option<Mapping>> + Send>;

/// Saves tensors, given by name and size, over files of at most `limit` data bytes; `write` saves a part
/// of them as one file in a directory. All or nothing: no existing shard is overwritten, so until the index
/// is renamed into place the old set is whole; after it, the new one is.
///
/// # Errors
/// As [`stage`] and [`Set::commit`].
pub(crate) fn save<E: From<Error>>(
    tensors: &[(&str, u64)],
    path: &Path,
    limit: u64,
    metadata: Option<&Metadata>,
    durable: bool,
    write: impl Fn(Range<usize>, &Path, &Arc<Dir>) -> Result<(), E>,
) -> Result<(), E> {
    save_in(Locked::wait(path)?, tensors, path, limit, metadata, durable, write)
}

/// The directory of a set, locked: one set at a time.
pub(crate) struct Locked(Target);

impl Locked {
    /// Waits for whoever saves a set there. Not to be called with anything held that others need to finish.
    ///
    /// # Errors
    /// As [`save`], of the path and its directory.
    pub(crate) fn wait(path: &Path) -> Result<Self> {
        let target = Target::of(path, None)?;
        // File systems without locks lose only this.
        target.dir.flock().ok();
        Ok(Self(target))
    }
}

/// As [`save`], in a directory that is locked.
///
/// # Errors
/// As there.
pub(crate) fn save_in<E: From<Error>>(
    Locked(target): Locked,
    tensors: &[(&str, u64)],
    path: &Path,
    limit: u64,
    metadata: Option<&Metadata>,
    durable: bool,
    write: impl Fn(Range<usize>, &Path, &Arc<Dir>) -> Result<(), E>,
) -> Result<(), E> {
    // Each file is committed once it is filled, so that no two need memory together.
    let later = |_, _: &Path, _: &Arc<Dir>| Ok(Box::new(|| Ok(None)) as Commit);
    let mut set = stage_at::<E>(target, tensors, path, limit, metadata, durable, later)?;
    for shard in &set.shards {
        set.written.extend(set.index.as_ref().map(|_| shard.path.clone()));
        write(shard.tensors.clone(), &shard.path, &set.target.dir)?;
    }
    Ok(set.commit()?)
}

/// Makes all files of a set in a directory that is open, up to their commits.
///
/// # Errors
/// Those of `write`; [`Error::Argument`] for a path that shards cannot be named after; [`Error::Io`];
/// [`Error::Duplicate`].
pub(crate) fn stage<E: From<Error>>(
    dir: &Arc<Dir>,
    tensors: &[(&str, u64)],
    path: &Path,
    limit: u64,
    metadata: Option<&Metadata>,
    durable: bool,
    write: impl Fn(Range<usize>, &Path) -> Result<Commit, E>,
) -> Result<Set, E> {
    let target = Target::of(path, Some(dir))?;
    stage_at(target, tensors, path, limit, metadata, durable, |part, path, _| write(part, path))
}

fn stage_at<E: From<Error>>(
    target: Target,
    tensors: &[(&str, u64)],
    path: &Path,
    limit: u64,
    metadata: Option<&Metadata>,
    durable: bool,
    write: impl Fn(Range<usize>, &Path, &Arc<Dir>) -> Result<Commit, E>,
) -> Result<Set, E> {
    // One set at a time: names are chosen, and old shards removed, by what is there. Released when dropped,
    // or by the process' death. File systems without locks lose only this.
    target.dir.flock().ok();
    replaced_mode(&target.dir, path, file_name(path)?)?;
    let mut old = target.old_shards();
    let groups = group(tensors, limit);
    if groups.len() == 1 {
        // Whoever commits a whole file sees to the set beside it, under the same lock.
        target.dir.unlock();
    }
    let mut set = Set {
        target,
        path: path.into(),
        durable,
        index: None,
        old: Vec::new(),
        shards: Vec::new(),
        written: Vec::new(),
        owner: Owner::me(),
    };
    let paths: Vec<PathBuf> = if groups.len() == 1 {
        old.clear();
        vec![path.to_owned()]
    } else {
        let names = set.target.free_names(groups.len(), &old);
        // An old index may name files that are gone, and whose names are free again.
        old.retain(|shard| !names.contains(shard));
        set.index = Some(encode_index(tensors, &groups, &names, metadata, path)?);
        names.iter().map(|name| set.target.parent.join(name)).collect()
    };
    set.old = old;
    for (tensors, path) in groups.into_iter().zip(paths) {
        let commit = write(tensors.clone(), &path, &set.target.dir)?;
        set.shards.push(Shard { tensors, path, commit });
    }
    Ok(set)
}

/// The index that says which tensor is in which file.
fn encode_index(
    tensors: &[(&str, u64)],
    groups: &[Range<usize>],
    names: &[String],
    metadata: Option<&Metadata>,
    path: &Path,
) -> Result<String> {
    let mut weight_map = BTreeMap::new();
    for (group, file) in groups.iter().zip(names) {
        for (name, _) in &tensors[group.clone()] {
            if weight_map.insert(*name, file.as_str()).is_some() {
                return Err(Error::Duplicate { path: path.into(), what: "tensor", name: (*name).into() });
            }
        }
    }
    let total_size = tensors.iter().map(|(_, size)| size).sum();
    let metadata = metadata.map(safetensors::texts).transpose()?;
    Ok(index::encode(&weight_map, &metadata.unwrap_or_default(), total_size))
}

/// A model over several files, filled and not yet visible; one file, if all fits.
pub(crate) struct Set {
    target: Target,
    path: PathBuf,
    durable: bool,
    /// `None` for one file.
    index: Option<String>,
    /// The files of the set that is replaced.
    old: Vec<String>,
    shards: Vec<Shard>,
    /// Shards in place, or about to be (one may be in place and not durable), removed again unless the index
    /// follows. A file that is no shard takes an old one's place, and is not.
    written: Vec<PathBuf>,
    owner: Owner,
}

struct Shard {
    tensors: Range<usize>,
    path: PathBuf,
    commit: Commit,
}

impl Set {
    /// Makes it visible: every shard, then the index, then the old set's files go.
    ///
    /// # Errors
    /// Those of the shards' commits; of the index [`Error::Io`], [`Error::NotDurable`], [`Error::Moved`]; and, once it is
    /// visible, [`Error::NotRemoved`] for a file of the old set.
    pub(crate) fn commit(mut self) -> Result<()> {
        self.owner.check(&format!("the unfinished {}", self.path.display()))?;
        let done = self.try_commit();
        let left = self.take_back();
        match (done, left) {
            // It is not visible, and more is left than the caller would think.
            (Err(Error::Io { path, action, source }), Some((left, why))) => {
                let left = crate::error::printable(&left.to_string_lossy());
                let action = format!("{action} (and {left} is left, which could not be removed: {why})");
                Err(Error::Io { path, action: action.into(), source })
            }
            (done, _) => done,
        }
    }

    fn try_commit(&mut self) -> Result<()> {
        for shard in std::mem::take(&mut self.shards) {
            self.written.extend(self.index.as_ref().map(|_| shard.path));
            (shard.commit)()?;
        }
        let Some(text) = self.index.take() else { return Ok(()) };
        let file = self.path.file_name().unwrap_or_default();
        let beside_file = self.target.dir.contains(file);
        let write = |text: &str| write_index(&self.target.dir, &self.target.index, text, self.durable);
        let published = if beside_file { write(&index::marked(&text, Truth::Index)) } else { write(&text) };
        if matches!(published, Ok(()) | Err(Error::NotDurable { .. })) {
            // The index is in place: the new set is the model, whatever happens now.
            self.written.clear();
        }
        // An index that a power loss may undo needs the old set: nothing of that goes before the new one is durable.
        published?;
        // A single file of that name is not the model any more, and readers would take it for one.
        self.remove_superseded(file)?;
        if beside_file {
            // What the index says of a file that is not there harms nobody.
            write_index(&self.target.dir, &self.target.index, &text, self.durable).ok();
        }
        self.remove_old()
    }

    /// Removes the files of the old set, which harm nobody but take space.
    fn remove_old(&self) -> Result<()> {
        let old = self.old.iter().map(String::as_str);
        remove_shards(&self.target.dir, old, &self.path, &self.target.parent)
    }

    /// Removes the shards of a set that does not come about; says what it could not remove.
    fn take_back(&mut self) -> Option<(PathBuf, std::io::Error)> {
        let mut left = None;
        for path in std::mem::take(&mut self.written) {
            let name = path.file_name().unwrap_or_default();
            match self.target.dir.remove(name) {
                // It may never have had its name.
                Err(error) if self.target.dir.contains(name) => left = Some((path, error)),
                _ => {}
            }
        }
        left
    }

    /// Removes what readers would take for the model instead of what was just saved. It must not come back
    /// by a power loss once this is done.
    fn remove_superseded(&self, name: &OsStr) -> Result<()> {
        match self.target.dir.remove(name) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                Err(Error::io(&self.path, "removing the old model, which hides the new one")(error))
            }
            Ok(()) if self.durable => {
                let not_durable = |source| Error::NotDurable { path: self.path.clone(), source };
                self.target.dir.sync().map_err(not_durable)
            }
            Ok(()) => Ok(()),
        }
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        // A fork's child has a copy of this value, and no business with the set.
        if !self.owner.is_me() {
            return;
        }
        // Where there is anything to take back here, an error of its staging is on its way, which says why there is no
        // set. No index names what could not be removed.
        self.take_back();
        self.target.dir.unlock();
    }
}

/// Consecutive tensors of at most `limit` bytes together; a larger one stands alone.
fn group(tensors: &[(&str, u64)], limit: u64) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    let (mut start, mut size) = (0, 0u64);
    for (i, (_, len)) in tensors.iter().enumerate() {
        if i > start && size.saturating_add(*len) > limit {
            groups.push(start..i);
            (start, size) = (i, 0);
        }
        size = size.saturating_add(*len);
    }
    groups.push(start..tensors.len());
    groups
}

/// Whether this is what stands behind the stem in a shard's name: `-00001-of-00002.safetensors`, perhaps
/// with a generation before it.
pub(crate) fn is_shard_suffix(rest: &str) -> bool {
    let digits = |text: &str, len: usize| text.len() >= len && text.bytes().all(|b| b.is_ascii_digit());
    let Some(rest) = rest.strip_prefix('-').and_then(|r| r.strip_suffix(".safetensors")) else {
        return false;
    };
    let rest = match rest.strip_prefix('g').and_then(|r| r.split_once('-')) {
        Some((generation, rest)) if digits(generation, 1) => rest,
        _ => rest,
    };
    rest.split_once("-of-").is_some_and(|(number, count)| digits(number, 5) && digits(count, 5))
}

/// Removes the shards of a set whose place a model at `path` has taken: they harm nobody, but take space.
///
/// # Errors
/// [`Error::NotRemoved`] for the first that cannot be removed.
pub(crate) fn remove_shards<'a>(
    dir: &Dir,
    shards: impl Iterator<Item = &'a str>,
    path: &Path,
    parent: &Path,
) -> Result<()> {
    let mut done = Ok(());
    for name in shards {
        match dir.remove(OsStr::new(name)) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound && done.is_ok() => {
                done = Err(Error::NotRemoved { path: path.into(), left: parent.join(name), source });
            }
            _ => {}
        }
    }
    done
}

/// Where a set called `dir/stem.safetensors` goes.
struct Target {
    dir: Arc<Dir>,
    parent: PathBuf,
    stem: String,
    index: PathBuf,
}

impl Target {
    /// In `dir`, or the directory of `path`.
    fn of(path: &Path, dir: Option<&Arc<Dir>>) -> Result<Self> {
        Kind::Weights.check_name(path)?;
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stem = name.strip_suffix(".safetensors").filter(|stem| !stem.is_empty()).ok_or_else(|| {
            Error::Argument(format!(
                "{}: saving in shards needs a path like model.safetensors, after which they are named",
                path.display()
            ))
        })?;
        if let Some(reason) = index::refuse(stem) {
            return Err(Error::Argument(format!(
                "{}: shards cannot be named after it: {reason}",
                path.display()
            )));
        }
        let parent = path.parent().unwrap_or(Path::new("")).to_owned();
        let index = parent.join(format!("{stem}.safetensors.index.json"));
        let dir = match dir {
            // With a lock of its own: one set at a time, of one process as well.
            Some(dir) => Arc::new(dir.again().map_err(Error::io(path, "opening its directory"))?),
            None => Arc::new(Dir::open(&parent).map_err(Error::io(path, "opening its directory"))?),
        };
        Ok(Self { dir, parent, stem: stem.into(), index })
    }

    fn index_name(&self) -> &OsStr {
        self.index.file_name().unwrap_or_default()
    }

    /// The files of the set that is there now, which the new one replaces. An index that cannot be read
    /// owns nothing, and none owns files that are not named like its shards, whatever it lists.
    fn old_shards(&self) -> Vec<String> {
        let read = || -> Result<Index> {
            let (file, len) = os::open_regular_in(&self.dir, self.index_name(), &self.index)?;
            let len = usize::try_from(len.min(index::MAX_INDEX_LEN)).unwrap_or_default();
            index::parse(&os::read_exact_at(&file, &self.index, 0, len)?, &self.index)
        };
        let ours = |shard: &&String| shard.strip_prefix(&self.stem).is_some_and(is_shard_suffix);
        read().map_or(Vec::new(), |index| index.shards.iter().filter(ours).cloned().collect())
    }

    /// Names of which none exists: `model-00001-of-00002.safetensors`, or with a generation
    /// (`model-g2-00001-of-00002.safetensors`) where a set is there already: one above the old set's, for a
    /// reader of an index two saves ago must find its shards gone, and not others under their names.
    fn free_names(&self, count: usize, old: &[String]) -> Vec<String> {
        let last =
            old.iter().map(|shard| generation(shard.strip_prefix(&self.stem).unwrap_or_default())).max();
        let mut generation = last.map_or(1, |last| last + 1);
        loop {
            let tag = if generation == 1 { String::new() } else { format!("-g{generation}") };
            let names: Vec<String> =
                (1..=count).map(|i| format!("{}{tag}-{i:05}-of-{count:05}.safetensors", self.stem)).collect();
            if !names.iter().any(|name| self.dir.contains(OsStr::new(name))) {
                return names;
            }
            generation = generation.saturating_add(1);
        }
    }
}

/// The generation in what stands behind the stem in a shard's name. Who writes absurd ones gets low ones.
fn generation(rest: &str) -> u32 {
    let tag = rest.strip_prefix("-g").and_then(|rest| rest.split('-').next());
    tag.and_then(|tag| tag.parse().ok()).filter(|&generation| generation < u32::MAX / 2).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_made_here_count_as_shards() {
        for (rest, expected) in [
            ("-00001-of-00002.safetensors", true),
            ("-g2-00001-of-00002.safetensors", true),
            ("-g12-100001-of-100002.safetensors", true),
            (".safetensors", false),
            ("-notes.safetensors", false),
            ("-1-of-2.safetensors", false),
            ("-g-00001-of-00002.safetensors", false),
            ("-00001-of-00002.json", false),
            ("-other-00001-of-00002.safetensors", false),
        ] {
            assert_eq!(is_shard_suffix(rest), expected, "{rest}");
        }
    }

    #[test]
    fn every_set_has_names_that_the_last_one_had_not() {
        let dir = tempfile::tempdir().unwrap();
        let target = Target::of(&dir.path().join("m.safetensors"), None).unwrap();
        let first = |old: &[&str]| {
            let old: Vec<String> = old.iter().map(|name| (*name).into()).collect();
            target.free_names(2, &old).swap_remove(0)
        };
        for (old, expected) in [
            (&[][..], "m-00001-of-00002.safetensors"),
            (&["m-00001-of-00002.safetensors"], "m-g2-00001-of-00002.safetensors"),
            (&["m-g2-00001-of-00002.safetensors"], "m-g3-00001-of-00002.safetensors"),
            (
                &["m-00001-of-00002.safetensors", "m-g41-00002-of-00002.safetensors"],
                "m-g42-00001-of-00002.safetensors",
            ),
            (&["m-g4294967295-00001-of-00002.safetensors"], "m-g2-00001-of-00002.safetensors"),
        ] {
            assert_eq!(first(old), expected, "{old:?}");
        }
        std::fs::write(dir.path().join("m-g2-00002-of-00002.safetensors"), b"left by a crash").unwrap();
        assert_eq!(first(&["m-00001-of-00002.safetensors"]), "m-g3-00001-of-00002.safetensors");
    }

    #[test]
    fn tensors_are_grouped_in_order_and_a_large_one_stands_alone() {
        let sizes = |sizes: &[u64]| sizes.iter().map(|&size| ("t", size)).collect::<Vec<_>>();
        assert_eq!(group(&sizes(&[3, 3, 3]), 6), [0..2, 2..3]);
        assert_eq!(group(&sizes(&[1, 9, 1]), 6), [0..1, 1..2, 2..3]);
        assert_eq!(group(&sizes(&[]), 6).len(), 1);
        assert_eq!(group(&sizes(&[u64::MAX, u64::MAX]), 6), [0..1, 1..2]);
    }
}
