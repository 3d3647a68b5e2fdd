//! A save under a system that fails: every system call refused, or the process killed at it, in turn; and a
//! disk that takes the bytes and cannot write them.

use common::{bytes_tensor, child, is_installed, listing, role, skip, under};
use maptensors::{Error, Model, SaveOptions};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

mod common;

const MIB: usize = 1 << 20;
const MODEL: &str = "model.safetensors";

/// Names of files that no process can have: stat(2) of them marks a place in a trace.
const BEGIN: &str = "/maptensors-begin";
const END: &str = "/maptensors-end";

fn save(dir: &Path, generation: u8, len: usize, options: &SaveOptions) -> Result<(), Error> {
    let (a, b) = (vec![generation; len], vec![generation; len / 3]);
    let options = options.clone().metadata("generation", generation.to_string());
    options.save([("a", bytes_tensor(&a)), ("b", bytes_tensor(&b))], dir.join(MODEL))
}

/// The generation of the whole model in `dir`; fails on a mixture.
fn generation(dir: &Path) -> u8 {
    let model = Model::read(dir).unwrap();
    let said: u8 = model.metadata().text("generation").unwrap().parse().unwrap();
    assert_eq!(model.len(), 2);
    for tensor in model.tensors() {
        assert!(tensor.as_bytes().iter().all(|&byte| byte == said), "a mixture of generations");
    }
    said
}

fn temporaries(dir: &Path) -> usize {
    listing(dir).iter().filter(|name| name.starts_with(".maptensors-")).count()
}

/// Ways to save, by the role of the child that does.
const WAYS: [&str; 3] = ["mapped", "unmapped", "sharded"];

fn options(way: &str) -> SaveOptions {
    match way {
        "mapped" => SaveOptions::new(),
        "unmapped" => SaveOptions::new().mapped(false),
        _ => SaveOptions::new().max_shard_size(3000),
    }
}

/// A directory with generation 1 of a model, saved this way.
fn prepared(way: &str) -> tempfile::TempDir {
    // In memory where there is some: a sync takes no time, and its system calls are the same.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    std::fs::create_dir(dir.path().join("set")).unwrap();
    save(&dir.path().join("set"), 1, 3000, &options(way).durable(false)).unwrap();
    dir
}

/// A save makes a file without a name, and names it. (It lies in memory, or on what temporary files are.)
fn assert_unnamed(calls: &[Call]) {
    let count = |name: &str| calls.iter().filter(|call| call.0 == name).count();
    assert!(count("linkat") > 0 && count("linkat") >= count("renameat"), "{calls:?}");
}

/// A system call between the marks: which, and the how manieth of its name and thread it is.
type Call = (String, usize);

/// Saves before the one that counts.
const WARM: usize = 40;

/// The calls of the saving thread between the marks of a trace.
fn calls(trace: &str) -> Vec<Call> {
    let name =
        |line: &str| line.split_whitespace().nth(1).and_then(|call| Some(call.split_once('(')?.0.to_owned()));
    let thread = |line: &str| line.split_whitespace().next().map(str::to_owned);
    let begin = trace.lines().find(|line| line.contains(BEGIN)).expect("the first mark");
    let own = trace.lines().filter(|line| thread(line) == thread(begin));
    let (mut counts, mut calls, mut inside) = (BTreeMap::new(), Vec::new(), false);
    for line in own {
        let Some(name) = name(line) else { continue };
        let count = counts.entry(name.clone()).or_insert(0);
        *count += 1;
        if line.contains(END) {
            break;
        }
        if inside {
            calls.push((name, *count));
        }
        inside |= line.contains(BEGIN);
    }
    calls
}

/// Calls that fail on real systems; the others fail only where memory or the process itself is broken.
const FAILING: [&str; 16] = [
    "openat",
    "newfstatat",
    "fstat",
    "statx",
    "fallocate",
    "ftruncate",
    "mmap",
    "madvise",
    "pwrite64",
    "fchmod",
    "flock",
    "fsync",
    "linkat",
    "renameat",
    "unlinkat",
    "getdents64",
];

