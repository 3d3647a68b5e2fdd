//! Going through a model.

use super::{Model, ModelMut, Shard, view};
use crate::layout::TensorInfos;
use crate::map::Mapping;
use crate::tensor::TensorView;
use std::iter::FusedIterator;
use std::sync::Arc;

/// The tensors of a model, shard by shard, in file order: see [`Model::tensors`].
///
/// ```
/// let model = maptensors::Model::read("models/digits-sharded")?;
/// let mut bytes = 0;
/// for tensor in &model {
///     bytes += tensor.as_bytes().len();
/// }
/// assert_eq!((model.tensors().len(), bytes), (4, 19_240));
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone)]
pub struct Tensors<'a> {
    /// Those of the file that has been begun.
    now: Option<(TensorInfos<'a>, &'a Mapping)>,
    files: std::iter::Zip<std::slice::Iter<'a, Shard>, std::slice::Iter<'a, Arc<Mapping>>>,
    left: usize,
}

impl<'a> Tensors<'a> {
    pub(super) fn new(model: &'a Model) -> Self {
        let files = model.catalog.shards().iter().zip(&model.mappings);
        Self { now: None, files, left: model.len() }
    }
}

impl<'a> Iterator for Tensors<'a> {
    type Item = TensorView<'a>;

    fn next(&mut self) -> Option<TensorView<'a>> {
        loop {
            if let Some((infos, mapping)) = &mut self.now
                && let Some(info) = infos.next()
            {
                self.left -= 1;
                return Some(view(info, mapping));
            }
            let (shard, mapping) = self.files.next()?;
            self.now = Some((shard.layout.iter(), mapping));
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Tensors<'_> {}

impl FusedIterator for Tensors<'_> {}

impl std::fmt::Debug for Tensors<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tensors").field("left", &self.left).finish_non_exhaustive()
    }
}

impl<'a> IntoIterator for &'a Model {
    type Item = TensorView<'a>;
    type IntoIter = Tensors<'a>;
    /// As [`Model::tensors`].
    fn into_iter(self) -> Tensors<'a> {
        self.tensors()
    }
}

impl<'a> IntoIterator for &'a ModelMut {
    type Item = TensorView<'a>;
    type IntoIter = Tensors<'a>;
    /// As [`Model::tensors`].
    fn into_iter(self) -> Tensors<'a> {
        self.tensors()
    }
}
