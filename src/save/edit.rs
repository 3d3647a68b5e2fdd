//! A header edited without rewriting the data behind it.

use super::Pending;
use crate::diff::digest::{self, CHECKSUMS};
use crate::error::{Error, Result};
use crate::format::safetensors::{self, HeaderChanges, PREFIX_LEN, Pieces};
use crate::layout::{Catalog, Layout, Metadata, Shard, Value};
use crate::os;
use crate::os::disk::{self, Dir};
use crate::os::lease;
use crate::work::cancel;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// Changes to the header of a safetensors file: its metadata and its tensors' names.
///
/// The data is not read. Where that is safe the header is changed **in place**: it keeps its length, all bytes that
/// change lie in one 512-byte sector, which disks write whole or not at all, and nobody else has the file open or
/// mapped, which a write lease (`F_SETLEASE`) proves. Such an edit costs one small write, whatever the
/// size of the file, and every hard link shows it. Otherwise a new file takes the old one's place as
/// by any save, with the blocks of the old one where the file system can share them (reflinks), copied inside
/// the kernel where not.
///
/// A file that was rewritten has room behind its metadata, so that later edits find it in place.
///
/// ```
/// use maptensors::{Edited, HeaderEdit, Model};
///
/// # let path = std::env::temp_dir().join("maptensors-doc-header.safetensors");
/// # Model::read("models/digits.safetensors")?.save(&path)?;
/// let edit = HeaderEdit::new().metadata("license", "MIT").rename("fc1.weight", "first.weight");
/// edit.apply(&path)?;
/// let model = Model::read(&path)?;
/// assert_eq!(model.metadata()["license"], "MIT");
/// assert!(model.contains("first.weight") && !model.contains("fc1.weight"));
/// assert_eq!(HeaderEdit::new().metadata("license", "MIT").apply(&path)?, Edited::Unchanged);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct HeaderEdit {
    changes: HeaderChanges,
    /// Values that are no text, with which the edit is refused.
    typed: Metadata,
    durable: bool,
}

/// How a header was edited.
///
/// ```
/// # let path = std::env::temp_dir().join("maptensors-doc-edited.safetensors");
/// # maptensors::Model::read("models/digits.safetensors")?.save(&path)?;
/// let edited = maptensors::HeaderEdit::new().metadata("step", "1000").apply(&path)?;
/// println!("{path:?} was {}", if edited == maptensors::Edited::InPlace { "edited" } else { "written anew" });
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Edited {
    /// It said all that already.
    Unchanged,
    /// One sector of the file was written.
    InPlace,
    /// A new file took its place.
    Rewritten,
}

impl Default for HeaderEdit {
    fn default() -> Self {
        Self { changes: HeaderChanges::default(), typed: Metadata::new(), durable: true }
    }
}