#[test]
fn every_system_call_of_a_save_may_fail_or_be_the_last() {
    const TEST: &str = "every_system_call_of_a_save_may_fail_or_be_the_last";
    for way in WAYS {
        if let Some(dir) = role(way) {
            // Calls are counted for each thread by itself: after these, no other has made as many.
            std::fs::create_dir(dir.join("warm")).unwrap();
            for _ in 0..WARM {
                save(&dir.join("warm"), 2, 3000, &options(way)).unwrap();
            }
            let _ = std::fs::metadata(BEGIN);
            let done = save(&dir.join("set"), 2, 3000, &options(way));
            let _ = std::fs::metadata(END);
            let said = done.err().map_or("done", |error| error.kind().name());
            std::fs::write(dir.join("said"), said).unwrap();
            return;
        }
    }
    if !is_installed("strace") {
        return skip(TEST, "strace is not installed");
    }
    let long = std::env::var_os("MAPTENSORS_KILLS").is_some();
    let (mut refused, mut killed) = (0, 0);
    for way in WAYS {
        let dir = prepared(way);
        let trace = dir.path().join("trace");
        let mut traced = strace(&["-f", "-qq", "-o", trace.to_str().unwrap()], &child(TEST, way, dir.path()));
        assert!(traced.output().unwrap().status.success());
        assert_eq!((said(dir.path()), generation(&dir.path().join("set"))), ("done".into(), 2));
        let calls = calls(&std::fs::read_to_string(&trace).unwrap());
        assert!(calls.len() > 15, "{calls:?}");
        assert_unnamed(&calls);
        for (i, (name, count)) in calls.iter().enumerate() {
            // A set is three files: in the short form every third of its calls.
            if way == "sharded" && !long && i % 3 != 0 {
                continue;
            }
            for what in ["error=EIO", "error=ENOSPC", "signal=KILL"] {
                let kills = what.starts_with("signal");
                if !kills && !FAILING.contains(&name.as_str()) {
                    continue;
                }
                let place = format!("{way}, {name} {count}, {what}");
                if inject(TEST, way, name, *count, what, &place) {
                    if kills { killed += 1 } else { refused += 1 }
                }
            }
        }
    }
    println!("{refused} calls refused, {killed} processes killed at a call");
    assert!(refused > 60 && killed > 60, "{refused} {killed}");
}

/// `command` under strace. Cargo's library path would have the loader make calls by the dozen.
fn strace(args: &[&str], command: &Command) -> Command {
    let mut traced = under("strace", args, command);
    traced.env_remove("LD_LIBRARY_PATH");
    traced
}

fn said(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("said")).unwrap_or_default()
}

/// Does something to one system call of a save, and looks at what came of it. `false`: the call was not
/// reached.
fn inject(test: &str, way: &str, name: &str, count: usize, what: &str, place: &str) -> bool {
    let dir = prepared(way);
    let set = dir.path().join("set");
    let before = listing(&set);
    let inject = format!("inject={name}:{what}:when={count}");
    let trace = dir.path().join("trace");
    let only = format!("trace={name}");
    let mut args = vec!["-f", "-qq", "-o", trace.to_str().unwrap(), "-e", &only, "-e", &inject];
    if !what.starts_with("signal") {
        // Only what is traced stops for the tracer. Signals are not sent so.
        args.push("--seccomp-bpf");
    }
    let status = strace(&args, &child(test, way, dir.path())).output().unwrap().status;
    let trace = std::fs::read_to_string(&trace).unwrap();
    if what.starts_with("signal") {
        if status.success() {
            return false;
        }
        assert!(listing(dir.path()).contains(&"warm".into()), "{place}: before the save");
        assert!(trace.contains("killed by SIGKILL"), "{place}: {trace}");
        assert!(matches!(generation(&set), 1 | 2), "{place}");
        // What has no name goes with the process. One is there only to be renamed.
        assert!(temporaries(&set) == 0 || name == "renameat", "{place}: {:?}", listing(&set));
        save(&set, 3, 100, &options(way).durable(false)).unwrap();
        assert_eq!((generation(&set), temporaries(&set)), (3, 0), "{place}: {:?}", listing(&set));
        return true;
    }
    assert!(status.success(), "{place}: {status}");
    if !trace.contains("(INJECTED)") {
        return false;
    }
    let found = generation(&set);
    let right = match said(dir.path()).as_str() {
        "done" => found == 2,
        // What the new one was to replace may refuse to go, and be beside it.
        "Io" => found == 1 || (name == "unlinkat" && found == 2),
        "NotDurable" => true,
        // The shards that the new set was to replace.
        "NotRemoved" => name == "unlinkat" && found == 2,
        _ => false,
    };
    assert!(right, "{place}: {:?}, and generation {found} is there", said(dir.path()));
    // What cannot be removed stays.
    assert!(name == "unlinkat" || temporaries(&set) == 0, "{place}: {:?}", listing(&set));
    if said(dir.path()) == "Io" && name != "unlinkat" {
        assert_eq!(listing(&set), before, "{place}");
    }
    true
}

