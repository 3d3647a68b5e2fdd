//! Names and patterns, as people write them.

#[cfg(feature = "python")]
use super::{Catalog, Select};
use crate::error::{Error, Result, quote};
use globset::{GlobBuilder, GlobMatcher};
#[cfg(feature = "python")]
use std::collections::HashSet;

/// A pattern of names: `*` and `?` match any characters, dots and slashes included, `[ab]` and `{a,b}` a choice.
///
/// # Errors
/// [`Error::Argument`].
pub(crate) fn glob(pattern: &str) -> Result<GlobMatcher> {
    let glob = GlobBuilder::new(pattern).literal_separator(false).build();
    let glob =
        glob.map_err(|error| Error::Argument(format!("pattern {}: {}", quote(pattern), error.kind())))?;
    Ok(glob.compile_matcher())
}

#[cfg(feature = "python")]
impl Select<'_> {
    /// The tensors of these names, or whose names match these patterns. A name that is
    /// there is never read as a pattern.
    pub(crate) fn globs(catalog: &Catalog, patterns: &[String]) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let mut seen = HashSet::new();
        for pattern in patterns {
            if catalog.find(pattern).is_some() {
                names.extend(seen.insert(pattern.as_str()).then(|| pattern.clone()));
                continue;
            }
            if !pattern.contains(['*', '?', '[', '{']) {
                return Err(catalog.missing(pattern));
            }
            let glob = glob(pattern)?;
            let before = names.len();
            let mut matched = false;
            for (_, info) in catalog.infos().filter(|(_, info)| glob.is_match(info.name())) {
                matched = true;
                names.extend(seen.insert(info.name()).then(|| info.name().to_owned()));
            }
            if !matched && names.len() == before {
                return Err(catalog.missing(pattern));
            }
        }
        Ok(names)
    }
}
