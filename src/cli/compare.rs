//! `maptensors diff`, `changed` and `verify`: two models held against each other, one against its checksums.

use super::table::Table;
use super::{DIFFERENT, DONE, TROUBLE, complain, text};
use crate::dtype::DType;
use crate::error::{Error, printable};
use crate::{Change, Differences, Model, diff};
use globset::{GlobMatcher, GlobSet};
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};

type Answer = Result<u8, Box<dyn std::error::Error>>;

#[allow(unsafe_code)]
fn open(path: &Path) -> crate::Result<Model> {
    // SAFETY: the stable-file contract, which `--help` puts to the user.
    unsafe { Model::open(path) }
}

/// Two models to compare.
pub(super) struct Compare {
    pub(super) a: PathBuf,
    pub(super) b: PathBuf,
    /// `None`: every tensor.
    pub(super) filter: Option<GlobSet>,
    /// Tensors that are not to change.
    pub(super) frozen: Vec<GlobMatcher>,
    pub(super) json: bool,
    /// Columns to fit into, where there is a terminal.
    pub(super) width: Option<usize>,
}

impl Compare {
    fn differences(&self) -> crate::Result<Differences> {
        diff(&open(&self.a)?, &open(&self.b)?)
    }

    /// What differs, in every respect. The exit code is diff(1)'s.
    pub(super) fn diff(&self, out: &mut impl Write) -> Answer {
        let found = self.differences()?;
        let code = if found.is_empty() { DONE } else { DIFFERENT };
        if self.json {
            let json = serde_json::to_string(&Report::new(self, &found))?;
            writeln!(out, "{}", text::json_safe(&json))?;
            return Ok(code);
        }
        if found.is_empty() {
            writeln!(out, "the same, bit for bit: {}", text::plural(found.compared, "tensor"))?;
            return Ok(code);
        }
        let changed: Vec<&Change> = found.changed.iter().collect();
        self.summary(out, &found, &changed)?;
        for (what, names) in [("only in the first", &found.removed), ("only in the second", &found.added)] {
            for name in names {
                writeln!(out, "{what}: {}", text::name(name))?;
            }
        }
        for tensor in &found.reshaped {
            let side = |(dtype, shape): &(DType, Vec<usize>)| format!("{dtype} {}", text::shape(shape));
            let (from, to) = (side(&tensor.from), side(&tensor.to));
            writeln!(out, "reshaped: {}  {from} -> {to}", text::name(&tensor.name))?;
        }
        for key in &found.metadata {
            writeln!(out, "metadata differs: {}", text::short_name(key))?;
        }
        Ok(code)
    }

    /// Which tensors a fine-tune changed, the most changed first; a frozen one that did fails.
    pub(super) fn changed(&self, out: &mut impl Write) -> Answer {
        let (a, b) = (open(&self.a)?, open(&self.b)?);
        let is_shown = |name: &str| self.filter.as_ref().is_none_or(|globs| globs.is_match(name));
        let is_frozen = |name: &str| self.frozen.iter().any(|glob| glob.is_match(name));
        // What matches nothing is misspelled: it would let everything pass.
        let names = || a.names().chain(b.names());
        if let Some(glob) = self.frozen.iter().find(|glob| !names().any(|name| glob.is_match(name))) {
            return Err(format!("no name of a tensor matches --frozen {:?}", glob.glob().glob()).into());
        }
        if !names().any(is_shown) {
            return Err("no name of a tensor matches --filter".into());
        }
        let found = diff(&a, &b)?;
        let mut changed: Vec<&Change> =
            found.changed.iter().filter(|change| is_shown(&change.name)).collect();
        // By share of the tensor, exactly: a/b > c/d as a*d > c*b.
        changed.sort_by(|a, b| {
            let share = |x: &Change, y: &Change| x.bytes as u128 * u128::from(y.nbytes);
            share(b, a).cmp(&share(a, b))
        });
        if self.json {
            let json = serde_json::to_string(&changed.iter().map(|c| Row::new(c)).collect::<Vec<_>>())?;
            writeln!(out, "{}", text::json_safe(&json))?;
        } else {
            self.summary(out, &found, &changed)?;
            let others = [("added", &found.added), ("removed", &found.removed)];
            for (what, names) in others {
                for name in names.iter().filter(|name| is_shown(name)) {
                    writeln!(out, "{what}: {}", text::name(name))?;
                }
            }
            for tensor in found.reshaped.iter().filter(|tensor| is_shown(&tensor.name)) {
                writeln!(out, "reshaped: {}", text::name(&tensor.name))?;
            }
        }
        let reshaped = found.reshaped.iter().map(|tensor| &tensor.name);
        let all = found.changed.iter().map(|change| &change.name);
        let moved = all.chain(reshaped).chain(&found.added).chain(&found.removed);
        let mut code = DONE;
        for name in moved.filter(|name| is_frozen(name)) {
            writeln!(std::io::stderr(), "maptensors: {} was to stay frozen, and changed", text::name(name))
                .ok();
            code = DIFFERENT;
        }
        Ok(code)
    }

