//! The bytes of a model's tensors, in whatever memory: what is compared, hashed, and written.

use super::changes::{Change, Changes};
use super::compare::{Bytes, Difference, Pair, Patch, compare};
use super::digest::{self, BLOCK};
use crate::error::{Error, Result};
use crate::layout::Catalog;
use crate::layout::TensorInfo;
use crate::map::{self, Backing, Memory, RawSlice};
use crate::work;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// A model as it is in memory: Rust's or Python's.
pub(crate) struct Contents<'a> {
    pub(crate) catalog: &'a Catalog,
    /// One for each shard.
    pub(crate) memories: Vec<&'a dyn Memory>,
    /// Tensors that are served from elsewhere, by shard and position: Python's aligned copies.
    pub(crate) copies: HashMap<(usize, usize), RawSlice<'a>>,
    /// What to compare with in place of the files, if anything.
    pub(crate) marks: Option<&'a Marks>,
}

/// The content that was this process's own when it was marked.
#[derive(Default)]
pub(crate) struct Marks {
    /// For each shard, its private pages.
    patches: Vec<Vec<Patch>>,
    copies: HashMap<(usize, usize), Vec<u8>>,
}

impl std::fmt::Debug for Marks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Marks").finish_non_exhaustive()
    }
}

/// Two states of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Span {
    /// From the last mark, or the files where there is none, to now.
    SinceMark,
    /// From the files to now.
    SinceFile,
    /// From the files to the last mark.
    UntilMark,
}

/// What differs in one tensor.
pub(crate) struct Found<'a> {
    pub(crate) shard: usize,
    /// The tensor's position in it.
    pub(crate) index: usize,
    pub(crate) info: TensorInfo<'a>,
    /// The tensor's position among all of the model, in file order.
    pub(crate) position: usize,
    /// Where in a page the shard's first byte lies.
    pub(crate) in_page: usize,
    pub(crate) difference: Difference,
}

impl<'a> Contents<'a> {
    /// A tensor's bytes now.
    pub(crate) fn now(&self, shard: usize, index: usize, info: &TensorInfo<'_>) -> RawSlice<'a> {
        match self.copies.get(&(shard, index)) {
            Some(copy) => *copy,
            None => self.memories[shard].now().part(info.bytes()),
        }
    }

    /// Every tensor's shard, position in it, and info, in file order.
    pub(crate) fn infos(&self) -> impl Iterator<Item = (usize, usize, TensorInfo<'a>)> {
        let catalog = self.catalog;
        let shards = catalog.shards().iter().enumerate();
        shards.flat_map(|(s, shard)| shard.layout.iter().enumerate().map(move |(i, info)| (s, i, info)))
    }

    fn path(&self, shard: usize) -> &'a Path {
        self.catalog.shards().get(shard).map_or(Path::new(""), |shard| &shard.path)
    }

