//! `maptensors.Tensor`: a place in memory with a dtype and a shape.

use super::export::{self, Array};
use super::{frameworks, import, index, number};
use crate::dtype::DType;
use crate::error::quote;
use crate::map::SharedMemory;
use crate::model::Guards;
use crate::tensor::{Selection, Tensor as Owned};
use pyo3::basic::CompareOp;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A tensor where it lies: in a mapped file, in a file being made, or in its own memory.
///
/// Hands its memory to other libraries without copying: `numpy()`, `torch()`, `jax()`, the buffer
/// protocol, DLPack. Whatever is handed out keeps the memory alive, also after the model is closed.
///
/// One of one element is a number: `int(t)`, `float(t)`, `bool(t)`; of more, those are errors. Comparisons (`t == 0`) are
/// numpy's, element by element, so a tensor is not hashable; iterating goes over the first axis.
#[pyclass(frozen, module = "maptensors")]
pub(super) struct Tensor {
    // INVARIANT: an element of a byte or more lies at its dtype's alignment.
    inner: Owned<SharedMemory>,
    read_only: bool,
    /// Of a model that is guarded.
    watch: Option<Arc<Watch>>,
    /// Whether a consumer wanted to write it though it is read-only.
    insisted: AtomicBool,
}

/// The file that a tensor lies in, to ask whether it is still as it was.
pub(super) struct Watch {
    pub(super) guards: Arc<Guards>,
    pub(super) shard: usize,
    pub(super) path: Arc<Path>,
}

impl Tensor {
    /// A whole tensor in C order, which lies inside `memory`, aligned. Memory that cannot be written makes
    /// it read-only in any case.
    pub(super) fn whole(
        memory: Arc<SharedMemory>,
        offset: usize,
        dtype: DType,
        shape: &[usize],
        name: &str,
        read_only: bool,
    ) -> Self {
        let read_only = read_only || memory.is_read_only();
        Self::of(Owned::whole(memory, offset, dtype, shape, name), read_only, None)
    }

    fn of(inner: Owned<SharedMemory>, read_only: bool, watch: Option<Arc<Watch>>) -> Self {
        Self { inner, read_only, watch, insisted: AtomicBool::new(false) }
    }

    pub(super) fn watched(self, watch: Option<Arc<Watch>>) -> Self {
        Self { watch, ..self }
    }

    /// Asks before its memory is handed out, read or written: of a model that is guarded.
    ///
    /// # Errors
    /// Those of a guard.
    pub(super) fn look(&self, py: Python<'_>) -> PyResult<()> {
        let Some(watch) = &self.watch else { return Ok(()) };
        let read = || self.inner.memory().populate_read(self.array().extent());
        Ok(py.detach(|| watch.guards.hand_out(watch.shard, &watch.path, read))?)
    }

    pub(super) fn array(&self) -> Array<'_> {
        Array {
            memory: self.inner.memory(),
            offset: self.inner.offset(),
            dtype: self.inner.dtype(),
            shape: self.inner.shape(),
            strides: self.inner.strides(),
            read_only: self.read_only,
            name: self.inner.shared_name(),
        }
    }

    /// The same memory, other elements; those lie inside.
    fn part(&self, selection: Selection) -> PyResult<Self> {
        Ok(Self::of(self.inner.part(selection)?, self.read_only, self.watch.clone()))
    }

    /// Applies Python's basic indexing: integers, slices, `...`.
    fn index(&self, key: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.part(index::select(&self.inner, key)?)
    }
}

