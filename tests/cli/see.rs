//! `maptensors inspect --map` and `maptensors top`: what is shown, held against what the kernel says.
#![allow(unsafe_code)]

use crate::common;
use maptensors::{DType, Draft, Layout, Model};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn command(args: &[&str]) -> Command {
    command_of(Path::new(env!("CARGO_BIN_EXE_maptensors")), args)
}

fn command_of(exe: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(exe);
    command.args(args).env_remove("NO_COLOR").env_remove("COLUMNS");
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

#[track_caller]
fn printed(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
    assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&printed(args)).unwrap()
}

/// A model of several dtypes: 8 MiB of floats, 4 of halves, 1 of bytes; the names are hostile.
fn model(path: &Path) {
    let layout = Layout::builder()
        .tensor(HOSTILE, DType::F32, &[2048, 1024])
        .tensor("b", DType::BF16, &[2048, 1024])
        .tensor("none", DType::I64, &[0])
        .tensor("u", DType::U8, &[1 << 20])
        .build()
        .unwrap();
    let mut draft = Draft::create(path, &layout).unwrap();
    draft.tensor_mut("u").unwrap().as_mut_slice::<u8>().unwrap().fill(1);
    draft.commit().unwrap();
}

/// Markup, a way out of an attribute, terminal controls, what XML cannot hold, and a reversal of text.
const HOSTILE: &str = "</title><script>&\"'\u{1b}[2J\u{0}\u{ffff}\u{202e}]]>é漢";

/// Brings a file in, and keeps it: what is mapped is not dropped from memory, whoever else asks for that.
fn hold(path: impl AsRef<Path>) -> Model {
    // SAFETY: nobody writes to the file.
    let model = unsafe { Model::open(path).unwrap() };
    touch(&model);
    model
}

fn touch(model: &Model) {
    let bytes = model.mapping(0).unwrap().as_bytes();
    assert_ne!(bytes.iter().step_by(4096).map(|&byte| u64::from(byte)).sum::<u64>(), 0);
}

/// Bytes of the file in pages that mincore(2) says are in memory, and its length.
fn resident(path: &Path) -> (u64, u64) {
    // SAFETY: nobody writes to the file.
    let model = unsafe { Model::open(path).unwrap() };
    let mapping = model.mapping(0).unwrap();
    let pages = mapping.residency(0..mapping.len()).unwrap();
    let len = mapping.len() as u64;
    ((pages.resident * pages.page_size) as u64, len)
}

/// The rows of a map without color: offset, letters, shades.
fn rows(text: &str) -> Vec<(String, String, String)> {
    let is_shade = |c: char| "░▒▓█".contains(c);
    text.lines()
        .take_while(|line| !line.starts_with("cell "))
        .filter(|line| line.ends_with(is_shade))
        .map(|line| {
            let (label, rest) = (line.chars().take(10), line.chars().skip(12));
            let letters: String = rest.clone().take_while(|&c| c != ' ').collect();
            let shades = rest.filter(|&c| is_shade(c)).collect();
            (label.collect::<String>().trim().to_owned(), letters, shades)
        })
        .collect()
}

/// What the legend says of a kind: bytes, and percent in memory.
fn legend<'a>(text: &'a str, what: &str) -> (&'a str, &'a str) {
    let mut lines = text.lines().skip_while(|line| !line.starts_with("cell "));
    let line = lines.find(|line| line.split_whitespace().nth(1) == Some(what));
    let words: Vec<&str> =
        line.unwrap_or_else(|| panic!("no {what} in\n{text}")).split_whitespace().collect();
    (words[words.len() - 3], words[words.len() - 1])
}

