//! A file being made in place.

use super::over::Kind;
use super::tensor::Write;
use super::{Pending, Target, checksum, fill};
use crate::error::{Error, Result, quote};
use crate::format::safetensors;
use crate::layout::Layout;
use crate::map::{Mapping, RawSlice};
use crate::model::split;
use crate::os::disk::Dir;
use crate::tensor::TensorViewMut;
use crate::work::{Progress, cancel};
use std::path::Path;
use std::sync::Arc;

/// How to make a [`Draft`]; [`Draft::create`] is the defaults.
///
/// ```
/// use maptensors::{DType, DraftOptions, Layout};
///
/// let layout = Layout::builder().tensor("w", DType::U8, &[4]).build()?;
/// let path = std::env::temp_dir().join("maptensors-doc-options.safetensors");
/// DraftOptions::new().durable(false).create(&path, &layout)?.commit()?;
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct DraftOptions {
    durable: bool,
    mapped: bool,
    checksums: bool,
    mode: Option<u32>,
    dir: Option<Arc<Dir>>,
    progress: Progress,
}

impl Default for DraftOptions {
    fn default() -> Self {
        Self {
            durable: true,
            mapped: true,
            checksums: false,
            mode: None,
            dir: None,
            progress: Progress::default(),
        }
    }
}

impl DraftOptions {
    /// Durable and mapped.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the file survives a power loss once committed (default), or is only whole.
    #[must_use]
    pub fn durable(mut self, durable: bool) -> Self {
        self.durable = durable;
        self
    }

    /// Whether to write through a mapping (default, where the file system can allocate space). If not,
    /// tensors are filled in ordinary memory and written by the commit.
    #[must_use]
    pub fn mapped(mut self, mapped: bool) -> Self {
        self.mapped = mapped;
        self
    }

    /// Whether the file carries a checksum of each tensor, for [`Model::verify`](crate::Model::verify) and to
    /// make deltas against it cheap: in its metadata, as `maptensors.checksums`, computed by the commit. A
    /// layout whose metadata has that entry asks for it too: it is never copied stale.
    ///
    /// ```
    /// # use maptensors::{DType, DraftOptions, Layout, Model};
    /// # let layout = Layout::builder().tensor("w", DType::U8, &[4]).build()?;
    /// # let path = std::env::temp_dir().join("maptensors-doc-checksums.safetensors");
    /// DraftOptions::new().checksums(true).create(&path, &layout)?.commit()?;
    /// Model::read(&path)?.verify()?;
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[must_use]
    pub fn checksums(mut self, checksums: bool) -> Self {
        self.checksums = checksums;
        self
    }

    pub(crate) fn wants_checksums(&self) -> bool {
        self.checksums
    }

    /// A mode for the file, in place of the umask's or that of what it replaces; nobody else reads it before.
    #[must_use]
    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode);
        self
    }

    /// These, for files in a directory that is open, and nowhere but there: see [`Pending::create_in`].
    pub(crate) fn within(&self, dir: &Arc<Dir>) -> Self {
        Self { dir: Some(dir.clone()), ..self.clone() }
    }

    pub(crate) fn wanted_mode(&self) -> Option<u32> {
        self.mode
    }

    /// Calls `told(done, total)`, in bytes of tensor data, as whole tensors are copied in: from several
    /// threads, and once for each piece of at most 2 MiB.
    #[must_use]
    pub fn progress(mut self, told: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.progress = Progress::telling(told);
        self
    }

    /// These, for a save of so many bytes in all.
    pub(crate) fn over(&self, total: u64) -> Self {
        Self { progress: self.progress.over(total), ..self.clone() }
    }

    pub(crate) fn is_durable(&self) -> bool {
        self.durable
    }

    /// As [`Draft::create`].
    ///
    /// # Errors
    /// As [`Draft::create`].
    pub fn create(&self, path: impl AsRef<Path>, layout: &Layout) -> Result<Draft> {
        Draft::with(path.as_ref(), layout, self)
    }
}

