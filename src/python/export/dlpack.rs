//! DLPack: tensors handed from one library to another without a copy.
//!
//! The structures are those of `dlpack.h` 1.3; the exchange interface is `__dlpack_c_exchange_api__`
//! (same header), which saves a Python call for each tensor.

use crate::dtype::DType;
use crate::map::SharedMemory;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

#[repr(C)]
#[derive(Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Device {
    kind: i32,
    id: i32,
}

/// kDLCPU
pub(in crate::python) const CPU: (i32, i32) = (1, 0);

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DLTensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// What has no version cannot say "read only".
#[repr(C)]
struct Unversioned {
    tensor: DLTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Unversioned)>,
}

#[repr(C)]
struct Versioned {
    version: Version,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: DLTensor,
}

const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;

/// The dtype's DLPack code, or `None` where DLPack has none that consumers agree on.
fn data_type(dtype: DType) -> Option<DataType> {
    let (code, lanes) = match dtype {
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => (0, 1),
        DType::U8 | DType::U16 | DType::U32 | DType::U64 => (1, 1),
        DType::F16 | DType::F32 | DType::F64 => (2, 1),
        DType::BF16 => (4, 1),
        DType::C64 => (5, 1),
        DType::Bool => (6, 1),
        DType::F8E4M3 => (10, 1),
        DType::F8E4M3Fnuz => (11, 1),
        DType::F8E5M2 => (12, 1),
        DType::F8E5M2Fnuz => (13, 1),
        DType::F8E8M0 => (14, 1),
        // Two to the byte, as torch's float4_e2m1fn_x2.
        DType::F4 => (17, 2),
        DType::F6E2M3 | DType::F6E3M2 => return None,
    };
    let block = dtype.block();
    Some(DataType { code, bits: u8::try_from(block.bytes * 8 / block.elements).unwrap_or(0), lanes })
}

/// A tensor to hand out.
pub(in crate::python) struct Export<'a> {
    pub(in crate::python) memory: &'a Arc<SharedMemory>,
    pub(in crate::python) ptr: *mut u8,
    pub(in crate::python) dtype: DType,
    pub(in crate::python) shape: &'a [usize],
    /// In elements; `None` in C order.
    pub(in crate::python) strides: Option<&'a [isize]>,
    pub(in crate::python) read_only: bool,
    pub(in crate::python) copied: bool,
}

/// What keeps a tensor handed out alive: its memory, and the arrays its structure points to.
struct Context {
    _memory: Arc<SharedMemory>,
    dims: Box<[i64]>,
}

impl Export<'_> {
    fn tensor(&self) -> PyResult<(Box<Context>, DLTensor)> {
        let dtype = data_type(self.dtype).ok_or_else(|| {
            PyBufferError::new_err(format!("DLPack has no packed {}; use .view(\"U8\")", self.dtype))
        })?;
        let rank = self.shape.len();
        let mut dims = vec![0i64; rank * 2].into_boxed_slice();
        for (to, &dim) in dims.iter_mut().zip(self.shape) {
            *to = i64::try_from(dim).map_err(|_| PyBufferError::new_err("a dimension over 2^63"))?;
        }
        // Consumers disagree on what a missing stride means for lanes and empty tensors: always given.
        if let Some(strides) = self.strides {
            for (to, &stride) in dims[rank..].iter_mut().zip(strides) {
                *to = stride as i64;
            }
        } else {
            let mut stride = 1i64;
            for axis in (0..rank).rev() {
                dims[rank + axis] = stride;
                stride = stride.wrapping_mul(dims[axis].max(1));
            }
        }
        let mut context = Box::new(Context { _memory: self.memory.clone(), dims });
        let shape = context.dims.as_mut_ptr();
        let tensor = DLTensor {
            data: self.ptr.cast(),
            device: Device { kind: CPU.0, id: CPU.1 },
            ndim: c_int::try_from(rank).unwrap_or(c_int::MAX),
            dtype,
            shape,
            strides: shape.wrapping_add(rank),
            byte_offset: 0,
        };
        Ok((context, tensor))
    }

    /// A `dltensor_versioned` structure, owned by whoever calls its deleter.
    fn versioned(&self) -> PyResult<*mut Versioned> {
        let (context, tensor) = self.tensor()?;
        let flags = if self.read_only { READ_ONLY } else { 0 } | if self.copied { IS_COPIED } else { 0 };
        Ok(Box::into_raw(Box::new(Versioned {
            version: Version { major: 1, minor: 1 },
            context: Box::into_raw(context).cast(),
            deleter: Some(delete_versioned),
            flags,
            tensor,
        })))
    }

    /// A capsule for `from_dlpack`. Without a version it cannot carry the read-only flag, and is refused
    /// for read-only memory.
    pub(in crate::python) fn capsule<'py>(
        &self,
        py: Python<'py>,
        versioned: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        if versioned {
            let managed = self.versioned()?;
            // SAFETY: a live allocation, a static name, and a destructor that knows both names.
            let capsule =
                unsafe { ffi::PyCapsule_New(managed.cast(), VERSIONED.as_ptr(), Some(drop_versioned)) };
            // SAFETY: a new reference, or null with an exception set.
            return unsafe { Bound::from_owned_ptr_or_err(py, capsule) };
        }
        if self.read_only {
            return Err(PyBufferError::new_err(
                "this tensor is read-only, which unversioned DLPack cannot say; ask for max_version=(1, 0) or open with mode=\"c\"",
            ));
        }
        let (context, tensor) = self.tensor()?;
        let managed = Box::into_raw(Box::new(Unversioned {
            tensor,
            context: Box::into_raw(context).cast(),
            deleter: Some(delete_unversioned),
        }));
        // SAFETY: as above.
        let capsule =
            unsafe { ffi::PyCapsule_New(managed.cast(), UNVERSIONED.as_ptr(), Some(drop_unversioned)) };
        // SAFETY: as above.
        unsafe { Bound::from_owned_ptr_or_err(py, capsule) }
    }
}

