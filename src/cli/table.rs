//! A report, for people.

use super::report::{Report, Tensor};
use super::text;
use crate::error::printable;
use std::io::{self, Write};

/// A name is not shortened below this, however narrow the terminal.
const NARROWEST_NAME: usize = 16;
/// The widest that the name column is made for the sake of alignment.
const WIDEST_NAME: usize = 160;

/// Shows a report; `width` is the terminal's, if it is one.
pub(super) fn show(
    out: &mut impl Write,
    report: &Report,
    list: bool,
    width: Option<usize>,
) -> io::Result<()> {
    let generation = report.generation.map(|number| format!(", generation {number}")).unwrap_or_default();
    writeln!(out, "{}{generation}", printable(&report.path))?;
    headline(out, report)?;
    let listed = report.tensors.as_deref().filter(|tensors| list && !tensors.is_empty());
    if let Some(tensors) = listed {
        writeln!(out)?;
        tensor_table(tensors, report.shards.len() > 1).print(out, width)?;
    }
    if report.shards.len() > 1 {
        writeln!(out)?;
        shard_table(report).print(out, width)?;
    }
    if !report.metadata.is_empty() {
        writeln!(out, "\nmetadata")?;
        let keys: Vec<String> = report.metadata.iter().map(|(key, _)| text::short_name(key)).collect();
        // One long key does not push all values to the right.
        let widest = keys.iter().map(|key| key.chars().count()).max().unwrap_or(0).min(20);
        for (key, (_, value)) in keys.iter().zip(report.metadata) {
            let value = printable(&value.to_string());
            writeln!(out, "{}", format!("  {key:<widest$}  {value}").trim_end())?;
        }
    }
    if report.totals.tensors > 0 {
        writeln!(out)?;
        dtype_table(report).print(out, width)?;
        writeln!(out)?;
        alignment(out, report)?;
    }
    Ok(())
}

/// Two lines: what the tensors are, and what the files.
fn headline(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let totals = &report.totals;
    let all: usize = report.shards.iter().map(|shard| shard.tensors).sum();
    let matching = if totals.tensors == all { "" } else { &format!("{} of ", totals.tensors) };
    let (tensors, elements) = (text::plural(all, "tensor"), text::count(totals.elements));
    writeln!(out, "{matching}{tensors}, {elements} elements, {}", text::size(totals.nbytes))?;
    let size = text::size(report.shards.iter().map(|shard| shard.nbytes).sum());
    match report.shards.as_slice() {
        [only] => writeln!(out, "1 file, {size}, data from byte {}", only.data_start),
        shards => writeln!(out, "{}, {size}", text::plural(shards.len(), "shard")),
    }
}

fn tensor_table(tensors: &[Tensor], sharded: bool) -> Table {
    let mut table = Table::new(&["<tensor", "<dtype", "<shape", ">offset", ">bytes", ">align"]);
    if sharded {
        table.columns.push(">shard");
    }
    let all_aligned = tensors.iter().all(|tensor| tensor.aligned);
    for tensor in tensors {
        let mark = match tensor.aligned {
            true if all_aligned => "",
            true => " ",
            false => "!",
        };
        let mut row = vec![
            text::name(tensor.name),
            tensor.dtype.name().into(),
            text::shape(tensor.shape),
            tensor.offset.to_string(),
            text::size(tensor.nbytes),
            format!("{}{mark}", tensor.alignment),
        ];
        if sharded {
            row.push((tensor.shard_index + 1).to_string());
        }
        table.rows.push(row);
    }
    table
}

fn shard_table(report: &Report) -> Table {
    let mut table = Table::new(&["<file", ">shard", ">tensors", ">bytes", ">data from"]);
    for (i, shard) in report.shards.iter().enumerate() {
        table.rows.push(vec![
            text::name(&shard.file),
            (i + 1).to_string(),
            text::count(shard.tensors as u64),
            text::size(shard.nbytes),
            shard.data_start.to_string(),
        ]);
    }
    table
}

fn dtype_table(report: &Report) -> Table {
    let mut table = Table::new(&["<dtype", ">tensors", ">elements", ">bytes", ">share"]);
    for of_dtype in &report.totals.dtypes {
        table.rows.push(vec![
            of_dtype.dtype.name().into(),
            text::count(of_dtype.tensors as u64),
            text::count(of_dtype.elements),
            text::size(of_dtype.nbytes),
            text::percent(of_dtype.nbytes, report.totals.nbytes),
        ]);
    }
    table
}

fn alignment(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let totals = &report.totals;
    match totals.misaligned {
        0 => writeln!(out, "every tensor is aligned for its dtype")?,
        n => writeln!(out, "{} misaligned (!) for the dtype: Python gets copies", text::plural(n, "tensor"))?,
    }
    let share = text::percent(totals.nbytes_aligned_64, totals.nbytes);
    writeln!(out, "{share} of the bytes are in tensors on a 64-byte boundary")
}

/// Rows under a head; the first column gives way when the terminal is too narrow.
pub(super) struct Table {
    /// `<` or `>`, for the side the column leans to, and its title.
    columns: Vec<&'static str>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(columns: &[&'static str]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    pub(super) fn print(&self, out: &mut impl Write, width: Option<usize>) -> io::Result<()> {
        const GAP: usize = 2;
        let terminal = width.is_some();
        let titles: Vec<String> = self.columns.iter().map(|column| column[1..].to_owned()).collect();
        let mut widths = vec![0; titles.len()];
        for row in std::iter::once(&titles).chain(&self.rows) {
            for (widest, cell) in widths.iter_mut().zip(row) {
                *widest = cell.chars().count().max(*widest);
            }
        }
        // Whole in a pipe, but one endless name must not push every row's numbers out of sight.
        widths[0] = widths[0].min(WIDEST_NAME);
        if let (Some(width), Some((name, others))) = (width, widths.split_first_mut()) {
            let taken: usize = others.iter().map(|other| GAP + other).sum();
            *name = (*name).min(width.saturating_sub(taken).max(NARROWEST_NAME));
        }
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for (i, ((column, cell), &width)) in self.columns.iter().zip(row).zip(&widths).enumerate() {
                let shorten = i == 0 && terminal;
                let cell = if shorten { text::shorten(cell, width) } else { cell.clone() };
                // By hand: a format's width is at most 65,535.
                let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
                line.push_str(if i == 0 { "" } else { &"  "[..GAP] });
                for part in if column.starts_with('<') { [&cell, &padding] } else { [&padding, &cell] } {
                    line.push_str(part);
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(width: Option<usize>) -> String {
        let mut table = Table::new(&["<tensor", ">bytes"]);
        table.rows.push(vec!["model.layers.0.self_attn.q_proj.weight".into(), "8 B".into()]);
        table.rows.push(vec!["bias".into(), "1023 B".into()]);
        let mut out = Vec::new();
        table.print(&mut out, width).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn names_give_way_on_a_narrow_terminal_only() {
        assert_eq!(
            printed(Some(30)),
            "tensor                   bytes\n\
             model.laye…proj.weight     8 B\n\
             bias                    1023 B\n"
        );
        for width in [None, Some(80)] {
            assert!(printed(width).contains("model.layers.0.self_attn.q_proj.weight"), "{width:?}");
        }
        assert!(printed(Some(3)).contains("model.l…j.weight"), "still readable");
    }
}
