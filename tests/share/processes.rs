//! Live weights between real processes, some of which are killed.
//!
//! `MAPTENSORS_GENERATIONS=10000` makes it long.
#![allow(unsafe_code)]
#![cfg(target_os = "linux")]

use maptensors::{AttachOptions, Model, Publisher, Subscriber};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::{self, Process, bytes_tensor, listing};

fn long() -> Option<u64> {
    std::env::var("MAPTENSORS_GENERATIONS").ok().and_then(|n| n.parse().ok())
}

/// In memory where there is such a place, as publications are by default, with room enough: a container's has 64 MiB
/// unless told otherwise.
fn shared_dir() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let room = rustix::fs::statvfs(shm).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    if room > 3 << 30 { tempfile::tempdir_in(shm).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn attach(place: &Path) -> Subscriber {
    let options = AttachOptions::new().wait(Duration::from_secs(120));
    // SAFETY: only publishers write to a test's publication.
    unsafe { options.attach(place) }.unwrap()
}

/// Waits for what another process does; the limit is no measure of speed.
fn until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(300), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn start(test: &str, role: &str, dir: &Path, number: usize) -> Process {
    let mut command = common::child(test, role, dir);
    command.env("MAPTENSORS_TEST_NUMBER", number.to_string()).stdout(Stdio::null());
    Process(command.spawn().unwrap())
}

fn number() -> usize {
    std::env::var("MAPTENSORS_TEST_NUMBER").unwrap().parse().unwrap()
}

const TENSORS: usize = 24;
const LEN: usize = 160 << 10;

fn name(i: usize) -> String {
    format!("layer.{i}.weight")
}

/// Of all tensors, by name; the place of every bit counts.
fn checksum<'a>(tensors: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut sum = 1u64;
    for tensor in tensors {
        for word in tensor.as_chunks().0 {
            sum = (sum.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    sum
}

fn verify(model: &Model) {
    assert_eq!(model.len(), TENSORS);
    let sum = checksum((0..TENSORS).map(|i| model.tensor(&name(i)).unwrap().as_bytes()));
    assert_eq!(model.metadata()["checksum"], sum.to_string(), "a torn generation");
}

/// Publishes until there are so many generations; goes on where another was killed.
fn writer(dir: &Path, generations: u64) {
    let place = dir.join("p");
    let mut publisher = Publisher::open(&place).unwrap();
    let mut state: Vec<Vec<u8>> = if publisher.generation() == 0 {
        vec![vec![0; LEN]; TENSORS]
    } else {
        let last = attach(&place);
        verify(last.model());
        (0..TENSORS).map(|i| last.model().tensor(&name(i)).unwrap().as_bytes().to_vec()).collect()
    };
    while publisher.generation() < generations {
        let next = publisher.generation() + 1;
        let noise = common::noise(next ^ (number() as u64) << 32, 8);
        let some: std::collections::BTreeSet<usize> =
            noise[..=usize::from(noise[0]) % 4].iter().map(|&byte| usize::from(byte) % TENSORS).collect();
        for &i in &some {
            state[i] = common::noise(next * 100 + i as u64, LEN);
        }
        let sum = checksum(state.iter().map(Vec::as_slice));
        publisher.set_metadata(BTreeMap::from([("checksum".to_owned(), sum.to_string())]));
        let all = || (0..TENSORS).map(|i| (name(i), bytes_tensor(&state[i])));
        match noise[7] % 32 {
            _ if publisher.generation() == 0 => publisher.publish(all()),
            0 => publisher.publish(all()),
            1..8 => publisher.publish_differing(all()),
            _ => publisher.publish_changed(some.iter().map(|&i| (name(i), bytes_tensor(&state[i])))),
        }
        .unwrap();
    }
}

/// Verifies every generation it sees, and now and then again what it has held for a while.
fn reader(dir: &Path, generations: u64) {
    let mut seen = std::fs::File::options()
        .append(true)
        .create(true)
        .open(dir.join(format!("seen-{}", number())))
        .unwrap();
    let mut weights = attach(&dir.join("p"));
    let mut held: Option<Arc<Model>> = None;
    loop {
        verify(weights.model());
        seen.write_all(b".").unwrap();
        if weights.generation().is_multiple_of(7)
            && let Some(held) = held.replace(weights.model().clone())
        {
            verify(&held);
        }
        if weights.generation() >= generations {
            return;
        }
        weights.wait(None).unwrap();
        weights.refresh().unwrap();
    }
}

#[test]
fn under_random_kills_nothing_is_torn_and_nothing_is_left() {
    const TEST: &str = "under_random_kills_nothing_is_torn_and_nothing_is_left";
    const READERS: usize = 8;
    let generations = long().unwrap_or(400);
    if let Some(dir) = common::role("writer") {
        return writer(&dir, generations);
    }
    if let Some(dir) = common::role("reader") {
        return reader(&dir, generations);
    }
    let dir = shared_dir();
    let place = dir.path().join("p");
    let (mut kills, mut round) = ((0, 0), common::seed(TEST));
    let write = |round| start(TEST, "writer", dir.path(), usize::try_from(round).unwrap());
    let mut writer = write(round);
    let mut readers: Vec<Process> = (0..READERS).map(|i| start(TEST, "reader", dir.path(), i)).collect();
    let watching = attach(&place);
    let begun = Instant::now();
    while watching.latest().unwrap() < generations {
        round = round.wrapping_add(1);
        let noise = common::noise(round, 4);
        std::thread::sleep(Duration::from_millis(15 + u64::from(noise[0]) % 40));
        if noise[1].is_multiple_of(3) {
            writer.kill().unwrap();
            let status = writer.wait().unwrap();
            assert!(!failed(status), "the writer: {status}");
            writer = write(round);
            kills.1 += 1;
        } else {
            let i = usize::from(noise[2]) % READERS;
            readers[i].kill().unwrap();
            let status = readers[i].wait().unwrap();
            assert!(!failed(status), "reader {i}: {status}");
            readers[i] = start(TEST, "reader", dir.path(), i);
            kills.0 += 1;
        }
        for reader in &mut readers {
            let status = reader.try_wait().unwrap();
            assert!(!status.is_some_and(failed), "a reader: {status:?}");
        }
        // Also after a kill there are at most the segments, one that carries, a spare, and what was begun.
        let files = listing(&place).len();
        assert!(files <= 70, "{files} files");
    }
    for child in readers.iter_mut().chain([&mut writer]) {
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
    let seen: Vec<u64> = (0..READERS)
        .map(|i| std::fs::metadata(dir.path().join(format!("seen-{i}"))).map_or(0, |file| file.len()))
        .collect();
    verify(attach(&place).model());
    // What the killed have left goes when the next begins; after one full generation only that and a spare is there.
    let mut publisher = Publisher::open(&place).unwrap();
    let listed = listing(&place);
    assert!(listed.len() <= 66 && !listed.iter().any(|name| name.starts_with('.')), "{listed:?}");
    for _ in 0..2 {
        publisher.publish([("last", bytes_tensor(&[1; 100]))]).unwrap();
    }
    assert_eq!(listing(&place).len(), 3, "{:?}", listing(&place));
    println!(
        "{generations} generations in {:.1} s, {} readers and {} writers killed; verified {} times ({seen:?}); {} files before the last",
        begun.elapsed().as_secs_f64(),
        kills.0,
        kills.1,
        seen.iter().sum::<u64>(),
        listed.len(),
    );
    assert!(kills.0 > 0 && kills.1 > 0, "{kills:?}");
    assert!(seen.iter().sum::<u64>() > generations);
    publisher.remove().unwrap();
    assert!(!place.exists());
}

/// Ended by itself, and badly: not killed by us.
fn failed(status: std::process::ExitStatus) -> bool {
    !status.success() && std::os::unix::process::ExitStatusExt::signal(&status) != Some(9)
}

/// Now, by the clock that all processes share.
fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes one timespec.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) }, 0);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}