const VERSIONED: &CStr = c"dltensor_versioned";
const UNVERSIONED: &CStr = c"dltensor";

/// # Safety
/// `managed` came from [`Export::versioned`] and is not used again.
unsafe extern "C" fn delete_versioned(managed: *mut Versioned) {
    // SAFETY: the caller's promise: a pointer from Box::into_raw, given back once.
    let managed = unsafe { Box::from_raw(managed) };
    // SAFETY: likewise its context.
    drop(unsafe { Box::from_raw(managed.context.cast::<Context>()) });
}

/// # Safety
/// `managed` came from [`Export::capsule`] and is not used again.
unsafe extern "C" fn delete_unversioned(managed: *mut Unversioned) {
    // SAFETY: the caller's promise: a pointer from Box::into_raw, given back once.
    let managed = unsafe { Box::from_raw(managed) };
    // SAFETY: likewise its context.
    drop(unsafe { Box::from_raw(managed.context.cast::<Context>()) });
}

/// A consumed capsule is renamed by its consumer, who then owns the tensor; only an unused one is freed.
///
/// # Safety
/// Called by Python for a capsule of this module.
unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: Python passes the capsule being destroyed.
    if unsafe { ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) } == 1 {
        // SAFETY: the name was just checked.
        let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()) };
        // SAFETY: still under its own name, so nobody consumed it.
        unsafe { delete_versioned(managed.cast()) };
    }
}

/// # Safety
/// As [`drop_versioned`].
unsafe extern "C" fn drop_unversioned(capsule: *mut ffi::PyObject) {
    // SAFETY: Python passes the capsule being destroyed.
    if unsafe { ffi::PyCapsule_IsValid(capsule, UNVERSIONED.as_ptr()) } == 1 {
        // SAFETY: the name was just checked.
        let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, UNVERSIONED.as_ptr()) };
        // SAFETY: still under its own name, so nobody consumed it.
        unsafe { delete_unversioned(managed.cast()) };
    }
}

/// The first fields of `DLPackExchangeAPI`; the rest are not called.
#[repr(C)]
struct ExchangeTable {
    version: Version,
    previous: *const ExchangeTable,
    allocate: *const c_void,
    from_object: Option<FromObject>,
    to_object: Option<ToObject>,
}

type FromObject = unsafe extern "C" fn(*mut c_void, *mut *mut Versioned) -> c_int;
type ToObject = unsafe extern "C" fn(*mut Versioned, *mut *mut c_void) -> c_int;

/// A framework's C functions that make one of its tensors, and take one.
#[derive(Clone, Copy)]
pub(in crate::python) struct Exchange {
    make: ToObject,
    take: FromObject,
}

impl Exchange {
    /// What a tensor class publishes, if it does, in a version this module knows.
    pub(in crate::python) fn of(class: &Bound<'_, PyAny>) -> Option<Self> {
        let capsule = class.getattr("__dlpack_c_exchange_api__").ok()?;
        let name = c"dlpack_exchange_api";
        // SAFETY: any object may be asked.
        if unsafe { ffi::PyCapsule_IsValid(capsule.as_ptr(), name.as_ptr()) } != 1 {
            return None;
        }
        // SAFETY: the name was just checked.
        let table = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), name.as_ptr()) };
        // SAFETY: dlpack.h: under this name the capsule holds a table that lives as long as the process.
        let table: &'static ExchangeTable = unsafe { &*table.cast::<ExchangeTable>() };
        match (table.version.major, table.to_object, table.from_object) {
            (1, Some(make), Some(take)) => Some(Self { make, take }),
            _ => None,
        }
    }

    /// A tensor of the framework, to be looked at: its own claim on the memory, whatever becomes of the
    /// object.
    pub(in crate::python) fn take(self, tensor: &Bound<'_, PyAny>) -> PyResult<Taken> {
        let mut managed = std::ptr::null_mut();
        // SAFETY: an object of the framework's class; room for the result.
        if unsafe { (self.take)(tensor.as_ptr().cast(), &raw mut managed) } != 0 {
            return Err(PyErr::fetch(tensor.py()));
        }
        std::ptr::NonNull::new(managed)
            .map(|managed| Taken(Claim::Managed(managed)))
            .ok_or_else(|| PyBufferError::new_err("no tensor was handed over"))
    }

    /// A plain tensor of the framework over memory that was taken, which it keeps.
    fn give(self, py: Python<'_>, managed: std::ptr::NonNull<Versioned>) -> PyResult<Bound<'_, PyAny>> {
        let mut object = std::ptr::null_mut();
        // SAFETY: a live structure, which the function owns from now on; room for the result.
        if unsafe { (self.make)(managed.as_ptr(), &raw mut object) } != 0 {
            return Err(PyErr::fetch(py));
        }
        // SAFETY: dlpack.h: a new reference on success.
        unsafe { Bound::from_owned_ptr_or_err(py, object.cast()) }
    }

    /// The framework's tensor over our memory.
    pub(in crate::python) fn make<'py>(
        self,
        py: Python<'py>,
        export: &Export<'_>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let managed = std::ptr::NonNull::new(export.versioned()?);
        self.give(py, managed.ok_or_else(|| PyBufferError::new_err("no tensor was made"))?)
    }
}

