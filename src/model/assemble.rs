//! From files to a model's parts: opened, their headers read, checked against the index.

use super::{Guards, Location, OpenOptions, again};
use crate::diff::{Contents, Verify};
use crate::error::{Error, Result};
use crate::format::{self, index};
use crate::layout::{Catalog, Layout, Shard};
use crate::map::{MapOptions, Memory, Window};
#[cfg(feature = "python")]
use crate::map::{Mapping, SharedMemory};
use crate::os::{self, Guard, Stamp};
use crate::source::FileBytes;
use crate::work;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file that was opened, and what its header says.
pub(super) struct Found {
    pub(super) file: File,
    pub(super) layout: Layout,
    /// The part of the file that is the model.
    pub(super) window: Window,
}

/// What is done with a file that is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// It is mapped, and not written.
    Read,
    /// It is mapped, and written.
    Edit,
    /// It is not needed any more once its bytes are copied.
    Copy,
}

type Brought<M> = (Arc<M>, Option<Guard>);

/// What an open model consists of, whoever has it.
pub struct Assembled<M> {
    pub(crate) catalog: Arc<Catalog>,
    // INVARIANT: one for each shard of the catalog, as long as its layout's file.
    pub(crate) memories: Vec<Arc<M>>,
    /// Under [`OpenOptions::guard`].
    pub(crate) guards: Option<Arc<Guards>>,
}

impl<M> Assembled<M> {
    /// Of one file, or of bytes.
    pub(super) fn of_one(path: &Path, layout: Layout, memory: M) -> Result<Self> {
        let catalog = Catalog::new(vec![Shard { path: path.into(), layout }])?;
        Ok(Self { catalog: Arc::new(catalog), memories: vec![Arc::new(memory)], guards: None })
    }
}

/// What was opened, once it is verified, if that is asked for.
///
/// # Errors
/// As [`Model::verify`](super::Model::verify).
pub(super) fn verified<M: Memory>(opened: Assembled<M>, verify: Verify) -> Result<Assembled<M>> {
    if verify == Verify::All {
        let memories = opened.memories.iter().map(|memory| memory.as_ref() as &dyn Memory).collect();
        Contents { catalog: &opened.catalog, memories, copies: HashMap::new(), marks: None }.verify()?;
    }
    Ok(opened)
}

#[cfg(feature = "python")]
impl Assembled<Mapping> {
    /// As memory that arrays may be changing.
    pub(crate) fn shared(self) -> Assembled<SharedMemory> {
        let memories = self.memories.into_iter().map(|mapping| Arc::new(SharedMemory::of(mapping))).collect();
        Assembled { catalog: self.catalog, memories, guards: self.guards }
    }
}

/// Opens every file of `location`, gets its bytes with `bring`, and checks the whole against the index. If a save replaces
/// the files meanwhile, it is the old model or the new one, whole.
pub(super) fn assemble<M: Send + Sync>(
    location: &Location,
    options: &OpenOptions,
    access: Access,
    source: impl for<'f> Fn(&'f File, &'f Path, Window) -> FileBytes<'f> + Sync,
    bring: impl Fn(&Found, &Path) -> Result<M> + Sync,
) -> Result<Assembled<M>> {
    again::open(location, |location| assemble_now(location, options, access, &source, &bring))
}

fn assemble_now<M: Send + Sync>(
    location: &Location,
    options: &OpenOptions,
    access: Access,
    source: &(impl for<'f> Fn(&'f File, &'f Path, Window) -> FileBytes<'f> + Sync),
    bring: &(impl Fn(&Found, &Path) -> Result<M> + Sync),
) -> Result<Assembled<M>> {
    if location.files.is_empty() && location.index.is_none() {
        return Err(Error::Argument("no file is named to be opened".into()));
    }
    if options.map.has_window() && (location.files.len() != 1 || location.index.is_some()) {
        return Err(Error::Argument("a window is a part of one file; this model has several".into()));
    }
    let watched = options.guard && access != Access::Copy;
    let open = |path: &Path| -> Result<(Shard, Brought<M>)> {
        let edit = access == Access::Edit;
        let (file, len) = if edit { os::open_regular_to_edit(path) } else { os::open_regular(path) }?;
        // Before anything is read: what changes from here on is found.
        let stamp = watched.then(|| Stamp::of(&file, edit)).transpose();
        let stamp = stamp.map_err(Error::io(path, "asking when it was written"))?;
        let found = read_layout(file, len, path, &options.map, source)?;
        let memory = bring(&found, path)?;
        let guard = stamp.map(|stamp| Guard::new(found.file, stamp));
        guard.as_ref().map_or(Ok(()), |guard| guard.check(path))?;
        Ok((Shard { path: path.into(), layout: found.layout }, (Arc::new(memory), guard)))
    };
    let mut opened = Vec::new();
    opened.resize_with(location.files.len(), || None);
    let jobs = location.files.iter().zip(&mut opened).collect();
    work::each_in_parallel(jobs, |(path, slot): (&PathBuf, &mut Option<_>)| {
        *slot = Some(open(path)?);
        Ok(())
    })?;
    let (shards, memories): (_, Vec<_>) = opened.into_iter().flatten().unzip();
    let (memories, guards): (_, Vec<_>) = memories.into_iter().unzip();
    let mut catalog = Catalog::new(shards)?;
    if let Some(index) = &location.index {
        catalog.index = Some(location.path.clone());
        catalog.stated_size = index.total_size;
        check_index(index, &catalog, &location.path)?;
    }
    let guards = watched.then(|| Arc::new(Guards::new(guards.into_iter().flatten().collect())));
    Ok(Assembled { catalog: Arc::new(catalog), memories, guards })
}

/// One descriptor: length, header.
pub(super) fn read_layout(
    file: File,
    file_len: u64,
    path: &Path,
    options: &MapOptions,
    source: impl for<'f> Fn(&'f File, &'f Path, Window) -> FileBytes<'f>,
) -> Result<Found> {
    let window = options.window_of(file_len, path)?;
    let layout = format::read(&source(&file, path, window))?;
    Ok(Found { file, layout, window })
}

/// A part of a file that is not to be mapped while its header is read.
pub(super) fn copied<'f>(file: &'f File, path: &'f Path, window: Window) -> FileBytes<'f> {
    FileBytes::new(file, path, window)
}

/// The layout of an open file of `len` bytes.
pub(crate) fn layout_of(file: &File, len: u64, path: &Path) -> Result<Layout> {
    format::read(&copied(file, path, MapOptions::new().window_of(len, path)?))
}

fn check_index(index: &index::Index, catalog: &Catalog, path: &Path) -> Result<()> {
    for (name, said) in index.tensors() {
        let found = catalog.find(name).map(|(shard, _)| shard);
        if found == Some(said) {
            continue;
        }
        let hint = match found {
            Some(other) => format!(
                " in {}, where the index puts it; it is in {}",
                crate::error::quote(&index.shards[said]),
                crate::error::quote(&index.shards[other])
            ),
            None => format!(" in {}, where the index puts it", crate::error::quote(&index.shards[said])),
        };
        return Err(Error::Missing { path: path.into(), name: name.to_owned(), hint });
    }
    Ok(())
}
