//! Making file pages this process's own in bulk.
//!
//! The kernel copies a written page of a file mapping 4 KiB at a time, with a fault for each. Where a whole
//! range will be written, copying it once into fresh huge pages and moving those over the range
//! (mremap(2), `MREMAP_FIXED`) takes a fault for each 2 MiB instead. Where huge pages are refused, the copies
//! are of small ones, made by all threads at once all the same.

use super::CHUNK;
use crate::work::each_in_parallel;
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mremap_fixed, munmap};
use std::io;

/// Bytes copied and moved at a time: what is needed beyond the copies themselves.
const BLOCK: usize = 32 * CHUNK;

/// Replaces the pages that hold `len` bytes at `ptr` by private copies of them, in huge pages unless they are refused.
///
/// # Safety
/// Those pages are mapped, private, readable and writable, owned by the caller, and nobody writes to them
/// meanwhile. Pointers into them stay valid.
pub(super) unsafe fn promote(ptr: *mut u8, len: usize, huge_pages: bool) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let page = rustix::param::page_size();
    let (start, end) = (ptr.addr() / page * page, (ptr.addr() + len).next_multiple_of(page));
    // Cut at huge-page addresses, so that every block but the ends can be made of huge pages.
    let mut blocks = Vec::new();
    let mut from = start;
    while from < end {
        let to = ((from / BLOCK + 1) * BLOCK).min(end);
        blocks.push(Block { target: ptr.with_addr(from), len: to - from });
        from = to;
    }
    each_in_parallel(blocks, |block: Block| {
        // SAFETY: the block lies in the caller's pages; blocks do not overlap.
        unsafe { promote_block(block.target, block.len, huge_pages) }
    })
}

/// Pages to replace by one thread.
struct Block {
    target: *mut u8,
    len: usize,
}

// SAFETY: an address of pages that the caller of `promote` owns, handed to one thread.
unsafe impl Send for Block {}

/// # Safety
/// As [`promote`]; `target` and `len` are multiples of the page size.
unsafe fn promote_block(target: *mut u8, len: usize, huge_pages: bool) -> io::Result<()> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // Room to shift the copy until its huge pages fall where the target's do: mremap moves only those whole.
    let room = len + CHUNK;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
    let fresh = unsafe { mmap_anonymous(std::ptr::null_mut(), room, prot, flags) }?;
    let fresh = Mapped { ptr: fresh.cast(), len: room };
    let shift = target.addr().wrapping_sub(fresh.ptr.addr()) % CHUNK;
    // The parts before and behind the copy have guards of their own: once the copy is moved away, its old
    // addresses may at any time be another thread's.
    let copy = fresh.ptr.wrapping_add(shift);
    let _before = Mapped { ptr: fresh.ptr, len: shift };
    let _behind = Mapped { ptr: copy.wrapping_add(len), len: room - shift - len };
    std::mem::forget(fresh);
    let fresh = Mapped { ptr: copy, len };
    let advice = if huge_pages { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
    // SAFETY: inside the fresh mapping. Only advice: without huge pages the copy is made of small ones.
    unsafe { madvise(copy.cast(), len, advice) }.ok();
    // SAFETY: `target` is readable by the caller's promise and not written meanwhile; `copy` is fresh, ours
    // and as long; they are different mappings.
    unsafe { std::ptr::copy_nonoverlapping(target, copy, len) };
    // SAFETY: moves pages that are ours over pages that the caller owns; the bytes are equal, so whoever
    // reads meanwhile sees no change.
    match unsafe { mremap_fixed(copy.cast(), len, len, MremapFlags::MAYMOVE, target.cast()) } {
        Ok(_) => {
            std::mem::forget(fresh);
            Ok(())
        }
        // SAFETY: the copy is still where it was, and is the target's bytes.
        Err(error) => unsafe { fill_gap(target, copy, len) }.map_err(|_| error.into()),
    }
}

/// mremap(2) unmaps what it replaces before it does all that may fail: for want of memory where the system promises no
/// more than there is (`vm.overcommit_memory=2`). Then there is nothing at `target`, and the bytes are put there anew: it
/// is promoted all the same. Where there is no memory for that either, nobody may touch it any more (`SIGSEGV`), and its
/// bytes are lost; what another thread maps in between might come to lie there.
///
/// # Errors
/// There is something at `target`, as a rule what was there before; or no memory.
///
/// # Safety
/// `copy` is readable for `len` bytes. What is at `target`, if it is nothing, the caller may have.
unsafe fn fill_gap(target: *mut u8, copy: *const u8, len: usize) -> io::Result<()> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: a mapping that takes nobody's place.
    match unsafe { mmap_anonymous(target.cast(), len, ProtFlags::READ | ProtFlags::WRITE, flags) } {
        Ok(made) if made == target.cast() => {
            // SAFETY: readable by the caller's promise; `target` was mapped just now, for as many bytes.
            unsafe { std::ptr::copy_nonoverlapping(copy, target, len) };
            Ok(())
        }
        // A kernel before 4.17 takes the address for a wish.
        Ok(elsewhere) => {
            drop(Mapped { ptr: elsewhere.cast(), len });
            Err(rustix::io::Errno::EXIST.into())
        }
        Err(error) => {
            crate::os::fork::close_gap(target.addr()..target.addr() + len);
            Err(error.into())
        }
    }
}

