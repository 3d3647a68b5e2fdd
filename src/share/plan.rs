//! What becomes of the old segments when a new one is published.
//!
//! A tensor that is published again leaves its old bytes behind in an older segment, which is immutable. When
//! those dead bytes get too many, or the segments do, some of the live tensors are carried: copied into one extra
//! segment, so that the segments they lay in are no longer listed. This is bounded for each publication, by as many
//! bytes as it publishes and a few MiB, so that none takes long; what is over that is carried with the next ones.
//! (A tensor larger than that goes alone, once dead bytes outweigh the live; and where segments get too many, the
//! smallest are carried in any case.)
//!
//! Listed are then at most 65 segments, of at most two and a half times the live bytes and 12 MiB: the test below
//! simulates thousands of generations of models that change in different ways.

use super::segment::Segment;
use crate::layout::Layout;
use std::collections::BTreeSet;

/// Dead bytes that are let be, and bytes that may be carried beside as many as are published.
const SLACK: u64 = 4 << 20;

/// Segments that a generation lists at most.
pub(super) const MOST: usize = 64;

/// Segments it is brought down to where that is cheap.
const FEW: usize = 48;

/// A segment that the publisher lists.
pub(super) struct Listed {
    pub(super) segment: Segment,
    /// The places in its layout of the tensors that live in it, in order.
    pub(super) live: Vec<usize>,
}

impl Listed {
    /// One whose tensors all live.
    pub(super) fn new(segment: Segment) -> Self {
        let live = (0..segment.layout.len()).collect();
        Self { segment, live }
    }

    /// The live ones.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (usize, crate::layout::TensorInfo<'_>)> {
        self.live.iter().filter_map(|&place| Some((place, self.segment.layout.at(place)?)))
    }
}

/// What becomes of them.
#[derive(Default)]
pub(super) struct Plan {
    /// For each segment, what still lives in it; where nothing does, it is not listed any more.
    pub(super) live: Vec<Vec<usize>>,
    /// For each segment, what is carried out of it.
    pub(super) carried: Vec<Vec<usize>>,
    /// Names that are not to live any more.
    pub(super) removed: BTreeSet<String>,
}

impl Plan {
    /// For a publication of these tensors; of the others only those stay that `keeps` says.
    pub(super) fn new(listed: &[Listed], published: &Layout, keeps: &dyn Fn(&str) -> bool) -> Self {
        let mut plan = Self { carried: vec![Vec::new(); listed.len()], ..Self::default() };
        for old in listed {
            let mut live = Vec::with_capacity(old.live.len());
            for (place, info) in old.tensors() {
                if published.position(info.name()).is_some() {
                    continue;
                }
                if keeps(info.name()) {
                    live.push(place);
                } else {
                    plan.removed.insert(info.name().to_owned());
                }
            }
            plan.live.push(live);
        }
        Budget::new(listed, &plan, published.data_len()).spend(listed, &mut plan);
        plan
    }

    /// Whether anything is carried.
    pub(super) fn carries(&self) -> bool {
        self.carried.iter().any(|carried| !carried.is_empty())
    }
}

/// What there is, and what may be carried.
struct Budget {
    /// Bytes of all segments that will be listed.
    total: u64,
    /// Bytes of all tensors.
    live: u64,
    /// Segments that will be listed, without the one that carries.
    segments: usize,
    left: u64,
    carried: bool,
}

impl Budget {
    fn new(listed: &[Listed], plan: &Plan, published: u64) -> Self {
        let used = |(_, live): &(&Listed, &Vec<usize>)| !live.is_empty();
        let old = || listed.iter().zip(&plan.live).filter(used);
        Self {
            total: published + old().map(|(old, _)| old.segment.layout.data_len()).sum::<u64>(),
            live: published + old().map(|(old, live)| bytes(old, live)).sum::<u64>(),
            segments: 1 + old().count(),
            left: published + SLACK,
            carried: false,
        }
    }

