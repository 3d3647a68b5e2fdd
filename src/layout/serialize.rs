//! [`Layout`] and [`TensorInfo`] for serde, to be written only: a layout is read from a file, which checks it.

use super::{Layout, TensorInfo};
use serde::ser::{Serialize, SerializeStruct as _, Serializer};

impl Serialize for TensorInfo<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("TensorInfo", 5)?;
        fields.serialize_field("name", self.name())?;
        fields.serialize_field("dtype", &self.dtype())?;
        fields.serialize_field("shape", self.shape())?;
        fields.serialize_field("offset", &self.offset())?;
        fields.serialize_field("nbytes", &self.nbytes())?;
        fields.end()
    }
}

/// The tensors of a layout, in file order.
struct Tensors<'a>(&'a Layout);

impl Serialize for Tensors<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter())
    }
}

impl Serialize for Layout {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Layout", 4)?;
        fields.serialize_field("metadata", self.metadata())?;
        fields.serialize_field("data_start", &self.data_start())?;
        fields.serialize_field("data_len", &self.data_len())?;
        fields.serialize_field("tensors", &Tensors(self))?;
        fields.end()
    }
}
