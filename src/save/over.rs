//! What may be written over what: one rule for everything that writes.
//!
//! 1. A **name** that says another kind of file is refused: weights under the name of an index would hide the model that
//!    the index stands for, and other programs go by such names. The list is short, and holds only names that say one
//!    kind: `.bin` and `.ckpt` may be anything.
//! 2. An **input** is not an output, whatever link or spelling it is named by: a file is known by device and inode. A
//!    whole model may be saved over the one file it was opened from, for that is what saving means; not over one of
//!    several, for the others would be left without it.
//! 3. **What is there**: a delta takes the place of no model, a picture that of no other file; and what is made of a base
//!    and deltas that of no delta, for then the output was forgotten.
//!
//! All of it is looked at before anything is written. A header edit writes over its input, which is its meaning;
//! checkpoints and publications have names that nothing else has, in a directory of theirs.

use super::beside::{index_beside, replaced_by};
use crate::diff::Contents;
use crate::error::{Error, Result, printable};
use crate::map::Backing;
use crate::model::layout_of;
use crate::os;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A safetensors file: a model, or a delta.
    Weights,
    /// An SVG.
    #[cfg_attr(not(feature = "cli"), allow(dead_code))]
    Picture,
    /// A directory of checkpoints, or a publication.
    Directory,
}

const INDEX: &str = ".index.json";

/// Ends of names, in lower case, and the kind of file that they say.
const NAMES: [(&str, &str); 13] = [
    (".safetensors", "a safetensors file"),
    (INDEX, "the index of a sharded model"),
    (".json", "JSON"),
    (".gguf", "GGUF"),
    (".pt", "a torch archive"),
    (".pth", "a torch archive"),
    (".pkl", "a pickle"),
    (".npy", "a numpy array"),
    (".npz", "an archive of numpy arrays"),
    (".h5", "HDF5"),
    (".onnx", "ONNX"),
    (".msgpack", "msgpack"),
    (".svg", "an SVG"),
];

impl Kind {
    /// That the name of what is to be written does not say another kind of file.
    ///
    /// # Errors
    /// [`Error::Argument`], with what to write to instead.
    pub(crate) fn check_name(self, path: &Path) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let lower = name.to_ascii_lowercase();
        let Some((end, says)) = NAMES.into_iter().find(|(end, _)| lower.ends_with(end)) else {
            return Ok(());
        };
        let (is, instead) = match self {
            Self::Weights if end == ".safetensors" => return Ok(()),
            Self::Picture if end == ".svg" => return Ok(()),
            // One that is there already has the name that somebody wanted.
            Self::Directory if path.is_dir() => return Ok(()),
            Self::Weights if end == INDEX && lower.ends_with(".safetensors.index.json") => {
                let file = path.with_file_name(&name[..name.len() - INDEX.len()]);
                let file = printable(&file.to_string_lossy());
                ("weights", format!("save to {file}; with max_shard_size, its shards and index are made"))
            }
            Self::Weights => ("weights", "give it one that ends in .safetensors".into()),
            Self::Picture => ("a picture", "give it one that ends in .svg".into()),
            Self::Directory => ("a directory", "name a directory".into()),
        };
        let path = printable(&path.to_string_lossy());
        Err(Error::Argument(format!("{path} is the name of {says}, and {is} would be written: {instead}")))
    }
}

/// What is made of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Made {
    Delta,
    /// The model that a base and deltas make.
    Result,
}

impl Made {
    /// That it may be written to a path, out of these models.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub(crate) fn may_be_at(self, path: &Path, inputs: &[&Contents<'_>]) -> Result<()> {
        Kind::Weights.check_name(path)?;
        for input in inputs {
            refuse_input(path, input)?;
        }
        let why = match (self, is_delta(path)) {
            _ if self == Self::Delta && index_beside(path).is_some() => {
                "is the name of the sharded model beside it, and a delta would take its place: write the delta under \
                 another name"
            }
            (Self::Delta, Some(false)) => {
                "is a model, and a delta would take its place: write the delta under another name"
            }
            (Self::Result, Some(true)) => {
                "is a delta, and the model would take its place: name another file to write to"
            }
            _ => return Ok(()),
        };
        Err(Error::Argument(format!("{} {why}", printable(&path.to_string_lossy()))))
    }
}

/// That a picture takes the place of a picture, and of nothing else.
///
/// # Errors
/// [`Error::Argument`].
#[cfg(feature = "cli")]
pub(crate) fn picture_may_be_at(path: &Path) -> Result<()> {
    use std::io::Read as _;
    Kind::Picture.check_name(path)?;
    let mut start = Vec::new();
    let Ok((file, _)) = os::open_regular(path) else { return Ok(()) };
    let read = file.take(4).read_to_end(&mut start);
    if read.is_ok() && !start.is_empty() && start != b"<svg" && start != b"<?xm" {
        let path = printable(&path.to_string_lossy());
        return Err(Error::Argument(format!("{path} is there and no SVG: a picture is not written over it")));
    }
    Ok(())
}

