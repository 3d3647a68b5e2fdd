//! Text of errors: what comes from a file or a user is made safe to print.

use std::fmt::Write as _;
use std::path::Path;

/// Text from a file or a user, made safe to print: quoted, control characters escaped, cut when long.
pub(crate) fn quote(text: &str) -> String {
    format!("\"{}\"", printable(text))
}

/// As [`quote`], without the quotes.
pub(crate) fn printable(text: &str) -> String {
    const LONGEST: usize = 200;
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == LONGEST {
            let _ = write!(out, "… ({} characters)", text.chars().count());
            break;
        }
        // Bidirectional controls reorder what surrounds them; the rest drive a terminal.
        let reorders =
            matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || reorders {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

pub(super) fn at(path: &Path) -> String {
    if path.as_os_str().is_empty() {
        String::new()
    } else {
        format!("{}: ", printable(&path.to_string_lossy()))
    }
}

pub(super) fn of_file(path: &Path) -> String {
    if path.as_os_str().is_empty() {
        String::new()
    } else {
        format!(" in {}", printable(&path.to_string_lossy()))
    }
}

pub(super) fn of(tensor: &str) -> String {
    if tensor.is_empty() { String::new() } else { format!(" (tensor {})", quote(tensor)) }
}

pub(super) fn and_others(names: &[String]) -> String {
    const MOST: usize = 5;
    let listed: Vec<String> = names.iter().take(MOST).map(|name| quote(name)).collect();
    match names.len() {
        0 => String::new(),
        n if n > MOST => format!("; so are {} and {} more", listed.join(", "), n - MOST),
        _ => format!("; so are {}", listed.join(", ")),
    }
}

pub(super) fn shape_text(shape: &[usize]) -> String {
    if shape.len() <= 8 {
        format!("{shape:?}")
    } else {
        format!("{:?}… of rank {}", &shape[..8], shape.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_a_file_cannot_drive_a_terminal() {
        assert_eq!(quote("a\u{1b}[31m\0é"), "\"a\\u{1b}[31m\\u{0}é\"");
        assert_eq!(printable("\u{202e}x"), "\\u{202e}x");
        let long = quote(&"x".repeat(1_000_000));
        assert!(long.len() < 300 && long.contains("1000000 characters"), "{long}");
    }
}
