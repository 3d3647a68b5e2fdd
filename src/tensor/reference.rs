//! Our tensors as those of the `safetensors` crate, for whatever saves its `View`s.

use super::{TensorSlice, TensorView};
use safetensors::{Dtype, View};
use std::borrow::Cow;

impl View for TensorView<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype().into()
    }
    fn shape(&self) -> &[usize] {
        self.shape()
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.as_bytes())
    }
    fn data_len(&self) -> usize {
        self.as_bytes().len()
    }
}

impl View for TensorSlice<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype().into()
    }
    fn shape(&self) -> &[usize] {
        self.shape()
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.to_bytes()
    }
    fn data_len(&self) -> usize {
        self.nbytes()
    }
}
