//! Python's buffer protocol (PEP 3118), over memory that Python may also write.

use super::arrays::Array;
use crate::dtype::DType;
use crate::map::SharedMemory;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{CStr, c_int, c_void};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a filled view points to.
struct Shape {
    /// Shape, then strides in bytes.
    dims: Vec<ffi::Py_ssize_t>,
}

/// The `struct` code of a dtype, if it has one. Others have no typed buffer: bytes can still be had with
/// `view("U8")`, or by a consumer that asks for no format.
fn format(dtype: DType) -> Option<&'static CStr> {
    Some(match dtype {
        DType::Bool => c"?",
        DType::U8 => c"B",
        DType::I8 => c"b",
        DType::U16 => c"H",
        DType::I16 => c"h",
        DType::U32 => c"I",
        DType::I32 => c"i",
        DType::U64 => c"Q",
        DType::I64 => c"q",
        DType::F16 => c"e",
        DType::F32 => c"f",
        DType::F64 => c"d",
        DType::C64 => c"Zf",
        _ => return None,
    })
}

/// Fills `view` for `owner`, whose memory `array` describes. `insisted` says whether a consumer of it wanted to write
/// what is read-only.
///
/// # Safety
/// `view` is null or a `Py_buffer` to fill, as Python's buffer protocol passes it.
pub(in crate::python) unsafe fn fill(
    owner: &Bound<'_, PyAny>,
    array: &Array<'_>,
    view: *mut ffi::Py_buffer,
    flags: c_int,
    insisted: &AtomicBool,
) -> PyResult<()> {
    // SAFETY: the caller's promise.
    let Some(view) = (unsafe { view.as_mut() }) else {
        return Err(PyBufferError::new_err("no view to fill"));
    };
    view.obj = std::ptr::null_mut();
    let asks = |flag: c_int| flags & flag == flag;
    if array.read_only && asks(ffi::PyBUF_WRITABLE) {
        insisted.store(true, Ordering::Relaxed);
        return Err(PyBufferError::new_err("this tensor is read-only"));
    }
    // A consumer that asks for neither format nor writing reads the bytes: a file, a hash.
    let read_only = array.read_only || !asks(ffi::PyBUF_WRITABLE) && !asks(ffi::PyBUF_FORMAT);
    if !read_only {
        array.make_writable()?;
    } else if insisted.load(Ordering::Relaxed) {
        // A consumer that was refused and takes what it gets may write all the same, as torch.frombuffer does: then to
        // pages of this process's own. Where the kernel does not promise them, it has been told.
        array.make_writable().ok();
    }
    let packed = array.dtype.itemsize().is_none();
    let scattered = array.strides.is_some();
    let wants_c =
        !asks(ffi::PyBUF_STRIDES) || asks(ffi::PyBUF_C_CONTIGUOUS) || asks(ffi::PyBUF_ANY_CONTIGUOUS);
    // C order is Fortran's too where at most one axis is longer than 1.
    let fortran =
        !scattered && (array.elements() == 0 || array.shape.iter().filter(|&&dim| dim != 1).count() <= 1);
    if scattered && (wants_c || packed) || asks(ffi::PyBUF_F_CONTIGUOUS) && !(fortran || packed) {
        return Err(PyBufferError::new_err("this tensor does not lie in memory in that order"));
    }
    let format = match (asks(ffi::PyBUF_FORMAT), format(array.dtype)) {
        (true, None) => {
            let text = format!(
                "the buffer protocol has no code for {}; use .numpy(), or .view(\"U8\") for the bytes",
                array.dtype
            );
            return Err(PyBufferError::new_err(text));
        }
        (true, Some(format)) => {
            array.check_values()?;
            format.as_ptr()
        }
        (false, _) => std::ptr::null(),
    };
    let itemsize = array.dtype.itemsize().unwrap_or(1);
    let nbytes = array.nbytes();
    let dim =
        |n: usize| ffi::Py_ssize_t::try_from(n).map_err(|_| PyBufferError::new_err("too large a tensor"));
    // Packed elements have no shape of their own: they are a run of bytes.
    let mut dims: Vec<ffi::Py_ssize_t> = if packed {
        vec![dim(nbytes)?]
    } else {
        array.shape.iter().map(|&n| dim(n)).collect::<Result<_, _>>()?
    };
    let rank = dims.len();
    if let Some(strides) = array.strides {
        dims.extend(strides.iter().map(|stride| stride * itemsize.cast_signed()));
    } else {
        let mut stride = itemsize.cast_signed();
        let mut strides = vec![stride; rank];
        for axis in (0..rank).rev() {
            strides[axis] = stride;
            stride = stride.wrapping_mul(dims[axis].max(1));
        }
        dims.extend(strides);
    }
    let mut shape = Box::new(Shape { dims });
    let dims = shape.dims.as_mut_ptr();
    view.buf = array.ptr().cast::<c_void>();
    view.len = dim(nbytes)?;
    view.readonly = c_int::from(read_only);
    view.itemsize = itemsize.cast_signed();
    view.format = format.cast_mut();
    // Without PyBUF_ND the bytes are one run, and a consumer expects one axis.
    view.ndim = if asks(ffi::PyBUF_ND) { c_int::try_from(rank).unwrap_or(c_int::MAX) } else { 1 };
    // PEP 3118: both are null for a scalar.
    let given = |wanted: bool, dims| if wanted && rank > 0 { dims } else { std::ptr::null_mut() };
    view.shape = given(asks(ffi::PyBUF_ND), dims);
    view.strides = given(asks(ffi::PyBUF_STRIDES), dims.wrapping_add(rank));
    view.suboffsets = std::ptr::null_mut();
    view.internal = Box::into_raw(shape).cast();
    view.obj = owner.clone().into_ptr();
    Ok(())
}

/// A run of bytes: what numpy keeps as the base of an array.
#[pyclass(frozen, module = "maptensors._native")]
pub(in crate::python) struct Extent {
    memory: Arc<SharedMemory>,
    // INVARIANT: inside the memory.
    part: Range<usize>,
    read_only: bool,
}

impl Extent {
    /// A part that lies inside `memory`, and is writable there unless `read_only`.
    pub(in crate::python) fn new(memory: Arc<SharedMemory>, part: Range<usize>, read_only: bool) -> Self {
        Self { memory, part, read_only }
    }
}

#[pymethods]
impl Extent {
    /// # Safety
    /// Called by Python's buffer protocol.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let Self { memory, part, read_only } = slf.get();
        let len = ffi::Py_ssize_t::try_from(part.len());
        let len = len.map_err(|_| PyBufferError::new_err("too large a tensor"))?;
        let ptr = memory.ptr(part).cast();
        // SAFETY: the protocol's view, and bytes that `slf` keeps mapped, of which the view holds a reference.
        let filled =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), ptr, len, c_int::from(*read_only), flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// Frees what [`fill`] allocated.
///
/// # Safety
/// `view` was filled by [`fill`] and is released once.
pub(in crate::python) unsafe fn release(view: *mut ffi::Py_buffer) {
    // SAFETY: the caller's promise.
    let internal = unsafe { (*view).internal };
    if !internal.is_null() {
        // SAFETY: a pointer from Box::into_raw in `fill`, given back once.
        drop(unsafe { Box::from_raw(internal.cast::<Shape>()) });
    }
}