#[test]
fn a_map_without_color_is_letters_and_shades() {
    let _held = hold("models/digits.safetensors");
    let (floats, full) = ("F".repeat(32), "█".repeat(32));
    let row = |label: &str| format!("{label:>6} KiB  {floats}  {full}\n");
    let rows: String = ["2.0", "4.0", "6.0", "8.0", "10.0", "12.0", "14.0", "16.0"].map(row).concat();
    let (most, last, shades) = (&floats[..25], &floats[..20], "█".repeat(20));
    let expected = format!(
        "models/digits.safetensors\n\
         1 file, 19.2 KiB, 100.0% of it in memory; a cell is 64 B\n\n       \
         0 B  #######{most}  {full}\n{rows}  \
         18.0 KiB  {last:<32}  {shades}\n\n\
         cell  what    tensors     bytes  in memory\n\
         #     header              432 B     100.0%\n\
         F     F32           4  18.8 KiB     100.0%\n\n\
         in memory: ░ nothing  ▒ less than half  ▓ half or more  █ all\n"
    );
    assert_eq!(printed(&["inspect", "--map", "models/digits.safetensors"]), expected);
}

#[test]
fn what_is_in_memory_is_what_mincore_says_and_looking_brings_in_the_header_alone() {
    const TEST: &str = "what_is_in_memory_is_what_mincore_says_and_looking_brings_in_the_header_alone";
    let dir = common::disk_dir();
    if common::on_tmpfs(dir.path()) {
        return common::skip(TEST, "nothing can be evicted from a tmpfs");
    }
    let path = dir.path().join("model.safetensors");
    let at = path.to_str().unwrap();
    model(&path);
    let shades = |text: &str| rows(text).into_iter().map(|(_, _, shades)| shades).collect::<String>();

    common::cold(&path);
    let text = printed(&["inspect", "--map", at]);
    assert!(text.contains("1 file, 13.0 MiB, 0.0% of it in memory; a cell is 16.0 KiB\n"), "{text}");
    assert!(shades(&text).chars().all(|shade| shade == '░'), "{text}");
    for (what, size) in
        [("header", "341"), ("padding", "3.7"), ("F32", "8.0"), ("BF16", "4.0"), ("U8", "1.0")]
    {
        assert_eq!(legend(&text, what), (size, "0.0%"), "{text}");
    }

    // To read the header, a few pages came in; another look, by another process, adds none.
    let (before, len) = resident(&path);
    assert!(before > 0 && before < len / 8, "{before}");
    let again = printed(&["inspect", "--map", at]);
    assert!(legend(&again, "header").1 == "100.0%" && legend(&again, "U8").1 == "0.0%", "{again}");
    assert_eq!(resident(&path).0, before);

    // Some of it: as much as mincore says, where it says.
    common::cold(&path);
    let file = File::open(&path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    file.read_exact_at(&mut vec![0; 3 << 20], 6 << 20).unwrap();
    let text = printed(&["inspect", "--map", at]);
    let (some, len) = resident(&path); // afterwards: with the header's pages
    let header = 4 * 4096;
    let shown = text.lines().nth(1).unwrap().split(", ").nth(2).unwrap();
    let shown: u64 = shown.split('%').next().unwrap().replace('.', "").parse().unwrap();
    let tenths = |bytes: u64| bytes * 1000 / len;
    assert!((tenths(some - header)..=tenths(some) + 1).contains(&shown), "{shown} {some}: {text}");
    // 2 of 8 MiB of floats and 1 of 4 of halves were read. 16 KiB a cell.
    assert_eq!((legend(&text, "F32").1, legend(&text, "BF16").1), ("25.0%", "24.9%"), "{text}");
    let shades: Vec<char> = shades(&text).chars().collect();
    assert!(shades[384..576].iter().all(|&shade| shade == '█'), "{text}");
    assert!(shades[..384].iter().chain(&shades[576..]).all(|&shade| shade == '░'), "{text}");

    let _held = hold(&path);
    let text = printed(&["inspect", "--map", at]);
    assert!(text.contains("13.0 MiB, 100.0% of it in memory"), "{text}");
    assert!(shades_of(&text).chars().all(|shade| shade == '█'), "{text}");
    assert_eq!(resident(&path).0, len.next_multiple_of(4096));
}

fn shades_of(text: &str) -> String {
    rows(text).into_iter().map(|(_, _, shades)| shades).collect()
}

#[test]
fn a_map_shows_dtypes_and_padding_where_they_lie() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    model(&path);
    let text = printed(&["inspect", "--map", path.to_str().unwrap()]);
    let letters: String = rows(&text).into_iter().map(|(_, letters, _)| letters).collect();
    // Header and padding have 4 KiB of the first cell's 16, so everything starts a quarter late.
    let expected = format!("{}{}{}u", "F".repeat(512), "B".repeat(256), "u".repeat(64));
    assert_eq!(letters, expected, "{text}");
    assert_eq!(rows(&text)[1].0, "512.0 KiB");
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");

    // A header has cells of its own where cells are small.
    let layout = Layout::builder().tensor("w", DType::F64, &[4096]).build().unwrap();
    let path = dir.path().join("small.safetensors");
    Draft::create(&path, &layout).unwrap().commit().unwrap();
    let text = printed(&["inspect", "--map", path.to_str().unwrap()]);
    let letters: String = rows(&text).into_iter().map(|(_, letters, _)| letters).collect();
    let start = letters.find('D').unwrap();
    let data =
        json(&["inspect", "--json", path.to_str().unwrap()])["shards"][0]["data_start"].as_u64().unwrap();
    assert_eq!((start as u64 * 64, letters.len() - start), (data, 512), "{text}");
    assert!(letters.starts_with('#'), "{text}");

    // Nothing but a header, and its padding.
    let path = dir.path().join("none.safetensors");
    let mut bytes = 120u64.to_le_bytes().to_vec();
    bytes.extend(format!("{:<120}", "{}").into_bytes());
    fs::write(&path, bytes).unwrap();
    let text = printed(&["inspect", "--map", path.to_str().unwrap()]);
    assert_eq!(rows(&text), [("0 B".into(), "..".into(), "██".into())], "{text}");
    assert_eq!((legend(&text, "header").0, legend(&text, "padding").0), ("10", "118"));
}

