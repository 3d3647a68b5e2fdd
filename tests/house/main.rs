//! The house rules, checked against the sources.

mod rooms;
mod skips;

use std::path::{Path, PathBuf};

/// Every file below `dir` whose name ends so, by its path, with its text.
fn files(dir: &str, extension: &str) -> Vec<(String, String)> {
    fn walk(dir: &Path, extension: &str, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, extension, into);
            } else if path.extension().is_some_and(|e| e == extension) {
                into.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(Path::new(dir), extension, &mut paths);
    paths.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path.into_os_string().into_string().unwrap(), text)
    };
    paths.into_iter().map(read).collect()
}
