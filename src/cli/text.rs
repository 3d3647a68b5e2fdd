//! Numbers and names, for people.

use crate::error::printable;
use std::borrow::Cow;
use std::fmt::Write as _;

/// A name from a file, safe to print, and whole: [`printable`] alone would cut it when long, and what is
/// piped into another program must be the name.
pub(super) fn name(name: &str) -> String {
    const PIECE: usize = 100;
    if name.is_empty() {
        return short_name(name);
    }
    let chars: Vec<char> = name.chars().collect();
    chars.chunks(PIECE).map(|piece| printable(&piece.iter().collect::<String>())).collect()
}

/// As [`name`], cut when long.
pub(super) fn short_name(name: &str) -> String {
    if name.is_empty() { "\"\"".into() } else { printable(name) }
}

/// JSON in which nothing can drive a terminal. Such characters stand inside strings only, where an
/// escape means the same; `serde_json` itself escapes those below U+0020.
pub(super) fn json_safe(json: &str) -> Cow<'_, str> {
    let unsafe_char =
        |c: char| !c.is_ascii_graphic() && c != ' ' && printable(c.encode_utf8(&mut [0; 4])).len() > 4;
    if !json.contains(unsafe_char) {
        return json.into();
    }
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if unsafe_char(c) {
            // All of them are in the first plane: one \u escape each.
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out.into()
}

/// Cut in the middle to `width` characters: names differ at their ends.
pub(super) fn shorten(text: &str, width: usize) -> String {
    let len = text.chars().count();
    if len <= width {
        return text.into();
    }
    let kept = width.saturating_sub(1);
    let head = kept / 2;
    let tail = kept - head;
    text.chars().take(head).chain(['…']).chain(text.chars().skip(len - tail)).collect()
}

/// `16.0 KiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut scale = 1024u128;
    let mut text = String::new();
    for unit in UNITS {
        let tenths = (u128::from(bytes) * 10 + scale / 2) / scale;
        text = format!("{}.{} {unit}", tenths / 10, tenths % 10);
        if tenths < 10_240 {
            break;
        }
        scale *= 1024;
    }
    text
}

/// `4,810`.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 tensor`, `2 tensors`.
pub(super) fn plural(n: usize, what: &str) -> String {
    format!("{} {what}{}", count(n as u64), if n == 1 { "" } else { "s" })
}

/// `99.9%`; `-` of nothing.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    let (part, whole) = (u128::from(part), u128::from(whole));
    let tenths = (part * 1000 + whole / 2) / whole;
    format!("{}.{}%", tenths / 10, tenths % 10)
}

/// `[64,64]`.
pub(super) fn shape(shape: &[usize]) -> String {
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("[{}]", dims.join(","))
}

/// As [`shape`], cut when long: a stranger's file may have a thousand dimensions.
pub(super) fn short_shape(dims: &[usize]) -> String {
    const MOST: usize = 16;
    match dims.get(..MOST) {
        Some(first) if dims.len() > MOST => format!("{}… of rank {}", shape(first), dims.len()),
        _ => shape(dims),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_one_decimal_and_the_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (19_240, "18.8 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn counts_are_grouped_and_percents_rounded() {
        assert_eq!((count(0), count(999), count(1_234_567)), ("0".into(), "999".into(), "1,234,567".into()));
        assert_eq!((percent(1, 3), percent(u64::MAX, u64::MAX)), ("33.3%".into(), "100.0%".into()));
        assert_eq!(percent(0, 0), "-");
    }

    #[test]
    fn a_name_is_shortened_in_the_middle_and_never_beyond_the_width() {
        assert_eq!(shorten("model.layers.0.weight", 11), "model…eight");
        assert_eq!(shorten("short", 5), "short");
        assert_eq!(
            (shorten("é€x", 2), shorten("abc", 1), shorten("abc", 0)),
            ("…x".into(), "…".into(), "…".into())
        );
    }

    #[test]
    fn a_long_name_is_whole_and_a_control_character_escaped_wherever_it_stands() {
        assert_eq!(name(&"x".repeat(1000)), "x".repeat(1000));
        let long = format!("{}\u{1b}[2J", "x".repeat(99));
        assert_eq!(name(&long), format!("{}\\u{{1b}}[2J", "x".repeat(99)));
        assert_eq!(name(""), "\"\"");
    }

    #[test]
    fn escaped_json_means_the_same() {
        let text = "a\u{1b}\u{7f}\u{9b}31m\u{202e}é漢😀 \"\\";
        let json = serde_json::to_string(text).unwrap();
        let safe = json_safe(&json);
        assert!(
            !safe.contains(['\u{7f}', '\u{9b}', '\u{202e}', '\u{1b}']) && safe.contains("é漢😀"),
            "{safe}"
        );
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), text);
    }
}