/// Pages mapped here, and not moved away.
struct Mapped {
    ptr: *mut u8,
    len: usize,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: pages of our own mapping that nobody else knows of.
            unsafe { munmap(self.ptr.cast(), self.len) }.ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::map::{CHUNK, Mapping};
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;
    use std::time::Duration;

    #[test]
    fn promoted_pages_hold_the_same_bytes_edits_included_and_belong_to_the_process() {
        let len = 3 * CHUNK + 5000;
        let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        // SAFETY: a file of our own, unlinked, not written any more.
        let mut mapping = unsafe { Mapping::open_copy_on_write(&file, len) }.unwrap();
        mapping.try_as_bytes_mut().unwrap()[CHUNK + 1] = 255;
        let mut expected = bytes.clone();
        expected[CHUNK + 1] = 255;
        mapping.promote(100..CHUNK + 200).unwrap();
        assert!(mapping.as_bytes() == expected);
        let pages = mapping.residency(0..CHUNK).unwrap();
        assert_eq!(pages.private, pages.pages);
        assert_eq!(mapping.residency(2 * CHUNK..len).unwrap().private, 0);
        mapping.promote(0..len).unwrap();
        assert!(mapping.as_bytes() == expected);
        mapping.try_as_bytes_mut().unwrap().fill(1);
        let mut on_disk = vec![0; len];
        file.read_exact_at(&mut on_disk, 0).unwrap();
        assert!(on_disk == bytes);
        assert!(mapping.promote(0..len + 1).is_err());
    }

    #[test]
    fn where_moving_left_nothing_the_copy_is_put_and_where_something_is_it_stays() {
        let (page, copy) = (rustix::param::page_size(), vec![7u8; 20_000]);
        let target = memmap2::MmapMut::map_anon(copy.len()).unwrap();
        let (at, mapped) = (target.as_ptr().cast_mut(), copy.len().next_multiple_of(page));
        // SAFETY: as long a copy; nothing is there that anybody needs.
        assert!(unsafe { super::fill_gap(at, copy.as_ptr(), copy.len()) }.is_err());
        assert!(target.iter().all(|&byte| byte == 0));
        // SAFETY: pages of `target`, which are looked at again only once there is something.
        unsafe { rustix::mm::munmap(at.cast(), mapped) }.unwrap();
        // SAFETY: as above. Where another thread was faster there is its memory now, and this one's is gone.
        if unsafe { super::fill_gap(at, copy.as_ptr(), copy.len()) }.is_err() {
            std::mem::forget(target);
            return;
        }
        assert_eq!(&target[..], &copy[..]);
    }

    #[test]
    fn locks_and_unlocks_that_race_with_promoting_hold() {
        let len = 16 * CHUNK;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; len], 0).unwrap();
        // SAFETY: a file of our own, unlinked, not written any more.
        let mapping = unsafe { Mapping::open_copy_on_write(&file, len) }.unwrap();
        let pages = mapping.pages(Path::new("f"));
        let part = CHUNK + 4096..len - CHUNK;
        if let Err(error) = pages.lock(part.clone()) {
            return crate::skipped("locks_and_unlocks_that_race_with_promoting_hold", error);
        }
        let locked = || -> Vec<_> { pages.locked().unwrap() };
        // Out of step with each other, so that they meet at every point of one another.
        for turn in 0..60 {
            pages.unlock(0..len).unwrap();
            std::thread::scope(|scope| {
                // SAFETY: nobody writes.
                scope.spawn(|| unsafe { mapping.promote_shared(0..len) }.unwrap());
                std::thread::sleep(Duration::from_micros(turn * 100));
                pages.lock(part.clone()).unwrap();
            });
            assert!(locked().iter().eq([&part]), "lock {turn}");
            std::thread::scope(|scope| {
                // SAFETY: nobody writes.
                scope.spawn(|| unsafe { mapping.promote_shared(0..len) }.unwrap());
                std::thread::sleep(Duration::from_micros(turn * 100));
                pages.unlock(part.clone()).unwrap();
            });
            assert!(locked().is_empty(), "unlock {turn}");
        }
        assert!(mapping.as_bytes().iter().all(|&byte| byte == 7));
    }
}