#[test]
fn each_shard_is_drawn_on_one_scale() {
    for path in ["models/digits-sharded", "models/digits-sharded/model.safetensors.index.json"] {
        let text = printed(&["inspect", "--map", path]);
        let first = text.find("\nmodel-00001-of-00002.safetensors: 16.5 KiB, ").unwrap();
        let second = text.find("\nmodel-00002-of-00002.safetensors: 2.8 KiB, ").unwrap();
        assert!(first < second && text.contains("2 files, 19.4 KiB"), "{text}");
        assert_eq!(rows(&text).len(), 9 + 2, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
    let two = printed(&["inspect", "--map", "models/digits.safetensors", "models/digits-bf16.safetensors"]);
    assert!(two.contains("\n\nmodels/digits-bf16.safetensors\n1 file"), "{two}");
    let half = run(&["inspect", "--map", "nowhere", "models/digits.safetensors"]);
    assert_eq!(half.status.code(), Some(1));
    assert!(half.stdout.starts_with(b"models/digits.safetensors\n"), "{half:?}");
}

#[test]
fn a_terabyte_of_holes_is_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge.safetensors");
    let shape = [1u64 << 20, 1 << 18];
    let header = format!(
        "{:<4088}",
        serde_json::json!({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0u64, 1u64 << 40]}})
            .to_string()
    );
    fs::write(&path, common::file_of(&header, 0)).unwrap();
    if let Err(error) = File::options().write(true).open(&path).unwrap().set_len(4096 + (1 << 40)) {
        return common::skip("a_terabyte_of_holes_is_drawn", error);
    }
    let text = printed(&["inspect", "--map", path.to_str().unwrap()]);
    assert!(text.contains("1 file, 1.0 TiB, 0.0% of it in memory; a cell is 2.0 GiB\n"), "{text}");
    assert_eq!(legend(&text, "header").1, "100.0%", "{text}");
    assert_eq!(rows(&text).len(), 17);
    // Its process table entry is one more thing that must not be walked by the page.
    let found = json(&["top", "--json", path.to_str().unwrap()]);
    assert_eq!(found["totals"]["nbytes"], 4096 + (1u64 << 40));
}

