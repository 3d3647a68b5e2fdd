//! Bytes in memory that the kernel backs with a file. The only room that talks to the kernel about
//! memory; the crate's `unsafe` lives here.
//!
//! # The stable-file contract
//!
//! For the life of a mapping and everything derived from it, nobody — this process through another
//! descriptor included — writes to, truncates or punches holes in that *inode*. Renaming over it and
//! unlinking it are fine; that is how every save here replaces a file. Break it and the bytes under a
//! `&[T]` change (undefined behaviour) or the process gets `SIGBUS`. `MAP_PRIVATE` does **not** protect:
//! pages not yet written still show the file.
//!
//! Hence [`Model::open`](crate::Model::open) is an `unsafe fn`, next to the safe
//! [`Model::read`](crate::Model::read): the same interface over owned memory, and the answer on file
//! systems where mapping is refused or slow.
#![allow(unsafe_code)]

mod advice;
#[cfg(feature = "cli")]
pub(crate) mod cached;
mod copy;
pub(crate) mod disk;
mod exclusive;
mod file;
#[cfg(target_os = "linux")]
pub(crate) mod lease;
mod lock;
mod mapping;
mod memory;
mod pages;
mod parallel;
#[cfg(target_os = "linux")]
mod private;
#[cfg(target_os = "linux")]
mod promote;
mod residency;
#[cfg(feature = "python")]
mod shared;
mod source;
mod text;

pub use advice::Advice;
pub(crate) use copy::{clone, clone_or_copy, copy_range};
pub(crate) use exclusive::{ExclusiveFile, mode_of_new_files};
pub(crate) use file::{open_regular, read_exact_at};
pub use mapping::{Backing, Mapping};
pub(crate) use memory::Memory;
pub use pages::Evicted;
pub(crate) use pages::Pages;
pub(crate) use parallel::each_in_parallel;
pub use residency::Residency;
#[cfg(feature = "python")]
pub(crate) use shared::SharedMemory;
pub(crate) use source::Source;
pub(crate) use text::FileText;

/// Elsewhere there are none.
#[cfg(not(target_os = "linux"))]
pub(crate) mod lease {
    use std::fs::File;
    use std::io;

    pub(crate) fn take(_: &File) -> io::Result<bool> {
        Ok(false)
    }

    pub(crate) fn give_up(_: &File) -> io::Result<()> {
        Ok(())
    }
}

/// Work on files is cut at this file offset: a huge page, so that the page cache is filled with them.
pub(crate) const CHUNK: usize = 2 << 20;
