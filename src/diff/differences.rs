//! How two models differ.

use super::changes::Changes;
use super::compare::{Pair, compare};
use super::digest::CHECKSUMS;
use super::{Contents, Found};
use crate::dtype::DType;
use crate::layout::TensorInfo;
use std::collections::BTreeSet;

/// A tensor that is in both models, with another dtype or shape.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Reshaped {
    /// The tensor's name.
    pub name: String,
    /// Its dtype and shape in the first model.
    pub from: (DType, Vec<usize>),
    /// Its dtype and shape in the second.
    pub to: (DType, Vec<usize>),
}

/// How a second model differs from a first: what [`diff`](crate::diff()) finds.
///
/// ```
/// # let a = maptensors::Model::read("models/digits.safetensors")?;
/// let differences = maptensors::diff(&a, &a)?;
/// assert!(differences.is_empty() && differences.added.is_empty());
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Differences {
    /// Tensors in both, of one dtype and shape, whose elements differ.
    pub changed: Changes,
    /// Tensors of the second model only, in its file order.
    pub added: Vec<String>,
    /// Tensors of the first model only, in its file order.
    pub removed: Vec<String>,
    /// Tensors in both, with another dtype or shape.
    pub reshaped: Vec<Reshaped>,
    /// Metadata keys that are in one only, or have another value. Checksums do not count.
    pub metadata: Vec<String>,
    /// Tensors in both, of one dtype and shape: those compared.
    pub compared: usize,
}

impl Differences {
    /// Whether the models are the same: tensors and metadata. Order and division into files do not count.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty()
            && self.added.is_empty()
            && self.removed.is_empty()
            && self.reshaped.is_empty()
            && self.metadata.is_empty()
    }
}

/// What [`compare_contents`] finds.
pub(crate) struct Compared<'a> {
    /// What differs, by the second model's tensors.
    pub(crate) found: Vec<Found<'a>>,
    /// Tensors of the second model only: shard, position in it, info.
    pub(crate) added: Vec<(usize, usize, TensorInfo<'a>)>,
    pub(crate) removed: Vec<&'a str>,
    /// Of the second model, with how it was in the first.
    pub(crate) reshaped: Vec<(usize, usize, TensorInfo<'a>, TensorInfo<'a>)>,
    metadata: Vec<String>,
    /// For every tensor of the second model, in file order, the position among all of the first of its like.
    pub(crate) origins: Vec<Option<usize>>,
}

/// Compares `b` with `a`; `hash` also tells what checksums change by.
pub(crate) fn compare_contents<'a>(a: &Contents<'a>, b: &Contents<'a>, hash: bool) -> Compared<'a> {
    // Where the tensors of each of the first model's shards start among all.
    let starts: Vec<usize> = a
        .catalog
        .shards()
        .iter()
        .scan(0, |next, shard| {
            let start = *next;
            *next += shard.layout.len();
            Some(start)
        })
        .collect();
    let (mut pairs, mut positions) = (Vec::new(), Vec::new());
    let mut compared = Compared {
        found: Vec::new(),
        added: Vec::new(),
        removed: Vec::new(),
        reshaped: Vec::new(),
        metadata: metadata(a, b),
        origins: Vec::new(),
    };
    for (position, (shard, index, info)) in b.infos().enumerate() {
        let old =
            a.catalog.find(info.name()).and_then(|(s, i)| Some((s, i, a.catalog.shards()[s].layout.at(i)?)));
        compared.origins.push(None);
        match old {
            None => compared.added.push((shard, index, info)),
            Some((s, i, old)) if (old.dtype(), old.shape()) == (info.dtype(), info.shape()) => {
                compared.origins[position] = Some(starts[s] + i);
                pairs.push(Pair {
                    now: b.now(shard, index, &info).into(),
                    before: a.now(s, i, &old).into(),
                    blocks: Pair::all_blocks(info.bytes().len()),
                    unit: info.dtype().itemsize().unwrap_or(1),
                });
                positions.push((shard, index, info, position));
            }
            Some((_, _, old)) => compared.reshaped.push((shard, index, info, old)),
        }
    }
    let removed = a.infos().map(|(_, _, info)| info.name());
    compared.removed = removed.filter(|name| b.catalog.find(name).is_none()).collect();
    compared.found = compare(&pairs, hash)
        .into_iter()
        .zip(positions)
        .filter(|(difference, _)| !difference.is_empty())
        .map(|(difference, (shard, index, info, position))| Found {
            shard,
            index,
            info,
            position,
            in_page: 0,
            difference,
        })
        .collect();
    compared
}

/// Keys whose values differ.
fn metadata(a: &Contents<'_>, b: &Contents<'_>) -> Vec<String> {
    let (a, b) = (a.catalog.metadata(), b.catalog.metadata());
    let keys: BTreeSet<&str> = a.iter().chain(b).map(|(key, _)| key).collect();
    let differ = keys.into_iter().filter(|&key| key != CHECKSUMS && a.get(key) != b.get(key));
    differ.map(str::to_owned).collect()
}

impl Compared<'_> {
    pub(crate) fn report(&self) -> Differences {
        let kind = |info: &TensorInfo<'_>| (info.dtype(), info.shape().to_vec());
        let reshaped = self.reshaped.iter().map(|(_, _, new, old)| Reshaped {
            name: new.name().into(),
            from: kind(old),
            to: kind(new),
        });
        Differences {
            changed: Changes::new(self.found.iter().map(Found::change).collect(), 0),
            added: self.added.iter().map(|(_, _, info)| info.name().to_owned()).collect(),
            removed: self.removed.iter().map(|&name| name.to_owned()).collect(),
            reshaped: reshaped.collect(),
            metadata: self.metadata.clone(),
            compared: self.origins.iter().flatten().count(),
        }
    }
}
