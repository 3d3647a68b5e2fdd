//! A tensor in memory that others may write.

use super::check_dtype;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::layout::TensorInfo;
use crate::map::SharedMemory;
use std::path::{Path, PathBuf};

/// A tensor of a [`ModelShared`](crate::ModelShared): what is written reaches the file, and everyone who maps it.
///
/// Elements are copied in and out, never borrowed: others may write at any time. Copies are of machine words, by
/// relaxed atomic operations: an element of 1, 2, 4 or 8 bytes that lies at a multiple of its size is never
/// torn, but which elements of a tensor are new and which old is for readers and writers to agree on.
///
/// ```
/// # let path = std::env::temp_dir().join("maptensors-doc-tensor-shared.safetensors");
/// # std::fs::copy("models/digits.safetensors", &path).unwrap();
/// // SAFETY: nobody truncates the file.
/// let model = unsafe { maptensors::ModelShared::open(&path)? };
/// let bias = model.tensor("fc1.bias")?;
/// bias.store(3, 0.5_f32)?;
/// assert_eq!(bias.load::<f32>(3)?, 0.5);
/// let mut values = [0.0_f32; 64];
/// bias.copy_to(&mut values)?;
/// assert_eq!(values[3], 0.5);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct TensorShared<'a> {
    info: TensorInfo<'a>,
    /// Of the whole file: the tensor's bytes lie where its info says.
    memory: &'a SharedMemory,
    path: &'a Path,
}

/// Bytes copied at once on their way to elements: they stay in the nearest cache.
const STEP: usize = 4096;

impl<'a> TensorShared<'a> {
    /// `memory` is the file's, and holds the tensor.
    pub(crate) fn new(info: TensorInfo<'a>, memory: &'a SharedMemory, path: &'a Path) -> Self {
        Self { info, memory, path }
    }

