//! A file's content into another file without bringing it into this process.

use rustix::io::Errno;
use std::fs::File;
use std::io;

/// Bytes asked to be copied at once: `copy_file_range(2)` stops at 2 GiB in any case.
const BLOCK: usize = 1 << 30;

/// Makes `to`, which is empty, hold the first `len` bytes of `from`: sharing its blocks where the file
/// system can (`FICLONE`: xfs, btrfs), else copied by the kernel, else through this process. Returns
/// whether the blocks are shared.
///
/// # Errors
/// What the calls answer; [`io::ErrorKind::UnexpectedEof`] if `from` is shorter.
pub(crate) fn clone_or_copy(from: &File, to: &File, len: u64) -> io::Result<bool> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        // A clone is the whole file, of whatever length.
        to.set_len(len)?;
        #[cfg(target_os = "linux")]
        break_sharing_by_the_block(to);
        return Ok(true);
    }
    let (mut read, mut written) = (0, 0);
    while written < len {
        let block = usize::try_from(len - written).unwrap_or(BLOCK).min(BLOCK);
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), block) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // Between file systems that do not know each other.
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                return through_memory(from, to, written, len).map(|()| false);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
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
    if unsafe { libc::ioctl(file.as_raw_fd(), GET, &raw mut attributes) } != 0 {
        return;
    }
    attributes.xflags |= HAS_COPY_ON_WRITE_EXTENT_SIZE;
    attributes.copy_on_write_extent_size = block;
    // SAFETY: the request reads one `struct fsxattr`, which `attributes` is.
    unsafe { libc::ioctl(file.as_raw_fd(), SET, &raw const attributes) };
}

fn through_memory(from: &File, to: &File, start: u64, len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let chunk = super::CHUNK as u64;
    let chunks: Vec<u64> = (start / chunk..len.div_ceil(chunk)).collect();
    super::each_in_parallel(chunks, |i| {
        let (first, last) = ((i * chunk).max(start), ((i + 1) * chunk).min(len));
        let mut bytes = vec![0; usize::try_from(last - first).unwrap_or_default()];
        from.read_exact_at(&mut bytes, first)?;
        to.write_all_at(&bytes, first)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn every_way_of_copying_brings_the_same_bytes() {
        for len in [0, 1, 5000, super::super::CHUNK + 7] {
            let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 249).unwrap()).collect();
            let from = tempfile::tempfile().unwrap();
            from.write_all_at(&bytes, 0).unwrap();
            for way in 0..2 {
                let to = tempfile::tempfile().unwrap();
                if way == 0 {
                    clone_or_copy(&from, &to, len as u64).unwrap();
                } else {
                    through_memory(&from, &to, 0, len as u64).unwrap();
                }
                let mut read = vec![0; len];
                to.read_exact_at(&mut read, 0).unwrap();
                assert!(read == bytes && to.metadata().unwrap().len() == len as u64, "{len} {way}");
            }
            let short = tempfile::tempfile().unwrap();
            assert!(
                clone_or_copy(&short, &tempfile::tempfile().unwrap(), 1 + len as u64).is_err() || len == 0
            );
        }
    }
}
