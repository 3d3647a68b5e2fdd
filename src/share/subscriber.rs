//! Who reads.

use super::compare::differing_from;
use super::place::Place;
use super::segment::Opened;
use super::store::{Found, Generation, Store};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::layout::{Catalog, Shard};
use crate::map::{Backing, MapOptions, Mapping};
use crate::model::{Model, ModelMut};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A publisher may be killed between a flip and its wake: who waits looks by itself this often.
const SLICE: Duration = Duration::from_millis(250);

/// How often who waits for a publication to appear looks.
const LOOK: Duration = Duration::from_millis(10);

/// How long what waits for a publication looks at a damaged one, before it says so: somebody may be removing its files
/// one by one, and what comes after that is worth waiting for. No publisher repairs it.
const PATIENCE: Duration = Duration::from_secs(1);

/// How to attach; [`Subscriber::attach`] is the defaults.
///
/// ```
/// use maptensors::{AttachOptions, Publisher};
/// use std::time::Duration;
///
/// # let place = std::env::temp_dir().join(format!("maptensors-doc-wait-{}", std::process::id()));
/// # let model = maptensors::Model::read("models/digits.safetensors")?;
/// # let there = place.clone();
/// let trainer = std::thread::spawn(move || {
///     let mut publisher = Publisher::open(&there)?;
///     publisher.publish(model.tensors().map(|t| (t.name(), t)))?;
///     Ok::<_, maptensors::Error>(publisher)
/// });
/// // SAFETY: only publishers write to the publication's files.
/// let weights = unsafe { AttachOptions::new().wait(Duration::from_secs(60)).attach(&place)? };
/// assert_eq!(weights.generation(), 1);
/// # trainer.join().unwrap()?.remove()?;
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct AttachOptions {
    wait: Duration,
}

impl AttachOptions {
    /// Without waiting.
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits so long for the first generation to appear, and for the publication itself. What is there, but damaged,
    /// is an error after a second.
    #[must_use]
    pub fn wait(mut self, most: Duration) -> Self {
        self.wait = most;
        self
    }

    /// As [`Subscriber::attach`].
    ///
    /// # Safety
    /// As [`Subscriber::attach`].
    ///
    /// # Errors
    /// As [`Subscriber::attach`].
    #[allow(unsafe_code)]
    pub unsafe fn attach(&self, place: impl AsRef<Path>) -> Result<Subscriber> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.attach_while(place.as_ref(), || Ok(())) }
    }

    /// As [`AttachOptions::attach`], as long as `go_on`, which is asked several times a second, is no error.
    ///
    /// # Safety
    /// As [`Subscriber::attach`].
    #[allow(unsafe_code)]
    pub(crate) unsafe fn attach_while<E: From<Error>>(
        &self,
        place: &Path,
        mut go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<Subscriber, E> {
        let place = Place::of(place)?;
        // Longer than the clock can count is for ever.
        let until = Instant::now().checked_add(self.wait);
        let left = || until.map_or(SLICE, |until| until.saturating_duration_since(Instant::now()));
        let mut damaged: Option<Instant> = None;
        loop {
            let error = match Found::at(&place.path) {
                Ok(Found::Whole(store, generation)) => {
                    // SAFETY: the caller's promise is passed on.
                    let held = unsafe { Held::new(generation) }?;
                    return Ok(Subscriber { store, held });
                }
                Ok(Found::Begun(store)) if !left().is_zero() => {
                    damaged = None;
                    store.control.wait(0, left().min(SLICE));
                    go_on()?;
                    continue;
                }
                Ok(Found::Begun(store)) => Error::Publication {
                    path: store.path,
                    what: "there is a publisher, but no generation yet (attaching can wait for the first)"
                        .into(),
                },
                Ok(Found::NotYet(error)) => {
                    damaged = None;
                    error
                }
                Err(error @ Error::Publication { .. }) => {
                    if damaged.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
                        return Err(error.into());
                    }
                    error
                }
                Err(error) => return Err(error.into()),
            };
            if left().is_zero() {
                return Err(error.into());
            }
            std::thread::sleep(left().min(LOOK));
            go_on()?;
        }
    }
}

