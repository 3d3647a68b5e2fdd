use super::record::{Change, FileId};
use super::*;
use crate::dtype::DType;
use crate::format::safetensors::{Changes, PREFIX_LEN, Pieces};
use crate::layout::Layout;
use crate::map::disk::{self, Dir};
use crate::model::open_own_file;
use crate::save::{CheckpointOptions, DraftOptions, Edited, HeaderEdit, SaveOptions, materialize};
use safetensors::tensor::TensorView;
use std::ffi::OsStr;

/// Several sectors of a page, so that a torn one is a mixture.
const A: usize = 2500;
const B: usize = 233;
/// Makes two shards of the two.
const SHARD: u64 = 2600;

fn save_at(path: &Path, generation: u8, options: &SaveOptions) -> Result<()> {
    let (a, b) = (vec![generation; A], vec![generation; B]);
    let options = options.clone().metadata("generation", generation.to_string());
    options.save([("a", tensor(&a)), ("b", tensor(&b))], path)
}

fn tensor(bytes: &[u8]) -> TensorView<'_> {
    TensorView::new(safetensors::Dtype::U8, vec![bytes.len()], bytes).unwrap()
}

fn one(path: &Path, generation: u8) -> Result<()> {
    save_at(path, generation, &SaveOptions::new())
}

fn sharded(path: &Path, generation: u8) -> Result<()> {
    save_at(path, generation, &SaveOptions::new().max_shard_size(SHARD))
}

/// One file where there may be a set.
fn merged(path: &Path, generation: u8) -> Result<()> {
    save_at(path, generation, &SaveOptions::new().max_shard_size(1 << 40))
}

fn draft(path: &Path, generation: u8, mapped: bool) -> Result<()> {
    let layout = Layout::builder().tensor("a", DType::U8, &[A]).tensor("b", DType::U8, &[B]);
    let layout = layout.metadata("generation", generation.to_string()).build()?;
    let mut draft = DraftOptions::new().mapped(mapped).create(path, &layout)?;
    for mut tensor in draft.tensors_mut()? {
        tensor.as_bytes_mut().fill(generation);
    }
    draft.commit()
}

/// Out of a base and a delta that lie elsewhere, and are as good as never written.
fn materialized(path: &Path, generation: u8) -> Result<()> {
    let elsewhere = scratch();
    let (base, new) = (elsewhere.path().join("base"), elsewhere.path().join("new"));
    let delta = elsewhere.path().join("delta");
    disk::watched(None, || {
        let quick = SaveOptions::new().durable(false);
        save_at(&base, 100, &quick)?;
        save_at(&new, generation, &quick)?;
        quick.save_diff(&Model::read(&base)?, &Model::read(&new)?, &delta)
    })?;
    materialize(open_own_file(&base)?, &[Model::read(&delta)?], path)
}

fn said(result: Result<()>, generation: u8, saved: &dyn Fn(u8)) -> Result<()> {
    result.map(|()| saved(generation))
}

// Where there is a single file, the directory's other way to be read is "the only safetensors file", which
// is what the other name is for.
fn model(dir: &Path) -> std::path::PathBuf {
    dir.join("model.safetensors")
}
fn other(dir: &Path) -> std::path::PathBuf {
    dir.join("m.safetensors")
}
fn nothing(_: &Path) {}
fn read_model(dir: &Path) -> Result<u8, String> {
    generation(&model(dir), None)
}
fn read_dir(dir: &Path) -> Result<u8, String> {
    generation(dir, None)
}

