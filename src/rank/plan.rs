//! How a model's tensors are divided among the ranks of tensor parallelism: pure arithmetic.

use crate::dtype::DType;
use crate::error::{Error, Result, quote};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// What becomes of a tensor under tensor parallelism.
///
/// ```
/// use maptensors::Split;
///
/// assert_eq!(Split::COLUMN, Split::Axis(0)); // a Linear's weight is [out, in]
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Split {
    /// Each rank has its part along an axis, which divides evenly.
    Axis(usize),
    /// Each rank has all of it.
    Replicate,
}

impl Split {
    /// Of the weight of a column-parallel linear layer, `[out, in]`, its output features; and of its bias.
    pub const COLUMN: Self = Self::Axis(0);
    /// Of the weight of a row-parallel linear layer, `[out, in]`, its input features. Its bias is replicated.
    pub const ROW: Self = Self::Axis(1);
}

type Matches<'a> = Arc<dyn Fn(&str) -> bool + Send + Sync + 'a>;

/// Which tensors are split, and how: rules by name, of which the first that matches holds.
///
/// ```
/// use maptensors::{Model, RankPlan, Split};
///
/// let plan = RankPlan::new()
///     .when(|name| name.starts_with("fc1."), Split::COLUMN)
///     .when(|name| name == "fc2.weight", Split::ROW)
///     .otherwise(Split::Replicate);
/// // SAFETY: nobody writes to the file while it is mapped.
/// let model = unsafe { Model::open("models/digits.safetensors")? };
/// let first = model.rank_view(0, 8, &plan)?;
/// assert_eq!(first.tensor("fc1.weight")?.shape(), [8, 64]); // of 64 × 64
/// assert_eq!(first.tensor("fc2.weight")?.shape(), [10, 8]); // of 10 × 64
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct RankPlan<'a> {
    rules: Vec<(Matches<'a>, Split)>,
    otherwise: Option<Split>,
}

impl<'a> RankPlan<'a> {
    /// No rule: every tensor is an error, until there are some.
    pub fn new() -> Self {
        Self::default()
    }

    /// A rule for names that satisfy a predicate, behind those there are.
    #[must_use]
    pub fn when(mut self, predicate: impl Fn(&str) -> bool + Send + Sync + 'a, split: Split) -> Self {
        self.rules.push((Arc::new(predicate), split));
        self
    }

    /// A rule for names that match a pattern (`*` matches dots too), behind those there are. With the feature
    /// `cli` or `python`.
    ///
    /// # Errors
    /// [`Error::Argument`] for what is no pattern.
    #[cfg(any(feature = "cli", feature = "python"))]
    pub fn glob(self, pattern: &str, split: Split) -> Result<Self> {
        let glob = crate::layout::glob::glob(pattern)?;
        Ok(self.when(move |name| glob.is_match(name), split))
    }

    /// What holds for names that no rule matches; without it they are an error.
    #[must_use]
    pub fn otherwise(mut self, split: Split) -> Self {
        self.otherwise = Some(split);
        self
    }

    pub(crate) fn split(&self, name: &str) -> Option<Split> {
        let rule = self.rules.iter().find(|(matches, _)| matches(name));
        rule.map(|&(_, split)| split).or(self.otherwise)
    }
}

impl std::fmt::Debug for RankPlan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let splits: Vec<Split> = self.rules.iter().map(|&(_, split)| split).collect();
        f.debug_struct("RankPlan").field("rules", &splits).field("otherwise", &self.otherwise).finish()
    }
}

/// The bytes of a part of a tensor, as runs from its start on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) shape: Vec<usize>,
    /// Where the first run starts.
    pub(crate) first: usize,
    /// Bytes of each run, from each to the next, and how many there are.
    pub(crate) run: usize,
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

