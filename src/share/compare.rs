//! Which tensors differ: from what is published, and from one generation to another.
//!
//! A publisher reads the published bytes and does not map them, or it could never use a segment again. A reader has
//! both generations mapped.

use super::publisher::Publisher;
use super::segment::{self, Opened};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::map::{self, RawSlice};
use crate::model::Model;
use crate::save::SaveTensor;
use crate::work;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// A tensor as it is now, to be held against what is published.
#[derive(Clone, Copy)]
pub(crate) struct Candidate<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: DType,
    pub(crate) shape: &'a [usize],
    /// `None` if they do not lie in one piece: it counts as another.
    pub(crate) bytes: Option<RawSlice<'a>>,
}

impl<'a> Candidate<'a> {
    pub(super) fn of(name: &'a str, tensor: &'a impl SaveTensor, bytes: RawSlice<'a>) -> Self {
        Self { name, dtype: tensor.dtype(), shape: tensor.shape(), bytes: Some(bytes) }
    }
}

impl Publisher {
    /// Which of these are not as they are published, or not published.
    pub(crate) fn differing(&self, candidates: &[Candidate<'_>]) -> Result<Vec<bool>> {
        self.own()?;
        let published = self.published();
        let mut differ = vec![true; candidates.len()];
        let mut files: HashMap<usize, Opened> = HashMap::new();
        let mut alike = Vec::new();
        for (i, now) in candidates.iter().enumerate() {
            let (Some(bytes), Some(&(old, place))) = (now.bytes, published.get(now.name)) else { continue };
            let segment = &self.listed[old].segment;
            let Some(info) = segment.layout.at(place) else { continue };
            if (info.dtype(), info.shape()) != (now.dtype, now.shape) || info.nbytes() != bytes.len() as u64 {
                continue;
            }
            if let std::collections::hash_map::Entry::Vacant(slot) = files.entry(old) {
                slot.insert(segment::open(&self.store.dir, &self.store.path, segment.note.number)?);
            }
            alike.push((i, bytes, old, info.offset()));
        }
        let pairs: Vec<Published<'_>> = alike
            .iter()
            .filter_map(|(_, now, old, offset)| {
                let Opened { file, path, .. } = files.get(old)?;
                Some(Published { now: *now, file, path, offset: *offset })
            })
            .collect();
        for ((i, ..), found) in alike.iter().zip(differing(&pairs)?) {
            differ[*i] = found;
        }
        Ok(differ)
    }

    /// Whether the current generation has a tensor of this name, dtype and shape.
    pub(crate) fn has(&self, name: &str, dtype: DType, shape: &[usize]) -> bool {
        self.listed.iter().any(|listed| {
            let layout = &listed.segment.layout;
            let place = layout.position(name).filter(|place| listed.live.binary_search(place).is_ok());
            let found = place.and_then(|place| layout.at(place));
            found.is_some_and(|info| (info.dtype(), info.shape()) == (dtype, shape))
        })
    }

    /// Where each tensor of the current generation lies: which segment, which place in it.
    pub(super) fn published(&self) -> HashMap<&str, (usize, usize)> {
        let listed = self.listed.iter().enumerate();
        listed
            .flat_map(|(old, listed)| listed.tensors().map(move |(place, info)| (info.name(), (old, place))))
            .collect()
    }
}

/// Which of these tensors of a model are not the same in another: bytewise, and only up to the first difference.
pub(super) fn differing_from(before: &Model, after: &Model, names: &[&str]) -> Vec<bool> {
    let found: Vec<AtomicBool> = names.iter().map(|_| AtomicBool::new(false)).collect();
    let mut jobs = Vec::new();
    for (name, found) in names.iter().zip(&found) {
        match (before.get(name), after.get(name)) {
            (Ok(Some(old)), Ok(Some(new))) if (old.dtype(), old.shape()) == (new.dtype(), new.shape()) => {
                let pieces = old.as_bytes().chunks(map::CHUNK).zip(new.as_bytes().chunks(map::CHUNK));
                jobs.extend(pieces.map(|(old, new)| (old, new, found)));
            }
            _ => found.store(true, Ordering::Relaxed),
        }
    }
    let compare = |(old, new, found): (&[u8], &[u8], &AtomicBool)| {
        if !found.load(Ordering::Relaxed) && old != new {
            found.store(true, Ordering::Relaxed);
        }
        Ok::<_, std::convert::Infallible>(())
    };
    let Ok(()) = work::each_in_parallel(jobs, compare);
    found.into_iter().map(AtomicBool::into_inner).collect()
}

/// A tensor now, and its published bytes at an offset of a file.
struct Published<'a> {
    now: RawSlice<'a>,
    file: &'a File,
    path: &'a Path,
    offset: u64,
}

/// Compares all of them, in parallel: bytewise, a NaN's payload and the sign of zero included.
fn differing(pairs: &[Published<'_>]) -> Result<Vec<bool>> {
    /// Bytes compared at once: both sides stay in the nearest caches.
    const STEP: usize = 128 << 10;
    let found: Vec<AtomicBool> = pairs.iter().map(|_| AtomicBool::new(false)).collect();
    let jobs = pairs.iter().zip(&found).flat_map(|(pair, found)| {
        let len = pair.now.len();
        (0..len).step_by(map::CHUNK).map(move |start| (pair, found, start..len.min(start + map::CHUNK)))
    });
    work::each_in_parallel(jobs.collect(), |(pair, found, range): (&Published<'_>, &AtomicBool, _)| {
        let range: std::ops::Range<usize> = range;
        let (mut now, mut published) = (vec![0; STEP.min(range.len())], vec![0; STEP.min(range.len())]);
        for start in range.clone().step_by(STEP) {
            if found.load(Ordering::Relaxed) {
                break;
            }
            let part = start..range.end.min(start + STEP);
            let (now, published) = (&mut now[..part.len()], &mut published[..part.len()]);
            pair.now.copy_to(part, now);
            let read = pair.file.read_exact_at(published, pair.offset + start as u64);
            read.map_err(Error::io(pair.path, "reading what is published"))?;
            if now != published {
                found.store(true, Ordering::Relaxed);
            }
        }
        Ok::<_, Error>(())
    })?;
    Ok(found.into_iter().map(AtomicBool::into_inner).collect())
}
