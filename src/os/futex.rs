//! A word in a file that threads of several processes sleep on: futex(2).

use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::time::Duration;

/// A word of a file's page, mapped only to have an address: the kernel knows the word by its file and offset, and so do
/// other processes. It is not read here, so that whoever truncates the file gets an error, and nobody a `SIGBUS`.
pub(crate) struct Futex {
    // INVARIANT: at least `at + 4` bytes, readable unless the file is truncated; only the kernel looks at them.
    #[cfg_attr(not(all(target_os = "linux", target_pointer_width = "64")), allow(dead_code))]
    page: MmapRaw,
    #[cfg_attr(not(all(target_os = "linux", target_pointer_width = "64")), allow(dead_code))]
    at: usize,
}

impl Futex {
    /// The word at an offset in the first `len` bytes of a file.
    ///
    /// # Errors
    /// What mmap(2) answers; `InvalidInput` for a word that does not lie there, or not on a multiple of four.
    pub(crate) fn in_file(file: &File, len: usize, at: usize) -> io::Result<Self> {
        if !at.is_multiple_of(4) || at.checked_add(4).is_none_or(|end| end > len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Mapping raw is safe: nothing here reads or writes through it.
        Ok(Self { page: MmapOptions::new().len(len).map_raw_read_only(file)?, at })
    }

    /// Sleeps until it is woken, at most as long as told, if the word is `value`. `false` where the kernel cannot.
    pub(crate) fn wait(&self, value: u32, most: Duration) -> bool {
        #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
        {
            let timeout = libc::timespec {
                tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: most.subsec_nanos().into(),
            };
            let none = std::ptr::null::<u32>();
            // SAFETY: FUTEX_WAIT reads the word and the timeout, and writes nothing. An address that is not
            // there any more (a truncated file) is EFAULT.
            let woken = unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.word(),
                    libc::FUTEX_WAIT,
                    value,
                    &raw const timeout,
                    none,
                    0,
                )
            };
            let error = io::Error::last_os_error().raw_os_error();
            woken == 0 || matches!(error, Some(libc::EAGAIN | libc::EINTR | libc::ETIMEDOUT))
        }
        #[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
        {
            let _ = (value, most);
            false
        }
    }

    /// Wakes everybody who sleeps on it.
    pub(crate) fn wake(&self) {
        #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
        {
            let none = std::ptr::null::<u32>();
            // SAFETY: FUTEX_WAKE looks at what the address maps, and writes nothing.
            unsafe { libc::syscall(libc::SYS_futex, self.word(), libc::FUTEX_WAKE, i32::MAX, none, none, 0) };
        }
    }

    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    fn word(&self) -> *const u8 {
        self.page.as_ptr().wrapping_add(self.at)
    }
}