#[test]
fn color_is_for_terminals_unless_told_otherwise() {
    let path = "models/digits.safetensors";
    for args in [&["inspect", "--map", path][..], &["inspect", "--map", path, "--color", "never"]] {
        assert!(!printed(args).contains('\u{1b}'), "{args:?}");
    }
    let _held = hold(path);
    let text = printed(&["inspect", "--map", path, "--color", "always"]);
    let first = format!(
        "\n       0 B  \u{1b}[38;5;250m{}\u{1b}[38;5;69m{}\u{1b}[0m\n   4.0 KiB  ",
        "█".repeat(7),
        "█".repeat(57)
    );
    assert!(text.contains(&first), "{text}");
    assert!(text.contains("\n\u{1b}[38;5;69m████\u{1b}[0m  F32 "), "{text}");
    // What turns color on turns it off at every line's end.
    for line in text.lines().filter(|line| line.contains('\u{1b}')) {
        let last = line.rfind('\u{1b}').unwrap();
        assert!(line[last..].starts_with("\u{1b}[0m"), "{line:?}");
    }
}

/// Whether a text is well-formed, as far as our pictures go: elements nest, attributes are quoted, `<` and `&`
/// stand for themselves nowhere, and every character may be in a document. Returns the elements' names.
fn elements(xml: &str) -> Vec<String> {
    let allowed =
        |c: char| matches!(c, '\n' | '\t' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..);
    assert!(xml.chars().all(allowed), "a character that XML has not");
    let (mut open, mut seen) = (Vec::new(), Vec::new());
    for (i, piece) in xml.split('<').enumerate() {
        let (tag, text) = if i == 0 { ("", piece) } else { piece.split_once('>').expect("a tag that ends") };
        for entity in text.split('&').skip(1).chain(tag.split('&').skip(1)) {
            let name = entity.split_once(';').expect("an entity that ends").0;
            assert!(["amp", "lt", "gt", "quot", "#39"].contains(&name), "&{name};");
        }
        assert!(!text.contains('>') || seen.last().is_some_and(|last| last == "style"), "{text}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
        } else if i > 0 {
            let name = tag.split([' ', '/']).next().unwrap();
            assert!(name.chars().all(|c| c.is_ascii_lowercase()), "<{tag}>");
            for (k, part) in tag.split('"').enumerate() {
                let between = part.trim().trim_end_matches('/');
                assert!(k % 2 == 1 || k == 0 || between.is_empty() || between.ends_with('='), "<{tag}>");
            }
            assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
            seen.push(name.to_owned());
            if !tag.ends_with('/') {
                open.push(name.to_owned());
            }
        }
    }
    assert!(open.is_empty(), "{open:?}");
    seen
}