    /// What differs between two states, and the pages that are this process's own.
    ///
    /// # Errors
    /// [`Error::Argument`] where nothing is left to compare with, [`Error::Io`].
    pub(crate) fn differences(&self, span: Span, hash: bool) -> Result<(Vec<Found<'a>>, usize)> {
        let none = Marks::default();
        let marks = self.marks.unwrap_or(&none);
        let page = rustix::param::page_size();
        let (mut pairs, mut positions, mut private) = (Vec::new(), Vec::new(), 0);
        let mut position = 0;
        for (s, (shard, memory)) in self.catalog.shards().iter().zip(&self.memories).enumerate() {
            let first_position = position;
            position += shard.layout.len();
            let base =
                base_of(*memory).ok_or_else(|| nothing_to_compare_with(&shard.path, memory.backing()))?;
            let patches: &[Patch] = marks.patches.get(s).map_or(&[], Vec::as_slice);
            let runs = if span == Span::UntilMark {
                patches.iter().map(|patch| patch.at..patch.at + patch.bytes.len()).collect()
            } else {
                let data = shard.layout.data_range();
                memory.private(data).map_err(Error::io(&shard.path, "asking about its pages"))?
            };
            private += runs.iter().map(|run| run.len().div_ceil(page)).sum::<usize>();
            if memory.backing() == Backing::ReadOnly && runs.is_empty() {
                continue;
            }
            for (i, info) in shard.layout.iter().enumerate() {
                let range = info.bytes();
                let copy = self.copies.get(&(s, i));
                let marked = marks.copies.get(&(s, i));
                let blocks = match (copy, marked) {
                    (None, None) => blocks_of(&runs, &range),
                    _ => Pair::all_blocks(range.len()),
                };
                if blocks.is_empty() {
                    continue;
                }
                let of = |source: RawSlice<'a>, patches| Bytes { source, at: range.start, patches };
                let file = of(base.part(range.clone()), &[]);
                let mark = match marked {
                    Some(bytes) => Bytes::from(RawSlice::from(&bytes[..])),
                    None => Bytes { patches, ..file },
                };
                let now = of(self.now(s, i, &info), &[]);
                let (now, before) = match span {
                    Span::SinceMark => (now, mark),
                    Span::SinceFile => (now, file),
                    Span::UntilMark => (mark, file),
                };
                pairs.push(Pair { now, before, blocks, unit: info.dtype().itemsize().unwrap_or(1) });
                positions.push((s, i, info, first_position + i, memory.in_page()));
            }
        }
        let found = compare(&pairs, hash).into_iter().zip(positions);
        let found = found.filter(|(difference, _)| !difference.is_empty()).map(
            |(difference, (shard, index, info, position, in_page))| Found {
                shard,
                index,
                info,
                position,
                in_page,
                difference,
            },
        );
        Ok((found.collect(), private))
    }

    /// What changed since the last mark, or opening.
    pub(crate) fn changes(&self) -> Result<Changes> {
        let (found, private) = self.differences(Span::SinceMark, false)?;
        let changes = found.iter().map(Found::change).collect();
        Ok(Changes::new(changes, private))
    }

    /// Keeps what is this process's own now, to compare with later. A mark before is forgotten.
    pub(crate) fn mark(&self) -> Result<Marks> {
        let mut marks = Marks::default();
        for (shard, memory) in self.catalog.shards().iter().zip(&self.memories) {
            if base_of(*memory).is_none() {
                return Err(nothing_to_compare_with(&shard.path, memory.backing()));
            }
            let runs = memory.private(shard.layout.data_range());
            let runs = runs.map_err(Error::io(&shard.path, "asking about its pages"))?;
            let patch = |run: Range<usize>| Patch { at: run.start, bytes: kept(memory.now().part(run)) };
            marks.patches.push(runs.into_iter().map(patch).collect());
        }
        marks.copies = self.copies.iter().map(|(&position, source)| (position, kept(*source))).collect();
        Ok(marks)
    }

    /// The checksum of every tensor, in file order, as they are in one state: the files', the mark's, or
    /// now. What the files themselves state is believed; [`super::Model::verify`] is there to doubt it.
    pub(crate) fn sums(&self, until: Until) -> Result<Vec<u128>> {
        // Memory without a file may have been written by anyone.
        if self.memories.iter().any(|memory| memory.base().is_none()) {
            return self.hashed(|s, i, info| self.now(s, i, info));
        }
        let mut sums = self.file_sums()?;
        let span = match until {
            Until::Mark if self.marks.is_none() => return Ok(sums),
            Until::Mark => Span::UntilMark,
            Until::Now => Span::SinceFile,
        };
        for found in self.differences(span, true)?.0 {
            sums[found.position] = sums[found.position].wrapping_add(found.difference.shift);
        }
        Ok(sums)
    }

    /// The checksum of every tensor in the files: stated there, or computed once.
    fn file_sums(&self) -> Result<Vec<u128>> {
        if let Some(sums) = self.catalog.known_sums() {
            return Ok(sums.clone());
        }
        let bases: Option<Vec<RawSlice<'a>>> = self.memories.iter().map(|memory| memory.base()).collect();
        let bases = bases.ok_or_else(|| nothing_to_compare_with(self.path(0), Backing::Owned))?;
        let sums = self.hashed(|s, _, info| bases[s].part(info.bytes()))?;
        Ok(self.catalog.keep_sums(sums).clone())
    }