#[test]
fn readers_notice_by_themselves() {
    const TEST: &str = "readers_notice_by_themselves";
    const ROUNDS: u64 = 100;
    if let Some(dir) = common::role("noticing") {
        let mut weights = attach(&dir.join("p"));
        std::fs::write(dir.join(format!("ready-{}", number())), b"").unwrap();
        let mut times = Vec::new();
        while weights.generation() < ROUNDS {
            assert!(weights.wait(None).unwrap());
            let noticed = now();
            weights.refresh().unwrap().unwrap();
            let stamp: u64 = weights.model().metadata().text("stamp").unwrap().parse().unwrap();
            times.push((noticed.saturating_sub(Duration::from_nanos(stamp))).as_micros().to_string());
        }
        std::fs::write(dir.join(format!("times-{}", number())), times.join(" ")).unwrap();
        return;
    }
    for readers in [1, 8] {
        let dir = shared_dir();
        let mut publisher = Publisher::open(dir.path().join("p")).unwrap();
        let mut publish = || {
            let stamp = now().as_nanos().to_string();
            publisher.set_metadata(BTreeMap::from([("stamp".to_owned(), stamp)]));
            publisher.publish([("a", bytes_tensor(&[1; 4096]))]).unwrap()
        };
        publish();
        let children: Vec<Process> = (0..readers).map(|i| start(TEST, "noticing", dir.path(), i)).collect();
        until("readers attach", || (0..readers).all(|i| dir.path().join(format!("ready-{i}")).exists()));
        while publish() < ROUNDS {
            std::thread::sleep(Duration::from_millis(3));
        }
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        let mut times: Vec<u64> = (0..readers)
            .flat_map(|i| {
                let times = std::fs::read_to_string(dir.path().join(format!("times-{i}"))).unwrap();
                times.split(' ').map(|time| time.parse().unwrap()).collect::<Vec<u64>>()
            })
            .collect();
        times.sort_unstable();
        let at = |part: usize| times[(times.len() - 1) * part / 100];
        println!(
            "{readers} readers notice after {} µs in the median, {} in the 95th percentile, from before the publication",
            at(50),
            at(95)
        );
        assert!(times.len() >= usize::try_from(ROUNDS).unwrap() / 2);
    }
}