/// That the file at a path may be replaced by all of a model.
///
/// # Errors
/// [`Error::Argument`] where it is what the model is edited in, holds more than the model, or is one of several
/// files that it is made of.
pub(crate) fn model_may_be_at(path: &Path, model: &Contents<'_>) -> Result<()> {
    Kind::Weights.check_name(path)?;
    let Some((there, len)) = there(path) else { return Ok(()) };
    let refused = |why: &str| {
        let path = printable(&path.to_string_lossy());
        Err(Error::Argument(format!("{path} {why}")))
    };
    let shards = model.catalog.shards();
    for (shard, memory) in shards.iter().zip(&model.memories) {
        let Some((mapped, part)) = memory.in_file() else { continue };
        let is_mapped = mapped == Some(there);
        // One that was read from within a file has no mapping of it.
        let is_within = part.start != 0 && identity(&shard.path) == Some(there);
        if is_mapped && memory.backing() == Backing::Shared {
            return refused("is the file that this model is edited in: flush it, or save under another name");
        }
        if is_within || is_mapped && part != (0..len) {
            return refused("holds more than this model, which would be lost: save under another name");
        }
    }
    let is_index = model.catalog.index.as_deref().and_then(identity) == Some(there);
    if is_index || shards.len() > 1 && is_of(there, model) {
        return refused(
            "is one of the files that this model was opened from, and the others would be left without it: save under \
             another name (the index's, less .index.json, replaces them all)",
        );
    }
    Ok(())
}

/// That nothing goes, when a path is written to, that a model was opened from.
fn refuse_input(path: &Path, model: &Contents<'_>) -> Result<()> {
    let index = model.catalog.index.as_deref().and_then(identity);
    for replaced in replaced_by(path) {
        if identity(&replaced).is_some_and(|there| is_of(there, model) || Some(there) == index) {
            let (path, replaced) = (path.to_string_lossy(), replaced.to_string_lossy());
            let (path, replaced) = (printable(&path), printable(&replaced));
            let what = if path == replaced { path } else { format!("{replaced}, whose place {path} takes,") };
            let why = "is an input, and would be replaced by what is made of it: write to another name";
            return Err(Error::Argument(format!("{what} {why}")));
        }
    }
    Ok(())
}

/// Device and inode.
type Identity = (u64, u64);

/// Whether a file is one of a model's: that is mapped, or that is there now by its name.
fn is_of(file: Identity, model: &Contents<'_>) -> bool {
    let shards = model.catalog.shards();
    shards.iter().any(|shard| identity(&shard.path) == Some(file))
        || model
            .memories
            .iter()
            .any(|memory| memory.in_file().is_some_and(|(mapped, _)| mapped == Some(file)))
}

/// What a path leads to, and its length.
fn there(path: &Path) -> Option<(Identity, u64)> {
    std::fs::metadata(path).ok().map(|there| ((there.dev(), there.ino()), there.len()))
}

fn identity(path: &Path) -> Option<Identity> {
    there(path).map(|(identity, _)| identity)
}

/// The metadata entry that makes a file a delta: what it is for.
pub(crate) const DELTA: &str = "maptensors.delta";

/// Whether a safetensors file is a delta; `None` where there is none that can be read.
fn is_delta(path: &Path) -> Option<bool> {
    let (file, len) = os::open_regular(path).ok()?;
    let layout = layout_of(&file, len, path).ok()?;
    Some(layout.metadata().contains_key(DELTA))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_says_another_kind_of_file_is_refused() {
        for (kind, name, refused) in [
            (Kind::Weights, "m.safetensors", false),
            (Kind::Weights, "m", false),
            (Kind::Weights, "m.bin", false),
            (Kind::Weights, "m.delta", false),
            (Kind::Weights, "index.json.safetensors", false),
            (Kind::Weights, "m.safetensors.index.json", true),
            (Kind::Weights, "M.SafeTensors.Index.JSON", true),
            (Kind::Weights, "pytorch_model.bin.index.json", true),
            (Kind::Weights, "config.json", true),
            (Kind::Weights, "m.gguf", true),
            (Kind::Weights, "m.PT", true),
            (Kind::Weights, ".npz", true),
            (Kind::Weights, "m.svg", true),
            (Kind::Picture, "m.svg", false),
            (Kind::Picture, "m", false),
            (Kind::Picture, "m.safetensors", true),
            (Kind::Picture, "m.safetensors.index.json", true),
            (Kind::Directory, "run.7", false),
            (Kind::Directory, "m.safetensors", true),
        ] {
            let checked = kind.check_name(&Path::new("dir").join(name));
            assert_eq!(checked.is_err(), refused, "{kind:?} {name}");
        }
        let error = Kind::Weights.check_name(Path::new("d/m.safetensors.index.json")).unwrap_err();
        assert!(error.to_string().contains("save to d/m.safetensors; with max_shard_size"), "{error}");
    }
}
