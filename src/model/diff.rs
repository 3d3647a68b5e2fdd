//! How two models differ.

use super::Model;
use crate::diff::{Differences, compare_contents};
use crate::error::Result;

/// Compares two models, tensor by tensor and bit by bit, as they are in memory now.
///
/// # Errors
/// None today; [`crate::Error::Io`] where memory cannot be read.
///
/// ```
/// use maptensors::{Model, ModelMut, diff};
///
/// let base = Model::read("models/digits.safetensors")?;
/// let mut tuned = ModelMut::read("models/digits.safetensors")?;
/// tuned.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[..2].fill(7.0);
/// let differences = diff(&base, &tuned)?;
/// assert_eq!(differences.changed.get("fc1.bias").unwrap().elements, 2);
/// assert_eq!((differences.changed.len(), differences.compared), (1, 4));
/// # Ok::<(), maptensors::Error>(())
/// ```
pub fn diff(a: &Model, b: &Model) -> Result<Differences> {
    Ok(compare_contents(&a.contents(), &b.contents(), false).report())
}
