//! What memory a tensor lies in, for who asks whether two are tied.

use super::base::{base, is_tensor};
use super::modes::OutOfModes;
use super::storage::is_contiguous;
use super::torch::{Memory, Seen, see};
use crate::dtype::DType;
use crate::layout::elements;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::collections::HashMap;

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

/// For each of these the place among them of the first that is the same: the same object, or a tensor of torch in the same
/// place of the same storage that is read in the same way.
#[pyfunction]
pub(in crate::python) fn firsts(py: Python<'_>, values: Vec<Bound<'_, PyAny>>) -> PyResult<Vec<usize>> {
    let mut out = None;
    let mut known: HashMap<Identity, usize> = HashMap::with_capacity(values.len());
    let mut firsts = Vec::with_capacity(values.len());
    for (at, value) in values.iter().enumerate() {
        let seen = if is_tensor(value)? {
            if out.is_none() {
                out = Some(OutOfModes::enter(py)?);
            }
            // What is wrong with it is said when it is saved.
            see("", value).ok().filter(|seen| !seen.bytes.is_empty())
        } else {
            None
        };
        let identity = match seen {
            Some(seen) => Identity::Memory {
                device: seen.device_of(value)?,
                storage: (seen.storage.bytes.start, seen.storage.bytes.end),
                bytes: (seen.bytes.start, seen.bytes.end),
                strides: seen.memory.strides().to_vec(),
                dtype: seen.dtype,
                lazily: (seen.conjugated, seen.negated),
                shape: seen.shape,
            },
            None => Identity::Object(value.as_ptr().addr()),
        };
        firsts.push(*known.entry(identity).or_insert(at));
    }
    Ok(firsts)
}

#[derive(PartialEq, Eq, Hash)]
enum Identity {
    Object(usize),
    Memory {
        device: Option<String>,
        storage: (usize, usize),
        bytes: (usize, usize),
        dtype: DType,
        shape: Vec<usize>,
        strides: Vec<i64>,
        lazily: (bool, bool),
    },
}

impl<'py> Seen<'py> {
    /// `None` for the CPU.
    fn device_of(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Option<String>> {
        match self.memory {
            Memory::Taken(_) => Ok(None),
            Memory::Device { .. } => {
                let device = base(self.py)?.class.bind(self.py).getattr("device")?;
                Ok(Some(device.call_method1("__get__", (tensor,))?.to_string()))
            }
        }
    }

    fn memory_of(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
        let (py, strides) = (self.py, self.memory.strides());
        let device = self.device_of(tensor)?.unwrap_or_else(|| "cpu".into());
        let size = self.dtype.block().bytes;
        let filled = elements(&self.shape).and_then(|n| n.checked_mul(size)).unwrap_or_default();
        let storage = (device, self.storage.bytes.start, self.storage.bytes.end);
        let (shape, steps) = (PyTuple::new(py, &self.shape)?, PyTuple::new(py, strides)?);
        let reading = (self.dtype.name(), shape, steps, self.conjugated, self.negated);
        let contiguous = is_contiguous(&self.shape, strides);
        (storage, (self.bytes.start, self.bytes.end), filled, reading, contiguous).into_pyobject(py)
    }
}
