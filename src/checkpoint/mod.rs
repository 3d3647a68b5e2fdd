//! Checkpoints: saved again and again, into outputs made ready ahead of time.
//!
//! A checkpoint is a complete, standard safetensors file (or sharded set) called after its step. Saving one
//! is copying its tensors into a file that was allocated and brought into memory beforehand, on a
//! background thread: a new one, or the oldest that falls out of `keep`. The commit protocol is that of every
//! save here.
//!
//! # Using a file again
//!
//! A checkpoint that falls out is written over only if nobody can notice. It is renamed away, to a random
//! name; it must then have that one name (`st_nlink` 1), and a write lease (fcntl(2), `F_SETLEASE`) must be
//! granted: nobody, in any process, has it open or mapped. The directory is synced before the first byte
//! changes, or a power loss could bring the old name back over new content. Who had looked the old name up
//! and not yet opened it waits in open(2) for as long as the lease is held, and then finds a whole file. In
//! any other case the file is removed, and a new one made. Whether anybody waits is asked again when it is
//! finished: they may have been let in meanwhile, since the kernel has nobody wait for ever. Then the file is theirs, and
//! a copy of it becomes the checkpoint.
//!
//! A child that is forked (a data loader's worker) has neither mapping nor descriptor of an output, so it does not
//! stand in the way. A file that is used again keeps its random name: what has none any more cannot be given one.
//!
//! Where writing to a file's own blocks may need new ones (reflinked files, copy-on-write file systems) all its
//! pages are made writable before the copy, so that a full disk is an error and not a `SIGBUS`.
//!
//! What falls out does so when the checkpoint after it is complete: on disk there are `keep` checkpoints and
//! one output made ready, and in memory (the page cache) that output's pages.

#[cfg(all(test, interleavings))]
mod interleavings;
mod order;
mod queue;
mod removal;
mod store;
#[cfg(test)]
mod tests;

pub use queue::{Saved, Saving};

use crate::error::{Error, Result};
use crate::layout::{Metadata, Value};
use crate::model::Model;
#[cfg(feature = "python")]
use crate::save::Later;
#[cfg(doc)]
use crate::save::SaveOptions;
use crate::save::over::Kind;
use crate::save::{DraftOptions, SaveTensor, Staged, named, plan, sharded, sizes, stage, total};
use crate::work::Patience;
#[cfg(feature = "python")]
use crate::work::cancel::{self, Cancel};
use queue::Queue;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;
use store::Store;

/// How to keep checkpoints; [`Checkpointer::open`] is the defaults.
///
/// ```
/// use maptensors::CheckpointOptions;
///
/// let dir = std::env::temp_dir().join("maptensors-doc-keeping");
/// let checkpoints = CheckpointOptions::new().keep(3).keep_every(1000).open(&dir)?;
/// assert!(!dir.exists()); // the first save makes it
/// # drop(checkpoints);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CheckpointOptions {
    keep: Option<usize>,
    keep_every: Option<u64>,
    prepare: bool,
    draft: DraftOptions,
    max_shard_size: Option<u64>,
    metadata: Metadata,
}

impl Default for CheckpointOptions {
    fn default() -> Self {
        Self {
            keep: None,
            keep_every: None,
            prepare: true,
            draft: DraftOptions::new(),
            max_shard_size: None,
            metadata: Metadata::new(),
        }
    }
}

impl CheckpointOptions {
    /// Durable, all kept, the next output made ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps only the last so many, at least one. What falls out is used again, or removed: first what was
    /// there before this run, by step, then what it saved, in that order.
    #[must_use]
    pub fn keep(mut self, checkpoints: usize) -> Self {
        self.keep = Some(checkpoints.max(1));
        self
    }

    /// Keeps for ever what was saved at a multiple of so many steps, beside what [`keep`](Self::keep) keeps.
    #[must_use]
    pub fn keep_every(mut self, steps: u64) -> Self {
        self.keep_every = Some(steps.max(1));
        self
    }

