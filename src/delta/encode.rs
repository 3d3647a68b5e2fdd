//! From a change to a delta file.

use super::{GAPS, Header, LENGTHS, VALUES, VERSION, WHOLE};
use crate::diff::digest::{self, CHECKSUMS};
use crate::diff::{Contents, Difference, Found, Span, Until, compare_contents, hash_all};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::safetensors::texts;
use crate::layout::{Layout, TensorInfo};
use crate::map::RawSlice;
use crate::save::DELTA;
use crate::save::SaveOptions;
use crate::save::over::Made;
use crate::tensor::TensorViewMut;
use crate::work;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

/// Writes what changed since the last mark, or the files.
pub(crate) fn write_delta(contents: &Contents<'_>, path: &Path, options: &SaveOptions) -> Result<()> {
    Made::Delta.may_be_at(path, &[contents])?;
    let (found, _) = contents.differences(Span::SinceMark, true)?;
    let before = contents.sums(Until::Mark)?;
    let mut after = before.clone();
    for found in &found {
        after[found.position] = after[found.position].wrapping_add(found.difference.shift);
    }
    let header = header(contents, contents.id(&before), contents.id(&after), Vec::new())?;
    write(&header, &changed(contents, &found), Vec::new(), path, options)
}

/// Writes what turns `a` into `b`.
pub(crate) fn write_diff<'a>(
    a: &Contents<'a>,
    b: &Contents<'a>,
    path: &Path,
    options: &SaveOptions,
) -> Result<()> {
    Made::Delta.may_be_at(path, &[a, b])?;
    let compared = compare_contents(a, b, true);
    let reshaped = compared.reshaped.iter().map(|&(shard, index, info, _)| (shard, index, info));
    let wholes: Vec<(TensorInfo<'a>, RawSlice<'a>)> = compared
        .added
        .iter()
        .copied()
        .chain(reshaped)
        .map(|(shard, index, info)| (info, b.now(shard, index, &info)))
        .collect();
    let before = a.sums(Until::Now)?;
    let lens: Vec<usize> = wholes.iter().map(|(_, source)| source.len()).collect();
    let fresh = hash_all(&lens, |tensor, part, to| {
        wholes[tensor].1.copy_to(part, to);
        Ok(())
    });
    let fresh = fresh.map_err(Error::io(path, "reading the models"))?;
    let fresh: HashMap<&str, u128> = wholes.iter().map(|(info, _)| info.name()).zip(fresh).collect();
    let mut after: Vec<u128> = b
        .infos()
        .zip(&compared.origins)
        .map(|((_, _, info), origin)| match origin {
            Some(origin) => before[*origin],
            None => fresh.get(info.name()).copied().unwrap_or_default(),
        })
        .collect();
    for found in &compared.found {
        after[found.position] = after[found.position].wrapping_add(found.difference.shift);
    }
    let removed = compared.removed.iter().map(|&name| name.to_owned()).collect();
    let header = header(b, a.id(&before), b.id(&after), removed)?;
    write(&header, &changed(b, &compared.found), wholes, path, options)
}

fn header(result: &Contents<'_>, base: u128, id: u128, removed: Vec<String>) -> Result<Header> {
    let mut metadata = result.catalog.metadata().clone();
    let has = result.catalog.shards().iter().any(|shard| shard.layout.has_metadata());
    let carries = |shard: &crate::layout::Shard| shard.layout.metadata().contains_key(CHECKSUMS);
    let checksums = result.catalog.shards().iter().any(carries);
    metadata.remove(CHECKSUMS);
    let metadata: BTreeMap<String, String> =
        texts(&metadata)?.into_iter().map(|(key, text)| (key.into(), text.into())).collect();
    Ok(Header {
        version: VERSION,
        base: digest::hex(base),
        result: digest::hex(id),
        removed,
        // An entry that was there for the checksums alone is not there without them.
        metadata: (has && !(checksums && metadata.is_empty())).then_some(metadata),
        checksums,
    })
}

/// A tensor that changed, and how to say so.
struct Changed<'a> {
    info: TensorInfo<'a>,
    now: RawSlice<'a>,
    difference: &'a Difference,
    encoding: Encoding,
}

