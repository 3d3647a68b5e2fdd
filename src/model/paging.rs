//! A model's tensors as pages: which are in memory, brought, given back, locked.

use super::Catalog;
use super::select::{Place, Select};
use crate::error::{Error, Result, quote};
use crate::map::{Evicted, Pages, Residency, each_in_parallel};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The tensors of a model that were locked by name: a page that two of them share stays locked until both are
/// unlocked.
#[derive(Debug, Default)]
pub(crate) struct Locks(Mutex<BTreeSet<Place>>);

impl Locks {
    fn held(&self) -> MutexGuard<'_, BTreeSet<Place>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn failed(&self, shard: usize, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        Error::io(&self.catalog.shards()[shard].path, action)
    }

    /// All that is selected, together. A page that holds several of the tensors counts once.
    pub(crate) fn residency(&self, select: &Select<'_>) -> Result<Residency> {
        let mut total = Residency { page_size: rustix::param::page_size(), ..Residency::default() };
        let places = self.catalog.select(select)?;
        let mut parts: Vec<Vec<Range<usize>>> = vec![Vec::new(); self.pages.len()];
        for (shard, run) in self.catalog.runs(&places) {
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
    pub(crate) fn residency_by_tensor(&self, select: &Select<'_>) -> Result<Vec<(Place, Residency)>> {
        let places = self.catalog.select(select)?;
        let mut found = Vec::with_capacity(places.len());
        for places in places.chunk_by(|a, b| a.0 == b.0) {
            let shard = places[0].0;
            let parts: Vec<_> = places.iter().map(|&place| self.catalog.bytes(place)).collect();
            let answers = self.pages[shard].residency(&parts);
            let answers = answers.map_err(self.failed(shard, "asking about its pages"))?;
            found.extend(places.iter().copied().zip(answers));
        }
        Ok(found)
    }

    /// Gives back the pages that hold nothing but selected tensors.
    pub(crate) fn evict(&self, select: &Select<'_>) -> Result<Evicted> {
        let places = self.catalog.select(select)?;
        let mut work = Vec::new();
        let mut locked: Vec<Option<Vec<Range<usize>>>> = vec![None; self.pages.len()];
        for (shard, run) in self.catalog.runs(&places) {
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
                let inside =
                    |place: &&Place| place.0 == shard && self.touches(**place, &(locked.start..locked.end));
                let name = places.iter().find(inside).map_or("", |&place| self.catalog.name(place));
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

    fn touches(&self, place: Place, part: &Range<usize>) -> bool {
        let pages = self.pages[place.0].pages_of(&self.catalog.bytes(place));
        pages.start < part.end && part.start < pages.end
    }

    /// Locks what is selected: all of it or, where nothing was locked yet, nothing.
    pub(crate) fn lock(&self, select: &Select<'_>) -> Result<()> {
        let places = self.catalog.select(select)?;
        lock(&self.pages, &self.catalog.runs(&places), &places, self.locks)
    }

    /// Unlocks what is selected, but for pages that hold a part of a tensor that stays locked.
    pub(crate) fn unlock(&self, select: &Select<'_>) -> Result<()> {
        let places = self.catalog.select(select)?;
        let mut held = self.locks.held();
        for place in &places {
            held.remove(place);
        }
        let mut kept: Vec<Option<Vec<Range<usize>>>> = vec![None; self.pages.len()];
        for (shard, run) in self.catalog.runs(&places) {
            let mut part = self.pages[shard].pages_of(&run);
            let kept = kept[shard].get_or_insert_with(|| {
                // One of no bytes, which may lie within the run, has no page.
                let bytes = held.range((shard, 0)..(shard + 1, 0)).map(|&place| self.catalog.bytes(place));
                bytes
                    .filter(|bytes| !bytes.is_empty())
                    .map(|bytes| self.pages[shard].pages_of(&bytes))
                    .collect()
            });
            // Only neighbours can have a share, and only in the pages at the ends.
            let first = kept.partition_point(|pages| pages.end <= part.start);
            for pages in kept[first..].iter().take_while(|pages| pages.start < run.end) {
                if pages.start < part.end && part.start < pages.end {
                    if pages.start <= part.start {
                        part.start = pages.end.min(part.end);
                    } else {
                        part.end = pages.start;
                    }
                }
            }
            self.pages[shard].unlock(part).map_err(self.failed(shard, "unlocking its pages"))?;
        }
        Ok(())
    }
}

/// Locks runs, which are those of `places`.
pub(super) fn lock(
    pages: &[Pages],
    runs: &[(usize, Range<usize>)],
    places: &[Place],
    locks: &Locks,
) -> Result<()> {
    let mut held = locks.held();
    for (i, (shard, run)) in runs.iter().enumerate() {
        if let Err(error) = pages[*shard].lock(run.clone()) {
            // What was locked before must stay so, and may share pages with these.
            if held.is_empty() {
                for (shard, run) in &runs[..i] {
                    pages[*shard].unlock(run.clone()).ok();
                }
            }
            return Err(error);
        }
    }
    held.extend(places);
    Ok(())
}
