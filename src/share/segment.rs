//! A segment: a safetensors file that is never changed, and the note in its metadata.

use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::map::Mapping;
use crate::model::layout_of;
use crate::os::disk::Dir;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// The metadata entry that is ours.
pub(super) const KEY: &str = "maptensors.share";

/// Segments that a generation may list; one that is written here has far fewer.
const MOST: usize = 1024;

/// Numbers from here on are nobody's: counting on from one could not overflow.
pub(super) const LIMIT: u64 = 1 << 62;

/// What a segment says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// Its own number: a file that was written anew since it was looked up has another.
    pub(super) number: u64,
    /// The generation that it was written for.
    pub(super) generation: u64,
    /// Of a carried tensor, the generation in which it last changed. All others did in this segment's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) versions: BTreeMap<String, u64>,
    /// What else makes up the generation: in the segment that was written last for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) head: Option<Head>,
}

/// What makes up a generation beside its head.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// Older segments, newest first: a tensor lives in the first that has it.
    pub(super) segments: Vec<u64>,
    /// Names that older segments have and the generation does not.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(super) removed: BTreeSet<String>,
}

impl Note {
    /// As the metadata holds it.
    pub(super) fn encode(&self, path: &Path) -> Result<String> {
        let json = |source: serde_json::Error| Error::Json {
            path: path.into(),
            what: "the note of a segment",
            source: source.into(),
        };
        serde_json::to_string(self).map_err(json)
    }

    fn parse(layout: &Layout, number: u64, path: &Path) -> Result<Self> {
        let damaged = |what: String| Error::Publication { path: path.into(), what };
        let text = layout.metadata().text(KEY).ok_or_else(|| damaged(format!("there is no {KEY}")))?;
        let json = |source: serde_json::Error| Error::Json {
            path: path.into(),
            what: "the note of a segment",
            source: source.into(),
        };
        let note: Self = serde_json::from_str(text).map_err(json)?;
        if note.number != number {
            return Err(damaged(format!("it is segment {}, not {number}", note.number)));
        }
        if note.generation >= LIMIT {
            return Err(damaged(format!("its generation is {}", note.generation)));
        }
        let Some(head) = &note.head else { return Ok(note) };
        if head.segments.len() > MOST {
            return Err(damaged(format!(
                "it lists {} segments, at most {MOST} make sense",
                head.segments.len()
            )));
        }
        // In falling order there is no circle, and nothing twice.
        let falling = std::iter::once(&number).chain(&head.segments).is_sorted_by(|a, b| a > b);
        if !falling || head.segments.contains(&0) {
            return Err(damaged("the segments that it lists are not older, newest first".into()));
        }
        Ok(note)
    }
}

/// A segment that is there.
#[derive(Debug)]
pub(super) struct Segment {
    /// Its content. Without our own note.
    pub(super) layout: Layout,
    pub(super) note: Note,
}

impl Segment {
    /// The generation in which a tensor of it last changed.
    pub(super) fn version(&self, name: &str) -> u64 {
        self.note
            .versions
            .get(name)
            .map_or(self.note.generation, |version| *version.min(&self.note.generation))
    }
}

/// A segment, and its file, open; and its read-only memory, once a reader asked for it.
pub(super) struct Opened {
    pub(super) segment: Segment,
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) mapping: OnceLock<Arc<Mapping>>,
}

/// `5.safetensors`.
pub(super) fn file_name(number: u64) -> OsString {
    format!("{number}.safetensors").into()
}

/// The number of the segment that a file is by its name; `None` for any other.
pub(super) fn number_of(name: &OsStr) -> Option<u64> {
    let digits = name.to_str()?.strip_suffix(".safetensors")?;
    let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    // One name for each number.
    ((1..LIMIT).contains(&number) && file_name(number) == name).then_some(number)
}

