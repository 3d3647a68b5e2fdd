use super::record::{Change, FileId, Kind};
use super::scenarios::*;
use super::*;
use crate::format::safetensors::{HeaderChanges, PREFIX_LEN, Pieces};
use crate::os::disk::{self, Dir};
use std::ffi::OsStr;

#[test]
fn a_crash_at_any_instant_leaves_the_old_model_or_the_new_one() {
    let sample = if Budget::is_long() { 1 } else { 4 };
    for scenario in &SCENARIOS {
        for kind in Kind::ALL {
            let log = scenario.record(kind);
            // The other kinds give the names in another order, and nothing else.
            let report = if kind == Kind::KEEPS || Budget::is_long() {
                scenario.check(&log, Budget::given(), sample)
            } else {
                scenario.check(&log, Budget::nested(), 8 * sample)
            };
            let name = scenario.name;
            println!("{name:<36} {:>7} states, {:>7} in recovery, {kind:?}", report.states, report.nested);
            report.assert_clean(name);
            assert!(report.states > 2 && report.nested > 2, "{name}: {report:?}");
            let created = |change: &Change| matches!(change, Change::Create(..));
            let linked = |change: &Change| matches!(change, Change::Link(..));
            let makes_none = ["a header edited in place", "a checkpoint removed"].contains(&name);
            if kind.unnamed && !makes_none {
                let is_linked = log.changes.iter().any(linked) && !log.changes.iter().any(created);
                assert!(is_linked, "{name}: {:?}", log.changes);
            } else {
                assert!(!log.changes.iter().any(linked), "{name}");
            }
        }
    }
}

/// How many states are wrong once the log of a scenario is another: on the kind of disk where they are fewest.
fn violations(name: &str, change: impl Fn(&mut Vec<Change>)) -> usize {
    let scenario = scenario(name);
    let of = |kind| {
        let mut log = scenario.record(kind);
        change(&mut log.changes);
        scenario.check(&log, Budget::given(), 0).violations.len()
    };
    Kind::ALL.map(of).into_iter().min().unwrap()
}

/// Where a file gets the name that it is to have.
fn place_of_name(changes: &[Change]) -> usize {
    place(changes, |change| change.names(|name| !is_hidden(name)).is_some())
}

fn is_hidden(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(".maptensors-")
}

fn place(changes: &[Change], is_it: impl Fn(&Change) -> bool) -> usize {
    changes.iter().position(is_it).unwrap()
}

fn syncs(changes: &mut Vec<Change>, of: impl Fn(FileId) -> bool) {
    changes.retain(|change| !matches!(change, Change::Sync(id) if of(*id)));
}

#[test]
fn a_save_without_the_sync_of_its_file_would_be_reported() {
    for name in ["a new file", "a file replaced", "a file replaced, unmapped", "a draft"] {
        assert!(violations(name, |changes| syncs(changes, |_| true)) > 0, "{name}");
    }
}

#[test]
fn a_save_without_the_sync_of_its_directory_would_be_reported() {
    for name in ["a new file", "a file replaced", "a set over a set", "a file over a set"] {
        let found = violations(name, |changes| changes.retain(|c| !matches!(c, Change::SyncDir)));
        assert!(found > 0, "{name}");
    }
}

#[test]
fn a_rename_or_link_before_the_sync_would_be_reported() {
    for name in ["a new file", "a file replaced"] {
        let found = violations(name, |changes| {
            let named = place_of_name(changes);
            let sync = place(changes, |c| matches!(c, Change::Sync(_)));
            assert!(sync < named);
            changes.swap(sync, named);
        });
        assert!(found > 0, "{name}");
    }
    // A new file that is synced without a name needs no other than its own.
    let log = scenario("a new file").record(Kind::KEEPS);
    assert!(matches!(log.changes[place_of_name(&log.changes)], Change::Link(..)), "{log:?}");
}

#[test]
fn a_sync_without_a_name_where_the_disk_forgets_it_would_be_reported() {
    for name in ["a new file", "a file replaced", "a draft", "a set over a set"] {
        let scenario = scenario(name);
        let log = scenario.record(Kind { told: true, ..Kind::FORGETS });
        assert!(!scenario.check(&log, Budget::given(), 0).violations.is_empty(), "{name}");
    }
}

#[test]
fn an_index_before_its_shards_are_durable_would_be_reported() {
    for name in ["a new set", "a set over a set", "a set over a file"] {
        let shards = |changes: &[Change]| -> Vec<FileId> {
            let shard = |name: &OsStr| name.to_string_lossy().contains("-of-");
            changes.iter().filter_map(|change| change.names(shard)).collect()
        };
        let bytes = violations(name, |changes| {
            let shards = shards(changes);
            assert_eq!(shards.len(), 2);
            syncs(changes, |id| shards.contains(&id));
        });
        let names = violations(name, |changes| {
            let index = |name: &OsStr| name.to_string_lossy().ends_with(".json");
            let index = place(changes, |change| change.names(index).is_some());
            let mut at = 0..;
            changes.retain(|change| at.next() > Some(index) || !matches!(change, Change::SyncDir));
        });
        // The old file beside a set outlives all of it until the index is durable, and the names with it.
        assert!(bytes > 0 && (names > 0 || name == "a set over a file"), "{name}: {bytes} {names}");
    }
}

