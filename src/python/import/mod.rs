//! What Python hands to us: arrays of numpy, torch and JAX, as memory that was checked.
//!
//! Every array comes in here, whoever asks for it: it is held ([`hold`]), which may run code of its class, and then
//! looked at ([`Held::look`]), which gives its memory or refuses it by name. What an array says of itself is checked
//! against the memory that its framework allocated for it. That nobody frees or resizes that memory in another thread, until it
//! is copied, cannot be checked; nor can the numbers that a library states which only offers `__array__` or `__dlpack__`.

mod assign;
mod base;
mod modes;
mod numpy;
mod refusal;
mod storage;
mod tied;
mod torch;

pub(super) use assign::{assign, copy};
pub(super) use refusal::bad_bool;
pub(super) use tied::{firsts, torch_memory};

use super::collector::PausedCollector;
use super::export::Taken;
use super::frameworks::import;
use super::model::Model;
use super::tensor::Tensor;
use crate::dtype::DType;
use crate::error::Error;
use crate::layout::elements;
use crate::map::{RawSlice, SharedMemory};
use crate::save::{SaveTensor, TensorBytes};
use base::is_tensor;
use modes::OutOfModes;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyType};
use refusal::resized;
use std::sync::Arc;
use storage::Storage;

/// An array of Python's, about to be saved.
pub(super) struct Given {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    pub(super) data: Data,
    /// Where it lies, if its class may have run code since it was looked at.
    storage: Option<Storage>,
}

pub(super) enum Data {
    /// Contiguous CPU memory, which `_keep` keeps alive.
    Ready { ptr: *const u8, len: usize, _keep: Keep },
    /// To be brought in C order by its framework: strided, swapped, on a device. Of torch's or numpy's own class.
    Strided(Py<PyAny>),
}

/// What keeps memory alive.
pub(super) enum Keep {
    Object { _object: Py<PyAny> },
    Taken { _tensor: Taken },
}

impl From<Bound<'_, PyAny>> for Keep {
    fn from(object: Bound<'_, PyAny>) -> Self {
        Self::Object { _object: object.unbind() }
    }
}

// SAFETY: the pointer is only read, and what it points to is kept alive.
unsafe impl Send for Data {}
// SAFETY: as for Send.
unsafe impl Sync for Data {}

impl Data {
    /// The bytes, where they lie in one piece.
    pub(super) fn source(&self) -> Option<RawSlice<'_>> {
        match self {
            // SAFETY: readable as long as `_keep` lives, which `self` owns.
            Self::Ready { ptr, len, .. } => Some(unsafe { RawSlice::from_raw(*ptr, *len) }),
            Self::Strided(_) => None,
        }
    }
}

impl SaveTensor for Given {
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn bytes(&self) -> TensorBytes<'_> {
        self.data.source().map_or(TensorBytes::LATER, TensorBytes::lying)
    }
}

impl Given {
    /// A copy in one piece of what its framework has to bring in order.
    pub(super) fn gathered(&self, py: Python<'_>, name: &str, array: &Py<PyAny>) -> PyResult<Self> {
        let len = elements(&self.shape).and_then(|n| self.dtype.nbytes(n)).unwrap_or_default();
        let memory = Arc::new(SharedMemory::zeroed(len));
        let tensor = Tensor::whole(memory, 0, self.dtype, &self.shape, name, false);
        copy(py, &tensor.array(), array.bind(py))?;
        look_at_ours(&Bound::new(py, tensor)?)
    }

    /// Refuses bools that are not all 0 or 1: a file with such a tensor is one that no framework loads.
    pub(super) fn check_values(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        if self.dtype != DType::Bool {
            return Ok(());
        }
        match &self.data {
            Data::Strided(array) => {
                let (array, _out) = (array.bind(py), OutOfModes::enter_if(py, || is_tensor(array.bind(py)))?);
                if is_tensor(array)? {
                    torch::check_bools(name, array)
                } else {
                    numpy::check_bools(name, array)
                }
            }
            ready @ Data::Ready { .. } => {
                match py.detach(|| ready.source().map_or(0, |source| largest(&source))) {
                    0 | 1 => Ok(()),
                    found => Err(bad_bool(name, found).into()),
                }
            }
        }
    }
}

/// The largest byte.
pub(super) fn largest(source: &RawSlice<'_>) -> u8 {
    let mut block = [0u8; 4096];
    let mut largest = 0;
    for from in (0..source.len()).step_by(block.len()) {
        let n = block.len().min(source.len() - from);
        source.copy_to(from..from + n, &mut block[..n]);
        largest = block[..n].iter().copied().fold(largest, u8::max);
    }
    largest
}

