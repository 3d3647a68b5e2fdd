//! What was typed.

use super::Job;
use super::compare::{Check, Compare};
use super::delta::{Apply, Make};
use super::edit::Edit;
use super::inspect::{Format, Inspect};
use crate::HeaderEdit;
use clap::{Args, Parser, Subcommand};
use globset::{Glob, GlobSet, GlobSetBuilder};
use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  maptensors inspect model.safetensors   what is in a file
  maptensors inspect checkpoint/         the same for a sharded set, or a directory
  maptensors edit model.safetensors --set license=MIT
                                         change metadata, not the data behind it
  maptensors diff a.safetensors b.safetensors
  maptensors verify checkpoint/          hold it against its own checksums
  maptensors demo                        open, use, edit and save a small model

Exit codes: 0 done, 1 failed, 2 the command line is not understood; diff, changed
and verify have their own.";

const DIFF_EXAMPLES: &str = "\
Examples:
  maptensors diff model.safetensors tuned.safetensors
  maptensors diff a/ b/ --json | jq '.changed[].name'
  maptensors diff a.safetensors b.safetensors > /dev/null && echo the same

Tensors are compared bit by bit, whatever their order and the files they are in.
Nobody may write to the files meanwhile; renaming over them is fine.

Exit codes: 0 the same, 1 different, 2 trouble.";

const CHANGED_EXAMPLES: &str = "\
Examples:
  maptensors changed model.safetensors tuned.safetensors
  maptensors changed base/ tuned/ --filter '*.bias'
  maptensors changed base/ tuned/ --frozen 'embed.*' --frozen 'layers.0.*'

Only what changed is listed, the largest share first.

Exit codes: 0 done, 1 a frozen tensor changed, 2 trouble.";

const VERIFY_EXAMPLES: &str = "\
Examples:
  maptensors verify model.safetensors
  maptensors verify --missing-ok *.safetensors

Files carry checksums when they were saved so: SaveOptions::checksums in Rust,
checksums=True in Python. They find damage, not deceit.

Exit codes: 0 as saved, 1 damaged (the tensors are named), 2 trouble, such as
a file without checksums.";

const DELTA_EXAMPLES: &str = "\
Examples:
  maptensors delta model.safetensors tuned.safetensors tuned.delta.safetensors
  maptensors apply model.safetensors tuned.delta.safetensors again.safetensors

A delta holds the elements that differ, bit for bit, and knows which model it
is for. Where BASE carries checksums, applying it does not read all of BASE.";

const APPLY_EXAMPLES: &str = "\
Examples:
  maptensors apply model.safetensors one.delta.safetensors tuned.safetensors
  maptensors apply model.safetensors 1.delta 2.delta 3.delta tuned.safetensors

Each delta must have been made against what the ones before it make; another
model is refused. A base that carries checksums is known by them: verify it where
they may be stale. On xfs and btrfs the result shares unchanged blocks with BASE.";

const INSPECT_EXAMPLES: &str = "\
Examples:
  maptensors inspect model.safetensors
  maptensors inspect checkpoint/ --summary
  maptensors inspect model.safetensors --filter '*.bias' --filter 'layers.0.*'
  maptensors inspect *.safetensors --json | jq '.totals.nbytes'
  maptensors inspect model.safetensors --json \\
      | jq -r '.tensors[] | select(.aligned | not) | .name'

`align` is the largest power of two, at most 4096, that divides a tensor's place
in the file. A `!` behind it: too little for the dtype, so Python gets a copy.";

const EDIT_EXAMPLES: &str = "\
Examples:
  maptensors edit model.safetensors --set license=MIT --set step=1000
  maptensors edit model.safetensors --unset draft
  maptensors edit model.safetensors --rename transformer.wte.weight=wte.weight
  maptensors edit a.safetensors --rename w=v --rename v=w    two exchange names

