//! Which elements of tensors differ between then and now: bit by bit, in parallel.
//!
//! Comparing is bytewise (a NaN's payload and the sign of zero count) in blocks of the checksum's size, and
//! both sides are copied to a small buffer first: memory that Python may be writing is never borrowed.

use super::digest::{self, BLOCK};
use crate::map::{self, RawSlice};
use crate::work;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Bytes that were kept when the rest was not: at a file offset.
pub(crate) struct Patch {
    pub(crate) at: usize,
    pub(crate) bytes: Vec<u8>,
}

/// A tensor's bytes: those of a memory, with patches over them.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a> {
    pub(crate) source: RawSlice<'a>,
    /// Where the tensor starts in the file that patches count from.
    pub(crate) at: usize,
    /// In order, apart.
    pub(crate) patches: &'a [Patch],
}

impl<'a> From<RawSlice<'a>> for Bytes<'a> {
    fn from(source: RawSlice<'a>) -> Self {
        Self { source, at: 0, patches: &[] }
    }
}

impl Bytes<'_> {
    /// Copies a part.
    fn copy_to(&self, part: Range<usize>, to: &mut [u8]) {
        self.source.copy_to(part.clone(), to);
        let wanted = self.at + part.start..self.at + part.end;
        let first = self.patches.partition_point(|patch| patch.at + patch.bytes.len() <= wanted.start);
        for patch in self.patches[first..].iter().take_while(|patch| patch.at < wanted.end) {
            let (from, until) = (patch.at.max(wanted.start), (patch.at + patch.bytes.len()).min(wanted.end));
            to[from - wanted.start..until - wanted.start]
                .copy_from_slice(&patch.bytes[from - patch.at..until - patch.at]);
        }
    }
}

/// One tensor, now and before.
pub(crate) struct Pair<'a> {
    pub(crate) now: Bytes<'a>,
    pub(crate) before: Bytes<'a>,
    /// Blocks that may differ: in order, apart.
    pub(crate) blocks: Vec<Range<usize>>,
    /// Bytes of an element; 1 where elements are packed.
    pub(crate) unit: usize,
}

impl Pair<'_> {
    /// Every block of a tensor of so many bytes.
    pub(crate) fn all_blocks(nbytes: usize) -> Vec<Range<usize>> {
        if nbytes == 0 { Vec::new() } else { std::iter::once(0..nbytes.div_ceil(BLOCK)).collect() }
    }
}

/// Which elements of a tensor differ.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Bytes of an element.
    unit: usize,
    /// The blocks that differ, in order.
    blocks: Vec<usize>,
    /// A bit for each element of those blocks, in as many words for each.
    // INVARIANT: blocks.len() * words_per_block(unit) words.
    words: Vec<u64>,
    /// Elements that differ.
    pub(crate) elements: usize,
    /// What the tensor's checksum changed by, modulo 2^128; 0 where it was not asked for.
    pub(crate) shift: u128,
}

fn words_per_block(unit: usize) -> usize {
    BLOCK / unit / 64
}

impl Difference {
    pub(crate) fn is_empty(&self) -> bool {
        self.elements == 0
    }

    pub(crate) fn unit(&self) -> usize {
        self.unit
    }

    pub(crate) fn bytes(&self) -> usize {
        self.elements * self.unit
    }

    /// Every run of elements that differ, in order, each as long as can be.
    pub(crate) fn each_run(&self, mut visit: impl FnMut(Range<usize>)) {
        let per_block = words_per_block(self.unit.max(1));
        let mut open: Option<Range<usize>> = None;
        for (block, words) in self.blocks.iter().zip(self.words.chunks_exact(per_block)) {
            for (w, &word) in words.iter().enumerate() {
                let base = (block * per_block + w) * 64;
                let mut rest = word;
                while rest != 0 {
                    let start = rest.trailing_zeros();
                    let end = start + (rest >> start).trailing_ones();
                    rest = u64::MAX.checked_shl(end).map_or(0, |mask| rest & mask);
                    let found = base + start as usize..base + end as usize;
                    match &mut open {
                        Some(run) if run.end == found.start => run.end = found.end,
                        _ => {
                            if let Some(run) = open.replace(found) {
                                visit(run);
                            }
                        }
                    }
                }
            }
        }
        if let Some(run) = open {
            visit(run);
        }
    }

