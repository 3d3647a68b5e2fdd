//! Which chunks of its files a stream of tensors needs, when, and until when: pure arithmetic.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

/// A reader asks [`Schedule::next`] what to do; the consumer says [`Schedule::pass`] when it is done with a tensor.
///
/// Tensors come in a given order; each needs a range of chunks, which have numbers over all files. A chunk that is
/// held counts against the limit. What tensors between the consumer and the reader need is held; a chunk that only
/// tensors further ahead need stays while there is room, the one that is needed last being the first to go.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// What each tensor needs, in the order of the stream.
    needs: Vec<Range<usize>>,
    /// For each chunk, the tensors that need it, in order.
    uses: HashMap<usize, Vec<usize>>,
    /// Most chunks to hold.
    limit: usize,
    /// The first tensor that the consumer is not done with.
    current: usize,
    /// The tensor that the reader is at, and how many of its chunks it has seen to.
    ahead: (usize, usize),
    /// Chunks that tensors from `current` to `ahead` need, and how many of those do.
    needed: HashMap<usize, usize>,
    /// Chunks that are held for tensors further ahead, by the next one.
    spare: BTreeSet<(usize, usize)>,
}

/// What a reader is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Bring a chunk.
    Bring(usize),
    /// Drop a chunk, which will be brought again.
    Drop(usize),
    /// Nothing, until a tensor is passed.
    Wait,
    /// Nothing more.
    Done,
}

impl Schedule {
    /// For tensors that need these chunks, holding at most `limit` chunks, and one at least.
    pub(crate) fn new(needs: Vec<Range<usize>>, limit: usize) -> Self {
        let mut uses: HashMap<usize, Vec<usize>> = HashMap::new();
        for (tensor, chunks) in needs.iter().enumerate() {
            for chunk in chunks.clone() {
                uses.entry(chunk).or_default().push(tensor);
            }
        }
        Self {
            needs,
            uses,
            limit: limit.max(1),
            current: 0,
            ahead: (0, 0),
            needed: HashMap::new(),
            spare: BTreeSet::new(),
        }
    }

    /// The first tensor that uses a chunk from `tensor` on.
    fn next_use(&self, chunk: usize, tensor: usize) -> Option<usize> {
        let uses = self.uses.get(&chunk)?;
        uses.get(uses.partition_point(|&user| user < tensor)).copied()
    }

    /// Chunks that are held.
    pub(crate) fn held(&self) -> usize {
        self.needed.len() + self.spare.len()
    }

    /// How many tensors the consumer is done with.
    pub(crate) fn passed(&self) -> usize {
        self.current
    }

    /// How many of a tensor's chunks are brought ahead: of one larger than the limit its first.
    fn brought(&self, tensor: usize) -> usize {
        self.needs[tensor].len().min(self.limit)
    }

    /// What is to be done next; it counts as done.
    pub(crate) fn next(&mut self) -> Step {
        loop {
            let (tensor, seen) = self.ahead;
            if tensor >= self.needs.len() {
                return Step::Done;
            }
            if seen == self.brought(tensor) {
                self.ahead = (tensor + 1, 0);
                continue;
            }
            let chunk = self.needs[tensor].start + seen;
            let is_spare = self.spare.remove(&(tensor, chunk));
            if is_spare || self.needed.contains_key(&chunk) {
                *self.needed.entry(chunk).or_default() += 1;
                self.ahead.1 += 1;
                continue;
            }
            if self.held() < self.limit {
                self.needed.insert(chunk, 1);
                self.ahead.1 += 1;
                return Step::Bring(chunk);
            }
            return match self.spare.pop_last() {
                Some((_, chunk)) => Step::Drop(chunk),
                None => Step::Wait,
            };
        }
    }

    /// The chunks that are brought ahead for a tensor; `None` as long as the reader has not seen to them all.
    pub(crate) fn chunks(&self, tensor: usize) -> Option<Range<usize>> {
        let brought = self.brought(tensor);
        let seen = tensor < self.ahead.0 || (tensor == self.ahead.0 && self.ahead.1 == brought);
        let start = self.needs[tensor].start;
        seen.then_some(start..start + brought)
    }