impl HeaderEdit {
    /// No changes yet; durable.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a metadata entry. Of several changes to one key the last counts.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        let (key, value) = (key.into(), value.into());
        self.typed.remove(&key);
        if let Value::String(text) = value {
            self.changes.metadata.insert(key, Some(text));
        } else {
            self.typed.insert(key, value);
        }
        self
    }

    /// Removes a metadata entry.
    #[must_use]
    pub fn remove(mut self, key: impl Into<String>) -> Self {
        let key = key.into();
        self.typed.remove(&key);
        self.changes.metadata.insert(key, None);
        self
    }

    /// Gives a tensor another name. All at once: two tensors may exchange their names.
    #[must_use]
    pub fn rename(mut self, tensor: impl Into<String>, name: impl Into<String>) -> Self {
        self.changes.names.insert(tensor.into(), name.into());
        self
    }

    /// Whether the edit survives a power loss once done (default), or the file is only whole.
    #[must_use]
    pub fn durable(mut self, durable: bool) -> Self {
        self.durable = durable;
        self
    }

    /// Edits the file at `path`. A symbolic link is replaced by an edited file, as by any save. The index of a
    /// sharded set is not edited with its shards.
    ///
    /// # Errors
    /// Those of reading the header ([`Model::open`](crate::Model::open)); [`Error::Missing`] for a tensor that is
    /// not there; [`Error::Duplicate`] for a name that two tensors would have; [`Error::Argument`] for a metadata
    /// key to remove that is not there, for a value that is no string, for the name `__metadata__` and for an index; [`Error::Limit`] for a header that
    /// no reader would accept. [`Error::Io`]: the file is as it was. [`Error::NotDurable`].
    pub fn apply(&self, path: impl AsRef<Path>) -> Result<Edited> {
        let path = path.as_ref();
        safetensors::texts(&self.typed)?;
        if path.as_os_str().as_encoded_bytes().ends_with(b".index.json") {
            let why = "is an index, and has no header: edit the files that it names";
            let path = crate::error::printable(&path.to_string_lossy());
            return Err(Error::Argument(format!("{path} {why}")));
        }
        // No descriptor stays open: it would stand in the lease's way.
        let plan = { Plan::of(&os::open_regular(path)?, &self.changes, path)? };
        if plan.header == plan.old {
            return Ok(Edited::Unchanged);
        }
        match changed(&plan.old, &plan.header).filter(is_one_sector) {
            Some(changed) if self.write_in_place(path, &plan, &changed)? => Ok(Edited::InPlace),
            _ => self.rewrite(path),
        }
    }

    /// `false`: it may not, or cannot.
    fn write_in_place(&self, path: &Path, plan: &Plan, changed: &Range<usize>) -> Result<bool> {
        let Some(name) = path.file_name() else { return Ok(false) };
        let Ok(dir) = Dir::open(path.parent().unwrap_or(Path::new(""))) else { return Ok(false) };
        let Ok(file) = dir.open_file(name, true) else { return Ok(false) };
        let Ok(true) = lease::take(&file) else { return Ok(false) };
        // It ends with the descriptor, if not before. Now nobody can change it; but somebody may have, before.
        // Nor does anybody wait for it, who would be kept waiting by the disk.
        if !plan.is_of(&file, path) || !lease::is_undisputed(&file) {
            return Ok(false);
        }
        let header = &plan.header[changed.clone()];
        cancel::unless_canceled(|| disk::write_all_at(&file, header, changed.start as u64))
            .map_err(Error::io(path, "writing the header"))?;
        // Whoever waits sees the new header, all of it.
        lease::give_up(&file).ok();
        if self.durable {
            disk::sync(&file).map_err(|source| Error::NotDurable { path: path.into(), source })?;
        }
        Ok(true)
    }

    fn rewrite(&self, path: &Path) -> Result<Edited> {
        let opened = os::open_regular(path)?;
        let plan = Plan::of(&opened, &self.changes, path)?;
        let (file, copying) = (&opened.0, "copying its data");
        let pending = Pending::create(path)?;
        let to = pending.file();
        let moved = plan.header.len() != plan.old.len();
        if moved || !os::clone(file, to.file()).map_err(Error::io(path, copying))? {
            pending.allocate(plan.header.len() as u64 + plan.data_len)?;
            let (from, to_offset) = (plan.old.len() as u64, plan.header.len() as u64);
            os::copy_range(file, from, to.file(), to_offset, plan.data_len)
                .map_err(Error::io(path, copying))?;
        }
        to.write_all_at(&plan.header, 0).map_err(Error::io(path, "writing the header"))?;
        pending.publish(self.durable)?;
        Ok(Edited::Rewritten)
    }
}

/// What a disk writes whole or not at all, at the least.
const SECTOR: usize = 512;

fn is_one_sector(bytes: &Range<usize>) -> bool {
    bytes.start / SECTOR == (bytes.end - 1) / SECTOR
}

/// The bytes that change from one header to another; `None` where it changes its length, or nothing.
fn changed(old: &[u8], new: &[u8]) -> Option<Range<usize>> {
    if old.len() != new.len() {
        return None;
    }
    let differs = |(old, new): (&u8, &u8)| old != new;
    let start = old.iter().zip(new).position(differs)?;
    let end = old.iter().zip(new).rposition(differs)? + 1;
    Some(start..end)
}

/// The header there is and the one to be, length fields included.
struct Plan {
    old: Vec<u8>,
    header: Vec<u8>,
    data_len: u64,
}

