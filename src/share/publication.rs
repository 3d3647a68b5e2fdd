//! Publications as one finds them: what they hold and take, who publishes, what was left behind.

use super::claim::{end, take_to_remove};
use super::place::Place;
use super::segment;
use super::store::{CONTROL, Generation, Store, nothing};
use crate::error::{Error, Result};
use crate::os::ExclusiveFile;
use crate::os::disk::Dir;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Looks that find another generation behind them than before, until what was found must do.
const TRIES: usize = 10;

/// A publication, as it was when it was looked at: also one whose publisher was killed, or that is damaged.
///
/// Looking makes nothing, locks nothing and follows no link out of the directory where names lie. A subscriber, and a
/// publisher that begins meanwhile, do not notice.
///
/// ```
/// use maptensors::{Model, Publication, Publisher};
///
/// let model = Model::read("models/digits.safetensors")?;
/// # let place = std::env::temp_dir().join(format!("maptensors-doc-found-{}", std::process::id()));
/// let mut publisher = Publisher::open(&place)?;
/// publisher.publish(model.tensors().map(|t| (t.name(), t)))?;
///
/// let found = Publication::at(&place)?; // all that have a name: Publication::all()
/// assert_eq!((found.generation, found.tensors, found.publishing), (1, model.len(), true));
/// assert!(found.allocated > found.nbytes && found.damage.is_none());
/// # let refused = Publication::at(&place)?.remove().unwrap_err();
/// # assert_eq!(refused.kind().name(), "Busy");
///
/// drop(publisher); // or killed: its last generation stays
/// let found = Publication::at(&place)?;
/// assert!(!found.publishing);
/// assert_eq!(found.remove()?, found.allocated);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Publication {
    /// Its name; `None` where it is known by a path.
    pub name: Option<String>,
    /// Its directory.
    pub path: PathBuf,
    /// The current generation; 0: there is none.
    pub generation: u64,
    /// Tensors of the current generation.
    pub tensors: usize,
    /// Their bytes.
    pub nbytes: u64,
    /// Bytes that its files take, in memory or on a disk.
    pub allocated: u64,
    /// Of these, in segments that the current generation does not list: to be used again, about to be published, or
    /// left by a publisher that was killed. 0 of a damaged one, where that is not known.
    pub spare: u64,
    /// Of these, in files of no segment's name: being written, or left by a publisher that was killed. (A new file has
    /// no name at all until it is published, where the file system has such: it is not seen, and goes with its publisher.)
    pub unfinished: u64,
    /// Whether anybody publishes there now.
    pub publishing: bool,
    /// The process that does, or did last, as it knew itself; 0: not known.
    pub process: u64,
    /// When the current generation was written.
    pub published: Option<SystemTime>,
    /// What is wrong with it; `None`: it is whole, or has no generation yet.
    pub damage: Option<String>,
    place: Place,
    segments: Vec<PathBuf>,
}

impl Publication {
    /// All publications that have a name, in its order: those of this user, or in `$MAPTENSORS_SHARE_DIR`. What cannot
    /// be looked at is among them, with the reason.
    ///
    /// # Errors
    /// [`Error::Argument`] for a directory that others have a hand in; [`Error::Io`].
    ///
    /// ```
    /// for found in maptensors::Publication::all()?.iter().filter(|found| !found.publishing) {
    ///     println!("{}: {} bytes, and nobody publishes", found.path.display(), found.allocated);
    /// }
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn all() -> Result<Vec<Self>> {
        let look = |place: Place| match Self::look(&place) {
            Err(error) => Some(Self { damage: Some(told(error)), ..Self::empty(place) }),
            // Removed since it was listed, or never one.
            Ok(found) => found,
        };
        Ok(Place::all()?.into_iter().filter_map(look).collect())
    }

    /// The publication of a name, or at the path of a directory (with a separator), as for
    /// [`Publisher::open`](crate::Publisher::open).
    ///
    /// # Errors
    /// [`Error::Publication`] where there is none; [`Error::Argument`] for a name that could lead elsewhere;
    /// [`Error::Io`]. A damaged one is none: [`Publication::damage`] says what it is.
    pub fn at(place: impl AsRef<Path>) -> Result<Self> {
        let place = Place::existing(place.as_ref())?;
        Self::look(&place)?.ok_or_else(|| nothing(&place.path))
    }

    /// Takes it away, with all that publishers left there, and returns how many bytes its files took. Who is attached is
    /// told, and keeps what is held: the memory of that is free once they let go.
    ///
    /// # Errors
    /// [`Error::Busy`] while anybody publishes there; [`Error::Publication`] if it is not there any more, or what is at
    /// a path may be something else; [`Error::Io`].
    pub fn remove(&self) -> Result<u64> {
        let Place { path, .. } = &self.place;
        let dir = self.place.open().map_err(|error| match error.kind() {
            ErrorKind::NotFound => nothing(path),
            _ => Error::io(path, "opening the publication")(error),
        })?;
        if self.place.name().is_some() && Files::of(&dir, path)?.is_empty() {
            return Err(nothing(path));
        }
        let before = Files::of(&dir, path)?.allocated();
        let control = take_to_remove(&dir, path, self.place.name().is_some())?;
        end(&control, &dir, path, false)?;
        control.unlock();
        Ok(before.saturating_sub(Files::of(&dir, path)?.allocated()))
    }

    /// The files of its segments, listed or not.
    #[cfg(feature = "cli")]
    pub(crate) fn segments(&self) -> &[PathBuf] {
        &self.segments
    }

