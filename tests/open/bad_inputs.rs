//! Files that lie, files that are none, and systems that refuse: each has its error, by every way in, and
//! none a panic, a hang or a wild allocation.
#![allow(unsafe_code)]

use maptensors::{Content, Error, Model, ModelMut};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::common::{self, file_of, without_blocking};

fn open(path: &Path) -> Result<Model, Error> {
    // SAFETY: a test has its files to itself, and writes to none that is mapped.
    unsafe { Model::open(path) }
}

fn open_mut(path: &Path) -> Result<ModelMut, Error> {
    // SAFETY: as above.
    unsafe { ModelMut::open(path) }
}

fn kind<T>(result: &Result<T, Error>) -> &'static str {
    result.as_ref().err().map_or("OK", |error| error.kind().name())
}

/// What every way in says about a path, which is one thing. Its message can be printed.
fn verdict(path: &Path) -> (&'static str, String) {
    let results = [open(path).map(drop), open_mut(path).map(drop), Model::read(path).map(drop)];
    let kinds = results.each_ref().map(kind);
    assert!(kinds.iter().all(|kind| *kind == kinds[0]), "{}: {kinds:?}", path.display());
    let message = results[0].as_ref().err().map(Error::to_string).unwrap_or_default();
    assert!(!message.chars().any(char::is_control) && message.len() < 4000, "{message:?}");
    (kinds[0], message)
}

/// The verdict on these bytes as a file.
fn verdict_on(bytes: &[u8]) -> (&'static str, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let (kind, message) = verdict(&path);
    assert_eq!(
        Model::read(Content::new(bytes)).err().map_or("OK", |e| e.kind().name()),
        kind,
        "from memory: {message}"
    );
    if kind != "OK" && kind != "Value" {
        assert!(message.contains("model.safetensors"), "names the file: {message}");
    }
    (kind, message)
}

