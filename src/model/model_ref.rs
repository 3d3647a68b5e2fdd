//! A model in bytes that are borrowed.

use crate::error::Result;
use crate::format;
use crate::layout::{Catalog, Layout, Shard};
use crate::tensor::TensorView;
use std::sync::Arc;

/// A model in borrowed bytes, the content of one file. Nothing is copied but the header.
///
/// ```
/// use maptensors::ModelRef;
///
/// let bytes = std::fs::read("models/digits.safetensors").unwrap();
/// let model = ModelRef::new(&bytes)?;
/// let bias = model.tensor("fc1.bias")?;
/// assert_eq!(bias.shape(), [64]);
/// assert!(bytes.as_ptr_range().contains(&bias.as_bytes().as_ptr()));
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone)]
pub struct ModelRef<'a> {
    // INVARIANT: one shard, which these are the bytes of.
    catalog: Arc<Catalog>,
    bytes: &'a [u8],
}

impl<'a> ModelRef<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// As [`Model::open`](crate::Model::open); the path in errors is empty.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        let layout = format::read(&bytes)?;
        let catalog = Catalog::new(vec![Shard { path: "".into(), layout }])?;
        Ok(Self { catalog: Arc::new(catalog), bytes })
    }

    /// Which tensors there are and where, and the metadata.
    pub fn layout(&self) -> &Layout {
        &self.catalog.shards()[0].layout
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let info = self.layout().get(name)?;
        Some(TensorView::new(info, &self.bytes[info.bytes()]))
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing), with near names.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| self.catalog.missing(name))
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.layout().iter().map(|info| TensorView::new(info, &self.bytes[info.bytes()]))
    }
}

impl std::fmt::Debug for ModelRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelRef").field("layout", self.layout()).finish_non_exhaustive()
    }
}