/// What a [refresh](Subscriber::refresh) brought.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refreshed {
    /// The generation that is held now.
    pub generation: u64,
    /// Tensors that are new, or not the same as in the generation held before, in file order. Those that were
    /// published since are compared with it, byte by byte, up to the first that differs.
    pub changed: Vec<String>,
    /// Tensors that are no longer there.
    pub removed: Vec<String>,
}

/// One who reads what a [`Publisher`](crate::Publisher) publishes: holds a generation, zero-copy, until told to
/// go on to the latest.
///
/// What is held never changes, whatever is published meanwhile and whatever happens to the publisher. Any number
/// of processes hold the same pages.
///
/// ```
/// use maptensors::{Model, ModelMut, Publisher, Subscriber};
///
/// # let place = std::env::temp_dir().join(format!("maptensors-doc-attach-{}", std::process::id()));
/// let model = Model::read("models/digits.safetensors")?;
/// let mut publisher = Publisher::open(&place)?; // "name" alone: in memory, for this user's processes
/// publisher.publish(model.tensors().map(|t| (t.name(), t)))?;
///
/// // In another process, most likely.
/// // SAFETY: only publishers write to the publication's files.
/// let mut weights = unsafe { Subscriber::attach(&place)? };
/// let first = weights.model().clone(); // stays as it is
/// let mut tuned = ModelMut::read("models/digits.safetensors")?;
/// tuned.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] += 1.0;
/// publisher.publish_changed([("fc1.bias", tuned.tensor("fc1.bias")?)])?;
/// assert!(weights.wait(None)?);
/// let refreshed = weights.refresh()?.unwrap();
/// assert_eq!((refreshed.generation, &refreshed.changed[..]), (2, &["fc1.bias".to_owned()][..]));
/// // The other tensors are the very same memory.
/// let address = |model: &Model| model.tensor("fc1.weight").unwrap().as_bytes().as_ptr();
/// assert_eq!(address(weights.model()), address(&first));
/// publisher.remove()?;
/// # Ok::<(), maptensors::Error>(())
/// ```
pub struct Subscriber {
    // INVARIANT: who attached has promised that only publishers write to the files in it.
    store: Store,
    held: Held,
}

/// A generation, mapped.
struct Held {
    generation: Generation,
    /// For each segment that any tensor lives in: its place, and the part of its layout that does.
    parts: Vec<(usize, Layout)>,
    model: Arc<Model>,
}

impl Subscriber {
    /// Attaches to a publication: a name, or the path of a directory (with a separator), as for
    /// [`Publisher::open`](crate::Publisher::open).
    ///
    /// # Safety
    /// For the life of this value and everything derived from it, nobody but publishers writes to, truncates or
    /// punches holes in the files of the publication's directory: the contract of
    /// [`Model::open`], for every segment that is mapped now and by later refreshes. Publishers never do so
    /// to a segment that anybody has open or mapped.
    ///
    /// # Errors
    /// [`Error::Publication`] where nothing is published yet, or what is there is damaged;
    /// [`Error::Argument`] for a name that could lead elsewhere; [`Error::Io`].
    #[allow(unsafe_code)]
    pub unsafe fn attach(place: impl AsRef<Path>) -> Result<Self> {
        // SAFETY: the caller's promise is passed on.
        unsafe { AttachOptions::new().attach(place) }
    }

    /// The publication's directory.
    pub fn path(&self) -> &Path {
        &self.store.path
    }

    /// The generation that is held.
    pub fn generation(&self) -> u64 {
        self.held.generation.number
    }

    /// The tensors of the generation that is held, and the metadata it was published with.
    pub fn model(&self) -> &Arc<Model> {
        &self.held.model
    }

