//! Writing what Python holds into a tensor's memory.
//!
//! The rules are numpy 2's, and stricter where those lose something without a word: integers must fit, complex numbers
//! become no real ones, and floats become integers only as Python's own numbers, and only whole ones.

use super::base::is_tensor;
use super::modes::OutOfModes;
use super::refusal::{named, refused};
use super::{Held, hold, is_imported, is_of, numpy, out_of_modes, torch};
use crate::dtype::DType;
use crate::error::{Error, quote};
use crate::python::export::Array;
use crate::python::frameworks::numpy_dtype;
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{
    PyBool, PyByteArray, PyBytes, PyComplex, PyDict, PyFloat, PyInt, PyList, PyMemoryView, PyRange, PyTuple,
};
use std::path::PathBuf;

/// Writes `value` into `to`, converting as the value's own framework does.
///
/// # Errors
/// `OverflowError` for integers that do not fit, `TypeError` for a dtype that cannot become the tensor's,
/// `ValueError` for another shape.
pub(in crate::python) fn assign(py: Python<'_>, to: &Array<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
    let name = to.name;
    let value = match value_of(to, value)? {
        Value::Array(array) => array,
        Value::Numbers(_) if to.dtype.itemsize().is_none() => {
            let why = "has packed elements: only an array of its dtype and shape can be assigned";
            return Err(refused(name, why));
        }
        Value::Numbers(numbers) => return assign_numbers(py, to, &numbers),
    };
    let held = hold(name, &value)?;
    let _out = out_of_modes(py, [&held])?;
    if let Held::Torch(tensor) = &held {
        return assign_torch(py, to, tensor).map_err(|error| named_here(py, name, error));
    }
    let given = match &held {
        // Converting is numpy's: of what safetensors does not have as well.
        Held::Numpy(array) if to.dtype.itemsize().is_some() => {
            return assign_numpy(py, to, array).map_err(|error| named_here(py, name, error));
        }
        held => held.look(name)?,
    };
    if given.dtype == to.dtype {
        given.check_values(py, name)?;
        if given.shape == to.shape
            && let (Some(source), Some(_)) = (given.data.source(), to.source())
        {
            to.memory.write(&(to.offset..to.offset + to.nbytes()), source);
            return Ok(());
        }
    }
    if to.dtype.itemsize().is_some() {
        let array = value.call_method0(intern!(py, "numpy"))?;
        return assign_numpy(py, to, &array);
    }
    if given.dtype == to.dtype && given.shape == to.shape {
        return Err(PyTypeError::new_err(format!(
            "tensor {} has packed elements: they are written in one piece",
            quote(name)
        )));
    }
    Err(if given.dtype == to.dtype {
        shape_error(to, &given.shape)
    } else {
        dtype_error(to, given.dtype.name())
    })
}

/// Writes what was looked at, and does not lie in one piece, into `to`, which has its dtype and shape.
pub(in crate::python) fn copy(py: Python<'_>, to: &Array<'_>, array: &Bound<'_, PyAny>) -> PyResult<()> {
    let copied = if is_tensor(array)? {
        let _out = OutOfModes::enter(py)?;
        torch::copy(&to.torch(py, None)?, array, to.dtype)
    } else {
        let numpy = py.import("numpy")?;
        numpy.call_method1(intern!(py, "copyto"), (to.numpy(py)?, array)).map(drop)
    };
    copied.map_err(|error| named(py, to.name, error))
}

/// What is assigned.
enum Value<'py> {
    /// With a dtype of its own.
    Array(Bound<'py, PyAny>),
    /// Python's numbers, and lists of them: numpy would believe anything that says it is an array.
    Numbers(Bound<'py, PyAny>),
}

fn value_of<'py>(to: &Array<'_>, value: &Bound<'py, PyAny>) -> PyResult<Value<'py>> {
    let py = value.py();
    if let Some(number) = number(value)? {
        return Ok(Value::Numbers(number));
    }
    if value.is_instance_of::<PyList>()
        || value.is_instance_of::<PyTuple>()
        || value.is_instance_of::<PyRange>()
    {
        return numbers(to, value, 0).map(|list| Value::Numbers(list.into_any()));
    }
    if is_tensor(value)? || value.hasattr("__array__")? || value.hasattr("__dlpack__")? {
        return Ok(Value::Array(value.clone()));
    }
    if value.is_instance_of::<PyBytes>() || value.is_instance_of::<PyByteArray>() {
        return Err(not_numbers(to));
    }
    // A buffer, through Python: its numbers are checked there.
    let Ok(buffer) = PyMemoryView::from(value) else { return Err(not_numbers(to)) };
    py.import("numpy")?.call_method1("asarray", (buffer,)).map(Value::Array)
}

/// A number of exactly Python's or of numpy's class.
fn number<'py>(value: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = value.py();
    let exact = value.is_exact_instance_of::<PyFloat>()
        || value.is_exact_instance_of::<PyInt>()
        || value.is_exact_instance_of::<PyBool>()
        || value.is_exact_instance_of::<PyComplex>();
    if exact {
        return Ok(Some(value.clone()));
    }
    if is_imported(py, "numpy", "generic")? && is_of(value, &py.import("numpy")?.getattr("generic")?) {
        return Ok(None);
    }
    let class = if value.is_instance_of::<PyInt>() {
        py.get_type::<PyInt>()
    } else if value.is_instance_of::<PyFloat>() {
        py.get_type::<PyFloat>()
    } else if value.is_instance_of::<PyComplex>() {
        py.get_type::<PyComplex>()
    } else {
        return Ok(None);
    };
    class.call1((value,)).map(Some)
}