#[test]
fn old_shards_removed_before_the_index_is_durable_would_be_reported() {
    let found = violations("a set over a set", |changes| {
        let index = |name: &OsStr| name.to_string_lossy().ends_with(".json");
        let index = place(changes, |change| change.names(index).is_some());
        let sync = index + place(&changes[index..], |change| matches!(change, Change::SyncDir));
        changes.remove(sync);
    });
    assert!(found > 0);
}

#[test]
fn a_file_beside_an_index_that_does_not_say_which_is_the_model_would_be_reported() {
    for name in ["a plain save over a set", "a set over a file"] {
        let index = |name: &OsStr| name.to_string_lossy().ends_with(".json");
        let log = scenario(name).record(Kind::KEEPS);
        let marks = log.changes.iter().filter(|change| change.renames_to(index).is_some()).count();
        assert!(marks > 0, "{name}");
        let found = violations(name, |changes| {
            for change in changes {
                // The first sector is where the mark is.
                if let Change::Sector(_, 0, bytes) = change
                    && let Some(at) = bytes.windows(10).position(|part| part == b"maptensors")
                {
                    let mut other = bytes.to_vec();
                    other[at] = b'M';
                    *bytes = other.into();
                }
            }
        });
        assert!(found > 0, "{name}");
    }
}

#[test]
fn an_edit_in_place_is_one_sector_and_no_other_name() {
    let log = scenario("a header edited in place").record(Kind::KEEPS);
    let changes = &log.changes;
    assert!(
        matches!(changes[..], [Change::Sector(0, 0, _), Change::Sync(0), Change::Saved(2)]),
        "{changes:?}"
    );
}

#[test]
fn an_edit_in_place_over_two_sectors_would_be_reported() {
    let dir = tempfile::tempdir().unwrap();
    two_places(dir.path());
    let ((), log) = record(dir.path(), Kind::KEEPS, None, |saved| {
        let old = std::fs::read(model(dir.path())).unwrap();
        let len = PREFIX_LEN + usize::from(u16::from_le_bytes([old[0], old[1]]));
        let both = ["generation", "zz"].map(|key| (key.to_owned(), Some("2".to_owned())));
        let changes = HeaderChanges { metadata: both.into(), ..HeaderChanges::default() };
        let text = str::from_utf8(&old[PREFIX_LEN..len]).unwrap();
        let new = Pieces::of(text, &changes).unwrap().fitted(text.len()).unwrap();
        let file = Dir::open(dir.path()).unwrap().open_file("model.safetensors".as_ref(), true).unwrap();
        disk::write_all_at(&file, &new, PREFIX_LEN as u64).unwrap();
        disk::sync(&file).unwrap();
        saved(2);
    });
    assert_eq!(read_edited(dir.path()), Ok(2));
    let report = scenario("a header edited by rewriting").check(&log, Budget::given(), 0);
    assert_eq!((report.states, report.violations.len()), (5, 2), "{report:?}");
}

#[test]
fn a_file_used_again_before_its_old_name_is_durably_gone_would_be_reported() {
    let found = violations("checkpoints into recycled files", |changes| {
        let again = |id: FileId| {
            let last = |name: &OsStr| !is_hidden(name);
            changes.iter().filter(|change| change.names(last) == Some(id)).count()
        };
        let hides: Vec<(usize, FileId)> = changes
            .iter()
            .enumerate()
            .filter_map(|(i, change)| Some((i, change.renames_to(is_hidden)?)))
            .filter(|(_, id)| again(*id) > 0)
            .collect();
        assert!(!hides.is_empty(), "no file was used again");
        for (at, _) in hides.into_iter().rev() {
            let sync = at + place(&changes[at..], |change| matches!(change, Change::SyncDir));
            changes.remove(sync);
        }
    });
    assert!(found > 0);
}

#[test]
fn bytes_that_are_not_synced_may_read_as_zeros_or_be_torn_inside_a_page() {
    let log = scenario("a new file").record(Kind::KEEPS);
    let changes = &log.changes;
    let named = place_of_name(changes);
    let sectors = changes.iter().filter(|c| matches!(c, Change::Sector(..))).count();
    assert!((4..=8).contains(&sectors), "one page of several sectors: {sectors}");
    let mut unsynced = log.clone();
    syncs(&mut unsynced.changes, |_| true);
    unsynced.changes.truncate(named + 1);
    let (mut zeros, mut torn, mut empty) = (0, 0, 0);
    each_state(&unsynced, Budget::given(), |state| {
        for (name, bytes) in &state.files {
            if name == "model.safetensors" {
                empty += usize::from(bytes.is_empty());
                zeros += usize::from(!bytes.is_empty() && bytes.iter().all(|&b| b == 0));
                let data = &bytes[bytes.len().min(512)..];
                torn += usize::from(data.contains(&0) && data.contains(&1));
            }
        }
    });
    assert!(zeros > 0 && torn > 0 && empty > 0, "{zeros} {torn} {empty}");
}
