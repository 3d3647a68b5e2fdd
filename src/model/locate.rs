//! From a path to the files that it stands for.

use super::again;
use crate::error::{Error, Result};
use crate::format::index::{self, Truth};
use crate::os;
use crate::work;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The files of a model.
#[derive(Debug)]
pub struct Location {
    /// What the user named, for errors that concern the whole.
    pub(crate) path: PathBuf,
    pub(crate) files: Vec<PathBuf>,
    /// What the index says, to be checked against the files.
    pub(crate) index: Option<index::Index>,
    /// What the files were found by, and can be again when a save replaces them; `None` where each was named.
    pub(super) found_by: Option<PathBuf>,
    /// The index's file. Held open: no other is of the same inode.
    pub(super) index_file: Option<File>,
}

impl Location {
    /// Of files that are each named.
    pub(crate) fn files(files: Vec<PathBuf>) -> Self {
        Self {
            path: files.first().cloned().unwrap_or_default(),
            files,
            index: None,
            found_by: None,
            index_file: None,
        }
    }

    /// Whether the index is another one by now, or gone.
    pub(super) fn is_replaced(&self) -> bool {
        let identity = |found: std::fs::Metadata| (found.dev(), found.ino());
        let Some(Ok(read)) = self.index_file.as_ref().map(File::metadata) else { return false };
        match std::fs::metadata(&self.path) {
            Ok(now) => identity(now) != identity(read),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        }
    }
}

const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// Finds the files that `path` stands for.
///
/// # Errors
/// [`Error::Io`]; those of [`index::parse`]; [`Error::NotRegular`] for a directory without a model, or
/// with several; [`Error::Argument`] for one with a whole file and an index of the same name, of which nothing says
/// which is the model.
pub(crate) fn locate(path: &Path) -> Result<Location> {
    again::find(path, look)
}

fn look(path: &Path) -> Result<Location> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if path.is_dir() {
        return look(&pick(path)?);
    }
    if !name.ends_with(".index.json") {
        return Ok(Location::files(vec![path.into()]));
    }
    let (file, index) = read_index(path)?;
    // Beside the index as it was named: a hub cache's index is a link, and so are the shards beside it.
    let dir = path.parent().unwrap_or(Path::new(""));
    let files = index.shards.iter().map(|shard| dir.join(shard)).collect();
    Ok(Location { path: path.into(), files, index: Some(index), found_by: None, index_file: Some(file) })
}

fn read_index(path: &Path) -> Result<(File, index::Index)> {
    let (file, len) = os::open_regular(path)?;
    let limit = index::MAX_INDEX_LEN;
    let too_long =
        || Error::Limit { path: path.into(), what: "the index length", found: len, limit, hint: None };
    let len = usize::try_from(len).ok().filter(|&n| n as u64 <= limit).ok_or_else(too_long)?;
    let index = index::parse(&os::read_exact_at(&file, path, 0, len)?, path)?;
    Ok((file, index))
}

/// The model in a directory: its index, or its only safetensors file.
fn pick(dir: &Path) -> Result<PathBuf> {
    let usual = dir.join("model.safetensors.index.json");
    if usual.exists() {
        return beside_its_file(usual);
    }
    if dir.join("model.safetensors").exists() {
        return Ok(dir.join("model.safetensors"));
    }
    let (mut indices, mut files) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir, "listing the directory"))? {
        let name = entry.map_err(Error::io(dir, "listing the directory"))?.file_name();
        let text = name.to_string_lossy();
        if text.starts_with("._") {
            // What macOS keeps of a file beside it (AppleDouble), on file systems without room for that.
        } else if text.ends_with(INDEX_SUFFIX) {
            indices.push(dir.join(&name));
        } else if text.ends_with(".safetensors") {
            files.push(dir.join(&name));
        }
    }
    // Shards that no index lists are no model: a save that was killed has left them, beside the old file.
    if indices.is_empty() && files.iter().filter(|path| !is_part(path)).count() == 1 {
        files.retain(|path| !is_part(path));
    }
    match (indices.as_slice(), files.as_slice()) {
        ([], [only]) if is_part(only) => Err(Error::NotRegular {
            path: dir.into(),
            found: "a directory with one shard of several, and no index",
        }),
        ([only], _) => beside_its_file(only.clone()),
        ([], [only]) => Ok(only.clone()),
        ([], []) => {
            Err(Error::NotRegular { path: dir.into(), found: "a directory without a safetensors model" })
        }
        _ => Err(Error::NotRegular { path: dir.into(), found: "a directory with several models: name one" }),
    }
}

/// An index, or the whole file of its name beside it. Where both are there, other loaders disagree (transformers
/// takes the file, vLLM the index): it must be known that they are one model, or which of them is.
///
/// # Errors
/// [`Error::Argument`] where it is not; those of [`read_index`].
fn beside_its_file(index: PathBuf) -> Result<PathBuf> {
    let file = index.with_extension("").with_extension("");
    let identity = |path: &Path| {
        let there = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
        Some((there.dev(), there.ino()))
    };
    let dir = index.parent().unwrap_or(Path::new(""));
    let mut patience = work::Patience::new();
    loop {
        let Some(whole) = identity(&file) else { return Ok(index) };
        let (opened, said) = read_index(&index)?;
        match said.truth {
            Some(Truth::File) => return Ok(file),
            Some(Truth::Index) => return Ok(index),
            None => {}
        }
        if !said.shards.is_empty()
            && said.shards.iter().all(|shard| identity(&dir.join(shard)) == Some(whole))
        {
            return Ok(file);
        }
        // Looked at one after the other, they may never have been there together: a save marks the index before it puts
        // a file beside it. The file first, and the index, which is open, so that no other has its inode: if both are as
        // they were, they are.
        let is_there = identity(&file) == Some(whole);
        let read = opened.metadata().map(|read| (read.dev(), read.ino())).ok();
        if is_there && identity(&index) == read || !patience.again() {
            break;
        }
    }
    let name = |path: &Path| crate::error::printable(&path.file_name().unwrap_or_default().to_string_lossy());
    Err(Error::Argument(format!(
        "{}: there are {} and {}, and nothing says which of them is the model (of other loaders, some take the file, \
         some the index): open one of them by its own path, or remove the other",
        crate::error::printable(&dir.to_string_lossy()),
        name(&file),
        name(&index),
    )))
}

/// Whether a file's name says that it is one of several: `…-00001-of-00002.safetensors`.
fn is_part(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let parts = stem.rsplit_once("-of-").and_then(|(rest, count)| Some((rest.rsplit_once('-')?.1, count)));
    parts.is_some_and(|(number, count)| {
        number.parse::<u32>().is_ok() && count.parse::<u32>().is_ok_and(|count| count > 1)
    })
}
