//! `maptensors.Tensor` as a number, and in comparisons, as numpy's arrays are.
//!
//! Without these Python would fall back on the buffer (`int(t)` reads its bytes as text), on the length (`bool(t)`) and on
//! identity (`t == 55`).

use super::tensor::Tensor;
use crate::dtype::{DType, F8E4M3, F8E4M3Fnuz, F8E5M2, F8E5M2Fnuz, F8E8M0};
use crate::error::quote;
use pyo3::basic::CompareOp;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyComplex, PyFloat, PyInt};

/// The value of the only element, as a `bool`, `int`, `float` or `complex`; `None` where there are more, or none.
pub(super) fn value<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Option<Bound<'py, PyAny>>> {
    tensor.look(py)?;
    let array = tensor.array();
    // Packed elements never come alone.
    let (1, Some(size)) = (array.elements(), array.dtype.itemsize()) else { return Ok(None) };
    let mut bytes = [0u8; 8];
    array.memory.source(&(array.offset..array.offset + size)).copy_to(0..size, &mut bytes[..size]);
    let int = |value: i128| value.into_pyobject(py).map(Bound::into_any).map_err(PyErr::from);
    let float = |value: f64| PyFloat::new(py, value).into_any();
    Ok(Some(match array.dtype {
        DType::Bool => {
            array.check_values()?;
            PyBool::new(py, bytes[0] != 0).to_owned().into_any()
        }
        DType::U8 => int(bytes[0].into())?,
        DType::I8 => int(i8::from_le_bytes(first(bytes)).into())?,
        DType::U16 => int(u16::from_le_bytes(first(bytes)).into())?,
        DType::I16 => int(i16::from_le_bytes(first(bytes)).into())?,
        DType::U32 => int(u32::from_le_bytes(first(bytes)).into())?,
        DType::I32 => int(i32::from_le_bytes(first(bytes)).into())?,
        DType::U64 => int(u64::from_le_bytes(bytes).into())?,
        DType::I64 => int(i64::from_le_bytes(bytes).into())?,
        DType::F16 => float(half::f16::from_le_bytes(first(bytes)).into()),
        DType::BF16 => float(half::bf16::from_le_bytes(first(bytes)).into()),
        DType::F32 => float(f32::from_le_bytes(first(bytes)).into()),
        DType::F64 => float(f64::from_le_bytes(bytes)),
        DType::F8E4M3 => float(F8E4M3(bytes[0]).to_f32().into()),
        DType::F8E5M2 => float(F8E5M2(bytes[0]).to_f32().into()),
        DType::F8E4M3Fnuz => float(F8E4M3Fnuz(bytes[0]).to_f32().into()),
        DType::F8E5M2Fnuz => float(F8E5M2Fnuz(bytes[0]).to_f32().into()),
        DType::F8E8M0 => float(F8E8M0(bytes[0]).to_f32().into()),
        DType::C64 => {
            let imaginary: [u8; 4] = *bytes.last_chunk().unwrap_or(&[0; 4]);
            let (real, imaginary) = (f32::from_le_bytes(first(bytes)), f32::from_le_bytes(imaginary));
            PyComplex::from_doubles(py, real.into(), imaginary.into()).into_any()
        }
        DType::F4 | DType::F6E2M3 | DType::F6E3M2 => return Ok(None),
    }))
}

/// The first of eight bytes.
fn first<const N: usize>(bytes: [u8; 8]) -> [u8; N] {
    *bytes.first_chunk().unwrap_or(&[0; N])
}

fn only<'py>(py: Python<'py>, tensor: &Tensor, what: &str) -> PyResult<Bound<'py, PyAny>> {
    value(py, tensor)?.ok_or_else(|| {
        let array = tensor.array();
        let (name, dtype, shape) = (quote(array.name), array.dtype, array.shape);
        PyTypeError::new_err(format!(
            "tensor {name} ({dtype} {shape:?}) is not one number, so it has no {what}; .numpy() gives its elements"
        ))
    })
}

/// `int(tensor)`.
pub(super) fn int<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
    py.get_type::<PyInt>().call1((only(py, tensor, "int")?,))
}

/// `float(tensor)`.
pub(super) fn float<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
    py.get_type::<PyFloat>().call1((only(py, tensor, "float")?,))
}

/// `complex(tensor)`.
pub(super) fn complex<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
    py.get_type::<PyComplex>().call1((only(py, tensor, "complex")?,))
}

/// `operator.index(tensor)`: of a scalar of integers.
pub(super) fn index<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
    let found = if tensor.array().shape.is_empty() { value(py, tensor)? } else { None };
    found.filter(|value| value.is_exact_instance_of::<PyInt>()).ok_or_else(|| {
        PyTypeError::new_err(format!(
            "tensor {} is no scalar of integers, so it is no index",
            quote(tensor.array().name)
        ))
    })
}

/// `bool(tensor)`.
pub(super) fn truth(py: Python<'_>, tensor: &Tensor) -> PyResult<bool> {
    if let Some(value) = value(py, tensor)? {
        return value.is_truthy();
    }
    let array = tensor.array();
    let (name, dtype, shape) = (quote(array.name), array.dtype, array.shape);
    let text = format!(
        "the truth of tensor {name} ({dtype} {shape:?}) is ambiguous; use .numpy().any(), .all() or .size"
    );
    Err(PyValueError::new_err(text))
}

/// `format(tensor, spec)`: of one number as Python formats it.
pub(super) fn format(tensor: &Bound<'_, Tensor>, spec: &str) -> PyResult<String> {
    if spec.is_empty() {
        return tensor.str()?.extract();
    }
    let value = only(tensor.py(), tensor.get(), "format")?;
    value.call_method1("__format__", (spec,))?.extract()
}

/// Compares element by element, as numpy does.
pub(super) fn compare<'py>(
    tensor: &Bound<'py, Tensor>,
    other: &Bound<'py, PyAny>,
    how: CompareOp,
) -> PyResult<Bound<'py, PyAny>> {
    // numpy asks the other one back, which is not to come here again.
    let array = |object: &Bound<'py, PyAny>| match object.cast::<Tensor>() {
        Ok(tensor) => tensor.get().numpy(tensor.py()),
        Err(_) => Ok(object.clone()),
    };
    array(tensor.as_any())?.rich_compare(array(other)?, how)
}

/// `value in tensor`: whether any element is.
pub(super) fn contains(tensor: &Bound<'_, Tensor>, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    let found = compare(tensor, value, CompareOp::Eq)?;
    tensor.py().import("numpy")?.call_method1("any", (found,))?.is_truthy()
}

/// Iterates over the first axis.
pub(super) fn rows<'py>(tensor: &Bound<'py, Tensor>) -> PyResult<Bound<'py, PyAny>> {
    let py = tensor.py();
    let Some(&rows) = tensor.get().array().shape.first() else {
        let text = format!(
            "tensor {} is a scalar: there is nothing to iterate over",
            quote(tensor.get().array().name)
        );
        return Err(PyTypeError::new_err(text));
    };
    let builtins = py.import("builtins")?;
    let range = builtins.call_method1("range", (rows,))?;
    builtins.call_method1("map", (tensor.getattr("__getitem__")?, range))
}
