//! A header for a planned layout.

use super::{MAX_HEADER_LEN, PREFIX_LEN};
use crate::error::{Error, Result, quote};
use crate::layout::{Layout, Metadata, Value};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

/// Files below this size get a header padded to 64 bytes rather than to a page.
const SMALL_FILE: u64 = 64 * 1024;

/// The header (length field included) for `layout`, and the layout placed behind it.
///
/// The header is padded with spaces, which every reader skips, until the data starts on a 4096-byte
/// boundary (64 in a small file). Same layout, same bytes.
///
/// # Errors
/// [`Error::Limit`] if no reader would accept so long a header.
pub(crate) fn encode(layout: &Layout, path: &Path) -> Result<(Vec<u8>, Layout)> {
    let mut json = Vec::with_capacity(PREFIX_LEN + 128 * layout.len() + 64);
    json.extend([0; PREFIX_LEN]);
    // Writing to memory and serializing strings cannot fail; the error type says otherwise.
    let metadata = texts(layout.metadata())?;
    write_json(&mut json, layout, &metadata).map_err(Error::io(path, "encoding the header"))?;

    json.resize(padded(json.len(), layout.data_len()), b' ');
    finish(&mut json, metadata_len(metadata), path)?;
    let placed = layout.clone().placed_at(json.len() as u64);
    Ok((json, placed))
}

/// Metadata as the format holds it: text by text.
///
/// # Errors
/// [`Error::Argument`] for a value that is no string.
pub(crate) fn texts(metadata: &Metadata) -> Result<BTreeMap<&str, &str>> {
    let refused = |key: &str, value: &Value| {
        Error::Argument(format!(
            "metadata {} is {}, and safetensors holds strings alone: give it as text (such as its to_string())",
            quote(key),
            value.kind()
        ))
    };
    let text = |(key, value)| Value::as_str(value).map(|text| (key, text)).ok_or_else(|| refused(key, value));
    metadata.iter().map(text).collect()
}

/// The length of a header (length field included) once it is padded, before so much data.
pub(crate) fn padded(unpadded: usize, data_len: u64) -> usize {
    let small = (unpadded as u64).next_multiple_of(64).saturating_add(data_len) < SMALL_FILE;
    unpadded.next_multiple_of(if small { 64 } else { 4096 })
}

/// The bytes of metadata, about.
pub(crate) fn metadata_len<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> u64 {
    entries.into_iter().map(|(key, value)| (key.len() + value.len()) as u64).sum()
}

/// Fills in the length field, which stands before the text; so many bytes of that are metadata.
///
/// # Errors
/// [`Error::Limit`].
pub(crate) fn finish(header: &mut [u8], metadata: u64, path: &Path) -> Result<()> {
    let len = header.len().saturating_sub(PREFIX_LEN) as u64;
    if len > MAX_HEADER_LEN {
        // Every shard has all of the metadata.
        let hint = Some(if metadata > MAX_HEADER_LEN / 2 {
            "most of it is metadata, which the header holds whole: save less of it, or put it into a tensor"
        } else {
            "split the tensors over shards with max_shard_size"
        });
        let limit = MAX_HEADER_LEN;
        return Err(Error::Limit { path: path.into(), what: "the header length", found: len, limit, hint });
    }
    header[..PREFIX_LEN].copy_from_slice(&len.to_le_bytes());
    Ok(())
}

/// The header for a layout that is placed already, padded to end where the data starts; `None` if it would
/// not fit.
pub(crate) fn encode_placed(layout: &Layout, path: &Path) -> Result<Option<Vec<u8>>> {
    let mut json = vec![0; PREFIX_LEN];
    let metadata = texts(layout.metadata())?;
    write_json(&mut json, layout, &metadata).map_err(Error::io(path, "encoding the header"))?;
    let room = usize::try_from(layout.data_start()).unwrap_or_default();
    if json.len() > room {
        return Ok(None);
    }
    json.resize(room, b' ');
    json[..PREFIX_LEN].copy_from_slice(&((room - PREFIX_LEN) as u64).to_le_bytes());
    Ok(Some(json))
}

fn write_json(out: &mut Vec<u8>, layout: &Layout, metadata: &BTreeMap<&str, &str>) -> std::io::Result<()> {
    out.push(b'{');
    let mut separator = "";
    if layout.has_metadata() {
        out.extend(b"\"__metadata__\":");
        serde_json::to_writer(&mut *out, metadata)?;
        separator = ",";
    }
    for info in layout {
        out.extend(separator.as_bytes());
        serde_json::to_writer(&mut *out, info.name())?;
        write!(out, ":{{\"dtype\":\"{}\",\"shape\":[", info.dtype().name())?;
        for (i, dim) in info.shape().iter().enumerate() {
            write!(out, "{}{dim}", if i == 0 { "" } else { "," })?;
        }
        let range = layout.relative(&info);
        write!(out, "],\"data_offsets\":[{},{}]}}", range.start, range.end)?;
        separator = ",";
    }
    out.push(b'}');
    Ok(())
}
