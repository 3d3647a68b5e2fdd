//! The `maptensors` command, run as a user runs it.

use serde_json::Value;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_maptensors"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("COLUMNS");
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// What a successful run prints.
#[track_caller]
fn printed(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
    assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a run that fails with `code` says on standard error.
#[track_caller]
fn complaint(args: &[&str], code: i32) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&printed(args)).unwrap()
}

/// The number that stands behind `label` in the demo's output.
#[track_caller]
fn measured<'a>(text: &'a str, label: &str) -> Vec<&'a str> {
    let lines = text.lines().map(str::trim).filter_map(|line| line.strip_prefix(label));
    lines.map(|rest| rest.split_whitespace().next().unwrap()).collect()
}

#[test]
fn help_teaches_by_example_and_goes_to_standard_output() {
    for (args, words) in [
        (&["--help"][..], &["inspect", "--map", "top", "demo", "Examples:", "Exit codes:"][..]),
        (&["inspect", "--help"], &["--filter", "--json", "--summary", "--no-tensors", "jq"]),
        (&["inspect", "--help"], &["--map", "--svg", "--color", "cell", "Exit codes:"]),
        (&["top", "--help"], &["--interval", "--json", "PSS", "Examples:", "Exit codes:", "Ctrl-C"]),
        (
            &["publications", "--help"],
            &["PLACE", "--json", "--remove", "Examples:", "READERS", "Exit codes:"],
        ),
        (&["prefetch", "--help"], &["--filter", "--lock", "Examples:", "ulimit -l"]),
        (&["evict", "--help"], &["--filter", "Examples:", "/dev/shm"]),
        (&["checksum", "--help"], &["--budget", "2GiB", "Examples:", "larger than memory"]),
        (&["edit", "--help"], &["--set", "--unset", "--rename", "Examples:", "in place"]),
        (&["demo", "--help"], &["--dir", "Examples:"]),
        (&["diff", "--help"], &["--json", "Examples:", "Exit codes: 0 the same, 1 different, 2 trouble"]),
        (&["changed", "--help"], &["--frozen", "--filter", "Examples:", "Exit codes:"]),
        (&["verify", "--help"], &["--missing-ok", "Examples:", "Exit codes:"]),
        (&["delta", "--help"], &["BASE", "NEW", "OUT", "Examples:"]),
        (&["apply", "--help"], &["<BASE> <DELTA>... <OUT>", "Examples:", "xfs"]),
    ] {
        let help = printed(args);
        for word in words {
            assert!(help.contains(word), "{args:?} lacks {word}:\n{help}");
        }
        assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
    }
}