fn changed<'a>(contents: &Contents<'a>, found: &'a [Found<'a>]) -> Vec<Changed<'a>> {
    let choose = |found: &'a Found<'a>| Changed {
        info: found.info,
        now: contents.now(found.shard, found.index, &found.info),
        difference: &found.difference,
        encoding: Encoding::of(&found.difference, found.info.bytes().len()),
    };
    found.iter().map(choose).collect()
}

/// How a change is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Whole,
    /// Elements one by one.
    Sparse {
        gap: DType,
    },
    /// Runs of elements, joined across gaps of at most `join`.
    Runs {
        join: usize,
        runs: usize,
        values: usize,
        gap: DType,
        length: DType,
    },
}

/// What another tensor in the file costs: its entry in the header, about.
const ENTRY: usize = 96;

impl Encoding {
    /// The smallest.
    fn of(difference: &Difference, nbytes: usize) -> Self {
        let unit = difference.unit();
        // A gap of so many elements costs no more in values than a run costs in gaps and lengths.
        let mut joins: Vec<usize> = [0, 2, 3, 4, 5, 6, 8, 12, 16].iter().map(|bytes| bytes / unit).collect();
        joins.dedup();
        let mut tallies: Vec<Tally> = joins.into_iter().map(Tally::new).collect();
        difference.each_run(|run| tallies.iter_mut().for_each(|tally| tally.add(run.clone())));
        let mut best = (nbytes + ENTRY, Self::Whole);
        let mut consider = |cost: usize, encoding| {
            if cost < best.0 {
                best = (cost, encoding);
            }
        };
        for tally in &mut tallies {
            tally.close();
            let (gap, length) = (narrowest(tally.max_gap), narrowest(tally.max_length));
            let index = gap.itemsize().unwrap_or(8) + length.itemsize().unwrap_or(8);
            consider(
                tally.values * unit + tally.runs * index + 3 * ENTRY,
                Self::Runs { join: tally.join, runs: tally.runs, values: tally.values, gap, length },
            );
            if tally.join == 0 {
                let each = unit + gap.itemsize().unwrap_or(8);
                consider(difference.elements * each + 2 * ENTRY, Self::Sparse { gap });
            }
        }
        best.1
    }
}

/// Runs joined across small gaps, counted.
struct Tally {
    join: usize,
    open: Range<usize>,
    runs: usize,
    values: usize,
    max_gap: usize,
    max_length: usize,
}

impl Tally {
    fn new(join: usize) -> Self {
        Self { join, open: 0..0, runs: 0, values: 0, max_gap: 0, max_length: 0 }
    }

    fn add(&mut self, run: Range<usize>) {
        let gap = run.start - self.open.end;
        if self.runs > 0 && gap <= self.join {
            self.open.end = run.end;
            return;
        }
        self.close();
        self.max_gap = self.max_gap.max(gap);
        self.runs += 1;
        self.open = run;
    }

    fn close(&mut self) {
        self.values += self.open.len();
        self.max_length = self.max_length.max(self.open.len());
        self.open.start = self.open.end;
    }
}

/// Calls `visit` with every run, joined as a [`Tally`] counts them.
fn each_joined(difference: &Difference, join: usize, mut visit: impl FnMut(Range<usize>)) {
    let mut open: Option<Range<usize>> = None;
    difference.each_run(|run| match &mut open {
        Some(last) if run.start - last.end <= join => last.end = run.end,
        _ => {
            if let Some(last) = open.replace(run) {
                visit(last);
            }
        }
    });
    if let Some(last) = open {
        visit(last);
    }
}

/// The smallest unsigned dtype that holds `most`.
fn narrowest(most: usize) -> DType {
    match most as u64 {
        0..=0xff => DType::U8,
        0x100..=0xffff => DType::U16,
        0x1_0000..=0xffff_ffff => DType::U32,
        _ => DType::U64,
    }
}

