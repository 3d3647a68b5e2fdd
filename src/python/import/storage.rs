//! Where a tensor of torch lies.

use super::base::{Base, base, call_one};
use crate::dtype::DType;
use crate::layout::elements;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use std::ops::Range;

/// A place in memory that torch allocated, and what says so.
pub(super) struct Storage {
    // INVARIANT: an UntypedStorage of torch's.
    pub(super) object: Py<PyAny>,
    pub(super) bytes: Range<usize>,
}

impl Storage {
    pub(super) fn of(base: &Base, tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let object = call_one(&base.untyped_storage, tensor)?;
        let bytes = Self::bytes(base, &object)?;
        Ok(Self { object: object.unbind(), bytes })
    }

    fn bytes(base: &Base, object: &Bound<'_, PyAny>) -> PyResult<Range<usize>> {
        let start: usize = call_one(&base.data_ptr, object)?.extract()?;
        let len: usize = call_one(&base.nbytes, object)?.extract()?;
        let len = if start == 0 { 0 } else { len };
        let end = start.checked_add(len).ok_or_else(|| PyBufferError::new_err("a storage beyond memory"))?;
        Ok(start..end)
    }

    /// Whether it is still as it was when the tensor was looked at.
    pub(super) fn is_as_it_was(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(Self::bytes(base(py)?, self.object.bind(py))? == self.bytes)
    }
}

/// Whether elements lie in C order, in one piece.
pub(super) fn is_contiguous(shape: &[usize], strides: &[i64]) -> bool {
    let mut expected = 1i64;
    shape.contains(&0)
        || strides.is_empty()
        || shape.iter().zip(strides).rev().all(|(&dim, &stride)| {
            let fits = dim == 1 || stride == expected;
            expected = expected.wrapping_mul(i64::try_from(dim).unwrap_or(0));
            fits
        })
}

/// From the lowest to the highest byte of elements, if these lie in the storage.
pub(super) fn place(
    at: usize,
    shape: &[usize],
    strides: &[i64],
    dtype: DType,
    storage: &Storage,
) -> Option<Range<usize>> {
    let (below, len) = extent(shape, strides, dtype)?;
    if len == 0 {
        return Some(at..at);
    }
    let start = at.checked_sub(below)?;
    let bytes = start..start.checked_add(len)?;
    (bytes.start >= storage.bytes.start && bytes.end <= storage.bytes.end).then_some(bytes)
}

/// How many bytes lie below the first element, and how many there are in all.
fn extent(shape: &[usize], strides: &[i64], dtype: DType) -> Option<(usize, usize)> {
    let size = if dtype == DType::F4 { 1 } else { dtype.itemsize()? };
    if shape.contains(&0) {
        return Some((0, 0));
    }
    if strides.is_empty() {
        return Some((0, elements(shape)?.checked_mul(size)?));
    }
    let (mut below, mut above) = (0usize, 1usize);
    for (&dim, &stride) in shape.iter().zip(strides) {
        let reach = usize::try_from(stride.unsigned_abs()).ok()?.checked_mul(dim - 1)?;
        let towards = if stride < 0 { &mut below } else { &mut above };
        *towards = towards.checked_add(reach)?;
    }
    Some((below.checked_mul(size)?, below.checked_add(above)?.checked_mul(size)?))
}