/// An array whose own class has had its say.
pub(super) enum Held<'py> {
    Ours(Bound<'py, Tensor>),
    Torch(Bound<'py, PyAny>),
    /// Of exactly numpy's class.
    Numpy(Bound<'py, PyAny>),
}

/// Takes hold of an array. Of one that is neither ours nor of torch, numpy makes an array.
///
/// # Errors
/// `MapTensorsError` for what is no array.
pub(super) fn hold<'py>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Held<'py>> {
    if let Ok(tensor) = object.cast::<Tensor>() {
        return Ok(Held::Ours(tensor.clone()));
    }
    // First, for it is known without a look at what is imported.
    if numpy::is_exact(object)? {
        return Ok(Held::Numpy(object.clone()));
    }
    if is_tensor(object)? {
        return Ok(Held::Torch(object.clone()));
    }
    numpy::base(name, object).map(Held::Numpy)
}

impl<'py> Held<'py> {
    fn may_run_code(&self, py: Python<'py>) -> PyResult<bool> {
        match self {
            Self::Torch(tensor) => Ok(!torch::is_exact(py, tensor)?),
            Self::Ours(_) | Self::Numpy(_) => Ok(false),
        }
    }

    /// Where its bytes are, and what they mean. To be called [out of torch's modes](out_of_modes).
    ///
    /// # Errors
    /// `DTypeError` for a dtype safetensors does not have, `MapTensorsError` for what has no memory.
    pub(super) fn look(&self, name: &str) -> PyResult<Given> {
        match self {
            Self::Ours(tensor) => look_at_ours(tensor),
            Self::Torch(tensor) => torch::look(name, tensor),
            Self::Numpy(array) => numpy::look(name, array),
        }
    }
}

/// What a thread that looks at these, or copies them, holds meanwhile.
pub(super) fn out_of_modes<'a, 'py: 'a>(
    py: Python<'py>,
    held: impl IntoIterator<Item = &'a Held<'py>>,
) -> PyResult<Option<OutOfModes<'py>>> {
    OutOfModes::enter_if(py, || Ok(held.into_iter().any(|held| matches!(held, Held::Torch(_)))))
}

/// Names and arrays, from a mapping or an iterable of pairs, with values that may be saved.
pub(super) fn collect<'py>(tensors: &Bound<'py, PyAny>) -> PyResult<Vec<(String, Given)>> {
    let py = tensors.py();
    let mut held = Vec::new();
    let mut take = |name: &Bound<'py, PyAny>, array: &Bound<'py, PyAny>| -> PyResult<()> {
        let name = name.cast::<PyString>().map_err(|_| {
            PyErr::from(Error::Argument(format!("a tensor's name is a str, not a {}", name.get_type())))
        })?;
        // A lone surrogate is no text that a file could hold.
        let name = name.to_str()?.to_owned();
        let found = hold(&name, array)?;
        held.push((name, found));
        if held.len().is_multiple_of(4096) {
            py.check_signals()?;
        }
        Ok(())
    };
    // A plain dict makes nothing while it is gone through, and its lists are of one moment: nothing runs between the two.
    let _paused = tensors.cast_exact::<PyDict>().is_ok().then(|| PausedCollector::new(py));
    if let Ok(dict) = tensors.cast_exact::<PyDict>() {
        let (names, arrays) = (dict.keys(), dict.values());
        for (name, array) in names.iter().zip(arrays.iter()) {
            take(&name, &array)?;
        }
    } else {
        let pairs = if tensors.is_instance_of::<Model>() || tensors.hasattr("items")? {
            tensors.call_method0("items")?
        } else {
            tensors.clone()
        };
        for pair in pairs.try_iter()? {
            let (name, array): (Bound<'_, PyAny>, Bound<'_, PyAny>) = pair?.extract()?;
            take(&name, &array)?;
        }
    }
    // Only now: iterating and taking hold run code of others, at which memory that was looked at could go.
    let out = out_of_modes(py, held.iter().map(|(_, held)| held))?;
    // Subclasses of torch's may run code even when they are looked at: they come first.
    let mut early = Vec::new();
    for (at, (name, held)) in held.iter().enumerate() {
        if held.may_run_code(py)? {
            early.push((at, held.look(name)?));
        }
    }
    // What is left runs no code of others, and makes an object or two for each tensor, which are gone at once.
    let _still_paused = PausedCollector::new(py);
    let mut looked = early.into_iter().peekable();
    let mut collected = Vec::with_capacity(held.len());
    for (at, (name, held)) in held.into_iter().enumerate() {
        let given = match looked.next_if(|(early, _)| *early == at) {
            Some((_, given)) => given,
            None => held.look(&name)?,
        };
        collected.push((name, given));
        if collected.len().is_multiple_of(4096) {
            py.check_signals()?;
        }
    }
    for (name, given) in &collected {
        if let Some(storage) = &given.storage
            && !storage.is_as_it_was(py)?
        {
            return Err(resized(name));
        }
        given.check_values(py, name)?;
    }
    drop(out);
    Ok(collected)
}

fn look_at_ours(object: &Bound<'_, Tensor>) -> PyResult<Given> {
    let (py, tensor) = (object.py(), object.get());
    tensor.look(py)?;
    let array = tensor.array();
    let (dtype, shape, len) = (array.dtype, array.shape.to_vec(), array.nbytes());
    let (ptr, keep) = if array.strides.is_none() {
        (array.ptr().cast_const(), object.clone().into_any())
    } else {
        let bytes = tensor.tobytes(py)?;
        (bytes.as_bytes().as_ptr(), bytes.into_any())
    };
    Ok(Given { dtype, shape, data: Data::Ready { ptr, len, _keep: keep.into() }, storage: None })
}

/// Whether an object's real type is this class or a subclass of it: what `__class__` says is the object's own word.
fn is_of(object: &Bound<'_, PyAny>, class: &Bound<'_, PyAny>) -> bool {
    let Ok(class) = class.cast::<PyType>() else { return false };
    // SAFETY: two types.
    unsafe { pyo3::ffi::PyType_IsSubtype(object.get_type().as_type_ptr(), class.as_type_ptr()) != 0 }
}

/// Whether a module is imported, as far as a class of it.
fn is_imported(py: Python<'_>, module: &str, class: &str) -> PyResult<bool> {
    static MODULES: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let found = import(py, &MODULES, "sys", "modules")?.call_method1(intern!(py, "get"), (module,))?;
    Ok(!found.is_none() && found.hasattr(class)?)
}
