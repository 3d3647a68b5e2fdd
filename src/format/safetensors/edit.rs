//! A header with some entries changed and everything else as it was written, where it was written.

use super::PREFIX_LEN;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

/// What is to be changed in a header.
#[derive(Debug, Clone, Default)]
pub(crate) struct HeaderChanges {
    /// New values of metadata keys; `None` takes the key away.
    pub(crate) metadata: BTreeMap<String, Option<String>>,
    /// New names of tensors, by their old ones.
    pub(crate) names: BTreeMap<String, String>,
}

/// A header's text, cut where something may change.
///
/// JSON has spaces anywhere between tokens, so a piece stays where it was as long as what comes before
/// leaves it the place, and moves only as far as it must.
pub(crate) struct Pieces<'h> {
    pieces: Vec<Piece<'h>>,
    /// The piece that ends the metadata: where room is best kept for a later edit.
    metadata_end: Option<usize>,
}

struct Piece<'h> {
    text: Cow<'h, str>,
    /// Where it stood.
    at: Option<usize>,
}

/// What stands between a member and the next.
#[derive(Clone, Copy)]
enum Comma {
    /// There is no member before.
    No,
    /// The comma that stood behind the member.
    At(usize),
    /// The member was the last.
    New,
}

impl<'h> Pieces<'h> {
    /// `header`, which has been parsed and found right, with these changes. `None` for what is no JSON object.
    pub(crate) fn of(header: &'h str, changes: &HeaderChanges) -> Option<Self> {
        let mut made = Self { pieces: Vec::new(), metadata_end: None };
        let top = Object::read(header, 0)?;
        made.keep(header, top.open..top.open + 1);
        let described = top.members.iter().any(|member| member.name(header) == "__metadata__");
        let mut comma = Comma::No;
        if !described && changes.metadata.values().any(Option::is_some) {
            made.add("\"__metadata__\":".into());
            made.metadata(header, None, changes)?;
            comma = Comma::New;
        }
        for member in &top.members {
            made.separate(comma);
            let name = member.name(header);
            match changes.names.get(&name) {
                Some(new) => made.replace(&member.key, json(new)),
                None => made.keep(header, member.key.clone()),
            }
            made.keep(header, member.colon..member.colon + 1);
            if name == "__metadata__" {
                made.metadata(header, Some(member.value.clone()), changes)?;
            } else {
                made.keep(header, member.value.clone());
            }
            comma = member.comma.map_or(Comma::New, Comma::At);
        }
        made.keep(header, top.close..top.close + 1);
        Some(made)
    }

    /// The metadata's object, new where there is none.
    fn metadata(
        &mut self,
        header: &'h str,
        value: Option<Range<usize>>,
        changes: &HeaderChanges,
    ) -> Option<()> {
        let object = match &value {
            Some(value) if header[value.clone()].starts_with('{') => Some(Object::read(header, value.start)?),
            _ => None,
        };
        let members = object.as_ref().map_or(&[][..], |object| &object.members);
        let known: Vec<String> = members.iter().map(|member| member.name(header)).collect();
        let new = changes.metadata.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        let mut new = new.filter(|(key, _)| !known.contains(key)).peekable();
        // `null` is no metadata, and stays that where none is added.
        if object.is_none() && new.peek().is_none() {
            return value.map(|value| self.keep(header, value));
        }
        match (&object, &value) {
            (Some(object), _) => self.keep(header, object.open..object.open + 1),
            (None, Some(null)) => self.replace(null, "{".into()),
            (None, None) => self.add("{".into()),
        }
        let mut comma = Comma::No;
        for (member, name) in members.iter().zip(&known) {
            while let Some((key, value)) = new.next_if(|(key, _)| *key < name) {
                self.separate(comma);
                self.add(format!("{}:{}", json(key), json(value)));
                comma = Comma::New;
            }
            if changes.metadata.get(name) == Some(&None) {
                continue;
            }
            self.separate(comma);
            self.keep(header, member.key.clone());
            self.keep(header, member.colon..member.colon + 1);
            match changes.metadata.get(name) {
                Some(Some(value)) if text_of(header, &member.value) != *value => {
                    self.replace(&member.value, json(value));
                }
                _ => self.keep(header, member.value.clone()),
            }
            comma = member.comma.map_or(Comma::New, Comma::At);
        }
        for (key, value) in new {
            self.separate(comma);
            self.add(format!("{}:{}", json(key), json(value)));
            comma = Comma::New;
        }
        self.metadata_end = Some(self.pieces.len());
        match object {
            Some(object) => self.keep(header, object.close..object.close + 1),
            None => self.add("}".into()),
        }
        Some(())
    }

