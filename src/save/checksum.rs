//! Checksums in a file being made: declared with its header, computed from what was written.
//!
//! The metadata entry has the same length whatever the checksums are. So the header is first written with
//! zeros, and once the data is there, with the sums of what the file really holds.

use crate::diff::digest::{self, CHECKSUMS};
use crate::diff::hash_all;
use crate::error::{Error, Result};
use crate::format::safetensors;
use crate::layout::Layout;
use crate::os::ExclusiveFile;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// The layout with room for checksums, if they are wanted, or its metadata carries some: those were
/// another content's.
pub(crate) fn declare(layout: &Layout, wanted: bool) -> Option<Layout> {
    if !wanted && !layout.metadata().contains_key(CHECKSUMS) {
        return None;
    }
    Some(stated(layout, &vec![0; layout.len()]))
}

/// The layout with these checksums, in file order.
pub(crate) fn stated(layout: &Layout, sums: &[u128]) -> Layout {
    let mut layout = layout.clone();
    let names = layout.iter().map(|info| info.name());
    let text = digest::encode(names.zip(sums.iter().copied()));
    let mut metadata = layout.metadata().clone();
    metadata.insert(CHECKSUMS, text);
    layout.set_metadata(Some(metadata));
    layout
}

/// The header for a declared layout, once all data can be read.
pub(crate) fn header(
    layout: &Layout,
    path: &Path,
    read: impl Fn(Range<usize>, &mut [u8]) -> std::io::Result<()> + Sync,
) -> Result<Vec<u8>> {
    let ranges: Vec<Range<usize>> = layout.iter().map(|info| info.bytes()).collect();
    let lens: Vec<usize> = ranges.iter().map(ExactSizeIterator::len).collect();
    let sums = hash_all(&lens, |tensor, part, to| {
        let start = ranges[tensor].start;
        read(start + part.start..start + part.end, to)
    });
    let sums = sums.map_err(Error::io(path, "reading back what was written"))?;
    if let Some(header) = safetensors::encode_placed(&stated(layout, &sums), path)? {
        return Ok(header);
    }
    // Room was made for the checksums of other tensors: then there are none.
    let mut layout = layout.clone();
    let mut metadata = layout.metadata().clone();
    metadata.remove(CHECKSUMS);
    layout.set_metadata(Some(metadata));
    safetensors::encode_placed(&layout, path)?
        .ok_or_else(|| Error::Argument("the header does not fit".into()))
}

/// Writes the checksums of what `file` holds into its header, if they were declared.
pub(crate) fn seal(layout: &Layout, file: &ExclusiveFile, path: &Path) -> Result<()> {
    if !layout.metadata().contains_key(CHECKSUMS) {
        return Ok(());
    }
    let read = |range: Range<usize>, to: &mut [u8]| file.file().read_exact_at(to, range.start as u64);
    let header = header(layout, path, read)?;
    file.write_all_at(&header, 0).map_err(Error::io(path, "writing the header"))
}
