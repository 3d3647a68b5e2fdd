//! Rank views: a rank's part of a model, reading no more than that.
#![forbid(unsafe_code)]

mod plan;

pub use plan::{RankPlan, Split};

use crate::diff::Contents;
use crate::error::{Error, Result, printable, quote};
use crate::layout::Layout;
use crate::layout::{Position, Select};
use crate::map::{Backing, CHUNK, Mapping, RawSlice};
use crate::model::Model;
use crate::paging::Paging;
use crate::paging::unreadable;
use crate::tensor::TensorView;
use crate::work::each_in_parallel;
use plan::Cut;
use std::ops::Range;
use std::path::Path;

/// A part is mapped where its pages are at most a 20th more than its bytes; otherwise it is read.
const OVERHEAD: usize = 20;

/// Bytes that one thread reads at a time.
const JOB: usize = 1 << 20;

/// A rank's part of a model, made by [`Model::rank_view`]: each tensor where it lies in the file if its part is
/// contiguous there, otherwise read into the view's own memory, without the bytes between.
#[derive(Debug)]
pub struct RankView<'a> {
    /// The names, dtypes and shapes of the parts.
    layout: Layout,
    /// By their positions in `layout`.
    parts: Vec<Part<'a>>,
    memory: Mapping,
    sizes: Sizes,
}

#[derive(Debug, Clone)]
enum Part<'a> {
    Mapped(&'a [u8]),
    /// In `memory`.
    Gathered(Range<usize>),
}

/// What a rank's part comes to, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sizes {
    /// Of the tensors.
    pub(crate) asked: u64,
    /// Of mapped pages, and of what was read.
    pub(crate) touched: u64,
    /// Of memory that was read into.
    pub(crate) gathered: u64,
}

/// A rank's part of one tensor.
pub(crate) struct Piece {
    pub(crate) position: Position,
    pub(crate) cut: Cut,
    pub(crate) at: At,
}

/// Where it is.
pub(crate) enum At {
    /// In its shard's memory.
    Mapped(Range<usize>),
    /// In memory of the rank's own.
    Gathered(Range<usize>),
}

/// What a rank view of Rust or of Python is made of.
pub(crate) struct RankParts {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) memory: Mapping,
    pub(crate) sizes: Sizes,
}