    /// The consumer is done with its tensor; returns the chunks to drop.
    pub(crate) fn pass(&mut self) -> Vec<usize> {
        let tensor = self.current;
        let Some(chunks) = self.needs.get(tensor).cloned() else { return Vec::new() };
        let seen = match self.ahead {
            (ahead, seen) if ahead == tensor => {
                self.ahead = (tensor + 1, 0);
                seen
            }
            _ => self.brought(tensor),
        };
        self.current += 1;
        let mut drop = Vec::new();
        for (i, chunk) in chunks.enumerate() {
            if i < seen {
                if let Some(users) = self.needed.get_mut(&chunk) {
                    *users -= 1;
                    if *users > 0 {
                        continue;
                    }
                    self.needed.remove(&chunk);
                }
                // Held further, if the consumer has to do with it again.
                match self.next_use(chunk, self.current) {
                    Some(next) => {
                        self.spare.insert((next, chunk));
                    }
                    None => drop.push(chunk),
                }
            } else if !self.needed.contains_key(&chunk) {
                // Touched by the consumer, not brought: a tensor larger than the limit.
                self.spare.remove(&(tensor, chunk));
                drop.push(chunk);
            }
        }
        drop
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn neighbours_share_their_chunk_and_it_is_dropped_behind_the_last() {
        let mut schedule = Schedule::new(vec![0..2, 1..3, 2..3, 5..6], 3);
        assert_eq!(
            [(); 4].map(|()| schedule.next()),
            [Step::Bring(0), Step::Bring(1), Step::Bring(2), Step::Wait]
        );
        assert_eq!(schedule.pass(), [0]);
        assert_eq!([(); 2].map(|()| schedule.next()), [Step::Bring(5), Step::Done]);
        assert_eq!(schedule.pass(), [1]);
        assert_eq!(schedule.pass(), [2]);
        assert_eq!(schedule.pass(), [5]);
        assert_eq!(schedule.held(), 0);
    }

    #[test]
    fn a_tensor_larger_than_the_limit_passes_and_leaves_nothing() {
        let mut schedule = Schedule::new(vec![0..10, 10..11], 4);
        assert_eq!([(); 5].map(|()| schedule.next())[4], Step::Wait);
        assert_eq!(schedule.chunks(0), Some(0..4));
        assert_eq!(schedule.pass(), (0..10).collect::<Vec<_>>());
        assert_eq!(schedule.next(), Step::Bring(10));
    }

    #[test]
    fn what_is_needed_last_makes_room_first() {
        let mut schedule = Schedule::new(vec![0..1, 1..2, 2..3, 1..2, 0..1], 2);
        assert_eq!([(); 3].map(|()| schedule.next()), [Step::Bring(0), Step::Bring(1), Step::Wait]);
        assert!(schedule.pass().is_empty() && schedule.pass().is_empty());
        assert_eq!([(); 2].map(|()| schedule.next()), [Step::Drop(0), Step::Bring(2)]);
    }

    proptest! {
        /// Whatever the order and however reader and consumer take turns: every tensor comes, with its chunks held
        /// and no more than the limit of them, and in the end nothing is left.
        #[test]
        fn every_tensor_passes_within_the_limit(
            needs in prop::collection::vec((0usize..12, 0usize..6), 0..25),
            limit in 1usize..8,
            turns in prop::collection::vec(any::<bool>(), 200),
        ) {
            let needs: Vec<_> = needs.into_iter().map(|(start, len)| start..start + len).collect();
            let mut schedule = Schedule::new(needs.clone(), limit);
            let mut held = HashSet::new();
            let (mut passed, mut turns) = (0, turns.into_iter());
            while passed < needs.len() {
                if turns.next() == Some(true) && let Some(chunks) = schedule.chunks(passed) {
                    prop_assert_eq!(chunks.len(), needs[passed].len().min(limit));
                    for chunk in chunks {
                        prop_assert!(held.contains(&chunk), "{} of tensor {}", chunk, passed);
                    }
                    for chunk in schedule.pass() {
                        prop_assert!(held.remove(&chunk) || needs[passed].len() > limit);
                    }
                    passed += 1;
                    continue;
                }
                match schedule.next() {
                    Step::Bring(chunk) => prop_assert!(held.insert(chunk)),
                    Step::Drop(chunk) => prop_assert!(held.remove(&chunk)),
                    Step::Wait | Step::Done => prop_assert!(schedule.chunks(passed).is_some()),
                }
                prop_assert!(held.len() <= limit && held.len() == schedule.held());
            }
            prop_assert!(held.is_empty() && schedule.held() == 0);
        }
    }
}