#[test]
fn differences_deltas_and_damage_are_told_by_text_and_by_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let base = "models/digits.safetensors";
    let mut model = maptensors::ModelMut::read(base).unwrap();
    model.tensor_mut("fc1.bias").unwrap().as_mut_slice::<f32>().unwrap()[..16].fill(3.0);
    let tensors = model.tensors().map(|tensor| (tensor.name(), tensor));
    let metadata = model.metadata().clone();
    maptensors::SaveOptions::new().all_metadata(metadata).checksums(true).save(tensors, at("tuned")).unwrap();
    let tuned = at("tuned");

    assert!(printed(&["diff", base, base]).starts_with("the same, bit for bit: 4 tensors"));
    let differs = run(&["diff", base, &tuned]);
    assert_eq!(differs.status.code(), Some(1), "{differs:?}");
    let text = String::from_utf8(differs.stdout).unwrap();
    assert!(text.starts_with("1 of 4 tensors changed: 16 elements, 64 B\n"), "{text}");
    assert!(text.contains("fc1.bias        16   64 B  25.0%      1"), "{text}");
    let json = run(&["diff", base, &tuned, "--json"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&json["equal"], &json["changed"][0]["elements"]), (&false.into(), &16.into()));
    assert!(complaint(&["diff", base, "nowhere"], 2).contains("nowhere"));

    assert!(printed(&["changed", base, &tuned, "--filter", "fc2.*"]).starts_with("0 of 4"));
    printed(&["changed", base, &tuned, "--frozen", "fc2.*"]);
    let complained = complaint(&["changed", base, &tuned, "--frozen", "*.bias"], 1);
    assert_eq!(complained, "maptensors: fc1.bias was to stay frozen, and changed\n");
    complaint(&["changed", base, "nowhere"], 2);

    printed(&["delta", base, &tuned, &at("delta")]);
    assert!(fs::metadata(at("delta")).unwrap().len() < 2048);
    printed(&["apply", base, &at("delta"), &at("again")]);
    printed(&["diff", &tuned, &at("again")]);
    assert!(complaint(&["apply", &tuned, &at("delta"), &at("never")], 1).contains("made against content"));
    assert!(!Path::new(&at("never")).exists());
    complaint(&["apply", base, &at("delta")], 2);

    assert!(printed(&["verify", &tuned, &at("again")]).contains("4 tensors as saved"));
    assert!(complaint(&["verify", base], 2).contains("nothing to verify"));
    assert!(printed(&["verify", "--missing-ok", base]).contains("no checksums"));
    let mut bytes = fs::read(&tuned).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&tuned, bytes).unwrap();
    let damaged = run(&["verify", &tuned]);
    assert_eq!(damaged.status.code(), Some(1));
    assert!(String::from_utf8(damaged.stdout).unwrap().contains("damaged: fc2.bias"));

    // The answer is the exit code, also where nobody reads what is printed, or it cannot be.
    for (args, unread, unwritable) in [
        (&["verify", &tuned][..], 1, 2),
        (&["diff", base, base], 0, 2),
        (&["diff", base, &tuned], 1, 2),
        (&["changed", base, &tuned, "--frozen", "*.bias"], 1, 2),
    ] {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        drop(child.stdout.take());
        assert_eq!(child.wait().unwrap().code(), Some(unread), "{args:?}");
        if let Ok(full) = fs::File::options().write(true).open("/dev/full") {
            let status = command(args).stdout(full).stderr(Stdio::null()).status().unwrap();
            assert_eq!(status.code(), Some(unwritable), "{args:?}");
        }
    }
}

