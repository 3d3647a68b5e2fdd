//! A model whose tensors can be written.

use super::{Model, OpenFrom, OpenOptions, ReadFrom};
use crate::diff::{Changes, Contents, Marks};
use crate::error::{Error, Result};
use crate::layout::TensorInfo;
#[cfg(target_os = "linux")]
use crate::map::SealedMemfd;
use crate::map::{CHUNK, Mapping, not_writable};
use crate::tensor::TensorViewMut;
use std::collections::HashSet;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A model, to edit: copy-on-write. A page becomes this process's own when it is first written; the
/// file never changes, and pages not written stay shared with everyone who maps it.
///
/// Everything [`Model`] can do, this can. Its `clone` is a [`Model`] over the same memory, to read: as long as that is
/// there, nothing can be written here, which is [`Error::Busy`].
///
/// ```
/// use maptensors::ModelMut;
///
/// // SAFETY: nobody writes to the file while it is mapped.
/// let mut tuned = unsafe { ModelMut::open("models/digits.safetensors")? };
/// tuned.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] += 1.0; // the file never changes
/// let out = std::env::temp_dir().join("maptensors-doc-tuned.safetensors");
/// tuned.save(&out)?;
/// # std::fs::remove_file(out).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug)]
pub struct ModelMut {
    // INVARIANT: every mapping is copy-on-write or owned, and had by this model and clones of it that read. `exclusive`
    // gives it to be written while there is no clone.
    model: Model,
    /// Under [`OpenOptions::dense_edits`]: which tensors have been promoted, by shard and place.
    promoted: Option<HashSet<(usize, usize)>>,
    /// What [`ModelMut::changed`] compares with in place of the files.
    marks: Option<Marks>,
    /// Like no other's in this process.
    token: u64,
}

impl ModelMut {
    /// Maps a model copy-on-write, from what [`Model::open`] takes.
    ///
    /// # Safety
    /// As [`Model::open`].
    ///
    /// # Errors
    /// As [`Model::open`].
    #[allow(unsafe_code)]
    pub unsafe fn open(from: impl OpenFrom) -> Result<Self> {
        // SAFETY: the caller's promise is passed on.
        unsafe { OpenOptions::new().open_mut(from) }
    }

    /// Reads a model into owned memory, to edit there; see [`Model::read`].
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn read(from: impl ReadFrom) -> Result<Self> {
        OpenOptions::new().read_mut(from)
    }

    /// A model over sealed memory, copy-on-write: see [`OpenOptions::over_mut`].
    ///
    /// # Errors
    /// As [`Model::over`].
    #[cfg(target_os = "linux")]
    pub fn over(memory: &SealedMemfd) -> Result<Self> {
        OpenOptions::new().over_mut(memory)
    }

    /// `model`'s mappings are copy-on-write or owned, and its alone.
    pub(crate) fn new(model: Model, dense_edits: bool) -> Self {
        Self { model, promoted: dense_edits.then(HashSet::new), marks: None, token: new_token() }
    }

    /// What tells this model from every other of this process.
    pub(crate) fn token(&self) -> u64 {
        self.token
    }

