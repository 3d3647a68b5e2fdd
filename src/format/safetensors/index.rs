//! The index of a sharded set: `model.safetensors.index.json`.
//!
//! ```json
//! {"metadata": {"total_size": 19240},
//!  "weight_map": {"fc1.weight": "model-00001-of-00002.safetensors", …}}
//! ```

use crate::error::{Error, Result};
use crate::format::JsonString;
use hashbrown::{HashMap, HashSet};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Where an index says each tensor is.
#[derive(Debug)]
pub(crate) struct Index {
    /// Paths of shards from the index's directory, each once and in its plainest form, in the order of their first
    /// mention.
    pub(crate) shards: Vec<String>,
    /// All tensor names, one behind the other: a String for each would cost more than reading them.
    names: String,
    /// Where each name ends in `names`, and the place of its shard in `shards`.
    ends: Vec<(usize, u32)>,
    /// `metadata.total_size`, which nothing relies on: no more than a hint, and often wrong.
    pub(crate) total_size: Option<u64>,
    /// Which is the model, where a whole file of its name stands beside it, if a save has said so.
    pub(crate) truth: Option<Truth>,
}

/// Which of two is the model: a whole file, or the index of its name beside it. A save that puts one in the other's
/// place says so in the index as long as both are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Truth {
    File,
    Index,
}

impl Truth {
    /// The key of the index that says it; other loaders pass it over.
    const KEY: &'static str = "maptensors.model";

    fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Index => "index",
        }
    }

    fn parse(value: &RawValue) -> Option<Self> {
        let name: String = serde_json::from_str(value.get()).ok()?;
        [Self::File, Self::Index].into_iter().find(|truth| truth.name() == name)
    }
}

impl Index {
    /// Tensor names, each with the place of its shard in `shards`, in the index's order.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, usize)> {
        let starts = std::iter::once(0).chain(self.ends.iter().map(|(end, _)| *end));
        starts.zip(&self.ends).map(|(start, &(end, shard))| (&self.names[start..end], shard as usize))
    }

    /// A name that is there more than once.
    fn twice(&self) -> Option<String> {
        let mut seen: HashSet<&str> = HashSet::with_capacity(self.ends.len());
        self.tensors().find(|(name, _)| !seen.insert(name)).map(|(name, _)| name.to_owned())
    }
}

/// The longest index accepted: the headers of its shards would be larger still.
pub(crate) const MAX_INDEX_LEN: u64 = super::MAX_HEADER_LEN;

/// Reads an index and checks every shard name.
///
/// # Errors
/// [`Error::Utf8`], [`Error::Json`], [`Error::Duplicate`] for a tensor mapped twice, [`Error::Path`] for a
/// shard that is not in the index's directory, or below it.
pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Index> {
    let text = std::str::from_utf8(bytes)
        .map_err(|e| Error::Utf8 { path: path.into(), offset: e.valid_up_to() as u64 })?;
    let visitor = Top { path, problem: RefCell::new(None) };
    let mut json = serde_json::Deserializer::from_str(text);
    let read = json.deserialize_map(&visitor).and_then(|index| json.end().map(|()| index));
    match (read, visitor.problem.into_inner()) {
        (Ok(index), _) => Ok(index),
        (Err(_), Some(problem)) => Err(problem),
        (Err(source), None) => {
            Err(Error::Json { path: path.into(), what: "the index", source: source.into() })
        }
    }
}

/// The text of an index for these tensors; deterministic.
pub(crate) fn encode(
    weight_map: &BTreeMap<&str, &str>,
    metadata: &BTreeMap<&str, &str>,
    total_size: u64,
) -> String {
    #[derive(Serialize)]
    struct Written<'a> {
        metadata: BTreeMap<&'a str, serde_json::Value>,
        weight_map: &'a BTreeMap<&'a str, &'a str>,
    }
    let mut entries: BTreeMap<&str, serde_json::Value> =
        metadata.iter().map(|(&key, &text)| (key, text.into())).collect();
    entries.insert("total_size", total_size.into());
    // Maps with string keys always serialize.
    let mut text =
        serde_json::to_string_pretty(&Written { metadata: entries, weight_map }).unwrap_or_default();
    text.push('\n');
    text
}