    fn keep(&mut self, header: &'h str, place: Range<usize>) {
        self.pieces.push(Piece { at: Some(place.start), text: header[place].into() });
    }

    /// A piece in place of an old one.
    fn replace(&mut self, place: &Range<usize>, text: String) {
        self.pieces.push(Piece { at: Some(place.start), text: text.into() });
    }

    fn add(&mut self, text: String) {
        self.pieces.push(Piece { at: None, text: text.into() });
    }

    /// The comma that a member before asks for.
    fn separate(&mut self, comma: Comma) {
        match comma {
            Comma::No => {}
            Comma::At(at) => self.pieces.push(Piece { at: Some(at), text: ",".into() }),
            Comma::New => self.add(",".into()),
        }
    }

    /// A header of exactly `len` bytes; `None` where it needs more.
    pub(crate) fn fitted(&self, len: usize) -> Option<Vec<u8>> {
        let mut out = vec![b' '; len];
        let mut end = 0;
        for piece in &self.pieces {
            let start = piece.at.map_or(end, |at| at.max(end));
            end = start + piece.text.len();
            out.get_mut(start..end)?.copy_from_slice(piece.text.as_bytes());
        }
        Some(out)
    }

    /// A header without spaces, but for those that `padded` (from its length without, the length field
    /// included) asks for: they stand at the end of the metadata, ready for the next edit.
    pub(crate) fn compact(&self, padded: impl FnOnce(usize) -> usize) -> Vec<u8> {
        let len: usize = self.pieces.iter().map(|piece| piece.text.len()).sum();
        let room = padded(PREFIX_LEN + len).saturating_sub(PREFIX_LEN + len);
        let mut out = Vec::with_capacity(len + room);
        for (i, piece) in self.pieces.iter().enumerate() {
            if self.metadata_end == Some(i) {
                out.resize(out.len() + room, b' ');
            }
            out.extend(piece.text.as_bytes());
        }
        out.resize(len + room, b' ');
        out
    }
}

/// An object's members, as places in the header.
struct Object {
    open: usize,
    members: Vec<Member>,
    close: usize,
}

struct Member {
    key: Range<usize>,
    colon: usize,
    value: Range<usize>,
    comma: Option<usize>,
}

impl Member {
    fn name(&self, header: &str) -> String {
        text_of(header, &self.key)
    }
}

impl Object {
    fn read(text: &str, pos: usize) -> Option<Self> {
        let mut at = Cursor { bytes: text.as_bytes(), pos };
        let open = at.take(b'{')?;
        let mut members = Vec::new();
        loop {
            if let Some(close) = at.take(b'}') {
                return Some(Self { open, members, close });
            }
            let key = at.value()?;
            let colon = at.take(b':')?;
            let value = at.value()?;
            let comma = at.take(b',');
            members.push(Member { key, colon, value, comma });
        }
    }
}

/// A place in text that is known to be JSON.
struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl Cursor<'_> {
    /// Steps over spaces and then this byte, if it comes next; says where it stands.
    fn take(&mut self, byte: u8) -> Option<usize> {
        let rest = self.bytes.get(self.pos..)?;
        self.pos += rest.iter().take_while(|b| b.is_ascii_whitespace()).count();
        (self.bytes.get(self.pos) == Some(&byte)).then(|| {
            self.pos += 1;
            self.pos - 1
        })
    }

    /// Steps over a value, whatever it is.
    fn value(&mut self) -> Option<Range<usize>> {
        let mut depth = 0usize;
        let mut start = None;
        loop {
            let quote = self.take(b'"');
            let begin = *start.get_or_insert(quote.unwrap_or(self.pos));
            if quote.is_some() {
                self.rest_of_string()?;
            } else {
                match self.bytes.get(self.pos)? {
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth = depth.checked_sub(1)?,
                    b',' | b':' => {}
                    _ => {
                        let rest = &self.bytes[self.pos..];
                        let ends = |b: &u8| b",]}:".contains(b) || b.is_ascii_whitespace();
                        self.pos += rest.iter().position(ends).unwrap_or(rest.len()) - 1;
                    }
                }
                self.pos += 1;
            }
            if depth == 0 {
                return Some(begin..self.pos);
            }
        }
    }

    fn rest_of_string(&mut self) -> Option<()> {
        loop {
            let rest = self.bytes.get(self.pos..)?;
            let len = memchr::memchr2(b'"', b'\\', rest)?;
            self.pos += len + 1;
            if rest[len] == b'"' {
                return Some(());
            }
            self.pos += 1;
        }
    }
}

