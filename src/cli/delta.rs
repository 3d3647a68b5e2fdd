//! `maptensors delta` and `apply`.

use super::{DONE, text};
use crate::delta::materialize_deltas;
use crate::error::printable;
use crate::{Model, ModelMut, SaveOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

type Answer = Result<u8, Box<dyn std::error::Error>>;

/// A delta to make.
pub(super) struct Make {
    pub(super) base: PathBuf,
    pub(super) new: PathBuf,
    pub(super) out: PathBuf,
}

/// Deltas to apply.
pub(super) struct Apply {
    pub(super) base: PathBuf,
    pub(super) deltas: Vec<PathBuf>,
    pub(super) out: PathBuf,
}

#[allow(unsafe_code)]
fn open(path: &Path) -> crate::Result<Model> {
    // SAFETY: the stable-file contract, which `--help` puts to the user.
    unsafe { Model::open(path) }
}

fn size(path: &Path) -> String {
    std::fs::metadata(path).map_or_else(|_| "-".into(), |metadata| text::size(metadata.len()))
}

impl Make {
    pub(super) fn run(&self, out: &mut impl Write) -> Answer {
        let (base, new) = (open(&self.base)?, open(&self.new)?);
        SaveOptions::new().save_diff(&base, &new, &self.out)?;
        writeln!(out, "{}: {}", printable(&self.out.to_string_lossy()), size(&self.out))?;
        Ok(DONE)
    }
}

impl Apply {
    #[allow(unsafe_code)]
    pub(super) fn run(&self, out: &mut impl Write) -> Answer {
        // SAFETY: as in `open`.
        let base = unsafe { ModelMut::open(&self.base)? };
        let deltas = self.deltas.iter().map(|path| open(path)).collect::<crate::Result<Vec<_>>>()?;
        let shared = materialize_deltas(base, &deltas, &self.out, &SaveOptions::new())?;
        let how = if shared { ", sharing blocks with the base" } else { "" };
        writeln!(out, "{}: {}{how}", printable(&self.out.to_string_lossy()), size(&self.out))?;
        Ok(DONE)
    }
}