    /// The checksum of every tensor, computed from these bytes.
    pub(crate) fn hashed(
        &self,
        of: impl Fn(usize, usize, &TensorInfo<'a>) -> RawSlice<'a>,
    ) -> Result<Vec<u128>> {
        let sources: Vec<RawSlice<'a>> = self.infos().map(|(s, i, info)| of(s, i, &info)).collect();
        let lens: Vec<usize> = sources.iter().map(RawSlice::len).collect();
        hash_all(&lens, |tensor, part, to| {
            sources[tensor].copy_to(part, to);
            Ok(())
        })
        .map_err(Error::io(self.path(0), "reading it"))
    }

    /// The identity of what these checksums are of.
    pub(crate) fn id(&self, sums: &[u128]) -> u128 {
        digest::content_id(self.infos().map(|(_, _, info)| info).zip(sums.iter().copied()))
    }
}

/// A state of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// The files' where there is no mark.
    Mark,
    Now,
}

impl Found<'_> {
    pub(crate) fn change(&self) -> Change {
        let pages = self.difference.pages(self.in_page as u64 + self.info.offset());
        Change {
            name: self.info.name().into(),
            elements: self.difference.elements,
            bytes: self.difference.bytes(),
            pages: pages.iter().map(ExactSizeIterator::len).sum(),
            nbytes: self.info.nbytes(),
        }
    }
}

/// The checksums of tensors of these lengths, whose parts `read` copies out, in parallel.
pub(crate) fn hash_all(
    lens: &[usize],
    read: impl Fn(usize, Range<usize>, &mut [u8]) -> std::io::Result<()> + Sync,
) -> std::io::Result<Vec<u128>> {
    /// Bytes copied at once: they stay in the nearest caches until they are hashed.
    const STEP: usize = 16 * BLOCK;
    let jobs = lens.iter().enumerate().flat_map(|(tensor, &len)| {
        (0..len).step_by(map::CHUNK).map(move |start| (tensor, start..len.min(start + map::CHUNK)))
    });
    let sums = Mutex::new(vec![0u128; lens.len()]);
    work::each_in_parallel(jobs.collect(), |(tensor, range): (usize, Range<usize>)| {
        work::cancel::check()?;
        let mut bytes = vec![0; STEP.min(range.len())];
        let mut sum = 0u128;
        for start in range.clone().step_by(STEP) {
            let part = start..range.end.min(start + STEP);
            let bytes = &mut bytes[..part.len()];
            read(tensor, part, bytes)?;
            sum = sum.wrapping_add(digest::blocks(start / BLOCK, bytes));
        }
        let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums[tensor] = sums[tensor].wrapping_add(sum);
        Ok::<_, std::io::Error>(())
    })?;
    Ok(sums.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The blocks of a tensor that lie in some of these runs, both in bytes of the file.
fn blocks_of(runs: &[Range<usize>], tensor: &Range<usize>) -> Vec<Range<usize>> {
    let mut blocks: Vec<Range<usize>> = Vec::new();
    let first = runs.partition_point(|run| run.end <= tensor.start);
    for run in runs[first..].iter().take_while(|run| run.start < tensor.end) {
        let start = (run.start.max(tensor.start) - tensor.start) / BLOCK;
        let end = (run.end.min(tensor.end) - tensor.start).div_ceil(BLOCK);
        match blocks.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ => blocks.push(start..end),
        }
    }
    blocks
}

/// The bytes that a private mapping of a file is compared with: the file's.
fn base_of(memory: &dyn Memory) -> Option<RawSlice<'_>> {
    memory.base().filter(|_| matches!(memory.backing(), Backing::CopyOnWrite | Backing::ReadOnly))
}

fn kept(source: RawSlice<'_>) -> Vec<u8> {
    let mut bytes = vec![0; source.len()];
    source.copy_to(0..source.len(), &mut bytes);
    bytes
}

fn nothing_to_compare_with(path: &Path, backing: Backing) -> Error {
    let why = match backing {
        Backing::Shared => "it is edited in its file",
        _ => "it is in memory of its own (read, or made anew by a delta)",
    };
    Error::Argument(format!(
        "{}: what changed cannot be told: {why}, and nothing is left to compare with; open it mapped and copy-on-write",
        crate::error::printable(&path.to_string_lossy())
    ))
}
