//! From a path to a model.

use super::{Catalog, Model, ModelMut, Shard, Verify};
use crate::error::{Error, Result};
use crate::format::{index, safetensors};
use crate::layout::{Layout, Text};
use crate::map::{self, Advice, Backing, FileText, Mapping};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How to open a model; [`Model::open`] and its kin are the defaults.
///
/// ```
/// use maptensors::OpenOptions;
///
/// // SAFETY: nobody writes to the file while it is mapped.
/// let model = unsafe { OpenOptions::new().populate(true).open("models/digits.safetensors")? };
/// assert!(model.residency()?.touched > 0); // read in already; an I/O error would have shown
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    populate: bool,
    dense_edits: bool,
    verify: Verify,
}

impl OpenOptions {
    /// The defaults: nothing is read but headers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Read all pages in before returning, on several threads; an I/O error is then an error here
    /// instead of a later `SIGBUS`. Copies nothing: pages stay shared until written.
    #[must_use]
    pub fn populate(mut self, populate: bool) -> Self {
        self.populate = populate;
        self
    }

    /// For a fine-tune of a whole model: each tensor of 2 MiB or more becomes this process's own in bulk
    /// when it is first taken to be written, several times as fast as page by page when it is. What is
    /// never taken stays shared. [`ModelMut::promote`] does so for everything at once.
    ///
    /// ```
    /// # let path = std::env::temp_dir().join("maptensors-doc-dense.safetensors");
    /// # let layout = maptensors::Layout::builder().tensor("w", maptensors::DType::F32, &[1 << 20]).build()?;
    /// # maptensors::Draft::create(&path, &layout)?.commit()?;
    /// // SAFETY: nobody writes to the file while it is mapped.
    /// let mut model = unsafe { maptensors::OpenOptions::new().dense_edits(true).open_mut(&path)? };
    /// assert_eq!(model.residency()?.private, 0);
    /// model.tensor_mut("w")?; // now, in one go
    /// assert_eq!(model.residency()?.private, 1024);
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[must_use]
    pub fn dense_edits(mut self, dense: bool) -> Self {
        self.dense_edits = dense;
        self
    }

    /// What to check before the model is returned: nothing (default), or every tensor against the checksum
    /// that the file carries, as [`Model::verify`] does.
    ///
    /// ```
    /// use maptensors::{Error, OpenOptions, Verify};
    ///
    /// let options = OpenOptions::new().verify(Verify::All);
    /// let refused = options.read("models/digits.safetensors"); // it carries no checksums
    /// assert!(matches!(refused, Err(Error::Argument(_))));
    /// ```
    #[must_use]
    pub fn verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }

    /// As [`Model::open`].
    ///
    /// # Safety
    /// As [`Model::open`].
    ///
    /// # Errors
    /// As [`Model::open`].
    #[allow(unsafe_code)]
    pub unsafe fn open(&self, path: impl AsRef<Path>) -> Result<Model> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.open_place(&locate(path.as_ref())?, Backing::ReadOnly) }
    }

    /// As [`ModelMut::open`].
    ///
    /// # Safety
    /// As [`Model::open`].
    ///
    /// # Errors
    /// As [`Model::open`].
    #[allow(unsafe_code)]
    pub unsafe fn open_mut(&self, path: impl AsRef<Path>) -> Result<ModelMut> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.open_place(&locate(path.as_ref())?, Backing::CopyOnWrite) }
            .map(|model| ModelMut::new(model, self.dense_edits))
    }

    /// As [`Model::open_files`].
    ///
    /// # Safety
    /// As [`Model::open`].
    ///
    /// # Errors
    /// As [`Model::open_files`].
    #[allow(unsafe_code)]
    pub unsafe fn open_files(&self, paths: &[impl AsRef<Path>]) -> Result<Model> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.open_place(&Place::files(paths), Backing::ReadOnly) }
    }

    /// As [`ModelMut::open_files`].
    ///
    /// # Safety
    /// As [`Model::open`].
    ///
    /// # Errors
    /// As [`Model::open_files`].
    #[allow(unsafe_code)]
    pub unsafe fn open_files_mut(&self, paths: &[impl AsRef<Path>]) -> Result<ModelMut> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.open_place(&Place::files(paths), Backing::CopyOnWrite) }
            .map(|model| ModelMut::new(model, self.dense_edits))
    }

    /// As [`Model::read`].
    ///
    /// # Errors
    /// As [`Model::read`].
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Model> {
        self.read_place(&locate(path.as_ref())?)
    }

    /// Maps files already located.
    ///
    /// # Safety
    /// As [`Model::open`].
    #[allow(unsafe_code)]
    pub(crate) unsafe fn open_place(&self, place: &Place, backing: Backing) -> Result<Model> {
        // SAFETY: the caller vouches for the files.
        let header = |file: &File, path: &Path, len| unsafe { map_header(file, path, len) };
        let (catalog, mappings) = assemble(place, header, |file, len, layout| {
            let mapping = if backing == Backing::ReadOnly {
                // SAFETY: the caller vouches for the files; `len` is this descriptor's length.
                unsafe { Mapping::open_read_only(file, len) }
            } else {
                // SAFETY: as above.
                unsafe { Mapping::open_copy_on_write(file, len) }
            }?;
            if self.populate {
                populate(&mapping, layout)?;
            }
            Ok(mapping)
        })?;
        self.checked(Model::new(catalog, mappings))
    }

    /// Reads files already located into owned memory.
    pub(crate) fn read_place(&self, place: &Place) -> Result<Model> {
        let header = |file: &File, path: &Path, len| read_header(file, path, len);
        let read = |file: &File, len, layout: &Layout| Mapping::read(file, len, layout.data_range().start);
        let (catalog, mappings) = assemble(place, header, read)?;
        self.checked(Model::new(catalog, mappings))
    }

    fn checked(&self, model: Model) -> Result<Model> {
        if self.verify == Verify::All {
            model.verify()?;
        }
        Ok(model)
    }
}

