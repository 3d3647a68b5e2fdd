//! `tensor[...]`: which elements are meant.

use crate::error::quote;
use crate::map::SharedMemory;
use crate::tensor::{Selection, Tensor};
use pyo3::exceptions::{PyIndexError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyEllipsis, PyInt, PySlice, PyTuple};

/// What Python's basic indexing selects of a tensor: integers, slices, `...`.
pub(super) fn select(tensor: &Tensor<SharedMemory>, key: &Bound<'_, PyAny>) -> PyResult<Selection> {
    let keys: Vec<Bound<'_, PyAny>> = match key.cast::<PyTuple>() {
        Ok(tuple) => tuple.iter().collect(),
        Err(_) => vec![key.clone()],
    };
    let is_ellipsis = |key: &Bound<'_, PyAny>| key.is_instance_of::<PyEllipsis>();
    let ellipses = keys.iter().filter(|key| is_ellipsis(key)).count();
    let rank = tensor.shape().len();
    if ellipses > 1 || keys.len() - ellipses > rank {
        let text =
            format!("tensor {} of rank {rank} cannot take {} indices", quote(tensor.name()), keys.len());
        return Err(PyIndexError::new_err(text));
    }
    let mut selection = tensor.selection();
    let mut axis = 0;
    for key in &keys {
        if is_ellipsis(key) {
            axis += rank - (keys.len() - 1);
        } else if let Ok(slice) = key.cast::<PySlice>() {
            let dim = isize::try_from(selection.shape[axis])?;
            let range = slice.indices(dim)?;
            let start = usize::try_from(range.start).unwrap_or_default();
            selection.range(axis, start, range.step, range.slicelength);
            axis += 1;
        } else if key.is_instance_of::<PyBool>() {
            return Err(PyTypeError::new_err("a tensor is not indexed by bools; .numpy()[...] takes masks"));
        } else if key.is_instance_of::<PyInt>() || key.hasattr("__index__")? {
            let place: isize = key.extract()?;
            let dim = selection.shape[axis];
            let inside = if place < 0 { dim.checked_add_signed(place) } else { Some(place.unsigned_abs()) };
            let Some(inside) = inside.filter(|&inside| inside < dim) else {
                return Err(PyIndexError::new_err(format!(
                    "index {place} is outside an axis of length {dim}"
                )));
            };
            selection.at(axis, inside);
        } else {
            return Err(PyTypeError::new_err(format!(
                "a tensor is indexed by integers, slices and ..., not {}; .numpy()[...] takes the rest",
                key.get_type().name()?
            )));
        }
    }
    Ok(selection)
}
