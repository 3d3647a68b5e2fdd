//! Memory as arrays of numpy, torch and JAX.

use super::buffer::Extent;
use super::dlpack::{self, Export};
use crate::dtype::{Block, DType};
use crate::error::{Error, quote};
use crate::map::{RawSlice, SharedMemory, not_writable};
use crate::python::frameworks::{NDARRAY, import, is_cpu, jax_stays, numpy_dtype, torch};
use crate::tensor::Selection;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tensor in memory that may be shared with Python; [`Tensor`]'s fields, borrowed.
#[derive(Clone, Copy)]
pub(in crate::python) struct Array<'a> {
    pub(in crate::python) memory: &'a Arc<SharedMemory>,
    /// Of the first element, in bytes.
    pub(in crate::python) offset: usize,
    pub(in crate::python) dtype: DType,
    pub(in crate::python) shape: &'a [usize],
    /// In elements; `None` in C order.
    pub(in crate::python) strides: Option<&'a [isize]>,
    pub(in crate::python) read_only: bool,
    pub(in crate::python) name: &'a str,
}

impl Array<'_> {
    pub(in crate::python) fn elements(&self) -> usize {
        if self.shape.contains(&0) { 0 } else { self.shape.iter().product() }
    }

    pub(in crate::python) fn nbytes(&self) -> usize {
        // Checked when the layout was made.
        self.dtype.block().start_of(self.elements())
    }

    pub(in crate::python) fn ptr(&self) -> *mut u8 {
        self.memory.ptr(&(self.offset..self.offset))
    }

    /// Bytes in C order, where they lie so.
    pub(in crate::python) fn source(&self) -> Option<RawSlice<'_>> {
        self.strides.is_none().then(|| self.memory.source(&(self.offset..self.offset + self.nbytes())))
    }

    /// Copies the elements that `selection` (of this array) describes to `to`, in C order.
    pub(in crate::python) fn gather(&self, selection: &Selection, to: &mut [u8]) {
        let block = self.dtype.block();
        let mut done = 0;
        selection.for_each_run(|first, len| {
            // Relative to the first element; negative steps walk backwards from it.
            let start = self.offset.wrapping_add_signed(block.start_of_signed(first.cast_signed()));
            let size = block.start_of(len);
            self.memory.source(&(start..start + size)).copy_to(0..size, &mut to[done..done + size]);
            done += size;
        });
    }

    fn dtype_error(&self, expected: &str) -> PyErr {
        Error::DType {
            path: PathBuf::new(),
            tensor: self.name.into(),
            found: self.dtype.to_string(),
            expected: expected.into(),
        }
        .into()
    }

    /// A `bool` other than 0 and 1 is no value: frameworks would misbehave on it.
    pub(in crate::python) fn check_values(&self) -> PyResult<()> {
        if self.dtype != DType::Bool {
            return Ok(());
        }
        let mut all = Selection::all(self.shape);
        if let Some(strides) = self.strides {
            all.strides = strides.to_vec();
        }
        let mut worst = 0u8;
        let mut block = [0u8; 4096];
        all.for_each_run(|first, len| {
            let start = self.offset.wrapping_add_signed(first.cast_signed());
            for from in (0..len).step_by(block.len()) {
                let n = block.len().min(len - from);
                self.memory.source(&(start + from..start + from + n)).copy_to(0..n, &mut block[..n]);
                worst = block[..n].iter().copied().fold(worst, u8::max);
            }
        });
        if worst <= 1 {
            return Ok(());
        }
        let what = format!("BOOL cannot be {worst}; .view(\"U8\") shows the bytes");
        Err(Error::Value { tensor: self.name.into(), what }.into())
    }

    /// Sees to it that the elements can be written, before they are handed out to be: pages of a mapped file are
    /// read-only until then. A library that would write to read-only memory all the same gets pages of this process's
    /// own, which nobody else sees, and no crash.
    pub(in crate::python) fn make_writable(&self) -> Result<(), Error> {
        let extent = self.extent();
        let asked = extent.len();
        let what = || format!("tensor {}", quote(self.name));
        self.memory.make_writable(&extent).map_err(|error| not_writable(Path::new(""), &what(), asked, error))
    }

    /// A numpy array of this memory, to write unless it is read-only.
    pub(in crate::python) fn numpy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if !self.read_only {
            self.make_writable()?;
        }
        self.ready_numpy(py)
    }

    /// As [`Array::numpy`], of memory that is [writable](Array::make_writable) already.
    pub(in crate::python) fn ready_numpy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.check_values()?;
        match self.dtype {
            DType::F4 => return self.unpacked(py),
            DType::F6E2M3 | DType::F6E3M2 => {
                return Err(self.dtype_error("a dtype numpy can hold; .view(\"U8\") gives the packed bytes"));
            }
            _ => {}
        }
        let extent = self.extent();
        let offset = self.offset - extent.start;
        // What numpy keeps as the array's base: nothing but these bytes can be reached through it.
        let base = Bound::new(py, Extent::new(self.memory.clone(), extent, self.read_only))?;
        let ndarray = import(py, &NDARRAY, "numpy", "ndarray")?;
        let dtype = numpy_dtype(py, self.dtype)?;
        let shape = PyTuple::new(py, self.shape)?;
        match self.strides {
            None => ndarray.call1((shape, dtype, base, offset)),
            Some(strides) => {
                let itemsize = self.dtype.itemsize().unwrap_or(1).cast_signed();
                let strides = PyTuple::new(py, strides.iter().map(|stride| stride * itemsize))?;
                ndarray.call1((shape, dtype, base, offset, strides))
            }
        }
    }

    /// From the lowest to the highest element.
    pub(in crate::python) fn extent(&self) -> Range<usize> {
        let Some(strides) = self.strides.filter(|_| self.elements() > 0) else {
            return self.offset..self.offset + self.nbytes();
        };
        // By steps that may be negative.
        let (mut below, mut above) = (0, 1);
        for (&dim, &stride) in self.shape.iter().zip(strides) {
            let reach = stride.unsigned_abs() * (dim - 1);
            if stride < 0 { below += reach } else { above += reach }
        }
        let Block { elements, bytes } = self.dtype.block();
        self.offset - below.div_ceil(elements) * bytes..self.offset + above.div_ceil(elements) * bytes
    }

    /// 4-bit floats one to the byte, as `ml_dtypes` holds them.
    fn unpacked<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let mut packed = vec![0; self.nbytes()];
        let mut all = Selection::all(self.shape);
        if let Some(strides) = self.strides {
            all.strides = strides.to_vec();
        }
        self.gather(&all, &mut packed);
        let bytes: Vec<u8> = packed.iter().flat_map(|byte| [byte & 0xf, byte >> 4]).collect();
        let numpy = py.import("numpy")?;
        let flat = numpy.call_method1("frombuffer", (pyo3::types::PyByteArray::new(py, &bytes), "uint8"))?;
        let typed = flat.call_method1("view", (numpy_dtype(py, DType::F4)?,))?;
        typed.call_method1("reshape", (PyTuple::new(py, self.shape)?,))
    }

    /// A torch tensor of this memory; on another device a copy, made from pages that stay as they are.
    pub(in crate::python) fn torch<'py>(
        &self,
        py: Python<'py>,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if device.is_none_or(is_cpu) && !self.read_only {
            self.make_writable()?;
        }
        self.ready_torch(py, device)
    }

    /// As [`Array::torch`], of memory that is [writable](Array::make_writable) already, where the tensor stays there.
    pub(in crate::python) fn ready_torch<'py>(
        &self,
        py: Python<'py>,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if self.read_only {
            return Err(PyValueError::new_err(format!(
                "tensor {} is read-only, and torch has no read-only tensors (a write would crash); \
                 open with mode=\"c\": nothing is copied until it is written",
                quote(self.name)
            )));
        }
        if self.dtype.torch_name().is_none() {
            return Err(self.dtype_error("a dtype torch has; .view(\"U8\") gives the packed bytes"));
        }
        if self.strides.is_some_and(|strides| strides.iter().any(|&stride| stride < 0)) {
            return Err(PyValueError::new_err("torch has no negative steps; .numpy() takes them"));
        }
        let torch = torch(py)?;
        let tensor = if let Some(exchange) = torch.exchange {
            self.export(|export| exchange.make(py, export))?
        } else {
            let capsule = self.export(|export| export.capsule(py, true))?;
            torch.from_dlpack.bind(py).call1((capsule,))?
        };
        match device {
            Some(device) if !is_cpu(device) => tensor.call_method1(intern!(py, "to"), (device,)),
            _ => Ok(tensor),
        }
    }

    pub(in crate::python) fn jax<'py>(
        &self,
        py: Python<'py>,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // JAX writes to no array, but whoever takes its array by DLPack may.
        if !self.read_only && jax_stays(py, device)? {
            self.make_writable()?;
        }
        self.ready_jax(py, device)
    }

    /// As [`Array::jax`], of memory that is [writable](Array::make_writable) already, where the array stays there.
    pub(in crate::python) fn ready_jax<'py>(
        &self,
        py: Python<'py>,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        static DEVICE_PUT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let array = Array { read_only: true, ..*self }.ready_numpy(py)?;
        // jax.numpy.asarray copies; device_put takes aligned host memory as it is.
        import(py, &DEVICE_PUT, "jax", "device_put")?.call1((array, device))
    }

    pub(in crate::python) fn dlpack<'py>(
        &self,
        py: Python<'py>,
        versioned: bool,
        device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if device.is_some_and(|device| device != dlpack::CPU) {
            return Err(PyBufferError::new_err("this tensor is in CPU memory; move it with the framework"));
        }
        if copy == Some(true) {
            let mut bytes = vec![0; self.nbytes()];
            let mut all = Selection::all(self.shape);
            if let Some(strides) = self.strides {
                all.strides = strides.to_vec();
            }
            py.detach(|| self.gather(&all, &mut bytes));
            let memory = Arc::new(SharedMemory::copy_of(RawSlice::from(&*bytes)));
            let copied = Array { memory: &memory, offset: 0, strides: None, read_only: false, ..*self };
            return copied.export(|export| Export { copied: true, ..*export }.capsule(py, versioned));
        }
        // Not all who take a capsule heed that it is read-only: torch does not.
        self.make_writable()?;
        self.export(|export| export.capsule(py, versioned))
    }

    fn export<T>(&self, take: impl FnOnce(&Export<'_>) -> PyResult<T>) -> PyResult<T> {
        self.check_values()?;
        let mut shape = self.shape.to_vec();
        if self.dtype == DType::F4 {
            // Two elements make one of DLPack's; only the last axis can be halved.
            let Some(last) = shape.last_mut().filter(|last| last.is_multiple_of(2)) else {
                return Err(self.dtype_error("an even last axis, to be handed out as pairs"));
            };
            *last /= 2;
            if self.strides.is_some() {
                return Err(PyBufferError::new_err("packed elements are handed out only in one piece"));
            }
        }
        take(&Export {
            memory: self.memory,
            ptr: self.ptr(),
            dtype: self.dtype,
            shape: &shape,
            strides: self.strides,
            read_only: self.read_only,
            copied: false,
        })
    }
}