/// Reads the data's pages in, cut at huge pages so that the page cache stays made of them.
fn populate(mapping: &Mapping, layout: &Layout) -> io::Result<()> {
    let data = layout.data_range();
    let chunks = (data.start / map::CHUNK..data.end.div_ceil(map::CHUNK)).collect();
    map::each_in_parallel(chunks, |i: usize| {
        let range = (i * map::CHUNK).max(data.start)..((i + 1) * map::CHUNK).min(data.end);
        match mapping.advise_range(Advice::PopulateRead, range) {
            // A kernel before 5.14: pages come when they are touched.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    })
}

/// The files of a model.
#[derive(Debug)]
pub(crate) struct Place {
    /// What the user named, for errors that concern the whole.
    pub(crate) path: PathBuf,
    pub(crate) files: Vec<PathBuf>,
    /// What the index says, to be held against the files.
    pub(crate) index: Option<index::Index>,
}

impl Place {
    pub(crate) fn files(paths: &[impl AsRef<Path>]) -> Self {
        let files: Vec<PathBuf> = paths.iter().map(|p| p.as_ref().to_owned()).collect();
        Self { path: files.first().cloned().unwrap_or_default(), files, index: None }
    }
}

const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// Finds the files that `path` stands for.
///
/// # Errors
/// [`Error::Io`]; those of [`index::parse`]; [`Error::NotRegular`] for a directory without a model, or
/// with several.
pub(crate) fn locate(path: &Path) -> Result<Place> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if path.is_dir() {
        return locate(&pick(path)?);
    }
    if !name.ends_with(".index.json") {
        return Ok(Place::files(&[path]));
    }
    let (file, len) = map::open_regular(path)?;
    let limit = index::MAX_INDEX_LEN;
    let too_long =
        || Error::Limit { path: path.into(), what: "the index length", found: len, limit, hint: None };
    let len = usize::try_from(len).ok().filter(|&n| n as u64 <= limit).ok_or_else(too_long)?;
    let index = index::parse(&map::read_exact_at(&file, path, 0, len)?, path)?;
    // Beside the index as it was named: a hub cache's index is a link, and so are the shards beside it.
    let dir = path.parent().unwrap_or(Path::new(""));
    let files = index.shards.iter().map(|shard| dir.join(shard)).collect();
    Ok(Place { path: path.into(), files, index: Some(index) })
}

/// The model in a directory: its index, or its only safetensors file.
fn pick(dir: &Path) -> Result<PathBuf> {
    // The whole file first, as transformers does: an index beside it is what a sharded save left before.
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        if dir.join(name).exists() {
            return Ok(dir.join(name));
        }
    }
    let (mut indices, mut files) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir, "listing the directory"))? {
        let name = entry.map_err(Error::io(dir, "listing the directory"))?.file_name();
        let text = name.to_string_lossy();
        if text.ends_with(INDEX_SUFFIX) {
            indices.push(dir.join(&name));
        } else if text.ends_with(".safetensors") {
            files.push(dir.join(&name));
        }
    }
    // Shards that no index lists are no model: a save that was killed has left them, beside the old file.
    if indices.is_empty() && files.iter().filter(|path| !is_part(path)).count() == 1 {
        files.retain(|path| !is_part(path));
    }
    match (indices.as_slice(), files.as_slice()) {
        ([], [only]) if is_part(only) => Err(Error::NotRegular {
            path: dir.into(),
            found: "a directory with one shard of several, and no index",
        }),
        ([only], _) | ([], [only]) => Ok(only.clone()),
        ([], []) => {
            Err(Error::NotRegular { path: dir.into(), found: "a directory without a safetensors model" })
        }
        _ => Err(Error::NotRegular { path: dir.into(), found: "a directory with several models: name one" }),
    }
}

