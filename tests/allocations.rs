//! How much memory opening, viewing and saving take: counted by the allocator of this binary, which
//! therefore holds one test.
#![allow(unsafe_code)]

use maptensors::{DType, Draft, Layout, Model};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

mod common;

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    CALLS.fetch_add(1, Relaxed);
    PEAK.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        grow(memory.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(memory) }
    }
    unsafe fn alloc_zeroed(&self, memory: Memory) -> *mut u8 {
        grow(memory.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(memory) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, memory: Memory) {
        LIVE.fetch_sub(memory.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, memory) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocator calls, and the most bytes held at once beyond what was held before.
fn cost<T>(work: impl FnOnce() -> T) -> (T, usize, usize) {
    let (calls, live) = (CALLS.load(Relaxed), LIVE.load(Relaxed));
    PEAK.store(live, Relaxed);
    let result = work();
    (result, CALLS.load(Relaxed) - calls, PEAK.load(Relaxed) - live)
}

const MIB: usize = 1 << 20;

/// Private writable memory of this process, mapped or from the heap, that the kernel lets it have.
fn limit_private_memory_to(more: usize) -> Rlimit {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmData:")).unwrap();
    let now: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    let old = getrlimit(Resource::Data);
    let limit = Rlimit { current: Some(now * 1024 + more as u64), maximum: old.maximum };
    setrlimit(Resource::Data, limit).unwrap();
    old
}

#[test]
fn views_opening_and_saving_allocate_next_to_nothing() {
    let dir = common::disk_dir();

    // The counter counts.
    let (kept, calls, peak) = cost(|| vec![1u8; MIB]);
    assert!(calls >= 1 && peak >= kept.len());

    // All views of 20,000 tensors: no allocation at all.
    let path = dir.path().join("many.safetensors");
    let many = (0..20_000)
        .fold(Layout::builder(), |builder, i| builder.tensor(format!("layers.{i}.w"), DType::F32, &[4]));
    Draft::create(&path, &many.build().unwrap()).unwrap().commit().unwrap();
    // SAFETY: nobody else knows the file; it is not written while mapped.
    let model = unsafe { Model::open(&path) }.unwrap();
    let (elements, calls, _) =
        cost(|| model.tensors().map(|t| t.as_slice::<f32>().unwrap().len()).sum::<usize>());
    assert_eq!((elements, calls), (80_000, 0));
    let names: Vec<&str> = model.names().collect();
    let (found, calls, _) = cost(|| names.iter().filter(|name| model.tensor(name).is_ok()).count());
    assert_eq!((found, calls), (20_000, 0));
    // Opening takes the header and a table; a dozen calls, not one for each tensor.
    // SAFETY: as above.
    let (_, calls, _) = cost(|| unsafe { Model::open(&path) }.unwrap());
    assert!(calls < 200, "{calls} allocations to open 20,000 tensors");

    // A terabyte.
    let path = dir.path().join("sparse.safetensors");
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, 1u64 << 40);
    std::fs::write(&path, common::file_of(&header, 0)).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len((8 + header.len() as u64) + (1 << 40)).unwrap();
    // SAFETY: as above.
    let (model, _, peak) = cost(|| unsafe { Model::open(&path) }.unwrap());
    assert!(peak < MIB && model.tensor("w").unwrap().as_bytes().len() == 1 << 40, "{peak} bytes");

    // A save of 256 MiB: less than 64 MiB, whether from the heap or mapped. Thread stacks count as well.
    let data = vec![3u8; 64 * MIB];
    for mapped in [true, false] {
        let path = dir.path().join("large.safetensors");
        let tensors = ["a", "b", "c", "d"].map(|name| (name, common::bytes_tensor(&data)));
        let old = limit_private_memory_to(64 * MIB);
        let options = maptensors::SaveOptions::new().durable(false).mapped(mapped);
        let (saved, _, peak) = cost(|| options.save(tensors, &path));
        setrlimit(Resource::Data, old).unwrap();
        saved.unwrap();
        assert!(peak < 64 * MIB, "{peak} bytes");
        assert!(std::fs::metadata(&path).unwrap().len() > 256 * MIB as u64);
    }
    // The limit limits.
    let old = limit_private_memory_to(64 * MIB);
    let refused = Model::read(dir.path().join("large.safetensors"));
    setrlimit(Resource::Data, old).unwrap();
    assert_eq!(refused.unwrap_err().kind().name(), "Io");
}
