//! What was typed.

use super::Job;
use super::compare::{Check, Compare};
use super::delta::{Apply, Make};
use super::edit::Edit;
use super::help;
use super::inspect::{Format, Inspect};
use super::pages::{self, Checksum, Chosen, Prefetch};
use super::picture::{Color, Draw};
use super::publications::Publications;
use super::top::Top;
use crate::HeaderEdit;
use crate::error::quote;
use clap::{Args, Parser, Subcommand};
use globset::{Glob, GlobSet, GlobSetBuilder};
use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Look into safetensors models, and change their headers, without loading them.
#[derive(Parser)]
#[command(
    name = "maptensors",
    bin_name = "maptensors",
    version,
    arg_required_else_help = true,
    after_help = help::MAIN,
    max_term_width = 80
)]
pub(super) struct Typed {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Inspect(InspectArgs),
    Top(TopArgs),
    Publications(PublicationsArgs),
    Prefetch(PrefetchArgs),
    Evict(EvictArgs),
    Checksum(ChecksumArgs),
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
#[command(after_help = help::INSPECT)]
struct InspectArgs {
    /// A .safetensors file, a .safetensors.index.json, a directory with either, or a publication's name or directory
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

    /// Draw the files instead: what lies where, and what of it is in memory
    #[arg(short, long, conflicts_with_all = ["filters", "json", "summary"])]
    map: bool,

    /// Draw to a file, of one model
    #[arg(long, value_name = "OUT", requires = "map")]
    svg: Option<PathBuf>,

    /// Whether the map has colors
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Color::Auto)]
    color: Color,
}

/// Show which processes map a model's files, and how much of them each has in memory.
#[derive(Args)]
#[command(after_help = help::TOP)]
struct TopArgs {
    /// A file of any kind, a .safetensors.index.json, a directory (of a model, or all files in it), or a publication's
    /// name
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// Look again every so many seconds, until interrupted
    #[arg(short, long, value_name = "SECONDS", value_parser = seconds)]
    interval: Option<Duration>,

    /// One JSON document each time, on a line, with exact numbers
    #[arg(long)]
    json: bool,
}

/// Show what is published in memory, and what it takes; remove what was left behind.
#[derive(Args)]
#[command(after_help = help::PUBLICATIONS)]
struct PublicationsArgs {
    /// A publication's name, or its directory (with a slash) [default: all that have a name]
    #[arg(value_name = "PLACE")]
    places: Vec<PathBuf>,

    /// One JSON document, with exact numbers
    #[arg(long)]
    json: bool,

    /// Take these away, with all that their publishers left; refused while anybody publishes
    #[arg(long, requires = "places", conflicts_with = "json")]
    remove: bool,
}

/// Which tensors of which models.
#[derive(Args)]
struct ChosenArgs {
    /// A .safetensors file, a .safetensors.index.json, or a directory with either
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// Only tensors whose name matches; may be given several times. `*` also matches dots and slashes
    #[arg(short, long = "filter", value_name = "GLOB", value_parser = Glob::new)]
    filters: Vec<Glob>,
}

/// Read models into memory (the page cache), so that opening them finds them there.
#[derive(Args)]
#[command(after_help = help::PREFETCH)]
struct PrefetchArgs {
    #[command(flatten)]
    chosen: ChosenArgs,

    /// Hold them in memory until interrupted: nothing else can take their place
    #[arg(long)]
    lock: bool,
}

/// Give the memory that models take back to the system.
#[derive(Args)]
#[command(after_help = help::EVICT)]
struct EvictArgs {
    #[command(flatten)]
    chosen: ChosenArgs,
}

/// Print the checksum of each tensor, in a bounded part of memory.
#[derive(Args)]
#[command(after_help = help::CHECKSUM)]
struct ChecksumArgs {
    #[command(flatten)]
    chosen: ChosenArgs,

    /// Bytes of memory to read ahead in: 4096, 500MB, 2GiB
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = pages::parse_size)]
    budget: u64,
}

/// Change metadata or rename tensors, without rewriting the data.
#[derive(Args)]
#[command(
    after_help = help::EDIT,
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
    #[arg(long, value_name = "KEY=VALUE", value_parser = entry)]
    set: Vec<(String, String)>,

    /// Remove a metadata entry; may be given several times
    #[arg(long, value_name = "KEY")]
    unset: Vec<String>,

    /// Give a tensor another name; may be given several times, all at once
    #[arg(long, value_name = "OLD=NEW", value_parser = key_and_value)]
    rename: Vec<(String, String)>,
}

/// Show how two models differ: elements, tensors, shapes, metadata.
#[derive(Args)]
#[command(after_help = help::DIFF)]
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
#[command(after_help = help::CHANGED)]
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
#[command(after_help = help::VERIFY)]
struct VerifyArgs {
    /// A .safetensors file, a .safetensors.index.json, or a directory with either
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// A file without checksums is not an error
    #[arg(long)]
    missing_ok: bool,