#[pymethods]
impl Tensor {
    /// The name in the file.
    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }

    /// Elements along each axis, outermost first.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.inner.shape())
    }

    /// The dtype as safetensors calls it, such as "F32" or "BF16".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.inner.dtype().name()
    }

    /// Number of axes.
    #[getter]
    fn ndim(&self) -> usize {
        self.inner.shape().len()
    }

    /// Number of elements.
    #[getter]
    fn size(&self) -> usize {
        self.array().elements()
    }

    /// Bytes of all elements.
    #[getter]
    fn nbytes(&self) -> usize {
        self.array().nbytes()
    }

    /// Whether the memory is a file's pages (of `backend="memfd"`, of sealed memory). False for `backend="pread"`, and for a tensor whose place in
    /// the file is misaligned for its dtype: that one is an aligned private copy.
    #[getter]
    fn mapped(&self) -> bool {
        self.inner.memory().is_mapped()
    }

    /// Whether writing is refused.
    #[getter]
    fn readonly(&self) -> bool {
        self.read_only
    }

    /// The address of the first element, to be written unless `readonly`.
    fn data_ptr(&self) -> PyResult<usize> {
        if !self.read_only {
            self.array().make_writable()?;
        }
        Ok(self.array().ptr().addr())
    }

    /// The elements as `bytes`, in C order, little endian: a copy.
    pub(super) fn tobytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.look(py)?;
        let array = self.array();
        PyBytes::new_with(py, array.nbytes(), |to| {
            py.detach(|| array.gather(&self.inner.selection(), to));
            Ok(())
        })
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.tobytes(py)
    }

    /// A numpy array of the same memory; writable unless `readonly`. Of a model of mode "r+", what is written to
    /// it reaches the file, and everyone who maps or reads that.
    ///
    /// bfloat16 and 8-bit floats use `ml_dtypes`. 4-bit floats are unpacked, which copies.
    pub(super) fn numpy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.look(py)?;
        self.array().numpy(py)
    }

    /// A torch tensor of the same memory with its own storage; on another `device`, a copy there.
    #[pyo3(signature = (device = None))]
    fn torch<'py>(&self, py: Python<'py>, device: Option<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        self.look(py)?;
        self.array().torch(py, device.as_ref())
    }

    /// A JAX array of the same memory where it lies on a 64-byte boundary on the CPU, otherwise a copy.
    ///
    /// JAX holds arrays to be immutable: do not write to this tensor while one lives.
    #[pyo3(signature = (device = None))]
    fn jax<'py>(&self, py: Python<'py>, device: Option<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        self.look(py)?;
        self.array().jax(py, device.as_ref())
    }

    /// The same bytes as another dtype: of the same width any shape, of another width the last axis
    /// grows or shrinks. `view("U8")` shows the raw bytes of anything contiguous.
    fn view(&self, dtype: &Bound<'_, PyAny>) -> PyResult<Self> {
        let dtype = frameworks::parse_dtype(self.inner.name(), dtype)?;
        let (old, new) = (self.inner.dtype().block(), dtype.block());
        let mut shape = self.inner.shape().to_vec();
        let refuse = |why: &str| {
            PyValueError::new_err(format!(
                "tensor {} ({} {:?}) cannot be viewed as {dtype}: {why}",
                quote(self.inner.name()),
                self.inner.dtype(),
                self.inner.shape()
            ))
        };
        if old != new {
            if !self.inner.is_contiguous() {
                return Err(refuse("it is not contiguous"));
            }
            let last = shape.last_mut().ok_or_else(|| refuse("a scalar has no axis to grow"))?;
            // Elements of the one by elements of the other, in bytes of both.
            let (from, to) = (old.bytes * new.elements, old.elements * new.bytes);
            let grown = last.checked_mul(from).filter(|grown| grown.is_multiple_of(to));
            *last = grown.ok_or_else(|| refuse("its last axis does not divide"))? / to;
        }
        let array = Array { dtype, ..self.array() };
        if !array.ptr().addr().is_multiple_of(dtype.align()) {
            return Err(refuse("its address is not aligned for it"));
        }
        Ok(Self::of(self.inner.looked_at_as(dtype, shape), self.read_only, self.watch.clone()))
    }

    fn __getitem__(&self, key: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.index(key)
    }

    /// `tensor[...] = value`: writes in place, from numbers, lists of them, and arrays of numpy, torch or JAX.
    ///
    /// Integers must fit (`OverflowError`). Of arrays, floats become no integers and complex numbers no real ones
    /// (`TypeError`); a Python float becomes an integer where it is a whole one.
    fn __setitem__(&self, py: Python<'_>, key: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let part = self.index(key)?;
        if part.read_only {
            return Err(PyValueError::new_err(format!(
                "tensor {} is read-only; open with mode=\"c\" to edit it",
                quote(self.inner.name())
            )));
        }
        part.look(py)?;
        part.array().make_writable()?;
        import::assign(py, &part.array(), value)
    }

    // Numbers, comparisons and iteration: see number.rs.

    fn __int__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        number::int(py, self)
    }

    fn __float__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        number::float(py, self)
    }

    fn __complex__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        number::complex(py, self)
    }

    fn __index__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        number::index(py, self)
    }

    fn __bool__(&self, py: Python<'_>) -> PyResult<bool> {
        number::truth(py, self)
    }

    fn __format__(slf: &Bound<'_, Self>, spec: &str) -> PyResult<String> {
        number::format(slf, spec)
    }

    fn __richcmp__<'py>(
        slf: &Bound<'py, Self>,
        other: &Bound<'py, PyAny>,
        how: CompareOp,
    ) -> PyResult<Bound<'py, PyAny>> {
        number::compare(slf, other, how)
    }

    fn __contains__(slf: &Bound<'_, Self>, value: &Bound<'_, PyAny>) -> PyResult<bool> {
        number::contains(slf, value)
    }

    fn __iter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        number::rows(slf)
    }

    fn __len__(&self) -> PyResult<usize> {
        self.inner.shape().first().copied().ok_or_else(|| PyTypeError::new_err("len() of a scalar tensor"))
    }

    fn __repr__(&self) -> String {
        let kind = match &**self.inner.memory() {
            memory if memory.is_shared() => "mapped, writes reach the file",
            memory if memory.is_mapped() => "mapped",
            _ => "in memory",
        };
        let mode = if self.read_only { ", read-only" } else { "" };
        format!(
            "Tensor({}, {}, {:?}, {kind}{mode})",
            quote(self.inner.name()),
            self.inner.dtype(),
            self.inner.shape()
        )
    }

    #[pyo3(signature = (dtype = None, copy = None))]
    fn __array__<'py>(
        &self,
        py: Python<'py>,
        dtype: Option<Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let array = self.numpy(py)?;
        match (dtype, copy) {
            (Some(dtype), _) if !array.getattr("dtype")?.eq(&dtype)? => {
                if copy == Some(false) {
                    return Err(PyValueError::new_err(format!(
                        "{} cannot become {dtype} without a copy",
                        self.inner.dtype()
                    )));
                }
                array.call_method1("astype", (dtype,))
            }
            (_, Some(true)) => array.call_method0("copy"),
            _ => Ok(array),
        }
    }

    /// A DLPack capsule; versioned where the consumer asks for `max_version >= (1, 0)`.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // A CPU has no streams; the standard says to ignore what is given.
        drop(stream);
        self.look(py)?;
        self.array().dlpack(py, max_version.is_some_and(|v| v.0 >= 1), dl_device, copy)
    }

    /// `(kDLCPU, 0)`.
    #[allow(clippy::unused_self)] // a method by protocol
    fn __dlpack_device__(&self) -> (i32, i32) {
        export::CPU
    }

    /// # Safety
    /// Called by Python's buffer protocol.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut pyo3::ffi::Py_buffer,
        flags: std::ffi::c_int,
    ) -> PyResult<()> {
        slf.get().look(slf.py())?;
        // SAFETY: the protocol's promise, passed on.
        unsafe { export::buffer::fill(slf.as_any(), &slf.get().array(), view, flags, &slf.get().insisted) }
    }

    /// # Safety
    /// Called by Python's buffer protocol, once for each filled view.
    #[allow(clippy::unused_self)] // a method by protocol
    unsafe fn __releasebuffer__(&self, view: *mut pyo3::ffi::Py_buffer) {
        // SAFETY: the protocol's promise, passed on.
        unsafe { export::buffer::release(view) }
    }
}