/// A safetensors file being made: allocated and mapped, but invisible until [`Draft::commit`].
///
/// Its tensors start as zeros. Dropped without a commit it leaves nothing behind.
///
/// As long as its memory is handed out the file has no name, so that nobody can open it, write to it or cut it
/// short. Where the file system has no such files (`O_TMPFILE`: NFS, FAT), it has a random one beside the
/// path, which begins with `.maptensors-`: there nobody else may write to it.
///
/// It is this process's. A child that is forked cannot fill or commit it, and leaves it alone; memory of it that was handed
/// out before the fork is nothing that the child may touch (`SIGSEGV`). After a bare clone(2) system call, which
/// skips the C library's fork handlers, the child may not even drop it.
///
/// ```
/// use maptensors::{DType, Draft, Layout, Model};
///
/// let layout = Layout::builder().tensor("w", DType::F32, &[2, 2]).build()?;
/// let path = std::env::temp_dir().join("maptensors-doc-draft.safetensors");
/// let mut draft = Draft::create(&path, &layout)?;
/// draft.tensor_mut("w")?.as_mut_slice::<f32>()?.copy_from_slice(&[1.0, 2.0, 3.0, 4.0]);
/// assert!(!path.exists());
/// draft.commit()?; // synced, then renamed into place
/// assert_eq!(Model::read(&path)?.tensor("w")?.as_slice::<f32>()?[3], 4.0);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
pub struct Draft {
    layout: Layout,
    // INVARIANT: the whole file, header included: its mapping, or memory to be written at commit.
    memory: Option<Mapping>,
    mapped: bool,
    durable: bool,
    progress: Progress,
    // Declared last: the mapping goes before the file does.
    pending: Pending,
}

impl Draft {
    /// Allocates and maps a new file for `layout`, in the directory of `path`.
    ///
    /// # Errors
    /// [`Error::Io`]: no space, no permission, no such directory; [`Error::NotRegular`] if `path` is a
    /// directory or device; [`Error::Limit`] if the header is longer than readers accept; [`Error::Argument`] for a
    /// name that says another kind of file (`model.safetensors.index.json`, `model.gguf`).
    pub fn create(path: impl AsRef<Path>, layout: &Layout) -> Result<Self> {
        DraftOptions::new().create(path, layout)
    }

    fn with(path: &Path, layout: &Layout, options: &DraftOptions) -> Result<Self> {
        Kind::Weights.check_name(path)?;
        let declared = checksum::declare(layout, options.checksums);
        let (header, layout) = safetensors::encode(declared.as_ref().unwrap_or(layout), path)?;
        let pending = match &options.dir {
            Some(dir) => Pending::create_in(dir, path, options.mode)?,
            None => Pending::create_with(path, options.mode)?,
        };
        let mapped = pending.allocate(layout.file_len())? && options.mapped;
        if !mapped {
            pending.file().write_all_at(&header, 0).map_err(Error::io(path, "writing the header"))?;
            return Ok(Self::new(layout, None, options, pending));
        }
        let mut memory = map_output(&pending, layout.file_len())?;
        memory.as_bytes_mut()[..header.len()].copy_from_slice(&header);
        Ok(Self::new(layout, Some(memory), options, pending))
    }

    /// In a file that has its size and is mapped already. What is not filled keeps what the file held.
    pub(crate) fn within(
        header: &[u8],
        layout: Layout,
        mut memory: Mapping,
        options: &DraftOptions,
        pending: Pending,
    ) -> Self {
        memory.as_bytes_mut()[..header.len()].copy_from_slice(header);
        Self::new(layout, Some(memory), options, pending)
    }

    fn new(layout: Layout, memory: Option<Mapping>, options: &DraftOptions, pending: Pending) -> Self {
        let progress = match &options.progress {
            begun if begun.has_begun() => begun.clone(),
            progress => progress.over(layout.data_len()),
        };
        let mapped = memory.is_some();
        Self { layout, memory, mapped, durable: options.durable, progress, pending }
    }

    /// The layout of the file being made.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The path the file will have.
    pub fn path(&self) -> &Path {
        self.pending.path()
    }

    /// Whether tensors are written straight into the file's pages. `false` where the file system cannot
    /// allocate space ahead: then they are written by the commit.
    pub fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// From now on tensors are filled in memory, also where there is no mapping: all of them, for the commit
    /// writes that memory whole.
    #[cfg(feature = "python")]
    pub(crate) fn materialize(&mut self) -> Result<()> {
        self.memory().map(|_| ())
    }

    /// The whole file's bytes to write. Without a mapping they are allocated when first asked for.
    ///
    /// # Errors
    /// In a fork's child.
    fn memory(&mut self) -> Result<&mut Mapping> {
        self.pending.own()?;
        if self.memory.is_none() {
            let data = self.layout.data_range();
            let memory = Mapping::owned(data.end, data.start)
                .map_err(Error::io(self.pending.path(), "allocating memory to fill"))?;
            self.memory = Some(memory);
        }
        // Filled in just above where it was missing.
        self.memory.as_mut().ok_or_else(|| Error::Argument("no memory".into()))
    }

