//! [`Layout`] and [`TensorInfo`] for serde, to be written only: a layout is read from a file, which checks it.

use super::{Array, Layout, Metadata, TensorInfo, Value};
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

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Bool(value) => value.serialize(serializer),
            Self::I8(value) => value.serialize(serializer),
            Self::I16(value) => value.serialize(serializer),
            Self::I32(value) => value.serialize(serializer),
            Self::I64(value) => value.serialize(serializer),
            Self::U8(value) => value.serialize(serializer),
            Self::U16(value) => value.serialize(serializer),
            Self::U32(value) => value.serialize(serializer),
            Self::U64(value) => value.serialize(serializer),
            Self::F32(value) => value.serialize(serializer),
            Self::F64(value) => value.serialize(serializer),
            Self::String(text) => text.serialize(serializer),
            Self::Array(array) => array.serialize(serializer),
        }
    }
}

impl Serialize for Array {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((0..self.len()).filter_map(|i| self.get(i)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_written_with_its_typed_metadata() {
        let metadata = Metadata::from_iter([
            ("count".to_owned(), Value::from(7u32)),
            ("names".to_owned(), Value::from(vec!["a".to_owned(), "b".to_owned()])),
            ("scale".to_owned(), Value::from(0.5f64)),
        ]);
        let text = serde_json::to_string(&metadata).unwrap();
        assert_eq!(text, r#"{"count":7,"names":["a","b"],"scale":0.5}"#);
        let layout = Layout::builder().metadata("format", "pt").build().unwrap();
        let text = serde_json::to_string(&layout).unwrap();
        assert_eq!(text, r#"{"metadata":{"format":"pt"},"data_start":0,"data_len":0,"tensors":[]}"#);
    }
}