impl Plan {
    fn of((file, file_len): &(File, u64), changes: &HeaderChanges, path: &Path) -> Result<Self> {
        let old = read_header(file, *file_len, path)?;
        let layout = safetensors::parse(old[PREFIX_LEN..].to_vec(), *file_len, path)?;
        check(&layout, changes, path)?;
        let changes = &with_checksums(&layout, changes, path)?;
        let data_len = layout.data_len();
        // Parsed just now: it is UTF-8, and an object.
        let text = str::from_utf8(&old[PREFIX_LEN..]).unwrap_or_default();
        let pieces = Pieces::of(text, changes)
            .ok_or_else(|| Error::Argument(format!("{}: the header cannot be edited", path.display())))?;
        let whole = |text: Vec<u8>| [&[0; PREFIX_LEN], &*text].concat();
        let kept = pieces.fitted(old.len() - PREFIX_LEN).map(whole).filter(|header| {
            changed(&old[PREFIX_LEN..], &header[PREFIX_LEN..])
                .is_none_or(|at| is_one_sector(&(at.start + PREFIX_LEN..at.end + PREFIX_LEN)))
        });
        // All of it is written anew: then with room for the next edit, and if it can be in the same length, for
        // then the data's blocks can be shared.
        let anew = |len| if len <= old.len() { old.len() } else { safetensors::padded(len, data_len) };
        let mut header = kept.unwrap_or_else(|| whole(pieces.compact(anew)));
        let set = changes.metadata.iter().filter_map(|(key, value)| Some((key.as_str(), value.as_deref()?)));
        let metadata = safetensors::metadata_len(layout.metadata().texts()) + safetensors::metadata_len(set);
        safetensors::finish(&mut header, metadata, path)?;
        let new = safetensors::parse(header[PREFIX_LEN..].to_vec(), header.len() as u64 + data_len, path)?;
        verify(&layout, &new, changes, path)?;
        Ok(Self { old, header, data_len })
    }

    /// Whether this is the file that was planned for, as it was.
    fn is_of(&self, file: &File, path: &Path) -> bool {
        file.metadata().is_ok_and(|now| now.is_file() && now.len() == self.old.len() as u64 + self.data_len)
            && os::read_exact_at(file, path, 0, self.old.len()).is_ok_and(|now| now == self.old)
    }
}

/// The header's bytes, length field included.
fn read_header(file: &File, file_len: u64, path: &Path) -> Result<Vec<u8>> {
    let prefix_len = PREFIX_LEN.min(usize::try_from(file_len).unwrap_or(PREFIX_LEN));
    let prefix = os::read_exact_at(file, path, 0, prefix_len)?;
    let len = safetensors::header_len(&prefix, file_len, path)?;
    os::read_exact_at(file, path, 0, PREFIX_LEN + len)
}

/// The changes, and those that checksums by the old names ask for.
fn with_checksums(layout: &Layout, changes: &HeaderChanges, path: &Path) -> Result<HeaderChanges> {
    let mut changes = changes.clone();
    let text = layout.metadata().text(CHECKSUMS);
    if let (Some(text), false) = (text, changes.names.is_empty() || changes.metadata.contains_key(CHECKSUMS))
    {
        let sums = digest::decode(text, path)?;
        let renamed = sums.iter().map(|(name, sum)| (changes.names.get(name).unwrap_or(name).as_str(), *sum));
        let renamed = digest::encode(renamed);
        changes.metadata.insert(CHECKSUMS.into(), Some(renamed));
    }
    Ok(changes)
}

/// Whether what is to be changed is there.
fn check(layout: &Layout, changes: &HeaderChanges, path: &Path) -> Result<()> {
    for (key, value) in &changes.metadata {
        if value.is_none() && !layout.metadata().contains_key(key) {
            let (key, path) = (crate::error::quote(key), path.display());
            return Err(Error::Argument(format!("{path}: there is no metadata key {key} to remove")));
        }
    }
    for (tensor, name) in &changes.names {
        if layout.position(tensor).is_none() {
            let shard = Shard { path: path.into(), layout: layout.clone() };
            return Err(Catalog::new(vec![shard])?.missing(tensor));
        }
        if name == "__metadata__" {
            return Err(Error::Argument(
                "a tensor cannot be called __metadata__: safetensors reserves the name".into(),
            ));
        }
    }
    Ok(())
}

