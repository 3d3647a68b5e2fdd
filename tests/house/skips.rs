//! Nothing is left out in silence: every skip goes through one function, and `tests/skips.txt` lists those that are
//! allowed.

use super::files;

/// What says that something was left out, and lets libtest report success.
const SILENT: [&str; 4] = ["!!!", "not tested", "NOT TESTED", "#[ignore"];

/// Where that is said aloud, and here.
const ALOUD: [&str; 3] = ["src/lib.rs", "tests/common/mod.rs", "tests/house/skips.rs"];

#[test]
fn nothing_is_left_out_without_the_function_that_says_so() {
    let mut looked_at = 0;
    for (path, text) in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        looked_at += 1;
        let found = SILENT.iter().find(|token| text.contains(**token));
        assert!(found.is_none() || ALOUD.contains(&&*path), "{path}: {found:?}: say so by `skip`");
    }
    assert!(looked_at > 100, "{looked_at}");
}

/// The file and the test of a line of the list.
fn entry(line: &str) -> Option<(&str, &str)> {
    let (file, rest) = line.split_once(' ')?;
    let (test, why) = rest.split_once(": ")?;
    (!why.is_empty()).then_some((file, test.trim_end_matches('*')))
}

#[test]
fn every_skip_that_is_allowed_is_of_a_test_that_there_is() {
    let list = std::fs::read_to_string("tests/skips.txt").unwrap();
    let (mut place, mut entries) = (None, 0);
    for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if line.starts_with('[') && line.ends_with(']') {
            place = Some(line);
            continue;
        }
        assert!(place.is_some(), "{line}: where is that expected?");
        let (path, test) = entry(line).unwrap_or_else(|| panic!("{line}: not FILE TEST: REASON"));
        entries += 1;
        if path.contains('*') {
            continue;
        }
        let source = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{line}: {error}"));
        let keyword = if path.starts_with("tests/python/") { "def" } else { "fn" };
        assert!(test.is_empty() || source.contains(&format!("{keyword} {test}(")), "{line}: no such test");
    }
    assert!(entries > 50, "{entries}");
}