/// Opens a segment of a directory and reads its header.
///
/// # Errors
/// [`Error::Io`]; [`Error::NotRegular`]; those of the header; [`Error::Publication`] for a note that is not
/// what it should be.
pub(super) fn open(dir: &Dir, directory: &Path, number: u64) -> Result<Opened> {
    let name = file_name(number);
    let path = directory.join(&name);
    let file = dir.open_file(&name, false).map_err(Error::io(&path, "opening a segment"))?;
    let stat = file.metadata().map_err(Error::io(&path, "asking for its length"))?;
    if !stat.is_file() {
        return Err(Error::NotRegular { path, found: "no file" });
    }
    let mut layout = layout_of(&file, stat.len(), &path)?;
    let note = Note::parse(&layout, number, &path)?;
    let mut metadata = layout.metadata().clone();
    metadata.remove(KEY);
    layout.set_metadata(Some(metadata));
    Ok(Opened { segment: Segment { layout, note }, file, path, mapping: OnceLock::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn only_names_that_are_written_here_are_segments() {
        for (name, expected) in [
            ("1.safetensors", Some(1)),
            ("4611686018427387903.safetensors", Some(LIMIT - 1)),
            ("4611686018427387904.safetensors", None),
            ("99999999999999999999999.safetensors", None),
            ("0.safetensors", None),
            ("01.safetensors", None),
            ("+1.safetensors", None),
            ("-1.safetensors", None),
            (".safetensors", None),
            ("1.safetensors.tmp", None),
            ("model.safetensors", None),
            ("control", None),
        ] {
            assert_eq!(number_of(name.as_ref()), expected, "{name}");
        }
    }

    #[test]
    fn a_note_that_lies_is_an_error() {
        let parse = |text: &str| {
            let layout = Layout::builder().tensor("a", DType::U8, &[1]).metadata(KEY, text).build().unwrap();
            Note::parse(&layout, 9, Path::new("")).map_err(|error| error.kind().name())
        };
        let long = (1..=1025u64).rev().map(|n| n.to_string()).collect::<Vec<_>>().join(",");
        for (text, expected) in [
            (r#"{"number":9,"generation":3}"#, None),
            (r#"{"number":9,"generation":3,"head":{"segments":[8,7,1],"removed":["x"]}}"#, None),
            (r#"{"number":9,"generation":3,"head":{"segments":[]}}"#, None),
            (r#"{"number":9,"generation":3,"versions":{"a":2}}"#, None),
            (r#"{"number":8,"generation":3}"#, Some("Publication")),
            (r#"{"number":9,"generation":4611686018427387904}"#, Some("Publication")),
            (r#"{"number":9,"generation":3,"head":{"segments":[9]}}"#, Some("Publication")),
            (r#"{"number":9,"generation":3,"head":{"segments":[10]}}"#, Some("Publication")),
            (r#"{"number":9,"generation":3,"head":{"segments":[7,7]}}"#, Some("Publication")),
            (r#"{"number":9,"generation":3,"head":{"segments":[1,2]}}"#, Some("Publication")),
            (r#"{"number":9,"generation":3,"head":{"segments":[1,0]}}"#, Some("Publication")),
            (r#"{"number":9,"generation":3,"head":{"segments":[-1]}}"#, Some("Json")),
            (r#"{"number":9,"generation":3,"head":{"segments":[1.5]}}"#, Some("Json")),
            (r#"{"number":9,"generation":3,"head":{"segments":["../x"]}}"#, Some("Json")),
            (r#"{"number":9,"generation":18446744073709551616}"#, Some("Json")),
            (r#"{"number":9}"#, Some("Json")),
            ("[]", Some("Json")),
            ("", Some("Json")),
        ] {
            assert_eq!(parse(text).err(), expected, "{text}");
        }
        let many = format!(r#"{{"number":2000,"generation":3,"head":{{"segments":[{long}]}}}}"#);
        let layout = Layout::builder().metadata(KEY, many).build().unwrap();
        assert!(Note::parse(&layout, 2000, Path::new("")).unwrap_err().to_string().contains("1025"));
    }
}