    /// More than half as many dead bytes as live ones.
    fn is_over(&self) -> bool {
        self.total > self.live + self.live / 2 + SLACK
    }

    /// More dead bytes than live ones: now also what is larger than the budget must go.
    fn is_far_over(&self) -> bool {
        self.total > 2 * self.live + 2 * SLACK
    }

    fn spend(&mut self, listed: &[Listed], plan: &mut Plan) {
        // First where the least must be carried for the most space.
        let mut order: Vec<usize> = (0..listed.len()).filter(|&s| !plan.live[s].is_empty()).collect();
        let share = |s: &usize| {
            let data = listed[*s].segment.layout.data_len().max(1);
            u128::from(bytes(&listed[*s], &plan.live[*s])) * (1 << 32) / u128::from(data)
        };
        order.sort_by_cached_key(share);
        for s in order {
            if !self.is_over() {
                break;
            }
            self.carry(&listed[s], &mut plan.live[s], &mut plan.carried[s], false);
        }
        let count = |budget: &Self| budget.segments + usize::from(budget.carried);
        let mut order: Vec<usize> = (0..listed.len()).filter(|&s| !plan.live[s].is_empty()).collect();
        order.sort_by_cached_key(|&s| bytes(&listed[s], &plan.live[s]));
        for s in order {
            let affordable = bytes(&listed[s], &plan.live[s]) <= self.left;
            // One place is for the segment that carries.
            if count(self) < FEW || (count(self) < MOST && !affordable) {
                break;
            }
            if !plan.carries() && count(self) < MOST {
                break;
            }
            self.carry(&listed[s], &mut plan.live[s], &mut plan.carried[s], true);
        }
    }

    /// Carries what lives in a segment: as much as the budget has, or all of it.
    fn carry(&mut self, old: &Listed, live: &mut Vec<usize>, carried: &mut Vec<usize>, whole: bool) {
        live.retain(|&place| {
            let nbytes = old.segment.layout.at(place).map_or(0, |info| info.nbytes());
            let forced = whole || (self.is_far_over() && !self.carried);
            if nbytes > self.left && !forced {
                return true;
            }
            self.left = self.left.saturating_sub(nbytes);
            self.total += nbytes;
            self.carried = true;
            carried.push(place);
            false
        });
        if live.is_empty() {
            self.total = self.total.saturating_sub(old.segment.layout.data_len());
            self.segments -= 1;
        }
    }
}

