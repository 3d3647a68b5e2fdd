//! `maptensors publications`, and `inspect` and `top` of what is published, as a user runs them.
#![allow(unsafe_code)]
#![cfg(target_os = "linux")]

use maptensors::{Publisher, SaveOptions, Subscriber};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

use crate::common::{self, bytes_tensor, listing};

const MIB: usize = 1 << 20;

/// One command at a time.
static ONE: Mutex<()> = Mutex::new(());

/// What the command says, to which names stand for what lies in `base`.
fn run(base: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_maptensors"));
    command.args(args).env("MAPTENSORS_SHARE_DIR", base).env_remove("COLUMNS");
    command.current_dir(base.parent().unwrap());
    // A child has all that this process maps until it executes another program, and would count as a reader.
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    command.output().unwrap()
}

/// What a successful run prints.
#[track_caller]
fn printed(base: &Path, args: &[&str]) -> String {
    let output = run(base, args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
    assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a run that fails says on standard error, and what it prints.
#[track_caller]
fn complaint(base: &Path, args: &[&str], code: i32) -> (String, String) {
    let output = run(base, args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
    (String::from_utf8(output.stderr).unwrap(), String::from_utf8(output.stdout).unwrap())
}

fn json(base: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&printed(base, args)).unwrap()
}

/// The cells of the row that begins with `name`, units with their numbers.
#[track_caller]
fn row<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let mut lines = text.lines().map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()));
    let row = lines.find_map(|mut cells| (cells.next()? == name).then(|| cells.collect()));
    row.unwrap_or_else(|| panic!("no {name} in\n{text}"))
}

#[test]
fn a_table_shows_what_is_published_by_whom_and_what_it_takes() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    assert_eq!(printed(&base, &["publications"]), "nothing is published under a name\n");
    assert!(!base.exists(), "only looked");
    let mut policy = Publisher::open(base.join("policy")).unwrap();
    let (a, b) = (vec![1; MIB], vec![2; MIB]);
    policy.publish([("a", bytes_tensor(&a)), ("b", bytes_tensor(&b))]).unwrap();
    policy.publish_changed([("a", bytes_tensor(&b))]).unwrap();
    common::begun(base.join("idle"));
    // SAFETY: only publishers write to a test's publication.
    let held = unsafe { Subscriber::attach(base.join("policy")) }.unwrap();
    let text = printed(&base, &["publications"]);
    let pid = std::process::id().to_string();
    let titles: Vec<&str> = text.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(titles, ["NAME", "GEN", "TENSORS", "SIZE", "TAKES", "PUBLISHER", "READERS", "AGE"], "{text}");
    assert_eq!(row(&text, "idle"), ["0", "0", "0 B", "4.0 KiB", "-", "0", "-"], "{text}");
    let cells = row(&text, "policy");
    assert_eq!((&cells[..3], cells[4], cells[5]), (&["2", "2", "2.0 MiB"][..], &pid[..], "1"), "{text}");
    assert!(cells[3].starts_with("3.") && cells[6].ends_with(" s"), "{text}");
    assert!(text.contains("\n2 publications: 3.") && text.contains(", 4.0 KiB of it where nobody publishes"));

    let found = json(&base, &["publications", "--json"]);
    let rows = found["publications"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[0]["name"], &rows[1]["name"]), (2, &"idle".into(), &"policy".into()));
    let policy_row = &rows[1];
    for (key, value) in [
        ("generation", Value::from(2)),
        ("tensors", 2.into()),
        ("nbytes", (2 * MIB).into()),
        ("publishing", true.into()),
        ("process", std::process::id().into()),
        ("readers", 1.into()),
        ("damage", Value::Null),
        ("path", base.join("policy").to_str().unwrap().into()),
    ] {
        assert_eq!(policy_row[key], value, "{key}");
    }
    assert!(policy_row["published"].as_f64().unwrap() > 1e9);
    assert_eq!(found["totals"]["unpublished"], 4096);
    // By name and by path; one that is not there is an error, and the others are shown.
    let at = base.join("policy");
    let both = json(&base, &["publications", "policy", at.to_str().unwrap(), "--json"]);
    let names = both["publications"].as_array().unwrap().iter().map(|row| row["name"].clone());
    assert_eq!(names.collect::<Vec<_>>(), [Value::from("policy"), Value::Null]);
    assert_eq!(both["publications"][1]["readers"], 1);
    let (error, text) = complaint(&base, &["publications", "nobody", "policy"], 1);
    assert!(error.contains("nobody: nothing is published there"), "{error}");
    assert_eq!(row(&text, "policy")[0], "2");
    assert!(!base.join("nobody").exists());
    drop(held);
    assert_eq!(row(&printed(&base, &["publications"]), "policy")[5], "0");
    // What was left behind has columns where there is any, and damage is told.
    policy.publish([("\u{1b}[2J", bytes_tensor(&a))]).unwrap();
    assert!(row(&printed(&base, &["publications"]), "policy")[4].ends_with("MiB"), "a spare");
    fs::write(base.join("idle/control"), b"").unwrap();
    let text = printed(&base, &["publications"]);
    assert!(
        text.contains("SPARE") && text.contains("\nidle: the publication is damaged: its control page"),
        "{text}"
    );
}