#[test]
fn an_svg_is_well_formed_whatever_the_names_and_says_what_is_where() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a<b>&'\".safetensors");
    model(&path);
    let _held = hold(&path); // what was never written is not in memory yet
    let out = dir.path().join("map.svg");
    let said = printed(&["inspect", "--map", path.to_str().unwrap(), "--svg", out.to_str().unwrap()]);
    assert!(said.starts_with(out.to_str().unwrap()) && said.ends_with(" KiB\n"), "{said}");
    let svg = fs::read_to_string(&out).unwrap();
    let elements = elements(&svg);
    assert_eq!((&elements[0][..], &elements[1][..], &elements[2][..]), ("svg", "title", "desc"));
    assert!(!elements.iter().any(|name| name == "script"), "{elements:?}");
    let runs = svg.matches("<rect class=\"k").count();
    assert!(runs < 60, "equal cells are one rectangle: {runs}");
    assert!(svg.len() < 20_000, "{}", svg.len());
    assert!(svg.contains("role=\"img\"") && svg.contains("prefers-color-scheme:dark"), "{svg}");
    let name = "&lt;/title&gt;&lt;script&gt;&amp;&quot;&#39;\\u{1b}[2J\\u{0}\\u{ffff}\\u{202e}]]&gt;é漢";
    let tip = format!("\n{name} F32 [2048,1024]: 8.0 MiB at 4,096, 100.0% in memory");
    assert!(svg.contains(&tip), "{svg}");
    assert!(svg.contains("BF16: 4.0 MiB in 1 tensor, 100.0% in memory"), "{svg}");
    assert!(svg.contains("<title>U8: "), "{svg}");
    assert!(!svg.contains("href") && svg.matches("http").count() == 1, "nothing is fetched");
    // An XML parser's opinion, where there is one.
    let script = "import sys, xml.dom.minidom as d; d.parse(sys.argv[1])";
    match Command::new("python3").args(["-c", script]).arg(&out).output() {
        Ok(parsed) => assert!(parsed.status.success(), "{parsed:?}"),
        Err(error) => common::skip(
            "an_svg_is_well_formed_whatever_the_names_and_says_what_is_where",
            format!("with Python's parser: {error}"),
        ),
    }
}

#[test]
fn an_svg_is_written_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("map.svg");
    let at = out.to_str().unwrap();
    let failed = run(&["inspect", "--map", "nowhere", "--svg", at]);
    assert_eq!((failed.status.code(), out.exists()), (Some(1), false));
    fs::write(&out, "<svg>old").unwrap();
    let set = "models/digits-sharded";
    let several = run(&["inspect", "--map", set, "models/digits.safetensors", "--svg", at]);
    assert_eq!(several.status.code(), Some(2));
    let said = String::from_utf8(several.stderr).unwrap();
    assert!(said.contains("--svg draws one model: run it once for each path"), "{said}");
    assert_eq!(fs::read(&out).unwrap(), b"<svg>old");
    let mut reader = File::open(&out).unwrap();
    printed(&["inspect", "--map", set, "--svg", at]);
    let svg = fs::read_to_string(&out).unwrap();
    assert!(svg.contains("model-00002-of-00002.safetensors: 2.8 KiB"), "every shard is in it");
    assert!(elements(&svg).len() > 20);
    assert_eq!(common::listing(dir.path()), ["map.svg"], "and nothing beside it");
    let mut old = String::new();
    reader.read_to_string(&mut old).unwrap();
    assert_eq!(old, "<svg>old", "who had the old file keeps it");
    // Not over the model that is drawn, nor any other file.
    for (name, says) in [("own", "no SVG"), ("own.safetensors", "a picture would be written")] {
        let own = dir.path().join(name);
        fs::copy("models/digits.safetensors", &own).unwrap();
        let refused = run(&["inspect", "--map", own.to_str().unwrap(), "--svg", own.to_str().unwrap()]);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(1) && said.contains(says), "{said}");
        assert_eq!(fs::read(&own).unwrap(), fs::read("models/digits.safetensors").unwrap());
    }
}

/// Sums over the mappings of a file, of a process's smaps: size, and the fields named as there, in bytes.
fn smaps(pid: u32, path: &Path) -> Vec<u64> {
    const FIELDS: [&str; 9] = [
        "Size:",
        "Rss:",
        "Pss:",
        "Shared_Clean:",
        "Shared_Dirty:",
        "Private_Clean:",
        "Private_Dirty:",
        "Swap:",
        "Locked:",
    ];
    let path = path.to_str().unwrap();
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut sums = vec![0; FIELDS.len()];
    let mut ours = false;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words[0].contains('-') {
            ours = line.ends_with(path);
        } else if let Some(i) = FIELDS.iter().position(|&field| ours && words[0] == field) {
            sums[i] += words[1].parse::<u64>().unwrap() * 1024;
        }
    }
    sums
}

