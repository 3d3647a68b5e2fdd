//! `maptensors inspect`.

use super::report::Report;
use super::{DONE, FAILED, complain, table, text};
use crate::Model;
use globset::GlobSet;
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};

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
            let model = match open(path) {
                Ok(model) => model,
                Err(error) => {
                    out.flush()?;
                    complain(&error);
                    code = FAILED;
                    continue;
                }
            };
            let report = Report::new(path, &model, self.filter.as_ref());
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

#[allow(unsafe_code)]
pub(super) fn open(path: &Path) -> crate::Result<Model> {
    // SAFETY: opening reads headers with read(2), and what is shown comes from them: no byte of the
    // mapping is looked at, so it does not matter whether someone writes to the file meanwhile.
    unsafe { Model::open(path) }
}