impl Cut {
    /// A rank's part of a tensor.
    ///
    /// # Errors
    /// [`Error::Argument`] where the axis is not there or does not divide, [`Error::Align`] where packed elements
    /// would be cut inside a block.
    pub(crate) fn new(
        name: &str,
        dtype: DType,
        shape: &[usize],
        split: Split,
        rank: usize,
        world: usize,
    ) -> Result<Self> {
        let align = || {
            let what = format!("would be cut inside a block, which is {}", dtype.block());
            Error::Align { path: PathBuf::new(), tensor: name.into(), what }
        };
        let Split::Axis(axis) = split else {
            let all = if shape.contains(&0) { 0 } else { shape.iter().product() };
            let run = dtype.nbytes(all).ok_or_else(align)?;
            return Ok(Self { shape: shape.to_vec(), first: 0, run, stride: run, count: 1 });
        };
        let Some(&size) = shape.get(axis) else {
            let hint =
                if axis == 1 && shape.len() == 1 { " (the bias of a row split is replicated)" } else { "" };
            return Err(Error::Argument(format!(
                "tensor {} of rank {} has no axis {axis} to split{hint}",
                quote(name),
                shape.len()
            )));
        };
        if !size.is_multiple_of(world) {
            return Err(Error::Argument(format!(
                "tensor {}: axis {axis} of length {size} does not divide among {world} ranks",
                quote(name)
            )));
        }
        let part: Range<usize> = size / world * rank..size / world * (rank + 1);
        let mut mine = shape.to_vec();
        mine[axis] = part.len();
        if shape.contains(&0) {
            return Ok(Self { shape: mine, first: 0, run: 0, stride: 0, count: 0 });
        }
        let inner: usize = shape[axis + 1..].iter().product();
        let in_bytes = |elements| dtype.nbytes(elements).ok_or_else(align);
        let count = shape[..axis].iter().product();
        Ok(Self {
            shape: mine,
            first: in_bytes(part.start * inner)?,
            run: in_bytes(part.len() * inner)?,
            stride: if count == 1 { 0 } else { in_bytes(size * inner)? },
            count,
        })
    }

    pub(crate) fn nbytes(&self) -> usize {
        self.run * self.count
    }

    /// The starts of its runs.
    pub(crate) fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, stride) = (self.first, self.stride);
        (0..self.count).map(move |i| first + i * stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(shape: &[usize], split: Split, rank: usize, world: usize) -> Result<Cut> {
        Cut::new("w", DType::BF16, shape, split, rank, world)
    }

    #[test]
    fn a_column_is_one_run_and_a_row_is_one_for_each_output() {
        let column = cut(&[64, 10], Split::COLUMN, 3, 8).unwrap();
        let expected = Cut { shape: vec![8, 10], first: 480, run: 160, stride: 0, count: 1 };
        assert_eq!(column, expected);
        let row = cut(&[64, 16], Split::ROW, 3, 8).unwrap();
        assert_eq!(row, Cut { shape: vec![64, 2], first: 12, run: 4, stride: 32, count: 64 });
        assert_eq!(row.starts().take(2).collect::<Vec<_>>(), [12, 44]);
        let whole = cut(&[3, 5], Split::Replicate, 1, 2).unwrap();
        assert_eq!((whole.nbytes(), whole.count), (30, 1));
        assert_eq!(cut(&[0, 8], Split::ROW, 1, 2).unwrap().nbytes(), 0);
        assert_eq!(
            cut(&[1, 8], Split::ROW, 1, 2).unwrap(),
            Cut { shape: vec![1, 4], first: 8, run: 8, stride: 0, count: 1 }
        );
    }

    #[test]
    fn what_does_not_divide_is_an_error_that_says_which() {
        let text = cut(&[30_522, 384], Split::COLUMN, 0, 8).unwrap_err().to_string();
        assert_eq!(text, "tensor \"w\": axis 0 of length 30522 does not divide among 8 ranks");
        assert!(cut(&[8], Split::ROW, 0, 8).unwrap_err().to_string().contains("bias of a row split"));
        let packed = Cut::new("w", DType::F4, &[4, 6], Split::ROW, 0, 2).unwrap_err();
        assert!(matches!(packed, Error::Align { .. }), "{packed}");
    }
}