    /// `None` where there is none.
    fn look(place: &Place) -> Result<Option<Self>> {
        let path = &place.path;
        let dir = match place.open() {
            Ok(dir) => dir,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            // Links and files lie among what has a name, but are nobody's publication.
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) && place.name().is_some() => {
                return Ok(None);
            }
            Err(error) => return Err(Error::io(path, "opening the publication")(error)),
        };
        let mut found = Self::empty(place.clone());
        let files = Files::of(&dir, path)?;
        let store = match Store::within(dir, path) {
            Ok(Some(store)) => store,
            Ok(None) if place.name().is_none() || files.is_empty() => return Ok(None),
            Ok(None) => {
                found.count(&files);
                found.damage = Some(
                    "there is no control page: a publisher was killed before it was made, or begins".into(),
                );
                return Ok(Some(found));
            }
            Err(error) if place.name().is_none() && !files.control => return Err(error),
            Err(error) => {
                found.count(&files);
                found.damage = Some(told(error));
                return Ok(Some(found));
            }
        };
        Ok(found.take_in(&store)?.then_some(found))
    }

    /// Looks at what is there; `false` if it is being removed.
    fn take_in(&mut self, store: &Store) -> Result<bool> {
        for _ in 0..TRIES {
            let state = store.control.read().map_err(Error::io(&self.path, "reading the control page"))?;
            let generation = store.generation(&[]);
            // After the segments that are listed: what has been removed since is listed no more.
            let files = Files::of(&store.dir, &self.path)?;
            self.publishing =
                store.control.is_locked().map_err(Error::io(&self.path, "asking who publishes"))?;
            self.process = state.map_or(0, |state| state.writer);
            self.generation = state.map_or(0, |state| state.generation);
            self.count(&files);
            self.damage = match generation {
                Ok(generation) => {
                    self.hold(generation.as_ref(), &files);
                    None
                }
                Err(_) if store.is_over() => {
                    // Whoever removes it holds the lock until its files are gone.
                    if self.publishing || !store.control.is(&store.dir, CONTROL.as_ref()) {
                        return Ok(false);
                    }
                    Some("its removal did not come to its end".into())
                }
                Err(error) => Some(told(error)),
            };
            if store.control.read().is_ok_and(|now| now == state) {
                break;
            }
        }
        Ok(true)
    }

    /// Takes in the sizes of its files.
    fn count(&mut self, files: &Files) {
        let numbers = files.segments.iter();
        self.segments = numbers.map(|(number, _)| self.path.join(segment::file_name(*number))).collect();
        (self.allocated, self.unfinished, self.spare) = (files.allocated(), files.unfinished, 0);
        (self.tensors, self.nbytes, self.published) = (0, 0, None);
    }

    /// Takes in its current generation, or that there is none.
    fn hold(&mut self, generation: Option<&Generation>, files: &Files) {
        let listed = generation.map_or(&[][..], |generation| &generation.segments);
        let is_listed = |number: u64| listed.iter().any(|opened| opened.segment.note.number == number);
        let spare = files.segments.iter().filter(|(number, _)| !is_listed(*number));
        self.spare = total(spare.map(|(_, bytes)| *bytes));
        let Some(generation) = generation else { return };
        self.generation = generation.number;
        let owners = generation.owners();
        self.tensors = owners.len();
        let sizes = owners.into_iter().filter_map(|(name, place)| {
            let layout = &generation.segments.get(place)?.segment.layout;
            Some(layout.at(layout.position(name)?)?.nbytes())
        });
        self.nbytes = total(sizes);
        let head = listed.first().and_then(|head| head.file.metadata().ok());
        self.published = head.and_then(|head| head.modified().ok());
    }

    fn empty(place: Place) -> Self {
        Self {
            name: place.name().map(str::to_owned),
            path: place.path.clone(),
            generation: 0,
            tensors: 0,
            nbytes: 0,
            allocated: 0,
            spare: 0,
            unfinished: 0,
            publishing: false,
            process: 0,
            published: None,
            damage: None,
            place,
            segments: Vec::new(),
        }
    }
}

/// The files of a publication, and the bytes that they take.
#[derive(Default)]
struct Files {
    /// Whether anything is called as the control page is.
    control: bool,
    page: u64,
    /// By number, in their order.
    segments: Vec<(u64, u64)>,
    unfinished: u64,
    /// How many unfinished files there are: a new one takes nothing yet.
    begun: usize,
}

impl Files {
    /// None is opened: who opens an unfinished one would be in its publisher's way.
    fn of(dir: &Dir, path: &Path) -> Result<Self> {
        let mut files = Self::default();
        for name in dir.names().map_err(Error::io(path, "listing the publication"))? {
            let Ok(stat) = dir.lstat(&name) else { continue };
            let is_file =
                rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
            // stat(2): in units of 512 bytes, whatever the file system's blocks are.
            let blocks = if is_file { u64::try_from(stat.st_blocks).unwrap_or_default() } else { 0 };
            let bytes = blocks.saturating_mul(512);
            if name == CONTROL {
                (files.control, files.page) = (true, bytes);
            } else if let Some(number) = segment::number_of(&name) {
                files.segments.push((number, bytes));
            } else if ExclusiveFile::is_unfinished(&name) {
                files.unfinished = files.unfinished.saturating_add(bytes);
                files.begun += 1;
            }
        }
        files.segments.sort_unstable();
        Ok(files)
    }

    fn allocated(&self) -> u64 {
        total(self.segments.iter().map(|(_, bytes)| *bytes).chain([self.page, self.unfinished]))
    }

    fn is_empty(&self) -> bool {
        !self.control && self.segments.is_empty() && self.begun == 0
    }
}

/// Headers may lie, and holes take nothing: a sum that no machine has is no reason to panic.
fn total(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

/// What is wrong, without the path that is told beside it.
fn told(error: Error) -> String {
    match error {
        Error::Publication { what, .. } => what,
        error => error.to_string(),
    }
}
