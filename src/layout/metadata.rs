//! What a file says beside its tensors: [`Metadata`], a map of typed [`Value`]s.

use super::Value;
use std::borrow::Borrow;
use std::collections::{BTreeMap, btree_map};
use std::ops::Index;

/// What a file says beside its tensors, in the order of its keys.
///
/// Formats differ in what a value may be. In a safetensors file all are strings, and saving refuses others.
///
/// ```
/// use maptensors::{Layout, Metadata};
///
/// let metadata = Metadata::from([("format", "pt"), ("step", "100")]);
/// let layout = Layout::builder().all_metadata(metadata).build()?;
/// assert_eq!(layout.metadata()["format"], "pt");
/// assert_eq!(layout.metadata().text("step"), Some("100"));
/// assert_eq!(layout.metadata().get("epoch"), None);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    entries: BTreeMap<String, Value>,
}

impl Metadata {
    /// No entries.
    pub const fn new() -> Self {
        Self { entries: BTreeMap::new() }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// The value of a key, if it is a string.
    ///
    /// ```
    /// let metadata = maptensors::Metadata::from([("step", 100u32)]);
    /// assert_eq!(metadata.text("step"), None);
    /// assert_eq!(metadata["step"].as_u64(), Some(100));
    /// ```
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// Whether there is such a key.
    pub fn contains_key(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Sets a key, and returns what it was before.
    ///
    /// ```
    /// use maptensors::Metadata;
    ///
    /// let mut metadata = Metadata::new();
    /// metadata.insert("vocabulary", vec!["<s>".to_owned(), "</s>".to_owned()]);
    /// assert_eq!(metadata.insert("vocabulary", "none").and_then(|old| Some(old.as_array()?.len())), Some(2));
    /// ```
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        self.entries.insert(key.into(), value.into())
    }

    /// Takes a key away, and returns what it was.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.entries.remove(key)
    }

    /// All entries, in the order of their keys.
    pub fn iter(&self) -> MetadataIter<'_> {
        self.into_iter()
    }

    /// The entries that are strings.
    pub(crate) fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.iter().filter_map(|(key, value)| Some((key, value.as_str()?)))
    }

    /// Sets a key that is not there yet.
    pub(crate) fn insert_new(&mut self, key: &str, value: &Value) {
        if !self.contains_key(key) {
            self.insert(key, value.clone());
        }
    }
}

impl Index<&str> for Metadata {
    type Output = Value;

    /// # Panics
    /// If there is no such key; [`Metadata::get`] says so.
    fn index(&self, key: &str) -> &Value {
        &self.entries[key]
    }
}

/// The entries of [`Metadata`], in the order of their keys.
///
/// ```
/// let metadata = maptensors::Metadata::from([("b", "2"), ("a", "1")]);
/// assert_eq!(metadata.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["a", "b"]);
/// ```
#[derive(Debug, Clone)]
pub struct MetadataIter<'a> {
    entries: btree_map::Iter<'a, String, Value>,
}

impl<'a> Iterator for MetadataIter<'a> {
    type Item = (&'a str, &'a Value);

    fn next(&mut self) -> Option<Self::Item> {
        self.entries.next().map(|(key, value)| (key.as_str(), value))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.entries.size_hint()
    }
}

impl DoubleEndedIterator for MetadataIter<'_> {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.entries.next_back().map(|(key, value)| (key.as_str(), value))
    }
}

impl ExactSizeIterator for MetadataIter<'_> {}

impl<'a> IntoIterator for &'a Metadata {
    type Item = (&'a str, &'a Value);
    type IntoIter = MetadataIter<'a>;

    fn into_iter(self) -> MetadataIter<'a> {
        MetadataIter { entries: self.entries.iter() }
    }
}

impl IntoIterator for Metadata {
    type Item = (String, Value);
    type IntoIter = btree_map::IntoIter<String, Value>;

    fn into_iter(self) -> Self::IntoIter {
        self.entries.into_iter()
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self { entries: entries.into_iter().map(|(key, value)| (key.into(), value.into())).collect() }
    }
}

impl<K: Into<String>, V: Into<Value>> Extend<(K, V)> for Metadata {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        self.entries.extend(entries.into_iter().map(|(key, value)| (key.into(), value.into())));
    }
}

impl<K: Into<String>, V: Into<Value>, const N: usize> From<[(K, V); N]> for Metadata {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<V: Into<Value>> From<BTreeMap<String, V>> for Metadata {
    fn from(entries: BTreeMap<String, V>) -> Self {
        entries.into_iter().collect()
    }
}

impl<V: Into<Value>, S> From<std::collections::HashMap<String, V, S>> for Metadata {
    fn from(entries: std::collections::HashMap<String, V, S>) -> Self {
        entries.into_iter().collect()
    }
}

impl From<&Metadata> for Metadata {
    fn from(metadata: &Metadata) -> Self {
        metadata.clone()
    }
}

impl<V: Borrow<str>> PartialEq<BTreeMap<String, V>> for Metadata {
    fn eq(&self, other: &BTreeMap<String, V>) -> bool {
        self.len() == other.len()
            && self
                .iter()
                .zip(other)
                .all(|((key, value), (other, text))| key == other && value.as_str() == Some(text.borrow()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_in_the_order_of_their_keys_and_the_last_of_a_key_counts() {
        let mut metadata: Metadata = [("b", "1"), ("a", "2"), ("b", "3")].into_iter().collect();
        metadata.extend([("c", 4u8)]);
        assert_eq!(metadata.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!((metadata.text("b"), metadata.text("c")), (Some("3"), None));
        assert_eq!(metadata.texts().collect::<Vec<_>>(), [("a", "2"), ("b", "3")]);
        assert_eq!(metadata.remove("c"), Some(Value::U8(4)));
        assert_eq!((metadata.len(), metadata.iter().len(), metadata.contains_key("c")), (2, 2, false));
        metadata.insert_new("a", &"9".into());
        metadata.insert_new("z", &"9".into());
        assert_eq!((metadata.text("a"), metadata.text("z")), (Some("2"), Some("9")));
    }

    #[test]
    fn text_by_text_is_equal_to_a_map_of_strings_and_nothing_else_is() {
        let map = |entries: &[(&str, &str)]| -> BTreeMap<String, String> {
            entries.iter().map(|&(key, value)| (key.into(), value.into())).collect()
        };
        let metadata = Metadata::from(map(&[("a", "1"), ("b", "2")]));
        assert_eq!(metadata, map(&[("a", "1"), ("b", "2")]));
        for other in [
            &[][..],
            &[("a", "1")],
            &[("a", "1"), ("b", "3")],
            &[("a", "1"), ("c", "2")],
            &[("a", "1"), ("b", "2"), ("c", "")],
        ] {
            assert_ne!(metadata, map(other), "{other:?}");
        }
        assert_ne!(Metadata::from([("a", 1u8)]), map(&[("a", "1")]));
    }
}
