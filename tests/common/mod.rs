//! What several of these test binaries share.
#![allow(dead_code)] // each binary uses a part

pub mod mount;
pub mod smaps;

use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::io::Write as _;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A directory on a file system where files may be used again: an overlay, which a container's often is, does not tell
/// who has a file mapped. In memory then.
pub fn recycling_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let overlay = rustix::fs::statfs(dir.path()).is_ok_and(|stat| stat.f_type == 0x794c_7630);
    if overlay { tempfile::tempdir_in("/dev/shm").unwrap() } else { dir }
}

/// The bytes of a file: length field, header, and so many data bytes.
pub fn file_of(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

/// Reproducible noise (splitmix64).
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes: Vec<u8> = (0..len.div_ceil(8))
        .flat_map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)).to_le_bytes()
        })
        .collect();
    bytes.truncate(len);
    bytes
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub fn sha256_of(path: &Path) -> String {
    sha256(&std::fs::read(path).unwrap())
}

/// A tensor of bytes, to save.
pub fn bytes_tensor(data: &[u8]) -> (maptensors::DType, [usize; 1], &[u8]) {
    (maptensors::DType::U8, [data.len()], data)
}

/// A publication that was begun, and whose publisher was killed before it published anything.
pub fn begun(place: impl AsRef<Path>) {
    let publisher = maptensors::Publisher::open(place).unwrap();
    let (path, page) = (publisher.path().to_owned(), publisher.path().join("control"));
    let bytes = std::fs::read(&page).unwrap();
    drop(publisher);
    assert!(!page.exists(), "it takes away what it began");
    std::fs::create_dir_all(path).unwrap();
    std::fs::write(page, bytes).unwrap();
}

/// The names in a directory, sorted.
pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A directory on the disk the build is on: page-cache behaviour is tested there, and the default
/// temporary directory may be a tmpfs.
pub fn disk_dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Whether a check holds, now or soon. The kernel takes pages of files out of page tables when it likes, locked ones
/// too: it splits a large one where it makes memory contiguous. They come back when they are touched; so what shows
/// that it has them all is made, and looked at, again.
pub fn soon(mut check: impl FnMut() -> bool) -> bool {
    (0..100).any(|_| {
        check() || {
            std::thread::sleep(Duration::from_millis(20));
            false
        }
    })
}

/// Takes a file out of the page cache: as much of it as is not mapped, nor in memory for good. Again where something
/// stays, as pages do that the kernel is moving about.
#[allow(unsafe_code)]
pub fn cold(path: &Path) {
    let file = std::fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: nothing of it is looked at.
    let mapping = unsafe { maptensors::MapOptions::new().map(&file) }.unwrap();
    for _ in 0..5 {
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        if mapping.residency(0..mapping.len()).unwrap().resident == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn on_tmpfs(path: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    rustix::fs::statfs(path).unwrap().f_type == TMPFS_MAGIC
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Says that a test, or a part of it, was not run: past the harness' capture, and in the file that
/// `MAPTENSORS_SKIPS` names, which `tools/skips.py` compares with `tests/skips.txt`.
#[track_caller]
pub fn skip(test: &str, why: impl std::fmt::Display) {
    let line = format!("{} {test}: {why}", Location::caller().file()).replace('\n', " ");
    let _ = writeln!(std::io::stderr(), "\n!!! SKIPPED: {line}\n");
    if let Some(path) = std::env::var_os("MAPTENSORS_SKIPS") {
        let file = std::fs::File::options().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())).expect("MAPTENSORS_SKIPS");
    }
}

/// Where a test begins that interrupts at random: given by `MAPTENSORS_SEED`, or another each time. It is printed, so
/// that a failure can be repeated.
pub fn seed(test: &str) -> u64 {
    let seed = match std::env::var("MAPTENSORS_SEED") {
        Ok(given) => given.parse().expect("MAPTENSORS_SEED is a number"),
        Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into(),
    };
    println!("{test}: repeat with MAPTENSORS_SEED={seed}");
    seed
}

const ROLE: &str = "MAPTENSORS_TEST_ROLE";
const DIR: &str = "MAPTENSORS_TEST_DIR";

/// In a child process made by [`child`] with this role: its directory.
pub fn role(name: &str) -> Option<PathBuf> {
    (std::env::var_os(ROLE)? == name).then(|| std::env::var_os(DIR).unwrap().into())
}

/// This test binary again, running only `test` of the caller's file, which is to ask for its [`role`].
#[track_caller]
pub fn child(test: &str, role: &str, dir: &Path) -> Command {
    child_of(&std::env::current_exe().unwrap(), test, role, dir)
}

#[track_caller]
fn child_of(exe: &Path, test: &str, role: &str, dir: &Path) -> Command {
    let mut command = Command::new(exe);
    // `tests/save/faults.rs` is the module `faults`.
    let module = Path::new(Location::caller().file()).file_stem().unwrap().to_str().unwrap();
    let name = format!("{module}::{test}");
    command.args(["--exact", &name, "--nocapture", "--test-threads=1"]).env(ROLE, role).env(DIR, dir);
    command
}

/// As [`child`], without root's privileges. The binary may lie where nobody else can reach: a copy runs.
#[track_caller]
pub fn unprivileged_child(test: &str, role: &str, dir: &Path) -> (Command, tempfile::TempDir) {
    use std::os::unix::{fs::PermissionsExt, process::CommandExt as _};
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let exe = home.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    std::fs::set_permissions(&exe, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = child_of(&exe, test, role, dir);
    command.current_dir("/");
    if is_root() {
        const NOBODY: u32 = 65_534;
        command.uid(NOBODY).gid(NOBODY);
    }
    (command, home)
}

pub fn is_installed(tool: &str) -> bool {
    Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// `command` run by a tool that counts.
pub fn under(tool: &str, args: &[&str], command: &Command) -> Command {
    let mut counted = Command::new(tool);
    counted.args(args).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        counted.env(key, value.unwrap());
    }
    counted
}

/// A child that does not outlive the test that started it.
pub struct Process(pub std::process::Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl std::ops::Deref for Process {
    type Target = std::process::Child;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl std::ops::DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// Runs a child to its end; it must have run its one test, and passed.
pub fn pass(mut command: Command) {
    // While another test forks, its child has the copy of the binary open to write: exec(2) says ETXTBSY.
    let output = loop {
        match command.output() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(5));
            }
            output => break output.unwrap(),
        }
    };
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && stdout.contains("1 passed"),
        "child {command:?}: {}\n{stdout}\n{stderr}",
        output.status
    );
}

/// Runs `work` and fails, instead of hanging, where it blocks. The limit is no measure of speed.
pub fn without_blocking<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    match result.recv_timeout(Duration::from_secs(120)) {
        Ok(result) => result,
        Err(error) => panic!("{what}: blocked, or panicked ({error})"),
    }
}

pub fn fifo(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}
