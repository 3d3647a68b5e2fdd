//! The full way through a header: every form that JSON allows, every error by its name.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::JsonString;
use crate::layout::{self, Parts};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::cell::RefCell;
use std::fmt;
use std::path::Path;

/// Reads a header's text.
///
/// # Errors
/// [`Error::Json`], [`Error::Duplicate`] (fields and metadata keys), [`Error::DType`].
pub(super) fn read(text: &str, path: &Path) -> Result<Parts> {
    let header = Header { path, problem: RefCell::new(None), parts: RefCell::new(Parts::new(0)) };
    let mut json = serde_json::Deserializer::from_str(text);
    let read = json.deserialize_map(&header).and_then(|()| json.end());
    match (read, header.problem.into_inner()) {
        (Ok(()), _) => Ok(header.parts.into_inner()),
        (Err(_), Some(problem)) => Err(problem),
        (Err(source), None) => {
            Err(Error::Json { path: path.into(), what: "the header", source: source.into() })
        }
    }
}

/// What is being read, and the error to report instead of serde's where there is a better one.
struct Header<'p> {
    path: &'p Path,
    problem: RefCell<Option<Error>>,
    parts: RefCell<Parts>,
}

impl Header<'_> {
    /// Stops reading with this error.
    fn stop<E: de::Error>(&self, problem: Error) -> E {
        *self.problem.borrow_mut() = Some(problem);
        E::custom("stopped")
    }

    fn duplicate<E: de::Error>(&self, what: &'static str, name: &str) -> E {
        self.stop(Error::Duplicate { path: self.path.into(), what, name: name.into() })
    }
}

impl<'de> Visitor<'de> for &Header<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut described = false;
        while let Some(name) = map.next_key_seed(JsonString)? {
            if name == "__metadata__" {
                // Also behind a null, which leaves no metadata.
                if std::mem::replace(&mut described, true) {
                    return Err(self.duplicate("key", "__metadata__"));
                }
                // `null` is no metadata, as in the reference.
                let metadata = map.next_value_seed(Metadata { header: self })?;
                self.parts.borrow_mut().metadata = metadata;
            } else {
                map.next_value_seed(TensorEntry { header: self, name: &name })?;
            }
        }
        Ok(())
    }
}

/// `{"dtype": …, "shape": […], "data_offsets": [begin, end]}`
struct TensorEntry<'h, 'p> {
    header: &'h Header<'p>,
    name: &'h str,
}

impl<'de> DeserializeSeed<'de> for TensorEntry<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorEntry<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut dtype, mut offsets, mut first_dim) = (None, None, None);
        while let Some(key) = map.next_key_seed(JsonString)? {
            match &*key {
                "dtype" if dtype.is_some() => return Err(self.header.duplicate("field", "dtype")),
                "shape" if first_dim.is_some() => return Err(self.header.duplicate("field", "shape")),
                "data_offsets" if offsets.is_some() => {
                    return Err(self.header.duplicate("field", "data_offsets"));
                }
                "dtype" => {
                    let found = map.next_value_seed(JsonString)?;
                    dtype = Some(DType::from_safetensors_name(found.as_bytes()).ok_or_else(|| {
                        self.header.stop(Error::DType {
                            path: self.header.path.into(),
                            tensor: self.name.into(),
                            found: format!("of unknown dtype \"{found}\""),
                            expected: "one of BOOL, U8, …, F64".into(),
                        })
                    })?);
                }
                "shape" => {
                    first_dim = Some(self.header.parts.borrow().dims_len());
                    map.next_value_seed(Shape { header: self.header })?;
                }
                "data_offsets" => offsets = Some(map.next_value::<(u64, u64)>()?),
                _ => map.next_value_seed(Ignored)?,
            }
        }
        let dtype = dtype.ok_or_else(|| de::Error::missing_field("dtype"))?;
        let first_dim = first_dim.ok_or_else(|| de::Error::missing_field("shape"))?;
        let (begin, end) = offsets.ok_or_else(|| de::Error::missing_field("data_offsets"))?;
        let mut parts = self.header.parts.borrow_mut();
        // A header is at most 100 MB: these places fit.
        parts
            .intern(self.name)
            .and_then(|name| parts.push(name, dtype, first_dim, begin, end))
            .ok_or_else(|| de::Error::custom("too large a header"))
    }
}

struct Shape<'h, 'p> {
    header: &'h Header<'p>,
}

impl<'de> DeserializeSeed<'de> for Shape<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Shape<'_, '_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of dimensions")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(dim) = seq.next_element()? {
            self.header.parts.borrow_mut().push_dim(dim);
        }
        Ok(())
    }
}

/// A value of no interest, read as strictly as one of interest: same nesting limit, same numbers.
/// (`IgnoredAny` would let through what the reference refuses.)
struct Ignored;

impl<'de> DeserializeSeed<'de> for Ignored {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Ignored {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IgnoredAny.expecting(f)
    }
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Ignored)?.is_some() {}
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(JsonString)?.is_some() {
            map.next_value_seed(Ignored)?;
        }
        Ok(())
    }
}

/// `"__metadata__"`: an object of strings, or null.
struct Metadata<'h, 'p> {
    header: &'h Header<'p>,
}

impl<'de> DeserializeSeed<'de> for Metadata<'_, '_> {
    type Value = Option<layout::Metadata>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Metadata<'_, '_> {
    type Value = Option<layout::Metadata>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }
    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        strings(map, |key| self.header.duplicate("metadata key", key)).map(Some)
    }
}

/// An object of strings with no key twice: what the fast way reads metadata with.
pub(super) struct MetadataMap(pub(super) layout::Metadata);

impl<'de> de::Deserialize<'de> for MetadataMap {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = MetadataMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<MetadataMap, A::Error> {
                strings(map, |_| de::Error::custom("duplicate key")).map(MetadataMap)
            }
        }
        d.deserialize_map(Strings)
    }
}

fn strings<'de, A: MapAccess<'de>>(
    mut map: A,
    duplicate: impl Fn(&str) -> A::Error,
) -> Result<layout::Metadata, A::Error> {
    let mut strings = layout::Metadata::new();
    while let Some((key, value)) = map.next_entry::<String, String>()? {
        if strings.contains_key(&key) {
            return Err(duplicate(&key));
        }
        strings.insert(key, value);
    }
    Ok(strings)
}
