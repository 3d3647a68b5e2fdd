//! The lock of fcntl(2) that belongs to an open file, as flock(2)'s does. One can ask whether it is held without taking
//! it (`F_OFD_GETLK`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// Whether anybody else holds it.
pub(crate) fn is_held(file: &File) -> io::Result<bool> {
    fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK).map(|kind| kind != libc::F_UNLCK)
}

/// Takes it, where nobody else has it.
pub(crate) fn take(file: &File) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, libc::F_WRLCK).map(drop)
}

/// Gives it back.
pub(crate) fn give_back(file: &File) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, libc::F_UNLCK).map(drop)
}

/// The kind of lock that the call leaves in the structure.
fn fcntl(file: &File, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: a structure of numbers, for which zeros are values: the whole file, from its start, of no process.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    // SAFETY: the descriptor is open, and these commands read and write the structure alone.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock.l_type.into()),
    }
}
