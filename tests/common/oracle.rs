//! Our reader held against the reference crate's: the property that the differential test and the fuzz
//! targets share.

use maptensors::{Content, MAX_RANK, Model};
use safetensors::SafeTensors;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};

/// What the two readers said about a file.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Verdict {
    BothAccept,
    BothRefuse,
    /// A documented exception, proven to be one.
    Exception,
}

/// Both readers on one file.
///
/// # Panics
/// If they differ and no documented exception (see `src/format/safetensors/mod.rs`) explains it.
pub fn compare(file: &[u8]) -> Verdict {
    match (Model::read(Content::new(file)), SafeTensors::deserialize(file)) {
        (Ok(ours), Ok(theirs)) => {
            same(file, &ours, &theirs);
            Verdict::BothAccept
        }
        (Err(ours), Err(_)) => {
            let text = ours.to_string();
            assert!(!text.chars().any(char::is_control), "a control character in {text:?}");
            Verdict::BothRefuse
        }
        (Err(ours), Ok(_)) => {
            let header = header(file);
            let justified = match ours.kind().name() {
                "Duplicate" => has_duplicate(&header),
                "Json" => has_unusual_entry(&header),
                "Limit" => entries(&header).any(|(_, entry)| shape(entry).len() > MAX_RANK),
                _ => false,
            };
            assert!(justified, "the reference accepts what we refuse: {ours}");
            Verdict::Exception
        }
        (Ok(_), Err(theirs)) => {
            let overflows = entries(&header(file)).any(|(_, entry)| {
                let bits = entry.get("dtype").and_then(bits).unwrap_or(1);
                let shape = shape(entry);
                let elements = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
                shape.contains(&0) && elements.and_then(|n| n.checked_mul(bits)).is_none()
            });
            assert!(overflows, "we accept what the reference refuses: {theirs:?}");
            Verdict::Exception
        }
    }
}

fn same(file: &[u8], ours: &Model, theirs: &SafeTensors<'_>) {
    assert_eq!(ours.len(), theirs.len());
    let layout = ours.layout(0).unwrap();
    for (name, their) in theirs.iter() {
        let our = ours.tensor(name).unwrap();
        assert_eq!(our.shape(), their.shape(), "shape of {name:?}");
        assert_eq!(our.dtype().name(), their.dtype().to_string(), "dtype of {name:?}");
        assert_eq!(our.as_bytes(), their.data(), "bytes of {name:?}");
        let offset = their.data().as_ptr().addr() - file.as_ptr().addr();
        assert_eq!(our.info().offset(), offset as u64, "offset of {name:?}");
        assert_eq!(layout.get(name), Some(our.info()));
    }
    let (_, header) = SafeTensors::read_metadata(file).unwrap();
    assert_eq!(layout.has_metadata(), header.metadata().is_some());
    let metadata: BTreeMap<_, _> = header.metadata().clone().unwrap_or_default().into_iter().collect();
    assert_eq!(ours.metadata(), &metadata);
}

/// A JSON object with every pair there is, where a map would keep one of two.
struct Pairs(Vec<(String, Node)>);

enum Node {
    Object(Pairs),
    Other(Value),
}

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Pairs;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry::<String, Box<serde_json::value::RawValue>>()? {
                    let text = pair.1.get();
                    let node = match serde_json::from_str::<Pairs>(text) {
                        Ok(pairs) => Node::Object(pairs),
                        Err(_) => Node::Other(serde_json::from_str(text).map_err(serde::de::Error::custom)?),
                    };
                    pairs.push((pair.0, node));
                }
                Ok(Pairs(pairs))
            }
        }
        d.deserialize_map(Visit)
    }
}

impl Pairs {
    /// The last of this name, as a map would keep.
    fn get(&self, name: &str) -> Option<&Node> {
        self.0.iter().rev().find(|(key, _)| key == name).map(|(_, node)| node)
    }

    fn has_duplicate(&self) -> bool {
        let mut seen = HashSet::new();
        !self.0.iter().all(|(key, _)| seen.insert(key))
    }
}

/// The header of a file that one of the readers accepts: sound JSON.
fn header(file: &[u8]) -> Pairs {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap());
    serde_json::from_slice(&file[8..8 + usize::try_from(len).unwrap()]).unwrap()
}

fn entries(header: &Pairs) -> impl Iterator<Item = (&str, &Pairs)> {
    header.0.iter().filter(|(name, _)| name != "__metadata__").filter_map(|(name, node)| match node {
        Node::Object(entry) => Some((name.as_str(), entry)),
        Node::Other(_) => None,
    })
}

/// A tensor or metadata key is there twice.
fn has_duplicate(header: &Pairs) -> bool {
    let metadata = matches!(header.get("__metadata__"), Some(Node::Object(pairs)) if pairs.has_duplicate());
    header.has_duplicate() || metadata
}

/// An entry is an array, or its dtype an object.
fn has_unusual_entry(header: &Pairs) -> bool {
    header.0.iter().any(|(name, node)| {
        name != "__metadata__"
            && match node {
                Node::Other(value) => value.is_array(),
                Node::Object(entry) => matches!(entry.get("dtype"), Some(Node::Object(_))),
            }
    })
}

fn shape(entry: &Pairs) -> Vec<usize> {
    match entry.get("shape") {
        Some(Node::Other(value)) => serde_json::from_value(value.clone()).unwrap_or_default(),
        _ => Vec::new(),
    }
}

fn bits(node: &Node) -> Option<usize> {
    match node {
        Node::Other(value) => {
            let block = value.as_str()?.parse::<maptensors::DType>().ok()?.block();
            Some(block.bytes * 8 / block.elements)
        }
        Node::Object(_) => None,
    }
}