#[test]
fn the_version_is_the_crates() {
    assert_eq!(printed(&["--version"]), concat!("maptensors ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn a_file_is_shown_with_its_tensors_metadata_and_totals() {
    let text = printed(&["inspect", "models/digits.safetensors"]);
    let row = |first: &str| -> Vec<&str> {
        let found = text.lines().find(|line| line.starts_with(first));
        found.unwrap_or_else(|| panic!("no {first} in\n{text}")).split_whitespace().collect()
    };
    assert_eq!(row("fc1.weight"), ["fc1.weight", "F32", "[64,64]", "688", "16.0", "KiB", "16"]);
    assert_eq!(row("fc2.bias"), ["fc2.bias", "F32", "[10]", "17072", "40", "B", "16"]);
    assert_eq!(row("F32"), ["F32", "4", "4,810", "18.8", "KiB", "100.0%"]);
    assert!(text.starts_with(
        "models/digits.safetensors\n\
         4 tensors, 4,810 elements, 18.8 KiB\n\
         1 file, 19.2 KiB, data from byte 432\n\n"
    ));
    assert!(text.contains("architecture") && text.contains("64-64-10 MLP, ReLU, inputs pixel/16"));
    assert!(text.contains("every tensor is aligned for its dtype"));
}

#[test]
fn a_sharded_set_says_which_shard_holds_what() {
    for path in ["models/digits-sharded", "models/digits-sharded/model.safetensors.index.json"] {
        let text = printed(&["inspect", path]);
        assert!(text.contains("\n2 shards, 19.4 KiB\n"), "{text}");
        let shard = |name: &str| text.lines().find(|l| l.starts_with(name)).unwrap().chars().last().unwrap();
        assert_eq!((shard("fc1.weight"), shard("fc2.weight")), ('1', '2'));
        assert!(text.contains("model-00001-of-00002.safetensors") && text.contains("16.5 KiB"), "{text}");
    }
}

#[test]
fn several_paths_are_shown_one_after_another() {
    let text =
        printed(&["inspect", "--summary", "models/digits.safetensors", "models/digits-bf16.safetensors"]);
    let first = text.find("models/digits.safetensors\n").unwrap();
    let second = text.find("\n\nmodels/digits-bf16.safetensors\n").unwrap();
    assert!(first < second && !text.contains("fc1.weight"), "{text}");
}

#[test]
fn lines_fit_80_columns_where_the_terminal_is_unknown() {
    for path in [
        "models/digits.safetensors",
        "models/digits-bf16.safetensors",
        "models/digits-heldout.safetensors",
        "models/digits-sharded",
    ] {
        for line in printed(&["inspect", path]).lines() {
            assert!(line.chars().count() <= 80 && line.trim_end() == line, "{path}: {line:?}");
        }
    }
}

#[test]
fn a_name_cannot_drive_the_terminal() {
    for file in ["names", "metadata"] {
        let path = format!("models/golden/{file}.safetensors");
        for args in [&["inspect", &path][..], &["inspect", &path, "--json"]] {
            let text = printed(args);
            assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
        }
    }
    let text = printed(&["inspect", "models/golden/names.safetensors"]);
    assert!(
        text.contains("\\u{1b}[31mred") && text.contains("\"\"") && text.contains("unicode-é漢"),
        "{text}"
    );
    let names = json(&["inspect", "models/golden/names.safetensors", "--json"]);
    assert_eq!(names["tensors"][1]["name"], "\u{1b}[31mred\u{1b}[0m", "JSON keeps the name itself");
}

#[test]
fn json_says_where_every_tensor_lies() {
    let model = json(&["inspect", "models/digits.safetensors", "--json"]);
    assert_eq!(
        model["tensors"][1],
        serde_json::json!({
            "name": "fc1.weight", "dtype": "F32", "shape": [64, 64], "shard": "digits.safetensors",
            "offset": 688, "nbytes": 16384, "alignment": 16, "aligned": true,
        })
    );
    assert_eq!(
        model["totals"],
        serde_json::json!({
            "tensors": 4, "elements": 4810, "nbytes": 19240, "misaligned": 0, "nbytes_aligned_64": 0,
            "dtypes": [{"dtype": "F32", "tensors": 4, "elements": 4810, "nbytes": 19240}],
        })
    );
    assert_eq!(model["metadata"]["format"], "pt");
    assert_eq!(model["path"], "models/digits.safetensors");

    let set = json(&["inspect", "models/digits-sharded", "--json"]);
    assert_eq!(set["shards"][1]["file"], "model-00002-of-00002.safetensors");
    assert_eq!(set["totals"]["nbytes"], 19240);
    assert_eq!(set["shards"][0]["nbytes"], 16936);

    let brief = json(&["inspect", "models/digits.safetensors", "--json", "--no-tensors"]);
    assert_eq!((&brief["tensors"], &brief["totals"]), (&Value::Null, &model["totals"]));
}

#[test]
fn json_is_one_document_a_line_for_each_path() {
    let text = printed(&["inspect", "--json", "models/digits.safetensors", "models/digits-sharded"]);
    let documents: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(documents.len(), 2);
    assert_eq!(documents[1]["path"], "models/digits-sharded");
}

#[test]
fn every_golden_file_is_shown_with_what_the_reference_read() {
    let expected = fs::read_to_string("models/golden/expected.json").unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let expected = expected.as_object().unwrap();
    assert_eq!(expected.len(), 8);
    for (file, model) in expected {
        let path = format!("models/golden/{file}");
        printed(&["inspect", &path]);
        let shown = json(&["inspect", &path, "--json"]);
        let facts = |tensors: &Value| -> Vec<Value> {
            let fact = |t: &Value| serde_json::json!([t["name"], t["dtype"], t["shape"]]);
            let mut facts: Vec<Value> = tensors.as_array().unwrap().iter().map(fact).collect();
            facts.sort_by_key(Value::to_string);
            facts
        };
        assert_eq!(facts(&shown["tensors"]), facts(&model["tensors"]), "{file}");
        let none = serde_json::json!({});
        let metadata = if model["metadata"].is_null() { &none } else { &model["metadata"] };
        assert_eq!(&shown["metadata"], metadata, "{file}");
    }
}

#[test]
fn misaligned_tensors_are_marked_and_counted() {
    let text = printed(&["inspect", "models/golden/odd-header.safetensors"]);
    let misaligned =
        json(&["inspect", "models/golden/odd-header.safetensors", "--json"])["totals"]["misaligned"]
            .as_u64()
            .unwrap();
    assert!(misaligned > 0);
    assert_eq!(text.lines().filter(|line| line.ends_with("1!")).count() as u64, misaligned, "{text}");
    assert!(text.contains("misaligned (!) for the dtype: Python gets copies"), "{text}");
}

#[test]
fn a_filter_chooses_tensors_by_name_and_the_totals_follow() {
    let text = printed(&["inspect", "models/digits.safetensors", "--filter", "*.bias"]);
    assert!(text.contains("\n2 of 4 tensors, 74 elements, 296 B\n"), "{text}");
    assert!(text.contains("fc1.bias") && !text.contains("fc1.weight"), "{text}");
    let both = ["inspect", "models/digits.safetensors", "--json", "-f", "fc1.bias", "-f", "*2*"];
    assert_eq!(json(&both)["totals"]["tensors"], 3);
}

#[test]
fn a_filter_that_matches_no_tensor_is_an_error_that_names_the_model() {
    let digits = "models/digits.safetensors";
    for args in [
        &["inspect"][..],
        &["inspect", "--json"],
        &["inspect", "-s"],
        &["prefetch"],
        &["evict"],
        &["checksum"],
    ] {
        let error = complaint(&[args, &[digits, "-f", "layers.*"]].concat(), 1);
        assert!(error.contains(&format!("{digits}: no name of its 4 tensors matches --filter")), "{error}");
    }
    // The others are shown all the same.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.safetensors");
    let layout =
        maptensors::Layout::builder().tensor("layers.0", maptensors::DType::U8, &[1]).build().unwrap();
    maptensors::Draft::create(&path, &layout).unwrap().commit().unwrap();
    let out = run(&["inspect", digits, path.to_str().unwrap(), "-f", "layers.*"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stdout).contains("layers.0"));
}

#[test]
fn a_path_that_is_not_there_is_named_and_the_others_are_shown() {
    let output = run(&["inspect", "models/nowhere.safetensors", "models/digits.safetensors"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.starts_with("maptensors: models/nowhere.safetensors: "), "{error}");
    assert_eq!(error.matches("No such file").count(), 1, "{error}");
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("models/digits.safetensors\n"));
}

#[test]
fn a_broken_file_is_a_failure_that_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("short.safetensors");
    let whole = fs::read("models/digits.safetensors").unwrap();
    fs::write(&path, &whole[..10_000]).unwrap();
    let error = complaint(&["inspect", path.to_str().unwrap()], 1);
    assert!(error.contains("short.safetensors") && error.contains("interrupted download"), "{error}");
    assert_eq!(error.lines().count(), 1);
}

#[test]
fn what_is_not_understood_is_a_usage_error() {
    for args in [
        &[][..],
        &["inspect"],
        &["inspect", "--fast", "x"],
        &["load", "x"],
        &["inspect", "x", "--filter", "[a"],
        &["demo", "x"],
        &["top"],
        &["top", "x", "--interval", "0"],
        &["top", "x", "--interval", "-1"],
        &["top", "x", "--interval", "soon"],
        &["top", "x", "--interval", "1e300"],
        &["inspect", "x", "--map", "--json"],
        &["inspect", "x", "--map", "--summary"],
        &["inspect", "x", "--map", "--filter", "*"],
        &["inspect", "x", "--map", "--color", "maybe"],
        &["inspect", "x", "--svg", "y"],
        &["inspect", "x", "y", "--map", "--svg", "z"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    // More than a pipe holds, so that the command is still writing when the reader leaves.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("many.safetensors");
    let tensors = (0..20_000).map(|i| (format!("model.layers.{i}.weight"), [0u8]));
    let views: Vec<_> = tensors.map(|(name, byte)| (name, (maptensors::DType::U8, [1], byte))).collect();
    maptensors::SaveOptions::new().durable(false).save(views, &path).unwrap();
    for extra in [&[][..], &["--json"]] {
        let mut child = command(&["inspect", path.to_str().unwrap()])
            .args(extra)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 10];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
    }
}

#[test]
fn the_demo_measures_what_it_claims_and_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let output = command(&["demo"]).env("TMPDIR", temp.path()).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");

    let touched = measured(&text, "data pages touched");
    assert_eq!(touched.len(), 2, "{text}");
    assert_eq!(touched[0], "0");
    assert_ne!(touched[1], "0", "using the weights touches their pages");
    assert_eq!(measured(&text, "mapped"), ["19672"]);
    let percent = |label: &str| measured(&text, label)[0].parse::<f64>().unwrap();
    // As models/README.md says, give or take what another order of additions changes.
    for (label, about) in [
        ("images it never saw: right", 98.0),
        ("moved images, before: right", 43.0),
        ("moved images, after: right", 94.0),
        ("unmoved images, after (the price): right", 62.0),
        ("reopened: moved images right", 94.0),
    ] {
        assert!((percent(label) - about).abs() < 1.5, "{label}: {}", percent(label));
    }
    assert_eq!(measured(&text, "the file before, FNV-1a"), measured(&text, "the file after, FNV-1a"));
    assert_eq!(measured(&text, "reopened: the same, bit for bit"), ["4"]);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0, "the temporary directory is removed");
}

