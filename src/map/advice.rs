//! How the bytes of a mapping will be used.

/// Advice to the kernel about a mapping; see madvise(2). Advice changes speed, never bytes.
///
/// ```
/// use maptensors::{Advice, Model};
///
/// let model = Model::read("models/digits.safetensors")?;
/// model.mapping(0).unwrap().advise_range(Advice::Random, 0..4096).unwrap();
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Advice {
    /// No special treatment.
    Normal,
    /// Pages will be touched in no order: no read-ahead.
    Random,
    /// Pages will be touched once, in order.
    Sequential,
    /// Back the range with huge pages where the file system can. Has effect before the first touch;
    /// every mapping of weights made here gets it. Linux only, ignored elsewhere.
    HugePage,
    /// Read every page in now. An I/O error is reported here instead of as a later `SIGBUS`.
    /// Linux 5.14 and later, ignored elsewhere.
    PopulateRead,
}

impl Advice {
    /// The kernel's name for it, where it has one.
    #[cfg_attr(target_os = "linux", allow(clippy::unnecessary_wraps))]
    pub(super) fn kernel(self) -> Option<memmap2::Advice> {
        match self {
            Self::Normal => Some(memmap2::Advice::Normal),
            Self::Random => Some(memmap2::Advice::Random),
            Self::Sequential => Some(memmap2::Advice::Sequential),
            #[cfg(target_os = "linux")]
            Self::HugePage => Some(memmap2::Advice::HugePage),
            #[cfg(target_os = "linux")]
            Self::PopulateRead => Some(memmap2::Advice::PopulateRead),
            #[cfg(not(target_os = "linux"))]
            Self::HugePage | Self::PopulateRead => None,
        }
    }
}
