//! Writing files: planned, allocated, mapped, filled, then renamed into place.
//!
//! # The commit protocol
//!
//! 1. A new file in the same directory, without a name (`O_TMPFILE`): nobody can open it, and of a process that is killed
//!    nothing is left. Where the file system has no such files, one with a random name, created with `O_EXCL`.
//! 2. `fallocate(2)` to the full size: a full disk is an error now, not a `SIGBUS` later. Where the file
//!    system cannot, the file is written with `pwrite(2)` instead of through a mapping.
//! 3. Mapped shared, huge pages advised before the first touch, filled in parallel, unmapped.
//! 4. Mode: the umask's for a new file, the old file's for a replacement.
//! 5. One fsync(2). The first error is final; nothing is left and the error is returned.
//! 6. A name: by `linkat(2)` where nothing has it; otherwise a random one, and `rename(2)`. Then fsync of the directory. A
//!    failure there is [`Error::NotDurable`]: the new file is visible, but perhaps not after a power loss.
//!
//! The random name of step 6 is given before step 5 on file systems that are not known to keep what is synced of a
//! file without a name (known are ext4, XFS and tmpfs). Where a file that has none may not be linked, it is copied
//! into one that has.
//!
//! A file that is being made is the process's that makes it. A child that is forked has neither its memory, from step 3 to
//! its end, nor its descriptor, and cannot publish it.
//!
//! A file with a random name (`.maptensors-….tmp`) is there for others to open: the same user's processes, and this one.
//! It is locked, so that no other save takes it for one that was left behind; that nobody writes to it is trust in the
//! directory. Besides those of step 1 it is files that checkpoints and publications use again; their memory
//! is handed out to nobody.
//!
//! `durable(false)` skips the two fsyncs and nothing else: readers still see the old file or the new one,
//! whole; a power loss may lose it.
//!
//! A whole file takes the place of a sharded set of its name as well, and a set that of a file: once the new model is
//! durable, the index and shards of the old one go, or its file. At every instant between, the old model is found or the
//! new one.
//!
//! # What may be written over what
//!
//! A name that says another kind of file is refused ([`Error::Argument`]): that of an index
//! (`model.safetensors.index.json`: save to `model.safetensors`), and those that end in `.json`, `.gguf`, `.pt`, `.pth`,
//! `.pkl`, `.npy`, `.npz`, `.h5`, `.onnx`, `.msgpack` or `.svg`. So is a file that is an input, by whatever link or
//! spelling: a delta is not written over a model that it is made of, nor the result of deltas over the base or a delta.
//! A model may be saved over the one file that it was opened from, and not over one of several.
//!
//! What is not promised: a symbolic link at the destination is itself replaced, its target is not
//! touched; of a hard-linked file, the other names keep the old content; owner, ACLs and extended
//! attributes of a replaced file are not carried over. Saving takes the space of both files until the rename.

#![forbid(unsafe_code)]

pub(crate) mod beside;
pub(crate) mod checksum;
mod draft;
mod edit;
mod fill;
pub(crate) mod over;
mod pending;
pub(crate) mod sharded;
#[cfg(feature = "python")]
mod shared;
pub(crate) mod slot;
mod stage;
mod tensor;

#[cfg(feature = "python")]
pub(crate) use draft::place;
pub use draft::{Draft, DraftOptions};
pub use edit::{Edited, HeaderEdit};
pub(crate) use fill::{Target, fill};
#[cfg(feature = "cli")]
pub(crate) use over::picture_may_be_at;
pub(crate) use over::{DELTA, Kind, model_may_be_at};
pub(crate) use pending::Pending;
pub(crate) use sharded::Commit;
pub(crate) use stage::{Staged, plan, stage};
#[cfg(feature = "safetensors")]
pub use tensor::FromView;
pub(crate) use tensor::{Kind as BytesKind, nbytes};
pub use tensor::{SaveTensor, TensorBytes};
#[cfg(feature = "python")]
pub(crate) use {shared::SharedDraft, stage::Later};

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
#[cfg(doc)]
use crate::layout::LayoutBuilder;
use crate::layout::{Metadata, Value};
use crate::model::{Model, ModelMut};
use crate::os::disk::Dir;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Writes tensors to `path`: one copy, from where they lie into the mapped output.
///
/// Any [`SaveTensor`] is a tensor. The file appears whole or not at all, and is durable when this returns.
///
/// # Errors
/// As [`SaveOptions::save`].
///
/// ```
/// use maptensors::{Model, TensorView};
///
/// let tensor = TensorView::from_slice(&[2], &[1.0f32, 2.0])?;
/// let path = std::env::temp_dir().join("maptensors-doc-save.safetensors");
/// maptensors::save([("w", tensor)], &path)?;
/// assert_eq!(Model::read(&path)?.tensor("w")?.as_slice::<f32>()?, [1.0, 2.0]);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
pub fn save<N: Into<String>, T: SaveTensor>(
    tensors: impl IntoIterator<Item = (N, T)>,
    path: impl AsRef<Path>,
) -> Result<()> {
    SaveOptions::new().save(tensors, path)
}

/// How to save; [`save`] is the defaults.
///
/// ```
/// use maptensors::{Model, SaveOptions};
///
/// let model = Model::read("models/digits.safetensors")?;
/// let dir = std::env::temp_dir().join("maptensors-doc-sharded");
/// std::fs::create_dir_all(&dir).unwrap();
/// SaveOptions::new()
///     .metadata("format", "pt")
///     .max_shard_size(17_000)
///     .save(model.tensors().map(|t| (t.name(), t)), dir.join("model.safetensors"))?;
/// assert_eq!(Model::read(&dir)?.shards(), 2);
/// # std::fs::remove_dir_all(dir).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct SaveOptions {
    pub(crate) metadata: Option<Metadata>,
    pub(crate) max_shard_size: Option<u64>,
    pub(crate) draft: DraftOptions,
}