#[test]
fn the_demo_keeps_its_files_where_it_is_told_to_and_overwrites_no_other() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("new");
    let dir = dir.to_str().unwrap();
    printed(&["demo", "--dir", dir]);
    printed(&["demo", "--dir", dir]); // its own files may be there already
    printed(&["inspect", &format!("{dir}/digits-tuned.safetensors")]);

    let other = Path::new(dir).join("digits.safetensors");
    fs::write(&other, b"someone's own").unwrap();
    let error = complaint(&["demo", "--dir", dir], 1);
    assert!(error.contains("cannot write") && error.contains("digits.safetensors"), "{error}");
    assert_eq!(fs::read(&other).unwrap(), b"someone's own");
}

#[test]
fn edit_changes_headers_and_says_how() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::copy("models/digits.safetensors", &path).unwrap();
    let at = path.to_str().unwrap();
    let before = json(&["inspect", "--json", at]);
    let set = ["edit", at, "--set", "a=b=c", "--rename", "fc1.weight=first.weight"];
    assert!(printed(&set).contains(at));
    let after = json(&["inspect", "--json", at]);
    assert_eq!(after["metadata"]["a"], "b=c");
    assert_eq!(after["totals"]["nbytes"], before["totals"]["nbytes"]);
    assert!(after["tensors"].as_array().unwrap().iter().any(|tensor| tensor["name"] == "first.weight"));
    assert!(printed(&["edit", at, "--set", "a=d"]).ends_with(": edited in place\n"));
    assert!(printed(&["edit", at, "--set", "a=d"]).ends_with(": unchanged\n"));
    printed(&["edit", at, "--unset", "a", "--no-sync"]);
    assert_eq!(json(&["inspect", "--json", at])["metadata"], before["metadata"]);
    for (args, code, words) in [
        (&["edit", at, "--unset", "a"][..], 1, "no metadata key \"a\""),
        (&["edit", at, "--rename", "fc1.weight=x"], 1, "there is no tensor \"fc1.weight\""),
        (&["edit", at, "--rename", "fc1.bias=fc2.bias"], 1, "is there twice"),
        (&["edit", at, "--set", "a"], 2, "no `=`"),
        (&["edit", at], 2, "--set"),
    ] {
        let said = complaint(args, code);
        assert!(said.contains(words), "{args:?}: {said}");
    }
}

