//! The ways to save that are put under a crash.

use super::*;
use crate::checkpoint::{CheckpointOptions, Checkpointer};
use crate::delta::materialize;
use crate::dtype::DType;
use crate::layout::Layout;
use crate::model::open_own_file;
use crate::os::disk;
use crate::save::{DraftOptions, Edited, HeaderEdit, SaveOptions};

/// Several sectors of a page, so that a torn one is a mixture.
pub(super) const A: usize = 2500;
pub(super) const B: usize = 233;
/// Makes two shards of the two.
pub(super) const SHARD: u64 = 2600;

pub(super) fn save_at(path: &Path, generation: u8, options: &SaveOptions) -> Result<()> {
    let (a, b) = (vec![generation; A], vec![generation; B]);
    let options = options.clone().metadata("generation", generation.to_string());
    options.save([("a", tensor(&a)), ("b", tensor(&b))], path)
}

pub(super) fn tensor(bytes: &[u8]) -> (DType, [usize; 1], &[u8]) {
    (DType::U8, [bytes.len()], bytes)
}

pub(super) fn one(path: &Path, generation: u8) -> Result<()> {
    save_at(path, generation, &SaveOptions::new())
}

pub(super) fn sharded(path: &Path, generation: u8) -> Result<()> {
    save_at(path, generation, &SaveOptions::new().max_shard_size(SHARD))
}

/// One file where there may be a set.
pub(super) fn merged(path: &Path, generation: u8) -> Result<()> {
    save_at(path, generation, &SaveOptions::new().max_shard_size(1 << 40))
}

pub(super) fn draft(path: &Path, generation: u8, mapped: bool) -> Result<()> {
    let layout = Layout::builder().tensor("a", DType::U8, &[A]).tensor("b", DType::U8, &[B]);
    let layout = layout.metadata("generation", generation.to_string()).build()?;
    let mut draft = DraftOptions::new().mapped(mapped).create(path, &layout)?;
    for mut tensor in draft.tensors_mut()? {
        tensor.as_bytes_mut().fill(generation);
    }
    draft.commit()
}