impl SaveOptions {
    /// Durable, one file, no metadata.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one metadata entry; a key given again is replaced.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.metadata.get_or_insert_default().insert(key, value);
        self
    }

    /// Replaces all metadata.
    #[must_use]
    pub fn all_metadata(mut self, metadata: impl Into<Metadata>) -> Self {
        self.metadata = Some(metadata.into());
        self
    }

    /// Whether the file survives a power loss once saved (default), or is only whole.
    #[must_use]
    pub fn durable(mut self, durable: bool) -> Self {
        self.draft = self.draft.durable(durable);
        self
    }

    /// Whether to write through a mapping (default, where the file system can) or with `pwrite(2)`.
    #[must_use]
    pub fn mapped(mut self, mapped: bool) -> Self {
        self.draft = self.draft.mapped(mapped);
        self
    }

    /// Whether the file carries a checksum of each tensor: see [`DraftOptions::checksums`].
    #[must_use]
    pub fn checksums(mut self, checksums: bool) -> Self {
        self.draft = self.draft.checksums(checksums);
        self
    }

    /// Calls `told(done, total)`, in bytes of tensor data, as they are copied: see [`DraftOptions::progress`].
    #[must_use]
    pub fn progress(mut self, told: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.draft = self.draft.progress(told);
        self
    }

    /// Splits the tensors over files of at most so many data bytes (a larger tensor gets a file of its
    /// own). Saving to `model.safetensors` then makes `model-00001-of-00002.safetensors`, … and
    /// `model.safetensors.index.json`, written last; what fits one file stays one file.
    #[must_use]
    pub fn max_shard_size(mut self, bytes: u64) -> Self {
        self.max_shard_size = Some(bytes);
        self
    }

    /// Writes tensors to `path`.
    ///
    /// # Errors
    /// Those of planning ([`LayoutBuilder::build`]); [`Error::Shape`] if a tensor's data is not as
    /// long as its shape asks for; [`Error::Io`] for what the system refuses, or a tensor cannot bring, with nothing left behind; [`Error::NotRegular`] if `path` is a
    /// directory or device; [`Error::Argument`] if its name says another kind of file; [`Error::NotDurable`].
    /// [`Error::Moved`] where the directory is not at that path any more: of one file as [`Draft::commit`], of several
    /// nothing is saved. [`Error::NotRemoved`] for a file of the sharded set that this replaces.
    pub fn save<N: Into<String>, T: SaveTensor>(
        &self,
        tensors: impl IntoIterator<Item = (N, T)>,
        path: impl AsRef<Path>,
    ) -> Result<()> {
        let (tensors, path) = (named(tensors), path.as_ref());
        match self.max_shard_size {
            None => self.save_one(&tensors, path, &self.draft),
            Some(limit) => {
                let sizes = sizes(&tensors);
                let options = Self { draft: self.draft.over(total(&sizes)), ..self.clone() };
                let write = |part: Range<usize>, path: &Path, dir: &Arc<Dir>| {
                    options.save_one(&tensors[part], path, &options.draft.within(dir))
                };
                // Checksums are those of each file.
                let mut metadata = self.metadata.clone();
                if let Some(metadata) = &mut metadata {
                    metadata.remove(crate::diff::digest::CHECKSUMS);
                }
                sharded::save(&sizes, path, limit, metadata.as_ref(), self.draft.is_durable(), write)
            }
        }
    }

    fn save_one<T: SaveTensor>(
        &self,
        tensors: &[(String, T)],
        path: &Path,
        options: &DraftOptions,
    ) -> Result<()> {
        let mut draft = options.create(path, &plan(tensors, self.metadata.as_ref())?)?;
        stage::fill(&mut draft, tensors)?;
        draft.commit()
    }
}

/// Names and bytes.
pub(crate) fn sizes<T: SaveTensor>(tensors: &[(String, T)]) -> Vec<(&str, u64)> {
    tensors.iter().map(|(name, tensor)| (name.as_str(), nbytes(tensor))).collect()
}

pub(crate) fn total(sizes: &[(&str, u64)]) -> u64 {
    sizes.iter().fold(0, |total, (_, size)| total.saturating_add(*size))
}

/// The tensors that a caller hands over.
pub(crate) fn named<N: Into<String>, T>(tensors: impl IntoIterator<Item = (N, T)>) -> Vec<(String, T)> {
    tensors.into_iter().map(|(name, tensor)| (name.into(), tensor)).collect()
}

impl Model {
    /// Writes all tensors and the metadata to one file at `path`; also onto the file that this model was opened from. A
    /// sharded model is saved over itself by the name that its shards are named after: `model.safetensors`, for
    /// `model.safetensors.index.json`, whose place the file then takes.
    ///
    /// # Errors
    /// As [`SaveOptions::save`]; [`Error::Argument`] for a file of which the model is only a part, and for one of several
    /// that it was opened from.
    ///
    /// ```
    /// let set = maptensors::Model::read("models/digits-sharded")?;
    /// let path = std::env::temp_dir().join("maptensors-doc-merged.safetensors");
    /// set.save(&path)?; // two shards become one file
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        model_may_be_at(path.as_ref(), &self.contents())?;
        let mut options = SaveOptions::new();
        if self.has_metadata() {
            options = options.all_metadata(self.metadata().clone());
        }
        options.save(self.tensors().map(|t| (t.name(), t)), path)
    }
}

impl ModelMut {
    /// As [`Model::save`], with the edits made so far.
    ///
    /// # Errors
    /// As [`SaveOptions::save`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Model::save(self, path)
    }
}
