//! What a disk may hold after a power loss.

use super::record::{Change, Disk, Log, SECTOR};
use std::collections::HashSet;
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// How many of the possible states are looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    /// With so many changes pending or fewer, every subset.
    pub(super) exhaustive: usize,
    /// With more: none, all, each alone, each missing, every prefix, and so many subsets drawn at random.
    pub(super) random: usize,
}

impl Budget {
    /// For every commit; `MAPTENSORS_CRASH_STATES=n` draws n subsets instead, and enumerates four times as far.
    pub(super) fn given() -> Self {
        match std::env::var("MAPTENSORS_CRASH_STATES").ok().and_then(|n| n.parse().ok()) {
            Some(random) => Self { exhaustive: 14, random },
            None => Self { exhaustive: 10, random: 400 },
        }
    }

    pub(super) fn is_long() -> bool {
        std::env::var_os("MAPTENSORS_CRASH_STATES").is_some()
    }

    /// Where states are looked at within states.
    pub(super) fn nested() -> Self {
        let Self { exhaustive, random } = Self::given();
        Self { exhaustive: exhaustive - 4, random: random / 8 }
    }
}

/// What a directory holds after a crash.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) files: Vec<(OsString, Vec<u8>)>,
    /// Differs where the content does.
    pub(super) hash: u64,
    /// The last generation that the caller was told is durable, if any.
    pub(super) saved: Option<u8>,
}

/// Calls `look` with every state that a crash during `log` may leave, each once.
pub(super) fn each_state(log: &Log, budget: Budget, mut look: impl FnMut(&State)) {
    let mut durable = log.start.clone();
    let mut pending: Vec<&Change> = Vec::new();
    let (mut saved, mut seen) = (None, HashSet::new());
    for end in 0..=log.changes.len() {
        for subset in subsets(pending.len(), budget, end as u64) {
            let chosen = pending.iter().zip(&subset).filter(|(_, kept)| **kept).map(|(change, _)| *change);
            let state = State::of(&durable, chosen, saved);
            if seen.insert((state.hash, saved)) {
                look(&state);
            }
        }
        let Some(change) = log.changes.get(end) else { break };
        match change {
            Change::Sync(id) => settle(&mut durable, &mut pending, |c| c.content_of() == Some(*id)),
            Change::SyncDir => settle(&mut durable, &mut pending, Change::is_name),
            Change::Saved(generation) => saved = Some(*generation),
            _ => pending.push(change),
        }
    }
}

/// Makes the pending changes that `synced` picks durable.
fn settle(durable: &mut Disk, pending: &mut Vec<&Change>, synced: impl Fn(&Change) -> bool) {
    pending.retain(|change| {
        let now = synced(change);
        if now {
            durable.apply(change);
        }
        !now
    });
}

/// Which of `count` pending changes made it: each item is one way.
fn subsets(count: usize, budget: Budget, seed: u64) -> Vec<Vec<bool>> {
    if count <= budget.exhaustive {
        return (0..1usize << count).map(|mask| (0..count).map(|i| mask >> i & 1 == 1).collect()).collect();
    }
    let mut sets = vec![vec![false; count], vec![true; count]];
    for i in 0..count {
        sets.push((0..count).map(|j| j == i).collect());
        sets.push((0..count).map(|j| j != i).collect());
        sets.push((0..count).map(|j| j < i).collect());
    }
    let mut random = Random(seed);
    for _ in 0..budget.random {
        // Sparse, even and dense ones.
        let quarters = 1 + random.next() % 3;
        sets.push((0..count).map(|_| random.next() % 4 < quarters).collect());
    }
    sets
}

impl Disk {
    /// A change as it reaches the disk, whatever else did. A name moves to the file, not to what has
    /// the old name here: that the file was created under it may be lost.
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Create(id, name) | Change::Link(id, name) => {
                self.grow(*id);
                self.names.insert(name.clone(), *id);
            }
            Change::Rename(id, from, to) => {
                self.grow(*id);
                if self.names.get(from) == Some(id) {
                    self.names.remove(from);
                }
                self.names.insert(to.clone(), *id);
            }
            Change::Remove(id, name) => {
                if self.names.get(name) == Some(id) {
                    self.names.remove(name);
                }
            }
            Change::Size(id, len) => {
                self.grow(*id);
                self.files[*id].resize(*len, 0);
            }
            // What lies behind the file's end is not seen.
            Change::Sector(id, sector, bytes) => {
                self.grow(*id);
                let file = &mut self.files[*id];
                let start = (sector * SECTOR).min(file.len());
                let len = bytes.len().min(file.len() - start);
                file[start..start + len].copy_from_slice(&bytes[..len]);
            }
            Change::Sync(_) | Change::SyncDir | Change::Saved(_) => {}
        }
    }

    fn grow(&mut self, id: usize) {
        self.files.resize(self.files.len().max(id + 1), Vec::new());
    }
}

impl State {
    fn of<'a>(durable: &Disk, changes: impl Iterator<Item = &'a Change>, saved: Option<u8>) -> Self {
        let mut disk = durable.clone();
        changes.for_each(|change| disk.apply(change));
        let files: Vec<_> =
            disk.names.iter().map(|(name, id)| (name.clone(), disk.files[*id].clone())).collect();
        let mut hasher = DefaultHasher::new();
        files.hash(&mut hasher);
        Self { files, hash: hasher.finish(), saved }
    }
}

/// Reproducible (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
