//! What a model is opened from.

use super::assemble::Assembled;
use super::{Location, OpenOptions, locate};
use crate::error::Result;
use crate::map::Mapping;
#[cfg(target_os = "linux")]
use crate::map::{Backing, SealedMemfd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What can be mapped as it lies on a disk: a path, or [`Files`]. A path is a file, an index
/// (`*.safetensors.index.json`), or a directory that holds either.
///
/// ```
/// use maptensors::{Files, Model};
///
/// let parts = ["00001", "00002"].map(|n| format!("models/digits-sharded/model-{n}-of-00002.safetensors"));
/// // SAFETY: nobody writes to these files while they are mapped.
/// let (set, list) = unsafe { (Model::open("models/digits-sharded")?, Model::open(Files::new(parts))?) };
/// assert_eq!(set.len(), list.len());
/// # Ok::<(), maptensors::Error>(())
/// ```
pub trait OpenFrom: sealed::Locate {}

/// What can be read into memory: everything that can be mapped ([`OpenFrom`]), the [`Content`] of a file, and a
/// `&SealedMemfd`.
///
/// ```
/// use maptensors::{Content, Model, ModelMut};
///
/// let bytes = std::fs::read("models/digits.safetensors").unwrap();
/// let (copy, file) = (ModelMut::read(Content::new(&bytes))?, Model::read("models/digits.safetensors")?);
/// assert!(maptensors::diff(&copy, &file)?.is_empty());
/// # Ok::<(), maptensors::Error>(())
/// ```
pub trait ReadFrom: sealed::Read {}

/// Memory that nobody changes as long as it is there, so that a model may lie over it without a copy and without a
/// promise: bytes that are lent (`Arc<[u8]>`, `Vec<u8>`, the `bytes` crate's `Bytes`, …), and a `&SealedMemfd`.
///
/// ```
/// use maptensors::{Memfd, Model};
///
/// let bytes = std::fs::read("models/digits.safetensors").unwrap();
/// let mut memfd = Memfd::create("weights", bytes.len())?;
/// memfd.as_bytes_mut().copy_from_slice(&bytes);
/// let sealed = memfd.seal()?;
/// let (over_memory, over_bytes) = (Model::over(&sealed)?, Model::over(bytes)?);
/// assert!(maptensors::diff(&over_memory, &over_bytes)?.is_empty());
/// # Ok::<(), maptensors::Error>(())
/// ```
pub trait OverMemory: sealed::Over {}

/// Files that are one model together, each named.
///
/// ```
/// use maptensors::{Error, Files, Model};
///
/// let twice = Files::new(["models/digits.safetensors"; 2]); // every tensor is in both
/// assert!(matches!(Model::read(&twice), Err(Error::Duplicate { .. })));
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files(Vec<PathBuf>);

impl Files {
    /// The files at these paths, in this order.
    pub fn new(paths: impl IntoIterator<Item: AsRef<Path>>) -> Self {
        Self(paths.into_iter().map(|path| path.as_ref().to_owned()).collect())
    }
}

impl<P: AsRef<Path>> FromIterator<P> for Files {
    fn from_iter<I: IntoIterator<Item = P>>(paths: I) -> Self {
        Self::new(paths)
    }
}

/// The bytes of one file, borrowed while they are copied; the path in errors is empty. [`ModelRef`](crate::ModelRef)
/// looks at them where they lie.
///
/// ```
/// use maptensors::{Content, OpenOptions};
///
/// let archive = [&[7; 512], &std::fs::read("models/digits.safetensors").unwrap()[..]].concat();
/// let model = OpenOptions::new().window(512..).read(Content::new(&archive))?;
/// assert_eq!(model.len(), 4);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Content<'a>(&'a [u8]);

impl<'a> Content<'a> {
    /// These bytes.
    pub fn new(bytes: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        Self(bytes.as_ref())
    }
}

impl std::fmt::Debug for Content<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Content").field("len", &self.0.len()).finish()
    }
}

/// What is read, found.
pub enum Readable<'a> {
    Files(Location),
    Content(&'a [u8]),
    #[cfg(target_os = "linux")]
    Sealed(&'a SealedMemfd),
}

/// Keeps the traits ours: what they find is no part of the interface.
pub(super) mod sealed {
    use super::{Assembled, Location, Mapping, OpenOptions, Readable, Result};

    pub trait Locate {
        fn locate(self) -> Result<Location>;
    }

    pub trait Read {
        fn find<'a>(self) -> Result<Readable<'a>>
        where
            Self: 'a;
    }

    pub trait Over {
        fn over(self, options: &OpenOptions) -> Result<Assembled<Mapping>>;
    }
}

impl<P: AsRef<Path>> OpenFrom for P {}
impl<P: AsRef<Path>> sealed::Locate for P {
    fn locate(self) -> Result<Location> {
        locate(self.as_ref())
    }
}

impl OpenFrom for Files {}
impl sealed::Locate for Files {
    fn locate(self) -> Result<Location> {
        Ok(Location::files(self.0))
    }
}

impl OpenFrom for &Files {}
impl sealed::Locate for &Files {
    fn locate(self) -> Result<Location> {
        self.clone().locate()
    }
}

impl<F: OpenFrom> ReadFrom for F {}
impl<F: OpenFrom> sealed::Read for F {
    fn find<'a>(self) -> Result<Readable<'a>>
    where
        F: 'a,
    {
        self.locate().map(Readable::Files)
    }
}

impl ReadFrom for Content<'_> {}
impl sealed::Read for Content<'_> {
    fn find<'a>(self) -> Result<Readable<'a>>
    where
        Self: 'a,
    {
        Ok(Readable::Content(self.0))
    }
}

impl<B: AsRef<[u8]> + Send + Sync + 'static> OverMemory for B {}
impl<B: AsRef<[u8]> + Send + Sync + 'static> sealed::Over for B {
    fn over(self, options: &OpenOptions) -> Result<Assembled<Mapping>> {
        options.over_lent(Arc::new(self))
    }
}

#[cfg(target_os = "linux")]
impl ReadFrom for &SealedMemfd {}
#[cfg(target_os = "linux")]
impl sealed::Read for &SealedMemfd {
    fn find<'a>(self) -> Result<Readable<'a>>
    where
        Self: 'a,
    {
        Ok(Readable::Sealed(self))
    }
}

#[cfg(target_os = "linux")]
impl OverMemory for &SealedMemfd {}
#[cfg(target_os = "linux")]
impl sealed::Over for &SealedMemfd {
    fn over(self, options: &OpenOptions) -> Result<Assembled<Mapping>> {
        options.over_sealed(self, Backing::ReadOnly)
    }
}
