//! Copying many tensors into a file at once.

use crate::map::{CHUNK, RawSlice};
use crate::os::ExclusiveFile;
use crate::work;
use crate::work::cancel;
use std::io;

/// Where bytes of a file are put.
pub(crate) enum Target<'a> {
    /// The file's whole mapping.
    Memory(&'a mut [u8]),
    /// The file, written at offsets.
    File(&'a ExclusiveFile),
}

/// Copies each source to its offset, on several threads, cut at huge-page file offsets: a page-cache
/// folio is then filled by one thread in one go, and later readers map it with one fault.
///
/// `jobs` lie inside the file and do not overlap. `copied` is told of bytes as they are.
pub(crate) fn fill(
    target: Target<'_>,
    mut jobs: Vec<(usize, RawSlice<'_>)>,
    copied: &(dyn Fn(usize) + Sync),
) -> io::Result<()> {
    jobs.retain(|(_, source)| source.len() > 0);
    jobs.sort_by_key(|(offset, _)| *offset);
    let (Some(first), Some(last)) = (jobs.first(), jobs.last()) else { return Ok(()) };
    let span = first.0..last.0 + last.1.len();
    let jobs = &jobs;
    match target {
        Target::Memory(all) => {
            let mut rest = &mut all[span.clone()];
            let mut chunks = Vec::new();
            let mut start = span.start;
            while start < span.end {
                let end = ((start / CHUNK + 1) * CHUNK).min(span.end);
                let (chunk, behind) = rest.split_at_mut(end - start);
                chunks.push((start, chunk));
                (rest, start) = (behind, end);
            }
            work::each_in_parallel(chunks, |(start, chunk)| {
                let end = start + chunk.len();
                cancel::check()?;
                for_each_part(jobs, start, end, |source, part, offset| {
                    let to = offset - start;
                    source.copy_to(part.clone(), &mut chunk[to..to + part.len()]);
                    copied(part.len());
                    Ok(())
                })
            })
        }
        Target::File(file) => {
            let chunks = (span.start / CHUNK..span.end.div_ceil(CHUNK)).collect();
            work::each_in_parallel(chunks, |i: usize| {
                cancel::check()?;
                for_each_part(jobs, i * CHUNK, (i + 1) * CHUNK, |source, part, offset| {
                    let len = part.len();
                    source.write_to(part, file.file(), offset as u64)?;
                    copied(len);
                    Ok(())
                })
            })
        }
    }
}

/// Calls `each` with the part of every source that falls into `start..end`, and that part's offset.
fn for_each_part<'j, 's>(
    jobs: &'j [(usize, RawSlice<'s>)],
    start: usize,
    end: usize,
    mut each: impl FnMut(&'j RawSlice<'s>, std::ops::Range<usize>, usize) -> io::Result<()>,
) -> io::Result<()> {
    let first = jobs.partition_point(|(offset, source)| offset + source.len() <= start);
    for (offset, source) in jobs[first..].iter().take_while(|(offset, _)| *offset < end) {
        let part = start.saturating_sub(*offset)..(end - offset).min(source.len());
        let at = offset + part.start;
        each(source, part, at)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::Mapping;
    use crate::os::disk::Dir;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn memory_and_file_are_filled_alike_across_chunk_boundaries(
            pieces in proptest::collection::vec((0usize..100, 0usize..3_000_000), 1..8)
        ) {
            let (mut end, mut expected, mut contents) = (0, Vec::new(), Vec::new());
            for (i, &(gap, len)) in pieces.iter().enumerate() {
                expected.resize(end + gap, 0);
                let bytes: Vec<u8> = (0..len).map(|j| u8::try_from((i + j) % 255 + 1).unwrap()).collect();
                expected.extend(&bytes);
                contents.push((end + gap, bytes));
                end += gap + len;
            }
            let jobs = || contents.iter().rev().map(|(at, bytes)| (*at, RawSlice::from(&bytes[..]))).collect();

            let mut memory = Mapping::owned(end, 0).unwrap();
            fill(Target::Memory(memory.as_bytes_mut()), jobs(), &|_| ()).unwrap();
            prop_assert!(memory.as_bytes() == expected);

            let dir = tempfile::tempdir().unwrap();
            let file = ExclusiveFile::create(&Dir::open(dir.path()).unwrap(), 0o600).unwrap();
            file.allocate(end as u64).unwrap();
            fill(Target::File(&file), jobs(), &|_| ()).unwrap();
            prop_assert!(Mapping::read(file.file(), end, 0).unwrap().as_bytes() == expected);
        }
    }
}