fn bytes(old: &Listed, live: &[usize]) -> u64 {
    live.iter().filter_map(|&place| old.segment.layout.at(place)).map(|info| info.nbytes()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::share::segment::Note;
    use std::collections::BTreeMap;

    const MIB: usize = 1 << 20;

    fn next(state: &mut u64) -> usize {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(*state >> 33).unwrap()
    }

    fn segment(layout: Layout, number: u64) -> Segment {
        Segment { layout, note: Note { number, generation: number, versions: BTreeMap::new(), head: None } }
    }

    /// Tensors of these sizes.
    fn layout(sizes: &[usize], which: impl IntoIterator<Item = usize>) -> Layout {
        let add = |layout: crate::layout::LayoutBuilder, i: usize| {
            layout.tensor(i.to_string(), DType::U8, &[sizes[i]])
        };
        which.into_iter().fold(Layout::builder(), add).build().unwrap()
    }

    /// Publishes parts again and again, without files. The most bytes of listed segments to bytes that live, beyond
    /// some slack; the most segments; the most that was carried beyond what was published.
    fn simulate(
        sizes: &[usize],
        generations: u64,
        mut pick: impl FnMut(&mut u64) -> Vec<usize>,
    ) -> (f64, usize, u64) {
        let mut state = 1;
        let mut listed = vec![Listed::new(segment(layout(sizes, 0..sizes.len()), 1))];
        let live: u64 = sizes.iter().map(|&size| size as u64).sum();
        let (mut ratio, mut most, mut carried_most) = (0f64, 0, 0);
        for number in 1..=generations {
            let mut which = pick(&mut state);
            which.sort_unstable();
            which.dedup();
            let published = layout(sizes, which);
            let mut plan = Plan::new(&listed, &published, &|_| true);
            let mut builder = Layout::builder();
            for (old, carried) in listed.iter().zip(&plan.carried) {
                for info in carried.iter().filter_map(|&place| old.segment.layout.at(place)) {
                    builder = builder.tensor(info.name(), info.dtype(), info.shape());
                }
            }
            let carried = builder.build().unwrap();
            carried_most = carried_most.max(carried.data_len().saturating_sub(published.data_len()));
            let old = std::mem::take(&mut listed);
            listed.push(Listed::new(segment(published, 2 * number + 1)));
            if !carried.is_empty() {
                listed.push(Listed::new(segment(carried, 2 * number)));
            }
            let kept =
                old.into_iter().zip(std::mem::take(&mut plan.live)).filter(|(_, live)| !live.is_empty());
            listed.extend(kept.map(|(old, live)| Listed { segment: old.segment, live }));
            // Each tensor lives once.
            let alive: u64 = listed.iter().flat_map(|old| old.tensors().map(|(_, info)| info.nbytes())).sum();
            assert_eq!(alive, live, "generation {number}");
            let total: u64 = listed.iter().map(|old| old.segment.layout.data_len()).sum();
            #[allow(clippy::cast_precision_loss)] // a ratio
            let now = total.saturating_sub(3 * SLACK) as f64 / live as f64;
            ratio = ratio.max(now);
            most = most.max(listed.len());
        }
        (ratio, most, carried_most)
    }

    #[test]
    fn segments_stay_few_and_dead_bytes_bounded_whatever_changes() {
        let even = vec![8 * MIB; 128];
        let mut state = 7;
        let mixed: Vec<usize> = (0..300).map(|_| 1 << (10 + next(&mut state) % 17)).collect();
        let mut one_huge = vec![64 << 10; 200];
        one_huge.push(1000 * MIB);
        let tiny = vec![4096; 2000];
        let some =
            |n: usize, of: usize| move |state: &mut u64| (0..n).map(|_| next(state) % of).collect::<Vec<_>>();
        // A tenth of the tensors takes nine of ten changes.
        let hot = |n: usize, of: usize| {
            move |state: &mut u64| {
                (0..n)
                    .map(|_| {
                        let most = if next(state).is_multiple_of(10) { of } else { of / 10 };
                        next(state) % most
                    })
                    .collect::<Vec<_>>()
            }
        };
        let mut turn = 0;
        let round = |of: usize| {
            move |_: &mut u64| {
                turn += 1;
                vec![turn % of]
            }
        };
        for (name, (ratio, segments, carried)) in [
            ("1 % of even", simulate(&even, 3000, some(1, 128))),
            ("10 % of even", simulate(&even, 3000, some(13, 128))),
            ("half of even", simulate(&even, 1000, some(64, 128))),
            ("each in turn", simulate(&even, 3000, round(128))),
            ("the same", simulate(&even, 1000, |_: &mut u64| vec![3])),
            ("mixed", simulate(&mixed, 3000, some(3, 300))),
            ("mixed, hot", simulate(&mixed, 3000, hot(10, 300))),
            ("one huge", simulate(&one_huge, 3000, some(3, 200))),
            ("one huge too", simulate(&one_huge, 3000, some(1, 201))),
            ("tiny", simulate(&tiny, 3000, some(1, 2000))),
            ("tiny, hot", simulate(&tiny, 3000, hot(20, 2000))),
        ] {
            println!(
                "{name:<14} {ratio:.2} of what lives, {segments} segments, carried {} MiB more than published",
                carried >> 20
            );
            assert!(ratio <= 2.5, "{name}: {ratio}");
            assert!(segments <= MOST + 1, "{name}: {segments}");
        }
    }
}
