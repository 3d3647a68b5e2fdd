//! A picture for the terminal, or for a pipe.

use super::grid::{Grid, Level, Total};
use super::kind::Kind;
use super::{NOT_TOLD, Picture};
use crate::cli::table::Table;
use crate::cli::text;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::ops::Range;

/// Of an offset before a row: `1023.9 KiB`.
const LABEL: usize = 10;
const GAP: &str = "  ";

/// How much is in memory, as ink.
const fn shade(level: Level) -> char {
    match level {
        Level::None => '░',
        Level::Some => '▒',
        Level::Most => '▓',
        Level::All => '█',
    }
}

/// Grid to a row, a power of two: one picture where there is color, else letters and shades side by side.
pub(super) fn columns(width: usize, colored: bool) -> usize {
    let room = width.saturating_sub(LABEL + GAP.len());
    let room = if colored { room } else { room.saturating_sub(GAP.len()) / 2 };
    1 << room.clamp(8, 256).ilog2()
}

/// `width` is what lines are to fit.
pub(super) fn draw(out: &mut impl Write, picture: &Picture, colored: bool, width: usize) -> io::Result<()> {
    /// Less of a name is no use.
    const NARROWEST_NAME: usize = 16;
    let columns = picture.columns;
    let pictures = if colored { 1 } else { 2 };
    let room = width.saturating_sub(LABEL + (GAP.len() + columns) * pictures + GAP.len());
    let room = Some(room).filter(|&room| room >= NARROWEST_NAME);
    for line in picture.headline() {
        writeln!(out, "{line}")?;
    }
    for file in &picture.files {
        writeln!(out)?;
        if picture.files.len() > 1 {
            writeln!(out, "{}", file.headline())?;
        }
        rows(out, file, columns, colored, room)?;
    }
    writeln!(out)?;
    legend(out, picture, colored)
}

/// With `room` for that many characters, each row ends with the first tensor that starts in it.
fn rows(
    out: &mut impl Write,
    file: &Grid,
    columns: usize,
    colored: bool,
    room: Option<usize>,
) -> io::Result<()> {
    for (i, row) in file.cells.chunks(columns).enumerate() {
        let offset = file.bytes(&(i * columns..i * columns)).start;
        let mut line = format!("{:>LABEL$}{GAP}", text::size(offset));
        if colored {
            let mut ink = None;
            for cell in row {
                let color = cell.kind.look().terminal;
                if ink != Some(color) {
                    let _ = write!(line, "\x1b[38;5;{color}m");
                    ink = Some(color);
                }
                // Where nobody tells, the dtypes are still to be seen.
                line.push(shade(cell.level.unwrap_or(Level::All)));
            }
            line.push_str("\x1b[0m");
        } else {
            line.extend(row.iter().map(|cell| cell.kind.look().letter));
            if file.cached.is_some() {
                line.push_str(&" ".repeat(columns - row.len()));
                line.push_str(GAP);
                line.extend(row.iter().filter_map(|cell| cell.level).map(shade));
            }
        }
        if let Some(room) = room {
            let bytes = file.bytes(&(i * columns..i * columns + row.len()));
            line.push_str(&starts(file, &bytes, columns - row.len(), room));
        }
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// `  layers.0.weight +3`: what starts in these bytes, behind a row that lacks so many cells.
fn starts(file: &Grid, bytes: &Range<u64>, missing: usize, room: usize) -> String {
    let mut tensors = file.tensors(bytes).filter(|info| info.offset() >= bytes.start);
    let Some(first) = tensors.next() else { return String::new() };
    let more = match tensors.count() {
        0 => String::new(),
        more => format!(" +{}", text::count(more as u64)),
    };
    let name = text::shorten(&text::short_name(first.name()), room.saturating_sub(more.len()));
    format!("{}{GAP}{name}{more}", " ".repeat(missing))
}

fn legend(out: &mut impl Write, picture: &Picture, colored: bool) -> io::Result<()> {
    let mut table = Table::new(&["<cell", "<what", ">tensors", ">bytes", ">in memory"]);
    let kinds = picture.kinds();
    for (kind, Total { tensors, nbytes, resident }) in &kinds {
        table.rows.push(vec![
            if colored { "████".into() } else { kind.look().letter.into() },
            kind.name().into(),
            if matches!(kind, Kind::Tensor(_)) { text::count(*tensors as u64) } else { String::new() },
            text::size(*nbytes),
            if picture.is_told() { text::percent(*resident, *nbytes) } else { "?".into() },
        ]);
    }
    let mut lines = Vec::new();
    table.print(&mut lines, None)?;
    for (i, line) in String::from_utf8_lossy(&lines).lines().enumerate() {
        // The table counts characters, so color comes last. Its first line is the titles.
        match kinds.get(i.wrapping_sub(1)).filter(|_| colored) {
            Some((kind, _)) => {
                let (swatch, rest) = line.split_at(line.find(' ').unwrap_or(0));
                writeln!(out, "\x1b[38;5;{}m{swatch}\x1b[0m{rest}", kind.look().terminal)?;
            }
            None => writeln!(out, "{line}")?,
        }
    }
    if !picture.is_told() {
        return writeln!(out, "\n{NOT_TOLD}");
    }
    let [none, some, most, all] = Level::ALL.map(shade);
    writeln!(out, "\nin memory: {none} nothing  {some} less than half  {most} half or more  {all} all")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_fits_its_terminal_and_is_a_power_of_two() {
        for (width, with, without) in
            [(80, 64, 32), (76, 64, 16), (78, 64, 32), (120, 64, 32), (140, 128, 32), (1000, 256, 256)]
        {
            assert_eq!((columns(width, true), columns(width, false)), (with, without), "{width}");
        }
        assert_eq!((columns(0, true), columns(10, false)), (8, 8), "still readable");
    }

    #[test]
    fn a_wide_row_ends_with_the_tensors_that_start_in_it() {
        let path = std::path::Path::new("models/digits.safetensors");
        let model = crate::Model::read(path).unwrap();
        let drawn = |width, colored| {
            let mut album = crate::map::cached::Album::of(path);
            let picture = Picture::of(path, &model, &mut album, columns(width, colored)).unwrap();
            let mut text = Vec::new();
            draw(&mut text, &picture, colored, width).unwrap();
            String::from_utf8(text).unwrap()
        };
        let row =
            |text: &str, label: &str| text.lines().find(|line| line.contains(label)).unwrap().to_owned();
        for text in [drawn(120, false), drawn(120, true)] {
            assert!(row(&text, " 0 B  ").ends_with("  fc1.bias +1"), "{text}");
            assert!(row(&text, "  8.0 KiB  ").ends_with(['█', '▓', '▒', '░', 'm']), "nothing starts: {text}");
            assert!(row(&text, "16.0 KiB").ends_with("  fc2.bias +1"), "{text}");
        }
        // The last row is short, and its name stands below the other all the same.
        let text = drawn(120, true);
        let plain = |line: String| line.replace("\x1b[38;5;250m", "").replace("\x1b[38;5;69m", "");
        let at = |line: String| plain(line).split("fc").next().map(|before| before.chars().count());
        assert_eq!(at(row(&text, " 0 B  ")), at(row(&text, "16.0 KiB")), "{text}");
        assert!(!drawn(80, false).contains("fc1") && !drawn(80, true).contains("fc1"), "no room");
    }
}