#[test]
fn removing_says_what_it_frees_and_refuses_where_somebody_publishes() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    let publish = |name: &str| {
        let mut publisher = Publisher::open(base.join(name)).unwrap();
        publisher.publish([("a", bytes_tensor(&vec![1; 2 * MIB]))]).unwrap();
        publisher
    };
    let living = publish("living");
    drop((publish("left"), publish("held"), publish("stays")));
    // SAFETY: only publishers write to a test's publication.
    let held = unsafe { Subscriber::attach(base.join("held")) }.unwrap();
    let (error, _) = complaint(&base, &["publications", "--remove"], 2);
    assert!(error.contains("PLACE"), "{error}");
    let (error, text) = complaint(&base, &["publications", "--remove", "living", "left", "no", "held"], 1);
    assert!(error.contains(&format!("process {} publishes there", std::process::id())), "{error}");
    assert!(error.contains("no: nothing is published there"), "{error}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "left: removed, 2.0 MiB freed");
    let expected = "held: removed, 2.0 MiB freed; what 1 process has mapped is free once it lets go";
    assert_eq!(lines[1..], [expected]);
    assert_eq!(listing(&base), ["living", "stays"]);
    assert_eq!(held.model().tensor("a").unwrap().as_bytes()[5], 1, "what is held stays");
    assert_eq!(living.generation(), 1);
    let path = base.join("stays");
    assert!(printed(&base, &["publications", "--remove", path.to_str().unwrap()]).contains("2.0 MiB freed"));
    assert_eq!(listing(&base), ["living"]);
}

#[test]
fn inspect_and_top_take_what_is_published_by_name_or_directory() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    let mut publisher = Publisher::open(base.join("policy")).unwrap();
    let (a, b) = (vec![1; MIB], vec![2; 2 * MIB]);
    publisher.publish([("a", bytes_tensor(&a)), ("b", bytes_tensor(&b))]).unwrap();
    // One segment: the directory could be taken for a model's.
    let one = json(&base, &["inspect", "base/policy", "--json"]);
    assert_eq!((&one["generation"], &one["totals"]["tensors"]), (&1.into(), &2.into()));
    publisher.publish_changed([("a", bytes_tensor(&b))]).unwrap();
    for place in ["policy", "base/policy", "base/policy/"] {
        let found = json(&base, &["inspect", place, "--json"]);
        assert_eq!((&found["generation"], &found["path"]), (&2.into(), &place.into()));
        assert_eq!(found["totals"]["nbytes"], 4 * MIB);
        assert_eq!(found["shards"].as_array().unwrap().len(), 2);
        let text = printed(&base, &["inspect", place]);
        assert!(text.starts_with(&format!("{place}, generation 2\n2 tensors, ")), "{text}");
    }
    // SAFETY: only publishers write to a test's publication.
    let held = unsafe { Subscriber::attach(base.join("policy")) }.unwrap();
    for place in ["policy", "base/policy"] {
        let found = json(&base, &["top", place, "--json"]);
        assert_eq!(found["processes"][0]["pid"], std::process::id(), "{place}: {found}");
    }
    drop(held);
    // A file of that name goes first.
    let data = vec![3; 10];
    let model = [("mine", bytes_tensor(&data))];
    SaveOptions::new().save(model, dir.path().join("policy")).unwrap();
    let mine = json(&base, &["inspect", "policy", "--json"]);
    assert_eq!((&mine["tensors"][0]["name"], &mine["generation"]), (&"mine".into(), &Value::Null));
    // What is damaged, or not begun, says so, where a file is not there, too.
    common::begun(base.join("begun"));
    fs::write(base.join("policy/control"), b"").unwrap();
    for (place, expected) in
        [("base/policy", "damaged"), ("begun", "no generation yet"), ("nobody", "No such file")]
    {
        let (error, _) = complaint(&base, &["inspect", place], 1);
        assert!(error.contains(expected), "{place}: {error}");
    }
    // A model beside a file that is called as a control page is.
    let beside = dir.path().join("beside");
    fs::create_dir(&beside).unwrap();
    fs::copy(dir.path().join("policy"), beside.join("model.safetensors")).unwrap();
    fs::write(beside.join("control"), b"mine").unwrap();
    assert_eq!(json(&base, &["inspect", "beside", "--json"])["tensors"][0]["name"], "mine");
}