/// A list, and those in it, of numbers and of arrays that were looked at.
fn numbers<'py>(to: &Array<'_>, values: &Bound<'py, PyAny>, level: usize) -> PyResult<Bound<'py, PyList>> {
    // numpy's arrays have 64 axes at most.
    if level > 64 {
        return Err(refused(to.name, "is assigned a list that is nested more than 64 deep"));
    }
    let list = PyList::empty(values.py());
    for value in values.try_iter()? {
        let value = value?;
        if let Some(number) = number(&value)? {
            list.append(number)?;
        } else if value.is_instance_of::<PyList>() || value.is_instance_of::<PyTuple>() {
            list.append(numbers(to, &value, level + 1)?)?;
        } else if is_tensor(&value)? || value.hasattr("__array__")? || value.hasattr("__dlpack__")? {
            list.append(array_of(to.name, &value)?)?;
        } else {
            return Err(not_numbers(to));
        }
    }
    Ok(list)
}

/// An array of exactly numpy's class.
fn array_of<'py>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = value.py();
    let held = hold(name, value)?;
    match held {
        Held::Numpy(array) => Ok(array),
        Held::Ours(tensor) => tensor.get().numpy(py),
        Held::Torch(tensor) => {
            let _out = OutOfModes::enter(py)?;
            let plain = torch::see(name, &tensor).and_then(torch::Seen::plain);
            let array = plain.and_then(|plain| {
                plain
                    .call_method0("resolve_conj")?
                    .call_method0("resolve_neg")?
                    .call_method0("cpu")?
                    .call_method0("numpy")
            });
            array.map_err(|error| named(py, name, error))
        }
    }
}

fn assign_torch(py: Python<'_>, to: &Array<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
    let seen = torch::see(to.name, value)?;
    let (dtype, shape) = (seen.dtype, seen.shape_in_file(to.name)?);
    if dtype != to.dtype && !torch::can_cast(py, dtype, to.dtype)? {
        return Err(dtype_error(to, dtype.name()));
    }
    if shape != to.shape && (to.dtype.itemsize().is_none() || !shape.is_empty()) {
        return Err(shape_error(to, &shape));
    }
    let plain = seen.plain()?;
    if dtype == DType::Bool {
        torch::check_bools(to.name, &plain)?;
    }
    if let (Some(bounds), Some(_), false) = (bounds(to.dtype), bounds(dtype), dtype == to.dtype)
        && let Some(found) = torch::range_of_integers(&plain, dtype)?
    {
        fits(to, bounds, found)?;
    }
    torch::copy(&to.torch(py, None)?, &plain, to.dtype)
}

/// From an array of exactly numpy's class.
fn assign_numpy(py: Python<'_>, to: &Array<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
    let numpy_module = py.import("numpy")?;
    let (out, from) = (numpy_dtype(py, to.dtype)?, value.getattr("dtype")?);
    if !numpy_module.call_method1("can_cast", (&from, &out, "same_kind"))?.is_truthy()? {
        return Err(dtype_error(to, &from.str()?.to_string()));
    }
    let kind: String = from.getattr("kind")?.extract()?;
    match kind.as_str() {
        "b" => numpy::check_bools(to.name, value)?,
        "i" | "u" => {
            if let Some(bounds) = bounds(to.dtype)
                && value.getattr("size")?.extract::<usize>()? > 0
            {
                let end = |which| value.call_method0(which)?.call_method0("item")?.extract::<i128>();
                fits(to, bounds, (end("min")?, end("max")?))?;
            }
        }
        _ => {}
    }
    copyto(py, to, value)
}

