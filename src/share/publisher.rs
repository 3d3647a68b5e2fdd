//! Who writes.

use super::claim::{end, take};
use super::compare::Candidate;
use super::place::{Made, Place};
use super::plan::Listed;
use super::room;
use super::segment::{self, Opened};
use super::store::{CONTROL, Store, damaged};
use super::user::{self, User};
use crate::diff::{Contents, Span};
use crate::error::{Error, Result, quote};
use crate::layout::{Metadata, Value, elements};
use crate::map::RawSlice;
use crate::model::ModelMut;
use crate::os::ExclusiveFile;
use crate::os::disk::Dir;
use crate::os::fork::Owner;
use crate::save::{BytesKind, DraftOptions, Kind, SaveTensor, named};
use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

/// How to publish; [`Publisher::open`] is the defaults.
///
/// ```
/// use maptensors::PublishOptions;
///
/// # let place = std::env::temp_dir().join(format!("maptensors-doc-group-{}", std::process::id()));
/// let publisher = PublishOptions::new().mode(0o640).open(&place)?; // its group may read
/// # publisher.remove()?;
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PublishOptions {
    mode: u32,
    recycle: bool,
    metadata: Metadata,
}

impl Default for PublishOptions {
    fn default() -> Self {
        Self { mode: 0o600, recycle: true, metadata: Metadata::new() }
    }
}

impl PublishOptions {
    /// For this user alone; files are used again.
    pub fn new() -> Self {
        Self::default()
    }

    /// The files' mode, 0o600 unless asked for otherwise, whatever the umask is; also that of files that were published
    /// there before. A directory that is made for them has r and x where they have r. One that is there already is
    /// opened as far as that, but never closed to anybody: it may hold more. Those that it is in are let be.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode & 0o666 | 0o600;
        self
    }

    /// Whether a segment that is no longer listed is written anew, once nobody has it open or mapped (default), or
    /// removed at once. It saves most of what new memory costs, and takes as much meanwhile.
    #[must_use]
    pub fn recycle(mut self, recycle: bool) -> Self {
        self.recycle = recycle;
        self
    }

    /// Adds one entry to the metadata of the generations; a key given again is replaced. Later ones may have other
    /// metadata: [`Publisher::set_metadata`].
    ///
    /// ```
    /// # let place = std::env::temp_dir().join(format!("maptensors-doc-noted-{}", std::process::id()));
    /// # let model = maptensors::Model::read("models/digits.safetensors")?;
    /// let mut publisher = maptensors::PublishOptions::new().metadata("run", "a").open(&place)?;
    /// publisher.publish(model.tensors().map(|t| (t.name(), t)))?;
    /// // SAFETY: only publishers write to the publication's files.
    /// let subscriber = unsafe { maptensors::Subscriber::attach(&place)? };
    /// assert_eq!(subscriber.model().metadata()["run"], "a");
    /// # publisher.remove()?;
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

    /// As [`Publisher::open`].
    ///
    /// # Errors
    /// As [`Publisher::open`].
    pub fn open(&self, place: impl AsRef<Path>) -> Result<Publisher> {
        Publisher::with(&Place::of(place.as_ref())?, self)
    }
}

/// A model, and its tensors that are not as in its file.
pub(crate) type Edited = Option<(u64, HashSet<String>)>;