#[test]
fn prefetch_and_evict_say_what_is_in_memory_and_leave_out_what_is_not_chosen() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.safetensors");
    let layout = maptensors::Layout::builder();
    let layout = layout.tensor("a.weight", maptensors::DType::U8, &[4 << 20]);
    let layout = layout.tensor("b.weight", maptensors::DType::U8, &[4 << 20]).build().unwrap();
    maptensors::Draft::create(&path, &layout).unwrap().commit().unwrap();
    let name = path.to_str().unwrap();
    // SAFETY: nobody writes to the file.
    #[allow(unsafe_code)]
    let model = unsafe { maptensors::Model::open(&path) }.unwrap();
    let resident = |tensor: &str| model.residency_of(tensor).unwrap().resident * 4096;

    assert!(printed(&["evict", name]).contains("0 B still in memory"));
    assert_eq!(resident("a.weight") + resident("b.weight"), 0);
    assert_eq!(printed(&["prefetch", name, "--filter", "a.*"]), format!("{name}: 4.0 MiB in memory\n"));
    assert_eq!(resident("a.weight"), 4 << 20);
    printed(&["prefetch", name]);
    let evicted = printed(&["evict", name, "-f", "b.*"]);
    assert_eq!(evicted, format!("{name}: 4.0 MiB freed, 0 B still in memory\n"));
    assert_eq!((resident("a.weight"), resident("b.weight")), (4 << 20, 0));

    let missing = complaint(&["prefetch", "nowhere.safetensors", name], 1);
    assert!(missing.contains("nowhere.safetensors"), "{missing}");
    assert!(complaint(&["evict", name, "-f", "c.*"], 1).contains("no name of its 2 tensors"));
}

