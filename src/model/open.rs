//! From a path to a model.

use super::assemble::{Access, Assembled, Found, assemble, copied, read_layout, verified};
use super::{Location, Model, ModelMut, ModelShared, OpenFrom, OverMemory, ReadFrom, Readable};
use crate::diff::Verify;
#[cfg(target_os = "linux")]
use crate::error::Error;
use crate::error::Result;
use crate::format;
use crate::layout::Layout;
#[cfg(target_os = "linux")]
use crate::map::SealedMemfd;
use crate::map::{self, Backing, MapOptions, Mapping, SharedMemory, StableFile, Window};
use crate::source::FileBytes;
use crate::work;
use std::fs::File;
use std::io;
use std::ops::RangeBounds;
#[cfg(target_os = "linux")]
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;

/// How to open a model; [`Model::open`] and its kin are the defaults.
///
/// What a model is opened from and what is done with it are said apart. Every option goes with every row, or is
/// refused by name.
///
/// | | from | to read: [`Model`] | to edit a copy: [`ModelMut`] | to edit the file: [`ModelShared`] |
/// |---|---|---|---|---|
/// | mapped, under a contract (`unsafe`) | [`OpenFrom`]: a path, [`Files`](crate::Files) | [`open`](Self::open) | [`open_mut`](Self::open_mut) | [`open_shared`](Self::open_shared) |
/// | over memory that nobody changes | [`OverMemory`]: bytes that are lent, a `&SealedMemfd` | [`over`](Self::over) | [`over_mut`](Self::over_mut) (sealed memory) | – |
/// | read into owned memory | [`ReadFrom`]: a path, [`Files`](crate::Files), [`Content`](crate::Content), a `&SealedMemfd` | [`read`](Self::read) | [`read_mut`](Self::read_mut) | – |
/// | read into memory that is sealed | [`ReadFrom`] | [`read_sealed`](Self::read_sealed) | [`read_sealed_mut`](Self::read_sealed_mut) | – |
///
/// Nothing that is copied has a file to be edited, and bytes alone are not opened under a contract about files:
///
/// ```compile_fail
/// let bytes = std::fs::read("models/digits.safetensors").unwrap();
/// // SAFETY: none is needed, so this does not compile: `read` copies, and `over` takes the bytes themselves.
/// let model = unsafe { maptensors::Model::open(maptensors::Content::new(&bytes)) };
/// ```
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

    /// Maps files, to read.
    ///
    /// # Safety
    /// As [`Model::open`].
    ///
    /// # Errors
    /// As [`Model::open`].
    #[allow(unsafe_code)]
    pub unsafe fn open(&self, from: impl OpenFrom) -> Result<Model> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.map_files(&from.locate()?, Backing::ReadOnly) }.map(Model::of)
    }

    /// Maps files copy-on-write, to edit a copy.
    ///
    /// # Safety
    /// As [`Model::open`].
    ///
    /// # Errors
    /// As [`Model::open`].
    #[allow(unsafe_code)]
    pub unsafe fn open_mut(&self, from: impl OpenFrom) -> Result<ModelMut> {
        // SAFETY: the caller's promise is passed on.
        let opened = unsafe { self.map_files(&from.locate()?, Backing::CopyOnWrite) }?;
        Ok(ModelMut::new(Model::of(opened), self.dense_edits))
    }

    /// Maps files, to edit them.
    ///
    /// # Safety
    /// As [`ModelShared::open`].
    ///
    /// # Errors
    /// As [`ModelShared::open`].
    #[allow(unsafe_code)]
    pub unsafe fn open_shared(&self, from: impl OpenFrom) -> Result<ModelShared> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.map_files_shared(&from.locate()?) }.map(ModelShared::of)
    }

    /// Reads a model into owned memory.
    ///
    /// # Errors
    /// As [`Model::read`].
    pub fn read(&self, from: impl ReadFrom) -> Result<Model> {
        self.read_into(from.find()?, Into::Owned).map(Model::of)
    }

    /// Reads a model into owned memory, to edit there.
    ///
    /// # Errors
    /// As [`Model::read`].
    ///
    /// ```
    /// use maptensors::{Content, OpenOptions};
    ///
    /// let bytes = std::fs::read("models/digits.safetensors").unwrap();
    /// let mut model = OpenOptions::new().lock(true).read_mut(Content::new(&bytes))?;
    /// model.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?.fill(0.0); // `bytes` are as they were
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn read_mut(&self, from: impl ReadFrom) -> Result<ModelMut> {
        // All of it is this process's own already: there is nothing to promote.
        Ok(ModelMut::new(self.read(from)?, false))
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
    pub fn read_sealed(&self, from: impl ReadFrom) -> Result<Model> {
        self.read_into(from.find()?, Into::Sealed(Backing::ReadOnly)).map(Model::of)
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
    pub fn read_sealed_mut(&self, from: impl ReadFrom) -> Result<ModelMut> {
        let read = self.read_into(from.find()?, Into::Sealed(Backing::CopyOnWrite))?;
        Ok(ModelMut::new(Model::of(read), self.dense_edits))
    }

    /// A model over memory that nobody changes: bytes that are lent, or sealed memory. Copies nothing, and needs no
    /// promise.
    ///
    /// # Errors
    /// As [`Model::over`]; [`Error::Argument`] for [`OpenOptions::lock`] and [`OpenOptions::populate`] of bytes that are
    /// lent: those are their owner's.
    pub fn over(&self, memory: impl OverMemory) -> Result<Model> {
        memory.over(self).map(Model::of)
    }

    /// As [`OpenOptions::over`], to edit: copy-on-write. Bytes that are lent are never written:
    /// [`OpenOptions::read_mut`] copies them.
    ///
    /// # Errors
    /// As [`Model::over`].
    ///
    /// ```
    /// use maptensors::{Memfd, OpenOptions};
    ///
    /// let bytes = std::fs::read("models/digits.safetensors").unwrap();
    /// let mut memfd = Memfd::create("weights", bytes.len())?;
    /// memfd.as_bytes_mut().copy_from_slice(&bytes);
    /// let mut model = OpenOptions::new().over_mut(&memfd.seal()?)?;
    /// model.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] = 9.0;
    /// assert_eq!(model.changed()?.elements(), 1);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[cfg(target_os = "linux")]
    pub fn over_mut(&self, memory: &SealedMemfd) -> Result<ModelMut> {
        let opened = self.over_sealed(memory, Backing::CopyOnWrite)?;
        Ok(ModelMut::new(Model::of(opened), self.dense_edits))
    }
}

/// Memory that a model is read into.
#[derive(Clone, Copy)]
pub(crate) enum Into {
    /// This process's own.
    Owned,
    /// Sealed once it is filled, and mapped so.
    #[cfg(target_os = "linux")]
    Sealed(Backing),
}

/// What opens for Rust's models, and for Python's.
impl OpenOptions {
    /// Maps files already located.
    ///
    /// # Safety
    /// As [`Model::open`].
    #[allow(unsafe_code)]
    pub(crate) unsafe fn map_files(
        &self,
        location: &Location,
        backing: Backing,
    ) -> Result<Assembled<Mapping>> {
        let opened = assemble(
            location,
            self,
            Access::Read,
            |file, path, window| {
                if self.guard {
                    // Names are looked up without asking whether the file has changed.
                    return copied(file, path, window);
                }
                // SAFETY: the caller vouches for the files; the window was checked against this descriptor's length.
                unsafe { stable(file, path, window) }
            },
            |found, path| {
                // SAFETY: as above.
                unsafe { self.map.bring(&found.file, path, found.window, backing) }
            },
        )?;
        verified(opened, self.verify)
    }

    /// Maps files already located, to edit them. The header is copied: what others may write is never a `&str`.
    ///
    /// # Safety
    /// As [`ModelShared::open`].
    #[allow(unsafe_code)]
    pub(crate) unsafe fn map_files_shared(&self, location: &Location) -> Result<Assembled<SharedMemory>> {
        let opened = assemble(location, self, Access::Edit, copied, |found, path| {
            // SAFETY: the caller vouches that the files keep their length, against which the window was checked;
            // the mapping goes into a SharedMemory, which makes no slices.
            let mapping = unsafe { self.map.bring(&found.file, path, found.window, Backing::Shared) }?;
            Ok(SharedMemory::of(Arc::new(mapping)))
        })?;
        verified(opened, self.verify)
    }

    /// Copies what was found.
    pub(crate) fn read_into(&self, from: Readable<'_>, into: Into) -> Result<Assembled<Mapping>> {
        let no_path = Path::new("");
        let read = |found: &Found, path: &Path| {
            let from = found.window.offset;
            self.fill(into, path, found.window, &found.layout, |to| map::read_all_at(to, &found.file, from))
        };
        let opened = match from {
            Readable::Files(location) => assemble(&location, self, Access::Copy, copied, read)?,
            Readable::Content(bytes) => {
                let window = self.map.window_of(bytes.len() as u64, no_path)?;
                let start = usize::try_from(window.offset).unwrap_or_default();
                let bytes = &bytes[start..start + window.len];
                let layout = format::read(&bytes)?;
                let memory = self.fill(into, no_path, window, &layout, |to| copy_to(to, bytes))?;
                Assembled::of_one(no_path, layout, memory)?
            }
            #[cfg(target_os = "linux")]
            Readable::Sealed(memfd) => {
                let found = self.found_in(memfd)?;
                let memory = read(&found, no_path)?;
                Assembled::of_one(no_path, found.layout, memory)?
            }
        };
        verified(opened, self.verify)
    }

    /// Lies over bytes that are lent.
    pub(super) fn over_lent(&self, owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Assembled<Mapping>> {
        let mapping = self.map.lent(owner)?;
        let layout = format::read(&mapping.as_bytes())?;
        verified(Assembled::of_one(Path::new(""), layout, mapping)?, self.verify)
    }

    /// Maps sealed memory.
    #[cfg(target_os = "linux")]
    pub(super) fn over_sealed(&self, memfd: &SealedMemfd, backing: Backing) -> Result<Assembled<Mapping>> {
        let (found, path) = (self.found_in(memfd)?, Path::new(""));
        let mapping = self.map.bring_sealed(memfd, path, found.window, backing)?;
        verified(Assembled::of_one(path, found.layout, mapping)?, self.verify)
    }

    #[cfg(target_os = "linux")]
    fn found_in(&self, memfd: &SealedMemfd) -> Result<Found> {
        let path = Path::new("");
        let file = memfd.as_fd().try_clone_to_owned().map_err(Error::io(path, "copying the descriptor"))?;
        read_layout(file.into(), memfd.len()?, path, &self.map, copied)
    }

    fn fill(
        &self,
        into: Into,
        path: &Path,
        window: Window,
        layout: &Layout,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> Result<Mapping> {
        let data_start = layout.data_range().start;
        match into {
            Into::Owned => self.map.read(path, window, data_start, fill),
            #[cfg(target_os = "linux")]
            Into::Sealed(backing) => self.map.read_sealed(path, window, data_start, backing, fill),
        }
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

/// Copies bytes on several threads.
fn copy_to(to: &mut [u8], bytes: &[u8]) -> io::Result<()> {
    let source = map::RawSlice::from(bytes);
    work::each_in_parallel(to.chunks_mut(map::CHUNK).enumerate().collect(), |(i, to): (usize, &mut [u8])| {
        source.copy_to(i * map::CHUNK..i * map::CHUNK + to.len(), to);
        Ok(())
    })
}

/// As [`ModelMut::open`], for tests in rooms without `unsafe`.
#[cfg(test)]
#[allow(unsafe_code)]
pub(crate) fn open_own_file(path: &Path) -> Result<ModelMut> {
    // SAFETY: a file that a test has just made, and writes to no more.
    unsafe { ModelMut::open(path) }
}