    /// The tensor called `name`, to write.
    ///
    /// # Errors
    /// [`Error::Missing`], with near names; [`Error::Busy`] while there is a clone of the model; [`Error::Io`] (`ENOMEM`) where the kernel does not
    /// promise memory for the tensor (`vm.overcommit_memory` at 2); those of [`OpenOptions::guard`] where that is on.
    pub fn tensor_mut(&mut self, name: &str) -> Result<TensorViewMut<'_>> {
        if self.model.guards.is_some() {
            self.model.tensor(name)?;
        }
        let Model { catalog, mappings, .. } = &mut self.model;
        let found = catalog.find(name).and_then(|(s, i)| Some((s, i, catalog.shards()[s].layout.at(i)?)));
        let (shard, index, info) = found.ok_or_else(|| catalog.missing(name))?;
        let mapping = exclusive(&mut mappings[shard], &catalog.shards()[shard].path)?;
        if let Some(promoted) = &mut self.promoted
            && info.bytes().len() >= CHUNK
            && promoted.insert((shard, index))
        {
            let pages = mapping.whole_pages(&info.bytes());
            // Where memory cannot be had in bulk, pages are copied as they are written.
            mapping.promote(pages).ok();
        }
        let part = info.bytes();
        let len = part.len();
        let path = &catalog.shards()[shard].path;
        let data = mapping.part_mut(part);
        let data = data.map_err(|error| not_writable(path, &tensor(info.name()), len, error))?;
        Ok(TensorViewMut::new(info, data))
    }

    /// The tensor called `name`, to write, if there is one.
    ///
    /// # Errors
    /// As [`ModelMut::tensor_mut`], but for [`Error::Missing`].
    ///
    /// ```
    /// let mut model = maptensors::ModelMut::read("models/digits.safetensors")?;
    /// if let Some(mut bias) = model.get_mut("lm_head.bias")? {
    ///     bias.as_mut_slice::<f32>()?.fill(0.0);
    /// }
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn get_mut(&mut self, name: &str) -> Result<Option<TensorViewMut<'_>>> {
        if self.contains(name) { self.tensor_mut(name).map(Some) } else { Ok(None) }
    }

    /// Makes all tensor data this process's own in bulk, before a fine-tune that writes all of it: several
    /// times as fast as copying each page when it is first written. Takes the model's size in memory at
    /// once; for sparse edits leave it be.
    ///
    /// # Errors
    /// [`Error::Io`] where memory cannot be had; the model is as it was.
    pub fn promote(&mut self) -> Result<()> {
        let Model { catalog, mappings, .. } = &mut self.model;
        for (shard, mapping) in catalog.shards().iter().zip(mappings) {
            let promoted = exclusive(mapping, &shard.path)?.promote(shard.layout.data_range());
            promoted.map_err(Error::io(&shard.path, "copying its pages"))?;
        }
        Ok(())
    }

    /// Makes one tensor this process's own in bulk: see [`ModelMut::promote`].
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Io`].
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
    /// model.promote_tensor("fc1.weight")?;
    /// model.tensor_mut("fc1.weight")?.as_mut_slice::<f32>()?.fill(0.0);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn promote_tensor(&mut self, name: &str) -> Result<()> {
        let Model { catalog, mappings, .. } = &mut self.model;
        let found = catalog.find(name).and_then(|(s, i)| Some((s, catalog.shards()[s].layout.at(i)?)));
        let (shard, info) = found.ok_or_else(|| catalog.missing(name))?;
        let mapping = exclusive(&mut mappings[shard], &catalog.shards()[shard].path)?;
        let promoted = mapping.promote(info.bytes());
        promoted.map_err(Error::io(&catalog.shards()[shard].path, "copying its pages"))
    }

    /// Which tensors changed since opening, or the last [`ModelMut::mark`], and by how much: exact, bit by
    /// bit. The kernel knows which pages were written; only those are compared with the file, so that a
    /// write of the same value is no change.
    ///
    /// # Errors
    /// [`Error::Argument`] for a model that was read, not mapped: nothing is left to compare with.
    /// [`Error::Io`] where the kernel does not tell.
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
    /// model.tensor_mut("fc2.weight")?.as_mut_slice::<f32>()?.fill(0.5);
    /// let changed = model.changed()?;
    /// assert!(changed.iter().all(|tensor| tensor.name.starts_with("fc2."))); // fc1 stayed frozen
    /// assert_eq!(changed.elements(), 640);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn changed(&self) -> Result<Changes> {
        self.check()?;
        self.contents().changes()
    }

    /// From now on, [`ModelMut::changed`] and [`save_delta`](crate::save_delta) tell what changed since now.
    /// Takes a copy of the pages that were written so far, as much memory as they take already.
    ///
    /// # Errors
    /// As [`ModelMut::changed`].
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
    /// model.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?.fill(0.5);
    /// model.mark()?;
    /// assert!(model.changed()?.is_empty());
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn mark(&mut self) -> Result<()> {
        self.check()?;
        self.marks = Some(self.contents().mark()?);
        Ok(())
    }

    #[cfg(feature = "python")]
    pub(crate) fn into_model(self) -> Model {
        self.model
    }

    /// Its bytes and marks, to compare and to hash.
    pub(crate) fn contents(&self) -> Contents<'_> {
        Contents { marks: self.marks.as_ref(), ..self.model.contents() }
    }

    /// Other metadata, in place of that of all files.
    pub(crate) fn set_metadata(&mut self, metadata: Option<crate::layout::Metadata>) {
        Arc::make_mut(&mut self.model.catalog).set_metadata(metadata);
    }

    /// All tensors at once, to write, shard by shard, in file order.
    ///
    /// # Errors
    /// [`Error::Io`] (`ENOMEM`) where the kernel does not promise memory for all of them (`vm.overcommit_memory` at 2);
    /// [`Error::Busy`] while there is a clone of the model.
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
    /// for mut tensor in model.tensors_mut()? {
    ///     tensor.as_mut_slice::<f32>()?.iter_mut().for_each(|w| *w *= 0.5);
    /// }
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn tensors_mut(&mut self) -> Result<impl Iterator<Item = TensorViewMut<'_>>> {
        for (mapping, shard) in self.model.mappings.iter_mut().zip(self.model.catalog.shards()) {
            exclusive(mapping, &shard.path)?;
        }
        if self.promoted.take().is_some() {
            self.promote().ok();
        }
        let Model { catalog, mappings, .. } = &mut self.model;
        let mut views = Vec::with_capacity(mappings.len());
        for (shard, mapping) in catalog.shards().iter().zip(mappings) {
            let range = shard.layout.data_range();
            let len = range.len();
            let data = exclusive(mapping, &shard.path)?.part_mut(range);
            let data = data.map_err(|error| not_writable(&shard.path, ALL, len, error))?;
            views.push(split(&shard.layout, data));
        }
        Ok(views.into_iter().flatten())
    }
}

impl ModelMut {
    /// The tensors that `wanted` says, to write; no other is made writable.
    ///
    /// # Errors
    /// As [`ModelMut::tensors_mut`].
    pub(crate) fn some_tensors_mut(
        &mut self,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<TensorViewMut<'_>>> {
        let Model { catalog, mappings, .. } = &mut self.model;
        let mut views = Vec::new();
        for (shard, mapping) in catalog.shards().iter().zip(mappings) {
            let infos: Vec<_> = shard.layout.iter().filter(|info| wanted(info.name())).collect();
            let parts: Vec<_> = infos.iter().map(TensorInfo::bytes).collect();
            let data = exclusive(mapping, &shard.path)?.parts_mut(&parts);
            let asked = parts.iter().map(ExactSizeIterator::len).sum();
            let data = data.map_err(|error| not_writable(&shard.path, ALL, asked, error))?;
            views.extend(infos.into_iter().zip(data).map(|(info, data)| TensorViewMut::new(info, data)));
        }
        Ok(views)
    }
}

/// What tells a model from every other of this process.
pub(crate) fn new_token() -> u64 {
    static TOKENS: AtomicU64 = AtomicU64::new(0);
    TOKENS.fetch_add(1, Ordering::Relaxed)
}

/// What errors call several tensors.
const ALL: &str = "its tensors";

fn tensor(name: &str) -> String {
    format!("tensor {}", crate::error::quote(name))
}

/// A mapping to write through.
///
/// # Errors
/// [`Error::Busy`] while there is a clone of the model, whose views are of these bytes.
fn exclusive<'a>(mapping: &'a mut Arc<Mapping>, path: &Path) -> Result<&'a mut Mapping> {
    Arc::get_mut(mapping).ok_or_else(|| Error::Busy {
        path: path.into(),
        what: "a clone of the model reads the same memory: drop it before tensors are taken to be written"
            .into(),
    })
}

/// One writable view for each tensor of `data`, all of a layout's. They cannot overlap: a layout's tensors are in order
/// and apart.
pub(crate) fn split<'a>(
    layout: &'a crate::layout::Layout,
    data: &'a mut [u8],
) -> impl Iterator<Item = TensorViewMut<'a>> {
    let mut at = layout.data_range().start;
    let mut rest = data;
    layout.iter().map(move |info| {
        // Before it may be bytes of tensors that the layout no longer has.
        let (_, from) = std::mem::take(&mut rest).split_at_mut(info.bytes().start - at);
        let (data, behind) = from.split_at_mut(info.bytes().len());
        (rest, at) = (behind, info.bytes().end);
        TensorViewMut::new(info, data)
    })
}

impl Deref for ModelMut {
    type Target = Model;
    fn deref(&self) -> &Model {
        &self.model
    }
}
