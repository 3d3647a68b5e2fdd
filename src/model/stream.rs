//! Tensor after tensor through a bounded part of memory.

use super::Model;
use crate::error::Result;
use crate::paging::{ReadAhead, StreamOptions};
use crate::tensor::TensorView;
use std::time::Duration;

/// A model's tensors one after the other: [`Model::stream`].
///
/// An error concerns one tensor; the next may be asked for. A tensor that is kept stays valid when the stream has
/// gone on: its pages are read again when they are touched.
pub struct Stream<'a> {
    model: &'a Model,
    ahead: ReadAhead,
}

impl<'a> Stream<'a> {
    pub(super) fn new(model: &'a Model, options: &StreamOptions<'_>) -> Result<Self> {
        Ok(Self { model, ahead: model.paging().read_ahead(options)? })
    }

    /// Bytes of the tensors that have passed, and of all that will.
    pub fn progress(&self) -> (u64, u64) {
        self.ahead.progress()
    }
}

impl<'a> Iterator for Stream<'a> {
    type Item = Result<TensorView<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.ahead.next(&self.model.catalog, Duration::MAX)? {
                Ok(None) => {}
                Ok(Some((shard, index))) => {
                    let info = self.model.catalog.shards()[shard].layout.at(index)?;
                    let handed_out = self.model.hand_out(shard, &info);
                    return Some(handed_out.map(|()| super::view(info, &self.model.mappings[shard])));
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.ahead.left(), Some(self.ahead.left()))
    }
}

impl std::fmt::Debug for Stream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (bytes, total) = self.progress();
        f.debug_struct("Stream").field("bytes", &bytes).field("total", &total).finish_non_exhaustive()
    }
}
