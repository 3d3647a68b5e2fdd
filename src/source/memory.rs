//! Bytes in memory.

use super::{Bytes, checked_len};
use crate::error::Result;
use std::path::Path;

impl Bytes for &[u8] {
    fn len(&self) -> u64 {
        (**self).len() as u64
    }

    fn path(&self) -> &Path {
        Path::new("")
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let range = offset..offset.saturating_add(to.len() as u64);
        let len = checked_len(self, &range)?;
        // Inside the slice, whose length fits.
        let start = usize::try_from(offset).unwrap_or_default();
        to.copy_from_slice(&self[start..start + len]);
        Ok(())
    }
}