/// A tensor taken over from a framework, and given back when dropped.
pub(in crate::python) struct Taken(Claim);

enum Claim {
    Managed(std::ptr::NonNull<Versioned>),
    /// Of a torch without the exchange interface: the capsule that nobody consumes, and what it holds.
    Capsule {
        capsule: Py<PyAny>,
        managed: std::ptr::NonNull<Unversioned>,
    },
}

// SAFETY: only read, and its deleter may be called from any thread (dlpack.h).
unsafe impl Send for Taken {}
// SAFETY: as for Send.
unsafe impl Sync for Taken {}

impl Taken {
    /// A tensor in a capsule that is not consumed.
    pub(in crate::python) fn of_capsule(capsule: &Bound<'_, PyAny>) -> PyResult<Self> {
        // SAFETY: any object may be asked; null is an exception.
        let managed = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), UNVERSIONED.as_ptr()) };
        match std::ptr::NonNull::new(managed.cast::<Unversioned>()) {
            Some(managed) => Ok(Self(Claim::Capsule { capsule: capsule.clone().unbind(), managed })),
            None => Err(PyErr::fetch(capsule.py())),
        }
    }

    fn tensor(&self) -> &DLTensor {
        match &self.0 {
            // SAFETY: alive until the deleter is called, which `drop` does.
            Claim::Managed(managed) => unsafe { &managed.as_ref().tensor },
            // SAFETY: alive as long as the capsule, which nobody else has.
            Claim::Capsule { managed, .. } => unsafe { &managed.as_ref().tensor },
        }
    }

    pub(in crate::python) fn is_on_cpu(&self) -> bool {
        self.tensor().device.kind == CPU.0
    }

    pub(in crate::python) fn ptr(&self) -> *const u8 {
        let tensor = self.tensor();
        let offset = usize::try_from(tensor.byte_offset).unwrap_or_default();
        tensor.data.cast_const().cast::<u8>().wrapping_add(offset)
    }

    /// Whether the elements are of this dtype, as DLPack calls it.
    pub(in crate::python) fn is(&self, dtype: DType) -> bool {
        data_type(dtype) == Some(self.tensor().dtype)
    }

    fn ints(&self, ptr: *const i64) -> &[i64] {
        let rank = usize::try_from(self.tensor().ndim).unwrap_or_default();
        if rank == 0 || ptr.is_null() {
            return &[];
        }
        // SAFETY: dlpack.h: `ndim` integers, alive as long as the structure.
        unsafe { std::slice::from_raw_parts(ptr, rank) }
    }

    /// `None` for a shape that cannot be.
    pub(in crate::python) fn shape(&self) -> Option<Vec<usize>> {
        self.ints(self.tensor().shape).iter().map(|&dim| usize::try_from(dim).ok()).collect()
    }

    /// In elements; empty where they are those of C order.
    pub(in crate::python) fn strides(&self) -> &[i64] {
        self.ints(self.tensor().strides)
    }

    /// The framework's plain tensor over this memory: of none of its subclasses.
    pub(in crate::python) fn give<'py>(
        self,
        py: Python<'py>,
        exchange: Option<Exchange>,
        from_dlpack: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        match (&self.0, exchange) {
            (Claim::Managed(managed), Some(exchange)) => {
                let managed = *managed;
                std::mem::forget(self);
                exchange.give(py, managed)
            }
            (Claim::Managed(_), None) => Err(PyBufferError::new_err("no way to hand a tensor back")),
            (Claim::Capsule { capsule, .. }, _) => from_dlpack.call1((capsule.bind(py),)),
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Claim::Managed(managed) = &self.0 else { return };
        // SAFETY: alive until now.
        let deleter = unsafe { managed.as_ref() }.deleter;
        if let Some(deleter) = deleter {
            // SAFETY: dlpack.h: called once, by the owner.
            unsafe { deleter(managed.as_ptr()) };
        }
    }
}