    /// Adds one entry to the metadata of every checkpoint; a key given again is replaced, here and by
    /// [`Checkpointer::save_with`].
    ///
    /// ```
    /// use maptensors::CheckpointOptions;
    ///
    /// # let model = maptensors::Model::read("models/digits.safetensors")?;
    /// # let dir = std::env::temp_dir().join("maptensors-doc-checkpoint-metadata");
    /// let checkpoints = CheckpointOptions::new().metadata("format", "pt").open(&dir)?;
    /// checkpoints.save_with(model.tensors().map(|t| (t.name(), t)), [("loss", "0.1")], 100)?;
    /// assert_eq!(checkpoints.read(None)?.metadata()["format"], "pt");
    /// assert_eq!(checkpoints.read(None)?.metadata()["loss"], "0.1");
    /// # checkpoints.close()?;
    /// # std::fs::remove_dir_all(dir).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.metadata.insert(key, value);
        self
    }

    /// Replaces all of that metadata.
    #[must_use]
    pub fn all_metadata(mut self, metadata: impl Into<Metadata>) -> Self {
        self.metadata = metadata.into();
        self
    }

    /// Whether a checkpoint survives a power loss once saved (default), or is only whole: then a power loss
    /// may also take those that it replaced.
    #[must_use]
    pub fn durable(mut self, durable: bool) -> Self {
        self.draft = self.draft.durable(durable);
        self
    }

    /// Whether each checkpoint carries a checksum of each tensor: see [`DraftOptions::checksums`]. They are
    /// computed after staging.
    #[must_use]
    pub fn checksums(mut self, checksums: bool) -> Self {
        self.draft = self.draft.checksums(checksums);
        self
    }

    /// Whether the next output is made ready in the background (default). It takes a checkpoint's size on
    /// disk and in the page cache.
    #[must_use]
    pub fn prepare(mut self, prepare: bool) -> Self {
        self.prepare = prepare;
        self
    }

    /// Splits each checkpoint over files of at most so many data bytes, as
    /// [`SaveOptions::max_shard_size`]. All shards and the index become visible together, or not at all.
    /// What is larger than that is neither made ready nor used again.
    #[must_use]
    pub fn max_shard_size(mut self, bytes: u64) -> Self {
        self.max_shard_size = Some(bytes);
        self
    }

    /// Calls `told(done, total)`, in bytes, as a state is staged: see [`DraftOptions::progress`].
    #[must_use]
    pub fn progress(mut self, told: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.draft = self.draft.progress(told);
        self
    }

    /// Opens the checkpoints of a directory. Where it is not there, the first save makes it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Argument`] for a new directory with the name of a file (`model.safetensors`).
    pub fn open(&self, directory: impl AsRef<Path>) -> Result<Checkpointer> {
        Kind::Directory.check_name(directory.as_ref())?;
        let store = Store::open(directory.as_ref())?;
        Ok(Checkpointer {
            queue: Queue::new(store, self.keep, self.keep_every, self.prepare),
            options: self.clone(),
        })
    }
}

/// The checkpoints of a directory, and the way to save more.
///
/// One at a time saves into a directory. Dropped, it waits for saves under way.
///
/// It stays with the directory that it opened. If that is moved or removed, or a link to it comes to point elsewhere,
/// everything is [`Error::Moved`] from then on; open the checkpoints again, where they are to be.
///
/// ```
/// use maptensors::{CheckpointOptions, Model};
///
/// let model = Model::read("models/digits.safetensors")?;
/// let dir = std::env::temp_dir().join("maptensors-doc-checkpoints");
/// let checkpoints = CheckpointOptions::new().keep(2).open(&dir)?;
/// for step in [100, 200, 300] {
///     checkpoints.save(model.tensors().map(|t| (t.name(), t)), step)?;
/// }
/// assert_eq!(checkpoints.steps()?, [200, 300]);
/// assert_eq!(checkpoints.read(None)?.len(), model.len()); // the latest
/// checkpoints.close()?;
/// # std::fs::remove_dir_all(dir).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
pub struct Checkpointer {
    queue: Queue,
    options: CheckpointOptions,
}