    /// Pages that hold a byte of any element that differs, of a tensor that starts at a file offset.
    pub(crate) fn pages(&self, offset: u64) -> Vec<Range<usize>> {
        let page = rustix::param::page_size();
        let mut pages: Vec<Range<usize>> = Vec::new();
        let offset = usize::try_from(offset).unwrap_or_default();
        self.each_run(|run| {
            let first = (offset + run.start * self.unit) / page;
            let end = (offset + run.end * self.unit).div_ceil(page);
            match pages.last_mut() {
                Some(last) if last.end >= first => last.end = last.end.max(end),
                _ => pages.push(first..end),
            }
        });
        pages
    }

    fn append(&mut self, part: Self) {
        self.unit = part.unit;
        self.blocks.extend(part.blocks);
        self.words.extend(part.words);
        self.elements += part.elements;
        self.shift = self.shift.wrapping_add(part.shift);
    }
}

/// Compares every pair; `hash` also tells what its checksum changes by.
pub(crate) fn compare(pairs: &[Pair<'_>], hash: bool) -> Vec<Difference> {
    /// Blocks in a job.
    const MOST: usize = map::CHUNK / BLOCK;
    let mut jobs: Vec<(usize, Vec<Range<usize>>)> = Vec::new();
    for (p, pair) in pairs.iter().enumerate() {
        let mut room = 0;
        for range in &pair.blocks {
            let mut start = range.start;
            while start < range.end {
                if room == 0 {
                    jobs.push((p, Vec::new()));
                    room = MOST;
                }
                let end = range.end.min(start + room);
                jobs.last_mut().into_iter().for_each(|(_, ranges)| ranges.push(start..end));
                room -= end - start;
                start = end;
            }
        }
    }
    let parts = Mutex::new(Vec::with_capacity(jobs.len()));
    let done = work::each_in_parallel(jobs, |(p, ranges): (usize, Vec<Range<usize>>)| {
        if work::cancel::is_canceled() {
            return Ok(());
        }
        let part = pairs[p].job(&ranges, hash);
        if !part.is_empty() {
            parts.lock().unwrap_or_else(PoisonError::into_inner).push((p, part));
        }
        Ok::<(), ()>(())
    });
    debug_assert!(done.is_ok());
    let mut parts = parts.into_inner().unwrap_or_else(PoisonError::into_inner);
    parts.sort_unstable_by_key(|(p, part)| (*p, part.blocks.first().copied()));
    let mut found = vec![Difference::default(); pairs.len()];
    for (p, part) in parts {
        found[p].append(part);
    }
    found
}

impl Pair<'_> {
    /// Compares some blocks.
    fn job(&self, ranges: &[Range<usize>], hash: bool) -> Difference {
        /// Blocks copied at once: both sides stay in the nearest caches.
        const STEP: usize = 8;
        let mut found = Difference { unit: self.unit, ..Difference::default() };
        let (mut now, mut before) = (vec![0; STEP * BLOCK], vec![0; STEP * BLOCK]);
        let nbytes = self.now.source.len();
        for range in ranges {
            for first in range.clone().step_by(STEP) {
                let part = first * BLOCK..(range.end.min(first + STEP) * BLOCK).min(nbytes);
                let (now, before) = (&mut now[..part.len()], &mut before[..part.len()]);
                self.now.copy_to(part.clone(), now);
                self.before.copy_to(part, before);
                if now == before {
                    continue;
                }
                for (number, (now, before)) in (first..).zip(now.chunks(BLOCK).zip(before.chunks(BLOCK))) {
                    if now == before {
                        continue;
                    }
                    found.blocks.push(number);
                    found.elements += match self.unit {
                        1 => differing::<1>(now, before, &mut found.words),
                        2 => differing::<2>(now, before, &mut found.words),
                        4 => differing::<4>(now, before, &mut found.words),
                        _ => differing::<8>(now, before, &mut found.words),
                    };
                    if hash {
                        let change = digest::block(number, now).wrapping_sub(digest::block(number, before));
                        found.shift = found.shift.wrapping_add(change);
                    }
                }
            }
        }
        found
    }
}