#[test]
fn top_finds_every_process_that_maps_a_file_with_what_smaps_says() {
    const TEST: &str = "top_finds_every_process_that_maps_a_file_with_what_smaps_says";
    if let Some(dir) = common::role("map") {
        // SAFETY: nobody writes to the file.
        let mut model = unsafe { maptensors::ModelMut::open(dir.join("model.safetensors")).unwrap() };
        model.tensor_mut("b").unwrap().as_bytes_mut()[..10 * 4096].fill(3);
        println!("mapped");
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let dir = common::disk_dir();
    let path = dir.path().join("model.safetensors");
    model(&path);
    let model = hold(&path);
    let mut child = common::child(TEST, "map", dir.path());
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("mapped") {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "the child ended");
    }

    let ours = std::process::id();
    let at = path.to_str().unwrap();
    // Between two looks at smaps that agree: the kernel may take pages from a process meanwhile.
    let mut seen = None;
    let held_still = common::soon(|| {
        touch(&model);
        let look = || [ours, child.id()].map(|pid| smaps(pid, &path));
        let (before, found, after) = (look(), json(&["top", at, "--json"]), look());
        let holds = before == after && after[0][1] >= 13 << 20;
        seen = holds.then_some((found, after));
        holds
    });
    assert!(held_still);
    let (found, regions) = seen.unwrap();
    let processes = found["processes"].as_array().unwrap();
    let pids: Vec<u64> = processes.iter().map(|process| process["pid"].as_u64().unwrap()).collect();
    assert_eq!(pids, [u64::from(ours), u64::from(child.id())], "the largest first");
    for ((process, pid), region) in processes.iter().zip([ours, child.id()]).zip(regions) {
        let [size, rss, pss, shared_clean, shared_dirty, private_clean, private_dirty, swap, locked] =
            region[..]
        else {
            panic!()
        };
        let expected = serde_json::json!({
            "size": size, "rss": rss, "pss": pss, "shared": shared_clean + shared_dirty,
            "private_clean": private_clean, "private_dirty": private_dirty, "swap": swap, "locked": locked,
        });
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&process[key], value, "{key} of {pid}");
            assert_eq!(&process["files"][0][key], value, "{key} of {pid}");
        }
        // The harness, and the same again for the child.
        assert!(rss > 0 && process["command"].as_str().unwrap().contains("/cli-"), "{process}");
    }
    assert_eq!(processes[1]["private_dirty"], 10 * 4096, "what was written is the child's own");
    let totals = &found["totals"];
    assert_eq!(totals["nbytes"], fs::metadata(&path).unwrap().len());
    assert_eq!(totals["resident"], totals["nbytes"]);
    let pss = processes.iter().map(|process| process["pss"].as_u64().unwrap()).sum::<u64>();
    assert_eq!(totals["pss"], pss);

    // For people.
    let text = printed(&["top", at]);
    let lines: Vec<&str> = text.lines().collect();
    let words = |i: usize| lines[i].split_whitespace().collect::<Vec<_>>();
    assert_eq!(words(0), ["PID", "USER", "SIZE", "RSS", "PSS", "SHARED", "PRIVATE", "COMMAND"]);
    assert_eq!((words(1)[0], words(2)[0]), (&ours.to_string()[..], &child.id().to_string()[..]));
    assert_eq!((words(3)[0], words(3).last()), ("total", Some(&"processes")));
    assert!(
        text.contains(&format!("\n\n{at}: 13.0 MiB, 13.0 MiB of it (100.0%) in the page cache\n")),
        "{text}"
    );

    // A file is its inode: another name finds it, its old one is nobody's, and its successor another file.
    let renamed = dir.path().join("renamed.safetensors");
    fs::rename(&path, &renamed).unwrap();
    let found = json(&["top", renamed.to_str().unwrap(), "--json"]);
    assert_eq!(found["processes"].as_array().unwrap().len(), 2);
    let gone = run(&["top", at]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8(gone.stderr).unwrap().contains("No such file"));
    fs::copy(&renamed, &path).unwrap();
    assert!(printed(&["top", at]).starts_with("no process maps it\n\n"), "a copy");
    // All files of a directory that is no model; one that is named twice counts once.
    fs::rename(&path, dir.path().join("other.safetensors")).unwrap();
    File::create(dir.path().join(".hidden")).unwrap();
    let found = json(&["top", dir.path().to_str().unwrap(), renamed.to_str().unwrap(), "--json"]);
    let paths = found["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap());
    let paths: Vec<&str> = paths.map(|path| path.rsplit('/').next().unwrap()).collect();
    assert_eq!(paths, ["other.safetensors", "renamed.safetensors"]);
    assert_eq!(found["processes"].as_array().unwrap().len(), 2);
    assert_eq!(found["processes"][0]["files"][0]["file"], 1);

    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    let found = json(&["top", renamed.to_str().unwrap(), "--json"]);
    assert_eq!(found["processes"].as_array().unwrap().len(), 1, "it ended");
    drop(model);
}

