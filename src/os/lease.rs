//! Knowing that nobody else has a file open.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// What fcntl(2) calls the choice of the signal; the libc crate does not have it.
const F_SETSIG: libc::c_int = 10;

/// Takes a write lease: granted only while no other descriptor of the file is open, in any process, and
/// nobody has it mapped (fcntl(2), "Leases"). While it is held, whoever opens the file waits until it is
/// given up, at most for `/proc/sys/fs/lease-break-time`. It ends with the descriptor.
///
/// `false` where someone has the file open, or the file system knows no leases, or does not know who has it mapped.
pub(crate) fn take(file: &File) -> io::Result<bool> {
    if !knows_mappings(file) {
        return Ok(false);
    }
    // What tells of a waiting opener is by default SIGIO, which kills; SIGURG is ignored unless asked for.
    // SAFETY: fcntl(2) on a descriptor that is open, with an integer argument.
    let set = unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) };
    if set == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES | libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP) => Ok(false),
        _ => Err(error),
    }
}

/// Whether a file system is known to keep its mappings for itself. One that is laid over another maps the file of that
/// one: overlayfs, which is the root of most containers, grants leases on files that others have mapped.
fn knows_mappings(file: &File) -> bool {
    /// From linux/magic.h: ext2, ext3 and ext4; tmpfs; XFS; Btrfs.
    const KNOWN: [u32; 4] = [0xef53, 0x0102_1994, 0x5846_5342, 0x9123_683e];
    rustix::fs::fstatfs(file)
        .is_ok_and(|stat| u32::try_from(stat.f_type).is_ok_and(|kind| KNOWN.contains(&kind)))
}

/// Gives a lease up. Closing the descriptor does so too, but only once nothing maps the file through it.
pub(crate) fn give_up(file: &File) -> io::Result<()> {
    // SAFETY: fcntl(2) on a descriptor that is open, with an integer argument.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Whether the lease is held and nobody waits for it to be given up.
pub(crate) fn is_undisputed(file: &File) -> bool {
    // SAFETY: fcntl(2) on a descriptor that is open, without an argument.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) == libc::F_WRLCK }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_granted_only_while_nobody_else_has_the_file_open_or_mapped() {
        // Not below a container's overlay, which does not tell.
        let memory = std::path::Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [1; 5000]).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();

        let file = open();
        assert!(take(&file).unwrap() && is_undisputed(&file));
        give_up(&file).unwrap();
        File::open(&path).unwrap();
        drop(file);

        let reader = File::open(&path).unwrap();
        assert!(!take(&open()).unwrap());
        // SAFETY: nobody writes to the file.
        let mapped = unsafe { memmap2::Mmap::map(&reader) }.unwrap();
        drop(reader);
        assert!(!take(&open()).unwrap());
        drop(mapped);
        assert!(take(&open()).unwrap());
    }
}
