//! A file as cells of so many bytes: what a picture shows, before it is drawn.

use super::kind::Kind;
use crate::cli::text;
use crate::map::cached::Cached;
use crate::{Layout, TensorInfo};
use std::ops::Range;
use std::path::PathBuf;

/// One file, cut into cells.
pub(super) struct Grid<'a> {
    pub(super) path: PathBuf,
    pub(super) layout: &'a Layout,
    /// Where the spaces at the header's end begin.
    pub(super) padding: u64,
    /// `None`: the kernel does not tell.
    pub(super) cached: Option<Cached>,
    /// Bytes to a cell; the last may have fewer.
    pub(super) size: u64,
    pub(super) cells: Vec<Cell>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cell {
    /// What most of its bytes are; of equals, what comes first.
    pub(super) kind: Kind,
    /// The tensor that most of its bytes are of, by number, if it shows one.
    pub(super) tensor: Option<usize>,
    pub(super) level: Option<Level>,
}

/// How much of something is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    None,
    /// Less than half.
    Some,
    Most,
    All,
}

impl Level {
    pub(super) const ALL: [Self; 4] = [Self::None, Self::Some, Self::Most, Self::All];

    fn of(bytes: u64, all: u64) -> Self {
        match bytes {
            0 if all > 0 => Self::None,
            _ if bytes >= all => Self::All,
            _ if bytes < all - bytes => Self::Some,
            _ => Self::Most,
        }
    }
}

/// Bytes of one kind, in all files.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Total {
    pub(super) tensors: usize,
    pub(super) nbytes: u64,
    pub(super) resident: u64,
}

/// The size of a cell with which the longest of some files takes at most `rows` rows of so many cells: a
/// power of two, so that offsets are round, and at least what tensors are aligned to in small files.
pub(super) fn cell_size(longest: u64, columns: usize, rows: usize) -> u64 {
    const SMALLEST: u64 = 64;
    let cells = (columns * rows).max(1) as u64;
    longest.div_ceil(cells).max(SMALLEST).checked_next_power_of_two().unwrap_or(1 << 63)
}

impl<'a> Grid<'a> {
    pub(super) fn new(
        path: PathBuf,
        layout: &'a Layout,
        padding: u64,
        cached: Option<Cached>,
        size: u64,
    ) -> Self {
        let mut drawn = Self { path, layout, padding, cached, size, cells: Vec::new() };
        drawn.cells = drawn.cut();
        drawn
    }

    /// Its name, size, and how much is in memory.
    pub(super) fn headline(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy();
        let len = self.layout.file_len();
        let in_memory = self
            .cached
            .as_ref()
            .map_or_else(String::new, |cached| format!(", {} in memory", text::percent(cached.total(), len)));
        format!("{}: {}{in_memory}", text::short_name(&name), text::size(len))
    }

    /// What lies where, in file order; nothing is empty, and nothing left out.
    fn stretches(&self) -> impl Iterator<Item = (Range<u64>, Kind, Option<usize>)> {
        let data = self.layout.data_start();
        let padding = self.padding.min(data);
        let header = [(0..padding, Kind::Header, None), (padding..data, Kind::Padding, None)];
        let tensors = self.layout.iter().enumerate();
        let tensors = tensors.map(|(i, info)| (info.range(), Kind::Tensor(info.dtype()), Some(i)));
        header.into_iter().chain(tensors).filter(|(range, ..)| !range.is_empty())
    }

    fn cut(&self) -> Vec<Cell> {
        let len = self.layout.file_len();
        let mut cells = Vec::new();
        let mut stretches = self.stretches().peekable();
        let mut start = 0;
        while start < len {
            let bytes = start..start.saturating_add(self.size).min(len);
            let mut kinds = [0; Kind::COUNT];
            // What has the most bytes, and the tensor that does: they need not go together.
            let (mut kind, mut longest) = (Kind::Header, (0, None));
            while let Some((range, of, tensor)) = stretches.peek() {
                let part = range.end.min(bytes.end).saturating_sub(range.start.max(bytes.start));
                kinds[of.index()] += part;
                if kinds[of.index()] > kinds[kind.index()] {
                    kind = *of;
                }
                if part > longest.0 {
                    longest = (part, *tensor);
                }
                if range.end > bytes.end {
                    break;
                }
                stretches.next();
            }
            let level =
                self.cached.as_ref().map(|cached| Level::of(cached.bytes(&bytes), bytes.end - bytes.start));
            let tensor = longest.1.filter(|_| matches!(kind, Kind::Tensor(_)));
            start = bytes.end;
            cells.push(Cell { kind, tensor, level });
        }
        cells
    }