/// A number of kB in a file of /proc.
fn kilobytes(pid: u32, key: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
}

#[test]
fn eight_processes_hold_one_copy() {
    const TEST: &str = "eight_processes_hold_one_copy";
    const READERS: usize = 8;
    if let Some(dir) = common::role("holding") {
        let weights = attach(&dir.join("p"));
        let sum = checksum(weights.model().tensors().map(|tensor| tensor.as_bytes()));
        assert_eq!(weights.model().metadata()["checksum"], sum.to_string());
        std::fs::write(dir.join(format!("ready-{}", number())), b"").unwrap();
        loop {
            std::thread::park();
        }
    }
    let dir = shared_dir();
    let bytes: usize = if long().is_some() { 1 << 30 } else { 256 << 20 };
    let mut publisher = Publisher::open(dir.path().join("p")).unwrap();
    {
        let tensors: Vec<Vec<u8>> = (0..16).map(|i| common::noise(i, bytes / 16)).collect();
        let sum = checksum(tensors.iter().map(Vec::as_slice));
        publisher.set_metadata(BTreeMap::from([("checksum".to_owned(), sum.to_string())]));
        publisher
            .publish(tensors.iter().enumerate().map(|(i, data)| (i.to_string(), bytes_tensor(data))))
            .unwrap();
    }
    let mut children: Vec<Process> = (0..READERS).map(|i| start(TEST, "holding", dir.path(), i)).collect();
    until("readers read", || (0..READERS).all(|i| dir.path().join(format!("ready-{i}")).exists()));
    let pids: Vec<u32> = children.iter().map(|child| child.id()).collect();
    let sum = |key| pids.iter().map(|&pid| kilobytes(pid, key)).sum::<u64>() << 10;
    let (pss, rss) = (sum("Pss:"), sum("Rss:"));
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    #[allow(clippy::cast_precision_loss)] // ratios
    let ratio = |sum: u64| sum as f64 / bytes as f64;
    println!("8 readers of {} MiB: Pss {:.3} of it, Rss {:.2} of it", bytes >> 20, ratio(pss), ratio(rss));
    assert!(ratio(rss) >= 8.0, "all have read all of it: {rss}");
    assert!(ratio(pss) <= 1.05, "{pss} bytes for {bytes}");
    publisher.remove().unwrap();
}

/// The files of a publication, by name, with their inodes.
fn inodes(place: &Path) -> BTreeMap<PathBuf, u64> {
    let names = listing(place).into_iter().filter(|name| name.ends_with(".safetensors"));
    names.map(|name| (name.clone().into(), std::fs::metadata(place.join(&name)).unwrap().ino())).collect()
}

#[test]
fn what_a_killed_reader_held_is_used_again() {
    const TEST: &str = "what_a_killed_reader_held_is_used_again";
    if let Some(dir) = common::role("holder") {
        let weights = attach(&dir.join("p"));
        std::fs::write(dir.join(format!("ready-{}", number())), b"").unwrap();
        drop(weights.model().clone());
        loop {
            std::thread::park();
        }
    }
    let dir = shared_dir();
    let place = dir.path().join("p");
    for (number, killed) in [(0, false), (1, true)] {
        let mut publisher = Publisher::open(&place).unwrap();
        let mut publish = || publisher.publish([("a", bytes_tensor(&vec![1; 100_000]))]).unwrap();
        publish();
        let mut child = start(TEST, "holder", dir.path(), number);
        until("the reader attaches", || dir.path().join(format!("ready-{number}")).exists());
        let held: Vec<u64> = inodes(&place).into_values().collect();
        assert_eq!(held.len(), 1);
        publish(); // in a new file; the one that is held becomes the spare
        if killed {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        publish();
        assert_eq!(inodes(&place).values().any(|inode| held.contains(inode)), killed);
        child.kill().ok();
        child.wait().unwrap();
        publisher.remove().unwrap();
    }
}