/// Adds a block's words, with a bit set for each element that differs, and counts them.
fn differing<const UNIT: usize>(now: &[u8], before: &[u8], words: &mut Vec<u64>) -> usize {
    let end = words.len() + words_per_block(UNIT);
    let mut elements = 0;
    for (now, before) in now.chunks(64 * UNIT).zip(before.chunks(64 * UNIT)) {
        let mut word = 0;
        if now != before {
            let (now, before) = (now.as_chunks::<UNIT>().0, before.as_chunks::<UNIT>().0);
            for (i, (now, before)) in now.iter().zip(before).enumerate() {
                word |= u64::from(now != before) << i;
            }
            elements += word.count_ones() as usize;
        }
        words.push(word);
    }
    // The last block of a tensor may be short.
    words.resize(end, 0);
    elements
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn runs_counts_pages_and_checksum_are_those_of_a_plain_comparison(
            unit in prop_oneof![Just(1usize), Just(2), Just(4), Just(8)],
            len in 0usize..20_000,
            edits in proptest::collection::vec((0usize..20_000, 1usize..200, 0u8..3), 0..40),
            patched in proptest::collection::vec((0usize..5, 0u8..4), 0..3),
            offset in 0u64..9000,
        ) {
            let before: Vec<u8> = (0..len * unit).map(|i| u8::try_from(i % 7).unwrap()).collect();
            let mut now = before.clone();
            for (at, n, value) in edits {
                for byte in now.iter_mut().skip(at * unit).take(n) {
                    *byte = value;
                }
            }
            // A patch over the bytes before: as if they had been so.
            let at = 1000;
            let mut shown = before.clone();
            let mut patches: Vec<Patch> = Vec::new();
            for (place, value) in patched {
                let start = at + place * 4096;
                if patches.last().is_none_or(|last| last.at + last.bytes.len() <= start) {
                    patches.push(Patch { at: start, bytes: vec![value; 4096] });
                    for byte in shown.iter_mut().skip(start - at).take(4096) {
                        *byte = value;
                    }
                }
            }
            let pair = Pair {
                now: RawSlice::from(&now[..]).into(),
                before: Bytes { source: RawSlice::from(&before[..]), at, patches: &patches },
                blocks: Pair::all_blocks(now.len()),
                unit,
            };
            let found = compare(&[pair], true).remove(0);
            let plain: Vec<usize> =
                (0..len).filter(|i| now[i * unit..(i + 1) * unit] != shown[i * unit..(i + 1) * unit]).collect();
            let mut listed = Vec::new();
            let mut last = None;
            found.each_run(|run| {
                assert!(run.start < run.end && last.is_none_or(|last| last < run.start), "as long as can be");
                last = Some(run.end);
                listed.extend(run);
            });
            prop_assert_eq!(&listed, &plain);
            prop_assert_eq!(found.elements, plain.len());
            let page = rustix::param::page_size();
            let offset_in = usize::try_from(offset).unwrap();
            let pages: std::collections::BTreeSet<usize> = plain
                .iter()
                .flat_map(|i| (offset_in + i * unit) / page..(offset_in + (i + 1) * unit).div_ceil(page))
                .collect();
            let told: usize = found.pages(offset).iter().map(ExactSizeIterator::len).sum();
            prop_assert_eq!(told, pages.len());
            let shift = digest::blocks(0, &now).wrapping_sub(digest::blocks(0, &shown));
            prop_assert_eq!(found.shift, shift);
        }
    }
}