impl Checkpointer {
    /// Opens the checkpoints of a directory, and keeps all. Where it is not there, the first save makes it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        CheckpointOptions::new().open(directory)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        self.queue.store().path()
    }

    /// The path of a step's file: what [`Checkpointer::save`] writes, or in shards names its files after.
    pub fn path(&self, step: u64) -> PathBuf {
        self.queue.store().target(step)
    }

    /// The steps there are, in order. An unfinished checkpoint is never among them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn steps(&self) -> Result<Vec<u64>> {
        self.queue.store().steps()
    }

    /// The step that was saved last, which is not always the highest: a run that went back, or a new one in an old
    /// directory, saves lower ones, and it is that run that is to be resumed. (The highest is the last of
    /// [`Checkpointer::steps`].)
    ///
    /// What tells is a number that each checkpoint carries in its metadata, as `maptensors.sequence`: copying a
    /// directory, editing a header or setting a clock changes nothing about it. Files without one were there before all
    /// that have one, in the order of their steps. One that is damaged may be the last, and is taken for it, so that
    /// reading says so instead of going back further without a word.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Moved`].
    pub fn latest(&self) -> Result<Option<u64>> {
        self.queue.store().latest()
    }

    /// What to open for a step, or for [the latest](Checkpointer::latest): a checkpoint that is open or mapped is never
    /// written over, only removed. (Another one may be saved, and this one let go, before it is opened; then find again.
    /// [`Checkpointer::read`] does so.)
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Argument`] if there is none; [`Error::Moved`].
    ///
    /// ```
    /// # let model = maptensors::Model::read("models/digits.safetensors")?;
    /// # let dir = std::env::temp_dir().join("maptensors-doc-find");
    /// # let checkpoints = maptensors::Checkpointer::open(&dir)?;
    /// # checkpoints.save(model.tensors().map(|t| (t.name(), t)), 100)?;
    /// // SAFETY: nobody writes to a checkpoint while it is mapped.
    /// let latest = unsafe { maptensors::ModelMut::open(checkpoints.find(None)?)? };
    /// # drop(latest);
    /// # checkpoints.close()?;
    /// # std::fs::remove_dir_all(dir).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn find(&self, step: Option<u64>) -> Result<PathBuf> {
        let none = |what: &str| Error::Argument(format!("{}: {what}", self.directory().display()));
        let store = self.queue.store();
        let mut patience = Patience::new();
        loop {
            let (last, what) = match step {
                Some(step) => (step, format!("there is no checkpoint of step {step}")),
                None => (
                    store.latest()?.ok_or_else(|| none("there is no checkpoint yet"))?,
                    "its latest checkpoint is let go again and again".into(),
                ),
            };
            match store.find(last)? {
                Some(path) => return Ok(path),
                // The latest was let go since.
                None if step.is_none() && patience.again() => {}
                None => return Err(none(&what)),
            }
        }
    }

    /// Finds a checkpoint and has it opened; again if it is let go between the two, or the directory moved.
    pub(crate) fn open_with<T, E: From<Error>>(
        &self,
        step: Option<u64>,
        is_gone: impl Fn(&E) -> bool,
        mut open: impl FnMut(&Path) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut patience = Patience::new();
        loop {
            let path = self.find(step)?;
            match open(&path) {
                Err(error) if is_gone(&error) && patience.again() => {}
                done => {
                    // What was opened by its path is of this directory.
                    self.queue.store().here()?;
                    return done;
                }
            }
        }
    }

    /// Reads the checkpoint of a step, or [the latest](Checkpointer::latest), into owned memory.
    ///
    /// # Errors
    /// As [`Checkpointer::find`] and [`Model::read`].
    pub fn read(&self, step: Option<u64>) -> Result<Model> {
        self.open_with(step, Error::is_not_found, |path| Model::read(path))
    }

    /// Makes an output of so many bytes ready, before the first save; later ones follow the last save's size.
    /// What would be saved in shards is not made ready.
    ///
    /// # Errors
    /// [`Error::Argument`] in a fork's child; [`Error::Io`] for a directory that cannot be made; [`Error::Moved`].
    pub fn prepare(&self, bytes: u64) -> Result<()> {
        self.queue.own()?;
        if self.options.max_shard_size.is_none_or(|limit| bytes <= limit) {
            self.queue.store().make()?;
            self.queue.prepare(bytes);
        }
        Ok(())
    }

    /// Removes the checkpoint of a step, durably unless told otherwise, and says whether there was one.
    ///
    /// # Errors
    /// [`Error::Io`]: it, or a part of it, is still there. [`Error::Moved`]; [`Error::Argument`] in a fork's child.
    pub fn remove(&self, step: u64) -> Result<bool> {
        self.queue.own()?;
        self.queue.remove(step, self.options.draft.is_durable())
    }

    /// Saves tensors as the checkpoint of a step; durable when this returns, unless told otherwise.
    ///
    /// # Errors
    /// As [`SaveOptions::save`]; that of an earlier [`Checkpointer::save_async`] nobody has asked for.
    /// [`Error::NotRemoved`]: the checkpoint is saved, and what `keep` no longer holds could not be removed.
    /// [`Error::Moved`] where the directory is not at its path any more: nothing is saved, and nothing removed there.
    pub fn save<N: Into<String>, T: SaveTensor>(
        &self,
        tensors: impl IntoIterator<Item = (N, T)>,
        step: u64,
    ) -> Result<Saved> {
        self.save_with(tensors, Metadata::new(), step)
    }

    /// As [`Checkpointer::save`], with metadata.
    ///
    /// # Errors
    /// As [`Checkpointer::save`].
    pub fn save_with<N: Into<String>, T: SaveTensor>(
        &self,
        tensors: impl IntoIterator<Item = (N, T)>,
        metadata: impl Into<Metadata>,
        step: u64,
    ) -> Result<Saved> {
        self.begin(tensors, metadata.into(), step, true)?.wait()
    }

    /// Copies tensors into the output and returns; in the background it is synced and becomes visible. What
    /// happens to the tensors from now on does not reach the file.
    ///
    /// One more may be queued behind one under way; the next call then waits. An error comes from
    /// [`Saving::wait`], or else from the next save or [`Checkpointer::close`].
    ///
    /// # Errors
    /// As [`Checkpointer::save`].
    ///
    /// ```
    /// # let model = maptensors::Model::read("models/digits.safetensors")?;
    /// # let dir = std::env::temp_dir().join("maptensors-doc-async");
    /// # let checkpoints = maptensors::Checkpointer::open(&dir)?;
    /// let saving = checkpoints.save_async(model.tensors().map(|t| (t.name(), t)), 100)?;
    /// // … train on …
    /// let saved = saving.wait()?;
    /// assert_eq!(saved.step, 100);
    /// # checkpoints.close()?;
    /// # std::fs::remove_dir_all(dir).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn save_async<N: Into<String>, T: SaveTensor>(
        &self,
        tensors: impl IntoIterator<Item = (N, T)>,
        step: u64,
    ) -> Result<Saving> {
        self.save_async_with(tensors, Metadata::new(), step)
    }

    /// As [`Checkpointer::save_async`], with metadata.
    ///
    /// # Errors
    /// As [`Checkpointer::save`].
    pub fn save_async_with<N: Into<String>, T: SaveTensor>(
        &self,
        tensors: impl IntoIterator<Item = (N, T)>,
        metadata: impl Into<Metadata>,
        step: u64,
    ) -> Result<Saving> {
        self.begin(tensors, metadata.into(), step, false)
    }

    fn begin<N: Into<String>, T: SaveTensor>(
        &self,
        tensors: impl IntoIterator<Item = (N, T)>,
        metadata: Metadata,
        step: u64,
        inline: bool,
    ) -> Result<Saving> {
        Ok(self.submit(self.stage(&named(tensors), metadata, step, inline)?, inline))
    }

    /// Copies tensors into the files of a step's checkpoint, up to their commits. Waits first until there is room for one
    /// more save, or (`alone`) until there is no other.
    ///
    /// # Errors
    /// As [`Checkpointer::save`].
    pub(crate) fn stage<T: SaveTensor>(
        &self,
        tensors: &[(String, T)],
        metadata: Metadata,
        step: u64,
        alone: bool,
    ) -> Result<Staging> {
        let begun = Instant::now();
        self.queue.own()?;
        let dir = self.queue.store().make()?;
        self.queue.make_room(alone)?;
        let turn = self.queue.store().turn(dir, step)?;
        let mut all = self.options.metadata.clone();
        all.extend(metadata);
        all.insert(order::KEY, turn.sequence.to_string());
        let (path, sizes) = (self.path(step), sizes(tensors));
        let bytes = total(&sizes);
        let options = self.options.draft.over(bytes).within(dir);
        let (mut size, mut ready) = (None, Ready::No);
        #[cfg(feature = "python")]
        let mut later = Vec::new();
        let limit = self.options.max_shard_size.filter(|limit| bytes > *limit);
        let commit = if let Some(limit) = limit {
            #[cfg(feature = "python")]
            let brought = std::cell::RefCell::new(&mut later);
            let write = |part: Range<usize>, path: &Path| -> Result<_> {
                let tensors = &tensors[part.clone()];
                let staged = stage(options.create(path, &plan(tensors, Some(&all))?)?, tensors)?;
                #[cfg(feature = "python")]
                brought.borrow_mut().extend(staged.later.into_iter().map(|mut later| {
                    later.tensor += part.start;
                    later
                }));
                Ok(staged.commit)
            };
            let mut shared = all.clone();
            // Those of each file.
            shared.remove(crate::diff::digest::CHECKSUMS);
            let durable = options.is_durable();
            let set = sharded::stage(dir, &sizes, &path, limit, Some(&shared), durable, write)?;
            Box::new(move || set.commit().map(|()| None))
        } else {
            let (draft, made) = self.queue.draft(&path, &plan(tensors, Some(&all))?, &options)?;
            (size, ready) = (Some(draft.layout().file_len()), made);
            let staged: Staged = stage(draft, tensors)?;
            #[cfg(feature = "python")]
            later.extend(staged.later);
            staged.commit
        };
        let job = queue::Job {
            commit,
            step,
            path,
            bytes,
            ready,
            size,
            durable: options.is_durable(),
            below: turn.below,
            begun,
            staged: begun.elapsed(),
        };
        Ok(Staging {
            job,
            #[cfg(feature = "python")]
            later,
        })
    }

    /// Commits what was staged: at once (`inline`), or in the background.
    pub(crate) fn submit(&self, staging: Staging, inline: bool) -> Saving {
        let mut job = staging.job;
        job.staged = job.begun.elapsed();
        self.queue.submit(job, inline)
    }

    /// Whether this is the process that opened it, and no fork's child.
    #[cfg(feature = "python")]
    pub(crate) fn is_own(&self) -> bool {
        self.queue.own().is_ok()
    }

    /// Waits for saves under way.
    ///
    /// # Errors
    /// That of a save nobody has asked for.
    pub fn close(self) -> Result<()> {
        self.queue.finish()
    }

    /// As [`Checkpointer::close`], for one that is shared.
    ///
    /// # Errors
    /// As [`Checkpointer::close`].
    pub fn wait(&self) -> Result<()> {
        self.queue.finish()
    }

    /// As [`Checkpointer::wait`], at most so long: `None` if saves are still under way.
    #[cfg(feature = "python")]
    pub(crate) fn wait_for(&self, most: std::time::Duration) -> Option<Result<()>> {
        self.queue.finish_within(most)
    }

    /// Waits at most so long until one more save can begin, or (`alone`) none is under way.
    #[cfg(feature = "python")]
    pub(crate) fn room_within(&self, alone: bool, most: std::time::Duration) -> Option<Result<()>> {
        self.queue.room_within(alone, most)
    }
}

/// A checkpoint whose files are filled, but for what its caller brings.
pub(crate) struct Staging {
    job: queue::Job,
    /// What the caller has yet to write, by the tensors' places among those that were staged.
    #[cfg(feature = "python")]
    pub(crate) later: Vec<Later>,
}

#[cfg(feature = "python")]
impl Staging {
    /// The same, to be committed under a `Cancel`.
    pub(crate) fn under(mut self, cancel: Cancel) -> Self {
        let commit = self.job.commit;
        self.job.commit = Box::new(move || cancel::under(Some(cancel), commit));
        self
    }
}

/// What a checkpoint was written into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ready {
    /// A file made when it was needed.
    No,
    /// A new file made ready ahead of time.
    Prepared,
    /// An old checkpoint's.
    Recycled,
}

impl std::fmt::Debug for Checkpointer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpointer").field("directory", &self.directory()).finish_non_exhaustive()
    }
}
