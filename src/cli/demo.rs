//! `maptensors demo`: the walk of `examples/digits`, with its models carried along, because a wheel or an
//! installed binary has no repository beside it.

#[path = "../../examples/digits/walk.rs"]
mod walk;

use crate::Model;
use crate::error::quote;
use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

const FILES: [(&str, &[u8]); 2] = [
    ("digits.safetensors", include_bytes!("../../models/digits.safetensors")),
    ("digits-heldout.safetensors", include_bytes!("../../models/digits-heldout.safetensors")),
];

/// Takes the walk, in `dir` or in a temporary directory that is removed however the walk ends.
pub(super) fn run(out: &mut impl Write, dir: Option<&Path>) -> Result<(), Box<dyn Error>> {
    if let Some(dir) = dir {
        fs::create_dir_all(dir).map_err(|error| cannot("make", dir, &error))?;
        return take(out, dir);
    }
    let dir = tempfile::Builder::new().prefix("maptensors-demo-").tempdir()?;
    take(out, dir.path())?;
    Ok(dir.close()?)
}

fn take(out: &mut impl Write, dir: &Path) -> Result<(), Box<dyn Error>> {
    for (name, bytes) in FILES {
        put(&dir.join(name), bytes).map_err(|error| cannot("write", &dir.join(name), &error))?;
    }
    let tuned = dir.join("digits-tuned.safetensors");
    // That of a walk before is replaced, and nothing else.
    let is_tuned = |path: &Path| Model::read(path).is_ok_and(|model| model.contains("fc1.weight"));
    if fs::symlink_metadata(&tuned).is_ok() && !is_tuned(&tuned) {
        return Err(cannot("write", &tuned, &"it is there, and is not what the demo makes"));
    }
    walk::walk(out, dir, &tuned)
}

/// Writes a new file; one that is there already must be the same.
fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(mut file) => file.write_all(bytes),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && fs::read(path)? == bytes => Ok(()),
        Err(error) => Err(error),
    }
}

/// A sentence, not an [`io::Error`]: a broken pipe on the way is not the output's.
fn cannot(act: &str, path: &Path, error: &dyn std::fmt::Display) -> Box<dyn Error> {
    format!("cannot {act} {}: {error}", quote(&path.to_string_lossy())).into()
}