    /// Where the tensor is, and what.
    pub fn info(&self) -> TensorInfo<'a> {
        self.info
    }

    /// The tensor's name.
    pub fn name(&self) -> &'a str {
        self.info.name()
    }

    /// What one element is.
    pub fn dtype(&self) -> DType {
        self.info.dtype()
    }

    /// Elements along each axis, outermost first (C order). Empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        self.info.shape()
    }

    /// The bytes of all elements.
    pub fn nbytes(&self) -> usize {
        self.info.bytes().len()
    }

    /// One element (for a packed dtype, one group of them), by its place in C order.
    ///
    /// # Errors
    /// [`Error::DType`] if `T` is another type, [`Error::Argument`] past the end, [`Error::Value`] if a `bool` is
    /// neither 0 nor 1.
    pub fn load<T: Element>(&self, index: usize) -> Result<T> {
        let at = self.place::<T>(index)?;
        let mut buffer = [0u64; 2];
        let bytes = &mut bytemuck::cast_slice_mut(&mut buffer)[..size_of::<T>()];
        self.memory.read_at(at, bytes)?;
        T::cast(bytes)
            .map_err(|e| super::cast_error::<T>(self.name(), bytes, e))
            .and_then(|values| values.first().copied().ok_or_else(|| self.outside(index)))
    }

    /// Writes one element, by its place in C order.
    ///
    /// # Errors
    /// [`Error::DType`], [`Error::Argument`], as [`TensorShared::load`].
    pub fn store<T: Element>(&self, index: usize, value: T) -> Result<()> {
        self.memory.write_at(self.place::<T>(index)?, bytemuck::bytes_of(&value))
    }

    /// Copies all elements out.
    ///
    /// # Errors
    /// [`Error::DType`]; [`Error::Shape`] if `to` has another length; [`Error::Value`] if a `bool` is neither 0
    /// nor 1, with the elements before it copied.
    pub fn copy_to<T: Element>(&self, to: &mut [T]) -> Result<()> {
        check_dtype::<T>(&self.info)?;
        self.fits(size_of_val(to))?;
        let mut buffer = [0u64; STEP / 8];
        let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut buffer);
        let mut at = self.info.bytes().start;
        for part in to.chunks_mut(STEP / size_of::<T>()) {
            let bytes = &mut buffer[..size_of_val(part)];
            self.memory.read_at(at, bytes)?;
            at += bytes.len();
            part.copy_from_slice(T::cast(bytes).map_err(|e| super::cast_error::<T>(self.name(), bytes, e))?);
        }
        Ok(())
    }

    /// Copies all elements in.
    ///
    /// # Errors
    /// [`Error::DType`]; [`Error::Shape`] if `from` has another length.
    pub fn copy_from<T: Element>(&self, from: &[T]) -> Result<()> {
        check_dtype::<T>(&self.info)?;
        self.copy_bytes_from(bytemuck::cast_slice(from))
    }

    /// Writes the same value to all elements.
    ///
    /// # Errors
    /// [`Error::DType`].
    pub fn fill<T: Element>(&self, value: T) -> Result<()> {
        check_dtype::<T>(&self.info)?;
        let part = vec![value; STEP / size_of::<T>()];
        let part: &[u8] = bytemuck::cast_slice(&part);
        let range = self.info.bytes();
        for at in range.clone().step_by(part.len()) {
            self.memory.write_at(at, &part[..part.len().min(range.end - at)])?;
        }
        Ok(())
    }

    /// All elements, copied.
    ///
    /// # Errors
    /// [`Error::DType`], [`Error::Value`], as [`TensorShared::copy_to`].
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        check_dtype::<T>(&self.info)?;
        let mut bytes = vec![0; self.nbytes()];
        self.copy_bytes_to(&mut bytes)?;
        T::collect(&bytes).map_err(|e| super::cast_error::<T>(self.name(), &bytes, e))
    }

    /// Copies the bytes out as they are in the file: little endian, C order.
    ///
    /// # Errors
    /// [`Error::Shape`] if `to` has another length.
    pub fn copy_bytes_to(&self, to: &mut [u8]) -> Result<()> {
        self.fits(to.len())?;
        self.memory.read_at(self.info.bytes().start, to)
    }

    /// Copies bytes in, as they are to be in the file.
    ///
    /// # Errors
    /// [`Error::Shape`] if `from` has another length.
    pub fn copy_bytes_from(&self, from: &[u8]) -> Result<()> {
        self.fits(from.len())?;
        self.memory.write_at(self.info.bytes().start, from)
    }

    /// Has the tensor's pages written to the disk, and waits: see [`SharedMemory::flush`]. A neighbour that has a
    /// part in the first or last page is written with them.
    ///
    /// # Errors
    /// [`Error::Io`], once.
    pub fn flush(&self) -> Result<()> {
        self.memory.flush_to(self.path, self.info.bytes(), true)
    }

    /// As [`TensorShared::flush`], without waiting: see [`SharedMemory::flush_async`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush_async(&self) -> Result<()> {
        self.memory.flush_to(self.path, self.info.bytes(), false)
    }

    /// Where in the file an element starts.
    fn place<T: Element>(&self, index: usize) -> Result<usize> {
        check_dtype::<T>(&self.info)?;
        let range = self.info.bytes();
        let inside = |&at: &usize| at < range.len();
        let at = index.checked_mul(size_of::<T>()).filter(inside).ok_or_else(|| self.outside(index))?;
        Ok(range.start + at)
    }

    fn outside(&self, index: usize) -> Error {
        let (name, shape) = (crate::error::quote(self.name()), self.shape());
        Error::Argument(format!("tensor {name} of shape {shape:?} has no element {index}"))
    }

    fn fits(&self, found: usize) -> Result<()> {
        if found == self.nbytes() {
            return Ok(());
        }
        Err(Error::Shape {
            path: PathBuf::new(),
            tensor: self.name().into(),
            found: found as u64,
            expected: self.info.nbytes(),
        })
    }
}

impl std::fmt::Debug for TensorShared<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorShared({:?}, {}, {:?})", self.name(), self.dtype(), self.shape())
    }
}
