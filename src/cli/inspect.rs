//! `maptensors inspect`.

use super::report::Report;
use super::{DONE, FAILED, complain, table, text};
use crate::error::printable;
use crate::{Model, Publication, Subscriber};
use globset::GlobSet;
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which models to show, and how.
pub(super) struct Inspect {
    pub(super) paths: Vec<PathBuf>,
    /// `None`: every tensor.
    pub(super) filter: Option<GlobSet>,
    /// Whether to list the tensors one by one.
    pub(super) list: bool,
    pub(super) format: Format,
}

pub(super) enum Format {
    Json,
    Table {
        /// Columns to fit into; `None`: not a terminal, nothing is shortened.
        width: Option<usize>,
    },
}

impl Inspect {
    /// Shows every model that can be opened and complains about the others.
    pub(super) fn run(&self, out: &mut impl Write) -> Result<u8, Box<dyn Error>> {
        let mut code = DONE;
        let mut shown = 0;
        for path in &self.paths {
            let (model, generation) = match open_any(path) {
                Ok(found) => found,
                Err(error) => {
                    out.flush()?;
                    complain(&error);
                    code = FAILED;
                    continue;
                }
            };
            if let Err(error) = matches_any(&model, self.filter.as_ref(), path) {
                out.flush()?;
                complain(&*error);
                code = FAILED;
                continue;
            }
            let report = Report::new(path, generation, &model, self.filter.as_ref());
            match self.format {
                Format::Json => {
                    let json = serde_json::to_string(&report.listing(self.list))?;
                    writeln!(out, "{}", text::json_safe(&json))?;
                }
                Format::Table { width } => {
                    if shown > 0 {
                        writeln!(out)?;
                    }
                    table::show(out, &report, self.list, width)?;
                }
            }
            shown += 1;
        }
        Ok(code)
    }
}

/// A model; or the current generation of what is published, and its number.
#[allow(unsafe_code)]
fn open_any(path: &Path) -> crate::Result<(Arc<Model>, Option<u64>)> {
    let Some(Publication { path: published, .. }) = named(path).or_else(|| published_in(path)) else {
        return Ok((Arc::new(open(path)?), None));
    };
    // SAFETY: as in `open`: no byte of the mappings is looked at.
    match unsafe { Subscriber::attach(published) } {
        Ok(held) => Ok((held.model().clone(), Some(held.generation()))),
        // A model may lie beside a file that is called as a control page is.
        Err(error) => open(path).map(|model| (Arc::new(model), None)).map_err(|_| error),
    }
}

/// What is published by a name, where there is no file of that name.
pub(super) fn named(name: &Path) -> Option<Publication> {
    let is_path = name.as_os_str().as_encoded_bytes().contains(&b'/') || name.symlink_metadata().is_ok();
    if is_path { None } else { Publication::at(name).ok() }
}

/// What is published in a directory, whatever that is called.
fn published_in(dir: &Path) -> Option<Publication> {
    if dir.is_dir() { Publication::at(dir.join(".")).ok() } else { None }
}

/// # Errors
/// Where a filter lets no tensor through: it is misspelled, or the model is another.
pub(super) fn matches_any(
    model: &Model,
    filter: Option<&GlobSet>,
    path: &Path,
) -> Result<(), Box<dyn Error>> {
    let Some(filter) = filter else { return Ok(()) };
    if model.names().any(|name| filter.is_match(name)) {
        return Ok(());
    }
    let (path, tensors) = (printable(&path.to_string_lossy()), text::plural(model.len(), "tensor"));
    Err(format!("{path}: no name of its {tensors} matches --filter").into())
}

#[allow(unsafe_code)]
pub(super) fn open(path: &Path) -> crate::Result<Model> {
    // SAFETY: opening reads headers with read(2), and what is shown comes from them: no byte of the
    // mapping is looked at, so it does not matter whether someone writes to the file meanwhile.
    unsafe { Model::open(path) }
}
