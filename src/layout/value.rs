//! What an entry of the metadata may be.

use crate::error::{Error, Result};
use std::fmt;
use std::path::PathBuf;

/// How deep arrays of arrays may be: no file has more than two, and what frees them goes down as far.
const MAX_DEPTH: usize = 8;

/// How many items of an array are shown.
const SHOWN: usize = 8;

macro_rules! values {
    ($( $(#[$doc:meta])* $variant:ident $t:ty, $kind:literal; )*) => {
        /// What an entry of [`Metadata`](crate::Metadata) is.
        ///
        /// Numbers keep the width that they have in the file, so that they are written as they were read. Floats are equal
        /// where their bits are.
        ///
        /// ```
        /// use maptensors::Value;
        ///
        /// let value = Value::from(32_000u32);
        /// assert_eq!((value.as_u64(), value.as_i64(), value.as_str()), (Some(32_000), Some(32_000), None));
        /// assert_eq!(Value::from("llama"), "llama");
        /// assert_eq!(Value::from(vec![1.5f32, 2.5]).to_string(), "[1.5, 2.5]");
        /// ```
        #[derive(Debug, Clone)]
        #[non_exhaustive]
        pub enum Value {
            $( $(#[$doc])* $variant($t), )*
            /// Text.
            String(String),
            /// Values of one kind.
            Array(Array),
        }

        /// What the items of an array are. Numbers stand one behind the other, and so do the letters of strings: an item
        /// is no allocation.
        #[derive(Debug, Clone)]
        enum Items {
            $( $variant(Vec<$t>), )*
            String(Strings),
            Array(Vec<Array>),
        }

        impl Value {
            /// What kind of value it is, in words.
            pub(crate) fn kind(&self) -> &'static str {
                match self {
                    $( Self::$variant(_) => $kind, )*
                    Self::String(_) => "a string",
                    Self::Array(_) => "an array",
                }
            }
        }

        impl PartialEq for Value {
            fn eq(&self, other: &Self) -> bool {
                match (self, other) {
                    $( (Self::$variant(a), Self::$variant(b)) => a.is_same(b), )*
                    (Self::String(a), Self::String(b)) => a == b,
                    (Self::Array(a), Self::Array(b)) => a == b,
                    _ => false,
                }
            }
        }

        impl fmt::Display for Value {
            /// Text as it is, numbers as Rust writes them, arrays in brackets, long ones cut.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $( Self::$variant(value) => value.fmt(f), )*
                    Self::String(text) => f.pad(text),
                    Self::Array(array) => array.fmt(f),
                }
            }
        }

        impl PartialEq for Array {
            fn eq(&self, other: &Self) -> bool {
                match (&self.items, &other.items) {
                    $( (Items::$variant(a), Items::$variant(b)) => {
                        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.is_same(b))
                    } )*
                    (Items::String(a), Items::String(b)) => a == b,
                    (Items::Array(a), Items::Array(b)) => a == b,
                    _ => false,
                }
            }
        }

        impl Array {
            /// Number of items.
            pub fn len(&self) -> usize {
                match &self.items {
                    $( Items::$variant(items) => items.len(), )*
                    Items::String(items) => items.ends.len(),
                    Items::Array(items) => items.len(),
                }
            }

            /// A copy of an item.
            ///
            /// ```
            /// use maptensors::{Array, Value};
            ///
            /// let array = Array::from(vec![7u16, 9]);
            /// assert_eq!((array.get(1), array.get(2)), (Some(Value::U16(9)), None));
            /// ```
            pub fn get(&self, index: usize) -> Option<Value> {
                match &self.items {
                    $( Items::$variant(items) => items.get(index).copied().map(Value::$variant), )*
                    Items::String(items) => items.get(index).map(Value::from),
                    Items::Array(items) => items.get(index).cloned().map(Value::Array),
                }
            }
        }

        $(
            impl From<$t> for Value {
                fn from(value: $t) -> Self {
                    Self::$variant(value)
                }
            }

            impl From<Vec<$t>> for Array {
                fn from(items: Vec<$t>) -> Self {
                    Self { items: Items::$variant(items) }
                }
            }

            impl From<Vec<$t>> for Value {
                fn from(items: Vec<$t>) -> Self {
                    Self::Array(items.into())
                }
            }

            impl Item for $t {}

            impl sealed::Sealed for $t {
                fn of(array: &Array) -> Option<&[Self]> {
                    if let Items::$variant(items) = &array.items { Some(items) } else { None }
                }
            }
        )*
    };
}

values! {
    /// True or false.
    Bool bool, "a bool";
    /// An 8-bit signed integer.
    I8 i8, "a number";
    /// A 16-bit signed integer.
    I16 i16, "a number";
    /// A 32-bit signed integer.
    I32 i32, "a number";
    /// A 64-bit signed integer.
    I64 i64, "a number";
    /// An 8-bit unsigned integer.
    U8 u8, "a number";
    /// A 16-bit unsigned integer.
    U16 u16, "a number";
    /// A 32-bit unsigned integer.
    U32 u32, "a number";
    /// A 64-bit unsigned integer.
    U64 u64, "a number";
    /// A 32-bit float.
    F32 f32, "a number";
    /// A 64-bit float.
    F64 f64, "a number";
}