/// A directory seen through an overlay, as in a container; gone when dropped.
struct Overlay(tempfile::TempDir);

impl Overlay {
    /// With a model in it.
    fn new(test: &str) -> Option<Self> {
        let root = common::disk_dir();
        let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
        let (lower, upper, work, mount) = (at("lower"), at("upper"), at("work"), at("mount"));
        for dir in [&lower, &upper, &work, &mount] {
            fs::create_dir(dir).unwrap();
        }
        model(&Path::new(&lower).join("model.safetensors"));
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let mounted =
            Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options, &mount]).output();
        if mounted.as_ref().is_ok_and(|output| output.status.success()) {
            return Some(Self(root));
        }
        common::skip(test, format!("on an overlay: {mounted:?}"));
        None
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mount/model.safetensors")
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let unmount = Command::new("umount").arg("-l").arg(self.0.path().join("mount")).status();
        assert!(unmount.is_ok_and(|status| status.success()) || std::thread::panicking(), "umount");
    }
}

#[test]
fn what_is_true_on_a_disk_is_on_btrfs_overlays_and_tmpfs() {
    const TEST: &str = "what_is_true_on_a_disk_is_on_btrfs_overlays_and_tmpfs";
    // btrfs: stat(2) and the tables of mappings name different devices.
    let btrfs = common::mount::Mount::new(TEST, &["mkfs.btrfs", "-q"], 256 << 20);
    // An overlay: the pages are another file's.
    let overlay = Overlay::new(TEST);
    let shm =
        tempfile::tempdir_in("/dev/shm").map_err(|error| common::skip(TEST, format!("on a tmpfs: {error}")));
    let own =
        [btrfs.as_ref().map(common::mount::Mount::path), shm.as_ref().ok().map(|dir| dir.path().into())];
    let own = own.into_iter().flatten().map(|dir| {
        let path = dir.join("model.safetensors");
        model(&path);
        path
    });
    for path in own.chain(overlay.as_ref().map(Overlay::path)) {
        let model = hold(&path);
        let at = path.to_str().unwrap();
        let found = json(&["top", at, "--json"]);
        assert_eq!(found["processes"][0]["pid"], std::process::id(), "{at}: {found}");
        assert_eq!(found["totals"]["resident"], found["totals"]["nbytes"], "{at}");
        assert!(printed(&["inspect", "--map", at]).contains("100.0% of it in memory"), "{at}");
        drop(model);
    }
}