/// One who publishes generation after generation of a model's tensors to the processes of this machine:
/// [`Subscriber`](crate::Subscriber) reads them.
///
/// There is one at a time. Closed, dropped or killed, it leaves the last generation where it is, and the next one
/// continues; [`Publisher::remove`] ends the publication. One that never had a generation ends with its publisher.
/// In another user's place, root publishes files of that user. What it publishes lives as long as the machine is up; nothing is
/// synced to a disk.
///
/// ```
/// use maptensors::{Model, Publisher};
///
/// let model = Model::read("models/digits.safetensors")?;
/// # let place = std::env::temp_dir().join(format!("maptensors-doc-publish-{}", std::process::id()));
/// let mut publisher = Publisher::open(&place)?; // "name" alone: in memory, for this user's processes
/// assert_eq!(publisher.publish(model.tensors().map(|t| (t.name(), t)))?, 1);
/// // Only what changed is copied. The rest is shared with generation 1.
/// assert_eq!(publisher.publish_changed([("fc1.bias", model.tensor("fc1.bias")?)])?, 2);
/// publisher.remove()?;
/// # Ok::<(), maptensors::Error>(())
/// ```
pub struct Publisher {
    pub(super) store: Store,
    made: Made,
    /// Whether the directory was there before, at a path.
    stays: bool,
    /// Whose the files are to be, if not this process's user's.
    pub(super) belongs_to: Option<User>,
    pub(super) recycle: bool,
    pub(super) draft: DraftOptions,
    metadata: Metadata,
    pub(super) generation: u64,
    /// The number of the next segment.
    pub(super) next: u64,
    /// The segments of the current generation, newest first.
    pub(super) listed: Vec<Listed>,
    /// Names that live in none of them.
    pub(super) removed: BTreeSet<String>,
    /// A segment that is listed no more, to be written anew.
    pub(super) spare: Option<u64>,
    /// Segments that are to go.
    pub(super) left: BTreeSet<u64>,
    /// The model that was published last, and its tensors that then were not as in its file.
    pub(super) edited: Edited,
    is_closed: bool,
    /// A fork's child has a copy of this value, and no business with the publication.
    pub(super) owner: Owner,
}

impl Publisher {
    /// Opens a publication to publish to, or begins one. What has no separator is a name, for this user's processes:
    /// `$MAPTENSORS_SHARE_DIR/NAME`, or `/dev/shm/maptensors-UID/NAME`, which is memory. Everything else is
    /// the path of a directory, which is the publication's own.
    ///
    /// What a publisher that was killed left behind is put right.
    ///
    /// # Errors
    /// [`Error::Busy`] while there is another publisher; [`Error::Publication`] for one that is damaged;
    /// [`Error::Argument`] for a name that could lead elsewhere or says that it is a file, and for a mode that cannot be
    /// given to what is another user's; [`Error::Io`].
    pub fn open(place: impl AsRef<Path>) -> Result<Self> {
        PublishOptions::new().open(place)
    }

    fn with(place: &Place, options: &PublishOptions) -> Result<Self> {
        Kind::Directory.check_name(&place.path)?;
        let made = place.make(options.mode)?;
        let path = place.path.clone();
        let dir = Dir::open(&path).map_err(Error::io(&path, "opening the directory"));
        let dir = dir.inspect_err(|_| made.undo())?;
        let taken = take(&dir, &path, options.mode).map_err(room::told(&path.join(CONTROL), 4096));
        let (control, state) = taken.inspect_err(|_| made.undo())?;
        let belongs_to = User::of(&dir, control.file());
        // If anything goes wrong from here on, dropping it takes away what was begun.
        let mut publisher = Self {
            store: Store { dir: Arc::new(dir), path, control },
            stays: !made.itself() && place.name().is_none(),
            made,
            belongs_to,
            recycle: options.recycle && cfg!(target_os = "linux"),
            draft: DraftOptions::new().durable(false).mode(options.mode),
            metadata: options.metadata.clone(),
            generation: state.generation,
            next: 0,
            listed: Vec::new(),
            removed: BTreeSet::new(),
            spare: None,
            left: BTreeSet::new(),
            edited: None,
            is_closed: false,
            owner: Owner::me(),
        };
        publisher.draft = publisher.draft.within(&publisher.store.dir);
        publisher.begin(options.mode, state.head)?;
        Ok(publisher)
    }

    /// Takes over what is there.
    fn begin(&mut self, mode: u32, head: u64) -> Result<()> {
        let Store { dir, path, control } = &self.store;
        let page = path.join(CONTROL);
        if let Some(owner) = self.belongs_to {
            owner.give(control.file(), &page)?;
        }
        user::set_mode(control.file(), &page, mode)?;
        control.sign().map_err(Error::io(path, "signing the control page"))?;
        ExclusiveFile::sweep(dir);
        if head >= segment::LIMIT {
            return Err(damaged(path, &format!("its head is segment {head}")));
        }
        let last = self.store.numbers()?.into_iter().max().unwrap_or_default();
        self.next = last.max(head) + 1;
        self.recover(mode)
    }

