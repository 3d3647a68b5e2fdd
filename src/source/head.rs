//! Bytes of which the first are known already.

use super::Bytes;
use crate::error::Result;
use crate::layout::Text;
use std::ops::Range;
use std::path::Path;

/// Bytes with their first ones read once, for all who look at those: what kind of file they are, and what its header
/// says first.
pub(crate) struct Head<'b> {
    bytes: &'b dyn Bytes,
    // INVARIANT: as many as LEN, or all there are.
    head: Vec<u8>,
}

impl<'b> Head<'b> {
    /// A tar archive is known by what stands at byte 257.
    const LEN: u64 = 512;

    /// # Errors
    /// As [`Bytes::read`].
    pub(crate) fn of(bytes: &'b dyn Bytes) -> Result<Self> {
        let head = bytes.read(0..bytes.len().min(Self::LEN))?;
        Ok(Self { bytes, head })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.head
    }

    fn known(&self, range: &Range<u64>) -> Option<&[u8]> {
        let at = |place| usize::try_from(place).ok();
        self.head.get(at(range.start)?..at(range.end)?)
    }
}

impl Bytes for Head<'_> {
    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn path(&self) -> &Path {
        self.bytes.path()
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        match self.known(&(offset..offset.saturating_add(to.len() as u64))) {
            Some(known) => to.copy_from_slice(known),
            None => self.bytes.read_at(offset, to)?,
        }
        Ok(())
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        self.known(&range).map_or_else(|| self.bytes.read(range.clone()), |known| Ok(known.to_vec()))
    }

    fn text(&self, range: Range<u64>) -> Result<Text> {
        self.bytes.text(range)
    }
}