/// Whether the new header says what it should, and of everything else what the old one said.
fn verify(old: &Layout, new: &Layout, changes: &HeaderChanges, path: &Path) -> Result<()> {
    let mut metadata = old.metadata().clone();
    for (key, value) in &changes.metadata {
        match value {
            Some(value) => metadata.insert(key, value),
            None => metadata.remove(key),
        };
    }
    let same = old.len() == new.len()
        && old.iter().all(|was| {
            let name = changes.names.get(was.name()).map_or(was.name(), String::as_str);
            new.get(name).is_some_and(|is| {
                (is.dtype(), is.shape()) == (was.dtype(), was.shape())
                    && new.relative(&is) == old.relative(&was)
            })
        });
    if same && *new.metadata() == metadata {
        return Ok(());
    }
    Err(Error::Argument(format!("{}: the header cannot be edited", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::model::Model;
    use crate::save::Draft;
    use crate::save::SaveOptions;

    /// Two tensors and this metadata, in a file with or without room in its header.
    fn file(dir: &Path, metadata: &[(&str, &str)], tensors: usize) -> std::path::PathBuf {
        let mut layout = Layout::builder();
        for (key, value) in metadata {
            layout = layout.metadata(*key, *value);
        }
        for i in 0..tensors {
            layout = layout.tensor(format!("t{i}"), DType::U8, &[i + 1]);
        }
        let path = dir.join("m.safetensors");
        let mut draft = Draft::create(&path, &layout.build().unwrap()).unwrap();
        for (i, mut tensor) in draft.tensors_mut().unwrap().enumerate() {
            tensor.as_bytes_mut().fill(u8::try_from(i % 251).unwrap());
        }
        draft.commit().unwrap();
        path
    }

    #[test]
    fn a_value_that_is_no_string_is_refused_by_name_and_one_that_follows_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), &[("a", "1")], 2);
        let before = std::fs::read(&path).unwrap();
        let edit = HeaderEdit::new().metadata("step", 3u64);
        let error = edit.apply(&path).unwrap_err().to_string();
        assert!(error.contains("step") && error.contains("strings alone"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_ne!(edit.metadata("step", "3").apply(&path).unwrap(), Edited::Unchanged);
    }

    #[test]
    fn what_was_canceled_writes_nothing_in_place_either() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), &[("step", "0001")], 2);
        let before = std::fs::read(&path).unwrap();
        let edit = HeaderEdit::new().metadata("step", "0002");
        let cancel = cancel::Cancel::default();
        cancel.cancel();
        assert!(cancel::under(Some(cancel), || edit.apply(&path)).is_err());
        assert!(std::fs::read(&path).unwrap() == before);
        edit.apply(&path).unwrap();
        assert!(std::fs::read(&path).unwrap() != before);
    }

    #[test]
    fn an_edit_is_in_place_where_one_sector_changes_and_nobody_else_looks() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(600);
        for (what, metadata, tensors, edit, expected) in [
            (
                "grows into the padding",
                &[("a", "1")][..],
                2,
                HeaderEdit::new().metadata("a", "12"),
                Edited::InPlace,
            ),
            ("shrinks", &[("a", "12")], 100, HeaderEdit::new().metadata("a", "1"), Edited::InPlace),
            ("goes", &[("a", "1"), ("b", "2")], 100, HeaderEdit::new().remove("a"), Edited::InPlace),
            ("a name of the same length", &[], 100, HeaderEdit::new().rename("t5", "u5"), Edited::InPlace),
            ("says so already", &[("a", "1")], 2, HeaderEdit::new().metadata("a", "1"), Edited::Unchanged),
            (
                "pushes all tensors",
                &[("a", "1")],
                100,
                HeaderEdit::new().metadata("a", "12"),
                Edited::Rewritten,
            ),
            (
                "two sectors",
                &[("a", "1")],
                100,
                HeaderEdit::new().metadata("a", "2").rename("t99", "u99"),
                Edited::Rewritten,
            ),
            (
                "outgrows the header",
                &[("a", "1")],
                2,
                HeaderEdit::new().metadata("a", &*long),
                Edited::Rewritten,
            ),
            ("is new", &[], 100, HeaderEdit::new().metadata("a", "1"), Edited::Rewritten),
        ] {
            let path = file(dir.path(), metadata, tensors);
            let before = Model::read(&path).unwrap();
            let inode = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap());
            let (was, open) = (inode(), File::open(&path).unwrap());
            if expected != Edited::Unchanged {
                let beside = edit.apply(&path).unwrap();
                assert_eq!(beside, Edited::Rewritten, "{what}, while the file is open elsewhere");
                assert_ne!(inode(), was);
            }
            drop(open);
            let path = file(dir.path(), metadata, tensors);
            let was = inode();
            assert_eq!(edit.apply(&path).unwrap(), expected, "{what}");
            assert_eq!(inode() == was, expected != Edited::Rewritten, "{what}");
            let after = Model::read(&path).unwrap();
            let data = |model: &Model| model.tensors().map(|t| t.as_bytes().to_vec()).collect::<Vec<_>>();
            assert_eq!(data(&after), data(&before), "{what}");
            for (key, value) in &edit.changes.metadata {
                assert_eq!(after.metadata().text(key), value.as_deref(), "{what}");
            }
            for (old, new) in &edit.changes.names {
                assert!(after.contains(new) && !after.contains(old), "{what}");
            }
            let read = safetensors_crate_reads(&path);
            assert_eq!(read, after.len(), "{what}: the reference reads it");
        }
    }

    fn safetensors_crate_reads(path: &Path) -> usize {
        ::safetensors::SafeTensors::deserialize(&std::fs::read(path).unwrap()).unwrap().len()
    }

    #[test]
    fn a_file_once_rewritten_has_room_for_edits_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), &[], 1000);
        let set = |value: &str| HeaderEdit::new().metadata("step", value).apply(&path).unwrap();
        assert_eq!(set("1"), Edited::Rewritten);
        for value in ["10", "100", "1000000", "2"] {
            assert_eq!(set(value), Edited::InPlace, "{value}");
        }
        assert_eq!(HeaderEdit::new().metadata("other", "key").apply(&path).unwrap(), Edited::InPlace);
        assert_eq!(Model::read(&path).unwrap().metadata().len(), 2);
    }

    #[test]
    fn an_edit_that_cannot_be_is_an_error_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), &[("a", "1")], 3);
        let before = std::fs::read(&path).unwrap();
        for (edit, expected) in [
            (HeaderEdit::new().rename("t7", "x"), "Missing"),
            (HeaderEdit::new().rename("t0", "t1"), "Duplicate"),
            (HeaderEdit::new().rename("t0", "x").rename("t1", "x"), "Duplicate"),
            (HeaderEdit::new().rename("t0", "__metadata__"), "Argument"),
            (HeaderEdit::new().remove("b"), "Argument"),
        ] {
            assert_eq!(edit.apply(&path).unwrap_err().kind().name(), expected, "{edit:?}");
            assert_eq!(std::fs::read(&path).unwrap(), before);
        }
        let exchanged = HeaderEdit::new().rename("t0", "t1").rename("t1", "t0");
        exchanged.apply(&path).unwrap();
        let model = Model::read(&path).unwrap();
        assert_eq!(model.tensor("t0").unwrap().shape(), [2]);
        assert_eq!(model.tensor("t1").unwrap().shape(), [1]);
        let edit = HeaderEdit::new().metadata("a", "2");
        assert_eq!(edit.apply(dir.path()).unwrap_err().kind().name(), "NotRegular");
        assert_eq!(edit.apply(dir.path().join("gone")).unwrap_err().kind().name(), "Io");
    }

    #[test]
    fn checksums_go_with_the_tensors_that_are_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        let model = Model::read("models/digits.safetensors").unwrap();
        let options = SaveOptions::new().checksums(true);
        options.save(model.tensors().map(|t| (t.name(), t)), &path).unwrap();
        HeaderEdit::new().rename("fc1.weight", "fc1.bias").rename("fc1.bias", "a").apply(&path).unwrap();
        let edited = Model::read(&path).unwrap();
        edited.verify().unwrap();
        assert_eq!(edited.tensor("a").unwrap().as_bytes(), model.tensor("fc1.bias").unwrap().as_bytes());
    }
}