    /// Takes up what the last publisher left.
    fn recover(&mut self, mode: u32) -> Result<()> {
        if let Some(found) = self.store.generation(&[])? {
            let owners = found.owners();
            let live = |place: usize, opened: &Opened| {
                let layout = &opened.segment.layout;
                let lives =
                    |i: &usize| layout.at(*i).is_some_and(|info| owners.get(info.name()) == Some(&place));
                (0..layout.len()).filter(lives).collect::<Vec<_>>()
            };
            let live: Vec<_> = found.segments.iter().enumerate().map(|(i, opened)| live(i, opened)).collect();
            self.removed = found.removed;
            for (opened, live) in found.segments.into_iter().zip(live) {
                // Nobody else has it: it was opened just now.
                let opened = Arc::into_inner(opened).ok_or_else(|| damaged(&self.store.path, "a fault"))?;
                // Published before, perhaps for others to read than now.
                user::set_mode(&opened.file, &opened.path, mode)?;
                self.listed.push(Listed { segment: opened.segment, live });
            }
        }
        let listed: Vec<u64> = self.listed.iter().map(|old| old.segment.note.number).collect();
        // What cannot be removed now is tried again, and told, when something is published.
        self.left = self.store.numbers()?.into_iter().filter(|number| !listed.contains(number)).collect();
        self.left.retain(|number| self.store.remove(*number).is_err());
        Ok(())
    }

    /// The publication's directory.
    pub fn path(&self) -> &Path {
        &self.store.path
    }

    /// The current generation; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The metadata of the generations published from now on.
    pub fn set_metadata(&mut self, metadata: impl Into<Metadata>) {
        self.metadata = metadata.into();
    }

    /// Publishes these tensors, and no others, as the next generation, and returns its number. All are copied.
    ///
    /// If they are being changed meanwhile, the generation holds some mixture of old and new values.
    ///
    /// # Errors
    /// Those of [`SaveOptions::save`](crate::SaveOptions::save): nothing is published, the current generation
    /// stays. [`Error::Argument`] in a fork's child. [`Error::NotRemoved`] is different: it is published, and an older
    /// file could not be removed.
    pub fn publish<N: Into<String>, T: SaveTensor>(
        &mut self,
        tensors: impl IntoIterator<Item = (N, T)>,
    ) -> Result<u64> {
        self.copy(&named(tensors), &|_| false)
    }

    /// Publishes these tensors as the next generation, together with all others that the current one has: those are
    /// shared with it, not copied.
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    pub fn publish_changed<N: Into<String>, T: SaveTensor>(
        &mut self,
        tensors: impl IntoIterator<Item = (N, T)>,
    ) -> Result<u64> {
        self.copy(&named(tensors), &|_| true)
    }

    /// Publishes these tensors, and no others, as the next generation. Only those are copied whose bytes differ from
    /// the current one: for who does not know which changed. It reads both.
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    ///
    /// ```
    /// # let place = std::env::temp_dir().join(format!("maptensors-doc-differ-{}", std::process::id()));
    /// # let model = maptensors::Model::read("models/digits.safetensors")?;
    /// # let mut publisher = maptensors::Publisher::open(&place)?;
    /// publisher.publish_differing(model.tensors().map(|t| (t.name(), t)))?;
    /// publisher.publish_differing(model.tensors().map(|t| (t.name(), t)))?; // copies nothing
    /// # publisher.remove()?;
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn publish_differing<N: Into<String>, T: SaveTensor>(
        &mut self,
        tensors: impl IntoIterator<Item = (N, T)>,
    ) -> Result<u64> {
        self.own()?;
        let all = named(tensors);
        let mut differ = vec![false; all.len()];
        let (mut lying, mut places) = (Vec::new(), Vec::new());
        for (i, (name, tensor)) in all.iter().enumerate() {
            // Brought from somewhere: no two such copies exist together.
            let brought = match tensor.bytes().0 {
                BytesKind::Lying(bytes) => {
                    lying.push(Candidate::of(name, tensor, bytes));
                    places.push(i);
                    continue;
                }
                BytesKind::Owned(bytes) => bytes,
                // Not published like that, so it is copied whatever it holds.
                BytesKind::Written(_) if !self.has(name, tensor.dtype(), tensor.shape()) => {
                    differ[i] = true;
                    continue;
                }
                BytesKind::Written(write) => {
                    let len = elements(tensor.shape()).and_then(|n| tensor.dtype().nbytes(n));
                    let mut bytes = vec![0; len.unwrap_or_default()];
                    let written = if bytes.is_empty() { Ok(0) } else { write(&mut bytes) };
                    let written = written.map_err(|source| {
                        let action = format!("bringing tensor {}", quote(name)).into();
                        Error::Io { path: self.store.path.clone(), action, source }
                    })?;
                    if written != bytes.len() {
                        let (path, tensor) = (self.store.path.clone(), name.clone());
                        let (found, expected) = (written as u64, bytes.len() as u64);
                        return Err(Error::Shape { path, tensor, found, expected });
                    }
                    bytes
                }
                #[cfg(feature = "python")]
                BytesKind::Later => {
                    differ[i] = true;
                    continue;
                }
            };
            differ[i] = self.differing(&[Candidate::of(name, tensor, RawSlice::from(&*brought))])? != [false];
        }
        for (i, found) in places.into_iter().zip(self.differing(&lying)?) {
            differ[i] = found;
        }
        drop(lying);
        let names: HashSet<String> = all.iter().map(|(name, _)| name.clone()).collect();
        if names.len() < all.len() {
            // One that is there twice is refused, as it is by the others.
            return self.copy(&all, &|_| false);
        }
        let changed: Vec<_> = all.into_iter().zip(differ).filter(|(_, differs)| *differs).collect();
        let changed: Vec<_> = changed.into_iter().map(|(tensor, _)| tensor).collect();
        self.copy(&changed, &|name| names.contains(name))
    }

