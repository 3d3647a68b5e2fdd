//! Opening files that may be anything.

use crate::error::{Error, Result};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Opens a regular file for reading and tells its length; never blocks on a FIFO or touches a device.
///
/// # Errors
/// [`Error::Io`], [`Error::NotRegular`].
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let file = open(path).map_err(|error| {
        // What open(2) says of a socket.
        if error.raw_os_error() == Some(libc::ENXIO) {
            return Error::NotRegular { path: path.into(), found: "a socket or a device that is not there" };
        }
        Error::io(path, "opening the file")(error)
    })?;
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

/// open(2), that does not wait for a FIFO's other end: and hence is not made to wait for a lease's end
/// either, which a header edited in place holds for a moment.
fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    for _ in 0..LEASE_TRIES {
        match options.open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EWOULDBLOCK) => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            file => return file,
        }
    }
    options.open(path)
}

/// A millisecond each.
const LEASE_TRIES: u32 = 1000;

/// Reads `len` bytes at `offset`.
///
/// # Errors
/// [`Error::Io`], also where the file has shrunk since its length was asked for.
pub(crate) fn read_exact_at(file: &File, path: &Path, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let allocated = bytes.try_reserve_exact(len);
    allocated.map_err(|_| Error::io(path, "reading the header")(io::ErrorKind::OutOfMemory.into()))?;
    bytes.resize(len, 0);
    file.read_exact_at(&mut bytes, offset).map_err(Error::io(path, "reading the header"))?;
    Ok(bytes)
}
