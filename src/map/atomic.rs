//! Copying bytes that others may be writing, by atomic operations.
//!
//! Every access is to a whole aligned word of 8 bytes, that of a part of one too: Rust has no meaning for accesses
//! of different sizes that race, and the halves of an element are never seen apart. Relaxed: words are not
//! ordered among themselves.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const WORD: usize = size_of::<u64>();

/// The word that holds the byte at `ptr`, and the byte's place in it.
///
/// # Safety
/// The word is mapped as long as `'a`, and nobody in this process reaches it but by atomic words or from
/// outside Rust.
unsafe fn word<'a>(ptr: *const u8) -> (&'a AtomicU64, usize) {
    let inside = ptr.addr() % WORD;
    #[allow(clippy::cast_ptr_alignment)] // what the subtraction is for
    let start = ptr.wrapping_sub(inside).cast::<u64>().cast_mut();
    // SAFETY: aligned; the rest is the caller's promise.
    (unsafe { AtomicU64::from_ptr(start) }, inside)
}

/// How bytes at `ptr` are cut: those up to the first whole word, and those in whole words.
fn cut(ptr: *const u8, len: usize) -> (usize, usize) {
    let head = (ptr.addr().next_multiple_of(WORD) - ptr.addr()).min(len);
    (head, (len - head) / WORD * WORD)
}

/// Copies out.
///
/// # Safety
/// Every word that holds one of the `to.len()` bytes at `ptr` is as [`word`] asks.
pub(super) unsafe fn load(ptr: *const u8, to: &mut [u8]) {
    let (head, whole) = cut(ptr, to.len());
    let (first, rest) = to.split_at_mut(head);
    let (middle, last) = rest.split_at_mut(whole);
    // SAFETY: a part of the caller's bytes, inside one word.
    unsafe { load_edge(ptr, first) };
    for (i, bytes) in middle.chunks_exact_mut(WORD).enumerate() {
        // SAFETY: one of the caller's words.
        let (word, _) = unsafe { word(ptr.wrapping_add(head + i * WORD)) };
        bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
    }
    // SAFETY: as for the first.
    unsafe { load_edge(ptr.wrapping_add(head + whole), last) };
}

/// Copies in.
///
/// # Safety
/// As [`load`], and the words are writable.
pub(super) unsafe fn store(ptr: *mut u8, from: &[u8]) {
    let (head, whole) = cut(ptr, from.len());
    let (first, rest) = from.split_at(head);
    let (middle, last) = rest.split_at(whole);
    // SAFETY: a part of the caller's bytes, inside one word.
    unsafe { store_edge(ptr, first) };
    for (i, bytes) in middle.chunks_exact(WORD).enumerate() {
        // SAFETY: one of the caller's words.
        let (word, _) = unsafe { word(ptr.wrapping_add(head + i * WORD)) };
        let mut value = [0; WORD];
        value.copy_from_slice(bytes);
        word.store(u64::from_ne_bytes(value), Relaxed);
    }
    // SAFETY: as for the first.
    unsafe { store_edge(ptr.wrapping_add(head + whole), last) };
}

/// # Safety
/// As [`load`], of bytes that lie in one word.
unsafe fn load_edge(ptr: *const u8, to: &mut [u8]) {
    if !to.is_empty() {
        // SAFETY: the caller's word.
        let (word, inside) = unsafe { word(ptr) };
        to.copy_from_slice(&word.load(Relaxed).to_ne_bytes()[inside..inside + to.len()]);
    }
}

/// The word's other bytes keep what others write to them meanwhile.
///
/// # Safety
/// As [`store`], of bytes that lie in one word.
unsafe fn store_edge(ptr: *mut u8, from: &[u8]) {
    if !from.is_empty() {
        // SAFETY: the caller's word.
        let (word, inside) = unsafe { word(ptr) };
        let with = |old: u64| {
            let mut bytes = old.to_ne_bytes();
            bytes[inside..inside + from.len()].copy_from_slice(from);
            Some(u64::from_ne_bytes(bytes))
        };
        // A closure that always answers: this does not fail.
        let _ = word.fetch_update(Relaxed, Relaxed, with);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_run_of_bytes_is_copied_and_no_other_byte_touched() {
        let mut words = [0u64; 6];
        let base = words.as_mut_ptr().cast::<u8>();
        for start in 0..17 {
            for len in 0..=(48 - start) {
                let given: Vec<u8> = (1..).take(len).collect();
                // SAFETY: inside `words`, which nobody else has.
                unsafe { store(base, &[0xee; 48]) };
                // SAFETY: as above.
                unsafe { store(base.wrapping_add(start), &given) };
                let mut all = [0; 48];
                // SAFETY: as above.
                unsafe { load(base, &mut all) };
                let mut expected = [0xee; 48];
                expected[start..start + len].copy_from_slice(&given);
                assert_eq!(all, expected, "{start} {len}");
                let mut back = vec![0; len];
                // SAFETY: as above.
                unsafe { load(base.wrapping_add(start), &mut back) };
                assert_eq!(back, given);
            }
        }
    }

    #[test]
    fn neighbours_in_one_word_do_not_lose_each_others_writes() {
        let words = [const { AtomicU64::new(0) }; 1];
        let base = words.as_ptr().cast::<u8>().cast_mut().expose_provenance();
        std::thread::scope(|scope| {
            for lane in 0..4usize {
                scope.spawn(move || {
                    let ptr = std::ptr::with_exposed_provenance_mut::<u8>(base).wrapping_add(lane * 2);
                    for round in 0..50_000u16 {
                        // SAFETY: inside `words`, reached by atomic words only.
                        unsafe { store(ptr, &round.to_ne_bytes()) };
                        let mut seen = [0; 2];
                        // SAFETY: as above.
                        unsafe { load(ptr, &mut seen) };
                        assert_eq!(u16::from_ne_bytes(seen), round);
                    }
                });
            }
        });
    }
}
