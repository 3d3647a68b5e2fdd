//! What opening, viewing and reading cost, counted and not timed: page faults, system calls, instructions.
//!
//! Limits are a third or so above what was measured when they were set: they catch a mechanism that is
//! lost, not a bad day.
#![allow(unsafe_code)]

use crate::common::{bytes_tensor, child, disk_dir, is_installed, noise, on_tmpfs, role, skip, under};
use maptensors::{DType, Draft, Layout, Model, SaveOptions};
use std::path::Path;
use std::process::Command;

const TENSORS: usize = 20_000;

fn many_tensors(path: &Path) {
    let mut builder = Layout::builder();
    for i in 0..TENSORS {
        builder = builder.tensor(format!("model.layers.{i}.mlp.weight"), DType::F32, &[64]);
    }
    Draft::create(path, &builder.build().unwrap()).unwrap().commit().unwrap();
}

/// Opens the file in `dir` so many times, looking at every tensor.
fn open_and_view(dir: &Path, times: usize) {
    for _ in 0..times {
        // SAFETY: a file of the test's own, which nobody writes any more.
        let model = unsafe { Model::open(dir.join("many.safetensors")) }.unwrap();
        let bytes: usize = model.tensors().map(|tensor| tensor.as_bytes().len()).sum();
        assert_eq!(bytes, TENSORS * 256);
    }
}

const FEW: usize = 1;
const MORE: usize = 6;

/// What `count` says of a process that opens the file, less what starting the process costs: for one open.
fn cost_of_one_open(test: &str, mut count: impl FnMut(Command) -> u64) -> u64 {
    let dir = disk_dir();
    many_tensors(&dir.path().join("many.safetensors"));
    let mut of = |role: &str| count(child(test, role, dir.path()));
    let (few, more) = (of("few"), of("more"));
    more.saturating_sub(few) / (MORE - FEW) as u64
}

/// Whether this process is the one to be counted; if so it has done its work.
fn was_counted() -> bool {
    for (name, times) in [("few", FEW), ("more", MORE)] {
        if let Some(dir) = role(name) {
            open_and_view(&dir, times);
            return true;
        }
    }
    false
}

#[test]
fn opening_twenty_thousand_tensors_takes_a_handful_of_system_calls() {
    const TEST: &str = "opening_twenty_thousand_tensors_takes_a_handful_of_system_calls";
    if was_counted() {
        return;
    }
    if !is_installed("strace") {
        return skip(TEST, "strace is not installed");
    }
    let calls = cost_of_one_open(TEST, |command| {
        let log = tempfile::NamedTempFile::new().unwrap();
        let args = ["-f", "-qq", "-o", log.path().to_str().unwrap()];
        assert!(under("strace", &args, &command).output().unwrap().status.success());
        std::fs::read_to_string(log.path()).unwrap().lines().count() as u64
    });
    // stat (directory?), open, statx, two reads, mmap, madvise, close, munmap; and the allocator's own.
    assert!((8..=42).contains(&calls), "{calls} system calls");
}

#[test]
fn opening_and_viewing_a_tensor_takes_a_bounded_number_of_instructions() {
    const TEST: &str = "opening_and_viewing_a_tensor_takes_a_bounded_number_of_instructions";
    if was_counted() {
        return;
    }
    if !is_installed("valgrind") {
        return skip(TEST, "valgrind is not installed");
    }
    let instructions = cost_of_one_open(TEST, |command| {
        let args = ["--tool=callgrind", "--callgrind-out-file=/dev/null"];
        let output = under("valgrind", &args, &command).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        let line = text.lines().find_map(|line| line.split("Collected : ").nth(1));
        line.unwrap_or_else(|| panic!("{text}")).trim().parse().unwrap()
    });
    let each = instructions / TENSORS as u64;
    // This binary is built with little optimization; a release build takes a fraction.
    assert!((50..=3000).contains(&each), "{each} instructions a tensor");
}

#[test]
fn reading_what_was_saved_takes_at_most_one_fault_a_mebibyte() {
    const TEST: &str = "reading_what_was_saved_takes_at_most_one_fault_a_mebibyte";
    const MIB: usize = 1 << 20;
    const LEN: usize = 64 * MIB;
    let dir = disk_dir();
    if on_tmpfs(dir.path()) {
        return skip(TEST, "the build directory is on a tmpfs, which has huge pages by another switch");
    }
    let path = dir.path().join("large.safetensors");
    let data = noise(1, LEN);
    SaveOptions::new().durable(false).save([("w", bytes_tensor(&data))], &path).unwrap();
    // SAFETY: a file of the test's own, which nobody writes any more.
    let model = unsafe { Model::open(&path) }.unwrap();
    let bytes = model.tensor("w").unwrap().as_bytes();
    let before = faults();
    let sum: u64 = bytes.chunks(4096).map(|page| u64::from(page[0])).sum();
    let taken = faults() - before;
    assert!(sum > 0);
    let large = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if large.contains("[never]") || large.is_empty() {
        return skip(TEST, "this kernel has transparent huge pages switched off");
    }
    assert!(usize::try_from(taken).unwrap() <= LEN / MIB, "{taken} faults for {} MiB", LEN / MIB);
}

/// Minor faults of this thread so far.
fn faults() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    // Fields are counted behind the parenthesis that ends the name: proc_pid_stat(5), minflt is the 10th.
    text.rsplit(')').next().unwrap().split_whitespace().nth(7).unwrap().parse().unwrap()
}