impl Paging<'_> {
    /// Cuts, brings what is mapped, and reads the rest.
    pub(crate) fn rank_view(
        &self,
        contents: &Contents<'_>,
        rank: usize,
        world: usize,
        plan: &RankPlan<'_>,
    ) -> Result<RankParts> {
        if rank >= world {
            return Err(Error::Argument(format!("rank {rank} is not one of {world}")));
        }
        let positions = self.catalog.select(&Select::from(..))?;
        let unmatched: Vec<&str> = positions
            .iter()
            .map(|&position| self.catalog.name(position))
            .filter(|name| plan.split(name).is_none())
            .collect();
        if !unmatched.is_empty() {
            let some: Vec<String> = unmatched.iter().take(5).map(|name| quote(name)).collect();
            let more = if unmatched.len() > some.len() { ", …" } else { "" };
            return Err(Error::Argument(format!(
                "no rule of the plan matches {} of the {} tensors: {}{more}",
                unmatched.len(),
                positions.len(),
                some.join(", ")
            )));
        }
        let (mut pieces, mut sizes, mut end) =
            (Vec::with_capacity(positions.len()), Sizes::default(), 0usize);
        for position in positions {
            let Some(info) = self.catalog.shards()[position.0].layout.at(position.1) else { continue };
            let Some(split) = plan.split(info.name()) else { continue };
            let cut = Cut::new(info.name(), info.dtype(), info.shape(), split, rank, world)?;
            let pages = &self.pages[position.0];
            let start = info.bytes().start + cut.first;
            let part = start..start + cut.nbytes();
            let cost = if pages.is_of_a_file() { pages.pages_of(&part).len() } else { part.len() };
            let is_aligned = contents.memories[position.0].now().is_aligned(start, info.dtype().align());
            sizes.asked += cut.nbytes() as u64;
            let in_place = cut.count == 1 && is_aligned && !contents.copies.contains_key(&position);
            // What is edited in its file is never copied: writes to the copy would not reach it.
            let edited = contents.memories[position.0].backing() == Backing::Shared && cut.nbytes() > 0;
            if edited && !in_place {
                return Err(not_in_place(pages.path(), info.name(), is_aligned));
            }
            let is_mapped = in_place
                && cut.nbytes() > 0
                && (edited || cost.saturating_sub(part.len()) <= part.len() / OVERHEAD);
            let at = if is_mapped {
                sizes.touched += cost as u64;
                At::Mapped(part)
            } else {
                let start = end.next_multiple_of(64);
                end = start + cut.nbytes();
                sizes.gathered += cut.nbytes() as u64;
                At::Gathered(start..end)
            };
            pieces.push(Piece { position, cut, at });
        }
        let memory = Mapping::owned(end, 0);
        let mut memory = memory.map_err(Error::io(Path::new(""), "allocating memory for the rank"))?;
        self.bring(&pieces)?;
        sizes.touched += self.gather(contents, &pieces, &mut memory)?;
        Ok(RankParts { pieces, memory, sizes })
    }

    /// Brings what is mapped, and none of its neighbours: the first touch of a huge page would.
    fn bring(&self, pieces: &[Piece]) -> Result<()> {
        let mut work = Vec::new();
        for piece in pieces {
            let At::Mapped(part) = &piece.at else { continue };
            for chunk in part.start / CHUNK..part.end.div_ceil(CHUNK) {
                let part = part.start.max(chunk * CHUNK)..part.end.min((chunk + 1) * CHUNK);
                work.push((piece.position, part));
            }
        }
        each_in_parallel(work, |(position, part): (Position, Range<usize>)| {
            let pages = &self.pages[position.0];
            let unreadable = |error| unreadable(pages.path(), self.catalog.name(position), &error);
            pages.bring(part, true).map_err(unreadable)
        })
    }

    /// Reads what is not mapped to its position in `memory`; returns the bytes that took, in pages where they were
    /// mapped.
    fn gather(&self, contents: &Contents<'_>, pieces: &[Piece], memory: &mut Mapping) -> Result<u64> {
        let page = rustix::param::page_size();
        let (mut rest, mut at, mut touched) = (memory.as_bytes_mut(), 0, 0);
        let mut work: Vec<Job<'_>> = Vec::new();
        for piece in pieces {
            let At::Gathered(room) = &piece.at else { continue };
            if room.is_empty() {
                continue;
            }
            let (_, from_there) = std::mem::take(&mut rest).split_at_mut(room.start - at);
            let (mut to, behind) = from_there.split_at_mut(room.len());
            (rest, at) = (behind, room.end);
            let bytes = self.catalog.bytes(piece.position);
            let memory = contents.memories[piece.position.0];
            let pages = &self.pages[piece.position.0];
            let failed = Error::io(pages.path(), "asking which pages were edited");
            let is_edited = || memory.private(bytes.clone()).map(|found| !found.is_empty()).map_err(failed);
            let from = if let Some(&copy) = contents.copies.get(&piece.position) {
                Origin::Memory(copy)
            } else if !pages.is_of_a_file() {
                Origin::Memory(memory.now().part(bytes.clone()))
            } else if is_edited()? || pages.file().is_none() {
                Origin::Pages(memory.now().part(bytes.clone()), bytes.start)
            } else {
                Origin::File(bytes.start)
            };
            if matches!(from, Origin::Pages(..)) {
                let mut last = 0;
                for start in piece.cut.starts().map(|start| bytes.start + start) {
                    let (first, end) = ((start / page).max(last), (start + piece.cut.run).div_ceil(page));
                    touched += (end.saturating_sub(first) * page) as u64;
                    last = end.max(last);
                }
            } else {
                touched += to.len() as u64;
            }
            // A long run is cut, short ones are put together.
            let run = piece.cut.run;
            if piece.cut.count == 1 {
                for (i, to) in to.chunks_mut(JOB).enumerate() {
                    let starts = vec![piece.cut.first + i * JOB];
                    work.push(Job { position: piece.position, from, run: to.len(), starts, to });
                }
                continue;
            }
            let starts: Vec<usize> = piece.cut.starts().collect();
            for starts in starts.chunks((JOB / run).max(1)) {
                let (now, behind) = std::mem::take(&mut to).split_at_mut(starts.len() * run);
                to = behind;
                work.push(Job { position: piece.position, from, run, starts: starts.to_vec(), to: now });
            }
        }
        each_in_parallel(work, |Job { position, from, run, starts, to }: Job<'_>| {
            let pages = &self.pages[position.0];
            let failed = |error| unreadable(pages.path(), self.catalog.name(position), &error);
            match from {
                Origin::Memory(source) | Origin::Pages(source, _) => {
                    if let Origin::Pages(_, base) = from {
                        // What cannot be read is an error here; at a touch it would be SIGBUS.
                        let joined =
                            joined(starts.iter().map(|start| base + start..base + start + run), page);
                        joined.into_iter().try_for_each(|part| pages.bring(part, true)).map_err(failed)?;
                    }
                    for (start, to) in starts.iter().zip(to.chunks_mut(run)) {
                        source.copy_to(*start..start + run, to);
                    }
                    Ok(())
                }
                Origin::File(base) => {
                    let runs = starts.iter().map(|start| base + start).zip(to.chunks_mut(run)).collect();
                    pages.read(runs).map_err(failed)
                }
            }
        })?;
        Ok(touched)
    }
}

