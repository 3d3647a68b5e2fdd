//! A picture as a file for the web: nothing outside it is needed, and it works on white and on black.

use super::grid::{Cell, Grid, Level};
use super::kind::Kind;
use super::{NOT_TOLD, Picture};
use crate::TensorInfo;
use crate::cli::text;
use std::fmt::Write as _;
use std::ops::Range;

/// Grid to a row.
pub(super) const COLUMNS: usize = 64;

// In pixels.
const CELL: usize = 12;
const ROW: usize = 16;
const LEFT: usize = 88;
const WIDTH: usize = LEFT + COLUMNS * CELL + 16;
/// From a line of text to the next.
const LINE: usize = 18;

/// Tensors that a tooltip lists.
const LISTED: usize = 8;

const STYLE: &str = "\
.page{fill:#fff}text{fill:#1e293b;font:12px ui-monospace,monospace}\
.at{text-anchor:end;fill:#64748b}.big{font-size:14px}\
.none{fill-opacity:.2}.some{fill-opacity:.45}.most{fill-opacity:.7}\
@media(prefers-color-scheme:dark){.page{fill:#0f172a}text{fill:#e2e8f0}.at{fill:#94a3b8}}";

const fn class(level: Level) -> &'static str {
    match level {
        Level::None => "none",
        Level::Some => "some",
        Level::Most => "most",
        Level::All => "all",
    }
}

pub(super) fn draw(picture: &Picture) -> String {
    let mut body = String::new();
    let mut y = 2 * LINE;
    let [path, summary] = picture.headline();
    line(&mut body, y, "big", &path);
    y += LINE;
    line(&mut body, y, "", &summary);
    for file in &picture.files {
        y += LINE;
        if picture.files.len() > 1 {
            line(&mut body, y, "", &file.headline());
            y += LINE / 2;
        }
        for (i, row) in file.cells.chunks(COLUMNS).enumerate() {
            draw_row(&mut body, file, i * COLUMNS, row, y);
            y += ROW;
        }
    }
    y += LINE;
    legend(&mut body, picture, &mut y);

    let mut out = String::new();
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" \
         viewBox=\"0 0 {WIDTH} {y}\" role=\"img\" aria-labelledby=\"title desc\">\n\
         <title id=\"title\">{}</title>\n<desc id=\"desc\">{}</desc>\n<style>{STYLE}",
        xml(&path),
        xml(&description(picture, &summary))
    );
    for (kind, _) in picture.kinds() {
        let _ = write!(out, ".k{}{{fill:{}}}", kind.index(), kind.look().web);
    }
    let _ = write!(out, "</style>\n<rect class=\"page\" width=\"{WIDTH}\" height=\"{y}\"/>\n{body}</svg>\n");
    out
}

/// What there is to be seen, for those who cannot.
fn description(picture: &Picture, summary: &str) -> String {
    let mut text = format!("{summary}.");
    for (kind, total) in picture.kinds() {
        let _ = write!(text, " {}: {}", kind.name(), text::size(total.nbytes));
        if picture.is_told() {
            let _ = write!(text, ", {} in memory", text::percent(total.resident, total.nbytes));
        }
        text.push('.');
    }
    text
}

fn line(body: &mut String, y: usize, class: &str, text: &str) {
    let _ = writeln!(body, "<text class=\"{class}\" x=\"16\" y=\"{y}\">{}</text>", xml(text));
}

