//! A model over several files: shards first, index last.

use super::{Pair, Pending, SaveOptions};
use crate::error::{Error, Result};
use crate::format::index::{self, Index};
use crate::map;
use safetensors::View;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Saves `tensors` over files of at most `limit` data bytes. All or nothing: no existing shard is
/// overwritten, so until the index is renamed into place the old set is whole; after it, the new one is.
///
/// # Errors
/// As [`SaveOptions::save`].
pub(super) fn save<V: View>(
    options: &SaveOptions,
    tensors: &[Pair<V>],
    path: &Path,
    limit: u64,
) -> Result<()> {
    let target = Target::of(path)?;
    let old = target.old_shards();
    let groups = group(tensors, limit);
    if groups.len() <= 1 {
        options.save_one(tensors, path)?;
        // Readers prefer an index: a stale one would hide the new file.
        remove(&target.index);
        old.iter().filter(|shard| shard.as_path() != path).for_each(|shard| remove(shard));
        return Ok(());
    }
    let names = target.free_names(groups.len());
    let mut undo = Undo(Vec::new());
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0u64;
    for (group, name) in groups.iter().zip(&names) {
        let shard = target.dir.join(name);
        options.save_one(group, &shard)?;
        undo.0.push(shard);
        for tensor in *group {
            weight_map.insert(tensor.name.as_str(), name.as_str());
            total_size += tensor.view.data_len() as u64;
        }
    }
    if weight_map.len() != tensors.len() {
        let mut seen = std::collections::HashSet::new();
        let twice = tensors.iter().find(|t| !seen.insert(&t.name)).map_or("", |t| &t.name);
        return Err(Error::Duplicate { path: path.into(), what: "tensor", name: twice.into() });
    }
    let metadata = options.metadata.clone().unwrap_or_default();
    let text = index::encode(&weight_map, &metadata, total_size);
    let pending = Pending::create(&target.index)?;
    pending.allocate(text.len() as u64)?;
    pending.file().write_all_at(text.as_bytes(), 0).map_err(Error::io(&target.index, "writing the index"))?;
    let published = pending.publish(options.draft.is_durable());
    if !matches!(published, Err(Error::Io { .. })) {
        // The index is in place: the new set is the model, whatever happens now.
        undo.0.clear();
        let new = |shard: &PathBuf| names.iter().any(|name| target.dir.join(name) == *shard);
        old.iter().filter(|shard| !new(shard)).for_each(|shard| remove(shard));
    }
    published
}

/// Best effort: what is left behind takes space and harms nobody.
fn remove(path: &Path) {
    std::fs::remove_file(path).ok();
}

/// Shards already in place, removed again unless the index follows.
struct Undo(Vec<PathBuf>);

impl Drop for Undo {
    fn drop(&mut self) {
        self.0.iter().for_each(|shard| remove(shard));
    }
}

/// Consecutive tensors of at most `limit` bytes together; a larger one stands alone.
fn group<V: View>(tensors: &[Pair<V>], limit: u64) -> Vec<&[Pair<V>]> {
    let mut groups = Vec::new();
    let (mut start, mut size) = (0, 0u64);
    for (i, tensor) in tensors.iter().enumerate() {
        let len = tensor.view.data_len() as u64;
        if i > start && size.saturating_add(len) > limit {
            groups.push(&tensors[start..i]);
            (start, size) = (i, 0);
        }
        size = size.saturating_add(len);
    }
    groups.push(&tensors[start..]);
    groups
}

/// Where a set called `dir/stem.safetensors` goes.
struct Target {
    dir: PathBuf,
    stem: String,
    index: PathBuf,
}

impl Target {
    fn of(path: &Path) -> Result<Self> {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stem = name.strip_suffix(".safetensors").filter(|stem| !stem.is_empty()).ok_or_else(|| {
            Error::Argument(format!(
                "{}: saving in shards needs a path like model.safetensors, after which they are named",
                path.display()
            ))
        })?;
        let dir = path.parent().unwrap_or(Path::new("")).to_owned();
        let index = dir.join(format!("{stem}.safetensors.index.json"));
        Ok(Self { dir, stem: stem.into(), index })
    }

    /// The files of the set that is there now. An index that cannot be read owns nothing.
    fn old_shards(&self) -> Vec<PathBuf> {
        let read = || -> Result<Index> {
            let (file, len) = map::open_regular(&self.index)?;
            let len = usize::try_from(len.min(index::MAX_INDEX_LEN)).unwrap_or_default();
            index::parse(&map::read_exact_at(&file, &self.index, 0, len)?, &self.index)
        };
        read().map_or(Vec::new(), |index| index.shards.iter().map(|shard| self.dir.join(shard)).collect())
    }

    /// Names of which none exists: `model-00001-of-00002.safetensors`, or with a generation
    /// (`model-g2-00001-of-00002.safetensors`) where a set is there already.
    fn free_names(&self, count: usize) -> Vec<String> {
        let mut generation = 1u32;
        loop {
            let tag = if generation == 1 { String::new() } else { format!("-g{generation}") };
            let names: Vec<String> =
                (1..=count).map(|i| format!("{}{tag}-{i:05}-of-{count:05}.safetensors", self.stem)).collect();
            if names.iter().all(|name| self.dir.join(name).symlink_metadata().is_err()) {
                return names;
            }
            generation = generation.saturating_add(1);
        }
    }
}
