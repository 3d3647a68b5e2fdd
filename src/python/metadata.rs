//! A file's metadata, as Python gives it.

use crate::error::{Error, quote};
use crate::layout;
use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyString};
use std::collections::BTreeMap;

pub(super) type Metadata = Option<layout::Metadata>;

/// Text by text; `None` where there is to be no metadata.
///
/// # Errors
/// `MapTensorsError` that says which entry is none.
pub(super) fn metadata(object: &Bound<'_, PyAny>) -> PyResult<Metadata> {
    if object.is_none() { Ok(None) } else { entries(object).map(|entries| Some(entries.into())) }
}

/// As [`metadata`], where there is some.
pub(super) fn entries(object: &Bound<'_, PyAny>) -> PyResult<BTreeMap<String, String>> {
    let refuse = |what: String| PyErr::from(Error::Argument(format!("metadata is text by text, and {what}")));
    let Ok(mapping) = object.cast::<PyMapping>() else {
        return Err(refuse(format!("not a {}", object.get_type().name()?)));
    };
    let mut entries = BTreeMap::new();
    for pair in mapping.items()? {
        let (key, value): (Bound<'_, PyAny>, Bound<'_, PyAny>) = pair.extract()?;
        let Ok(key) = key.cast::<PyString>() else {
            return Err(refuse(format!("a key is a {}: {}", key.get_type().name()?, key.repr()?)));
        };
        let name = key.to_str()?;
        let Ok(text) = value.cast::<PyString>() else {
            let kind = value.get_type().name()?;
            return Err(refuse(format!("{} is a {kind}; str() or json.dumps() makes it text", quote(name))));
        };
        entries.insert(name.to_owned(), text.to_str()?.to_owned());
    }
    Ok(entries)
}
