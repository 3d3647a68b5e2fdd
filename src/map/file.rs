//! Opening files that may be anything.

use crate::error::{Error, Result};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

/// The kernel takes a lease away after `/proc/sys/fs/lease-break-time`, 45 seconds unless changed.
const LONGEST_LEASE: Duration = Duration::from_secs(60);

/// Opens a regular file for reading and tells its length; never blocks on a FIFO or touches a device.
///
/// # Errors
/// [`Error::Io`], [`Error::NotRegular`].
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let begun = Instant::now();
    let file = loop {
        // O_NONBLOCK: open(2) of a FIFO would wait for a writer.
        match File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path) {
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
    bytes.resize(len, 0);
    file.read_exact_at(&mut bytes, offset).map_err(Error::io(path, "reading the header"))?;
    Ok(bytes)
}
