//! A mapping as the kernel has it.

use crate::os::fork::{self, Listed};
use memmap2::MmapRaw;
use std::io;
use std::ops::{Deref, Range};

/// A mapping as the kernel has it; an output's is not inherited by children.
#[derive(Debug)]
pub(super) struct Raw {
    // Declared first: it is unmapped before it is forgotten. (The other way round a child could be forked in between,
    // and unmap what it has come to have there.)
    map: MmapRaw,
    #[cfg_attr(not(feature = "python"), allow(dead_code))] // it is there for its end
    listed: Option<Listed>,
}

impl From<MmapRaw> for Raw {
    fn from(map: MmapRaw) -> Self {
        Self { map, listed: None }
    }
}

impl Deref for Raw {
    type Target = MmapRaw;
    fn deref(&self) -> &MmapRaw {
        &self.map
    }
}

impl Raw {
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
        Ok(Self { map, listed: Some(listed) })
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