#[test]
fn an_interrupted_system_call_is_made_again() {
    const TEST: &str = "an_interrupted_system_call_is_made_again";
    let ways = [("mapped", "fallocate"), ("unmapped", "pwrite64")];
    for (way, _) in ways {
        if let Some(dir) = role(way) {
            return save(&dir.join("set"), 2, 3000, &options(way)).unwrap();
        }
    }
    if !is_installed("strace") {
        return skip(TEST, "strace is not installed");
    }
    for (way, name) in ways {
        let dir = prepared(way);
        let inject = format!("inject={name}:error=EINTR:when=1");
        let trace = dir.path().join("trace");
        let args = ["-f", "-qq", "-o", trace.to_str().unwrap(), "-e", &inject];
        common::pass(strace(&args, &child(TEST, way, dir.path())));
        assert!(std::fs::read_to_string(&trace).unwrap().contains("(INJECTED)"), "{name}");
        assert_eq!(generation(&dir.path().join("set")), 2);
    }
}

/// A file system in a file on a small tmpfs: it has room, and what it lies on has not.
struct Overcommitted {
    root: tempfile::TempDir,
    mounted: Vec<PathBuf>,
}

impl Overcommitted {
    fn new(test: &str, backing: usize, promised: u64) -> Option<Self> {
        if !common::is_root() {
            skip(test, "mounting a file system needs root");
            return None;
        }
        let root = common::disk_dir();
        let mut made = Self { mounted: Vec::new(), root };
        let done = made.mount(backing, promised);
        if let Err(why) = done {
            skip(test, &why);
            return None;
        }
        Some(made)
    }

    fn backing(&self) -> PathBuf {
        self.root.path().join("backing")
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("mnt")
    }

    fn mount(&mut self, backing: usize, promised: u64) -> Result<(), String> {
        std::fs::create_dir(self.backing()).unwrap();
        std::fs::create_dir(self.path()).unwrap();
        let size = format!("size={backing}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(self.backing()))?;
        self.mounted.push(self.backing());
        let image = self.backing().join("image");
        std::fs::File::create(&image).unwrap().set_len(promised).unwrap();
        // Its own tables are written now: only the bytes of files find no room later.
        let tables = ["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=0"];
        run(Command::new("mkfs.ext4").args(tables).arg(&image))?;
        self.mount_image()
    }

    fn mount_image(&mut self) -> Result<(), String> {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.backing().join("image")).arg(self.path()))?;
        self.mounted.push(self.path());
        Ok(())
    }

    /// Everything in memory forgotten: what is read next comes from the disk.
    fn remount(&mut self) {
        run(Command::new("umount").arg(self.mounted.pop().unwrap())).unwrap();
        self.mount_image().unwrap();
    }

    /// Leaves so much of the backing.
    fn leave(&self, room: u64) {
        std::fs::remove_file(self.backing().join("ballast")).ok();
        let stat = rustix::fs::statvfs(self.backing()).unwrap();
        let free = stat.f_bavail * stat.f_frsize;
        let ballast = vec![0; usize::try_from(free.saturating_sub(room)).unwrap()];
        std::fs::write(self.backing().join("ballast"), ballast).unwrap();
    }
}

impl Drop for Overcommitted {
    fn drop(&mut self) {
        while let Some(path) = self.mounted.pop() {
            let done = run(Command::new("umount").arg(&path)).is_ok()
                || run(Command::new("umount").arg("-l").arg(&path)).is_ok();
            assert!(done || std::thread::panicking(), "umount");
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output =
        command.stdin(std::process::Stdio::null()).output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

#[test]
fn bytes_that_the_disk_cannot_take_make_the_save_fail() {
    const TEST: &str = "bytes_that_the_disk_cannot_take_make_the_save_fail";
    let Some(mut disk) = Overcommitted::new(TEST, 24 * MIB, 64 << 20) else { return };
    let dir = disk.path().join("models");
    std::fs::create_dir(&dir).unwrap();
    save(&dir, 1, MIB, &SaveOptions::new()).unwrap();
    let (mut failed, mut current) = (0, 1);
    for (i, room) in [256 << 10, MIB, 2 * MIB, 4 * MIB].into_iter().enumerate() {
        for mapped in [true, false] {
            disk.leave(room as u64);
            let generation_now = 10 * (u8::try_from(i).unwrap() + 1) + u8::from(mapped);
            match save(&dir, generation_now, 6 * MIB, &SaveOptions::new().mapped(mapped)) {
                Err(Error::Io { source, .. }) => {
                    assert!(matches!(source.raw_os_error(), Some(libc::EIO | libc::ENOSPC)), "{source}");
                    failed += 1;
                }
                Ok(()) => current = generation_now,
                other => panic!("{other:?}"),
            }
            assert_eq!(generation(&dir), current);
            assert_eq!(listing(&dir), [MODEL]);
        }
    }
    assert!(failed >= 4, "{failed} saves met the disk's error");
    disk.leave(12 << 20);
    disk.remount();
    assert_eq!(generation(&dir), current, "what the disk has, read again");
    save(&dir, 99, 2 * MIB, &SaveOptions::new()).unwrap();
    disk.remount();
    assert_eq!(generation(&dir), 99);
}