/// A header with this entry as its only tensor.
fn one(entry: &str) -> String {
    format!(r#"{{"a":{{{entry}}}}}"#)
}

#[test]
fn a_length_field_that_lies_has_its_error() {
    let framed = |len: u64, rest: &[u8]| [&len.to_le_bytes(), rest].concat();
    for (what, bytes, expected) in [
        ("0 bytes", vec![], "Truncated"),
        ("7 bytes", vec![2, 0, 0, 0, 0, 0, 0], "Truncated"),
        ("no header", framed(0, b""), "Json"),
        ("no header, but data", framed(0, b"data"), "Json"),
        ("an empty object", framed(2, b"{}"), "OK"),
        ("60 in an 8-byte file", framed(60, b""), "Truncated"),
        ("one past the file", framed(3, b"{}"), "Truncated"),
        ("one short of the header", framed(1, b"{}"), "Json"),
        ("2^64-1", framed(u64::MAX, b"{}"), "Limit"),
        ("2^63", framed(1 << 63, b"{}"), "Limit"),
        ("one over the limit", framed(100_000_001, b"{}"), "Limit"),
        ("the limit", framed(100_000_000, b"{}"), "Truncated"),
        ("not UTF-8", framed(4, b"{\"\xff\""), "Utf8"),
        ("half a character", framed(3, b"{\"\xc3"), "Utf8"),
        ("a surrogate in UTF-8", framed(5, b"{\"\xed\xa0\x80"), "Utf8"),
    ] {
        assert_eq!(verdict_on(&bytes).0, expected, "{what}");
    }
}

#[test]
fn another_kind_of_file_is_named_and_not_loaded() {
    for (start, word) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"[..], "LFS"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"PK\x03\x04\x14\0\0\0rest of a zip archive", "zip"),
        (b"\x80\x02}q\0(X\x06\0\0\0weightq\x01", "pickle"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", "pickle"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "numpy"),
        (b"{\"weight_map\":{}}", "index"),
    ] {
        let (kind, message) = verdict_on(start);
        assert!(kind == "Limit" && message.contains(word), "{word}: {kind} {message}");
    }
}

#[test]
#[allow(clippy::too_many_lines)] // a table
fn a_header_that_lies_has_its_error() {
    const F32: &str = r#""dtype":"F32""#;
    let shaped = |shape: &str| one(&format!(r#"{F32},"shape":{shape},"data_offsets":[0,4]"#));
    let typed = |dtype: &str| one(&format!(r#""dtype":{dtype},"shape":[1],"data_offsets":[0,4]"#));
    let placed = |offsets: &str| one(&format!(r#"{F32},"shape":[1],"data_offsets":{offsets}"#));
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{{F32},"shape":[1],"data_offsets":{a}}},"b":{{{F32},"shape":[1],"data_offsets":{b}}}}}"#
        )
    };
    let named = |a: &str, b: &str| two("[0,4]", "[4,8]").replace("\"a\"", a).replace("\"b\"", b);
    let good = placed("[0,4]");
    let huge = "9223372036854775808";
    let rows: Vec<(&str, String, usize, &str)> = vec![
        ("sound", good.clone(), 4, "OK"),
        ("rank 0", shaped("[]"), 4, "OK"),
        ("another order", two("[4,8]", "[0,4]"), 8, "OK"),
        ("leading white space", format!(" \n\t\r{good}"), 4, "OK"),
        ("a byte-order mark", format!("\u{feff}{good}"), 4, "Json"),
        ("NUL padding", format!("{good}\0\0"), 4, "Json"),
        ("something behind", format!("{good}x"), 4, "Json"),
        ("two objects", format!("{good}{good}"), 4, "Json"),
        ("an array", "[]".into(), 0, "Json"),
        ("null", "null".into(), 0, "Json"),
        ("a string", "\"a\"".into(), 0, "Json"),
        ("a number", "1".into(), 0, "Json"),
        ("white space only", "  ".into(), 0, "Json"),
        ("a trailing comma", good.replace("}}", "},}"), 4, "Json"),
        ("a comment", good.replace(":{", ":/**/{"), 4, "Json"),
        ("NaN", shaped("[NaN]"), 4, "Json"),
        ("cut JSON", good[..good.len() - 1].into(), 4, "Json"),
        ("a control character in a name", good.replace("\"a\"", "\"\n\""), 4, "Json"),
        ("half a surrogate pair", good.replace("\"a\"", "\"\\ud800\""), 4, "Json"),
        ("100,000 nested arrays", "[".repeat(100_000), 0, "Json"),
        ("100,000 nested objects", "{\"a\":".repeat(100_000), 0, "Json"),
        (
            "deep nesting in an unknown field",
            good.replace("}}", &format!(",\"x\":{}{}}}}}", "[".repeat(100_000), "]".repeat(100_000))),
            4,
            "Json",
        ),
        ("a name twice, other ranges", named("\"a\"", "\"a\""), 8, "Duplicate"),
        ("a name twice, one escaped", named("\"a\"", "\"\\u0061\""), 8, "Duplicate"),
        ("dtype twice", typed("\"F32\",\"dtype\":\"F32\""), 4, "Duplicate"),
        ("shape twice", shaped("[1],\"shape\":[1]"), 4, "Duplicate"),
        ("offsets twice", placed("[0,4],\"data_offsets\":[0,4]"), 4, "Duplicate"),
        ("metadata twice", r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "Duplicate"),
        ("a metadata key twice", r#"{"__metadata__":{"a":"","\u0061":""}}"#.into(), 0, "Duplicate"),
        ("metadata 1", r#"{"__metadata__":{"a":1}}"#.into(), 0, "Json"),
        ("metadata null", r#"{"__metadata__":{"a":null}}"#.into(), 0, "Json"),
        ("metadata {}", r#"{"__metadata__":{"a":{}}}"#.into(), 0, "Json"),
        ("metadata []", r#"{"__metadata__":[]}"#.into(), 0, "Json"),
        ("metadata as a tensor", good.replace("\"a\"", "\"__metadata__\""), 4, "Json"),
        ("no dtype", one(r#""shape":[1],"data_offsets":[0,4]"#), 4, "Json"),
        ("no shape", one(&format!(r#"{F32},"data_offsets":[0,4]"#)), 4, "Json"),
        ("no offsets", one(&format!(r#"{F32},"shape":[1]"#)), 4, "Json"),
        ("an entry that is null", r#"{"a":null}"#.into(), 0, "Json"),
        ("an entry that is a list", r#"{"a":["F32",[1],[0,4]]}"#.into(), 4, "Json"),
        ("dtype in lower case", typed("\"f32\""), 4, "DType"),
        ("dtype of the future", typed("\"F128\""), 4, "DType"),
        ("dtype empty", typed("\"\""), 4, "DType"),
        ("dtype with a terminal escape", typed("\"\\u001b[31m\""), 4, "DType"),
        ("dtype a number", typed("1"), 4, "Json"),
        ("dtype an object", typed("{\"F32\":null}"), 4, "Json"),
        ("dim 2.0", shaped("[2.0]"), 4, "Json"),
        ("dim 1e3", shaped("[1e3]"), 4, "Json"),
        ("dim -1", shaped("[-1]"), 4, "Json"),
        ("dim \"2\"", shaped("[\"2\"]"), 4, "Json"),
        ("dim 01", shaped("[01]"), 4, "Json"),
        ("dim 2^64", shaped("[18446744073709551616]"), 4, "Json"),
        ("a shape that is an object", shaped("{}"), 4, "Json"),
        ("overflow in elements", shaped(&format!("[{huge},2]")), 4, "Overflow"),
        ("overflow in bytes", shaped("[4611686018427387904]"), 4, "Overflow"),
        ("a size that wraps to 4 bytes", shaped("[4611686018427387905]"), 4, "Overflow"),
        ("2^64-1 elements", shaped("[18446744073709551615]"), 4, "Overflow"),
        (
            "a zero, then an overflow",
            one(&format!(r#"{F32},"shape":[0,{huge},{huge}],"data_offsets":[0,0]"#)),
            0,
            "OK",
        ),
        (
            "an overflow, then a zero",
            one(&format!(r#"{F32},"shape":[{huge},{huge},0],"data_offsets":[0,0]"#)),
            0,
            "OK",
        ),
        ("end before begin", placed("[4,0]"), 4, "Layout"),
        ("1 offset", placed("[0]"), 4, "Json"),
        ("3 offsets", placed("[0,4,4]"), 4, "Json"),
        ("a negative offset", placed("[-4,0]"), 4, "Json"),
        ("offsets of 2^64-1", placed("[18446744073709551611,18446744073709551615]"), 4, "Layout"),
        ("an overlap", two("[0,4]", "[2,6]"), 6, "Layout"),
        ("the same range twice", two("[0,4]", "[0,4]"), 4, "Layout"),
        ("a hole", two("[0,4]", "[8,12]"), 12, "Layout"),
        ("not from 0", placed("[4,8]"), 8, "Layout"),
        ("bytes behind the last", good.clone(), 5, "Layout"),
        ("one byte short", good.clone(), 3, "Truncated"),
        ("no data at all", good.clone(), 0, "Truncated"),
        ("a range that is not the shape", shaped("[2]"), 4, "Shape"),
        ("a range that is not the dtype", typed("\"F64\""), 4, "Shape"),
        (
            "an empty shape with bytes",
            one(&format!(r#"{F32},"shape":[0],"data_offsets":[0,4]"#)),
            4,
            "Shape",
        ),
        ("F4, odd", one(r#""dtype":"F4","shape":[3],"data_offsets":[0,2]"#), 2, "Align"),
        ("F4, scalar", one(r#""dtype":"F4","shape":[],"data_offsets":[0,1]"#), 1, "Align"),
        ("F6, not in fours", one(r#""dtype":"F6_E2M3","shape":[2],"data_offsets":[0,2]"#), 2, "Align"),
        ("rank 10^6", shaped(&format!("[{}]", vec!["1"; 1_000_000].join(","))), 4, "Limit"),
        ("rank 1024", shaped(&format!("[{}]", vec!["1"; 1024].join(","))), 4, "OK"),
        ("rank 1025", shaped(&format!("[{}]", vec!["1"; 1025].join(","))), 4, "Limit"),
        (
            "empty tensors at one offset",
            r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[0,3],"data_offsets":[0,0]}}"#.into(),
            0,
            "OK",
        ),
        (
            "an empty tensor amid another's bytes",
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}"#.into(),
            4,
            "Layout",
        ),
    ];
    for (what, header, data, expected) in rows {
        let (kind, message) = verdict_on(&file_of(&header, data));
        assert_eq!(kind, expected, "{what}: {message}");
    }
}

#[test]
fn a_million_and_a_half_empty_tensors_open() {
    let entry = |i: u32| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let entries: Vec<_> = (0..1_500_000).map(entry).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, file_of(&format!("{{{}}}", entries.join(",")), 0)).unwrap();
    let model = open(&path).unwrap();
    assert_eq!(model.len(), 1_500_000);
    assert_eq!(model.tensor("1499999").unwrap().shape(), [0]);
}

#[test]
fn any_name_is_a_key_and_never_a_path_or_a_terminal_command() {
    let long = "x".repeat(1 << 20);
    for name in ["", "\0", "../x", "/etc/passwd", &long, "\u{1b}[31m\u{7}", "\u{202e}abc", "a\nb", "é漢🦀"]
    {
        let key = serde_json::to_string(name).unwrap();
        let header = format!(r#"{{{key}:{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, file_of(&header, 1)).unwrap();
        let model = open(&path).unwrap();
        assert_eq!(model.tensor(name).unwrap().as_bytes(), [1]);
        let missing = model.tensor(&format!("{name}\u{1b}")).unwrap_err();
        let wrong = model.tensor(name).unwrap().as_slice::<f32>().unwrap_err();
        for (error, expected) in [(missing, "Missing"), (wrong, "DType")] {
            assert_eq!(error.kind().name(), expected);
            let text = error.to_string();
            assert!(
                !text.chars().any(|c| c.is_control() || c == '\u{202e}') && text.len() < 2000,
                "{text:?}"
            );
        }
        assert_eq!(common::listing(dir.path()), ["model.safetensors"]);
        // Damaged, the name is in an error.
        std::fs::write(&path, file_of(&header.replace("[0,1]", "[1,2]"), 2)).unwrap();
        assert_eq!(verdict(&path).0, "Layout");
    }
}

/// A shard with tensors of one byte each.
fn shard(names: &[&str]) -> Vec<u8> {
    let entries: Vec<_> = (0..)
        .zip(names)
        .map(|(i, n)| format!(r#""{n}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1))
        .collect();
    file_of(&format!("{{{}}}", entries.join(",")), names.len())
}

const INDEX: &str = "model.safetensors.index.json";

/// The verdict on a set with this index, after `prepare` has put into its directory what else it needs.
/// Beside the directory lies a shard that nobody may open.
fn verdict_on_set(index: &str, prepare: impl FnOnce(&Path)) -> (&'static str, String) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("set");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(root.path().join("x"), shard(&["a"])).unwrap();
    std::fs::write(dir.join(INDEX), index).unwrap();
    prepare(&dir);
    without_blocking("opening the set", move || {
        let by_index = verdict(&dir.join(INDEX));
        assert_eq!(verdict(&dir), by_index, "by its directory");
        drop(root);
        by_index
    })
}

fn map(pairs: &[(&str, &str)]) -> String {
    let map: serde_json::Map<_, _> = pairs.iter().map(|(t, s)| ((*t).to_owned(), (*s).into())).collect();
    serde_json::json!({ "weight_map": map }).to_string()
}

#[test]
fn a_shard_name_that_leads_out_of_the_directory_is_refused() {
    for name in [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "../x",
        "./../x",
        "sub/../../x",
        "sub/../x",
        "..\\x",
        "C:\\x",
        "C:x",
        "",
        ".",
        "..",
        "x/",
        "/",
        "sub/",
        "sub/.",
        "\\\\host\\x",
        "a\0b",
        "x\0",
    ] {
        let (kind, message) = verdict_on_set(&map(&[("a", name)]), |dir| {
            std::fs::create_dir(dir.join("sub")).unwrap();
            std::fs::write(dir.join("sub/x"), shard(&["a"])).unwrap();
            std::fs::write(dir.join("x"), shard(&["a"])).unwrap();
        });
        assert_eq!(kind, "Path", "{name:?}: {message}");
        assert!(message.contains(INDEX), "{message}");
    }
}

#[test]
fn a_shard_in_a_folder_below_the_index_opens_however_it_is_spelled() {
    for (a, b) in [("./x", "./y"), ("sub/x", "y"), ("./sub//x", "./y"), ("sub/./x", "sub/x"), ("link/x", "y")]
    {
        let (kind, message) = verdict_on_set(&map(&[("a", a), ("b", b)]), |dir| {
            std::fs::create_dir(dir.join("sub")).unwrap();
            symlink("sub", dir.join("link")).unwrap();
            let both = a.trim_start_matches("./").replace("/./", "/") == b;
            std::fs::write(dir.join("sub/x"), shard(if both { &["a", "b"] } else { &["a"] })).unwrap();
            std::fs::write(dir.join("x"), shard(&["a"])).unwrap();
            std::fs::write(dir.join("y"), shard(&["b"])).unwrap();
        });
        assert_eq!(kind, "OK", "{a} {b}: {message}");
    }
}

#[test]
fn what_another_system_keeps_beside_a_model_is_none() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["._m.safetensors", "m.safetensors"] {
        std::fs::write(dir.path().join(name), shard(&["a"])).unwrap();
    }
    assert_eq!(verdict(dir.path()).0, "OK");
    std::fs::write(dir.path().join("m.safetensors.index.json"), map(&[("a", "m.safetensors")])).unwrap();
    std::fs::write(dir.path().join("._m.safetensors.index.json"), "Mac OS X").unwrap();
    assert_eq!(verdict(dir.path()).0, "OK");
}

#[test]
fn of_a_file_and_an_index_of_one_name_none_is_chosen_unless_they_are_one_model() {
    for stem in ["model", "m"] {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(format!("{stem}{name}"));
        std::fs::write(at(".safetensors"), shard(&["a"])).unwrap();
        std::fs::write(at("-00001-of-00001.safetensors"), shard(&["a"])).unwrap();
        let index = |shard: &str| map(&[("a", &format!("{stem}{shard}"))]);
        std::fs::write(at(".safetensors.index.json"), index("-00001-of-00001.safetensors")).unwrap();
        let (kind, message) = verdict(dir.path());
        assert_eq!(kind, "Argument", "{message}");
        for name in [".safetensors", ".safetensors.index.json"] {
            assert!(message.contains(&format!("{stem}{name}")), "{message}");
            assert_eq!(verdict(&at(name)).0, "OK", "by its own path");
        }
        // An index that names the very file, or another name of it.
        std::fs::write(at(".safetensors.index.json"), index(".safetensors")).unwrap();
        assert_eq!(verdict(dir.path()).0, "OK");
        std::fs::remove_file(at("-00001-of-00001.safetensors")).unwrap();
        std::fs::hard_link(at(".safetensors"), at("-00001-of-00001.safetensors")).unwrap();
        std::fs::write(at(".safetensors.index.json"), index("-00001-of-00001.safetensors")).unwrap();
        assert_eq!(verdict(dir.path()).0, "OK");
        // A file of another name is no part of it.
        std::fs::rename(at(".safetensors"), dir.path().join("consolidated.safetensors")).unwrap();
        assert_eq!(verdict(dir.path()).0, "OK");
    }
}

#[test]
fn too_much_metadata_is_not_told_to_split_the_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let save = |options: maptensors::SaveOptions| options.save([("a", common::bytes_tensor(b"x"))], &path);
    let error = save(maptensors::SaveOptions::new().metadata("k", "x".repeat(100_000_001))).unwrap_err();
    assert_eq!(error.kind().name(), "Limit");
    assert!(error.to_string().contains("metadata") && !error.to_string().contains("shard"), "{error}");
    save(maptensors::SaveOptions::new()).unwrap();
    let edit = maptensors::HeaderEdit::new().metadata("k", "x".repeat(100_000_001));
    let error = edit.apply(&path).unwrap_err();
    assert!(error.to_string().contains("metadata") && !error.to_string().contains("shard"), "{error}");
}

#[test]
fn an_index_that_lies_has_its_error() {
    type Prepare = fn(&Path);
    let x: Prepare = |dir| std::fs::write(dir.join("x"), shard(&["a", "b"])).unwrap();
    let two: Prepare = |dir| {
        std::fs::write(dir.join("x"), shard(&["a"])).unwrap();
        std::fs::write(dir.join("y"), shard(&["b"])).unwrap();
    };
    let both: Prepare = |dir| {
        std::fs::write(dir.join("x"), shard(&["a", "b"])).unwrap();
        std::fs::write(dir.join("y"), shard(&["b"])).unwrap();
    };
    let plain = map(&[("a", "x")]);
    for (what, index, prepare, expected) in [
        ("sound", map(&[("a", "x"), ("b", "y")]), two, "OK"),
        ("a tensor the index does not list", plain.clone(), x, "OK"),
        ("wrong total_size", plain.replacen('{', r#"{"metadata":{"total_size":7},"#, 1), x, "OK"),
        ("odd total_size", plain.replacen('{', r#"{"metadata":{"total_size":"7"},"#, 1), x, "OK"),
        ("odd metadata", plain.replacen('{', r#"{"metadata":[1],"#, 1), x, "OK"),
        (
            "names that look strange",
            map(&[("a", "... é")]),
            |d| std::fs::write(d.join("... é"), shard(&["a"])).unwrap(),
            "OK",
        ),
        ("empty", String::new(), x, "Json"),
        ("no weight_map", "{}".into(), x, "Json"),
        ("weight_map null", r#"{"weight_map":null}"#.into(), x, "Json"),
        ("weight_map an array", r#"{"weight_map":[]}"#.into(), x, "Json"),
        ("number values", r#"{"weight_map":{"a":1}}"#.into(), x, "Json"),
        ("an array", "[]".into(), x, "Json"),
        ("cut", plain[..plain.len() - 1].into(), x, "Json"),
        ("something behind", format!("{plain}x"), x, "Json"),
        ("nested", "[".repeat(100_000), x, "Json"),
        ("a tensor twice", r#"{"weight_map":{"a":"x","a":"x"}}"#.into(), x, "Duplicate"),
        ("a tensor twice, escaped", r#"{"weight_map":{"a":"x","\u0061":"x"}}"#.into(), x, "Duplicate"),
        ("weight_map twice", r#"{"weight_map":{"a":"x"},"weight_map":{"a":"x"}}"#.into(), x, "Duplicate"),
        ("a tensor in no shard", map(&[("a", "x"), ("c", "x")]), x, "Missing"),
        ("a tensor in the other shard", map(&[("a", "y"), ("b", "x")]), two, "Missing"),
        ("a tensor in two shards", map(&[("a", "x"), ("b", "y")]), both, "Duplicate"),
        (
            "a shard twice by a link",
            map(&[("a", "x"), ("b", "y")]),
            |dir| {
                std::fs::write(dir.join("x"), shard(&["a", "b"])).unwrap();
                symlink("x", dir.join("y")).unwrap();
            },
            "Duplicate",
        ),
        ("the index itself", map(&[("a", INDEX)]), x, "Limit"),
        (
            "a damaged shard",
            map(&[("a", "x")]),
            |dir| std::fs::write(dir.join("x"), b"short").unwrap(),
            "Truncated",
        ),
        ("a FIFO", plain.clone(), |dir| common::fifo(&dir.join("x")), "NotRegular"),
        ("a directory", plain.clone(), |dir| std::fs::create_dir(dir.join("x")).unwrap(), "NotRegular"),
        ("a device", plain.clone(), |dir| symlink("/dev/zero", dir.join("x")).unwrap(), "NotRegular"),
        ("a link in a circle", plain.clone(), |dir| symlink("x", dir.join("x")).unwrap(), "Io"),
        ("a dangling link", plain.clone(), |dir| symlink("gone", dir.join("x")).unwrap(), "Io"),
        ("no shard", plain.clone(), |_| (), "Io"),
    ] {
        let (kind, message) = verdict_on_set(&index, prepare);
        assert_eq!(kind, expected, "{what}: {message}");
        if what == "no shard" {
            assert!(message.contains("/x"), "names the shard: {message}");
        }
    }
}

#[test]
fn a_hub_cache_of_links_opens() {
    let root = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (root.path().join("blobs"), root.path().join("snapshots/0a1b"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for (name, bytes) in [
        ("one.safetensors", shard(&["a"])),
        ("two.safetensors", shard(&["b"])),
        (INDEX, map(&[("a", "one.safetensors"), ("b", "two.safetensors")]).into_bytes()),
    ] {
        let sha = common::sha256(&bytes);
        std::fs::write(blobs.join(&sha), bytes).unwrap();
        symlink(Path::new("../../blobs").join(sha), snapshot.join(name)).unwrap();
    }
    for path in [snapshot.clone(), snapshot.join(INDEX)] {
        let model = open(&path).unwrap();
        assert_eq!((model.len(), model.shards()), (2, 2));
        assert_eq!(model.tensor("b").unwrap().as_bytes(), [1]);
        assert_eq!(verdict(&path).0, "OK");
    }
    assert_eq!(verdict(&snapshot.join("one.safetensors")).0, "OK");
}

#[test]
fn what_is_no_file_is_refused_without_blocking() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    common::fifo(&at("fifo.safetensors"));
    common::fifo(&at(&format!("fifo.{INDEX}")));
    std::fs::create_dir(at("empty")).unwrap();
    std::fs::create_dir(at("dir.safetensors")).unwrap();
    std::fs::create_dir(at("several")).unwrap();
    for name in ["several/a.safetensors", "several/b.safetensors"] {
        std::fs::write(at(name), shard(&["a"])).unwrap();
    }
    std::fs::create_dir(at("holds-fifo")).unwrap();
    common::fifo(&at("holds-fifo/model.safetensors"));
    symlink("loop", at("loop")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    for (path, expected) in [
        (at("fifo.safetensors"), "NotRegular"),
        (at(&format!("fifo.{INDEX}")), "NotRegular"),
        (at("empty"), "NotRegular"),
        (at("dir.safetensors"), "NotRegular"),
        (at("several"), "NotRegular"),
        (at("holds-fifo"), "NotRegular"),
        ("/dev/zero".into(), "NotRegular"),
        ("/dev/null".into(), "NotRegular"),
        (at("loop"), "Io"),
        (at("gone"), "Io"),
        (at("gone/model.safetensors"), "Io"),
        ("".into(), "Io"),
        ("a\0b".into(), "Io"),
        (at("socket"), "NotRegular"),
    ] {
        let (kind, message) = without_blocking("opening", {
            let path = path.clone();
            move || verdict(&path)
        });
        assert_eq!(kind, expected, "{}: {message}", path.display());
    }
    drop(socket);
}

#[test]
fn a_file_without_permission_says_so() {
    const TEST: &str = "a_file_without_permission_says_so";
    if let Some(dir) = common::role("nobody") {
        assert!(!common::is_root());
        for name in ["closed.safetensors", "closed/model.safetensors", "set"] {
            let error = Model::read(dir.join(name)).unwrap_err();
            assert_eq!(verdict(&dir.join(name)).0, "Io", "{name}");
            let Error::Io { path, source, .. } = error else { panic!("{error}") };
            assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
            assert!(path.starts_with(dir.join(name)));
        }
        assert_eq!(verdict(&dir.join("open.safetensors")).0, "OK");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mode =
        |name: &str, mode| std::fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
    std::fs::create_dir(at("closed")).unwrap();
    std::fs::create_dir(at("set")).unwrap();
    for name in ["open.safetensors", "closed.safetensors", "closed/model.safetensors", "set/x"] {
        std::fs::write(at(name), shard(&["a"])).unwrap();
        mode(name, 0o644);
    }
    std::fs::write(at("set").join(INDEX), map(&[("a", "x")])).unwrap();
    for (name, bits) in [("", 0o755), ("closed.safetensors", 0), ("set/x", 0), ("set", 0o755), ("closed", 0)]
    {
        mode(name, bits);
    }
    let (command, _exe) = common::unprivileged_child(TEST, "nobody", dir.path());
    common::pass(command);
    mode("closed", 0o700);
    mode("closed.safetensors", 0o600);
}

#[test]
fn too_little_address_space_is_an_error() {
    const TEST: &str = "too_little_address_space_is_an_error";
    if let Some(dir) = common::role("limited") {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let now = pages * rustix::param::page_size() as u64;
        // From hardly anything, where not even threads can start, to plenty that is still too little.
        for spare in [1 << 20, 4 << 20, 64 << 20, 512 << 20] {
            setrlimit(Resource::As, Rlimit { current: Some(now + spare), maximum: None }).unwrap();
            let (kind, message) = verdict(&dir.join("sparse.safetensors"));
            assert_eq!(kind, "Io", "{message}");
            assert!(message.contains("memory"), "{message}");
            assert_eq!(verdict(&dir.join("small.safetensors")).0, "OK", "{spare} to spare");
        }
        // What fits, but leaves no room for threads, is read by fewer.
        setrlimit(Resource::As, Rlimit { current: Some(now + (40 << 20)), maximum: None }).unwrap();
        assert_eq!(verdict(&dir.join("tight.safetensors")).0, "OK");
        return;
    }
    let dir = common::disk_dir();
    for (name, len) in [("sparse", 1u64 << 30), ("tight", 39 << 20), ("small", 16)] {
        let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{len}],"data_offsets":[0,{len}]}}}}"#);
        let path = dir.path().join(format!("{name}.safetensors"));
        std::fs::write(&path, file_of(&header, 0)).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(8 + header.len() as u64 + len).unwrap();
    }
    common::pass(common::child(TEST, "limited", dir.path()));
}