    /// The generation that is held, to edit: copy-on-write, in pages of this process's own.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// ```
    /// # let place = std::env::temp_dir().join(format!("maptensors-doc-edit-{}", std::process::id()));
    /// # let model = maptensors::Model::read("models/digits.safetensors")?;
    /// # let mut publisher = maptensors::Publisher::open(&place)?;
    /// # publisher.publish(model.tensors().map(|t| (t.name(), t)))?;
    /// # // SAFETY: only publishers write to the publication's files.
    /// # let weights = unsafe { maptensors::Subscriber::attach(&place)? };
    /// let mut mine = weights.model_mut()?;
    /// mine.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?.fill(0.0); // nobody else sees it
    /// # publisher.remove()?;
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn model_mut(&self) -> Result<ModelMut> {
        self.mapped(Backing::CopyOnWrite).map(|model| ModelMut::new(model, false))
    }

    /// The generation that is held, as a value of its own: read-only over the same mappings as all others, or
    /// copy-on-write over fresh ones.
    #[allow(unsafe_code)]
    pub(crate) fn mapped(&self, backing: Backing) -> Result<Model> {
        // SAFETY: promised when this was attached (field invariant).
        unsafe { self.held.generation.map(&self.held.parts, backing) }
    }

    /// The latest generation there is.
    ///
    /// # Errors
    /// [`Error::Publication`] if the publication is over or damaged; what is held stays valid.
    pub fn latest(&self) -> Result<u64> {
        self.store.state().map(|state| state.generation)
    }

    /// Whether there is another generation than the one held.
    ///
    /// # Errors
    /// As [`Subscriber::latest`].
    pub fn has_changed(&self) -> Result<bool> {
        self.latest().map(|latest| latest != self.generation())
    }

    /// Waits, asleep, until there is a newer generation than the one held; `false` if there is none after so
    /// long. It is [`Subscriber::refresh`] that takes it.
    ///
    /// # Errors
    /// As [`Subscriber::latest`].
    pub fn wait(&self, most: Option<Duration>) -> Result<bool> {
        // Longer than the clock can count is for ever.
        let until = most.and_then(|most| Instant::now().checked_add(most));
        loop {
            let latest = self.latest()?;
            if latest != self.generation() {
                return Ok(true);
            }
            let left = until.map_or(SLICE, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(false);
            }
            self.store.control.wait(latest, left.min(SLICE));
        }
    }

    /// Goes on to the latest generation; `None` if it is the one held already. Segments that both share stay
    /// mapped where they are. The generation before is let go, unless somebody has kept its
    /// [model](Subscriber::model).
    ///
    /// What differs is found by comparing what was published since with what was held. A tensor that has changed
    /// costs what lies before its first difference; one that was published again as it was is read whole, which
    /// [`Publisher::publish_changed`](crate::Publisher::publish_changed) and
    /// [`publish_differing`](crate::Publisher::publish_differing) spare every reader.
    ///
    /// # Errors
    /// As [`Subscriber::latest`]; [`Error::Io`]. What is held stays held.
    pub fn refresh(&mut self) -> Result<Option<Refreshed>> {
        let Some((held, refreshed)) = self.next()? else { return Ok(None) };
        self.held = held;
        Ok(Some(refreshed))
    }

    /// As [`Subscriber::refresh`], and [`Subscriber::mapped`] of what is held then: both, or neither.
    #[cfg(feature = "python")]
    #[allow(unsafe_code)]
    pub(crate) fn refresh_mapped(&mut self, backing: Backing) -> Result<Option<(Refreshed, Model)>> {
        let Some((held, refreshed)) = self.next()? else { return Ok(None) };
        // SAFETY: promised when this was attached (field invariant).
        let model = unsafe { held.generation.map(&held.parts, backing) }?;
        self.held = held;
        Ok(Some((refreshed, model)))
    }

    /// The latest generation, if it is another than the one held.
    #[allow(unsafe_code)]
    fn next(&self) -> Result<Option<(Held, Refreshed)>> {
        if !self.has_changed()? {
            return Ok(None);
        }
        let found = self.store.generation(&self.held.generation.segments)?;
        let Some(generation) = found.filter(|found| found.number != self.generation()) else {
            return Ok(None);
        };
        // SAFETY: promised when this was attached (field invariant).
        let held = unsafe { Held::new(generation) }?;
        let refreshed = held.since(&self.held);
        Ok(Some((held, refreshed)))
    }
}

