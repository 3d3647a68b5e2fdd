//! Memory behind a descriptor, which can be made immutable: the one map that needs no promise.

use super::options::{MapOptions, Window};
use super::{Backing, Mapping};
use crate::error::{Error, Result};
use crate::os::fork::Owner;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long sealing waits for who holds the memory just then.
const PATIENCE: Duration = Duration::from_secs(2);

/// What makes a memfd's bytes immutable: nobody may write to it, or change its length, any more.
const IMMUTABLE: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// Memory behind a descriptor (`memfd_create(2)`), this process's own, to be filled and then sealed.
///
/// ```
/// use maptensors::{Memfd, OpenOptions};
///
/// let bytes = std::fs::read("models/digits.safetensors").unwrap();
/// let mut memfd = Memfd::create("weights", bytes.len())?;
/// memfd.as_bytes_mut().copy_from_slice(&bytes);
/// let sealed = memfd.seal()?; // nobody can change it from here on, so opening it is safe
/// let model = OpenOptions::new().over(&sealed)?;
/// assert_eq!(model.len(), 4);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug)]
pub struct Memfd {
    file: File,
    // INVARIANT: of `file`, whole, shared. Nobody else has the descriptor, which is closed on exec.
    mapping: Mapping,
    owner: Owner,
}

impl Memfd {
    /// Makes zeroed memory of `len` bytes. The name is for people who read `/proc`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(name: &str, len: usize) -> Result<Self> {
        Self::create_with(&MapOptions::new(), name, len)
            .map_err(Error::io(Path::new(""), "making memory behind a descriptor"))
    }

    pub(super) fn create_with(options: &MapOptions, name: &str, len: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            // A kernel before 6.3.
            Err(Errno::INVAL) => memfd_create(name, flags),
            made => made,
        }?;
        let file = File::from(fd);
        file.set_len(len as u64)?;
        // SAFETY: the descriptor is new and nobody else's: nobody resizes or writes it before it is sealed.
        let mapping = unsafe { options.map_window(&file, Window { offset: 0, len }, Backing::Output) }?;
        Ok(Self { file, mapping, owner: Owner::me() })
    }

    /// All bytes, to write. A child that is forked has no part in them: there, touching them is `SIGSEGV`. (The sealed
    /// memory it may map.)
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        self.mapping.as_bytes_mut()
    }

    /// Makes the bytes immutable, for everybody and for ever.
    ///
    /// # Errors
    /// [`Error::Io`]; `EBUSY` where the kernel holds its memory for longer than two seconds. [`Error::Argument`] in a
    /// child that was forked: the memory is its parent's.
    pub fn seal(self) -> Result<SealedMemfd> {
        self.owner.check("this memory")?;
        let Self { file, mapping, .. } = self;
        // A mapping that could write would have the seal refused.
        drop(mapping);
        // The kernel refuses while anybody could write to the memory or holds a page of it, as it does itself of what it
        // is moving to another place.
        let began = Instant::now();
        let sealed = loop {
            match fcntl_add_seals(&file, IMMUTABLE | SealFlags::SEAL) {
                Err(Errno::BUSY) if began.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                answer => break answer,
            }
        };
        sealed.map_err(|error| Error::io(Path::new(""), "sealing memory")(error.into()))?;
        Ok(SealedMemfd { file })
    }
}

/// Memory behind a descriptor that nobody can write to, shrink or grow: the kernel sees to it.
///
/// A descriptor from somewhere else becomes one if it carries the seals:
///
/// ```
/// use maptensors::{Memfd, SealedMemfd};
/// use std::os::fd::AsFd as _;
///
/// let sealed = Memfd::create("weights", 100)?.seal()?;
/// let received = std::fs::File::from(sealed.as_fd().try_clone_to_owned().unwrap());
/// assert!(SealedMemfd::try_from(received).is_ok());
/// let a_file = std::fs::File::open("models/digits.safetensors").unwrap();
/// assert!(SealedMemfd::try_from(a_file).is_err()); // could be changed
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug)]
pub struct SealedMemfd {
    // INVARIANT: carries IMMUTABLE. Seals cannot be taken off.
    file: File,
}

impl SealedMemfd {
    /// Length in bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn len(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(Error::io(Path::new(""), "asking for its length"))?.len())
    }

    /// Whether there are no bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The descriptor, to be sent elsewhere.
    pub fn into_file(self) -> File {
        self.file
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

impl TryFrom<File> for SealedMemfd {
    type Error = Error;

    /// # Errors
    /// [`Error::Argument`] for a descriptor without the seals, [`Error::Io`].
    fn try_from(file: File) -> Result<Self> {
        let seals = match fcntl_get_seals(&file) {
            // Not a memfd.
            Err(Errno::INVAL) => SealFlags::empty(),
            seals => seals.map_err(|error| Error::io(Path::new(""), "asking for its seals")(error.into()))?,
        };
        if seals.contains(IMMUTABLE) {
            return Ok(Self { file });
        }
        Err(Error::Argument(format!(
            "the descriptor is not sealed memory: it needs F_SEAL_WRITE, F_SEAL_SHRINK and F_SEAL_GROW, and has {seals:?}"
        )))
    }
}

impl TryFrom<OwnedFd> for SealedMemfd {
    type Error = Error;

    /// # Errors
    /// As for a file.
    fn try_from(fd: OwnedFd) -> Result<Self> {
        File::from(fd).try_into()
    }
}

impl AsFd for SealedMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
