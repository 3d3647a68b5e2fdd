//! The house rules, checked against the sources: imports run downwards only, `unsafe` stays in its rooms,
//! and the library does not panic.

use std::collections::HashMap;

/// From the cellar up. A room may name those before it; the extension module also runs the command line.
const ROOMS: &[&[&str]] = &[
    &["error"],
    &["sync"],
    &["work"],
    &["os"],
    &["dtype"],
    &["layout"],
    &["map"],
    &["source"],
    &["format"],
    &["tensor"],
    &["diff"],
    &["paging"],
    &["model"],
    &["rank"],
    &["save"],
    &["delta"],
    &["checkpoint"],
    &["share"],
    &["crash"],
    &["cli"],
    &["python"],
];

/// The files that have `unsafe`, a path a line: they and no others. In `model` and `share` it only passes the stable-file
/// contract through.
const UNSAFE: &str = include_str!("unsafe.txt");

const PANICS: &[&str] =
    &[".unwrap()", ".expect(", "panic!(", "unreachable!(", "todo!(", "unimplemented!(", "dbg!("];

fn level(room: &str) -> Option<usize> {
    ROOMS.iter().position(|rooms| rooms.contains(&room))
}

/// The room of a file, by its path under `src`.
fn room(file: &str) -> &str {
    file.split('/').next().unwrap_or_default().trim_end_matches(".rs")
}

/// The source with comments gone and the inside of strings and characters blanked, line by line.
fn code(source: &str) -> String {
    let mut out = String::new();
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut i = 0;
    while i < chars.len() {
        match chars[i] {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && chars[i] != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                while i < chars.len() && !(chars[i] == '*' && at(i + 1) == '/') {
                    out.extend((chars[i] == '\n').then_some('\n'));
                    i += 1;
                }
                i += 2;
            }
            'r' if (at(i + 1) == '"' || at(i + 1) == '#')
                && !at(i.wrapping_sub(1)).is_alphanumeric()
                && chars[i + 1..].iter().find(|&&c| c != '#') == Some(&'"') =>
            {
                let hashes = chars[i + 1..].iter().take_while(|&&c| c == '#').count();
                i += hashes + 2;
                let end = |i: usize| {
                    chars[i] == '"' && chars[i + 1..].iter().take_while(|&&c| c == '#').count() >= hashes
                };
                while i < chars.len() && !end(i) {
                    out.extend((chars[i] == '\n').then_some('\n'));
                    i += 1;
                }
                i += hashes + 1;
                out.push_str("\"\"");
            }
            '"' => {
                i += 1;
                while i < chars.len() && chars[i] != '"' {
                    out.extend((chars[i] == '\n').then_some('\n'));
                    i += if chars[i] == '\\' && at(i + 1) != '\n' { 2 } else { 1 };
                }
                i += 1;
                out.push_str("\"\"");
            }
            // A character, not a lifetime.
            '\'' if at(i + 1) == '\\' || at(i + 2) == '\'' => {
                i += if at(i + 1) == '\\' { 3 } else { 2 };
                while i < chars.len() && chars[i] != '\'' {
                    i += 1;
                }
                i += 1;
                out.push_str("' '");
            }
            c => {
                out.push(c);
                i += 1;
            }
        }
    }
    out
}

/// Directories of tests alone, whose `mod.rs` says so.
const TESTS: &[&str] = &["crash/"];

