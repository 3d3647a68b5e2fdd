//! Deltas: what turns one model into another, as a file.
//!
//! # The file
//!
//! A delta is a safetensors file. Its metadata entry `maptensors.delta` is a JSON object:
//!
//! | key | |
//! |---|---|
//! | `version` | 1 |
//! | `base`, `result` | the identities of the model it is applied to, and of the one that comes out: 32 hexadecimal digits |
//! | `removed` | names of tensors that the result no longer has |
//! | `metadata` | the result's metadata, or null if it has none |
//! | `checksums` | whether the result carries checksums |
//!
//! For a tensor `w` that changed, the file holds one of
//!
//! | tensors | meaning |
//! |---|---|
//! | `whole:w` | the tensor as it is in the result; also one that is new, or has another dtype or shape |
//! | `gaps:w`, `values:w` | each value replaces one element, so many elements behind the one before |
//! | `gaps:w`, `lengths:w`, `values:w` | as above, for runs of so many elements |
//!
//! whichever is smallest. `values` has the tensor's dtype and one dimension; where elements are packed several
//! to the byte, a byte counts as an element, and `values` is `U8`. `gaps` and `lengths` are `U8`, `U16`, `U32`
//! or `U64`, whichever just holds them.
//!
//! An identity is the XXH3-128 over all tensors, sorted by name, of name, dtype, shape and checksum. So a
//! delta never needs the whole model to be read where its file carries checksums; where it does not, the base
//! is read once. What files state of their own content is believed here: [`Model::verify`] doubts it.

#![forbid(unsafe_code)]

mod apply;
mod decode;
mod encode;
mod materialize;

use apply::apply;
pub(crate) use encode::{write_delta, write_diff};
pub(crate) use materialize::materialize_deltas;

use crate::error::{Error, Result};
use crate::model::{Model, ModelMut};
use crate::save::SaveOptions;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
const VERSION: u32 = 1;

/// What that entry says.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    base: String,
    result: String,
    removed: Vec<String>,
    metadata: Option<BTreeMap<String, String>>,
    checksums: bool,
}

/// How tensors of a delta are called: one of these, and the name of the tensor it is about.
const WHOLE: &str = "whole:";
const GAPS: &str = "gaps:";
const LENGTHS: &str = "lengths:";
const VALUES: &str = "values:";

/// Writes what changed in `model` since it was opened, or last [marked](ModelMut::mark), to a new file at
/// `path`: a delta, which [`apply_delta`] turns back into the model. The kernel knows what was written, so the
/// cost is that of the change, not of the model, where its file carries checksums
/// ([`SaveOptions::checksums`]); else the file is read once.
///
/// # Errors
/// As [`ModelMut::changed`] and [`SaveOptions::save`]; [`Error::Argument`] if `path` leads to a file of the model, or to
/// another model.
///
/// ```
/// use maptensors::{Model, ModelMut, apply_delta, save_delta};
///
/// let path = std::env::temp_dir().join("maptensors-doc-save-delta.safetensors");
/// // SAFETY: nobody writes to the file while it is mapped.
/// let mut tuned = unsafe { ModelMut::open("models/digits.safetensors")? };
/// tuned.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[3] = 0.25;
/// save_delta(&tuned, &path)?;
///
/// // SAFETY: as above.
/// let base = unsafe { ModelMut::open("models/digits.safetensors")? };
/// let again = apply_delta(base, &[Model::read(&path)?])?;
/// assert_eq!(again.tensor("fc1.bias")?.as_slice::<f32>()?[3], 0.25);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
pub fn save_delta(model: &ModelMut, path: impl AsRef<Path>) -> Result<()> {
    SaveOptions::new().save_delta(model, path)
}

/// Writes what turns `a` into `b` to a new file at `path`: a delta. Compares all of both.
///
/// # Errors
/// As [`SaveOptions::save`]; [`Error::Argument`] if `path` leads to a file of either, or to another model.
///
/// ```
/// use maptensors::{Model, ModelMut, apply_delta, save_diff};
///
/// let path = std::env::temp_dir().join("maptensors-doc-save-diff.safetensors");
/// let a = Model::read("models/digits.safetensors")?;
/// let mut b = ModelMut::read("models/digits.safetensors")?;
/// b.tensor_mut("fc2.bias")?.as_mut_slice::<f32>()?.fill(1.0);
/// save_diff(&a, &b, &path)?;
/// let again = apply_delta(ModelMut::read("models/digits.safetensors")?, &[Model::read(&path)?])?;
/// assert_eq!(again.tensor("fc2.bias")?.as_bytes(), b.tensor("fc2.bias")?.as_bytes());
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
pub fn save_diff(a: &Model, b: &Model, path: impl AsRef<Path>) -> Result<()> {
    SaveOptions::new().save_diff(a, b, path)
}

