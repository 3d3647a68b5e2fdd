//! `maptensors prefetch`, `evict` and `checksum`: models by their pages.

use super::inspect::matches_any;
use super::{DONE, FAILED, complain, is_broken_pipe, text};
use crate::diff::hash_all;
use crate::error::printable;
use crate::map::may_ask;
use crate::{Model, Select, StreamOptions};
use globset::GlobSet;
use indicatif::{ProgressBar, ProgressStyle};
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Which tensors of which models.
pub(super) struct Chosen {
    pub(super) paths: Vec<PathBuf>,
    /// `None`: every tensor.
    pub(super) filter: Option<GlobSet>,
}

impl Chosen {
    fn select(&self) -> Select<'_> {
        match &self.filter {
            None => Select::from(..),
            Some(filter) => Select::matching(|name| filter.is_match(name)),
        }
    }

    /// Does `work` with every model that can be opened, and complains about the others.
    fn each<W: Write>(
        &self,
        out: &mut W,
        mut work: impl FnMut(&str, Model, &mut W) -> Result<(), Box<dyn Error>>,
    ) -> Result<u8, Box<dyn Error>> {
        let mut code = DONE;
        for path in &self.paths {
            let shown = printable(&path.to_string_lossy());
            let chosen = |model: Model| {
                matches_any(&model, self.filter.as_ref(), path)?;
                work(&shown, model, out)
            };
            match open(path).map_err(Box::from).and_then(chosen) {
                Ok(()) => {}
                Err(error) if is_broken_pipe(&*error) => return Err(error),
                Err(error) => {
                    out.flush()?;
                    complain(&*error);
                    code = FAILED;
                }
            }
        }
        Ok(code)
    }
}

/// Bringing models into memory.
pub(super) struct Prefetch {
    pub(super) chosen: Chosen,
    /// Whether to hold them there until interrupted.
    pub(super) lock: bool,
}

impl Prefetch {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<u8, Box<dyn Error>> {
        let mut held = Vec::new();
        let code = self.chosen.each(out, |path, model, out| {
            let select = self.chosen.select();
            let prefetch = if self.lock { model.prefetch_and_lock(select) } else { model.prefetch(select) }?;
            let (_, bytes) = prefetch.progress();
            let bar = progress_bar(path, bytes);
            while !prefetch.is_done() {
                bar.set_position(prefetch.progress().0);
                std::thread::sleep(Duration::from_millis(10));
            }
            bar.finish_and_clear();
            prefetch.wait()?;
            let what = if self.lock { "locked in memory" } else { "in memory" };
            writeln!(out, "{path}: {} {what}", text::size(bytes))?;
            if self.lock {
                held.push(model);
            }
            Ok(())
        })?;
        if !held.is_empty() {
            writeln!(out, "held until interrupted")?;
            out.flush()?;
            loop {
                std::thread::park();
            }
        }
        Ok(code)
    }
}

/// Gives the memory of models back.
pub(super) fn evict(chosen: &Chosen, out: &mut impl Write) -> Result<u8, Box<dyn Error>> {
    chosen.each(out, |path, model, out| {
        let told = (0..model.shards())
            .filter_map(|shard| model.path(shard))
            .all(|path| std::fs::File::open(path).and_then(|file| may_ask(&file)).unwrap_or(true));
        let freed = text::size(model.evict(chosen.select())?.freed);
        if !told {
            writeln!(out, "{path}: given back; how much of another user's file is in memory is not told")?;
            return Ok(());
        }
        // The pages at the ends too, which others have a part in.
        let left = model.residency_of(chosen.select())?;
        let left = text::size((left.resident * left.page_size) as u64);
        writeln!(out, "{path}: {freed} freed, {left} still in memory")?;
        Ok(())
    })
}

/// Computing checksums, in a bounded part of memory.
pub(super) struct Checksum {
    pub(super) chosen: Chosen,
    /// Bytes to read ahead.
    pub(super) budget: u64,
}

impl Checksum {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<u8, Box<dyn Error>> {
        self.chosen.each(out, |path, model, out| {
            let of = if self.chosen.paths.len() > 1 { format!("{path}: ") } else { String::new() };
            let options = StreamOptions::new().budget(self.budget).select(self.chosen.select());
            let bytes = model.tensors().filter(|tensor| self.wants(tensor.name()));
            let bar = progress_bar(path, bytes.map(|tensor| tensor.info().nbytes()).sum());
            for tensor in model.stream(options)? {
                let tensor = tensor?;
                let data = tensor.as_bytes();
                let sums = hash_all(&[data.len()], |_, part, to| {
                    to.copy_from_slice(&data[part]);
                    bar.inc(to.len() as u64);
                    Ok(())
                })?;
                for sum in sums {
                    let name = text::name(tensor.name());
                    bar.suspend(|| writeln!(out, "{sum:032x}  {of}{name}"))?;
                }
            }
            bar.finish_and_clear();
            Ok(())
        })
    }

    fn wants(&self, name: &str) -> bool {
        self.chosen.filter.as_ref().is_none_or(|filter| filter.is_match(name))
    }
}

/// Bytes, such as `2GiB` (1024 to the power of 3), `500MB` (1000 squared) or `4096`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no number of bytes such as 2GiB, 500MB or 4096");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_uppercase();
    let unit = unit.strip_suffix('B').unwrap_or(&unit);
    let powers = ["", "K", "M", "G", "T"];
    let (base, unit) = unit.strip_suffix('I').map_or((1000u64, unit), |unit| (1024, unit));
    // There is no "iB".
    let known = powers.iter().position(|known| *known == unit).filter(|power| base == 1000 || *power > 0);
    let power = known.ok_or_else(wrong)?;
    let scale = base.pow(u32::try_from(power).unwrap_or_default());
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let part: f64 = format!("0.{part}").parse().map_err(|_| wrong())?;
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let part = (part * scale as f64) as u64;
    let bytes = whole.checked_mul(scale).and_then(|bytes| bytes.checked_add(part));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(wrong)
}

/// On standard error, if that is a terminal.
fn progress_bar(path: &str, bytes: u64) -> ProgressBar {
    let style =
        "{prefix}  {bar:30} {binary_bytes:>10} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta}";
    let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_style(style).with_prefix(path.to_owned())
}

#[allow(unsafe_code)]
fn open(path: &Path) -> crate::Result<Model> {
    // SAFETY: the stable-file contract, which the command's help puts to who types it: nobody writes to the
    // file meanwhile.
    unsafe { Model::open(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("2GiB", 2 << 30),
            ("2gib", 2 << 30),
            ("2G", 2_000_000_000),
            ("1.5 MB", 1_500_000),
            ("0.5KiB", 512),
            ("3T", 3_000_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "0", "GiB", "-1", "2 apples", "1e9", "99999999999T", "1.2.3", "2iB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
