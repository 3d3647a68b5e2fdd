//! A model's tensors as pages: which are in memory, brought, given back, locked.
#![forbid(unsafe_code)]

mod prefetch;
mod schedule;
mod stream;

pub use prefetch::Prefetch;
pub(crate) use prefetch::unreadable;
pub(crate) use stream::ReadAhead;
pub use stream::{Order, StreamOptions};

use crate::error::{Error, Result, quote};
use crate::layout::Catalog;
use crate::layout::{Position, Run, Select};
use crate::map::{Evicted, Pages, Residency};
use crate::work::each_in_parallel;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The tensors of a model that are locked: a page that two of them share stays locked until both are unlocked.
#[derive(Debug, Default)]
pub(crate) struct Locks(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    /// By shard and first byte, their ends. None is empty, and no two overlap.
    tensors: BTreeMap<(usize, usize), usize>,
    /// Whether those that were locked with their files are among them.
    has_whole_files: bool,
}

impl Locks {
    fn held(&self, paging: &Paging<'_>) -> MutexGuard<'_, Held> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut held.has_whole_files, true) {
            for (shard, _) in paging.pages.iter().enumerate().filter(|(_, pages)| pages.is_locked_whole()) {
                let tensors = paging.catalog.shards()[shard].layout.iter();
                held.add(&tensors.map(|info| (shard, info.bytes())).collect::<Vec<_>>());
            }
        }
        held
    }
}

impl Held {
    fn add(&mut self, tensors: &[Run]) {
        let filled = tensors.iter().filter(|(_, bytes)| !bytes.is_empty());
        self.tensors.extend(filled.map(|(shard, bytes)| ((*shard, bytes.start), bytes.end)));
    }

    /// Unlocks the pages of a run that hold no part of a tensor that is locked.
    fn unlock_rest(&self, pages: &[Pages], (shard, run): &Run) -> io::Result<()> {
        let pages = &pages[*shard];
        let all = pages.pages_of(run);
        let before = self.tensors.range((*shard, 0)..(*shard, all.start)).next_back();
        let inside = self.tensors.range((*shard, all.start)..(*shard, all.end));
        let mut from = all.start;
        for (&(_, start), &end) in before.into_iter().chain(inside) {
            let kept = pages.pages_of(&(start..end));
            pages.unlock(from..kept.start.max(from))?;
            from = from.max(kept.end);
        }
        pages.unlock(from..all.end.max(from))
    }
}

/// Tensors to be locked, all of them or none.
pub(crate) struct ToLock {
    /// As they lie in their files.
    runs: Vec<Run>,
    tensors: Vec<Run>,
    locks: Arc<Locks>,
}

impl ToLock {
    pub(crate) fn lock(&self, pages: &[Pages]) -> Result<()> {
        let mut held = self.locks.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (i, (shard, run)) in self.runs.iter().enumerate() {
            if let Err(error) = pages[*shard].lock(run.clone()) {
                for run in &self.runs[..=i] {
                    held.unlock_rest(pages, run).ok();
                }
                return Err(error);
            }
        }
        held.add(&self.tensors);
        Ok(())
    }
}

/// Rust's model or Python's, as pages.
pub(crate) struct Paging<'a> {
    pub(crate) catalog: &'a Catalog,
    /// One for each shard.
    pub(crate) pages: Vec<Pages>,
    pub(crate) locks: &'a Arc<Locks>,
}

