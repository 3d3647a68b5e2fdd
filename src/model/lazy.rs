//! Which of a model's pages are in memory, and which are to be.

use super::{Model, Stream};
use crate::error::Result;
use crate::layout::Select;
use crate::map::{Evicted, Residency};
use crate::paging::{Paging, Prefetch, StreamOptions};

impl Model {
    pub(crate) fn paging(&self) -> Paging<'_> {
        let shards = self.catalog.shards().iter().zip(&self.mappings);
        let pages = shards.map(|(shard, mapping)| mapping.pages(&shard.path)).collect();
        Paging { catalog: &self.catalog, pages, locks: &self.locks }
    }

    /// Pages of all tensor data: in memory, touched, private, locked. Headers do not count.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) where the kernel does not tell.
    pub fn residency(&self) -> Result<Residency> {
        self.residency_of(..)
    }

    /// As [`Model::residency`], of some tensors together: a page that holds several of them counts once.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing), [`Error::Argument`](crate::Error::Argument) where nothing is
    /// selected, [`Error::Io`](crate::Error::Io).
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let model = unsafe { maptensors::Model::open("models/digits.safetensors")? };
    /// model.prefetch("fc1.weight")?.wait()?;
    /// let pages = model.residency_of("fc1.weight")?;
    /// assert_eq!(pages.touched, pages.pages);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn residency_of<'s>(&self, select: impl Into<Select<'s>>) -> Result<Residency> {
        self.paging().residency(&select.into())
    }

    /// Name and pages of each tensor, in file order. A page that holds several of them counts for each.
    ///
    /// # Errors
    /// As [`Model::residency_of`].
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let model = unsafe { maptensors::Model::open("models/digits.safetensors")? };
    /// for (name, pages) in model.residency_by_tensor(..)? {
    ///     println!("{name}: {} of {} pages", pages.resident, pages.pages);
    /// }
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn residency_by_tensor<'s>(&self, select: impl Into<Select<'s>>) -> Result<Vec<(&str, Residency)>> {
        let found = self.paging().residency_by_tensor(&select.into())?;
        Ok(found.into_iter().map(|(position, pages)| (self.catalog.name(position), pages)).collect())
    }

    /// Begins to bring tensors into memory, in the background and in file order; pages stay shared with everyone
    /// who maps the file. An I/O error is told by [`Prefetch::wait`], instead of by a later `SIGBUS`.
    ///
    /// # Errors
    /// As [`Model::residency_of`].
    pub fn prefetch<'s>(&self, select: impl Into<Select<'s>>) -> Result<Prefetch> {
        self.paging().prefetch(&select.into(), false)
    }

    /// As [`Model::prefetch`], and [`Model::lock`] once they are there.
    ///
    /// # Errors
    /// As [`Model::prefetch`].
    pub fn prefetch_and_lock<'s>(&self, select: impl Into<Select<'s>>) -> Result<Prefetch> {
        self.paging().prefetch(&select.into(), true)
    }

    /// Gives the memory of tensors back to the system, out of this process and out of the page cache: all pages
    /// that hold nothing else. They are read again when they are touched. What was edited stays.
    ///
    /// # Errors
    /// As [`Model::residency_of`]; [`Error::Argument`](crate::Error::Argument) where one is locked, and nothing is
    /// given back.
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let model = unsafe { maptensors::Model::open("models/digits.safetensors")? };
    /// model.prefetch(..)?.wait()?;
    /// model.evict("fc1.weight")?;
    /// // The pages at both ends are its neighbours' too.
    /// assert!(model.residency_of("fc1.weight")?.touched <= 2);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn evict<'s>(&self, select: impl Into<Select<'s>>) -> Result<Evicted> {
        self.paging().evict(&select.into())
    }

    /// Reads tensors in and holds them in memory, until [`Model::unlock`] or the end of the model. Copies nothing:
    /// pages stay shared until they are written.
    ///
    /// # Errors
    /// As [`Model::residency_of`]; [`Error::Limit`](crate::Error::Limit) where `RLIMIT_MEMLOCK` does not allow it. Exactly
    /// what was locked before is locked then.
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let model = unsafe { maptensors::Model::open("models/digits.safetensors")? };
    /// model.lock("fc1.bias")?;
    /// assert_eq!(model.residency_of("fc1.bias")?.locked, 1);
    /// model.unlock(..)?;
    /// assert_eq!(model.residency()?.locked, 0);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn lock<'s>(&self, select: impl Into<Select<'s>>) -> Result<()> {
        self.paging().lock(&select.into())
    }

    /// Ends [`Model::lock`]. A page that holds a part of another tensor stays locked as long as that is.
    ///
    /// # Errors
    /// As [`Model::residency_of`].
    pub fn unlock<'s>(&self, select: impl Into<Select<'s>>) -> Result<()> {
        self.paging().unlock(&select.into())
    }

    /// All tensors, one after the other, through a bounded part of memory: read ahead in the background, given back
    /// behind. A model several times as large as memory, or as the limit of a control group, passes.
    ///
    /// # Errors
    /// As [`Model::residency_of`]; [`Error::Argument`](crate::Error::Argument) for an order that names a tensor
    /// twice. Of the iterator: [`Error::Io`](crate::Error::Io) in place of a tensor that cannot be read.
    ///
    /// ```
    /// use maptensors::StreamOptions;
    ///
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let model = unsafe { maptensors::Model::open("models/digits.safetensors")? };
    /// let mut bytes = 0;
    /// for tensor in model.stream(StreamOptions::new().budget(2 << 30))? {
    ///     bytes += tensor?.as_bytes().len();
    /// }
    /// assert_eq!(bytes, 19_240);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    #[allow(clippy::needless_pass_by_value)] // it is made where it is given
    pub fn stream(&self, options: StreamOptions<'_>) -> Result<Stream<'_>> {
        Stream::new(self, &options)
    }
}