    /// Publishes a model as it is now, with its metadata. After the first time only those tensors are looked at that
    /// the kernel knows to have been written, and only those copied that differ from the current generation.
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    ///
    /// ```
    /// # let place = std::env::temp_dir().join(format!("maptensors-doc-model-{}", std::process::id()));
    /// # let mut publisher = maptensors::Publisher::open(&place)?;
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
    /// publisher.publish_model(&model)?;
    /// model.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] += 1.0;
    /// publisher.publish_model(&model)?; // copies fc1.bias
    /// # publisher.remove()?;
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn publish_model(&mut self, model: &ModelMut) -> Result<u64> {
        let candidates = model.tensors().map(|tensor| Candidate {
            name: tensor.name(),
            dtype: tensor.dtype(),
            shape: tensor.shape(),
            bytes: Some(RawSlice::from(tensor.as_bytes())),
        });
        let (differ, edited) =
            self.edited_since(model.token(), &model.contents(), &candidates.collect::<Vec<_>>())?;
        let changed = model.tensors().zip(differ).filter(|(_, differs)| *differs);
        let changed = named(changed.map(|(tensor, _)| (tensor.name(), tensor)));
        let generation = self.copy_with(&changed, model.metadata(), &|name| model.contains(name))?;
        self.edited = edited;
        Ok(generation)
    }

    /// Which tensors of a model are not as they are published; and what to remember of it once they are.
    pub(crate) fn edited_since(
        &self,
        token: u64,
        contents: &Contents<'_>,
        all: &[Candidate<'_>],
    ) -> Result<(Vec<bool>, Edited)> {
        self.own()?;
        // One that was read has no file to compare with: then all of it is compared with what is published.
        let now = edited(contents);
        let then = self.edited.as_ref().filter(|(known, _)| *known == token).map(|(_, edited)| edited);
        // As in its file then and now: as it was published.
        let as_published = |tensor: &Candidate<'_>| {
            matches!((&now, then), (Some(now), Some(then))
                if !now.contains(tensor.name) && !then.contains(tensor.name))
                && self.has(tensor.name, tensor.dtype, tensor.shape)
        };
        let looked_at: Vec<usize> = (0..all.len()).filter(|&i| !as_published(&all[i])).collect();
        let candidates: Vec<_> = looked_at.iter().map(|&i| all[i]).collect();
        let mut differ = vec![false; all.len()];
        for (i, differs) in looked_at.into_iter().zip(self.differing(&candidates)?) {
            differ[i] = differs;
        }
        Ok((differ, now.map(|now| (token, now))))
    }

    /// That the current generation is of a model: what [`Publisher::edited_since`] said, and what another thread has
    /// written to it since, for that may have been copied.
    #[cfg(feature = "python")]
    pub(crate) fn remember(&mut self, then: Edited, contents: &Contents<'_>) {
        let both = then.zip(edited(contents));
        self.edited = both.map(|((token, then), now)| (token, then.into_iter().chain(now).collect()));
    }

