use super::*;
use proptest::prelude::*;
use safetensors::SafeTensors;

/// A file of this header and so many data bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

fn kind(bytes: &[u8]) -> &'static str {
    parse_bytes(bytes, Path::new("f")).err().map_or("OK", |e| e.kind().name())
}

const ONE: &str = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;

/// (header, data bytes, our answer). Where the answer differs from the reference's, the row says so.
type Row = (&'static str, usize, &'static str);

const SAME_AS_REFERENCE: &[Row] = &[
    ("", 0, "Json"),
    ("{}", 0, "OK"),
    ("{}   \n\t\r ", 0, "OK"),
    ("  {}", 0, "OK"),
    ("\u{feff}{}", 0, "Json"),
    ("{}\0\0", 0, "Json"),
    ("{}x", 0, "Json"),
    ("[]", 0, "Json"),
    ("null", 0, "Json"),
    ("\"a\"", 0, "Json"),
    ("{", 0, "Json"),
    (ONE, 4, "OK"),
    (ONE, 3, "Truncated"),
    (ONE, 5, "Layout"),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[1,],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{/**/"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}}"#, 4, "DType"),
    (r#"{"a":{"dtype":"F128","shape":[1],"data_offsets":[0,4]}}"#, 4, "DType"),
    (r#"{"a":{"dtype":"","shape":[1],"data_offsets":[0,4]}}"#, 4, "DType"),
    (r#"{"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[1e3],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"shape":[1],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"a":null}"#, 0, "Json"),
    (r#"{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4, "Duplicate"),
    (r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "Duplicate"),
    (r#"{"__metadata__":null,"__metadata__":{}}"#, 0, "Duplicate"),
    (r#"{"__metadata__":{"a":1}}"#, 0, "Json"),
    (r#"{"__metadata__":{"a":null}}"#, 0, "Json"),
    (r#"{"__metadata__":{"a":{}}}"#, 0, "Json"),
    (r#"{"__metadata__":[]}"#, 0, "Json"),
    (r#"{"__metadata__":"x"}"#, 0, "Json"),
    (r#"{"__metadata__":null}"#, 0, "OK"),
    (r#"{"__metadata__":{"a":"1\n\u00e9"}}"#, 0, "OK"),
    (r#"{"__metadata__":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4, "Json"),
    (r#"{"\u005f_metadata__":{"a":"b"}}"#, 0, "OK"),
    // An unknown field is skipped, but must be JSON and not nest too deeply.
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":[{"y":1.5}]}}"#, 4, "OK"),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1e999}}"#, 4, "Json"),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":"\ud800"}}"#, 4, "Json"),
    (r#"{"a":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}"#, 4, "OK"),
    (r#"{ "a" : { "dtype" : "F32" , "shape" : [ 1 ] , "data_offsets" : [ 0 , 4 ] } } "#, 4, "OK"),
    (r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#, 4, "Overflow"),
    (r#"{"a":{"dtype":"F32","shape":[2305843009213693952],"data_offsets":[0,4]}}"#, 4, "Overflow"),
    // 2^63 + 2 elements of 8 bytes wrap to 16 bytes.
    (r#"{"a":{"dtype":"F64","shape":[9223372036854775810],"data_offsets":[0,16]}}"#, 16, "Overflow"),
    (
        r#"{"a":{"dtype":"F64","shape":[0,9223372036854775808,9223372036854775808],"data_offsets":[0,0]}}"#,
        0,
        "OK",
    ),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4, "Layout"),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8, "Layout"),
    (
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#,
        12,
        "Layout",
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
        8,
        "Layout",
    ),
    (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, "Shape"),
    (r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#, 4, "OK"),
    (r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2, "Align"),
    (r#"{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}"#, 2, "OK"),
    (
        r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}}"#,
        0,
        "OK",
    ),
    (
        r#"{"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        8,
        "OK",
    ),
    (
        r#"{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\u0000\u001b[31m":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
        2,
        "OK",
    ),
    ("{\"a\nb\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "Json"),
    (r#"{"../x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1, "OK"),
];

/// The documented exceptions: what we refuse or accept and the reference does not.
const UNLIKE_REFERENCE: &[Row] = &[
    (
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        4,
        "Duplicate",
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        4,
        "Duplicate",
    ),
    (r#"{"__metadata__":{"a":"1","a":"1"}}"#, 0, "Duplicate"),
    (r#"{"a":["F32",[1],[0,4]]}"#, 4, "Json"),
    (r#"{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}"#, 4, "Json"),
    (
        r#"{"a":{"dtype":"F64","shape":[9223372036854775808,9223372036854775808,0],"data_offsets":[0,0]}}"#,
        0,
        "OK",
    ),
];

#[test]
fn every_way_a_header_can_lie_has_its_error_and_the_reference_agrees() {
    for &(header, data, expected) in SAME_AS_REFERENCE {
        let bytes = file(header, data);
        assert_eq!(kind(&bytes), expected, "{header}");
        assert_eq!(SafeTensors::deserialize(&bytes).is_ok(), expected == "OK", "reference on {header}");
    }
}

#[test]
fn the_documented_exceptions_are_exceptions() {
    for &(header, data, expected) in UNLIKE_REFERENCE {
        let bytes = file(header, data);
        assert_eq!(kind(&bytes), expected, "{header}");
        assert_eq!(SafeTensors::deserialize(&bytes).is_ok(), expected != "OK", "reference on {header}");
    }
}

#[test]
fn a_length_field_that_lies_is_refused_before_anything_is_allocated() {
    let path = Path::new("f");
    for len in 0..8 {
        assert_eq!(kind(&vec![0; len]), "Truncated");
    }
    assert_eq!(kind(&60u64.to_le_bytes()), "Truncated");
    for (len, expected) in
        [(u64::MAX, "Limit"), (100_000_001, "Limit"), (100_000_000, "Truncated"), (1, "Truncated")]
    {
        assert_eq!(header_len(&len.to_le_bytes(), 8, path).unwrap_err().kind().name(), expected);
    }
    let mut bytes = file("{\"xx\"}", 0);
    bytes[10] = 0xff;
    assert!(matches!(parse_bytes(&bytes, path), Err(Error::Utf8 { offset: 10, .. })));
}

#[test]
fn other_files_in_place_of_weights_are_named() {
    for (start, word) in [
        (&b"version https://git-lfs.github.com/spec/v1\n"[..], "LFS"),
        (b"PK\x03\x04\x14\0\0\0rest", "zip"),
        (b"\x80\x02}q\0(X\x06\0", "pickle"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"GGUF\x03\0\0\0\0", "GGUF"),
        (b"{\"metadata\":{}}", "index"),
        (b"\x93NUMPY\x01\0v\0", "numpy"),
        (b"root:x:0:0:root:/", "text"),
    ] {
        let error = parse_bytes(start, Path::new("f")).unwrap_err();
        assert!(error.kind().name() == "Limit" && error.to_string().contains(word), "{error}");
    }
}

#[test]
fn deep_nesting_is_an_error_and_no_stack_overflow() {
    assert_eq!(kind(&file(&"[".repeat(100_000), 0)), "Json");
    let unknown = |depth: usize| {
        let (open, close) = ("[".repeat(depth), "]".repeat(depth));
        file(&format!(r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":{open}{close}}}}}"#), 4)
    };
    for depth in [10, 124, 125, 126, 127, 128, 100_000] {
        let bytes = unknown(depth);
        assert_eq!(kind(&bytes) == "OK", SafeTensors::deserialize(&bytes).is_ok(), "depth {depth}");
    }
    assert_eq!(kind(&unknown(100_000)), "Json");
}

#[test]
fn a_million_dimensions_are_refused() {
    let shape = vec!["1"; 1_000_000].join(",");
    assert_eq!(
        kind(&file(&format!(r#"{{"a":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,1]}}}}"#), 1)),
        "Limit"
    );
}

#[test]
fn a_million_and_a_half_empty_tensors_open() {
    let entries: Vec<_> = (0..1_500_000)
        .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    // Shortened names keep the header under its limit.
    let layout = parse_bytes(&file(&format!("{{{}}}", entries.join(",")), 0), Path::new("")).unwrap();
    assert_eq!(layout.len(), 1_500_000);
    assert_eq!(layout.position("1499999"), Some(1_499_999));
}

#[test]
fn names_of_any_text_survive() {
    let long = "x".repeat(1 << 20);
    for name in ["", "\0", "../x", &long, "\u{1b}[31m", "é漢", "\"\\", "__metadata"] {
        let layout = Layout::builder().tensor(name, crate::DType::U8, &[0]).build().unwrap();
        let (header, placed) = encode(&layout, Path::new("")).unwrap();
        let read = parse_bytes(&header, Path::new("")).unwrap();
        assert_eq!(read, placed);
        assert!(read.get(name).is_some());
    }
}

#[test]
fn the_header_is_padded_to_a_page_or_to_64_bytes_in_a_small_file() {
    for (elements, align) in [(16, 64), (60_000, 64), (66_000, 4096), (1 << 20, 4096)] {
        let layout = Layout::builder().tensor("a", crate::DType::U8, &[elements]).build().unwrap();
        let (header, placed) = encode(&layout, Path::new("")).unwrap();
        assert_eq!(header.len() as u64, placed.data_start());
        assert_eq!(header.len() % align, 0);
        assert!(header.len() <= align.max(128));
    }
}

#[test]
fn both_ways_through_a_header_read_the_same() {
    for &(header, _, _) in SAME_AS_REFERENCE.iter().chain(UNLIKE_REFERENCE) {
        let Some(mut fast) = scan::scan(header) else { continue };
        fast.set_text(Text::Owned(header.to_owned()));
        let fast = fast.finish(RULES, Path::new(""), 0, None);
        let full = json::read(header, Path::new("")).and_then(|p| p.finish(RULES, Path::new(""), 0, None));
        match (fast, full) {
            (Ok(fast), Ok(full)) => assert_eq!(fast, full, "{header}"),
            (fast, full) => assert_eq!(fast.map_err(|e| e.kind()), full.map_err(|e| e.kind()), "{header}"),
        }
    }
    assert!(scan::scan(ONE).is_some(), "the plain form takes the fast way");
}

proptest! {
    #[test]
    fn arbitrary_layouts_round_trip_and_the_reference_reads_them(
        names in proptest::collection::hash_set("\\PC{0,8}", 0..12),
        picks in proptest::collection::vec((0..crate::DType::ALL.len(), proptest::collection::vec(0usize..5, 1..4)), 12),
        metadata in proptest::option::of(proptest::collection::btree_map("\\PC{0,5}", ".{0,5}", 0..4)),
    ) {
        let mut builder = Layout::builder();
        for (name, (dtype, shape)) in names.iter().zip(&picks) {
            let mut shape = shape.clone();
            shape.push(4); // keeps sub-byte dtypes whole
            builder = builder.tensor(name, crate::DType::ALL[*dtype], &shape);
        }
        for (key, value) in metadata.iter().flatten() {
            builder = builder.metadata(key, value);
        }
        let (mut bytes, placed) = encode(&builder.build().unwrap(), Path::new("")).unwrap();
        bytes.resize(usize::try_from(placed.file_len()).unwrap(), 0);
        prop_assert_eq!(&parse_bytes(&bytes, Path::new("")).unwrap(), &placed);
        let (_, reference) = SafeTensors::read_metadata(&bytes).unwrap();
        prop_assert_eq!(reference.tensors().len(), placed.len());
        for info in placed.iter() {
            let theirs = reference.info(info.name()).unwrap();
            prop_assert_eq!(theirs.data_offsets.0 as u64 + placed.data_start(), info.offset());
            prop_assert_eq!(&theirs.shape, info.shape());
            prop_assert_eq!(theirs.dtype, info.dtype().into());
        }
        let theirs = reference.metadata().clone().unwrap_or_default();
        prop_assert_eq!(placed.metadata(), &theirs.into_iter().collect::<std::collections::BTreeMap<_, _>>());
    }
}

#[test]
fn metadata_that_is_no_string_is_refused_by_its_key() {
    let array = crate::Array::from(vec![1.5f32]);
    for (value, kind) in
        [(crate::Value::from(100u32), "a number"), (true.into(), "a bool"), (array.into(), "an array")]
    {
        let layout = Layout::builder().metadata("a", "1").metadata("step", value).build().unwrap();
        for error in [
            encode(&layout, Path::new("")).map(drop).unwrap_err(),
            encode_placed(&layout, Path::new("")).map(drop).unwrap_err(),
        ] {
            let text = error.to_string();
            assert_eq!(error.kind().name(), "Argument");
            assert!(
                text.contains("\"step\"") && text.contains(kind) && text.contains("to_string()"),
                "{text}"
            );
        }
    }
}
