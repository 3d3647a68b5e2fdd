//! What is durable is on the disk: looked for in a copy of the disk, made at the instant that the save returns.
//!
//! `src/crash/` enumerates what may be left by the model of a disk; here are real file systems, which must keep what that
//! model says of files that had no name when they were synced.
#![cfg(target_os = "linux")]

use maptensors::{CheckpointOptions, DType, Draft, HeaderEdit, Layout, Model, SaveOptions};
use std::path::Path;

use crate::common::mount::Mount;
use crate::common::{bytes_tensor, skip};

const LEN: usize = 1 << 20;

fn save(path: &Path, fill: u8, options: &SaveOptions) {
    options.save([("w", bytes_tensor(&vec![fill; LEN]))], path).unwrap();
}

fn holds(path: &Path, fill: u8) -> bool {
    Model::read(path)
        .is_ok_and(|model| model.tensor("w").unwrap().as_bytes().iter().all(|&byte| byte == fill))
}

#[test]
fn what_is_said_to_be_durable_is_on_the_disk() {
    const TEST: &str = "what_is_said_to_be_durable_is_on_the_disk";
    for (mkfs, size) in [
        (&["mkfs.ext4", "-q", "-F"][..], 64 << 20),
        (&["mkfs.xfs", "-q"], 320 << 20),
        (&["mkfs.btrfs", "-q"], 256 << 20),
    ] {
        if std::process::Command::new(mkfs[0]).arg("-V").output().is_err() {
            skip(TEST, format!("{} is not installed", mkfs[0]));
            continue;
        }
        let Some(disk) = Mount::new(TEST, mkfs, size) else { continue };
        let at = |name: &str| disk.path().join(name);
        save(&at("replaced.safetensors"), 1, &SaveOptions::new().durable(false));
        // As if all of that had been there for long.
        rustix::fs::syncfs(std::fs::File::open(disk.path()).unwrap()).unwrap();

        save(&at("new.safetensors"), 2, &SaveOptions::new());
        save(&at("replaced.safetensors"), 3, &SaveOptions::new());
        save(&at("unmapped.safetensors"), 4, &SaveOptions::new().mapped(false));
        std::fs::create_dir(at("set")).unwrap();
        save(&at("set").join("model.safetensors"), 5, &SaveOptions::new().max_shard_size(1));
        let layout = Layout::builder().tensor("w", DType::U8, &[LEN]).build().unwrap();
        let mut draft = Draft::create(at("draft.safetensors"), &layout).unwrap();
        draft.tensor_mut("w").unwrap().as_bytes_mut().fill(6);
        draft.commit().unwrap();
        let checkpoints = CheckpointOptions::new().keep(1).open(at("checkpoints")).unwrap();
        for step in 7..=9u8 {
            checkpoints.save([("w", bytes_tensor(&vec![step; LEN]))], step.into()).unwrap();
        }
        let edit = HeaderEdit::new().metadata("long", "x".repeat(8192));
        edit.apply(at("new.safetensors")).unwrap();

        let Some(after) = disk.after_power_loss(TEST) else { continue };
        let at = |name: &str| after.path().join(name);
        for (name, fill) in [
            ("new.safetensors", 2),
            ("replaced.safetensors", 3),
            ("unmapped.safetensors", 4),
            ("set", 5),
            ("draft.safetensors", 6),
            ("checkpoints/step-0000000009.safetensors", 9),
        ] {
            assert!(holds(&at(name), fill), "{mkfs:?}: {name}: {:?}", Model::read(at(name)).map(drop));
        }
        let metadata = Model::read(at("new.safetensors")).unwrap();
        assert_eq!(metadata.metadata().text("long").unwrap().len(), 8192);
    }
}
