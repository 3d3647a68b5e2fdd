//! Opening files that may be anything.

use super::disk::Dir;
use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

/// The kernel takes a lease away after `/proc/sys/fs/lease-break-time`, 45 seconds unless changed.
const LONGEST_LEASE: Duration = Duration::from_secs(60);

/// Opens a regular file for reading and tells its length; never blocks on a FIFO or touches a device.
///
/// # Errors
/// [`Error::Io`], [`Error::NotRegular`].
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    open(path, false)
}

/// As [`open_regular`], of a file in a directory that is open; `path` is for errors.
///
/// # Errors
/// As [`open_regular`].
pub(crate) fn open_regular_in(dir: &Dir, name: &OsStr, path: &Path) -> Result<(File, u64)> {
    regular(path, || dir.open_linked(name))
}

/// As [`open_regular`], for reading and writing.
///
/// # Errors
/// As [`open_regular`].
pub(crate) fn open_regular_to_edit(path: &Path) -> Result<(File, u64)> {
    open(path, true)
}

fn open(path: &Path, edit: bool) -> Result<(File, u64)> {
    let mut options = File::options();
    // O_NONBLOCK: open(2) of a FIFO would wait for a writer.
    options.read(true).write(edit).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    regular(path, || options.open(path))
}

/// What `open` opens, if it is a regular file.
fn regular(path: &Path, open: impl Fn() -> std::io::Result<File>) -> Result<(File, u64)> {
    let begun = Instant::now();
    let file = loop {
        match open() {
            Ok(file) => break file,
            // A regular file under a lease (fcntl(2)) that its holder is asked to give up.
            Err(error)
                if error.kind() == std::io::ErrorKind::WouldBlock && begun.elapsed() < LONGEST_LEASE =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            // What open(2) says of a socket.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                let found = "a socket or a device that is not there";
                return Err(Error::NotRegular { path: path.into(), found });
            }
            // What it says of a directory that is to be written.
            Err(error) if error.raw_os_error() == Some(libc::EISDIR) => {
                return Err(Error::NotRegular { path: path.into(), found: "a directory" });
            }
            Err(error) => return Err(Error::io(path, "opening the file")(error)),
        }
    };
    let metadata = file.metadata().map_err(Error::io(path, "asking for its length"))?;
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok((file, metadata.len()));
    }
    let found = match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_char_device() || kind.is_block_device() => "a device",
        () if kind.is_socket() => "a socket",
        () => "something else",
    };
    Err(Error::NotRegular { path: path.into(), found })
}

/// Reads `len` bytes at `offset`.
///
/// # Errors
/// [`Error::Io`], also where the file has shrunk since its length was asked for.
pub(crate) fn read_exact_at(file: &File, path: &Path, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let allocated = bytes.try_reserve_exact(len);
    allocated.map_err(|_| Error::io(path, "reading the header")(std::io::ErrorKind::OutOfMemory.into()))?;
    bring_pages(bytes.spare_capacity_mut());
    while bytes.len() < len {
        let at = offset + bytes.len() as u64;
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut bytes), at) {
            Ok(0) => {
                let ended = std::io::ErrorKind::UnexpectedEof.into();
                return Err(Error::io(path, "reading the header")(ended));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io(path, "reading the header")(error.into())),
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

/// Has a large buffer's pages made at once, rather than by a fault each. Only advice.
fn bring_pages(buffer: &mut [std::mem::MaybeUninit<u8>]) {
    const LARGE: usize = 128 << 10;
    #[cfg(target_os = "linux")]
    if buffer.len() >= LARGE {
        let page = rustix::param::page_size();
        let start = buffer.as_mut_ptr().addr().next_multiple_of(page);
        let end = (buffer.as_mut_ptr().addr() + buffer.len()) / page * page;
        let at = buffer.as_mut_ptr().with_addr(start).cast();
        // SAFETY: whole pages inside memory that is borrowed for writing; their content stays.
        unsafe { rustix::mm::madvise(at, end - start, rustix::mm::Advice::LinuxPopulateWrite) }.ok();
    }
}