    fn copy<T: SaveTensor>(
        &mut self,
        tensors: &[(String, T)],
        keeps: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<u64> {
        let metadata = self.metadata.clone();
        self.copy_with(tensors, &metadata, keeps)
    }

    fn copy_with<T: SaveTensor>(
        &mut self,
        tensors: &[(String, T)],
        metadata: &Metadata,
        keeps: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<u64> {
        let staging = self.stage(tensors, metadata, keeps)?;
        self.finish_generation(staging, Ok(()))
    }

    /// Ends the publication: who is attached is told, and keeps what is held. Its files are removed, and its
    /// directory if nothing else is in it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Argument`] in a fork's child.
    pub fn remove(mut self) -> Result<()> {
        self.own()?;
        if !self.is_there(&self.store.dir) {
            return Err(self.gone());
        }
        self.is_closed = true;
        let done = end(&self.store.control, &self.store.dir, &self.store.path, false);
        self.store.control.unlock();
        done
    }

    /// Publishes no more. The last generation stays where it is; of a publication that has none yet nothing does, not
    /// even a directory that was made for it.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that is of no use any more and could not be removed. Dropped, a publisher does the same
    /// and cannot tell.
    pub fn close(mut self) -> Result<()> {
        self.finish()
    }

    fn finish(&mut self) -> Result<()> {
        if !self.is_own() || std::mem::replace(&mut self.is_closed, true) {
            return Ok(());
        }
        let done = self.leave();
        self.store.control.unlock();
        done
    }

    /// Leaves the last generation, and no other file.
    fn leave(&mut self) -> Result<()> {
        // What is there by these numbers may be another publication's by now.
        if !self.is_there(&self.store.dir) {
            return Ok(());
        }
        let page = self.store.control.read().ok().flatten();
        if self.generation == 0 && page.is_some_and(|page| page.generation == 0 && page.head == 0) {
            end(&self.store.control, &self.store.dir, &self.store.path, self.stays)?;
            self.made.undo();
            return Ok(());
        }
        self.left.extend(self.spare.take());
        self.remove_left()
    }

    /// Removes the segments that are to go.
    ///
    /// # Errors
    /// [`Error::Io`] for the first that stays; it is tried again the next time.
    pub(super) fn remove_left(&mut self) -> Result<()> {
        let (mut done, store) = (Ok(()), &self.store);
        self.left.retain(|number| match store.remove(*number) {
            Ok(()) => false,
            Err(error) => {
                if done.is_ok() {
                    done = Err(error);
                }
                true
            }
        });
        done
    }

    /// # Errors
    /// In a fork's child.
    pub(super) fn own(&self) -> Result<()> {
        self.owner.check("this publisher")
    }

    /// That the publication is still at its path, where segments are made: else nobody would see them, or they would
    /// be taken for those of another that was begun there.
    ///
    /// # Errors
    /// [`Error::Publication`]; [`Error::Io`].
    pub(super) fn stands(&self) -> Result<()> {
        let there = match Dir::open(&self.store.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => return Err(Error::io(&self.store.path, "opening the directory")(error)),
            Ok(dir) => self.is_there(&dir),
        };
        if there { Ok(()) } else { Err(self.gone()) }
    }

    fn is_there(&self, dir: &Dir) -> bool {
        self.store.control.is(dir, CONTROL.as_ref())
    }

    fn gone(&self) -> Error {
        let what = "the publication is over: somebody has removed it, or moved it away".into();
        Error::Publication { path: self.store.path.clone(), what }
    }

    /// Whether this is the process that opened it, and no fork's child.
    pub(crate) fn is_own(&self) -> bool {
        self.owner.is_me()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // Nobody is there to be told: `close` is for who wants to be. The next publisher removes what is left.
        self.finish().ok();
    }
}

/// The tensors that are not as in a model's file; `None` if it has none.
fn edited(contents: &Contents<'_>) -> Option<HashSet<String>> {
    let (found, _) = contents.differences(Span::SinceFile, false).ok()?;
    Some(found.iter().map(|found| found.info.name().to_owned()).collect())
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher")
            .field("path", &self.path())
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}