/// Applies deltas, in this order, to the model they were made against: in memory, copy-on-write where it is
/// mapped so. Before anything is written, `base` must be what the first delta was made against, and each
/// further delta's base the result of the one before; afterwards the result must be what the last one states.
///
/// Where tensors come, go or change shape, the result is in memory of its own.
///
/// # Errors
/// [`Error::Base`] for another base, [`Error::Delta`] for a file that is no delta, or damaged.
///
/// ```
/// # use maptensors::{Error, Model, ModelMut, apply_delta};
/// // No delta, no change; something that is no delta is refused.
/// let same = apply_delta(ModelMut::read("models/digits.safetensors")?, &[])?;
/// let refused = apply_delta(same, &[Model::read("models/digits.safetensors")?]);
/// assert!(matches!(refused, Err(Error::Delta { .. })));
/// # Ok::<(), maptensors::Error>(())
/// ```
pub fn apply_delta(base: ModelMut, deltas: &[Model]) -> Result<ModelMut> {
    apply(base, deltas)
}

/// Applies deltas and writes the whole model to one file at `path`: [`apply_delta`], then
/// [`ModelMut::materialize`]. Not over the base, nor over any delta: what other deltas need would be gone.
///
/// # Errors
/// As these; [`Error::Argument`] if `path` leads to the base, one of the deltas, or another delta.
///
/// ```
/// # use maptensors::{Model, ModelMut, save_delta};
/// # let dir = std::env::temp_dir();
/// # let (delta, out) = (dir.join("maptensors-doc-m-delta.safetensors"), dir.join("maptensors-doc-m.safetensors"));
/// # // SAFETY: nobody writes to the file while it is mapped.
/// # let open = || unsafe { ModelMut::open("models/digits.safetensors") };
/// # let mut tuned = open()?;
/// # tuned.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[3] = 0.25;
/// # save_delta(&tuned, &delta)?;
/// maptensors::materialize(open()?, &[Model::read(&delta)?], &out)?;
/// assert_eq!(Model::read(&out)?.tensor("fc1.bias")?.as_bytes(), tuned.tensor("fc1.bias")?.as_bytes());
/// # for path in [delta, out] { std::fs::remove_file(path).unwrap(); }
/// # Ok::<(), maptensors::Error>(())
/// ```
pub fn materialize(base: ModelMut, deltas: &[Model], path: impl AsRef<Path>) -> Result<()> {
    materialize_deltas(base, deltas, path.as_ref(), &SaveOptions::new()).map(|_| ())
}

impl SaveOptions {
    /// As [`save_delta`](crate::save_delta), with these options. Metadata given here is the delta file's own.
    ///
    /// # Errors
    /// As [`save_delta`](crate::save_delta).
    pub fn save_delta(&self, model: &ModelMut, path: impl AsRef<Path>) -> Result<()> {
        write_delta(&model.contents(), path.as_ref(), self)
    }

    /// As [`save_diff`](crate::save_diff), with these options. Metadata given here is the delta file's own.
    ///
    /// # Errors
    /// As [`save_diff`](crate::save_diff).
    pub fn save_diff(&self, a: &Model, b: &Model, path: impl AsRef<Path>) -> Result<()> {
        write_diff(&a.contents(), &b.contents(), path.as_ref(), self)
    }

    /// As [`ModelMut::materialize`], with these options; the metadata is the model's.
    ///
    /// # Errors
    /// As [`ModelMut::materialize`].
    pub fn materialize(&self, model: &ModelMut, path: impl AsRef<Path>) -> Result<bool> {
        materialize::materialize(model, path.as_ref(), self)
    }
}

impl ModelMut {
    /// Writes the whole model to one file at `path`, as [`ModelMut::save`] does, starting from a copy of the
    /// file it was opened from: one that shares its blocks where the file system can (xfs, btrfs), so that
    /// only what changed takes space and time, else one that the kernel makes. Returns whether blocks are
    /// shared. The order of tensors stays; what has no such file (several shards, memory of its own, a header
    /// that became longer) is saved in the ordinary way.
    ///
    /// # Errors
    /// As [`SaveOptions::save`].
    ///
    /// ```
    /// # let path = std::env::temp_dir().join("maptensors-doc-clone.safetensors");
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
    /// model.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?.fill(0.0);
    /// model.materialize(&path)?;
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn materialize(&self, path: impl AsRef<Path>) -> Result<bool> {
        SaveOptions::new().materialize(self, path)
    }
}

/// An error about a delta.
fn invalid(path: &Path, tensor: &str, what: impl Into<String>) -> Error {
    Error::Delta { path: path.into(), tensor: tensor.into(), what: what.into() }
}
