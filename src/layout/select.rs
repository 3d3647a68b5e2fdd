//! Which tensors of a model are meant.

use super::Catalog;
use crate::error::{Error, Result};
use std::ops::{Range, RangeFull};
use std::sync::Arc;

/// Which tensors are meant: all (`..`), some by name, or those whose names satisfy a predicate.
///
/// ```
/// use maptensors::{Model, Select};
///
/// // SAFETY: nobody writes to the file while it is mapped.
/// let model = unsafe { Model::open("models/digits.safetensors")? };
/// model.prefetch("fc1.weight")?.wait()?;
/// model.prefetch(["fc1.weight", "fc1.bias"])?.wait()?;
/// model.prefetch(Select::matching(|name| name.ends_with(".weight")))?.wait()?;
/// model.evict(..)?;
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone)]
pub struct Select<'a>(Inner<'a>);

#[derive(Clone)]
enum Inner<'a> {
    All,
    Names(Vec<&'a str>),
    Matching(Arc<dyn Fn(&str) -> bool + Send + Sync + 'a>),
}

impl<'a> Select<'a> {
    /// The tensors of these names.
    pub fn names<S: AsRef<str> + ?Sized + 'a>(names: impl IntoIterator<Item = &'a S>) -> Self {
        Self(Inner::Names(names.into_iter().map(AsRef::as_ref).collect()))
    }

    /// The tensors whose names satisfy a predicate.
    pub fn matching(predicate: impl Fn(&str) -> bool + Send + Sync + 'a) -> Self {
        Self(Inner::Matching(Arc::new(predicate)))
    }
}

impl From<RangeFull> for Select<'_> {
    fn from(_: RangeFull) -> Self {
        Self(Inner::All)
    }
}

impl<'a> From<&'a str> for Select<'a> {
    fn from(name: &'a str) -> Self {
        Self(Inner::Names(vec![name]))
    }
}

impl<'a, const N: usize> From<[&'a str; N]> for Select<'a> {
    fn from(names: [&'a str; N]) -> Self {
        Self(Inner::Names(names.into()))
    }
}

impl<'a, S: AsRef<str>> From<&'a [S]> for Select<'a> {
    fn from(names: &'a [S]) -> Self {
        Self(Inner::Names(names.iter().map(AsRef::as_ref).collect()))
    }
}

impl<'a> From<&'a Vec<String>> for Select<'a> {
    fn from(names: &'a Vec<String>) -> Self {
        Self::from(names.as_slice())
    }
}

impl<'a, S: AsRef<str> + ?Sized + 'a> FromIterator<&'a S> for Select<'a> {
    /// As [`Select::names`].
    fn from_iter<I: IntoIterator<Item = &'a S>>(names: I) -> Self {
        Self::names(names)
    }
}

impl std::fmt::Debug for Select<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Inner::All => f.write_str("Select(..)"),
            Inner::Names(names) => f.debug_tuple("Select").field(names).finish(),
            Inner::Matching(_) => f.write_str("Select(matching)"),
        }
    }
}

/// A tensor's shard, and its position there.
pub(crate) type Position = (usize, usize);

/// Bytes of one shard's file.
pub(crate) type Run = (usize, Range<usize>);

impl Catalog {
    /// The tensors that are meant, in file order, each once.
    ///
    /// # Errors
    /// [`Error::Missing`] for a name that is not there; [`Error::Argument`] where no tensor is meant.
    pub(crate) fn select(&self, select: &Select<'_>) -> Result<Vec<Position>> {
        let mut positions: Vec<Position> = match &select.0 {
            Inner::All => return Ok(self.positions(|_| true)),
            Inner::Names(names) => {
                let find = |name: &&str| self.find(name).ok_or_else(|| self.missing(name));
                names.iter().map(find).collect::<Result<_>>()?
            }
            Inner::Matching(predicate) => self.positions(&**predicate),
        };
        if positions.is_empty() {
            return Err(Error::Argument(format!("none of the {} tensors is selected", self.len())));
        }
        positions.sort_unstable();
        positions.dedup();
        Ok(positions)
    }

    fn positions(&self, wanted: impl Fn(&str) -> bool) -> Vec<Position> {
        let shards = self.shards().iter().enumerate();
        let all =
            shards.flat_map(|(s, shard)| shard.layout.iter().enumerate().map(move |(i, info)| (s, i, info)));
        all.filter(|(_, _, info)| wanted(info.name())).map(|(s, i, _)| (s, i)).collect()
    }

    /// The bytes of a tensor in its file.
    pub(crate) fn bytes(&self, (shard, index): Position) -> Range<usize> {
        self.shards()[shard].layout.at(index).map_or(0..0, |info| info.bytes())
    }

    pub(crate) fn name(&self, (shard, index): Position) -> &str {
        self.shards()[shard].layout.at(index).map_or("", |info| info.name())
    }

    /// The bytes of tensors in file order: what touches is one run.
    pub(crate) fn runs(&self, positions: &[Position]) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for &position in positions {
            let bytes = self.bytes(position);
            match runs.last_mut() {
                _ if bytes.is_empty() => {}
                Some((shard, run)) if *shard == position.0 && run.end == bytes.start => run.end = bytes.end,
                _ => runs.push((position.0, bytes)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::layout::{Layout, Shard};

    fn catalog() -> Catalog {
        let shard = |names: [&str; 2]| {
            let plan = Layout::builder();
            let plan = names.iter().fold(plan, |plan, name| plan.tensor(*name, DType::U8, &[4]));
            Shard { path: names[0].into(), layout: plan.build().unwrap() }
        };
        let shards = [["fc1.bias", "fc1.weight"], ["fc2.weight", "fc2.bias"]].map(shard);
        Catalog::new(shards.into()).unwrap()
    }

    #[test]
    fn a_selection_is_in_file_order_each_tensor_once_and_never_empty() {
        let catalog = catalog();
        let names = |select: Select<'_>| -> Vec<String> {
            let positions = catalog.select(&select).unwrap();
            positions.into_iter().map(|position| catalog.name(position).to_owned()).collect()
        };
        let all: Vec<_> = catalog.infos().map(|(_, info)| info.name().to_owned()).collect();
        assert_eq!(names(Select::from(..)), all);
        let backwards: Vec<_> = all.iter().chain(&all).rev().cloned().collect();
        assert_eq!(names(Select::from(&backwards)), all);
        assert_eq!(names(Select::from("fc1.bias")), ["fc1.bias"]);
        let weights = names(Select::matching(|name| name.ends_with("weight")));
        assert_eq!(weights.len(), 2);
        let missing = catalog.select(&Select::from(["fc1.bias", "fc1.bais"])).unwrap_err();
        assert!(matches!(missing, Error::Missing { name, .. } if name == "fc1.bais"));
        for none in [Select::matching(|_| false), Select::from([])] {
            assert!(matches!(catalog.select(&none), Err(Error::Argument(_))));
        }
    }
}