#[test]
fn what_is_locked_is_held_until_interrupted() {
    use std::io::BufRead as _;
    let mut child =
        command(&["prefetch", "--lock", "models/digits.safetensors"]).stdout(Stdio::piped()).spawn().unwrap();
    let lines: Vec<String> =
        std::io::BufReader::new(child.stdout.take().unwrap()).lines().take(2).map(Result::unwrap).collect();
    assert_eq!(lines[1], "held until interrupted");
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    assert_eq!(locked.trim(), "20 kB");
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn checksums_are_those_that_a_file_carries_whatever_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let model = maptensors::Model::read("models/digits.safetensors").unwrap();
    let options = maptensors::SaveOptions::new().checksums(true);
    options.save(model.tensors().map(|t| (t.name(), t)), &path).unwrap();
    let model = maptensors::Model::read(&path).unwrap();
    let carried: Value =
        serde_json::from_str(model.metadata().text("maptensors.checksums").unwrap()).unwrap();
    for budget in ["1", "2GiB"] {
        let text = printed(&["checksum", path.to_str().unwrap(), "--budget", budget]);
        let names: Vec<&str> = model.names().collect();
        let lines: Vec<(&str, &str)> = text.lines().map(|line| line.split_once("  ").unwrap()).collect();
        assert_eq!(lines.iter().map(|line| line.1).collect::<Vec<_>>(), names);
        assert!(lines.iter().all(|(sum, name)| carried[name] == *sum), "{text}");
    }
    let one = printed(&["checksum", path.to_str().unwrap(), "-f", "fc1.bias"]);
    assert_eq!(one.lines().count(), 1);
    let two = printed(&["checksum", path.to_str().unwrap(), "models/digits.safetensors", "-f", "fc1.bias"]);
    assert!(two.lines().all(|line| line.ends_with(".safetensors: fc1.bias")), "{two}");
    assert!(complaint(&["checksum", "--budget", "2x", "m"], 2).contains("2GiB"));
}