/// Equality that holds of every value with itself.
trait Same {
    fn is_same(&self, other: &Self) -> bool;
}

macro_rules! same {
    ($($t:ty)*) => { $( impl Same for $t {
        fn is_same(&self, other: &Self) -> bool {
            self == other
        }
    } )* };
}

same! { bool i8 i16 i32 i64 u8 u16 u32 u64 }

impl Same for f32 {
    fn is_same(&self, other: &Self) -> bool {
        self.to_bits() == other.to_bits()
    }
}

impl Same for f64 {
    fn is_same(&self, other: &Self) -> bool {
        self.to_bits() == other.to_bits()
    }
}

impl Eq for Value {}
impl Eq for Array {}

impl Value {
    /// Whether it is true, of a bool.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    /// An integer of any width that is one.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::I8(value) => Some(value.into()),
            Self::I16(value) => Some(value.into()),
            Self::I32(value) => Some(value.into()),
            Self::I64(value) => Some(value),
            _ => self.as_u64().and_then(|value| value.try_into().ok()),
        }
    }

    /// An integer of any width that is not negative.
    ///
    /// ```
    /// use maptensors::Value;
    /// assert_eq!((Value::from(5i8).as_u64(), Value::from(-5i8).as_u64()), (Some(5), None));
    /// ```
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            _ => None,
        }
    }

    /// A float of either width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => Some(value.into()),
            Self::F64(value) => Some(value),
            _ => None,
        }
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(text) = self { Some(text) } else { None }
    }

    /// The items of an array.
    pub fn as_array(&self) -> Option<&Array> {
        if let Self::Array(array) = self { Some(array) } else { None }
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text)
    }
}

impl From<&String> for Value {
    fn from(text: &String) -> Self {
        Self::String(text.clone())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

impl From<&Value> for Value {
    fn from(value: &Value) -> Self {
        value.clone()
    }
}

impl From<Array> for Value {
    fn from(array: Array) -> Self {
        Self::Array(array)
    }
}

impl From<Vec<String>> for Value {
    fn from(items: Vec<String>) -> Self {
        Self::Array(items.into_iter().collect())
    }
}

impl PartialEq<str> for Value {
    fn eq(&self, text: &str) -> bool {
        self.as_str() == Some(text)
    }
}

impl PartialEq<&str> for Value {
    fn eq(&self, text: &&str) -> bool {
        self.as_str() == Some(text)
    }
}

impl PartialEq<String> for Value {
    fn eq(&self, text: &String) -> bool {
        self.as_str() == Some(text)
    }
}

/// Values of one kind: numbers, strings, or arrays again.
///
/// ```
/// use maptensors::Array;
///
/// let scores = Array::from(vec![0.5f32, -1.0]);
/// assert_eq!(scores.as_slice::<f32>(), Some(&[0.5, -1.0][..]));
/// assert_eq!(scores.as_slice::<f64>(), None);
///
/// let tokens: Array = ["<s>", "</s>"].into_iter().collect();
/// assert_eq!(tokens.strings().unwrap().collect::<Vec<_>>(), ["<s>", "</s>"]);
/// ```
#[derive(Clone)]
pub struct Array {
    // INVARIANT: arrays in it are nested less than MAX_DEPTH deep.
    items: Items,
}

mod sealed {
    pub trait Sealed: Sized {
        fn of(array: &super::Array) -> Option<&[Self]>;
    }
}

/// A number or `bool` that an [`Array`] may be of.
///
/// ```
/// fn sum<T: maptensors::Item + Copy + Into<f64>>(array: &maptensors::Array) -> Option<f64> {
///     Some(array.as_slice::<T>()?.iter().map(|&item| item.into()).sum())
/// }
/// assert_eq!(sum::<u8>(&vec![1u8, 2].into()), Some(3.0));
/// ```
pub trait Item: sealed::Sealed {}

impl Array {
    /// An array of arrays.
    ///
    /// # Errors
    /// [`Error::Limit`] where they would be nested deeper than eight.
    ///
    /// ```
    /// use maptensors::Array;
    ///
    /// let rows = Array::nested(vec![vec![1u8, 2].into(), vec![3u8].into()])?;
    /// assert_eq!(rows.arrays().map(<[Array]>::len), Some(2));
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn nested(arrays: Vec<Array>) -> Result<Self> {
        let depth = arrays.iter().map(Self::depth).max().unwrap_or_default() + 1;
        if depth > MAX_DEPTH {
            let (path, what, hint) = (PathBuf::new(), "the nesting of metadata", None);
            return Err(Error::Limit { path, what, found: depth as u64, limit: MAX_DEPTH as u64, hint });
        }
        Ok(Self { items: Items::Array(arrays) })
    }

    fn depth(&self) -> usize {
        let Items::Array(arrays) = &self.items else { return 1 };
        arrays.iter().map(Self::depth).max().unwrap_or_default() + 1
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The items, if they are of this very type.
    pub fn as_slice<T: Item>(&self) -> Option<&[T]> {
        T::of(self)
    }

    /// The items, if they are strings.
    pub fn strings(&self) -> Option<impl ExactSizeIterator<Item = &str>> {
        let Items::String(strings) = &self.items else { return None };
        Some((0..strings.ends.len()).map(|i| strings.get(i).unwrap_or_default()))
    }

    /// The items, if they are arrays.
    pub fn arrays(&self) -> Option<&[Array]> {
        if let Items::Array(arrays) = &self.items { Some(arrays) } else { None }
    }
}

impl<S: AsRef<str>> FromIterator<S> for Array {
    fn from_iter<I: IntoIterator<Item = S>>(items: I) -> Self {
        let mut strings = Strings::default();
        for item in items {
            strings.text.push_str(item.as_ref());
            strings.ends.push(strings.text.len());
        }
        Self { items: Items::String(strings) }
    }
}

impl fmt::Display for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, item) in (0..self.len().min(SHOWN)).filter_map(|i| self.get(i)).enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            match item.as_str() {
                Some(text) => write!(f, "{separator}{text:?}")?,
                None => write!(f, "{separator}{item}")?,
            }
        }
        if self.len() > SHOWN { write!(f, ", … ({} items)]", self.len()) } else { f.write_str("]") }
    }
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Strings one behind the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Strings {
    text: String,
    // INVARIANT: rising, and on character boundaries of text.
    ends: Vec<usize>,
}

