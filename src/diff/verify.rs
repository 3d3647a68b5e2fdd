//! Holding a model against the checksums that it carries.

use super::Contents;
use super::digest::{self, CHECKSUMS};
use crate::error::{Error, Result};
use crate::layout::Catalog;
use std::collections::HashMap;

/// What is checked when a model is opened: see [`OpenOptions::verify`](crate::OpenOptions::verify).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Verify {
    /// Nothing but the header: opening reads no data.
    #[default]
    Never,
    /// Every tensor, against the checksum that the file carries: opening reads everything.
    All,
}

impl Catalog {
    /// The checksums that the files carry, of all of them together; `None` if none carries any.
    ///
    /// # Errors
    /// [`Error::Json`].
    pub(crate) fn stated_sums(&self) -> Result<Option<HashMap<String, u128>>> {
        let mut stated = None;
        for shard in self.shards() {
            if let Some(text) = shard.layout.metadata().text(CHECKSUMS) {
                stated.get_or_insert_with(HashMap::new).extend(digest::decode(text, &shard.path)?);
            }
        }
        Ok(stated)
    }

    /// What an index states of the size of all tensors and what it is, in bytes, where these differ.
    pub(crate) fn misstated_size(&self) -> Option<(u64, u64)> {
        let found = self.stated_size?;
        let expected = self.infos().map(|(_, info)| info.nbytes()).sum();
        (found != expected).then_some((found, expected))
    }

    /// The checksum of every tensor in the files, in file order, where it is known without reading them.
    pub(crate) fn known_sums(&self) -> Option<&Vec<u128>> {
        if let Some(sums) = self.sums.get() {
            return Some(sums);
        }
        let stated = self.stated_sums().ok().flatten()?;
        let sums: Option<Vec<u128>> =
            self.infos().map(|(_, info)| stated.get(info.name()).copied()).collect();
        Some(self.keep_sums(sums?))
    }

    /// Keeps the checksums of what the files hold.
    pub(crate) fn keep_sums(&self, sums: Vec<u128>) -> &Vec<u128> {
        self.sums.get_or_init(|| sums)
    }
}

impl Contents<'_> {
    /// Checks every tensor against the checksum that its file carries.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are none, [`Error::Checksum`].
    pub(crate) fn verify(&self) -> Result<()> {
        let path = self.catalog.shards().first().map(|shard| shard.path.clone()).unwrap_or_default();
        let stated = self.catalog.stated_sums()?.ok_or_else(|| {
            Error::Argument(format!(
                "{}: there is nothing to verify: it carries no checksums (save it with checksums)",
                crate::error::printable(&path.to_string_lossy())
            ))
        })?;
        if let Some((_, _, bare)) = self.infos().find(|(_, _, info)| !stated.contains_key(info.name())) {
            return Err(Error::Argument(format!(
                "{}: it carries checksums of some tensors only: there is none of {}",
                crate::error::printable(&path.to_string_lossy()),
                crate::error::quote(bare.name())
            )));
        }
        let sums = self.hashed(|s, i, info| self.now(s, i, info))?;
        let mut wrong = self.infos().zip(sums).filter_map(|((shard, _, info), sum)| {
            let stated = stated.get(info.name()).copied();
            (stated != Some(sum)).then_some((shard, info.name(), sum, stated))
        });
        let Some((shard, tensor, found, expected)) = wrong.next() else { return Ok(()) };
        Err(Error::Checksum {
            path: self.catalog.shards()[shard].path.clone(),
            tensor: tensor.into(),
            found: digest::hex(found),
            expected: expected.map_or_else(|| "none".into(), digest::hex),
            others: wrong.map(|(_, name, ..)| name.to_owned()).collect(),
        })
    }
}
