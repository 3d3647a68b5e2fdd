//! A publication as it lies in its directory.

use super::control::{Control, State};
use super::segment::{self, Opened};
use super::user;
use crate::error::{Error, Result};
use crate::layout::Metadata;
use crate::os::disk::Dir;
use std::collections::{BTreeSet, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The control page's file.
pub(super) const CONTROL: &str = "control";

/// How often a reader sets out again because the publisher was faster.
const TRIES: u32 = 10_000;

/// A publication's directory and its control page, held open: what they are renamed to does not matter to who reads.
pub(super) struct Store {
    pub(super) dir: Arc<Dir>,
    pub(super) path: PathBuf,
    pub(super) control: Control,
}

/// One generation: which segments make it up.
pub(super) struct Generation {
    pub(super) number: u64,
    /// Newest first; the first is the head.
    pub(super) segments: Vec<Arc<Opened>>,
    /// Names that live in none of them.
    pub(super) removed: BTreeSet<String>,
    pub(super) metadata: Metadata,
}

impl Generation {
    /// The segment, by its place among all, in which each tensor lives.
    pub(super) fn owners(&self) -> HashMap<&str, usize> {
        let mut owners = HashMap::new();
        for (place, opened) in self.segments.iter().enumerate() {
            for info in opened.segment.layout.iter().filter(|info| !self.removed.contains(info.name())) {
                owners.entry(info.name()).or_insert(place);
            }
        }
        owners
    }
}

impl Store {
    /// Opens a publication to look at it; `None` where there is none, or none yet.
    ///
    /// # Errors
    /// [`Error::Publication`] for one that is damaged, [`Error::Io`].
    pub(super) fn open(path: &Path) -> Result<Option<Self>> {
        match Dir::open(path) {
            Ok(dir) => Self::within(dir, path),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path, "opening the publication")(error)),
        }
    }

    /// As [`Store::open`], in a directory that is open.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub(super) fn within(dir: Dir, path: &Path) -> Result<Option<Self>> {
        // A publisher may begin between a look at the page and one at the rest.
        for last in [false, true] {
            match Control::open(&dir, CONTROL.as_ref(), false) {
                Ok(control) => return Ok(Some(Self { dir: Arc::new(dir), path: path.into(), control })),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    return Err(damaged(path, "its control page is no file"));
                }
                Err(error) => {
                    let error = Error::io(path, "opening the publication")(error);
                    return Err(user::told(&dir, CONTROL.as_ref(), error));
                }
            }
            let names = dir.names().map_err(Error::io(path, "listing the publication"))?;
            match names.iter().find(|name| segment::number_of(name).is_some()) {
                None => return Ok(None),
                Some(_) if !last => {}
                // A publisher would refuse to begin there.
                Some(name) => {
                    let name = name.display();
                    let what = format!(
                        "there is {name}, but no control page: this is no publication, or a damaged one"
                    );
                    return Err(Error::Publication { path: path.into(), what });
                }
            }
        }
        Ok(None)
    }

    /// What the control page says.
    ///
    /// # Errors
    /// [`Error::Publication`] for a page that makes no sense, [`Error::Io`].
    pub(super) fn look(&self) -> Result<State> {
        let state = self.control.read().map_err(Error::io(&self.path, "reading the control page"))?;
        state.ok_or_else(|| damaged(&self.path, "its control page makes no sense"))
    }

    /// As [`Store::look`], at a publication that goes on.
    ///
    /// # Errors
    /// As [`Store::look`]; [`Error::Publication`] if it is over.
    pub(super) fn state(&self) -> Result<State> {
        let state = self.look()?;
        if state.closed { Err(self.over()) } else { Ok(state) }
    }

    /// Whether the publication is over: what else is wrong with it is of no interest then.
    pub(super) fn is_over(&self) -> bool {
        self.look().is_ok_and(|state| state.closed)
    }

    fn over(&self) -> Error {
        let what = "the publication is over: its publisher, or somebody else, has removed it".into();
        Error::Publication { path: self.path.clone(), what }
    }

    /// The current generation, `None` before the first. Segments that are open already are taken from `known`.
    ///
    /// The publisher may take segments away while they are being opened: then there is a newer generation, and
    /// this sets out again.
    ///
    /// # Errors
    /// [`Error::Publication`] for one that is over or damaged; [`Error::Io`].
    pub(super) fn generation(&self, known: &[Arc<Opened>]) -> Result<Option<Generation>> {
        let mut state = self.state()?;
        // What one attempt has opened, the next need not.
        let mut known = known.to_vec();
        for _ in 0..TRIES {
            if state.generation == 0 {
                return Ok(None);
            }
            let found = self.assemble(&state, &mut known);
            // Also after a success: a directory in which everything was removed and begun anew has the same
            // numbers, but not this control page.
            let now = self.state()?;
            match found {
                Ok(generation) => return Ok(Some(generation)),
                Err(Error::Io { source, path, .. })
                    if now == state && source.kind() == ErrorKind::NotFound =>
                {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    return Err(damaged(
                        &self.path,
                        &format!("{name} is missing, of generation {}", now.generation),
                    ));
                }
                // Somebody who holds a lease on a segment that is listed, for a moment or for ever.
                Err(Error::Io { source, .. }) if now == state && source.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Err(error) if now == state => return Err(error),
                Err(_) => state = now,
            }
        }
        Err(damaged(&self.path, "its segments could not be opened"))
    }

    fn assemble(&self, state: &State, known: &mut Vec<Arc<Opened>>) -> Result<Generation> {
        let mut open = |number: u64| {
            if let Some(opened) = known.iter().find(|opened| opened.segment.note.number == number) {
                return Ok(opened.clone());
            }
            let opened = Arc::new(segment::open(&self.dir, &self.path, number)?);
            known.push(opened.clone());
            Ok::<_, Error>(opened)
        };
        let head = open(state.head)?;
        let note =
            head.segment.note.head.clone().filter(|_| head.segment.note.generation == state.generation);
        let note = note.ok_or_else(|| {
            damaged(
                &self.path,
                &format!("segment {} is not the head of generation {}", state.head, state.generation),
            )
        })?;
        let metadata = head.segment.layout.metadata().clone();
        let mut segments = vec![head];
        for number in note.segments {
            segments.push(open(number)?);
        }
        Ok(Generation { number: state.generation, segments, removed: note.removed, metadata })
    }

    /// Removes a segment, if it is there.
    ///
    /// # Errors
    /// [`Error::Io`]: it is still there, and takes its memory.
    pub(super) fn remove(&self, number: u64) -> Result<()> {
        let name = segment::file_name(number);
        match self.dir.remove(&name) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::io(&self.path.join(name), "removing a segment")(error))
            }
            _ => Ok(()),
        }
    }

    /// The numbers of all segments in the directory.
    pub(super) fn numbers(&self) -> Result<Vec<u64>> {
        let names = self.dir.names().map_err(Error::io(&self.path, "listing the publication"))?;
        Ok(names.iter().filter_map(|name| segment::number_of(name)).collect())
    }
}

/// What one who attaches finds. An error is what no publisher puts right.
pub(super) enum Found {
    Whole(Store, Generation),
    /// No generation yet.
    Begun(Store),
    /// Not there yet, or over, and perhaps being replaced by another.
    NotYet(Error),
}

impl Found {
    pub(super) fn at(path: &Path) -> Result<Self> {
        let Some(store) = Store::open(path)? else { return Ok(Self::NotYet(nothing(path))) };
        match store.generation(&[]) {
            Ok(Some(generation)) => Ok(Self::Whole(store, generation)),
            Ok(None) => Ok(Self::Begun(store)),
            Err(error) if store.is_over() => Ok(Self::NotYet(error)),
            Err(error) => Err(error),
        }
    }
}

/// That there is none, or none yet.
pub(super) fn nothing(path: &Path) -> Error {
    let what = "nothing is published there, or not yet (a publisher makes it; attaching can wait for it)";
    Error::Publication { path: path.into(), what: what.into() }
}

pub(super) fn damaged(path: &Path, what: &str) -> Error {
    let what = format!(
        "the publication is damaged: {what}; to start anew, remove it (`maptensors publications --remove`)"
    );
    Error::Publication { path: path.into(), what }
}
