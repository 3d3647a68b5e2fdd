//! What was typed.

use super::Job;
use super::inspect::{Format, Inspect};
use clap::{Args, Parser, Subcommand};
use globset::{Glob, GlobSet, GlobSetBuilder};
use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  maptensors inspect model.safetensors   what is in a file
  maptensors inspect checkpoint/         the same for a sharded set, or a directory
  maptensors demo                        open, use, edit and save a small model

Exit codes: 0 done, 1 failed, 2 the command line is not understood.";

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

const DEMO_EXAMPLES: &str = "\
Examples:
  maptensors demo
  maptensors demo --dir demo/ && maptensors inspect demo/digits-tuned.safetensors

It fails, with exit code 1, if what it shows turns out not to be so.";

/// Look into safetensors models without loading them.
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
            Command::Demo(typed) => Job::Demo { dir: typed.dir },
        })
    }
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
