//! What memory a tensor lies in, for who asks whether two are tied.

use super::base::{base, is_tensor};
use super::modes::OutOfModes;
use super::storage::is_contiguous;
use super::torch::{Memory, Seen, see};
use crate::layout::elements;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// What identifies the memory of each of these, for who asks whether two are tied: device, first byte and one past
/// the last of the storage; the same of the elements, and how many bytes they take; how they are to be read; and whether
/// they lie in C order. `None` for what has no memory of its own, or no element, and for what is no tensor of torch.
#[pyfunction]
pub(in crate::python) fn torch_memory<'py>(
    py: Python<'py>,
    tensors: Vec<Bound<'py, PyAny>>,
) -> PyResult<Vec<Option<Bound<'py, PyTuple>>>> {
    let mut out = None;
    let mut found = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if !is_tensor(&tensor)? {
            found.push(None);
            continue;
        }
        if out.is_none() {
            out = Some(OutOfModes::enter(py)?);
        }
        // What is wrong with it is said when it is saved.
        let seen = see("", &tensor).ok().filter(|seen| !seen.bytes.is_empty());
        found.push(seen.map(|seen| seen.memory_of(&tensor)).transpose()?);
    }
    Ok(found)
}

impl<'py> Seen<'py> {
    fn memory_of(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
        let (py, strides) = (self.py, self.memory.strides());
        let device = match self.memory {
            Memory::Taken(_) => "cpu".to_owned(),
            Memory::Device { .. } => {
                let device = base(py)?.class.bind(py).getattr("device")?;
                device.call_method1("__get__", (tensor,))?.to_string()
            }
        };
        let size = self.dtype.bits().div_ceil(8);
        let filled = elements(&self.shape).and_then(|n| n.checked_mul(size)).unwrap_or_default();
        let storage = (device, self.storage.bytes.start, self.storage.bytes.end);
        let (shape, steps) = (PyTuple::new(py, &self.shape)?, PyTuple::new(py, strides)?);
        let reading = (self.dtype.name(), shape, steps, self.conjugated, self.negated);
        let contiguous = is_contiguous(&self.shape, strides);
        (storage, (self.bytes.start, self.bytes.end), filled, reading, contiguous).into_pyobject(py)
    }
}
