//! On a file system that can share blocks, a materialized delta takes space for what changed only.
#![allow(unsafe_code)]

use crate::common::mount::Mount;
use crate::common::{self, noise};
use maptensors::{DType, DraftOptions, Layout, Model, ModelMut, SaveOptions, apply_delta};
use std::path::Path;

const MIB: usize = 1 << 20;
const PAGES: usize = 64 * MIB / 4096;

/// Bytes of a file system that are taken, once everything is written.
fn taken(dir: &Path) -> u64 {
    rustix::fs::syncfs(std::fs::File::open(dir).unwrap()).unwrap();
    let stat = rustix::fs::statvfs(dir).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

/// Materializes a delta of 1 % of a 64 MiB model's pages, scattered; returns whether blocks are shared, and the
/// bytes of the file system it takes, in percent of the model.
fn materialize(dir: &Path) -> (bool, f64) {
    let at = |name: &str| dir.join(name);
    let layout = Layout::builder().tensor("w", DType::F32, &[64 * MIB / 4]).build().unwrap();
    let mut draft = DraftOptions::new().checksums(true).create(at("base"), &layout).unwrap();
    draft.tensor_mut("w").unwrap().as_bytes_mut().copy_from_slice(&noise(1, 64 * MIB));
    draft.commit().unwrap();
    // SAFETY: a test's own file, which nobody writes while it is mapped.
    let open = || unsafe { ModelMut::open(at("base")) }.unwrap();
    let mut model = open();
    let mut view = model.tensor_mut("w").unwrap();
    for i in 0..PAGES / 100 {
        let start = i * 97 % PAGES * 4096;
        view.as_bytes_mut()[start..start + 4096].copy_from_slice(&noise(i as u64, 4096));
    }
    assert_eq!(model.changed().unwrap().get("w").unwrap().pages, PAGES / 100);
    SaveOptions::new().save_delta(&model, at("delta")).unwrap();
    let applied = apply_delta(open(), &[Model::read(at("delta")).unwrap()]).unwrap();
    let before = taken(dir);
    let shared = applied.materialize(at("out")).unwrap();
    #[allow(clippy::cast_precision_loss)]
    let percent = taken(dir).saturating_sub(before) as f64 * 100.0 / (64 * MIB) as f64;
    let out = Model::read(at("out")).unwrap();
    out.verify().unwrap();
    assert!(out.tensor("w").unwrap().as_bytes() == model.tensor("w").unwrap().as_bytes());
    println!("{}: shared {shared}, {percent:.2} % of the model", dir.display());
    (shared, percent)
}

#[test]
fn on_btrfs_and_xfs_a_materialized_delta_takes_three_percent_of_the_model_at_most() {
    const TEST: &str = "on_btrfs_and_xfs_a_materialized_delta_takes_three_percent_of_the_model_at_most";
    for mkfs in [&["mkfs.btrfs", "-q"][..], &["mkfs.xfs", "-q", "-m", "reflink=1"]] {
        let Some(mount) = Mount::new(TEST, mkfs, 512 << 20) else { continue };
        let (shared, percent) = materialize(&mount.path());
        assert!(shared && percent <= 3.0, "{mkfs:?}: shared {shared}, {percent} %");
    }
}

#[test]
fn elsewhere_the_kernel_copies_and_the_content_is_the_same() {
    let dir = common::disk_dir();
    materialize(dir.path());
}
