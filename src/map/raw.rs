//! A mapping as the kernel has it, or memory that a caller lends.

use crate::os::fork::{self, Listed};
use memmap2::MmapRaw;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// A mapping as the kernel has it; an output's is not inherited by children. Or memory that a caller lends.
#[derive(Debug)]
pub(super) struct Raw {
    // Declared first: it is unmapped before it is forgotten. (The other way round a child could be forked in between,
    // and unmap what it has come to have there.)
    memory: Memory,
    #[cfg_attr(not(feature = "python"), allow(dead_code))] // it is there for its end
    listed: Option<Listed>,
}

#[derive(Debug)]
enum Memory {
    Mapped(MmapRaw),
    Lent(Lent),
}

/// Bytes that a caller lends: to read, and never to write.
struct Lent {
    // INVARIANT: what `AsRef` of the owner's value gave, once. It is borrowed from that for as long as this value
    // lives: an `Arc`'s value does not move, and is not given out to be changed.
    bytes: *const [u8],
    _owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
}

// SAFETY: the bytes are read alone, and their owner may be on any thread.
unsafe impl Send for Lent {}
// SAFETY: as for Send.
unsafe impl Sync for Lent {}

impl std::fmt::Debug for Lent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lent").field("len", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl From<MmapRaw> for Raw {
    fn from(map: MmapRaw) -> Self {
        Self { memory: Memory::Mapped(map), listed: None }
    }
}

impl Raw {
    /// The bytes of a value, where they lie.
    pub(super) fn lent(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let bytes = std::ptr::from_ref((*owner).as_ref());
        Self { memory: Memory::Lent(Lent { bytes, _owner: owner }), listed: None }
    }

    /// As it is mapped; `None` for memory that is lent.
    pub(super) fn map(&self) -> Option<&MmapRaw> {
        match &self.memory {
            Memory::Mapped(map) => Some(map),
            Memory::Lent(_) => None,
        }
    }

    /// The first byte. That of memory that is lent is to be read alone.
    pub(super) fn as_mut_ptr(&self) -> *mut u8 {
        match &self.memory {
            Memory::Mapped(map) => map.as_mut_ptr(),
            Memory::Lent(lent) => lent.bytes.cast::<u8>().cast_mut(),
        }
    }

    pub(super) fn len(&self) -> usize {
        match &self.memory {
            Memory::Mapped(map) => map.len(),
            Memory::Lent(lent) => lent.bytes.len(),
        }
    }

    /// madvise(2) of all of it. Memory that is lent is its owner's, who advises it.
    pub(super) fn advise(&self, advice: memmap2::Advice) -> io::Result<()> {
        self.map().map_or(Ok(()), |map| map.advise(advice))
    }

    /// madvise(2) of a part, as [`Raw::advise`].
    pub(super) fn advise_range(&self, advice: memmap2::Advice, start: usize, len: usize) -> io::Result<()> {
        self.map().map_or(Ok(()), |map| map.advise_range(advice, start, len))
    }

    /// What `map` maps, withheld from children that are forked.
    ///
    /// # Errors
    /// Those of `map`; what madvise(2) answers.
    pub(super) fn withheld(map: impl FnOnce() -> io::Result<MmapRaw>) -> io::Result<Self> {
        let (map, listed) = fork::withhold(|| {
            let map = map()?;
            #[cfg(target_os = "linux")]
            map.advise(memmap2::Advice::DontFork)?;
            let pages = pages(&map);
            Ok((map, pages))
        })?;
        Ok(Self { memory: Memory::Mapped(map), listed: Some(listed) })
    }

    /// Does what makes the memory this process's own, in place; from then on children inherit it.
    ///
    /// # Errors
    /// Those of `detach`; the memory is withheld as before then.
    #[cfg(feature = "python")]
    pub(super) fn detached(&self, detach: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match &self.listed {
            Some(listed) => listed.inherit_after(detach),
            None => detach(),
        }
    }
}

/// The pages that a mapping consists of.
fn pages(map: &MmapRaw) -> Range<usize> {
    let page = rustix::param::page_size();
    let start = map.as_ptr().addr() / page * page;
    start..(map.as_ptr().addr() + map.len()).next_multiple_of(page)
}

#[cfg(test)]
mod tests {
    use super::super::{Advice, Backing, Mapping, SharedMemory};
    use super::*;

    #[test]
    fn memory_that_is_lent_is_neither_written_nor_advised_and_its_owner_lives_as_long() {
        let owner: Arc<[u8]> = vec![7u8; 3 * 4096].into();
        let mut mapping = Mapping::lent(Arc::new(owner.clone()));
        assert_eq!((mapping.backing(), mapping.len()), (Backing::Lent, owner.len()));
        assert_eq!(mapping.as_bytes().as_ptr(), owner.as_ptr());
        assert!(mapping.try_as_bytes_mut().is_err() && mapping.part_mut(0..1).is_err());
        assert!(mapping.as_bytes_mut().is_empty());
        for advice in [Advice::Normal, Advice::Random, Advice::HugePage] {
            mapping.advise(advice).unwrap();
        }
        let held = Arc::strong_count(&owner);
        let shared = SharedMemory::of(Arc::new(mapping));
        #[cfg(feature = "python")]
        assert!(shared.is_read_only() && !shared.is_mapped());
        assert_eq!(Arc::strong_count(&owner), held);
        drop(shared);
        assert_eq!(Arc::strong_count(&owner), held - 1);
    }
}
