//! Bytes that others may be changing while they are copied.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes to copy into a file: a slice, or memory of another language that may change meanwhile.
///
/// Never a `&[u8]` for the latter: whoever mutates an array while it is saved gets a structurally valid
/// file with some mixture of old and new values, as with any library that writes from live arrays.
#[derive(Clone, Copy)]
pub(crate) struct RawSlice<'a> {
    // INVARIANT: readable for len bytes as long as 'a.
    ptr: *const u8,
    len: usize,
    life: PhantomData<&'a [u8]>,
}

// SAFETY: a RawSlice only reads, and what it points to is readable from any thread (field invariant).
unsafe impl Send for RawSlice<'_> {}
// SAFETY: as for Send.
unsafe impl Sync for RawSlice<'_> {}

impl<'a> From<&'a [u8]> for RawSlice<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { ptr: bytes.as_ptr(), len: bytes.len(), life: PhantomData }
    }
}

impl RawSlice<'_> {
    /// # Safety
    /// `ptr` is readable for `len` bytes from any thread as long as the value lives.
    pub(crate) unsafe fn from_raw(ptr: *const u8, len: usize) -> Self {
        Self { ptr, len, life: PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether the address of a byte is a multiple of `align`.
    pub(crate) fn is_aligned(&self, at: usize, align: usize) -> bool {
        (self.ptr.addr() + at).is_multiple_of(align)
    }

    /// A part of the bytes.
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn part(&self, part: Range<usize>) -> Self {
        assert!(part.start <= part.end && part.end <= self.len);
        Self { ptr: self.ptr.wrapping_add(part.start), len: part.len(), life: PhantomData }
    }

    /// Copies a part to `to`, which has its length.
    ///
    /// # Panics
    /// If the part lies outside or the lengths differ: a fault of this crate.
    pub(crate) fn copy_to(&self, part: Range<usize>, to: &mut [u8]) {
        assert!(part.start <= part.end && part.end <= self.len && part.len() == to.len());
        // SAFETY: the part lies inside what is readable (assert, field invariant); `to` is ours alone and
        // of the same length; they cannot overlap because `to` is exclusively borrowed memory.
        unsafe {
            std::ptr::copy_nonoverlapping(self.ptr.wrapping_add(part.start), to.as_mut_ptr(), part.len());
        }
    }

    /// Copies everything to `to`, which may overlap it.
    ///
    /// # Safety
    /// `to` is writable for as many bytes, and no reference to them lives.
    #[cfg(feature = "python")]
    pub(crate) unsafe fn copy_to_raw(&self, to: *mut u8) {
        // SAFETY: readable by the field invariant, writable by the caller's promise.
        unsafe { std::ptr::copy(self.ptr, to, self.len) };
    }

    /// Writes a part to `file` at `offset`.
    ///
    /// # Panics
    /// As [`RawSlice::copy_to`].
    pub(crate) fn write_to(&self, part: Range<usize>, file: &File, offset: u64) -> io::Result<()> {
        assert!(part.start <= part.end && part.end <= self.len);
        let (ptr, len) = (self.ptr.wrapping_add(part.start), part.len());
        // SAFETY: the part lies inside what is readable (assert, field invariant).
        unsafe { crate::os::disk::write_raw_at(file, ptr, len, offset) }
    }
}