impl Paging<'_> {
    fn failed(&self, shard: usize, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        Error::io(&self.catalog.shards()[shard].path, action)
    }

    /// All that is selected, together. A page that holds several of the tensors counts once.
    pub(crate) fn residency(&self, select: &Select<'_>) -> Result<Residency> {
        let mut total = Residency { page_size: rustix::param::page_size(), ..Residency::default() };
        let positions = self.catalog.select(select)?;
        let mut parts: Vec<Vec<Range<usize>>> = vec![Vec::new(); self.pages.len()];
        for (shard, run) in self.catalog.runs(&positions) {
            let run = self.pages[shard].pages_of(&run);
            match parts[shard].last_mut() {
                Some(last) if last.end >= run.start => last.end = run.end,
                _ => parts[shard].push(run),
            }
        }
        for (shard, (pages, parts)) in self.pages.iter().zip(&parts).enumerate() {
            for found in pages.residency(parts).map_err(self.failed(shard, "asking about its pages"))? {
                total += found;
            }
        }
        Ok(total)
    }

    /// For each tensor that is selected, in file order.
    pub(crate) fn residency_by_tensor(&self, select: &Select<'_>) -> Result<Vec<(Position, Residency)>> {
        let positions = self.catalog.select(select)?;
        let mut found = Vec::with_capacity(positions.len());
        for positions in positions.chunk_by(|a, b| a.0 == b.0) {
            let shard = positions[0].0;
            let parts: Vec<_> = positions.iter().map(|&position| self.catalog.bytes(position)).collect();
            let answers = self.pages[shard].residency(&parts);
            let answers = answers.map_err(self.failed(shard, "asking about its pages"))?;
            found.extend(positions.iter().copied().zip(answers));
        }
        Ok(found)
    }

    /// Gives back the pages that hold nothing but selected tensors.
    pub(crate) fn evict(&self, select: &Select<'_>) -> Result<Evicted> {
        let positions = self.catalog.select(select)?;
        let mut work = Vec::new();
        let mut locked: Vec<Option<Vec<Range<usize>>>> = vec![None; self.pages.len()];
        for (shard, run) in self.catalog.runs(&positions) {
            let part = self.pages[shard].pages_in(&run);
            let locked = match &mut locked[shard] {
                Some(locked) => locked,
                empty => {
                    let asked = self.pages[shard].locked();
                    empty.insert(asked.map_err(self.failed(shard, "asking what is locked"))?)
                }
            };
            // Before anything is given back.
            if let Some(locked) = locked.iter().find(|run| run.start < part.end && part.start < run.end) {
                let inside = |position: &&Position| {
                    position.0 == shard && self.touches(**position, &(locked.start..locked.end))
                };
                let name = positions.iter().find(inside).map_or("", |&position| self.catalog.name(position));
                return Err(Error::Argument(format!(
                    "tensor {} is locked in memory: unlock it first",
                    quote(name)
                )));
            }
            work.push((shard, part));
        }
        let total = Mutex::new(Evicted::default());
        each_in_parallel(work, |(shard, part): (usize, Range<usize>)| {
            let evicted = self.pages[shard].evict(part);
            let evicted = evicted.map_err(self.failed(shard, "giving its pages back"))?;
            *total.lock().unwrap_or_else(PoisonError::into_inner) += evicted;
            Ok::<_, Error>(())
        })?;
        Ok(total.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn touches(&self, position: Position, part: &Range<usize>) -> bool {
        let pages = self.pages[position.0].pages_of(&self.catalog.bytes(position));
        pages.start < part.end && part.start < pages.end
    }

    /// What is selected, to be locked with its pages.
    pub(crate) fn to_lock(&self, positions: &[Position]) -> ToLock {
        drop(self.locks.held(self));
        ToLock {
            runs: self.catalog.runs(positions),
            tensors: positions.iter().map(|&position| (position.0, self.catalog.bytes(position))).collect(),
            locks: self.locks.clone(),
        }
    }

    /// Locks what is selected: all of it or, where that fails, what was locked before.
    pub(crate) fn lock(&self, select: &Select<'_>) -> Result<()> {
        self.to_lock(&self.catalog.select(select)?).lock(&self.pages)
    }

    /// Unlocks what is selected, but for pages that hold a part of a tensor that stays locked.
    pub(crate) fn unlock(&self, select: &Select<'_>) -> Result<()> {
        let positions = self.catalog.select(select)?;
        let mut held = self.locks.held(self);
        for position in &positions {
            let bytes = self.catalog.bytes(*position);
            if !bytes.is_empty() {
                held.tensors.remove(&(position.0, bytes.start));
            }
        }
        for run in self.catalog.runs(&positions) {
            held.unlock_rest(&self.pages, &run).map_err(self.failed(run.0, "unlocking its pages"))?;
        }
        Ok(())
    }
}