#[test]
fn top_takes_any_file_an_index_or_a_directory() {
    let exe = std::env::current_exe().unwrap();
    let found = json(&["top", exe.to_str().unwrap(), "--json"]);
    let pid = std::process::id();
    assert!(found["processes"].as_array().unwrap().iter().any(|process| process["pid"] == pid), "{found}");
    // SAFETY: nobody writes to the files.
    let model = unsafe { Model::open("models/digits-sharded").unwrap() };
    for path in ["models/digits-sharded", "models/digits-sharded/model.safetensors.index.json"] {
        let found = json(&["top", path, "--json"]);
        assert_eq!(found["files"].as_array().unwrap().len(), 2, "the shards, not the index");
        let ours = found["processes"].as_array().unwrap().iter().find(|process| process["pid"] == pid);
        assert_eq!(ours.unwrap()["files"].as_array().unwrap().len(), 2);
    }
    drop(model);
    let dir = tempfile::tempdir().unwrap();
    for (path, words) in [(dir.path(), "without files"), (Path::new("/dev/null"), "a device")] {
        let output = run(&["top", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8(output.stderr).unwrap().contains(words));
    }
    // Nobody can map it, and its path is a stranger's.
    let empty = dir.path().join("\u{1b}[2J");
    File::create(&empty).unwrap();
    let text = printed(&["top", empty.to_str().unwrap()]);
    assert!(text.contains("\\u{1b}[2J: 0 B, 0 B of it (-) in the page cache"), "{text}");
}

#[test]
fn what_others_may_not_see_is_said() {
    const TEST: &str = "what_others_may_not_see_is_said";
    if !common::is_root() {
        return common::skip(TEST, "only root can become somebody else");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (path, exe) = (dir.path().join("model.safetensors"), dir.path().join("maptensors"));
    model(&path);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_maptensors"), &exe).unwrap();
    // SAFETY: nobody writes to the file.
    let _model = unsafe { Model::open(&path).unwrap() };
    let as_nobody = |args: &[&str]| {
        let output = loop {
            // While another test forks, its child has the copy open to write.
            match command_of(&exe, args).uid(65_534).gid(65_534).current_dir("/").output() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
                output => break output.unwrap(),
            }
        };
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let at = path.to_str().unwrap();
    let text = as_nobody(&["top", at]);
    assert!(text.contains("could not be looked at: run as root\n"), "{text}");
    assert!(text.contains("told only to its owner"), "{text}");
    let found: Value = serde_json::from_str(&as_nobody(&["top", at, "--json"])).unwrap();
    assert!(found["unreadable"].as_u64().unwrap() > 0, "{found}");
    assert_eq!((&found["totals"]["resident"], found["files"][0]["path"].as_str()), (&Value::Null, Some(at)));
    let text = as_nobody(&["inspect", "--map", at]);
    assert!(text.contains("told only to the owner of a file") && !text.contains('█'), "{text}");
    assert_eq!(legend(&text, "F32"), ("8.0", "?"), "{text}");
    // One that may not even be read can still be looked for.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(as_nobody(&["top", at]).contains("13.0 MiB, "));
}

#[test]
fn top_looks_again_until_interrupted() {
    for extra in [&[][..], &["--json"]] {
        let mut child = command(&["top", "models/digits.safetensors", "--interval", "0.02"])
            .args(extra)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = Vec::new();
        for line in lines.by_ref() {
            seen.push(line.unwrap());
            let rounds = |what: &str| seen.iter().filter(|line| line.contains(what)).count();
            if rounds("in the page cache") == 3 || rounds("{\"files\":") == 3 {
                break;
            }
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(2), "as any program ends");
        drop(lines);
        assert!(!seen.iter().any(|line| line.contains('\u{1b}')), "{seen:?}");
        if extra.is_empty() {
            let first = seen.iter().position(|line| line.contains("in the page cache")).unwrap();
            assert!(seen[first..].iter().any(String::is_empty), "a blank line between: {seen:?}");
        } else {
            assert!(seen.iter().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{seen:?}");
        }
    }
}

#[test]
fn a_reader_that_goes_away_ends_it() {
    let mut child = command(&["top", "models/digits.safetensors", "--interval", "0.02"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
}