/// Why a rank's part of a tensor of a file that is edited is not handed out.
fn not_in_place(path: &Path, tensor: &str, is_aligned: bool) -> Error {
    let why = if is_aligned { "is many runs in the file" } else { "is misaligned in the file" };
    let (path, tensor) = (printable(&path.to_string_lossy()), quote(tensor));
    Error::Argument(format!(
        "{path}: the rank's part of tensor {tensor} {why}, and what is written to a copy of it would not reach the \
         file; open the model with mode \"r\" or \"c\""
    ))
}

/// Runs of one tensor, of the same length, to be read one behind the other.
struct Job<'a> {
    position: Position,
    from: Origin<'a>,
    run: usize,
    /// From the start of the tensor.
    starts: Vec<usize>,
    to: &'a mut [u8],
}

/// Where to read a tensor's bytes from.
#[derive(Clone, Copy)]
enum Origin<'a> {
    /// The tensor, in a copy's memory.
    Memory(RawSlice<'a>),
    /// The tensor, in pages of its file, and its start there.
    Pages(RawSlice<'a>, usize),
    /// Its start in the file.
    File(usize),
}

/// Ranges in order; what has no whole page between comes as one.
fn joined(ranges: impl Iterator<Item = Range<usize>>, page: usize) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start < last.end + page => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

impl Model {
    /// The part of `rank`, of `world` ranks, under a plan of tensor parallelism. Reads that part and hardly more: at
    /// most a 20th more in pages for a tensor whose part is contiguous in the file, which stays a view of it; exactly
    /// its bytes for any other. (The kernel reads whole pages from the disk all the same: a row split, alone on a
    /// machine, brings up to a page for each row. The ranks of a machine together read each page once.)
    ///
    /// # Errors
    /// [`Error::Argument`] where a tensor has no rule, lacks the axis, or does not divide; [`Error::Io`]; those of
    /// [`OpenOptions::guard`](crate::OpenOptions::guard) where that is on.
    pub fn rank_view(&self, rank: usize, world: usize, plan: &RankPlan<'_>) -> Result<RankView<'_>> {
        self.check()?;
        let RankParts { pieces, memory, sizes } =
            self.paging().rank_view(&self.contents(), rank, world, plan)?;
        // What was read was read of the files as they had been.
        self.check()?;
        let mut layout = Layout::builder();
        for piece in &pieces {
            let (shard, index) = piece.position;
            let Some(info) = self.catalog.shards()[shard].layout.at(index) else { continue };
            layout = layout.tensor(info.name(), info.dtype(), &piece.cut.shape);
        }
        let layout = layout.build()?;
        let mut parts = vec![Part::Gathered(0..0); layout.len()];
        for piece in pieces {
            let Some(position) = layout.position(self.catalog.name(piece.position)) else { continue };
            parts[position] = match piece.at {
                At::Mapped(part) => Part::Mapped(&self.mappings[piece.position.0].as_bytes()[part]),
                At::Gathered(part) => Part::Gathered(part),
            };
        }
        Ok(RankView { layout, parts, memory, sizes })
    }
}

impl RankView<'_> {
    fn view(&self, position: usize) -> Option<TensorView<'_>> {
        let data = match self.parts.get(position)? {
            Part::Mapped(data) => data,
            Part::Gathered(part) => &self.memory.as_bytes()[part.clone()],
        };
        Some(TensorView::new(self.layout.at(position)?, data))
    }

    /// Number of tensors: all of the model.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The rank's part of the tensor called `name`.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let view = self.layout.position(name).and_then(|position| self.view(position));
        view.ok_or_else(|| Error::Missing { path: "".into(), name: name.into(), hint: String::new() })
    }

    /// The rank's part of every tensor; what [`save`](crate::save()) takes.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        (0..self.len()).filter_map(|position| self.view(position))
    }

    /// Bytes of all its tensors.
    pub fn nbytes(&self) -> u64 {
        self.sizes.asked
    }

    /// Bytes that were touched for them: pages of what is mapped, and exactly what was read of the rest.
    pub fn touched(&self) -> u64 {
        self.sizes.touched
    }

    /// Bytes that were read into the view's own memory; the rest are the file's pages.
    pub fn gathered(&self) -> u64 {
        self.sizes.gathered
    }
}
