//! From a path to a model.

use super::assemble::{Access, assemble, copied, read_layout};
use super::{Model, ModelMut, ModelShared, Place, locate};
use crate::diff::Verify;
use crate::error::{Error, Result};
use crate::format;
use crate::layout::{Catalog, Shard};
#[cfg(target_os = "linux")]
use crate::map::SealedMemfd;
use crate::map::{self, Backing, MapOptions, Mapping, SharedMemory, StableFile, Window};
use crate::source::FileBytes;
use crate::work;
use std::fs::File;
use std::ops::RangeBounds;
#[cfg(target_os = "linux")]
use std::os::fd::AsFd as _;
use std::path::Path;
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
    pub(super) map: MapOptions,
    dense_edits: bool,
    verify: Verify,
    pub(super) guard: bool,
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
        self.map = self.map.populate(populate);
        self
    }

    /// Keep all pages in RAM as long as the model lives: see [`MapOptions::lock`].
    ///
    /// # Errors
    /// Opening then answers [`Error::Limit`] where `RLIMIT_MEMLOCK` does not allow it.
    #[must_use]
    pub fn lock(mut self, lock: bool) -> Self {
        self.map = self.map.lock(lock);
        self
    }

    /// Whether memory is promised for every page that may be edited: see [`MapOptions::reserve_swap`].
    #[must_use]
    pub fn reserve_swap(mut self, reserve: bool) -> Self {
        self.map = self.map.reserve_swap(reserve);
        self
    }

    /// Of a model that is read-only, has what was written to it all the same be known: see [`MapOptions::compared`].
    #[cfg(feature = "python")]
    pub(crate) fn compared(mut self) -> Self {
        self.map = self.map.compared();
        self
    }

    /// For a model whose tensors are all taken to be written at once: see [`MapOptions::taken`].
    #[cfg(feature = "python")]
    pub(crate) fn taken(mut self) -> Self {
        self.map = self.map.taken();
        self
    }

    /// Whether to ask for huge pages (default): see [`MapOptions::huge_pages`].
    #[must_use]
    pub fn huge_pages(mut self, huge: bool) -> Self {
        self.map = self.map.huge_pages(huge);
        self
    }

    /// The part of the file that is the model, in bytes: for one that is stored inside another file, such as a
    /// tar archive or a zip archive without compression. For one file only, not for a sharded set.
    ///
    /// Tensors of such a model may be misaligned in memory: [`TensorView::as_slice`](crate::TensorView::as_slice)
    /// then refuses, and `to_vec` copies. [`OpenOptions::read`] and its kin align them.
    ///
    /// ```
    /// use maptensors::OpenOptions;
    ///
    /// let model = std::fs::read("models/digits.safetensors").unwrap();
    /// let path = std::env::temp_dir().join("maptensors-doc-window");
    /// std::fs::write(&path, [&[7; 512], &model[..], &[7; 100]].concat()).unwrap();
    /// // SAFETY: nobody writes to the file while it is mapped.
    /// let inside = unsafe { OpenOptions::new().window(512..512 + model.len() as u64).open(&path)? };
    /// assert_eq!(inside.tensor("fc1.bias")?.shape(), [64]);
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[must_use]
    pub fn window(mut self, part: impl RangeBounds<u64>) -> Self {
        self.map = self.map.window(part);
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

    #[doc = include_str!("guard.md")]
    #[must_use]
    pub fn guard(mut self, guard: bool) -> Self {
        self.guard = guard;
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

    /// As [`ModelShared::open`].
    ///
    /// # Safety
    /// As [`ModelShared::open`].
    ///
    /// # Errors
    /// As [`ModelShared::open`].
    #[allow(unsafe_code)]
    pub unsafe fn open_shared(&self, path: impl AsRef<Path>) -> Result<ModelShared> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.open_place_shared(&locate(path.as_ref())?) }
    }

    /// As [`Model::read`].
    ///
    /// # Errors
    /// As [`Model::read`].
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Model> {
        self.read_place(&locate(path.as_ref())?)
    }

    /// Reads a model into memory that is then sealed, and maps that: immune to whatever becomes of the file, as
    /// [`OpenOptions::read`] is; but its pages are shared with processes that are forked.
    ///
    /// # Errors
    /// As [`Model::read`].
    ///
    /// ```
    /// use maptensors::OpenOptions;
    ///
    /// let model = OpenOptions::new().read_sealed("models/digits.safetensors")?;
    /// assert_eq!(model.tensor("fc1.bias")?.shape(), [64]);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[cfg(target_os = "linux")]
    pub fn read_sealed(&self, path: impl AsRef<Path>) -> Result<Model> {
        self.read_place_sealed(&locate(path.as_ref())?, Backing::ReadOnly)
    }

    /// As [`OpenOptions::read_sealed`], to edit: copy-on-write, so that [`ModelMut::changed`] knows what was
    /// edited.
    ///
    /// # Errors
    /// As [`Model::read`].
    ///
    /// ```
    /// let mut model = maptensors::OpenOptions::new().read_sealed_mut("models/digits.safetensors")?;
    /// model.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] = 9.0;
    /// assert_eq!(model.changed()?.elements(), 1);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[cfg(target_os = "linux")]
    pub fn read_sealed_mut(&self, path: impl AsRef<Path>) -> Result<ModelMut> {
        let model = self.read_place_sealed(&locate(path.as_ref())?, Backing::CopyOnWrite)?;
        Ok(ModelMut::new(model, self.dense_edits))
    }

    /// Maps a model in sealed memory. Nobody can change it, so this needs no promise.
    ///
    /// # Errors
    /// As [`Model::open`]; the path in errors is empty.
    #[cfg(target_os = "linux")]
    pub fn open_sealed(&self, memfd: &SealedMemfd) -> Result<Model> {
        self.open_memfd(memfd, Backing::ReadOnly)
    }

    /// As [`OpenOptions::open_sealed`], to edit: copy-on-write.
    ///
    /// # Errors
    /// As [`OpenOptions::open_sealed`].
    #[cfg(target_os = "linux")]
    pub fn open_sealed_mut(&self, memfd: &SealedMemfd) -> Result<ModelMut> {
        Ok(ModelMut::new(self.open_memfd(memfd, Backing::CopyOnWrite)?, self.dense_edits))
    }

    #[cfg(target_os = "linux")]
    fn open_memfd(&self, memfd: &SealedMemfd, backing: Backing) -> Result<Model> {
        let path = Path::new("");
        let file = memfd.as_fd().try_clone_to_owned().map_err(Error::io(path, "copying the descriptor"))?;
        let found = read_layout(file.into(), memfd.len()?, path, &self.map, copied)?;
        let mapping = self.map.bring_sealed(memfd, path, found.window, backing)?;
        let catalog = Catalog::new(vec![Shard { path: path.into(), layout: found.layout }])?;
        self.checked(Model::new(catalog, vec![Arc::new(mapping)]))
    }

    /// Maps files already located.
    ///
    /// # Safety
    /// As [`Model::open`].
    #[allow(unsafe_code)]
    pub(crate) unsafe fn open_place(&self, place: &Place, backing: Backing) -> Result<Model> {
        let (catalog, mappings, guards) = assemble(
            place,
            self,
            Access::Read,
            |file, path, window| {
                if self.guard {
                    // Names are looked up without asking whether the file has changed.
                    return copied(file, path, window);
                }
                // SAFETY: the caller vouches for the files; the window was held against this descriptor's length.
                unsafe { stable(file, path, window) }
            },
            |found, path| {
                // SAFETY: as above.
                unsafe { self.map.bring(&found.file, path, found.window, backing) }
            },
        )?;
        self.checked(Model::new(catalog, mappings).guarded(guards))
    }

    /// Maps files already located, to edit them. The header is copied: what others may write is never a `&str`.
    ///
    /// # Safety
    /// As [`ModelShared::open`].
    #[allow(unsafe_code)]
    pub(crate) unsafe fn open_place_shared(&self, place: &Place) -> Result<ModelShared> {
        let (catalog, memories, guards) = assemble(place, self, Access::Edit, copied, |found, path| {
            // SAFETY: the caller vouches that the files keep their length, against which the window was held;
            // the mapping goes into a SharedMemory, which makes no slices.
            let mapping = unsafe { self.map.bring(&found.file, path, found.window, Backing::Shared) }?;
            Ok(SharedMemory::of(Arc::new(mapping)))
        })?;
        let model = ModelShared::new(catalog, memories, guards);
        if self.verify == Verify::All {
            model.contents().verify()?;
        }
        Ok(model)
    }

    /// Reads files already located into owned memory.
    pub(crate) fn read_place(&self, place: &Place) -> Result<Model> {
        let (catalog, mappings, _) = assemble(place, self, Access::Copy, copied, |found, path| {
            self.map.read(&found.file, path, found.window, found.layout.data_range().start)
        })?;
        self.checked(Model::new(catalog, mappings))
    }

    /// Reads files already located into memory that is then sealed.
    #[cfg(target_os = "linux")]
    pub(crate) fn read_place_sealed(&self, place: &Place, backing: Backing) -> Result<Model> {
        let (catalog, mappings, _) = assemble(place, self, Access::Copy, copied, |found, path| {
            let data_start = found.layout.data_range().start;
            self.map.read_sealed(&found.file, path, found.window, data_start, backing)
        })?;
        self.checked(Model::new(catalog, mappings))
    }

    fn checked(&self, model: Model) -> Result<Model> {
        if self.verify == Verify::All {
            model.verify()?;
        }
        Ok(model)
    }
}

/// A part of a file that may be mapped.
///
/// # Safety
/// As [`Model::open`]; the file has the window.
#[allow(unsafe_code)]
unsafe fn stable<'f>(file: &'f File, path: &'f Path, window: Window) -> FileBytes<'f> {
    let end = window.offset + window.len as u64;
    // SAFETY: the caller vouches for the file.
    FileBytes::stable(unsafe { StableFile::new(file, end) }, path, window)
}

pub(super) fn from_bytes(bytes: &[u8]) -> Result<Model> {
    let path = Path::new("");
    let layout = format::read(&bytes)?;
    let mut mapping = Mapping::owned(bytes.len(), layout.data_range().start)
        .map_err(Error::io(path, "allocating memory for the model"))?;
    let source = map::RawSlice::from(bytes);
    let chunks = mapping.as_bytes_mut().chunks_mut(map::CHUNK).enumerate().collect();
    let copied: Result<(), ()> = work::each_in_parallel(chunks, |(i, chunk): (usize, &mut [u8])| {
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
