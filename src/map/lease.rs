//! Whether anybody else has a file open or mapped.

use std::fs::File;

/// As in asm-generic/fcntl.h; the libc crate has it for musl only.
#[cfg(target_os = "linux")]
const F_SETSIG: i32 = 10;

/// A write lease: while it is held, no other descriptor and no mapping of the file is anywhere on this
/// machine, and whoever opens it waits (or is told `EWOULDBLOCK`, if it will not).
pub(crate) struct Lease<'f> {
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))]
    file: &'f File,
}

#[cfg(target_os = "linux")]
impl<'f> Lease<'f> {
    /// Asks for one on a file opened to read and write; `None` where somebody else has it open, where it is
    /// another user's, and where the file system has no leases.
    pub(crate) fn of(file: &'f File) -> Option<Self> {
        // The holder is told of others who wait by a signal, SIGIO by default, which kills. SIGURG does
        // nothing unless it is asked for.
        let asked =
            fcntl(file, F_SETSIG, libc::SIGURG) && fcntl(file, libc::F_SETLEASE, libc::F_WRLCK.into());
        asked.then_some(Self { file })
    }
}

#[cfg(not(target_os = "linux"))]
impl<'f> Lease<'f> {
    /// There are none.
    pub(crate) fn of(_: &'f File) -> Option<Self> {
        None
    }
}

#[cfg(target_os = "linux")]
impl Drop for Lease<'_> {
    fn drop(&mut self) {
        fcntl(self.file, libc::F_SETLEASE, libc::F_UNLCK.into());
    }
}

#[cfg(target_os = "linux")]
fn fcntl(file: &File, command: i32, argument: i32) -> bool {
    use std::os::fd::AsRawFd as _;
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and these commands take a number and
    // touch no memory.
    unsafe { libc::fcntl(file.as_raw_fd(), command, argument) == 0 }
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn a_lease_is_had_only_while_nobody_else_has_the_file() {
        use super::*;
        use memmap2::MmapOptions;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [0; 4096]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert!(Lease::of(&file).is_some());
        let other = File::open(&path).unwrap();
        assert!(Lease::of(&file).is_none(), "open elsewhere");
        // SAFETY: a file of the test's own; the bytes are not looked at.
        let mapped = unsafe { MmapOptions::new().map_copy_read_only(&other) }.unwrap();
        drop(other);
        assert!(Lease::of(&file).is_none(), "mapped, and its descriptor closed");
        drop(mapped);
        assert!(Lease::of(&file).is_some());
    }
}