impl Strings {
    fn get(&self, index: usize) -> Option<&str> {
        let start = if index == 0 { 0 } else { *self.ends.get(index - 1)? };
        self.text.get(start..*self.ends.get(index)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_every_width_are_asked_for_alike() {
        for value in [
            Value::from(7u8),
            7i8.into(),
            7u16.into(),
            7i16.into(),
            7u32.into(),
            7i32.into(),
            7u64.into(),
            7i64.into(),
        ] {
            assert_eq!((value.as_u64(), value.as_i64()), (Some(7), Some(7)), "{value:?}");
            assert_eq!((value.as_f64(), value.as_bool(), value.as_str()), (None, None, None));
        }
        assert_eq!((Value::from(-7i64).as_i64(), Value::from(-7i64).as_u64()), (Some(-7), None));
        assert_eq!((Value::from(u64::MAX).as_i64(), Value::from(u64::MAX).as_u64()), (None, Some(u64::MAX)));
        assert_eq!((Value::from(0.5f32).as_f64(), Value::from(0.5f32).as_u64()), (Some(0.5), None));
        assert_eq!((Value::from(true).as_bool(), Value::from(true).as_u64()), (Some(true), None));
    }

    #[test]
    fn a_value_is_equal_to_itself_and_to_none_of_another_kind() {
        let nan: Array = vec![f32::NAN].into();
        let nested = Array::nested(vec![nan.clone()]).unwrap();
        let strings: Array = ["a", "b"].into_iter().collect();
        let values = [
            Value::from(1u8),
            1i8.into(),
            1u32.into(),
            1.0f32.into(),
            1.0f64.into(),
            f64::NAN.into(),
            0.0f32.into(),
            (-0.0f32).into(),
            true.into(),
            "1".into(),
            "".into(),
            nan.into(),
            nested.into(),
            strings.into(),
            vec![1u8].into(),
            Vec::<u8>::new().into(),
            Vec::<i8>::new().into(),
        ];
        for (i, a) in values.iter().enumerate() {
            for (j, b) in values.iter().enumerate() {
                assert_eq!(a == b, i == j, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn strings_of_an_array_are_apart() {
        let array: Array = ["", "é", "", "abc", ""].into_iter().collect();
        assert_eq!(array.strings().unwrap().collect::<Vec<_>>(), ["", "é", "", "abc", ""]);
        assert_eq!((array.get(3), array.get(5)), (Some("abc".into()), None));
        assert_ne!(array, ["é", "", "", "abc", ""].into_iter().collect());
        assert!(Array::from(vec![1u8]).strings().is_none());
    }

    #[test]
    fn nesting_is_bounded() {
        let mut array = Array::from(vec![1u8]);
        for _ in 1..MAX_DEPTH {
            array = Array::nested(vec![Array::from(vec![2u8]), array]).unwrap();
        }
        assert_eq!(array.depth(), MAX_DEPTH);
        assert_eq!(Array::nested(vec![array]).unwrap_err().kind().name(), "Limit");
    }

    #[test]
    fn long_arrays_are_cut_where_they_are_shown() {
        let array: Array = (0..100_000).map(|i| i.to_string()).collect();
        assert_eq!(array.to_string(), r#"["0", "1", "2", "3", "4", "5", "6", "7", … (100000 items)]"#);
        assert_eq!(format!("{:?}", Array::from(vec![1u8, 2])), "[1, 2]");
        let rows = Array::nested(vec![vec![1u8].into(), Array::from(vec![0.5f64])]).unwrap();
        assert_eq!(rows.to_string(), "[[1], [0.5]]");
    }
}
