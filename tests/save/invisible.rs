//! What nobody can open while its memory is handed out: shown with safe code alone.
#![forbid(unsafe_code)]
#![allow(clippy::float_cmp)] // written and read back, never computed
#![cfg(target_os = "linux")]

use maptensors::{DType, Draft, Layout, Model};
use std::path::Path;

/// The names in a directory, sorted.
fn listing(dir: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Whatever safe code can do to the files that it finds.
fn spoil(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        std::fs::write(entry.unwrap().path(), [0xff; 10_000]).unwrap();
    }
}

#[test]
fn a_draft_has_no_name_while_its_memory_is_handed_out() {
    let dirs = [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"].map(|at| tempfile::tempdir_in(at).unwrap());
    for dir in dirs.iter().map(tempfile::TempDir::path) {
        let path = dir.join("model.safetensors");
        let layout = Layout::builder().tensor("w", DType::F32, &[1000]).build().unwrap();
        let mut draft = Draft::create(&path, &layout).unwrap();
        let mut tensor = draft.tensor_mut("w").unwrap();
        let values: &mut [f32] = tensor.as_mut_slice().unwrap();
        values.fill(1.0);
        assert!(listing(dir).is_empty(), "{}: {:?}", dir.display(), listing(dir));
        spoil(dir);
        assert!(values.iter().all(|&value| value == 1.0));
        draft.commit().unwrap();
        assert_eq!(listing(dir), ["model.safetensors"]);

        // Where something is replaced it is the old file that is found.
        let mut draft = Draft::create(&path, &layout).unwrap();
        let mut tensor = draft.tensor_mut("w").unwrap();
        let values: &mut [f32] = tensor.as_mut_slice().unwrap();
        values.fill(2.0);
        assert_eq!(listing(dir), ["model.safetensors"]);
        spoil(dir);
        assert!(values.iter().all(|&value| value == 2.0));
        draft.commit().unwrap();
        assert_eq!(listing(dir), ["model.safetensors"]);
        let model = Model::read(&path).unwrap();
        assert!(model.tensor("w").unwrap().as_slice::<f32>().unwrap().iter().all(|&value| value == 2.0));
    }
}