    fn summary(&self, out: &mut impl Write, found: &Differences, changed: &[&Change]) -> std::io::Result<()> {
        let (elements, bytes) = changed.iter().fold((0u64, 0u64), |(elements, bytes), change| {
            (elements + change.elements as u64, bytes + change.bytes as u64)
        });
        let tensors = text::plural(found.compared, "tensor");
        let (elements, bytes) = (text::count(elements), text::size(bytes));
        writeln!(out, "{} of {tensors} changed: {elements} elements, {bytes}", changed.len())?;
        if changed.is_empty() {
            return Ok(());
        }
        writeln!(out)?;
        let mut table = Table::new(&["<tensor", ">elements", ">bytes", ">share", ">pages"]);
        for change in changed {
            table.rows.push(vec![
                text::name(&change.name),
                text::count(change.elements as u64),
                text::size(change.bytes as u64),
                text::percent(change.bytes as u64, change.nbytes),
                text::count(change.pages as u64),
            ]);
        }
        table.print(out, self.width)
    }
}

/// What `diff --json` prints; the keys are an interface.
#[derive(Serialize)]
struct Report<'a> {
    a: String,
    b: String,
    equal: bool,
    compared: usize,
    changed: Vec<Row<'a>>,
    added: &'a [String],
    removed: &'a [String],
    reshaped: Vec<Reshape<'a>>,
    metadata: &'a [String],
}

#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    elements: usize,
    bytes: usize,
    pages: usize,
    nbytes: u64,
}

#[derive(Serialize)]
struct Reshape<'a> {
    name: &'a str,
    from: (&'static str, &'a [usize]),
    to: (&'static str, &'a [usize]),
}

impl<'a> Row<'a> {
    fn new(change: &'a Change) -> Self {
        let Change { name, elements, bytes, pages, nbytes } = change;
        Self { name, elements: *elements, bytes: *bytes, pages: *pages, nbytes: *nbytes }
    }
}

impl<'a> Report<'a> {
    fn new(compare: &Compare, found: &'a Differences) -> Self {
        let reshaped = found.reshaped.iter().map(|tensor| Reshape {
            name: &tensor.name,
            from: (tensor.from.0.name(), &tensor.from.1),
            to: (tensor.to.0.name(), &tensor.to.1),
        });
        Self {
            a: compare.a.to_string_lossy().into(),
            b: compare.b.to_string_lossy().into(),
            equal: found.is_empty(),
            compared: found.compared,
            changed: found.changed.iter().map(Row::new).collect(),
            added: &found.added,
            removed: &found.removed,
            reshaped: reshaped.collect(),
            metadata: &found.metadata,
        }
    }
}

/// Models to hold against their checksums.
pub(super) struct Check {
    pub(super) paths: Vec<PathBuf>,
    /// Whether a file without checksums is none of our business.
    pub(super) missing_ok: bool,
    pub(super) json: bool,
}

/// What `verify --json` prints of a model; the keys are an interface.
#[derive(Serialize)]
struct Verified {
    path: String,
    tensors: usize,
    checksums: bool,
    damaged: Vec<String>,
    /// Where an index misstates it; no damage.
    total_size: Option<Misstated>,
    #[serde(skip)]
    is_known: bool,
}

#[derive(Serialize)]
struct Misstated {
    found: u64,
    expected: u64,
}

impl Check {
    /// Looks at all of them; the worst decides the exit code.
    pub(super) fn run(&self, out: &mut impl Write) -> Answer {
        let mut code = DONE;
        for path in &self.paths {
            match self.verify(path) {
                Ok((verified, trouble)) => {
                    self.tell(&verified, out)?;
                    if !verified.damaged.is_empty() {
                        code = code.max(DIFFERENT);
                    }
                    if let Some(error) = trouble {
                        complain(&error);
                        code = TROUBLE;
                    }
                }
                Err(error) => {
                    complain(&error);
                    code = TROUBLE;
                }
            }
        }
        Ok(code)
    }

    /// What is found, and what kept it from finding more.
    fn verify(&self, path: &Path) -> crate::Result<(Verified, Option<Error>)> {
        let model = open(path)?;
        let checksums = model.metadata().contains_key(diff::digest::CHECKSUMS);
        let (damaged, trouble) = match if checksums || !self.missing_ok { model.verify() } else { Ok(()) } {
            Ok(()) => (Vec::new(), None),
            Err(Error::Checksum { tensor, others, .. }) => {
                (std::iter::once(tensor).chain(others).collect(), None)
            }
            Err(error) => (Vec::new(), Some(error)),
        };
        let misstated = |(found, expected)| Misstated { found, expected };
        let verified = Verified {
            path: path.to_string_lossy().into(),
            tensors: model.len(),
            checksums,
            damaged,
            total_size: model.misstated_size().map(misstated),
            is_known: trouble.is_none(),
        };
        Ok((verified, trouble))
    }

    fn tell(&self, verified: &Verified, out: &mut impl Write) -> Result<(), Box<dyn std::error::Error>> {
        let Verified { path, tensors, checksums, damaged, total_size, .. } = verified;
        if self.json {
            writeln!(out, "{}", text::json_safe(&serde_json::to_string(verified)?))?;
            return Ok(());
        }
        let shown = printable(path);
        match (checksums, damaged.as_slice()) {
            _ if !verified.is_known => {}
            (true, []) => writeln!(out, "{shown}: {} as saved", text::plural(*tensors, "tensor"))?,
            (true, names) => {
                for name in names {
                    writeln!(out, "{shown}: damaged: {}", text::name(name))?;
                }
            }
            (false, _) => writeln!(out, "{shown}: no checksums")?,
        }
        if let Some(Misstated { found, expected }) = total_size {
            writeln!(
                out,
                "{shown}: warning: the index says total_size {found}, the tensors take {expected}"
            )?;
        }
        Ok(())
    }
}