    /// One JSON document per path, each on a line
    #[arg(long)]
    json: bool,
}

/// Write what turns one model into another to a small file.
#[derive(Args)]
#[command(after_help = help::DELTA)]
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
#[command(after_help = help::APPLY, override_usage = "maptensors apply <BASE> <DELTA>... <OUT>")]
struct ApplyArgs {
    /// The base, deltas in order, and the file to write
    #[arg(required = true, num_args = 3.., value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// Open, use, fine-tune and save a small model, measuring each step.
#[derive(Args)]
#[command(after_help = help::DEMO)]
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
            Command::Inspect(InspectArgs { map: true, paths, svg, color, .. }) => {
                if svg.is_some() && paths.len() > 1 {
                    return Err("--svg draws one model: run it once for each path, with another OUT".into());
                }
                Job::Draw(Draw { paths, width, color, svg })
            }
            Command::Prefetch(PrefetchArgs { chosen, lock }) => {
                Job::Prefetch(Prefetch { chosen: chosen.meaning()?, lock })
            }
            Command::Evict(EvictArgs { chosen }) => Job::Evict(chosen.meaning()?),
            Command::Checksum(ChecksumArgs { chosen, budget }) => {
                Job::Checksum(Checksum { chosen: chosen.meaning()?, budget })
            }
            Command::Top(TopArgs { paths, interval, json }) => Job::Top(Top { paths, json, interval, width }),
            Command::Publications(PublicationsArgs { places, json, remove }) => {
                Job::Publications(Publications { places, json, remove, width })
            }
            Command::Inspect(typed) => Job::Inspect(Inspect {
                filter: filter(&typed.filters)?,
                format: if typed.json { Format::Json } else { Format::Table { width } },
                list: !typed.summary,
                paths: typed.paths,
            }),
            Command::Edit(typed) => Job::Edit(Edit {
                changes: typed.changes.meaning()?.durable(!typed.no_sync),
                paths: typed.paths,
            }),
            Command::Diff(DiffArgs { a, b, json }) => {
                Job::Diff(Compare { a, b, filter: None, frozen: Vec::new(), json, width })
            }
            Command::Changed(typed) => Job::Changed(Compare {
                a: typed.base,
                b: typed.tuned,
                filter: filter(&typed.filters)?,
                frozen: typed.frozen.iter().map(Glob::compile_matcher).collect(),
                json: typed.json,
                width,
            }),
            Command::Verify(VerifyArgs { paths, missing_ok, json }) => {
                Job::Verify(Check { paths, missing_ok, json })
            }
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

impl ChosenArgs {
    fn meaning(self) -> Result<Chosen, globset::Error> {
        Ok(Chosen { filter: filter(&self.filters)?, paths: self.paths })
    }
}

impl ChangeArgs {
    /// # Errors
    /// For what contradicts itself: no order of options is asked for, so none decides.
    fn meaning(self) -> Result<HeaderEdit, Box<dyn Error>> {
        let mut edit = HeaderEdit::new();
        let mut keys = BTreeMap::new();
        for (key, value) in self.set {
            if keys.insert(key.clone(), Some(value.clone())).is_some_and(|other| other != Some(value.clone()))
            {
                return Err(format!("--set {}: it is set twice, to two values", quote(&key)).into());
            }
            edit = edit.metadata(key, value);
        }
        for key in self.unset {
            if keys.contains_key(&key) {
                return Err(format!("{} is to be set and removed", quote(&key)).into());
            }
            edit = edit.remove(key);
        }
        let mut names = BTreeMap::new();
        for (tensor, name) in self.rename {
            if name.is_empty() {
                return Err(
                    format!("--rename {}: there is no new name behind the `=`", quote(&tensor)).into()
                );
            }
            if names.insert(tensor.clone(), name.clone()).is_some_and(|other| other != name) {
                return Err(format!("--rename {}: it has two new names", quote(&tensor)).into());
            }
            edit = edit.rename(tensor, name);
        }
        Ok(edit)
    }
}

/// A metadata entry. One without a key has lost it on the way.
fn entry(text: &str) -> Result<(String, String), String> {
    let (key, value) = key_and_value(text)?;
    if key.is_empty() { Err("there is no key before the `=`".into()) } else { Ok((key, value)) }
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("there is no `=` in it")?;
    Ok((key.into(), value.into()))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "it is not a number of seconds")?;
    let interval = Duration::try_from_secs_f64(seconds).map_err(|_| "there is no such time")?;
    if interval < Duration::from_millis(10) {
        return Err("the least is 0.01".into());
    }
    Ok(interval)
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