/// The same index, saying which is the model.
pub(crate) fn marked(text: &str, truth: Truth) -> String {
    text.replacen('{', &format!("{{\n  \"{}\": \"{}\",", Truth::KEY, truth.name()), 1)
}

/// The index's outermost object.
struct Top<'p> {
    path: &'p Path,
    problem: RefCell<Option<Error>>,
}

impl Top<'_> {
    fn stop<E: de::Error>(&self, problem: Error) -> E {
        *self.problem.borrow_mut() = Some(problem);
        E::custom("stopped")
    }
}

impl<'de> Visitor<'de> for &Top<'_> {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let (mut index, mut total_size, mut truth) = (None, None, None);
        while let Some(key) = map.next_key_seed(JsonString)? {
            match &*key {
                "metadata" => total_size = stated_size(map.next_value::<&RawValue>()?),
                Truth::KEY => truth = Truth::parse(map.next_value::<&RawValue>()?),
                "weight_map" if index.is_some() => {
                    let (path, name) = (self.path.into(), key.into_owned());
                    return Err(self.stop(Error::Duplicate { path, what: "key", name }));
                }
                "weight_map" => index = Some(map.next_value_seed(WeightMap { top: self })?),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let mut index: Index = index.ok_or_else(|| de::Error::missing_field("weight_map"))?;
        index.total_size = total_size;
        index.truth = truth;
        Ok(index)
    }
}

/// `total_size`, if it is there and a size: metadata may be anything.
fn stated_size(metadata: &RawValue) -> Option<u64> {
    #[derive(Deserialize)]
    struct Metadata {
        total_size: u64,
    }
    serde_json::from_str(metadata.get()).ok().map(|Metadata { total_size }| total_size)
}

/// `{"tensor": "shard", …}`
struct WeightMap<'t, 'p> {
    top: &'t Top<'p>,
}

impl<'de> DeserializeSeed<'de> for WeightMap<'_, '_> {
    type Value = Index;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Index, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_, '_> {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensor names and shard file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let path = self.top.path;
        let mut index = Index {
            shards: Vec::new(),
            names: String::new(),
            ends: Vec::new(),
            total_size: None,
            truth: None,
        };
        let mut places: HashMap<String, u32> = HashMap::new();
        let mut last = 0;
        while let Some(tensor) = map.next_key_seed(JsonString)? {
            let shard = plainest(map.next_value_seed(JsonString)?);
            // Neighbours are mostly in the same file.
            if index.shards.get(last as usize).is_none_or(|name| *name != *shard) {
                last = if let Some(&place) = places.get(&*shard) {
                    place
                } else {
                    if let Some(reason) = refuse(&shard) {
                        let (path, name) = (path.into(), shard.into_owned());
                        return Err(self.top.stop(Error::Path { path, name, reason }));
                    }
                    let place = u32::try_from(places.len()).map_err(de::Error::custom)?;
                    index.shards.push(shard.clone().into_owned());
                    places.insert(shard.into_owned(), place);
                    place
                };
            }
            index.names.push_str(&tensor);
            index.ends.push((index.names.len(), last));
        }
        if let Some(name) = index.twice() {
            let path = path.into();
            return Err(self.top.stop(Error::Duplicate { path, what: "tensor", name }));
        }
        Ok(index)
    }
}

