//! The index of a sharded set: `model.safetensors.index.json`.
//!
//! ```json
//! {"metadata": {"total_size": 19240},
//!  "weight_map": {"fc1.weight": "model-00001-of-00002.safetensors", …}}
//! ```

use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

/// Where an index says each tensor is.
#[derive(Debug, PartialEq)]
pub(crate) struct Index {
    /// Shard file names, each once, in the order of their first mention.
    pub(crate) shards: Vec<String>,
    /// Tensor names, each with the place of its shard in `shards`.
    pub(crate) tensors: Vec<(String, usize)>,
    /// The sum of tensor bytes the index claims, if it does.
    pub(crate) total_size: Option<u64>,
}

/// The longest index accepted: the headers of its shards would be larger still.
pub(crate) const MAX_INDEX_LEN: u64 = super::safetensors::MAX_HEADER_LEN;

/// Reads an index and checks every shard name.
///
/// # Errors
/// [`Error::Utf8`], [`Error::Json`], [`Error::Duplicate`] for a tensor mapped twice, [`Error::Path`] for a
/// shard that is not a plain file name.
pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Index> {
    let text = std::str::from_utf8(bytes)
        .map_err(|e| Error::Utf8 { path: path.into(), offset: e.valid_up_to() as u64 })?;
    let json = |source| Error::Json { path: path.into(), what: "the index", source };
    let top: Top<'_> = serde_json::from_str(text).map_err(json)?;
    let weight_map = top.weight_map.get();
    let visitor = WeightMap { path, problem: RefCell::new(None) };
    let read = serde_json::Deserializer::from_str(weight_map).deserialize_map(&visitor);
    let (shards, tensors) = match (read, visitor.problem.into_inner()) {
        (Ok(read), _) => read,
        (Err(_), Some(problem)) => return Err(problem),
        (Err(source), None) => return Err(json(source)),
    };
    let total_size =
        top.metadata.and_then(|m| serde_json::from_str::<Totals>(m.get()).ok()).and_then(|t| t.total_size);
    Ok(Index { shards, tensors, total_size })
}

/// The text of an index for these tensors; deterministic.
pub(crate) fn encode(
    weight_map: &BTreeMap<&str, &str>,
    metadata: &BTreeMap<String, String>,
    total_size: u64,
) -> String {
    #[derive(Serialize)]
    struct Written<'a> {
        metadata: BTreeMap<&'a str, serde_json::Value>,
        weight_map: &'a BTreeMap<&'a str, &'a str>,
    }
    let mut entries: BTreeMap<&str, serde_json::Value> =
        metadata.iter().map(|(k, v)| (k.as_str(), v.as_str().into())).collect();
    entries.insert("total_size", total_size.into());
    // Maps with string keys always serialize.
    let mut text =
        serde_json::to_string_pretty(&Written { metadata: entries, weight_map }).unwrap_or_default();
    text.push('\n');
    text
}

#[derive(serde::Deserialize)]
struct Top<'a> {
    #[serde(borrow)]
    metadata: Option<&'a RawValue>,
    #[serde(borrow)]
    weight_map: &'a RawValue,
}

#[derive(serde::Deserialize)]
struct Totals {
    total_size: Option<u64>,
}

struct WeightMap<'p> {
    path: &'p Path,
    problem: RefCell<Option<Error>>,
}

impl<'de> Visitor<'de> for &WeightMap<'_> {
    type Value = (Vec<String>, Vec<(String, usize)>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensor names and shard file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let stop = |problem| {
            *self.problem.borrow_mut() = Some(problem);
            de::Error::custom("stopped")
        };
        let mut shards = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut tensors: HashMap<String, usize> = HashMap::new();
        let mut order = Vec::new();
        while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
            let place = if let Some(&place) = places.get(&shard) {
                place
            } else {
                if let Some(reason) = refuse(&shard) {
                    return Err(stop(Error::Path { path: self.path.into(), name: shard, reason }));
                }
                shards.push(shard.clone());
                places.insert(shard, shards.len() - 1);
                shards.len() - 1
            };
            if tensors.insert(tensor.clone(), place).is_some() {
                return Err(stop(Error::Duplicate { path: self.path.into(), what: "tensor", name: tensor }));
            }
            order.push((tensor, place));
        }
        Ok((shards, order))
    }
}

/// Why this is not the name of a file beside the index. Windows' separators count too: an index travels.
pub(crate) fn refuse(name: &str) -> Option<&'static str> {
    match name {
        "" => Some("it is empty"),
        "." | ".." => Some("it is a directory"),
        _ if name.contains(['/', '\\']) => Some("it leads out of the index's directory"),
        _ if name.as_bytes().get(1) == Some(&b':') => Some("it names a drive"),
        _ if name.contains('\0') => Some("it contains NUL"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(text: &str) -> &'static str {
        parse(text.as_bytes(), Path::new("i")).err().map_or("OK", |e| e.kind())
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
        ] {
            assert_eq!(kind(&named(name)), "Path", "{name:?}");
        }
        for name in ["model-00001-of-00002.safetensors", "...", "a b", "é"] {
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
            (r#"{"weight_map":{}}"#, "OK"),
            (r#"{"metadata":{"total_size":"lots"},"weight_map":{}}"#, "OK"),
        ] {
            assert_eq!(kind(text), expected, "{text}");
        }
        assert_eq!(parse(b"\xff", Path::new("i")).unwrap_err().kind(), "Utf8");
        assert_eq!(kind(&"[".repeat(100_000)), "Json");
    }

    #[test]
    fn what_is_encoded_is_read_back() {
        let map = BTreeMap::from([("a", "one"), ("b", "two"), ("c", "one")]);
        let text = encode(&map, &BTreeMap::new(), 12);
        let index = parse(text.as_bytes(), Path::new("")).unwrap();
        assert_eq!(index.shards, ["one", "two"]);
        assert_eq!(index.tensors, [("a".into(), 0), ("b".into(), 1), ("c".into(), 0)]);
        assert_eq!(index.total_size, Some(12));
    }
}