#[test]
fn an_index_that_misstates_the_size_is_warned_of_and_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let model = maptensors::Model::read("models/digits.safetensors").unwrap();
    maptensors::SaveOptions::new()
        .checksums(true)
        .max_shard_size(17_000)
        .save(model.tensors().map(|t| (t.name(), t)), at("model.safetensors"))
        .unwrap();
    let index = at("model.safetensors.index.json");
    let path = dir.path().to_str().unwrap();
    let size: u64 = model.tensors().map(|t| t.as_bytes().len() as u64).sum();
    let (right, wrong) = (format!("\"total_size\": {size}"), "\"total_size\": 7");
    assert_eq!(json(&["verify", "--json", path])["total_size"], Value::Null);
    assert!(!printed(&["verify", path]).contains("warning"));
    let text = fs::read_to_string(&index).unwrap();
    assert!(text.contains(&right), "{text}");
    fs::write(&index, text.replace(&right, wrong)).unwrap();

    let said = printed(&["verify", path]);
    assert!(said.contains("4 tensors as saved"), "{said}");
    assert!(
        said.contains(&format!("warning: the index says total_size 7, the tensors take {size}")),
        "{said}"
    );
    let verified = json(&["verify", "--json", path]);
    assert_eq!(verified["total_size"], serde_json::json!({ "found": 7, "expected": size }));
    assert_eq!((&verified["tensors"], &verified["checksums"]), (&4.into(), &true.into()));
    // Where there is nothing else to verify, too.
    let bare = at("bare");
    fs::create_dir(&bare).unwrap();
    for entry in fs::read_dir("models/digits-sharded").unwrap() {
        let from = entry.unwrap().path();
        let text = fs::read(&from).unwrap();
        let text = match String::from_utf8(text) {
            Ok(text) => text.replace(&right, wrong).into_bytes(),
            Err(binary) => binary.into_bytes(),
        };
        fs::write(Path::new(&bare).join(from.file_name().unwrap()), text).unwrap();
    }
    let answer = run(&["verify", &bare]);
    assert_eq!(answer.status.code(), Some(2));
    assert!(String::from_utf8(answer.stdout).unwrap().contains("warning: the index says total_size 7"));
    assert!(printed(&["verify", "--missing-ok", &bare]).contains("total_size 7"));
}

#[test]
fn an_edit_that_contradicts_itself_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    fs::copy("models/digits.safetensors", &path).unwrap();
    let (path, before) = (path.to_str().unwrap(), fs::read(&path).unwrap());
    for (args, says) in [
        (&["--set", "a=b", "--unset", "a"][..], "\"a\" is to be set and removed"),
        (&["--unset", "a", "--set", "a=b"], "\"a\" is to be set and removed"),
        (&["--set", "a=b", "--set", "a=c"], "set twice"),
        (&["--set", "=b"], "no key"),
        (&["--rename", "fc1.bias="], "no new name"),
        (&["--rename", "fc1.bias=x", "--rename", "fc1.bias=y"], "two new names"),
    ] {
        let error = complaint(&[&["edit", path], args].concat(), 2);
        assert!(error.contains(says), "{args:?}: {error}");
        assert!(fs::read(path).unwrap() == before, "{args:?}");
    }
    printed(&[
        "edit",
        path,
        "--set",
        "a=b",
        "--set",
        "a=b",
        "--rename",
        "fc1.bias=x",
        "--rename",
        "fc1.bias=x",
    ]);
}

#[test]
fn a_frozen_tensor_that_is_misspelled_does_not_pass() {
    let digits = "models/digits.safetensors";
    for (args, says) in
        [(&["--frozen", "fc1*", "--frozen", "embed*"][..], "embed*"), (&["--filter", "embed*"], "--filter")]
    {
        let error = complaint(&[&["changed", digits, digits], args].concat(), 2);
        assert!(error.contains(says), "{args:?}: {error}");
    }
    printed(&["changed", digits, digits, "--frozen", "fc1*", "--filter", "fc2*"]);
}

#[test]
fn what_a_fine_tune_added_removed_or_reshaped_is_not_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    fs::copy("models/digits.safetensors", &path).unwrap();
    let path = path.to_str().unwrap();
    printed(&["edit", path, "--rename", "fc1.bias=fc1.offset"]);
    let text = printed(&["changed", "models/digits.safetensors", path]);
    assert!(text.contains("added: fc1.offset") && text.contains("removed: fc1.bias"), "{text}");
    let text = printed(&["changed", "models/digits.safetensors", path, "--filter", "*.bias"]);
    assert!(!text.contains("fc1.offset") && text.contains("removed: fc1.bias"), "{text}");
}

#[test]
fn the_demo_writes_over_nothing_but_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let tuned = dir.path().join("digits-tuned.safetensors");
    fs::write(&tuned, "mine").unwrap();
    let error = complaint(&["demo", "--dir", dir.path().to_str().unwrap()], 1);
    assert!(error.contains("digits-tuned.safetensors"), "{error}");
    assert_eq!(fs::read(&tuned).unwrap(), b"mine");
}
