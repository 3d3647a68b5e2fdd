//! Any bytes as the index of a sharded model: never a panic, and never a file outside the directory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use maptensors::Model;
use std::path::{Component, Path, PathBuf};
use std::sync::LazyLock;

/// `dir/` with shards to be named, beside files that must never be opened.
static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let root = tempfile::tempdir().unwrap().keep();
    let dir = root.join("dir");
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    let shard = |path: &Path, name: &str| {
        let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.push(7);
        std::fs::write(path, file).unwrap();
    };
    shard(&dir.join("x"), "a");
    shard(&dir.join("y"), "b");
    shard(&dir.join("sub/x"), "secret");
    shard(&root.join("x"), "secret");
    shard(&root.join("y"), "secret");
    dir
});

fuzz_target!(|index: &[u8]| {
    let path = DIR.join("model.safetensors.index.json");
    std::fs::write(&path, index).unwrap();
    if let Ok(model) = Model::read(&path) {
        assert!(!model.contains("secret"));
        for shard in 0..model.shards() {
            let shard = model.path(shard).unwrap();
            let below: Vec<_> = shard.strip_prefix(&*DIR).unwrap().components().collect();
            assert!(matches!(below[..], [Component::Normal(_)]), "{}", shard.display());
        }
    }
});
