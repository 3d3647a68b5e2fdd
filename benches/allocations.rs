//! How many heap allocations opening and viewing 20,000 tensors take. Prints one line of JSON.

// A counting allocator is unsafe to write, as mapping a file is to call.
#![allow(unsafe_code, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use maptensors::{DType, Model};
use safetensors::SafeTensors;

const TENSORS: usize = 20_000;

static COUNT: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `run` returns, and how many allocations it took.
fn counted<T>(run: impl FnOnce() -> T) -> (T, u64) {
    let before = COUNT.load(Ordering::Relaxed);
    let made = run();
    (made, COUNT.load(Ordering::Relaxed) - before)
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("many.safetensors");
    let bytes = [7; 64 * 4];
    let views = (0..TENSORS).map(|i| (format!("w.{i}"), (DType::F32, [64], bytes)));
    maptensors::save(views, &path).unwrap();

    // SAFETY: the file is in a directory of its own, and only read from here on.
    let (model, opened) = counted(|| unsafe { Model::open(&path) }.unwrap());
    let ((), viewed) = counted(|| {
        for tensor in model.tensors() {
            black_box(tensor.as_slice::<f32>().unwrap());
        }
    });

    let file = std::fs::read(&path).unwrap();
    let (theirs, parsed) = counted(|| SafeTensors::deserialize(&file).unwrap());
    let ((), listed) = counted(|| {
        for (_, tensor) in theirs.iter() {
            black_box(tensor.data());
        }
    });
    println!(
        r#"{{"tensors":{TENSORS},"open":{opened},"views":{viewed},"safetensors_open":{parsed},"safetensors_views":{listed}}}"#
    );
}
