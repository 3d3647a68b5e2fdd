//! One generation, written: its segments, the flip, and what goes.

use super::control::State;
use super::plan::{Listed, Plan};
use super::publisher::Publisher;
use super::room;
use super::segment::{self, Head, KEY, Note, Segment};
use super::store::{Store, damaged};
use crate::diff::digest::CHECKSUMS;
use crate::error::{Error, Result};
use crate::layout::{Layout, Metadata};
use crate::map;
use crate::os::ExclusiveFile;
#[cfg(feature = "python")]
use crate::save::Later;
use crate::save::slot::Slot;
use crate::save::{Commit, Draft, SaveTensor, plan, stage};
use crate::work;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// A generation on its way.
struct Made {
    head: Segment,
    carried: Option<Segment>,
    plan: Plan,
    removed: BTreeSet<String>,
}

/// A generation whose files are filled, but for what its caller brings.
pub(crate) struct Staging {
    made: Made,
    commit: Commit,
    /// What the caller has yet to write, by the tensors' places among those that were staged.
    #[cfg(feature = "python")]
    pub(crate) later: Vec<Later>,
}

/// A segment that is listed no more.
struct Spare {
    /// To be written anew.
    number: Option<u64>,
    /// To be removed.
    left: Vec<u64>,
}

impl Publisher {
    /// Copies tensors into the next generation's files, up to its commit. Of those that the current generation has beside
    /// them, those stay that `keeps` says.
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    pub(crate) fn stage<T: SaveTensor>(
        &mut self,
        tensors: &[(String, T)],
        metadata: &Metadata,
        keeps: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<Staging> {
        self.own()?;
        let layout = plan(tensors, None)?;
        self.stands()?;
        self.edited = None;
        // Never again, also if this fails.
        let carried = self.next;
        self.next += 2;
        let number = carried + 1;
        let mut spare = Spare { number: self.spare.take(), left: Vec::new() };
        let draft = self.make(number, &self.file(number), &layout, metadata, keeps, &mut spare);
        self.spare = spare.number;
        self.left.extend(spare.left);
        let staged = draft.and_then(|(draft, made)| Ok((stage(draft, tensors)?, made)));
        match staged {
            Ok((staged, made)) => Ok(Staging {
                made,
                commit: staged.commit,
                #[cfg(feature = "python")]
                later: staged.later,
            }),
            Err(error) => Err(self.without(number, error)),
        }
    }

    /// Publishes what was staged, once its caller has written what it had to bring.
    ///
    /// # Errors
    /// As [`Publisher::publish`]; that of the caller.
    pub(crate) fn finish_generation<E: From<Error>>(
        &mut self,
        staging: Staging,
        brought: Result<(), E>,
    ) -> Result<u64, E> {
        let Staging { made, commit, .. } = staging;
        let number = made.head.note.number;
        // Its memory is unmapped at once: while it is mapped, nobody could ever use the file again.
        let committed = brought.and_then(|()| commit().map(drop).map_err(E::from));
        let done = committed.and_then(|()| {
            self.give_away(number)?;
            self.flip(number)?;
            Ok(())
        });
        if let Err(error) = done {
            return Err(self.without(number, error));
        }
        self.settle(made).map_err(|error| match error {
            Error::Io { path: left, source, .. } => {
                Error::NotRemoved { path: self.store.path.clone(), left, source }
            }
            error => error,
        })?;
        Ok(self.generation)
    }

    /// Takes away what there is of a generation that does not come about.
    fn without<E>(&mut self, number: u64, error: E) -> E {
        self.left.extend([number - 1, number]);
        // Tried again, and told, when something is published: now that it was not is.
        self.remove_left().ok();
        error
    }

    /// Gives a segment to whom the publication belongs.
    fn give_away(&self, number: u64) -> Result<()> {
        let Some(owner) = self.belongs_to else { return Ok(()) };
        let (name, path) = (segment::file_name(number), self.file(number));
        let file = self.store.dir.open_file(&name, false);
        owner.give(&file.map_err(Error::io(&path, "opening it to give it away"))?, &path)
    }

    /// Makes the head's file, and before it the one of the tensors that are carried.
    fn make(
        &self,
        number: u64,
        path: &Path,
        layout: &Layout,
        metadata: &Metadata,
        keeps: &dyn Fn(&str) -> bool,
        spare: &mut Spare,
    ) -> Result<(Draft, Made)> {
        if number >= segment::LIMIT {
            return Err(damaged(&self.store.path, "its segments' numbers are used up"));
        }
        let generation = self.generation + 1;
        let plan = Plan::new(&self.listed, layout, keeps);
        let carried = if plan.carries() { Some(self.carry(number - 1, generation, &plan)?) } else { None };
        let old =
            || self.listed.iter().zip(&plan.live).filter(|(_, live)| !live.is_empty()).map(|(old, _)| old);
        let has = |name: &String| old().any(|old| old.segment.layout.position(name).is_some());
        let gone = |name: &&String| layout.position(name).is_none() && has(name);
        let removed: BTreeSet<String> = self.removed.union(&plan.removed).filter(gone).cloned().collect();
        let segments = carried.iter().chain(old().map(|old| &old.segment)).map(|s| s.note.number).collect();
        let head = Some(Head { segments, removed: removed.clone() });
        let note = Note { number, generation, versions: BTreeMap::new(), head };
        let mut metadata = metadata.clone();
        // They would be those of this segment's tensors alone.
        metadata.remove(CHECKSUMS);
        metadata.insert(KEY, note.encode(path)?);
        let mut layout = layout.clone();
        layout.set_metadata(Some(metadata));
        let draft = self.draft(spare, path, &layout).map_err(room::told(path, layout.data_len()))?;
        let head = Segment { layout: draft.layout().clone(), note };
        Ok((draft, Made { head, carried, plan, removed }))
    }

    /// A draft: in the segment that is listed no more, if nobody has that.
    fn draft(&self, spare: &mut Spare, path: &Path, layout: &Layout) -> Result<Draft> {
        let old = spare.number.and_then(|number| {
            let stat = self.store.dir.stat(&segment::file_name(number)).ok()?;
            Some((number, u64::try_from(stat.st_size).unwrap_or_default()))
        });
        // Giving most of a large one back takes its time: that is done after the flip, by removing it.
        let most = layout.data_len().saturating_mul(2).saturating_add(1 << 20);
        if let Some((number, len)) = old.filter(|(_, len)| *len <= most) {
            spare.number = None;
            if let Some(draft) = self.recycled(number, len, path, layout)? {
                return Ok(draft);
            }
            // If it still has its name.
            if self.store.remove(number).is_err() {
                spare.left.push(number);
            }
        }
        self.draft.create(path, layout)
    }

    /// For what cannot be used again, whatever the reason, a new file is made.
    ///
    /// # Errors
    /// [`Error::Io`] for one that could not be removed either.
    fn recycled(&self, spare: u64, len: u64, path: &Path, layout: &Layout) -> Result<Option<Draft>> {
        #[cfg(target_os = "linux")]
        {
            let Store { dir, path: directory, .. } = &self.store;
            let Ok(hidden) = ExclusiveFile::hide(dir, &segment::file_name(spare)) else { return Ok(None) };
            match Slot::recycle(dir, directory, &hidden, len) {
                // One that cannot be drafted in goes with the slot.
                Ok(Some(slot)) => Ok(slot.draft(path, layout, &self.draft).unwrap_or_default()),
                Err(error) if dir.contains(&hidden) => Err(error),
                Ok(None) | Err(_) => Ok(None),
            }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (spare, len, path, layout);
            Ok(None)
        }
    }

    /// Copies tensors that live in older segments into one of their own.
    fn carry(&self, number: u64, generation: u64, plan: &Plan) -> Result<Segment> {
        let path = self.file(number);
        let tensors = || {
            let listed = self.listed.iter().zip(&plan.carried).filter(|(_, carried)| !carried.is_empty());
            listed.map(|(old, carried)| (&old.segment, carried))
        };
        let mut layout = Layout::builder();
        let mut versions = BTreeMap::new();
        for (old, carried) in tensors() {
            for info in carried.iter().filter_map(|&place| old.layout.at(place)) {
                versions.insert(info.name().to_owned(), old.version(info.name()));
                layout = layout.tensor(info.name(), info.dtype(), info.shape());
            }
        }
        let note = Note { number, generation, versions, head: None };
        let layout = layout.metadata(KEY, note.encode(&path)?).build()?;
        let mut draft = self.draft.create(&path, &layout).map_err(room::told(&path, layout.data_len()))?;
        for (old, carried) in tensors() {
            let from = segment::open(&self.store.dir, &self.store.path, old.note.number)?;
            for info in carried.iter().filter_map(|&place| old.layout.at(place)) {
                let mut to = draft.tensor_mut(info.name())?;
                let pieces = to.as_bytes_mut().chunks_mut(map::CHUNK).enumerate().collect();
                let copied = work::each_in_parallel(pieces, |(i, piece): (usize, &mut [u8])| {
                    from.file.read_exact_at(piece, info.offset() + (i * map::CHUNK) as u64)
                });
                copied.map_err(Error::io(&from.path, "carrying tensors on"))?;
            }
        }
        let layout = draft.layout().clone();
        draft.commit()?;
        self.give_away(number)?;
        Ok(Segment { layout, note })
    }

    /// From here on the new generation is the current one.
    fn flip(&self, head: u64) -> Result<()> {
        let generation = self.generation + 1;
        let flipped = self.store.control.flip(generation, head);
        // A write that failed has perhaps been done.
        let done =
            || matches!(self.store.control.read(), Ok(Some(State { generation: g, .. })) if g == generation);
        match flipped {
            Err(error) if !done() => Err(Error::io(&self.store.path, "writing the control page")(error)),
            _ => Ok(()),
        }
    }

    /// Keeps account of what is listed now, and takes away what is not.
    ///
    /// # Errors
    /// [`Error::Io`] for what could not be.
    fn settle(&mut self, made: Made) -> Result<()> {
        let Made { head, carried, plan, removed } = made;
        self.generation = head.note.generation;
        self.removed = removed;
        let old = std::mem::take(&mut self.listed);
        self.listed = std::iter::once(head).chain(carried).map(Listed::new).collect();
        let mut unlisted = Vec::new();
        for (old, live) in old.into_iter().zip(plan.live) {
            if live.is_empty() {
                unlisted.push((old.segment.layout.file_len(), old.segment.note.number));
            } else {
                self.listed.push(Listed { segment: old.segment, live });
            }
        }
        unlisted.sort_unstable();
        // The largest is kept, for who is just opening it, and to be used again.
        let spare = unlisted.pop_if(|_| self.recycle).map(|(_, number)| number);
        let unused = std::mem::replace(&mut self.spare, spare);
        self.left.extend(unlisted.into_iter().map(|(_, number)| number).chain(unused));
        self.remove_left()
    }

    pub(super) fn file(&self, number: u64) -> PathBuf {
        self.store.path.join(segment::file_name(number))
    }
}
