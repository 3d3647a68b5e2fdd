//! Bytes in memory that the kernel backs with a file. The only room that talks to the kernel about memory.
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
//! systems where mapping is refused or slow. What becomes of a model where the contract is broken, kind by kind, is a
//! table under [`OpenOptions::guard`](crate::OpenOptions::guard), which turns most of it into errors.
//!
//! A smaller contract is [`ModelShared::open`](crate::ModelShared::open)'s: nobody truncates the file or punches
//! holes in it. Others may write, so its bytes are reached by atomic copies ([`SharedMemory`]) and never borrowed.
//! Sealed memory ([`SealedMemfd`]) has none: the kernel keeps it.
#![allow(unsafe_code)]

mod advice;
mod atomic;
#[cfg(feature = "cli")]
pub(crate) mod cached;
mod mapping;
#[cfg(target_os = "linux")]
mod memfd;
mod memory;
mod mlock;
mod options;
mod pages;
#[cfg(target_os = "linux")]
mod private;
#[cfg(target_os = "linux")]
mod promote;
mod raw;
mod raw_slice;
mod residency;
mod shared;
mod text;
mod writable;

pub use advice::Advice;
pub use mapping::{Backing, Mapping};
#[cfg(target_os = "linux")]
pub use memfd::{Memfd, SealedMemfd};
pub(crate) use memory::Memory;
pub use options::MapOptions;
pub(crate) use options::{Window, read_all_at};
pub use pages::Evicted;
pub(crate) use pages::Pages;
pub(crate) use raw_slice::RawSlice;
pub use residency::Residency;
#[cfg(feature = "cli")]
pub(crate) use residency::may_ask;
pub use shared::SharedMemory;
pub(crate) use text::StableFile;
#[cfg(test)]
pub(crate) use text::own_stable_file;
pub(crate) use writable::refused as not_writable;

/// Work on files is cut at this file offset: a huge page, so that the page cache is filled with them.
pub(crate) const CHUNK: usize = 2 << 20;