/// Code without its test module, which stands last in a file.
fn without_tests(code: &str) -> &str {
    // A seam for tests may stand before.
    code.rfind("#[cfg(test)]\nmod ").map_or(code, |end| &code[..end])
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

/// What `crate::…` paths in this code name first, groups taken apart: `use crate::{a::X, b}` names a and b.
fn crate_paths(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (start, _) in code.match_indices("crate::") {
        let before = code[..start].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[start + "crate::".len()..];
        if !rest.starts_with('{') {
            found.extend(words(rest).next().map(str::to_owned));
            continue;
        }
        let (mut depth, mut fresh) = (0, true);
        for part in rest.split_inclusive(['{', '}', ',', ':']) {
            let word = part.trim_matches(|c: char| !(c.is_alphanumeric() || c == '_'));
            if depth == 1 && fresh && !word.is_empty() {
                found.push(word.to_owned());
            }
            fresh = part.ends_with([',', '{']);
            depth += i32::from(part.ends_with('{')) - i32::from(part.ends_with('}'));
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// Which room each name that `lib.rs` re-exports comes from.
fn reexports(lib: &str) -> HashMap<String, String> {
    let mut origins = HashMap::new();
    let code = code(lib);
    for statement in code.split("pub use ").skip(1).filter_map(|rest| rest.split(';').next()) {
        let mut words = words(statement);
        if let Some(room) = words.next() {
            origins.extend(words.map(|name| (name.to_owned(), room.to_owned())));
        }
    }
    origins
}

/// How this file breaks the order of rooms.
fn climbs(file: &str, source: &str, reexports: &HashMap<String, String>) -> Vec<String> {
    let Some(own) = level(room(file)) else { return Vec::new() };
    let code = code(source);
    let mut wrong = Vec::new();
    for name in crate_paths(&code) {
        let target = reexports.get(&name).unwrap_or(&name);
        // Crates that are re-exported are no rooms.
        if let Some(level) = level(target)
            && level >= own
            && target != room(file)
        {
            wrong.push(format!("{file} imports crate::{name}, of {target}"));
        }
    }
    // A chain of `super` as long as the file is deep leaves the room without saying `crate`.
    let depth = file.matches('/').count() + usize::from(!file.ends_with("/mod.rs"));
    if without_tests(&code).contains(&"super::".repeat(depth.max(1))) {
        wrong.push(format!("{file} leaves its room by super::"));
    }
    wrong
}

fn has_unsafe(source: &str) -> bool {
    words(&code(source)).any(|word| word == "unsafe")
}

fn may_have_unsafe(file: &str) -> bool {
    UNSAFE.lines().any(|listed| listed == file)
}

/// In `model` and `share`, `unsafe` introduces a function or passes its contract to one call.
fn unsafe_beyond_passing_through(file: &str, source: &str) -> bool {
    (file.starts_with("model/") || file == "share/subscriber.rs")
        && ["unsafe impl", "unsafe trait", "*const", "*mut", "from_raw", "transmute", "get_unchecked"]
            .iter()
            .any(|token| code(source).contains(token))
}

fn panics(file: &str, source: &str) -> Vec<&'static str> {
    if file.ends_with("tests.rs")
        || file.ends_with("interleavings.rs")
        || TESTS.iter().any(|dir| file.starts_with(dir))
    {
        return Vec::new();
    }
    let code = code(source);
    // The scanner's own `expect` takes a byte.
    let code = without_tests(&code).replace(".expect(b'", "");
    PANICS.iter().copied().filter(|token| code.contains(token)).collect()
}

/// Every source file, by its path under `src`, with its text.
fn sources() -> Vec<(String, String)> {
    let sources: Vec<_> = super::files("src", "rs")
        .into_iter()
        .map(|(path, text)| (path.strip_prefix("src/").unwrap().to_owned(), text))
        .collect();
    assert!(sources.len() > 20, "the sources are where this test looks");
    sources
}

#[test]
fn every_file_is_in_a_known_room() {
    for (file, _) in sources() {
        assert!(level(room(&file)).is_some() || file == "lib.rs" || file == "main.rs", "{file}");
    }
}

#[test]
fn imports_run_downwards_only() {
    let sources = sources();
    let lib = &sources.iter().find(|(file, _)| file == "lib.rs").unwrap().1;
    let origins = reexports(lib);
    assert_eq!(origins["Model"], "model");
    let wrong: Vec<_> = sources.iter().flat_map(|(file, text)| climbs(file, text, &origins)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_stays_in_its_rooms() {
    let sources = sources();
    for (file, text) in &sources {
        assert!(!has_unsafe(text) || may_have_unsafe(file), "unsafe in {file}");
        assert!(!unsafe_beyond_passing_through(file, text), "{file} does more than pass a contract on");
    }
    for listed in UNSAFE.lines() {
        let text = sources.iter().find(|(file, _)| file == listed).map(|(_, text)| text);
        assert!(
            text.is_some_and(|text| has_unsafe(text)),
            "{listed} has no unsafe, or is not there any more"
        );
    }
}

#[test]
fn the_library_does_not_panic_on_purpose() {
    for (file, text) in sources() {
        assert!(panics(&file, &text).is_empty(), "{file}: {:?}", panics(&file, &text));
    }
}

#[test]
fn directories_of_tests_are_compiled_for_tests_alone() {
    for dir in TESTS {
        let text = std::fs::read_to_string(format!("src/{dir}mod.rs")).unwrap();
        assert!(code(&text).contains("#![cfg(test)]"), "{dir}");
    }
}

#[test]
fn each_of_these_checks_can_fail() {
    let origins = HashMap::from([("Model".to_owned(), "model".to_owned())]);
    for (file, text, count) in [
        ("map/mod.rs", "use crate::model::Model;", 1),
        ("map/mod.rs", "use crate::error::Error;\nuse crate::map::Mapping;", 0),
        ("map/mod.rs", "// use crate::model::Model;\n/// [`Model`](crate::Model)", 0),
        ("format/index.rs", "let x = crate::Model::read(p);", 1),
        ("error.rs", "use crate::{error::Error, save::{Draft, save}, tensor};", 2),
        ("save/mod.rs", "use crate::{error::Error, model::Model};", 0),
        ("tensor/view.rs", "use super::super::model::Model;", 1),
        ("tensor/mod.rs", "use super::model::Model;", 1),
        ("tensor/view.rs", "use super::slice::Index;", 0),
        ("cli/mod.rs", "use crate::python::x;", 1),
        ("dtype/mod.rs", "pub(crate) const X: &str = \"crate::save\";", 0),
    ] {
        assert_eq!(climbs(file, text, &origins).len(), count, "{file}: {text}");
    }
    for (text, found) in [
        ("let x = unsafe { y() };", true),
        ("unsafe fn x() {}", true),
        ("#![forbid(unsafe_code)] // unsafe\n/* unsafe */ let x = \"unsafe\";", false),
        ("let x = ('\"', r#\"unsafe\"#, '\\'', b\"\\\"unsafe\");", false),
        ("let x = ('\"', unsafe { y() }, '\"');", true),
        ("fn f<'a>(x: &'a str) { unsafe { g::<'a>(x) } }", true),
    ] {
        assert_eq!(has_unsafe(text), found, "{text}");
    }
    assert!(UNSAFE.lines().count() > 10 && UNSAFE.lines().all(may_have_unsafe));
    assert!(!may_have_unsafe("save/mod.rs") && !may_have_unsafe("map/") && !may_have_unsafe(""));
    for file in ["model/open.rs", "share/subscriber.rs"] {
        assert!(unsafe_beyond_passing_through(file, "unsafe { std::slice::from_raw_parts(p, n) }"));
    }
    for (file, text, count) in [
        ("a.rs", "x.unwrap(); y.expect(\"z\"); panic!(\"\"); unreachable!(); todo!()", 5),
        ("a.rs", "x.unwrap_or(1); // .unwrap()\n\"panic!(\"; x.expect(b'{')?", 0),
        ("a.rs", "#[cfg(test)]\nmod tests { x.unwrap() }", 0),
        ("format/tests.rs", "x.unwrap()", 0),
    ] {
        assert_eq!(panics(file, text).len(), count, "{text}");
    }
}
