//! Which tensors a model has, over all its files.

use super::{Layout, Metadata, TensorInfo};
use crate::error::{Error, Result};
use hashbrown::{DefaultHashBuilder, HashTable, hash_table::Entry};
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// One file of a model.
#[derive(Clone)]
pub(crate) struct Shard {
    /// As it was opened; empty for bytes.
    pub(crate) path: PathBuf,
    pub(crate) layout: Layout,
}

/// The files of a model, and the way from a name to its place.
#[derive(Clone)]
pub(crate) struct Catalog {
    shards: Vec<Shard>,
    /// For several shards; one has its layout's own lookup.
    lookup: HashTable<(u32, u32)>,
    hasher: DefaultHashBuilder,
    /// For several shards; one has its layout's own metadata.
    metadata: Metadata,
    /// The checksum of every tensor, in file order, as the files hold them: once somebody asked.
    pub(crate) sums: OnceLock<Vec<u128>>,
    /// The index that names the shards, if they were opened by one.
    pub(crate) index: Option<PathBuf>,
    /// The size of all tensors, as an index states it.
    pub(crate) stated_size: Option<u64>,
}

impl Catalog {
    /// # Errors
    /// [`Error::Duplicate`] for a tensor that is in two files.
    pub(crate) fn new(shards: Vec<Shard>) -> Result<Self> {
        let mut catalog = Self {
            shards: Vec::new(),
            lookup: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            metadata: Metadata::new(),
            sums: OnceLock::new(),
            index: None,
            stated_size: None,
        };
        if shards.len() != 1 {
            catalog.lookup.reserve(shards.iter().map(|s| s.layout.len()).sum(), |_| 0);
            for (s, shard) in (0u32..).zip(&shards) {
                for (i, info) in (0u32..).zip(shard.layout.iter()) {
                    let name = |&(s, i): &(u32, u32)| {
                        shards[s as usize].layout.at(i as usize).map_or("", |info| info.name())
                    };
                    let hash = catalog.hasher.hash_one(info.name());
                    let same = |place: &(u32, u32)| name(place) == info.name();
                    match catalog.lookup.entry(hash, same, |place| catalog.hasher.hash_one(name(place))) {
                        Entry::Vacant(slot) => slot.insert((s, i)),
                        Entry::Occupied(_) => {
                            let (path, name) = (shard.path.clone(), info.name().into());
                            return Err(Error::Duplicate { path, what: "tensor", name });
                        }
                    };
                }
                for (key, value) in shard.layout.metadata() {
                    catalog.metadata.insert_new(key, value);
                }
            }
        }
        catalog.shards = shards;
        Ok(catalog)
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|s| s.layout.len()).sum()
    }

    /// The shard and the place in it of the tensor called `name`.
    pub(crate) fn find(&self, name: &str) -> Option<(usize, usize)> {
        if let [only] = self.shards.as_slice() {
            return only.layout.position(name).map(|index| (0, index));
        }
        let same = |&(s, i): &(u32, u32)| {
            self.shards[s as usize].layout.at(i as usize).is_some_and(|info| info.name() == name)
        };
        let &(s, i) = self.lookup.find(self.hasher.hash_one(name), same)?;
        Some((s as usize, i as usize))
    }

    /// All tensors with their shard's place, in file order.
    pub(crate) fn infos(&self) -> impl Iterator<Item = (usize, TensorInfo<'_>)> {
        self.shards.iter().enumerate().flat_map(|(s, shard)| shard.layout.iter().map(move |info| (s, info)))
    }

    pub(crate) fn metadata(&self) -> &Metadata {
        match self.shards.as_slice() {
            [only] => only.layout.metadata(),
            _ => &self.metadata,
        }
    }

    /// Other metadata, in place of that of all files.
    pub(crate) fn set_metadata(&mut self, metadata: Option<Metadata>) {
        let mut given = Some(metadata.clone());
        for shard in &mut self.shards {
            shard.layout.set_metadata(given.take().flatten());
        }
        self.metadata = metadata.unwrap_or_default();
    }

    /// The error for a name that is not there.
    pub(crate) fn missing(&self, name: &str) -> Error {
        // Likeness takes the product of both lengths, and a file's names are as long as it likes.
        const LONGEST: usize = 256;
        const MOST: usize = 20_000;
        let path = self.shards.first().map_or(Path::new(""), |s| &s.path);
        let mut near: Vec<(f64, &str)> = self
            .infos()
            .take(MOST)
            .filter(|(_, info)| info.name().len().max(name.len()) <= LONGEST)
            .map(|(_, info)| (strsim::jaro_winkler(info.name(), name), info.name()))
            .filter(|(likeness, _)| *likeness > 0.8)
            .collect();
        near.sort_by(|a, b| b.0.total_cmp(&a.0));
        let near: Vec<String> = near.iter().take(3).map(|(_, name)| crate::error::quote(name)).collect();
        let hint = match near.as_slice() {
            [] => format!(" among its {}", self.len()),
            names => format!("; did you mean {}?", names.join(" or ")),
        };
        Error::Missing { path: path.into(), name: name.into(), hint }
    }
}