/// What the JSON string here says; nothing, if it is none.
fn text_of(header: &str, place: &Range<usize>) -> String {
    serde_json::from_str(&header[place.clone()]).unwrap_or_default()
}

fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(metadata: &[(&str, Option<&str>)], names: &[(&str, &str)]) -> HeaderChanges {
        HeaderChanges {
            metadata: metadata.iter().map(|(k, v)| ((*k).into(), v.map(Into::into))).collect(),
            names: names.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect(),
        }
    }

    #[test]
    fn what_does_not_change_stays_where_it_is_as_long_as_it_can() {
        let header = r#"{"__metadata__":{"a":"one","b":"two"  },"x":{"s":[1,"}"]},"y":"z\""}   "#;
        for (metadata, names, expected) in [
            (&[][..], &[][..], header),
            (&[("a", Some("one"))], &[], header),
            (
                &[("a", Some("1"))],
                &[],
                r#"{"__metadata__":{"a":"1"  ,"b":"two"  },"x":{"s":[1,"}"]},"y":"z\""}   "#,
            ),
            (
                &[("b", Some("seven"))],
                &[],
                r#"{"__metadata__":{"a":"one","b":"seven"},"x":{"s":[1,"}"]},"y":"z\""}   "#,
            ),
            (
                &[("b", Some("eleven"))],
                &[],
                r#"{"__metadata__":{"a":"one","b":"eleven"},"x":{"s":[1,"}"]},"y":"z\""}  "#,
            ),
            (
                &[("a", None)],
                &[],
                r#"{"__metadata__":{          "b":"two"  },"x":{"s":[1,"}"]},"y":"z\""}   "#,
            ),
            (
                &[("b", None)],
                &[],
                r#"{"__metadata__":{"a":"one"            },"x":{"s":[1,"}"]},"y":"z\""}   "#,
            ),
            (
                &[("a", None), ("b", None)],
                &[],
                r#"{"__metadata__":{                     },"x":{"s":[1,"}"]},"y":"z\""}   "#,
            ),
            (
                &[],
                &[("x", "xyz")],
                r#"{"__metadata__":{"a":"one","b":"two"  },"xyz":{"s":[1,"}"]},"y":"z\""} "#,
            ),
            (
                &[],
                &[("x", "y"), ("y", "x")],
                r#"{"__metadata__":{"a":"one","b":"two"  },"y":{"s":[1,"}"]},"x":"z\""}   "#,
            ),
        ] {
            let pieces = Pieces::of(header, &changes(metadata, names)).unwrap();
            let made = String::from_utf8(pieces.fitted(header.len()).unwrap()).unwrap();
            assert_eq!(made, expected, "{metadata:?} {names:?}");
        }
        let long = Pieces::of(header, &changes(&[("c", Some("1234"))], &[])).unwrap();
        assert!(long.fitted(header.len()).is_none());
        assert_eq!(
            String::from_utf8(long.compact(|len| len + 4)).unwrap(),
            r#"{"__metadata__":{"a":"one","b":"two","c":"1234"    },"x":{"s":[1,"}"]},"y":"z\""}"#
        );
    }

    #[test]
    fn metadata_is_added_where_there_is_none_and_in_the_order_of_its_keys() {
        let set = changes(&[("b", Some("2")), ("d", Some("\"")), ("e", None)], &[]);
        for (header, expected) in [
            ("{}", r#"{"__metadata__":{"b":"2","d":"\""}}"#),
            (r#"{"x":1}"#, r#"{"__metadata__":{"b":"2","d":"\""},"x":1}"#),
            (r#"{"x":1,"__metadata__":null}"#, r#"{"x":1,"__metadata__":{"b":"2","d":"\""}}"#),
            (r#"{"__metadata__":{}}"#, r#"{"__metadata__":{"b":"2","d":"\""}}"#),
            (
                r#"{"__metadata__":{"a":"1","c":"3","e":"5"}}"#,
                r#"{"__metadata__":{"a":"1","b":"2","c":"3","d":"\""}}"#,
            ),
        ] {
            let made = Pieces::of(header, &set).unwrap().compact(|len| len);
            assert_eq!(String::from_utf8(made).unwrap(), expected, "{header}");
        }
        let gone = changes(&[("b", None)], &[]);
        for header in ["{}", r#"{"x":1,"__metadata__":null}"#, r#"{"x":-1.5e3 }"#] {
            let made = Pieces::of(header, &gone).unwrap().fitted(header.len()).unwrap();
            assert_eq!(String::from_utf8(made).unwrap(), header);
        }
    }
}