impl Held {
    /// # Safety
    /// As [`Subscriber::attach`].
    #[allow(unsafe_code)]
    unsafe fn new(generation: Generation) -> Result<Self> {
        let parts = generation.parts();
        // SAFETY: the caller's promise is passed on.
        let model = unsafe { generation.map(&parts, Backing::ReadOnly) }?;
        Ok(Self { generation, parts, model: Arc::new(model) })
    }

    /// What is other than in a generation held before.
    fn since(&self, before: &Self) -> Refreshed {
        let mut newer_names = Vec::new();
        for (place, part) in &self.parts {
            let segment = &self.generation.segments[*place].segment;
            let newer = |name: &str| segment.version(name) > before.generation.number;
            // A publication that went back, which no publisher does, has everything anew.
            let anew = self.generation.number < before.generation.number;
            newer_names.extend(part.iter().map(|i| i.name()).filter(|name| anew || newer(name)));
        }
        // Published since, and perhaps as it was.
        let differ = differing_from(&before.model, &self.model, &newer_names);
        let changed = newer_names.iter().zip(differ).filter(|(_, differs)| *differs);
        let changed = changed.map(|(name, _)| (*name).to_owned()).collect();
        let gone = |name: &&str| !self.model.contains(name);
        let removed = before.model.names().filter(gone).map(str::to_owned).collect();
        Refreshed { generation: self.generation.number, changed, removed }
    }
}

impl Generation {
    /// For each segment that any tensor lives in: its place, and the part of its layout that does.
    fn parts(&self) -> Vec<(usize, Layout)> {
        let owners = self.owners();
        let live: HashSet<usize> = owners.values().copied().collect();
        let part = |place: usize, layout: &Layout| {
            if layout.iter().all(|info| owners.get(info.name()) == Some(&place)) {
                return layout.clone();
            }
            layout.keeping(|info| owners.get(info.name()) == Some(&place))
        };
        let segments = self.segments.iter().enumerate().filter(|(place, _)| live.contains(place));
        segments.map(|(place, opened)| (place, part(place, &opened.segment.layout))).collect()
    }

    /// Its tensors as a model.
    ///
    /// # Safety
    /// As [`Subscriber::attach`].
    #[allow(unsafe_code)]
    unsafe fn map(&self, parts: &[(usize, Layout)], backing: Backing) -> Result<Model> {
        let (mut shards, mut mappings) = (Vec::new(), Vec::new());
        for (place, layout) in parts {
            let opened = &self.segments[*place];
            // SAFETY: the caller's promise is passed on.
            mappings.push(unsafe { opened.map(backing) }?);
            shards.push(Shard { path: opened.path.clone(), layout: layout.clone() });
        }
        let mut catalog = Catalog::new(shards)?;
        catalog.set_metadata(Some(self.metadata.clone()));
        Ok(Model::new(catalog, mappings))
    }
}

impl Opened {
    /// The segment's memory: read-only, the same for all who ask.
    ///
    /// # Safety
    /// As [`Subscriber::attach`].
    #[allow(unsafe_code)]
    unsafe fn map(&self, backing: Backing) -> Result<Arc<Mapping>> {
        if let Some(mapping) = self.mapping.get().filter(|_| backing == Backing::ReadOnly) {
            return Ok(mapping.clone());
        }
        let options = MapOptions::new();
        let window = options.window_of(self.segment.layout.file_len(), &self.path)?;
        // SAFETY: the caller vouches for the file, whose length its header was held against.
        let mapping = unsafe { options.bring(&self.file, &self.path, window, backing) }.map(Arc::new)?;
        Ok(if backing == Backing::ReadOnly { self.mapping.get_or_init(|| mapping).clone() } else { mapping })
    }
}

impl std::fmt::Debug for Subscriber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscriber")
            .field("path", &self.path())
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

/// As [`Subscriber::attach`], for tests in files without `unsafe`.
#[cfg(test)]
#[allow(unsafe_code)]
pub(super) fn attach_own(place: &Path) -> Result<Subscriber> {
    // SAFETY: a publication that a test has just made; it writes to no segment.
    unsafe { Subscriber::attach(place) }
}