    /// The bytes of these cells.
    pub(super) fn bytes(&self, cells: &Range<usize>) -> Range<u64> {
        let at = |cell: usize| (cell as u64).saturating_mul(self.size).min(self.layout.file_len());
        at(cells.start)..at(cells.end)
    }

    /// The tensors that have any of these bytes, in file order.
    pub(super) fn tensors(&self, bytes: &Range<u64>) -> impl Iterator<Item = TensorInfo<'a>> {
        // Tensors are sorted by both ends, so the first is found by halving.
        let (mut first, mut end) = (0, self.layout.len());
        while first < end {
            let middle = usize::midpoint(first, end);
            let before = self.layout.at(middle).is_some_and(|info| info.range().end <= bytes.start);
            if before { first = middle + 1 } else { end = middle }
        }
        let (layout, until) = (self.layout, bytes.end);
        (first..layout.len())
            .filter_map(move |i| layout.at(i))
            .take_while(move |info| info.offset() < until)
            .filter(|info| info.nbytes() > 0)
    }

    /// Adds this file's bytes up, by [`Kind::index`].
    pub(super) fn add_to(&self, totals: &mut [Total; Kind::COUNT]) {
        for (range, kind, tensor) in self.stretches() {
            let total = &mut totals[kind.index()];
            total.tensors += usize::from(tensor.is_some());
            total.nbytes += range.end - range.start;
            total.resident += self.cached.as_ref().map_or(0, |cached| cached.bytes(&range));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn a_cell_is_round_and_the_rows_are_few() {
        for len in [1, 63, 64, 65, 20_000, 1 << 30, (1 << 30) + 1, 1 << 40, i64::MAX.unsigned_abs()] {
            let size = cell_size(len, 64, 32);
            assert!(size.is_power_of_two() && size >= 64 && len.div_ceil(size) <= 64 * 32, "{len}: {size}");
            assert!(size == 64 || len.div_ceil(size) > 64 * 16, "{len}: {size} is larger than need be");
        }
        assert_eq!(cell_size(u64::MAX, 1, 1), 1 << 63);
    }

    #[test]
    fn a_cell_is_what_most_of_it_is_and_every_byte_is_counted() {
        let layout = Layout::builder()
            .tensor("a", DType::F32, &[25]) // 100 bytes
            .tensor("nothing", DType::F32, &[0])
            .tensor("b", DType::U8, &[20])
            .tensor("c", DType::U8, &[16])
            .build()
            .unwrap()
            .placed_at(64);
        let names: Vec<&str> = layout.iter().map(|info| info.name()).collect();
        assert_eq!(names, ["nothing", "c", "a", "b"], "as the planner orders them");
        let cells = Grid::new("x".into(), &layout, 40, None, 64);
        let seen: Vec<(Kind, Option<usize>)> = cells.cells.iter().map(|c| (c.kind, c.tensor)).collect();
        assert_eq!(
            seen,
            [
                (Kind::Header, None),
                (Kind::Tensor(DType::F32), Some(2)),
                (Kind::Tensor(DType::F32), Some(2)),
                (Kind::Tensor(DType::U8), Some(3))
            ]
        );
        let mut totals = [Total::default(); Kind::COUNT];
        cells.add_to(&mut totals);
        let of = |kind: Kind| (totals[kind.index()].tensors, totals[kind.index()].nbytes);
        assert_eq!((of(Kind::Header), of(Kind::Padding)), ((0, 40), (0, 24)));
        assert_eq!((of(Kind::Tensor(DType::F32)), of(Kind::Tensor(DType::U8))), ((1, 100), (2, 36)));
        let near = |bytes: Range<u64>| cells.tensors(&bytes).map(|info| info.name()).collect::<Vec<_>>();
        assert_eq!(near(0..64), [""; 0]);
        assert_eq!(near(64..65), ["c"]);
        assert_eq!(near(79..81), ["c", "a"]);
        assert_eq!(near(64..200), ["c", "a", "b"]);
        assert_eq!(cells.bytes(&(3..4)), 192..200);
    }

    #[test]
    fn a_level_says_none_and_all_only_where_that_is_so() {
        let levels = [0, 1, 49, 50, 99, 100].map(|bytes| Level::of(bytes, 100));
        assert_eq!(levels, [Level::None, Level::Some, Level::Some, Level::Most, Level::Most, Level::All]);
    }
}