/// Out of a base and a delta that lie elsewhere, and are as good as never written.
pub(super) fn materialized(path: &Path, generation: u8) -> Result<()> {
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

pub(super) fn said(result: Result<()>, generation: u8, saved: &dyn Fn(u8)) -> Result<()> {
    result.map(|()| saved(generation))
}

// Where there is a single file, the directory's other way to be read is "the only safetensors file", which
// is what the other name is for.
pub(super) fn model(dir: &Path) -> std::path::PathBuf {
    dir.join("model.safetensors")
}
pub(super) fn other(dir: &Path) -> std::path::PathBuf {
    dir.join("m.safetensors")
}
pub(super) fn nothing(_: &Path) {}
pub(super) fn read_model(dir: &Path) -> Result<u8, String> {
    generation(&model(dir), None)
}
pub(super) fn read_dir(dir: &Path) -> Result<u8, String> {
    generation(dir, None)
}

pub(super) const SCENARIOS: [Scenario; 22] = [
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
            if model.metadata().contains_key(crate::diff::digest::CHECKSUMS) {
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
        name: "a plain save over a set",
        old: 1,
        prepare: |dir| sharded(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(one(&model(dir), i), i, saved),
        read: read_dir,
    },
    Scenario {
        name: "a draft over a set of another name",
        old: 1,
        prepare: |dir| sharded(&other(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| said(draft(&other(dir), i, true), i, saved),
        read: read_dir,
    },
    Scenario {
        name: "a file over a set, and a set over that",
        old: 1,
        prepare: |dir| sharded(&model(dir), 1).unwrap(),
        saves: 2,
        save: |dir, i, saved| {
            said(one(&model(dir), i), i, saved)?;
            if i == NEWEST { Ok(()) } else { said(sharded(&model(dir), i + 1), i + 1, saved) }
        },
        read: read_dir,
    },
    Scenario {
        name: "a header edited in place",
        old: 1,
        prepare: |dir| one(&model(dir), 1).unwrap(),
        saves: 1,
        save: |dir, i, saved| {
            let edited = HeaderEdit::new().metadata("generation", i.to_string()).apply(model(dir))?;
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
    Scenario {
        name: "checkpoints in shards",
        old: 1,
        prepare: |dir| sharded_checkpoints(dir, 1..=1, &|_| ()).unwrap(),
        saves: 2,
        save: |dir, i, saved| sharded_checkpoints(dir, i..=if i == NEWEST { i } else { i + 1 }, saved),
        read: read_latest,
    },
    Scenario {
        name: "a checkpoint removed",
        old: 1,
        // Saved last, and so the latest, until it is removed.
        prepare: |dir| kept_checkpoints(dir, &[2, 1], &|_| ()).unwrap(),
        saves: 1,
        save: |dir, i, saved| match i {
            NEWEST => kept_checkpoints(dir, &[i], saved),
            _ => said(Checkpointer::open(dir)?.remove(1).map(drop), i, saved),
        },
        read: read_latest,
    },
];

/// Keeps one checkpoint: the file of each is that of the last but one.
pub(super) fn checkpoints(dir: &Path, generations: RangeInclusive<u8>, saved: &dyn Fn(u8)) -> Result<()> {
    save_steps(&CheckpointOptions::new().keep(1).open(dir)?, generations, saved)
}

/// Keeps one set.
pub(super) fn sharded_checkpoints(
    dir: &Path,
    generations: RangeInclusive<u8>,
    saved: &dyn Fn(u8),
) -> Result<()> {
    save_steps(&CheckpointOptions::new().keep(1).max_shard_size(SHARD).open(dir)?, generations, saved)
}

/// Keeps all.
pub(super) fn kept_checkpoints(dir: &Path, steps: &[u8], saved: &dyn Fn(u8)) -> Result<()> {
    save_steps(&CheckpointOptions::new().prepare(false).open(dir)?, steps.iter().copied(), saved)
}

fn save_steps(
    checkpoints: &Checkpointer,
    steps: impl IntoIterator<Item = u8>,
    saved: &dyn Fn(u8),
) -> Result<()> {
    for i in steps {
        let (a, b) = (vec![i; A], vec![i; B]);
        let metadata = [("generation", i.to_string())];
        checkpoints.save_with([("a", tensor(&a)), ("b", tensor(&b))], metadata, i.into())?;
        saved(i);
    }
    checkpoints.wait()
}

/// The checkpoint that a run resumes from; all there are must be whole.
pub(super) fn read_latest(dir: &Path) -> Result<u8, String> {
    let checkpoints = Checkpointer::open(dir).map_err(|error| error.to_string())?;
    for step in checkpoints.steps().map_err(|error| error.to_string())? {
        let path = checkpoints.find(Some(step)).map_err(|error| error.to_string())?;
        let found = generation(&path, None)?;
        if u64::from(found) != step {
            return Err(format!("{found} in step {step}"));
        }
    }
    let latest = checkpoints.latest().map_err(|error| error.to_string())?;
    Ok(latest.map_or(0, |step| u8::try_from(step).unwrap_or(u8::MAX)))
}

/// The last checkpoint; all there are must be whole.
pub(super) fn read_checkpoints(dir: &Path) -> Result<u8, String> {
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
pub(super) fn read_edited(dir: &Path) -> Result<u8, String> {
    let said = generation(&model(dir), Some(1))?;
    let model = Model::read(model(dir)).map_err(|error| error.to_string())?;
    match model.metadata().text("zz") {
        Some(other) if *other != said.to_string() => Err(format!("{said} here and {other} there")),
        _ => Ok(said),
    }
}

/// A header that says the generation in two sectors.
pub(super) fn two_places(dir: &Path) {
    let options = SaveOptions::new().metadata("middle", "x".repeat(700)).metadata("zz", "1");
    save_at(&model(dir), 1, &options).unwrap();
}

pub(super) fn edit_two_places(generation: u8) -> HeaderEdit {
    HeaderEdit::new().metadata("generation", generation.to_string()).metadata("zz", generation.to_string())
}

pub(super) fn scenario(name: &str) -> &'static Scenario {
    SCENARIOS.iter().find(|scenario| scenario.name == name).unwrap()
}
