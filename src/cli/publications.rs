//! `maptensors publications`: what is published, by whom, and what it takes.

use super::readers::readers;
use super::table::Table;
use super::{DONE, FAILED, complain, text};
use crate::Publication;
use crate::error::printable;
use serde::Serialize;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Which publications to show, or to remove.
pub(super) struct Publications {
    /// None: all that have a name.
    pub(super) places: Vec<PathBuf>,
    pub(super) json: bool,
    pub(super) remove: bool,
    /// Columns to fit into, where there is a terminal.
    pub(super) width: Option<usize>,
}

/// What `--json` prints; the keys are an interface: add, but do not rename. All sizes are in bytes.
#[derive(Serialize)]
struct Listing<'a> {
    publications: Vec<Row<'a>>,
    totals: Totals,
}

#[derive(Serialize)]
struct Row<'a> {
    name: Option<&'a str>,
    path: String,
    generation: u64,
    tensors: usize,
    nbytes: u64,
    allocated: u64,
    spare: u64,
    unfinished: u64,
    publishing: bool,
    process: u64,
    /// Seconds since 1970.
    published: Option<f64>,
    /// Processes that map it. `None`: the system does not tell.
    readers: Option<usize>,
    damage: Option<&'a str>,
}

#[derive(Serialize)]
struct Totals {
    allocated: u64,
    /// Of these, where nobody publishes.
    unpublished: u64,
}

impl Publications {
    /// Shows every publication that there is, and complains about places where there is none.
    pub(super) fn run(&self, out: &mut impl Write) -> Result<u8, Box<dyn std::error::Error>> {
        if self.remove {
            return self.take_away(out);
        }
        let mut code = DONE;
        let found = if self.places.is_empty() {
            Publication::all()?
        } else {
            let mut found = Vec::new();
            for place in &self.places {
                match Publication::at(place) {
                    Ok(publication) => found.push(publication),
                    Err(error) => {
                        complain(&error);
                        code = FAILED;
                    }
                }
            }
            found
        };
        let listing = Listing::of(&found);
        if self.json {
            let json = serde_json::to_string(&listing)?;
            writeln!(out, "{}", text::json_safe(&json))?;
        } else if code == DONE || !found.is_empty() {
            listing.show(out, self.width)?;
        }
        Ok(code)
    }

    /// Takes one after the other away; what cannot be is complained about, and the others are.
    fn take_away(&self, out: &mut impl Write) -> Result<u8, Box<dyn std::error::Error>> {
        let mut code = DONE;
        for place in &self.places {
            let removed = Publication::at(place).and_then(|found| {
                // Before their files are gone.
                let readers = readers(&[found.segments()]);
                Ok((found.remove()?, readers.map_or(0, |readers| readers[0])))
            });
            match removed {
                Ok((freed, readers)) => {
                    let held = match readers {
                        0 => String::new(),
                        1 => "; what 1 process has mapped is free once it lets go".into(),
                        n => format!("; what {n} processes have mapped is free once they let go"),
                    };
                    writeln!(out, "{}: removed, {} freed{held}", shown(place), text::size(freed))?;
                }
                Err(error) => {
                    out.flush()?;
                    complain(&error);
                    code = FAILED;
                }
            }
        }
        Ok(code)
    }
}

impl<'a> Listing<'a> {
    fn of(found: &'a [Publication]) -> Self {
        let segments: Vec<_> = found.iter().map(Publication::segments).collect();
        let readers = readers(&segments);
        let row = |(i, found): (usize, &'a Publication)| Row {
            name: found.name.as_deref(),
            path: found.path.to_string_lossy().into(),
            generation: found.generation,
            tensors: found.tensors,
            nbytes: found.nbytes,
            allocated: found.allocated,
            spare: found.spare,
            unfinished: found.unfinished,
            publishing: found.publishing,
            process: found.process,
            published: found.published.and_then(|at| Some(at.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())),
            readers: readers.as_ref().map(|readers| readers[i]),
            damage: found.damage.as_deref(),
        };
        let publications: Vec<Row<'_>> = found.iter().enumerate().map(row).collect();
        let sum = |rows: &mut dyn Iterator<Item = &Row<'_>>| {
            rows.map(|row| row.allocated).fold(0, u64::saturating_add)
        };
        let allocated = sum(&mut publications.iter());
        let unpublished = sum(&mut publications.iter().filter(|row| !row.publishing));
        Self { publications, totals: Totals { allocated, unpublished } }
    }

    fn show(&self, out: &mut impl Write, width: Option<usize>) -> io::Result<()> {
        if self.publications.is_empty() {
            return writeln!(out, "nothing is published under a name");
        }
        self.table().print(out, width)?;
        for row in &self.publications {
            if let Some(damage) = row.damage {
                writeln!(out, "\n{}: {}", row.called(), printable(damage))?;
            }
        }
        let Totals { allocated, unpublished } = self.totals;
        let abandoned = match unpublished {
            0 => String::new(),
            bytes => format!(", {} of it where nobody publishes", text::size(bytes)),
        };
        let all = text::plural(self.publications.len(), "publication");
        writeln!(out, "\n{all}: {}{abandoned}", text::size(allocated))
    }

    fn table(&self) -> Table {
        let (spare, unfinished) = (self.any(|row| row.spare > 0), self.any(|row| row.unfinished > 0));
        let mut columns = vec!["<NAME", ">GEN", ">TENSORS", ">SIZE", ">TAKES"];
        columns.extend(spare.then_some(">SPARE"));
        columns.extend(unfinished.then_some(">UNFINISHED"));
        columns.extend([">PUBLISHER", ">READERS", ">AGE"]);
        let mut table = Table::new(&columns);
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        for row in &self.publications {
            let mut cells = vec![row.called(), row.generation.to_string(), text::count(row.tensors as u64)];
            cells.extend([row.nbytes, row.allocated].map(text::size));
            cells.extend(spare.then(|| text::size(row.spare)));
            cells.extend(unfinished.then(|| text::size(row.unfinished)));
            cells.push(or_none(row.publishing.then(|| match row.process {
                0 => "?".into(),
                process => process.to_string(),
            })));
            cells.push(or_none(row.readers.map(|readers| text::count(readers as u64))));
            let since =
                row.published.and_then(|at| UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(at).ok()?));
            cells
                .push(or_none(since.map(|at| age(SystemTime::now().duration_since(at).unwrap_or_default()))));
            table.rows.push(cells);
        }
        table
    }

    fn any(&self, has: impl Fn(&Row<'_>) -> bool) -> bool {
        self.publications.iter().any(has)
    }
}

impl Row<'_> {
    /// By which it can be removed.
    fn called(&self) -> String {
        text::name(self.name.unwrap_or(&self.path))
    }
}

fn shown(place: &Path) -> String {
    text::name(&place.to_string_lossy())
}

/// `3 min`.
fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_told_in_the_unit_that_fits() {
        for (seconds, expected) in
            [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"), (172_800, "2 days")]
        {
            assert_eq!(age(Duration::from_secs(seconds)), expected);
        }
    }
}