    /// The tensor called `name`, to fill in place.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Io`] where memory for an unmapped draft cannot be had; [`Error::Argument`] in
    /// a fork's child.
    pub fn tensor_mut(&mut self, name: &str) -> Result<TensorViewMut<'_>> {
        let path = self.pending.path().to_owned();
        let missing = || Error::Missing { path, name: name.into(), hint: " in the planned layout".into() };
        let index = self.layout.position(name).ok_or_else(missing)?;
        self.memory()?;
        let Self { layout, memory: Some(memory), .. } = self else {
            return Err(Error::Argument("no memory".into()));
        };
        let info = layout.at(index).ok_or_else(|| Error::Argument("no such tensor".into()))?;
        Ok(TensorViewMut::new(info, &mut memory.as_bytes_mut()[info.bytes()]))
    }

    /// The tensor called `name`, to fill in place, if there is one.
    ///
    /// # Errors
    /// As [`Draft::tensor_mut`], but for [`Error::Missing`].
    ///
    /// ```
    /// # use maptensors::{DType, Draft, Layout};
    /// # let layout = Layout::builder().tensor("w", DType::U8, &[4]).build()?;
    /// # let path = std::env::temp_dir().join("maptensors-doc-draft-get.safetensors");
    /// let mut draft = Draft::create(&path, &layout)?;
    /// assert!(draft.get_mut("w")?.is_some() && draft.get_mut("v")?.is_none());
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn get_mut(&mut self, name: &str) -> Result<Option<TensorViewMut<'_>>> {
        if self.layout.position(name).is_some() { self.tensor_mut(name).map(Some) } else { Ok(None) }
    }

    /// All tensors at once, to fill in place, in file order.
    ///
    /// # Errors
    /// [`Error::Io`] where memory for an unmapped draft cannot be had.
    ///
    /// ```
    /// # use maptensors::{DType, Draft, Layout};
    /// # let layout = Layout::builder().tensor("w", DType::U8, &[4]).build()?;
    /// # let path = std::env::temp_dir().join("maptensors-doc-tensors.safetensors");
    /// let mut draft = Draft::create(&path, &layout)?;
    /// for mut tensor in draft.tensors_mut()? {
    ///     tensor.as_bytes_mut().fill(7);
    /// }
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn tensors_mut(&mut self) -> Result<impl Iterator<Item = TensorViewMut<'_>>> {
        self.memory()?;
        let Self { layout, memory, .. } = self;
        Ok(memory
            .iter_mut()
            .flat_map(|memory| split(layout, &mut memory.as_bytes_mut()[layout.data_range()])))
    }

    /// Copies whole tensors, given by their place in the layout, in parallel.
    ///
    /// # Errors
    /// [`Error::Shape`] if a source is not as long as its tensor; [`Error::Io`].
    pub(crate) fn fill(&mut self, jobs: Vec<(usize, RawSlice<'_>)>) -> Result<()> {
        self.pending.own()?;
        let placed = place(&self.layout, jobs, self.pending.path())?;
        // Once tensors were filled in memory, all are: the commit writes that memory.
        let target = match &mut self.memory {
            // The same pages, by another way.
            Some(_) if self.mapped && self.pending.file().is_memory() => Target::File(self.pending.file()),
            Some(memory) => Target::Memory(memory.as_bytes_mut()),
            None => Target::File(self.pending.file()),
        };
        let copied = |bytes: usize| self.progress.add(bytes as u64);
        fill(target, placed, &copied).map_err(Error::io(self.pending.path(), "writing tensor data"))
    }

    /// Has a tensor, given by its place in the layout, written: where it lies in the file's memory, if there is any.
    ///
    /// # Errors
    /// [`Error::Shape`] if not all of it is; [`Error::Io`].
    pub(super) fn bring(&mut self, index: usize, write: Write<'_>) -> Result<()> {
        self.pending.own()?;
        let path = self.pending.path();
        let info = self.layout.at(index).ok_or_else(|| Error::Argument("no such tensor".into()))?;
        let (bytes, expected) = (info.bytes(), info.nbytes());
        if bytes.is_empty() {
            return Ok(());
        }
        let bringing = |source| {
            let action = format!("bringing tensor {}", quote(info.name())).into();
            Error::Io { path: path.to_owned(), action, source }
        };
        cancel::check().map_err(bringing)?;
        let mut copy = Vec::new();
        // The small pages of a file in memory fault one by one, which costs more than a copy.
        let in_place = !(self.mapped && self.pending.file().is_memory());
        let to = match &mut self.memory {
            Some(memory) if in_place => &mut memory.as_bytes_mut()[bytes],
            _ => {
                copy = vec![0; bytes.len()];
                &mut copy[..]
            }
        };
        let found = write(to).map_err(bringing)? as u64;
        if found != expected {
            return Err(Error::Shape { path: path.to_owned(), tensor: info.name().into(), found, expected });
        }
        if copy.is_empty() {
            self.progress.add(expected);
            return Ok(());
        }
        self.fill(vec![(index, RawSlice::from(&*copy))])
    }

    /// Makes the file visible under its path, replacing what is there; durable when this returns, unless
    /// [`DraftOptions::durable`] says otherwise. A sharded set of that name goes as well (`model.safetensors.index.json`
    /// and its shards, for `model.safetensors`): one directory has one model.
    ///
    /// The file goes into the directory that was opened when it was begun, wherever that is now.
    ///
    /// # Errors
    /// [`Error::Io`]: nothing is left behind and the old file is as it was. [`Error::NotDurable`].
    /// [`Error::Moved`] where that directory was moved meanwhile, or a link to it points elsewhere: the file is saved
    /// there, whole, and the error says where that is; of a directory that was removed nothing is left.
    /// [`Error::Argument`] in a fork's child.
    pub fn commit(mut self) -> Result<()> {
        // Unmapped before the sync: nothing can dirty a page after it.
        self.write_out()?;
        drop(self.memory.take());
        self.pending.publish_model(self.durable)
    }

    /// As [`Draft::commit`]; unmapping, which takes its time, is left to the caller.
    pub(crate) fn commit_mapped(mut self) -> Result<Option<Mapping>> {
        self.write_out()?;
        self.pending.publish_model(self.durable)?;
        Ok(self.memory)
    }

    /// Writes what was filled in memory, where that is not the file's.
    fn write_out(&mut self) -> Result<()> {
        self.pending.own()?;
        if let (Some(memory), false) = (&self.memory, self.mapped) {
            let data = self.layout.data_range();
            let source = RawSlice::from(&memory.as_bytes()[data.clone()]);
            fill(Target::File(self.pending.file()), vec![(data.start, source)], &|_| ())
                .map_err(Error::io(self.pending.path(), "writing tensor data"))?;
        }
        checksum::seal(&self.layout, self.pending.file(), self.pending.path())
    }

    /// Who is told how far it is.
    #[cfg(feature = "python")]
    pub(crate) fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// The pieces, for a face that shares the memory with another language.
    #[cfg(feature = "python")]
    pub(crate) fn into_parts(mut self) -> Result<(Layout, Mapping, bool, bool, Pending)> {
        self.memory()?;
        let Self { layout, memory, mapped, durable, pending, .. } = self;
        let memory = memory.ok_or_else(|| Error::Argument("no memory".into()))?;
        Ok((layout, memory, mapped, durable, pending))
    }
}

/// Maps a new file, which has its size.
pub(crate) fn map_output(pending: &Pending, len: u64) -> Result<Mapping> {
    let mapping = |source| Error::io(pending.path(), "mapping the new file")(source);
    let len = usize::try_from(len).map_err(|_| mapping(std::io::ErrorKind::OutOfMemory.into()))?;
    Mapping::output(pending.file(), len).map_err(mapping)
}

/// The file offset of each source's tensor.
///
/// # Errors
/// [`Error::Shape`] if a source is not as long as its tensor.
pub(crate) fn place<'a>(
    layout: &Layout,
    jobs: Vec<(usize, RawSlice<'a>)>,
    path: &Path,
) -> Result<Vec<(usize, RawSlice<'a>)>> {
    jobs.into_iter()
        .map(|(index, source)| {
            let info = layout.at(index).ok_or_else(|| Error::Argument("no such tensor".into()))?;
            if info.bytes().len() == source.len() {
                return Ok((info.bytes().start, source));
            }
            let (tensor, found) = (info.name().into(), source.len() as u64);
            Err(Error::Shape { path: path.into(), tensor, found, expected: info.nbytes() })
        })
        .collect()
}

impl std::fmt::Debug for Draft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Draft")
            .field("path", &self.path())
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}