pub(super) const SCENARIOS: [Scenario; 17] = [
    Scenario {
        name: "a new file",
        old: 0,
        prepare: nothing,
        saves: 1,
        save: |dir, i, saved| said(one(&model(dir), i), i, saved),
        read: read_model,
    },
    Scenario {
        name: "a file replaced",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(one(&model(dir), i), i, saved),
        read: read_model,
    },
    Scenario {
        name: "a file replaced, unmapped",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(save_at(&model(dir), i, &SaveOptions::new().mapped(false)), i, saved),
        read: read_model,
    },
    Scenario {
        name: "a draft",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(draft(&model(dir), i, true), i, saved),
        read: read_model,
    },
    Scenario {
        name: "a draft, unmapped",
        old: 0,
        prepare: nothing,
        saves: 1,
        save: |dir, i, saved| said(draft(&model(dir), i, false), i, saved),
        read: read_model,
    },
    Scenario {
        name: "a file with checksums",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(save_at(&model(dir), i, &SaveOptions::new().checksums(true)), i, saved),
        read: |dir| {
            let found = read_model(dir)?;
            let model = Model::read(model(dir)).map_err(|error| error.to_string())?;
            if model.metadata().contains_key(crate::digest::CHECKSUMS) {
                model.verify().map_err(|error| error.to_string())?;
            }
            Ok(found)
        },
    },
    Scenario {
        name: "a base and a delta, materialized",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(materialized(&model(dir), i), i, saved),
        read: read_model,
    },
    Scenario {
        name: "two saves in a row",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 2,
        save: |dir, i, saved| {
            said(one(&model(dir), i), i, saved)?;
            // Out of a recovery, only the one.
            if i == NEWEST { Ok(()) } else { said(one(&model(dir), i + 1), i + 1, saved) }
        },
        read: read_model,
    },
    Scenario {
        name: "a new set",
        old: 0,
        prepare: nothing,
        saves: 1,
        save: |dir, i, saved| said(sharded(&model(dir), i), i, saved),
        read: |dir| generation(&dir.join("model.safetensors.index.json"), None),
    },
    Scenario {
        name: "a set over a set",
        old: 1,
        prepare: |dir| sharded(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(sharded(&model(dir), i), i, saved),
        read: read_dir,
    },
    Scenario {
        name: "a set over a file",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(sharded(&model(dir), i), i, saved),
        read: read_dir,
    },
    Scenario {
        name: "a set over a file of another name",
        old: 1,
        prepare: |dir| one(&other(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(sharded(&other(dir), i), i, saved),
        read: read_dir,
    },
    Scenario {
        name: "a file over a set",
        old: 1,
        prepare: |dir| sharded(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(merged(&model(dir), i), i, saved),
        read: read_dir,
    },
    Scenario {
        name: "a file over a set of another name",
        old: 1,
        prepare: |dir| sharded(&other(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(merged(&other(dir), i), i, saved),
        read: read_dir,
    },
    Scenario {
        name: "a header edited in place",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| {
            let edited = HeaderEdit::new().set("generation", i.to_string()).apply(model(dir))?;
            // A refused operation on the way may lead to the other.
            assert_ne!(edited, Edited::Unchanged);
            said(Ok(()), i, saved)
        },
        read: read_edited,
    },
    Scenario {
        name: "a header edited by rewriting",
        old: 1,
        prepare: two_places,
        saves: 1,
        save: |dir, i, saved| {
            let edited = edit_two_places(i).apply(model(dir))?;
            assert_eq!(edited, Edited::Rewritten);
            said(Ok(()), i, saved)
        },
        read: read_edited,
    },
    Scenario {
        name: "checkpoints into recycled files",
        old: 1,
        prepare: |dir| checkpoints(dir, 1..=1, &|_| ()).unwrap(),
        saves: 4,
        save: |dir, i, saved| checkpoints(dir, i..=if i == NEWEST { i } else { i + 3 }, saved),
        read: read_checkpoints,
    },
];

/// Keeps one checkpoint: the file of each is that of the last but one.
fn checkpoints(dir: &Path, generations: RangeInclusive<u8>, saved: &dyn Fn(u8)) -> Result<()> {
    let checkpoints = CheckpointOptions::new().keep(1).open(dir)?;
    for i in generations {
        let (a, b) = (vec![i; A], vec![i; B]);
        let metadata = [("generation".to_owned(), i.to_string())].into();
        checkpoints.save_with([("a", tensor(&a)), ("b", tensor(&b))], metadata, i.into())?;
        saved(i);
    }
    checkpoints.close()
}

/// The last checkpoint; all there are must be whole.
fn read_checkpoints(dir: &Path) -> Result<u8, String> {
    let mut last = 0;
    for name in names_in(dir).iter().filter(|name| !name.starts_with('.')) {
        let found = generation(&dir.join(name), None)?;
        let step: String = name.chars().filter(char::is_ascii_digit).collect();
        if step.parse() != Ok(found) {
            return Err(format!("{found} in {name}"));
        }
        last = last.max(found);
    }
    Ok(last)
}

/// Only the header says which generation it is.
fn read_edited(dir: &Path) -> Result<u8, String> {
    let said = generation(&model(dir), Some(1))?;
    let model = Model::read(model(dir)).map_err(|error| error.to_string())?;
    match model.metadata().get("zz") {
        Some(other) if *other != said.to_string() => Err(format!("{said} here and {other} there")),
        _ => Ok(said),
    }
}

/// A header that says the generation in two sectors.
fn two_places(dir: &Path) {
    let options = SaveOptions::new().metadata("middle", "x".repeat(700)).metadata("zz", "1");
    save_at(&model(dir), 1, &options).unwrap();
}

fn edit_two_places(generation: u8) -> HeaderEdit {
    HeaderEdit::new().set("generation", generation.to_string()).set("zz", generation.to_string())
}

fn scenario(name: &str) -> &'static Scenario {
    SCENARIOS.iter().find(|scenario| scenario.name == name).unwrap()
}

#[test]
fn a_crash_at_any_instant_leaves_the_old_model_or_the_new_one() {
    let sample = if Budget::is_long() { 1 } else { 4 };
    for scenario in &SCENARIOS {
        let log = scenario.record();
        let report = scenario.check(&log, Budget::given(), sample);
        println!("{:<36} {:>7} states, {:>7} in recovery", scenario.name, report.states, report.nested);
        report.assert_clean(scenario.name);
        assert!(report.states > 2 && report.nested > 2, "{}: {report:?}", scenario.name);
    }
}

/// How many states are wrong once the log of a scenario is another.
fn violations(name: &str, change: impl FnOnce(&mut Vec<Change>)) -> usize {
    let scenario = scenario(name);
    let mut log = scenario.record();
    change(&mut log.changes);
    scenario.check(&log, Budget::given(), 0).violations.len()
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
fn a_rename_before_the_sync_would_be_reported() {
    for name in ["a new file", "a file replaced"] {
        let found = violations(name, |changes| {
            let rename = place(changes, |c| matches!(c, Change::Rename(..)));
            let sync = place(changes, |c| matches!(c, Change::Sync(_)));
            assert!(sync < rename);
            changes.swap(sync, rename);
        });
        assert!(found > 0, "{name}");
    }
}

#[test]
fn an_index_before_its_shards_are_durable_would_be_reported() {
    for name in ["a new set", "a set over a set", "a set over a file"] {
        let shards = |changes: &[Change]| -> Vec<FileId> {
            let shard = |name: &OsStr| name.to_string_lossy().contains("-of-");
            changes.iter().filter_map(|change| change.renames_to(shard)).collect()
        };
        let bytes = violations(name, |changes| {
            let shards = shards(changes);
            assert_eq!(shards.len(), 2);
            syncs(changes, |id| shards.contains(&id));
        });
        let names = violations(name, |changes| {
            let index = |name: &OsStr| name.to_string_lossy().ends_with(".json");
            let index = place(changes, |change| change.renames_to(index).is_some());
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
        let index = place(changes, |change| change.renames_to(index).is_some());
        let sync = index + place(&changes[index..], |change| matches!(change, Change::SyncDir));
        changes.remove(sync);
    });
    assert!(found > 0);
}

#[test]
fn an_edit_in_place_is_one_sector_and_no_other_name() {
    let log = scenario("a header edited in place").record();
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
    let ((), log) = record(dir.path(), None, |saved| {
        let old = std::fs::read(model(dir.path())).unwrap();
        let len = PREFIX_LEN + usize::from(u16::from_le_bytes([old[0], old[1]]));
        let both = ["generation", "zz"].map(|key| (key.to_owned(), Some("2".to_owned())));
        let changes = Changes { metadata: both.into(), ..Changes::default() };
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
        let hidden = |name: &OsStr| name.to_string_lossy().starts_with(".maptensors-");
        let again = |id: FileId| {
            let last = |name: &OsStr| !hidden(name);
            changes.iter().filter(|change| change.renames_to(last) == Some(id)).count()
        };
        let hides: Vec<(usize, FileId)> = changes
            .iter()
            .enumerate()
            .filter_map(|(i, change)| Some((i, change.renames_to(hidden)?)))
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
    let log = scenario("a new file").record();
    let changes = &log.changes;
    let rename = place(changes, |c| matches!(c, Change::Rename(..)));
    let sectors = changes.iter().filter(|c| matches!(c, Change::Sector(..))).count();
    assert!((4..=8).contains(&sectors), "one page of several sectors: {sectors}");
    let mut unsynced = log.clone();
    syncs(&mut unsynced.changes, |_| true);
    unsynced.changes.truncate(rename + 1);
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