/// Whether a file's name says that it is one of several: `…-00001-of-00002.safetensors`.
fn is_part(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let parts = stem.rsplit_once("-of-").and_then(|(rest, count)| Some((rest.rsplit_once('-')?.1, count)));
    parts.is_some_and(|(number, count)| {
        number.parse::<u32>().is_ok() && count.parse::<u32>().is_ok_and(|count| count > 1)
    })
}

/// Opens every file of `place`, gets its bytes with `bring`, and holds the whole against the index.
fn assemble<M: Send + Sync>(
    place: &Place,
    header: impl Fn(&File, &Path, usize) -> Result<Text> + Sync,
    bring: impl Fn(&File, usize, &Layout) -> io::Result<M> + Sync,
) -> Result<(Catalog, Vec<Arc<M>>)> {
    if place.files.is_empty() && place.index.is_none() {
        return Err(Error::Argument("no file is named to be opened".into()));
    }
    let open = |path: &Path| -> Result<(Shard, Arc<M>)> {
        let (file, layout, len) = read_layout(path, &header)?;
        let memory = bring(&file, len, &layout).map_err(Error::io(path, "mapping the file"))?;
        Ok((Shard { path: path.into(), layout }, Arc::new(memory)))
    };
    let mut opened: Vec<Option<(Shard, Arc<M>)>> = Vec::new();
    opened.resize_with(place.files.len(), || None);
    let jobs = place.files.iter().zip(&mut opened).collect();
    map::each_in_parallel(jobs, |(path, slot): (&PathBuf, &mut Option<_>)| {
        *slot = Some(open(path)?);
        Ok(())
    })?;
    let (shards, memories) = opened.into_iter().flatten().unzip();
    let catalog = Catalog::new(shards)?;
    if let Some(index) = &place.index {
        check_index(index, &catalog, &place.path)?;
    }
    Ok((catalog, memories))
}

/// One descriptor: open, length, header. Returns the length as the address space can hold it.
fn read_layout(
    path: &Path,
    header: impl Fn(&File, &Path, usize) -> Result<Text>,
) -> Result<(File, Layout, usize)> {
    let (file, file_len) = map::open_regular(path)?;
    let prefix_len = safetensors::PREFIX_LEN.min(usize::try_from(file_len).unwrap_or(usize::MAX));
    let prefix = map::read_exact_at(&file, path, 0, prefix_len)?;
    let header_len = safetensors::header_len(&prefix, file_len, path)?;
    let layout = safetensors::parse_text(header(&file, path, header_len)?, file_len, path)?;
    let too_large = || Error::io(path, "mapping the file")(io::ErrorKind::OutOfMemory.into());
    let len = isize::try_from(file_len).map_err(|_| too_large())?.cast_unsigned();
    Ok((file, layout, len))
}

/// A header as text of our own.
fn read_header(file: &File, path: &Path, len: usize) -> Result<Text> {
    let bytes = map::read_exact_at(file, path, safetensors::PREFIX_LEN as u64, len)?;
    let text = String::from_utf8(bytes).map_err(|e| safetensors::not_utf8(e.utf8_error(), path))?;
    Ok(Text::Owned(text))
}

/// A header where it lies, if it is long: most of what opening many tensors cost was memory to copy it to.
///
/// # Safety
/// As [`Model::open`].
#[allow(unsafe_code)]
unsafe fn map_header(file: &File, path: &Path, len: usize) -> Result<Text> {
    const LONG: usize = 256 << 10;
    if len < LONG {
        return read_header(file, path, len);
    }
    // SAFETY: the caller vouches for the file, which was found long enough.
    let text = unsafe { FileText::map(file, safetensors::PREFIX_LEN..safetensors::PREFIX_LEN + len) };
    let text = text.map_err(Error::io(path, "mapping the header"))?;
    Ok(Text::Held(Arc::new(text.map_err(|error| safetensors::not_utf8(error, path))?)))
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

pub(super) fn from_bytes(bytes: &[u8]) -> Result<Model> {
    let path = Path::new("");
    let layout = safetensors::parse_bytes(bytes, path)?;
    let mut mapping = Mapping::owned(bytes.len(), layout.data_range().start)
        .map_err(Error::io(path, "allocating memory for the model"))?;
    let source = map::Source::from(bytes);
    let chunks = mapping.as_bytes_mut().chunks_mut(map::CHUNK).enumerate().collect();
    let copied: Result<(), ()> = map::each_in_parallel(chunks, |(i, chunk): (usize, &mut [u8])| {
        source.copy_to(i * map::CHUNK..i * map::CHUNK + chunk.len(), chunk);
        Ok(())
    });
    debug_assert!(copied.is_ok());
    Ok(Model::new(Catalog::new(vec![Shard { path: path.into(), layout }])?, vec![Arc::new(mapping)]))
}

/// As [`ModelMut::open`], for tests in rooms without `unsafe`.
#[cfg(test)]
#[allow(unsafe_code)]
pub(crate) fn open_own_file(path: &Path) -> Result<ModelMut> {
    // SAFETY: a file that a test has just made, and writes to no more.
    unsafe { ModelMut::open(path) }
}