/// From Python's numbers, or lists of them.
fn assign_numbers<'py>(py: Python<'py>, to: &Array<'_>, value: &Bound<'py, PyAny>) -> PyResult<()> {
    let numpy_module = py.import("numpy")?;
    let natural =
        numpy_module.call_method1("asarray", (value,)).map_err(|error| named_here(py, to.name, error))?;
    let kind: String = natural.getattr("dtype")?.getattr("kind")?.extract()?;
    let (size, target) = (natural.getattr("size")?.extract::<usize>()?, bounds_or_bool(to.dtype));
    let end = |which| natural.call_method0(which)?.call_method0("item");
    // As the tensor's dtype, element by element: exact, where numpy's guess at a common dtype is not.
    let exactly = |dtype: Bound<'py, PyAny>| {
        let array = numpy_module.call_method1("array", (value, dtype));
        array.map_err(|error| named_here(py, to.name, error))
    };
    let converted = match (kind.as_str(), target) {
        ("i" | "u", Some(bounds)) => {
            if size > 0 {
                fits(to, bounds, (end("min")?.extract()?, end("max")?.extract()?))?;
            }
            natural
        }
        ("b", _) | ("i" | "u" | "f", None) => natural,
        ("f", Some(_)) if size == 0 => natural,
        ("f", Some((low, high))) => {
            let (least, most): (f64, f64) = (end("min")?.extract()?, end("max")?.extract()?);
            let text = format!("tensor {} is {}, and", quote(to.name), to.dtype);
            if least.is_nan() || most.is_nan() {
                return Err(PyValueError::new_err(format!("{text} NaN is no integer")));
            }
            // Rounded, as floats are: what is just outside is seen below.
            #[allow(clippy::cast_precision_loss)]
            if least < low as f64 || most > high as f64 {
                let found = if most > high as f64 { most } else { least };
                return Err(PyOverflowError::new_err(format!("{text} cannot hold {found}")));
            }
            let whole = numpy_module
                .call_method1("equal", (&natural, numpy_module.call_method1("trunc", (&natural,))?))?;
            if !whole.call_method0("all")?.is_truthy()? {
                return Err(PyValueError::new_err(format!(
                    "{text} a fraction is no integer; round it first"
                )));
            }
            exactly(numpy_dtype(py, to.dtype)?)?
        }
        ("c", None) if to.dtype == DType::C64 => natural,
        ("O", target) => {
            for item in natural.getattr("flat")?.try_iter()? {
                if !item?.is_exact_instance_of::<PyInt>() {
                    return Err(not_numbers(to));
                }
            }
            exactly(if target.is_some() { numpy_dtype(py, to.dtype)? } else { numpy_dtype(py, DType::F64)? })?
        }
        ("c", _) => return Err(dtype_error(to, "complex")),
        _ => return Err(not_numbers(to)),
    };
    copyto(py, to, &converted)
}

/// Copies an array of numpy's whose values are known to fit.
fn copyto(py: Python<'_>, to: &Array<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
    let shape: Vec<usize> = value.getattr("shape")?.extract()?;
    if !shape.is_empty() && shape != to.shape {
        return Err(shape_error(to, &shape));
    }
    let options = PyDict::new(py);
    options.set_item("casting", "unsafe")?;
    py.import("numpy")?.call_method("copyto", (to.numpy(py)?, value), Some(&options))?;
    Ok(())
}

/// The integers that a dtype holds; `None` for what is none of integers.
fn bounds(dtype: DType) -> Option<(i128, i128)> {
    match dtype {
        DType::I8 => Some((i8::MIN.into(), i8::MAX.into())),
        DType::I16 => Some((i16::MIN.into(), i16::MAX.into())),
        DType::I32 => Some((i32::MIN.into(), i32::MAX.into())),
        DType::I64 => Some((i64::MIN.into(), i64::MAX.into())),
        DType::U8 => Some((0, u8::MAX.into())),
        DType::U16 => Some((0, u16::MAX.into())),
        DType::U32 => Some((0, u32::MAX.into())),
        DType::U64 => Some((0, u64::MAX.into())),
        _ => None,
    }
}

fn bounds_or_bool(dtype: DType) -> Option<(i128, i128)> {
    if dtype == DType::Bool { Some((0, 1)) } else { bounds(dtype) }
}

fn fits(to: &Array<'_>, (low, high): (i128, i128), (least, most): (i128, i128)) -> PyResult<()> {
    if least >= low && most <= high {
        return Ok(());
    }
    let found = if most > high { most } else { least };
    let (name, dtype) = (quote(to.name), to.dtype);
    Err(PyOverflowError::new_err(format!(
        "tensor {name} is {dtype}, which holds {low} to {high}, not {found}"
    )))
}

fn not_numbers(to: &Array<'_>) -> PyErr {
    PyTypeError::new_err(format!("tensor {} is assigned numbers or an array of them", quote(to.name)))
}

fn dtype_error(to: &Array<'_>, found: &str) -> PyErr {
    Error::DType {
        path: PathBuf::new(),
        tensor: to.name.into(),
        found: to.dtype.to_string(),
        expected: format!(
            "what the value is, {found}, which does not become that by itself; convert it first"
        ),
    }
    .into()
}

fn shape_error(to: &Array<'_>, shape: &[usize]) -> PyErr {
    refused(to.name, &format!("has shape {:?}, the value {shape:?}", to.shape))
}

/// With the name, unless it is one of Python's own that says more by its class.
fn named_here(py: Python<'_>, name: &str, error: PyErr) -> PyErr {
    let says = |text: &str| format!("tensor {}: {text}", quote(name));
    let text = error.value(py).str().map_or_else(|_| String::new(), |text| text.to_string());
    if text.contains(&*quote(name)) {
        return error;
    }
    if error.is_instance_of::<PyOverflowError>(py) {
        return PyOverflowError::new_err(says(&text));
    }
    if error.is_instance_of::<PyTypeError>(py) {
        return PyTypeError::new_err(says(&text));
    }
    named(py, name, error)
}