Tensor data is neither read nor changed. A small change is made in place, by one
write that a power loss cannot tear, if nobody else has the file open; otherwise
a new file takes its place, whole or not at all. It shares the old one's blocks
where the file system can do that, and leaves room for later edits in place.
What stands before the first `=` is the key, or the tensor's old name.";

const DEMO_EXAMPLES: &str = "\
Examples:
  maptensors demo
  maptensors demo --dir demo/ && maptensors inspect demo/digits-tuned.safetensors

It fails, with exit code 1, if what it shows turns out not to be so.";

/// Look into safetensors models, and change their headers, without loading them.
#[derive(Parser)]
#[command(
    name = "maptensors",
    bin_name = "maptensors",
    version,
    arg_required_else_help = true,
    after_help = EXAMPLES,
    max_term_width = 80
)]
pub(super) struct Typed {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Inspect(InspectArgs),
    Edit(EditArgs),
    Diff(DiffArgs),
    Changed(ChangedArgs),
    Verify(VerifyArgs),
    Delta(DeltaArgs),
    Apply(ApplyArgs),
    Demo(DemoArgs),
}

/// Show tensors, metadata and totals of models; only headers are read.
#[derive(Args)]
#[command(after_help = INSPECT_EXAMPLES)]
struct InspectArgs {
    /// A .safetensors file, a .safetensors.index.json, or a directory with either
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// Only tensors whose name matches; may be given several times. `*` also matches dots and slashes
    #[arg(short, long = "filter", value_name = "GLOB", value_parser = Glob::new)]
    filters: Vec<Glob>,

    /// One JSON document per path, each on a line, with exact numbers
    #[arg(long)]
    json: bool,

    /// Leave out the list of tensors
    #[arg(short, long, visible_alias = "no-tensors")]
    summary: bool,
}

/// Change metadata or rename tensors, without rewriting the data.
#[derive(Args)]
#[command(
    after_help = EDIT_EXAMPLES,
    override_usage = "maptensors edit PATH... [--set K=V] [--unset K] [--rename OLD=NEW]"
)]
struct EditArgs {
    /// The .safetensors files to change, each in the same way
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    #[command(flatten)]
    changes: ChangeArgs,

    /// Do not wait until the change is on the disk
    #[arg(long)]
    no_sync: bool,
}

/// At least one of these.
#[derive(Args)]
#[group(required = true, multiple = true)]
struct ChangeArgs {
    /// Set a metadata entry; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,

    /// Remove a metadata entry; may be given several times
    #[arg(long, value_name = "KEY")]
    unset: Vec<String>,

    /// Give a tensor another name; may be given several times, all at once
    #[arg(long, value_name = "OLD=NEW", value_parser = pair)]
    rename: Vec<(String, String)>,
}

/// Show how two models differ: elements, tensors, shapes, metadata.
#[derive(Args)]
#[command(after_help = DIFF_EXAMPLES)]
struct DiffArgs {
    /// A .safetensors file, a .safetensors.index.json, or a directory with either
    #[arg(value_name = "A")]
    a: PathBuf,

    /// What to compare with it
    #[arg(value_name = "B")]
    b: PathBuf,

    /// One JSON document, with exact numbers
    #[arg(long)]
    json: bool,
}

/// Show which tensors a fine-tune changed, and how much of each.
#[derive(Args)]
#[command(after_help = CHANGED_EXAMPLES)]
struct ChangedArgs {
    /// The model before
    #[arg(value_name = "BASE")]
    base: PathBuf,

    /// The model after
    #[arg(value_name = "TUNED")]
    tuned: PathBuf,

    /// Only tensors whose name matches; may be given several times
    #[arg(short, long = "filter", value_name = "GLOB", value_parser = Glob::new)]
    filters: Vec<Glob>,

    /// Fail if a tensor whose name matches changed; may be given several times
    #[arg(long = "frozen", value_name = "GLOB", value_parser = Glob::new)]
    frozen: Vec<Glob>,

    /// A JSON list, with exact numbers
    #[arg(long)]
    json: bool,
}

