//! What the kernel does with files: names, descriptors, locks, leases, copies. No file is mapped here to be read.
#![allow(unsafe_code)]

pub(crate) mod disk;
pub(crate) mod fork;
#[cfg(target_os = "linux")]
pub(crate) mod lease;
#[cfg(target_os = "linux")]
pub(crate) mod lock_of_open_file;

mod copy;
mod exclusive;
mod futex;
mod guard;
mod open;
mod unfinished;
mod whereabouts;

pub(crate) use copy::{clone, clone_or_copy, copy_range};
pub(crate) use exclusive::{ExclusiveFile, mode_of_new_files};
pub(crate) use futex::Futex;
pub(crate) use guard::{Guard, Stamp};
pub(crate) use open::{open_regular, open_regular_in, open_regular_to_edit, read_exact_at};
pub(crate) use unfinished::Unfinished;

/// Elsewhere there are none.
#[cfg(not(target_os = "linux"))]
pub(crate) mod lease {
    use std::fs::File;
    use std::io;

    pub(crate) fn take(_: &File) -> io::Result<bool> {
        Ok(false)
    }

    pub(crate) fn is_undisputed(_: &File) -> bool {
        false
    }

    pub(crate) fn give_up(_: &File) -> io::Result<()> {
        Ok(())
    }
}