/// A path without what says nothing: `./a//b` is `a/b`. An absolute one stays so.
fn plainest(name: Cow<'_, str>) -> Cow<'_, str> {
    if !name.split('/').any(|part| part == "." || part.is_empty()) || name.starts_with('/') {
        return name;
    }
    // What names a directory keeps doing so.
    let (rest, last) = name.rsplit_once('/').unwrap_or(("", &name));
    let parts = rest.split('/').filter(|part| !part.is_empty() && *part != ".");
    let parts: Vec<&str> = parts.chain([last]).collect();
    Cow::Owned(parts.join("/"))
}

/// Why this does not lead to a file in the index's directory, or below it. Windows' separators count too: an index
/// travels.
pub(crate) fn refuse(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("it is empty");
    }
    if name.starts_with('/') {
        return Some("it is absolute: shards are in the index's directory, or below it");
    }
    if name.contains('\\') {
        return Some("it has a backslash in it, which separates directories on Windows: write it with /");
    }
    if name.as_bytes().get(1) == Some(&b':') {
        return Some("it names a drive");
    }
    if name.contains('\0') {
        return Some("it contains NUL");
    }
    match name.split('/').next_back() {
        Some("" | "." | "..") => Some("it is a directory"),
        _ if name.split('/').any(|part| part == "..") => {
            Some("it has .. in it, and may lead out of the index's directory")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(text: &str) -> &'static str {
        parse(text.as_bytes(), Path::new("i")).err().map_or("OK", |e| e.kind().name())
    }

    #[test]
    fn every_way_an_index_can_lie_has_its_error() {
        let named = |name: &str| serde_json::json!({ "weight_map": { "a": name } }).to_string();
        for name in [
            "../../etc/passwd",
            "/etc/passwd",
            "a/../../b",
            "..\\x",
            "C:\\x",
            "",
            ".",
            "..",
            "x/",
            "a\0b",
            "C:x",
            "a/..",
            "a/../b",
            "./..",
            "./",
            "/a",
            "//a",
            "./C:x/..",
        ] {
            assert_eq!(kind(&named(name)), "Path", "{name:?}");
        }
        for name in ["model-00001-of-00002.safetensors", "...", "a b", "é", "./a", "a/b", "a//./b", "..a/b.."]
        {
            assert_eq!(kind(&named(name)), "OK", "{name:?}");
        }
        for (text, expected) in [
            ("", "Json"),
            ("[]", "Json"),
            ("{}", "Json"),
            (r#"{"weight_map":null}"#, "Json"),
            (r#"{"weight_map":[]}"#, "Json"),
            (r#"{"weight_map":{"a":1}}"#, "Json"),
            (r#"{"weight_map":{"a":"x"}}x"#, "Json"),
            (r#"{"weight_map":{"a":"x","a":"x"}}"#, "Duplicate"),
            (r#"{"weight_map":{"a":"x","\u0061":"y"}}"#, "Duplicate"),
            (r#"{"weight_map":{},"weight_map":{}}"#, "Duplicate"),
            (r#"{"weight_map":{},"other":[1,{"a":null}],"metadata":[]}"#, "OK"),
            (r#"{"weight_map":{}}"#, "OK"),
            (r#"{"metadata":{"total_size":"lots"},"weight_map":{}}"#, "OK"),
        ] {
            assert_eq!(kind(text), expected, "{text}");
        }
        assert_eq!(parse(b"\xff", Path::new("i")).unwrap_err().kind().name(), "Utf8");
        assert_eq!(kind(&"[".repeat(100_000)), "Json");
    }

    #[test]
    fn a_shard_is_one_however_it_is_spelled() {
        let text = r#"{"weight_map":{"a":"x/y","b":"./x/y","c":"x//./y","d":"y"}}"#;
        assert_eq!(parse(text.as_bytes(), Path::new("i")).unwrap().shards, ["x/y", "y"]);
    }

    #[test]
    fn an_index_says_which_is_the_model_only_if_a_save_has_said_so() {
        let text = encode(&BTreeMap::from([("a", "x")]), &BTreeMap::new(), 1);
        let truth = |text: &str| parse(text.as_bytes(), Path::new("i")).unwrap().truth;
        assert_eq!(truth(&text), None);
        for said in [Truth::File, Truth::Index] {
            assert_eq!(truth(&marked(&text, said)), Some(said));
        }
        assert_eq!(truth(r#"{"maptensors.model":7,"weight_map":{}}"#), None);
    }

    #[test]
    fn what_is_encoded_is_read_back() {
        let map = BTreeMap::from([("a", "one"), ("b", "two"), ("c", "one")]);
        let text = encode(&map, &BTreeMap::new(), 12);
        let index = parse(text.as_bytes(), Path::new("")).unwrap();
        assert_eq!(index.shards, ["one", "two"]);
        assert_eq!(index.tensors().collect::<Vec<_>>(), [("a", 0), ("b", 1), ("c", 0)]);
    }
}