/// Hold models against the checksums they carry; reads everything.
#[derive(Args)]
#[command(after_help = VERIFY_EXAMPLES)]
struct VerifyArgs {
    /// A .safetensors file, a .safetensors.index.json, or a directory with either
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// A file without checksums is not an error
    #[arg(long)]
    missing_ok: bool,
}

/// Write what turns one model into another to a small file.
#[derive(Args)]
#[command(after_help = DELTA_EXAMPLES)]
struct DeltaArgs {
    /// The model that is there already where the delta goes
    #[arg(value_name = "BASE")]
    base: PathBuf,

    /// The model that it is to become
    #[arg(value_name = "NEW")]
    new: PathBuf,

    /// The delta
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

/// Write the model that a base and deltas make to one file.
#[derive(Args)]
#[command(after_help = APPLY_EXAMPLES, override_usage = "maptensors apply <BASE> <DELTA>... <OUT>")]
struct ApplyArgs {
    /// The base, deltas in order, and the file to write
    #[arg(required = true, num_args = 3.., value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// Open, use, fine-tune and save a small model, measuring each step.
#[derive(Args)]
#[command(after_help = DEMO_EXAMPLES)]
struct DemoArgs {
    /// Keep the demo's files in DIR [default: a temporary directory, removed at the end]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Reads the command line; the error is also how help is asked for.
pub(super) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Typed, clap::Error> {
    Typed::try_parse_from(args)
}

impl Typed {
    /// What it means, on a terminal of so many columns.
    pub(super) fn meaning(self, width: Option<usize>) -> Result<Job, Box<dyn Error>> {
        Ok(match self.command {
            Command::Inspect(typed) => Job::Inspect(Inspect {
                filter: filter(&typed.filters)?,
                format: if typed.json { Format::Json } else { Format::Table { width } },
                list: !typed.summary,
                paths: typed.paths,
            }),
            Command::Edit(typed) => Job::Edit(Edit {
                changes: typed.changes.meaning().durable(!typed.no_sync),
                paths: typed.paths,
            }),
            Command::Diff(DiffArgs { a, b, json }) => {
                Job::Diff(Compare { a, b, filter: None, frozen: None, json, width })
            }
            Command::Changed(typed) => Job::Changed(Compare {
                a: typed.base,
                b: typed.tuned,
                filter: filter(&typed.filters)?,
                frozen: filter(&typed.frozen)?,
                json: typed.json,
                width,
            }),
            Command::Verify(VerifyArgs { paths, missing_ok }) => Job::Verify(Check { paths, missing_ok }),
            Command::Delta(DeltaArgs { base, new, out }) => Job::Delta(Make { base, new, out }),
            Command::Apply(ApplyArgs { paths }) => {
                // Three at least: the parser sees to it.
                let mut paths = paths.into_iter();
                let (base, out) = (paths.next().unwrap_or_default(), paths.next_back().unwrap_or_default());
                Job::Apply(Apply { base, deltas: paths.collect(), out })
            }
            Command::Demo(typed) => Job::Demo { dir: typed.dir },
        })
    }
}

impl ChangeArgs {
    fn meaning(self) -> HeaderEdit {
        let mut edit = HeaderEdit::new();
        for (key, value) in self.set {
            edit = edit.set(key, value);
        }
        for key in self.unset {
            edit = edit.remove(key);
        }
        for (tensor, name) in self.rename {
            edit = edit.rename(tensor, name);
        }
        edit
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("there is no `=` in it")?;
    Ok((key.into(), value.into()))
}

/// `None`: every tensor.
fn filter(globs: &[Glob]) -> Result<Option<GlobSet>, globset::Error> {
    if globs.is_empty() {
        return Ok(None);
    }
    let mut set = GlobSetBuilder::new();
    for glob in globs {
        set.add(glob.clone());
    }
    set.build().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_arguments_do_not_contradict_each_other() {
        Typed::command().debug_assert();
    }
}
