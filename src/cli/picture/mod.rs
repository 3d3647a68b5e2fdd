//! `maptensors inspect --map`: files as rows of cells, colored by dtype and shaded by what is in memory.

mod grid;
mod kind;
mod svg;
mod terminal;

use super::{DONE, FAILED, complain, inspect, text};
use crate::Error;
use crate::error::printable;
use crate::map::cached::Album;
use crate::os::open_regular;
use crate::save::{Pending, picture_may_be_at};
use grid::{Grid, Total, cell_size};
use kind::Kind;
use std::io::{self, IsTerminal as _, Write};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Which models to draw, and where to.
pub(super) struct Draw {
    pub(super) paths: Vec<PathBuf>,
    /// Of the terminal; `None`: not a terminal.
    pub(super) width: Option<usize>,
    pub(super) color: Color,
    /// A file to draw to, instead of standard output. Then there is one path.
    pub(super) svg: Option<PathBuf>,
}

/// When to use color.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Color {
    /// On a terminal, unless the environment has `NO_COLOR`
    Auto,
    Always,
    Never,
}

impl Color {
    fn is_wanted(self) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                // https://no-color.org: set, and not empty.
                let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
                let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
                !refused && !dumb && io::stdout().is_terminal()
            }
        }
    }
}

/// Where standard output has no width.
const USUAL_WIDTH: usize = 80;

/// What is said where residency cannot be.
const NOT_TOLD: &str =
    "what is in memory is told only to the owner of a file, and to those who may write to it";

impl Draw {
    /// Draws every model that can be opened and complains about the others.
    pub(super) fn run(&self, out: &mut impl Write) -> Result<u8, Box<dyn std::error::Error>> {
        let colored = self.color.is_wanted();
        let mut code = DONE;
        let mut shown = 0;
        for path in &self.paths {
            match self.draw(path, colored) {
                Ok(text) => {
                    if shown > 0 {
                        writeln!(out)?;
                    }
                    out.write_all(&text)?;
                    shown += 1;
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

    /// What is to be printed.
    fn draw(&self, path: &Path, colored: bool) -> crate::Result<Vec<u8>> {
        // First: to read a header brings pages in.
        let mut album = Album::of(path);
        let model = inspect::open(path)?;
        let mut text = Vec::new();
        if let Some(to) = &self.svg {
            picture_may_be_at(to)?;
            let svg = svg::draw(&Picture::of(path, &model, &mut album, svg::COLUMNS)?);
            write(to, svg.as_bytes())?;
            let (to, size) = (printable(&to.to_string_lossy()), text::size(svg.len() as u64));
            text.extend(format!("{to}: {size}\n").into_bytes());
        } else {
            let width = self.width.unwrap_or(USUAL_WIDTH);
            let picture = Picture::of(path, &model, &mut album, terminal::columns(width, colored))?;
            terminal::draw(&mut text, &picture, colored, width).map_err(Error::io(path, "drawing it"))?;
        }
        Ok(text)
    }
}

/// A model, about to be drawn.
struct Picture<'a> {
    path: &'a Path,
    /// All with cells of the same size.
    files: Vec<Grid<'a>>,
    columns: usize,
    size: u64,
    totals: [Total; Kind::COUNT],
}

impl<'a> Picture<'a> {
    fn of(path: &'a Path, model: &'a crate::Model, album: &mut Album, columns: usize) -> crate::Result<Self> {
        let shards = || (0..model.shards()).filter_map(|i| model.path(i).zip(model.layout(i)));
        let longest = shards().map(|(_, layout)| layout.file_len()).max().unwrap_or(0);
        let rows = match model.shards() {
            0..=1 => 32,
            2..=4 => 16,
            _ => 8,
        };
        let size = cell_size(longest, columns, rows);
        let mut picture = Self { path, files: Vec::new(), columns, size, totals: [Total::default(); _] };
        for (path, layout) in shards() {
            let padding = padding(path, layout.data_start())?;
            let cells = Grid::new(path.into(), layout, padding, album.find(path)?, size);
            cells.add_to(&mut picture.totals);
            picture.files.push(cells);
        }
        Ok(picture)
    }

    /// Whether the kernel tells of every file what is in memory.
    fn is_told(&self) -> bool {
        self.files.iter().all(|file| file.cached.is_some())
    }

    /// The kinds that there are: header and padding, then dtypes, the one with the most bytes first.
    fn kinds(&self) -> Vec<(Kind, Total)> {
        let dtypes = crate::DType::ALL.iter().map(|&dtype| Kind::Tensor(dtype));
        let kinds = [Kind::Header, Kind::Padding].into_iter().chain(dtypes);
        let mut kinds: Vec<(Kind, Total)> = kinds
            .map(|kind| (kind, self.totals[kind.index()]))
            .filter(|(_, total)| total.nbytes > 0)
            .collect();
        kinds.sort_by_key(|(kind, total)| match kind {
            Kind::Tensor(_) => (2, std::cmp::Reverse(total.nbytes)),
            other => (other.index(), std::cmp::Reverse(0)),
        });
        kinds
    }

    /// Two lines: the path; sizes, and how much is in memory.
    fn headline(&self) -> [String; 2] {
        let (nbytes, resident) = self
            .totals
            .iter()
            .fold((0, 0), |(nbytes, resident), total| (nbytes + total.nbytes, resident + total.resident));
        let files = text::plural(self.files.len(), "file");
        let (size, cell) = (text::size(nbytes), text::size(self.size));
        let in_memory = if self.is_told() {
            format!(", {} of it in memory", text::percent(resident, nbytes))
        } else {
            String::new()
        };
        let path = printable(&self.path.to_string_lossy());
        [path, format!("{files}, {size}{in_memory}; a cell is {cell}")]
    }
}

/// Where the spaces at the end of the header begin that the data starts behind.
fn padding(path: &Path, data_start: u64) -> crate::Result<u64> {
    let reading = "reading the end of its header";
    let (file, _) = open_regular(path)?;
    let mut block = [0; 4096];
    let mut end = data_start;
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let text = &mut block[..usize::try_from(end - start).unwrap_or(0)];
        file.read_exact_at(text, start).map_err(Error::io(path, reading))?;
        if let Some(last) = text.iter().rposition(|&byte| byte != b' ') {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(end)
}

/// Writes a file, whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> crate::Result<()> {
    let writing = "writing the picture";
    let pending = Pending::create(path)?;
    pending.file().write_all_at(bytes, 0).map_err(Error::io(path, writing))?;
    pending.publish(true)
}
