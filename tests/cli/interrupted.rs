//! Ctrl-C in commands that write, as a user presses it.

use crate::common::{Process, is_installed, skip, under};
use maptensors::{DType, Draft, Layout};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Long enough to be there when the signal comes.
const LEN: usize = 4 << 20;

fn model(path: &Path, value: u8) {
    let layout = Layout::builder().tensor("w", DType::U8, &[LEN]).build().unwrap();
    let mut draft = Draft::create(path, &layout).unwrap();
    draft.tensor_mut("w").unwrap().as_bytes_mut().fill(value);
    draft.commit().unwrap();
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn maptensors(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_maptensors"));
    command.args(args.iter().map(|arg| match arg.strip_suffix(".st") {
        Some(_) => dir.join(arg).into_os_string(),
        None => (*arg).into(),
    }));
    command
}

/// Waits for what comes soon.
#[track_caller]
fn until(what: &str, mut check: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if check() {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("it never came so far: {what}");
}

/// Whether a process has a file of a directory open that is not there yet, or by another name.
fn is_unfinished(dir: &Path, pid: &str) -> bool {
    let open =
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    open.map(|to| to.display().to_string()).any(|to| {
        to.starts_with(dir.to_str().unwrap()) && (to.ends_with("(deleted)") || to.contains("/.maptensors-"))
    })
}

/// Whether a signal waits for a process to take it.
fn is_pending(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap().trim();
    pending.bytes().any(|digit| digit != b'0')
}

#[test]
fn a_signal_in_a_command_that_writes_leaves_nothing_unfinished_and_the_old_file() {
    if !is_installed("strace") {
        return skip(
            "a_signal_in_a_command_that_writes_leaves_nothing_unfinished_and_the_old_file",
            "strace is not installed",
        );
    }
    // More than the room that an edit in place has.
    let long = format!("k={}", "x".repeat(8192));
    for (args, signal) in [
        (&["delta", "a.st", "b.st", "out.st"][..], "INT"),
        (&["apply", "a.st", "d.st", "out.st"], "TERM"),
        (&["edit", "--set", &long, "out.st"], "HUP"),
    ] {
        let (temporary, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dir = temporary.path();
        for (name, value) in [("a.st", 1), ("b.st", 2), ("out.st", 3)] {
            model(&dir.join(name), value);
        }
        assert!(maptensors(dir, &["delta", "a.st", "b.st", "d.st"]).output().unwrap().status.success());
        if args[0] == "delta" {
            // A delta takes the place of no model.
            fs::copy(dir.join("d.st"), dir.join("out.st")).unwrap();
        }
        let (names, before) = (listing(dir), fs::read(dir.join("out.st")).unwrap());
        let trace = outside.path().join("trace");
        let calls = || fs::read_to_string(&trace).unwrap_or_default();
        let delay = "inject=fsync:delay_enter=20000000:when=1";
        let options = ["-f", "-qq", "-o", trace.to_str().unwrap(), "-e", "trace=fsync", "-e", delay];
        // Of a shell's background job, SIGINT is ignored.
        let options = [&options[..], &["env", "--default-signal=INT,TERM,HUP"]].concat();
        let mut process = Process(
            under("strace", &options, &maptensors(dir, args))
                .stdout(Stdio::null())
                .env_remove("LD_LIBRARY_PATH")
                .spawn()
                .unwrap(),
        );
        until("fsync", || calls().contains("fsync("));
        let pid = calls().split_whitespace().next().unwrap().to_owned();
        assert!(is_unfinished(dir, &pid), "{args:?}: it is being written");
        assert!(Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success());
        until("the signal is taken", || !is_pending(&pid));
        // And what it is about is done.
        std::thread::sleep(Duration::from_millis(20));
        until("nothing is left", || listing(dir) == names);
        assert!(fs::read(dir.join("out.st")).unwrap() == before, "{args:?}");
        // The tracer alone: the call goes on, and the process ends by the signal that it was sent.
        process.kill().unwrap();
        process.wait().unwrap();
        until("the process ends", || !Path::new(&format!("/proc/{pid}/fd/1")).exists());
        assert_eq!(listing(dir), names, "{args:?}");
        assert!(fs::read(dir.join("out.st")).unwrap() == before, "{args:?}");
    }
}
