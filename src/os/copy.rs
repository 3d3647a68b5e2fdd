//! Bytes from file to file, without passing through this process where the kernel can do that.

use super::disk::{self, Op};
use crate::work::cancel;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// Makes `to`, an empty file, share all blocks of `from` (FICLONE), and take its length. `false` where the file
/// system cannot; then nothing has happened.
pub(crate) fn clone(from: &File, to: &File) -> io::Result<bool> {
    #[cfg(target_os = "linux")]
    return disk::act(Op::Copy(from, to), || match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::INVAL | Errno::XDEV | Errno::PERM) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    });
    #[cfg(not(target_os = "linux"))]
    Ok({
        let _ = (from, to);
        false
    })
}

/// Copies `len` bytes between places in two files. A file that ends before is `UnexpectedEof`.
pub(crate) fn copy_range(
    from: &File,
    from_offset: u64,
    to: &File,
    to_offset: u64,
    len: u64,
) -> io::Result<()> {
    disk::act(Op::Copy(from, to), || {
        let mut done = 0;
        while done < len {
            cancel::check()?;
            done += match step(from, from_offset + done, to, to_offset + done, len - done)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                copied => copied,
            };
        }
        Ok(())
    })
}

/// Makes `to`, which is empty, hold the first `len` bytes of `from`: sharing its blocks where the file
/// system can, else copied. Returns whether the blocks are shared.
///
/// # Errors
/// What the calls answer; [`io::ErrorKind::UnexpectedEof`] if `from` is shorter.
pub(crate) fn clone_or_copy(from: &File, to: &File, len: u64) -> io::Result<bool> {
    if !clone(from, to)? {
        copy_range(from, 0, to, 0, len)?;
        return Ok(false);
    }
    // A clone is the whole file, of whatever length.
    disk::resize(to, len)?;
    #[cfg(target_os = "linux")]
    break_sharing_by_the_block(to);
    Ok(true)
}

/// `struct fsxattr` of linux/fs.h.
#[cfg(target_os = "linux")]
#[repr(C)]
#[derive(Default)]
struct Attributes {
    xflags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    copy_on_write_extent_size: u32,
    padding: [u8; 8],
}

/// Has xfs give each block that is written in a clone its own block, and not one of 32 around it, which
/// would take a third of a model's space (for minutes) for one block in a hundred. A hint, and best effort.
#[cfg(target_os = "linux")]
fn break_sharing_by_the_block(file: &File) {
    use std::os::fd::AsRawFd as _;
    /// `_IOR('X', 31, struct fsxattr)` and `_IOW('X', 32, struct fsxattr)`.
    const GET: u64 = 0x801c_581f;
    const SET: u64 = 0x401c_5820;
    const HAS_COPY_ON_WRITE_EXTENT_SIZE: u32 = 0x0001_0000;
    let Ok(block) = rustix::fs::fstatvfs(file).map(|stat| u32::try_from(stat.f_bsize).unwrap_or_default())
    else {
        return;
    };
    let mut attributes = Attributes::default();
    // SAFETY: the request writes one `struct fsxattr`, which `attributes` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), GET as _, &raw mut attributes) } != 0 {
        return;
    }
    attributes.xflags |= HAS_COPY_ON_WRITE_EXTENT_SIZE;
    attributes.copy_on_write_extent_size = block;
    // SAFETY: the request reads one `struct fsxattr`, which `attributes` is.
    unsafe { libc::ioctl(file.as_raw_fd(), SET as _, &raw const attributes) };
}

/// Copies some of `len` bytes, and says how many.
fn step(from: &File, from_offset: u64, to: &File, to_offset: u64, len: u64) -> io::Result<u64> {
    const BUFFER: usize = 1 << 20;
    // The kernel's own limit on one call is below 2 GiB, and a signal should not wait for that.
    let some = usize::try_from(len).unwrap_or(usize::MAX).min(64 << 20);
    #[cfg(target_os = "linux")]
    {
        let (mut a, mut b) = (from_offset, to_offset);
        match rustix::fs::copy_file_range(from, Some(&mut a), to, Some(&mut b), some) {
            // Some file systems answer 0 for what they cannot copy: reading tells.
            Ok(copied) if copied > 0 => return Ok(copied as u64),
            Err(Errno::INTR) => return step(from, from_offset, to, to_offset, len),
            Ok(_) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::XDEV | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut buffer = vec![0; some.min(BUFFER)];
    let read = from.read_at(&mut buffer, from_offset)?;
    to.write_all_at(&buffer[..read], to_offset)?;
    Ok(read as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_copied_to_another_offset_and_no_further() {
        let bytes: Vec<u8> = (0..300_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(&bytes, 0).unwrap();
        copy_range(&from, 77, &to, 5000, 200_000).unwrap();
        let mut copied = vec![1; 205_000];
        to.read_exact_at(&mut copied, 0).unwrap();
        assert!(copied[..5000].iter().all(|&b| b == 0) && copied[5000..] == bytes[77..200_077]);
        assert_eq!(to.metadata().unwrap().len(), 205_000);
        let past = copy_range(&from, 299_990, &to, 0, 11).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_clone_is_whole_or_nothing() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(&[7; 10_000], 0).unwrap();
        let expected = if clone(&from, &to).unwrap() { 10_000 } else { 0 };
        assert_eq!(to.metadata().unwrap().len(), expected);
    }

    #[test]
    fn cloned_or_copied_a_file_has_the_same_bytes() {
        for len in [0, 1, 5000, (2 << 20) + 7] {
            let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 249).unwrap()).collect();
            let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            from.write_all_at(&bytes, 0).unwrap();
            clone_or_copy(&from, &to, len as u64).unwrap();
            let mut read = vec![0; len];
            to.read_exact_at(&mut read, 0).unwrap();
            assert!(read == bytes && to.metadata().unwrap().len() == len as u64, "{len}");
        }
    }
}