fn write<'a>(
    header: &Header,
    changed: &[Changed<'a>],
    mut wholes: Vec<(TensorInfo<'a>, RawSlice<'a>)>,
    path: &Path,
    options: &SaveOptions,
) -> Result<()> {
    if options.max_shard_size.is_some() {
        return Err(Error::Argument("a delta is one file: it is not split over shards".into()));
    }
    let json = |source: serde_json::Error| Error::Json {
        path: path.into(),
        what: "the delta's metadata",
        source: source.into(),
    };
    let text = serde_json::to_string(header).map_err(json)?;
    let mut builder = Layout::builder();
    for (key, value) in options.metadata.iter().flatten() {
        builder = builder.metadata(key, value);
    }
    builder = builder.metadata(DELTA, text);
    for change in changed {
        let name = change.info.name();
        // One by one, elements are values of the tensor's dtype, unless they are packed.
        let dtype = change.info.dtype();
        let dtype = if dtype.itemsize().is_some() { dtype } else { DType::U8 };
        builder = match change.encoding {
            Encoding::Whole => {
                wholes.push((change.info, change.now));
                builder
            }
            Encoding::Sparse { gap } => builder
                .tensor(format!("{VALUES}{name}"), dtype, &[change.difference.elements])
                .tensor(format!("{GAPS}{name}"), gap, &[change.difference.elements]),
            Encoding::Runs { runs, values, gap, length, .. } => builder
                .tensor(format!("{VALUES}{name}"), dtype, &[values])
                .tensor(format!("{GAPS}{name}"), gap, &[runs])
                .tensor(format!("{LENGTHS}{name}"), length, &[runs]),
        };
    }
    for (info, _) in &wholes {
        builder = builder.tensor(format!("{WHOLE}{}", info.name()), info.dtype(), info.shape());
    }
    let mut draft = options.draft.create(path, &builder.build()?)?;
    {
        let mut views: HashMap<&str, TensorViewMut<'_>> =
            draft.tensors_mut()?.map(|view| (view.name(), view)).collect();
        let jobs = changed.iter().filter(|change| change.encoding != Encoding::Whole).map(|change| {
            let mut take = |kind: &str| views.remove(format!("{kind}{}", change.info.name()).as_str());
            Job { change, gaps: take(GAPS), lengths: take(LENGTHS), values: take(VALUES) }
        });
        let done = work::each_in_parallel(jobs.collect(), |job: Job<'_, '_>| {
            job.write();
            Ok::<(), ()>(())
        });
        debug_assert!(done.is_ok());
    }
    let place = |name: &str| draft.layout().position(&format!("{WHOLE}{name}")).unwrap_or_default();
    let jobs = wholes.iter().map(|(info, source)| (place(info.name()), *source)).collect();
    draft.fill(jobs)?;
    draft.commit()
}

/// One tensor's parts, to fill.
struct Job<'a, 'd> {
    change: &'a Changed<'a>,
    gaps: Option<TensorViewMut<'d>>,
    lengths: Option<TensorViewMut<'d>>,
    values: Option<TensorViewMut<'d>>,
}

impl Job<'_, '_> {
    fn write(mut self) {
        let Changed { now, difference, encoding, .. } = self.change;
        let unit = difference.unit();
        let mut gaps = Indices::of(&mut self.gaps);
        let mut lengths = Indices::of(&mut self.lengths);
        let mut values: &mut [u8] = self.values.as_mut().map_or(&mut [], TensorViewMut::as_bytes_mut);
        let join = if let Encoding::Runs { join, .. } = encoding { *join } else { 0 };
        let mut end = 0;
        each_joined(difference, join, |run| {
            gaps.push(run.start - end);
            if matches!(encoding, Encoding::Sparse { .. }) {
                (1..run.len()).for_each(|_| gaps.push(0));
            } else {
                lengths.push(run.len());
            }
            end = run.end;
            let bytes = run.start * unit..run.end * unit;
            let (to, rest) = std::mem::take(&mut values).split_at_mut(bytes.len());
            now.copy_to(bytes, to);
            values = rest;
        });
    }
}

/// Numbers being written, little endian, as wide as they were planned.
struct Indices<'a> {
    width: usize,
    rest: &'a mut [u8],
}

impl<'a> Indices<'a> {
    fn of(view: &'a mut Option<TensorViewMut<'_>>) -> Self {
        let dtype = view.as_ref().map_or(DType::U8, TensorViewMut::dtype);
        let rest: &'a mut [u8] = view.as_mut().map_or(&mut [], TensorViewMut::as_bytes_mut);
        Self { width: dtype.itemsize().unwrap_or(1), rest }
    }

    fn push(&mut self, number: usize) {
        let (to, rest) = std::mem::take(&mut self.rest).split_at_mut(self.width);
        to.copy_from_slice(&(number as u64).to_le_bytes()[..self.width]);
        self.rest = rest;
    }
}
