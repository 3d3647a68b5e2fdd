//! Damaged headers, thousands of them: the reference crate accepts and refuses the same, and reads the
//! same, but for the documented exceptions. `fuzz/` holds the same property for longer.

use crate::common;
use crate::oracle::{self, Verdict};
use proptest::prelude::*;
use std::cell::Cell;

const HEADERS: &[(&str, usize)] = &[
    (r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#, 24),
    (
        r#"{"__metadata__":{"k":"v","l":"w"},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[],"data_offsets":[4,5]}}"#,
        5,
    ),
    (
        r#"{"b":{"dtype":"F4","shape":[4],"data_offsets":[8,10]},"a":{"data_offsets":[0,8],"shape":[1],"dtype":"F64"},"z":{"dtype":"I8","shape":[0,9],"data_offsets":[8,8]}}"#,
        10,
    ),
    (r#"{"a":{"dtype":"BOOL","shape":[1,1],"data_offsets":[0,1],"x":{"y":[1,2.5,null,true]}}}   "#, 1),
    (r#"{"\u00e9\n":{"dtype":"C64","shape":[1],"data_offsets":[0,8]},"__metadata__":null}"#, 8),
    (
        r#"{"a":{"dtype":"F64","shape":[0,9223372036854775808,4],"data_offsets":[0,0]},"b":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}"#,
        3,
    ),
];

/// What a header is made of, to be put where it does not belong.
const TOKENS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "\\u0061",
    "0",
    "1",
    "2",
    "4",
    "8",
    "-",
    "1e3",
    "2.0",
    "01",
    "18446744073709551615",
    "18446744073709551616",
    "4611686018427387904",
    "null",
    "true",
    "NaN",
    "\"a\"",
    "\"b\"",
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "\"__metadata__\"",
    "\"F32\"",
    "\"F4\"",
    "\"U8\"",
    "{\"F32\":null}",
    "[0,4]",
    "[]",
    "[0]",
    "[1,0]",
    " ",
    "\n",
    "\t",
    "\0",
    "\u{feff}",
    "//",
    "é",
    "\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},",
    "\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},",
    "\"c\":[\"U8\",[0],[0,0]],",
];

#[derive(Debug, Clone)]
enum Damage {
    Flip(usize, u8),
    Insert(usize, usize),
    Replace(usize, usize),
    Delete(usize, usize),
    Double(usize, usize),
    Swap(usize, usize),
    Cut(usize),
    Data(i8),
    Length(i8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = || 0usize..4096;
    prop_oneof![
        (at(), 1u8..).prop_map(|(i, b)| Damage::Flip(i, b)),
        (at(), 0..TOKENS.len()).prop_map(|(i, t)| Damage::Insert(i, t)),
        (at(), 0..TOKENS.len()).prop_map(|(i, t)| Damage::Replace(i, t)),
        (at(), 1usize..40).prop_map(|(i, n)| Damage::Delete(i, n)),
        (at(), 1usize..80).prop_map(|(i, n)| Damage::Double(i, n)),
        (at(), at()).prop_map(|(i, j)| Damage::Swap(i, j)),
        at().prop_map(Damage::Cut),
        (-4i8..5).prop_map(Damage::Data),
        (-4i8..5).prop_map(Damage::Length),
    ]
}

/// Where tokens of JSON start, so that most damage leaves something to parse.
fn tokens(header: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < header.len() {
        let len = match header[at] {
            b'"' => header[at + 1..].iter().position(|&b| b == b'"').map_or(1, |n| n + 2),
            b'0'..=b'9' => header[at..].iter().take_while(|b| b.is_ascii_digit()).count(),
            _ => 1,
        };
        ranges.push(at..at + len);
        at += len;
    }
    ranges
}

fn damaged(which: usize, damages: &[Damage]) -> Vec<u8> {
    let (header, data) = HEADERS[which];
    let mut header = header.as_bytes().to_vec();
    let (mut data, mut length) = (data, 0i64);
    for damage in damages {
        let tokens = tokens(&header);
        if tokens.is_empty() {
            break;
        }
        let token = |i: usize| tokens[i % tokens.len()].clone();
        match *damage {
            Damage::Flip(i, bits) => {
                let i = i % header.len();
                header[i] ^= bits;
            }
            Damage::Insert(i, t) => drop(header.splice(token(i).start..token(i).start, TOKENS[t].bytes())),
            Damage::Replace(i, t) => drop(header.splice(token(i), TOKENS[t].bytes())),
            Damage::Delete(i, n) => {
                let start = token(i).start;
                header.drain(start..(start + n).min(header.len()));
            }
            Damage::Double(i, n) => {
                let start = token(i).start;
                let end = (start + n).min(header.len());
                let copy = header[start..end].to_vec();
                header.splice(end..end, copy);
            }
            Damage::Swap(i, j) => {
                let (a, b) = (token(i.min(j)), token(i.max(j)));
                if a.end <= b.start {
                    let (first, second) = (header[a.clone()].to_vec(), header[b.clone()].to_vec());
                    header.splice(b, first);
                    header.splice(a, second);
                }
            }
            Damage::Cut(i) => header.truncate(i % (header.len() + 1)),
            Damage::Data(n) => data = data.saturating_add_signed(n.into()),
            Damage::Length(n) => length = n.into(),
        }
    }
    let mut file = (header.len() as u64).saturating_add_signed(length).to_le_bytes().to_vec();
    file.extend(header);
    file.resize(file.len() + data, 1);
    file
}

#[test]
fn headers_are_accepted_and_refused_as_the_reference_does() {
    let counts = [const { Cell::new(0u32) }; 3];
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(60_000);
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let strategy = (0..HEADERS.len(), proptest::collection::vec(damage(), 0..4));
    runner
        .run(&strategy, |(which, damages)| {
            let count = &counts[oracle::compare(&damaged(which, &damages)) as usize];
            count.set(count.get() + 1);
            Ok(())
        })
        .unwrap();
    // Damage that always breaks the JSON would prove little.
    let [accepted, refused, exceptions] = counts.each_ref().map(Cell::get);
    let enough = cases / 1000;
    assert!(accepted > enough && refused > enough && exceptions > 0, "{accepted} {refused} {exceptions}");
}

#[test]
fn the_oracle_knows_an_exception_from_agreement() {
    let verdict = |header: &str, data| oracle::compare(&common::file_of(header, data));
    for (header, data, expected) in [
        ("{}", 0, Verdict::BothAccept),
        ("{", 0, Verdict::BothRefuse),
        (r#"{"a":["F32",[1],[0,4]]}"#, 4, Verdict::Exception),
        (r#"{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}"#, 4, Verdict::Exception),
        (
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
            1,
            Verdict::Exception,
        ),
        (r#"{"__metadata__":{"a":"","a":""}}"#, 0, Verdict::Exception),
        (
            r#"{"a":{"dtype":"U8","shape":[9223372036854775808,2,0],"data_offsets":[0,0]}}"#,
            0,
            Verdict::Exception,
        ),
    ] {
        assert_eq!(verdict(header, data), expected, "{header}");
    }
    let shape = vec!["1"; maptensors::MAX_RANK + 1].join(",");
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,1]}}}}"#);
    assert_eq!(verdict(&header, 1), Verdict::Exception);
}