/// A row of cells of which the first is the file's `first`; equal neighbors are one rectangle.
fn draw_row(body: &mut String, file: &Grid, first: usize, row: &[Cell], y: usize) {
    let offset = file.bytes(&(first..first)).start;
    let (right, baseline) = (LEFT - 8, y + ROW - 5);
    let _ = writeln!(body, "<text class=\"at\" x=\"{right}\" y=\"{baseline}\">{}</text>", text::size(offset));
    let mut start = 0;
    for run in row.chunk_by(|a, b| a == b) {
        let cells = start..start + run.len();
        let Some(cell) = run.first() else { continue };
        let level = cell.level.map_or("", class);
        let (x, width, height) = (LEFT + cells.start * CELL, run.len() * CELL - 1, ROW - 2);
        let tip = tooltip(file, cell.kind, &file.bytes(&(first + cells.start..first + cells.end)));
        let _ = writeln!(
            body,
            "<rect class=\"k{} {level}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\">\
             <title>{}</title></rect>",
            cell.kind.index(),
            xml(&tip)
        );
        start = cells.end;
    }
}

/// What lies in these bytes.
fn tooltip(file: &Grid, kind: Kind, bytes: &Range<u64>) -> String {
    let in_memory = |range: &Range<u64>| match &file.cached {
        Some(cached) => {
            format!(", {} in memory", text::percent(cached.bytes(range), range.end - range.start))
        }
        None => String::new(),
    };
    let size = text::size(bytes.end - bytes.start);
    let mut tip = format!("{}: {size} at {}{}", kind.name(), text::count(bytes.start), in_memory(bytes));
    let mut tensors = file.tensors(bytes);
    for info in tensors.by_ref().take(LISTED) {
        let _ = write!(tip, "\n{}{}", tensor(&info), in_memory(&info.range()));
    }
    match tensors.count() {
        0 => {}
        more => {
            let _ = write!(tip, "\nand {} more", text::count(more as u64));
        }
    }
    tip
}

fn tensor(info: &TensorInfo) -> String {
    let (name, shape) = (text::short_name(info.name()), text::short_shape(info.shape()));
    let (at, size) = (text::count(info.offset()), text::size(info.nbytes()));
    format!("{name} {} {shape}: {size} at {at}", info.dtype())
}

fn legend(body: &mut String, picture: &Picture, y: &mut usize) {
    let mut swatch = |body: &mut String, class: &str, text: &str| {
        let _ = writeln!(
            body,
            "<rect class=\"{class}\" x=\"16\" y=\"{}\" width=\"{}\" height=\"{}\"/>\
             <text x=\"56\" y=\"{}\">{}</text>",
            *y,
            3 * CELL - 1,
            ROW - 2,
            *y + ROW - 5,
            xml(text)
        );
        *y += LINE;
    };
    let kinds = picture.kinds();
    for (kind, total) in &kinds {
        let mut text = format!("{}: {}", kind.name(), text::size(total.nbytes));
        if matches!(kind, Kind::Tensor(_)) {
            let _ = write!(text, " in {}", text::plural(total.tensors, "tensor"));
        }
        if picture.is_told() {
            let _ = write!(text, ", {} in memory", text::percent(total.resident, total.nbytes));
        }
        swatch(body, &format!("k{}", kind.index()), &text);
    }
    // What the shades mean, in the color of what there is most of.
    let most = kinds.iter().find(|(kind, _)| matches!(kind, Kind::Tensor(_))).or(kinds.first());
    let color = most.map_or(0, |(kind, _)| kind.index());
    let words = ["nothing in memory", "less than half", "half or more", "all in memory"];
    if picture.is_told() {
        for (level, words) in Level::ALL.into_iter().zip(words) {
            swatch(body, &format!("k{color} {}", class(level)), words);
        }
    } else {
        *y += LINE;
        line(body, *y, "", NOT_TOLD);
        *y += LINE;
    }
}

/// Text that an XML 1.0 document can hold, between tags and in quotes. What has no place in one at all is
/// escaped as Rust escapes it.
fn xml(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' => out.push(c),
            '\u{fffe}' | '\u{ffff}' => out.extend(c.escape_unicode()),
            c if c.is_control() => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(
            xml("<a b=\"c\">&'\u{1b}\u{ffff}é\n"),
            "&lt;a b=&quot;c&quot;&gt;&amp;&#39;\\u{1b}\\u{ffff}é\n"
        );
    }
}
