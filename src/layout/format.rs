//! What a layout was read from.

use std::fmt;

/// A file format that models are read from.
///
/// A file's content says which it is, never its name alone.
///
/// ```
/// use maptensors::{Format, Model};
///
/// let model = Model::read("models/digits.safetensors")?;
/// assert_eq!(model.layout(0).and_then(|layout| layout.format()), Some(Format::Safetensors));
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// [safetensors](https://github.com/huggingface/safetensors).
    Safetensors,
}

impl Format {
    /// The format's name, in lower case.
    ///
    /// ```
    /// assert_eq!(maptensors::Format::Safetensors.name(), "safetensors");
    /// ```
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
        }
    }

    /// What the names of its files end in, without the dot; the usual one first.
    ///
    /// ```
    /// assert_eq!(maptensors::Format::Safetensors.extensions(), ["safetensors"]);
    /// ```
    pub fn extensions(self) -> &'static [&'static str] {
        match self {
            Self::Safetensors => &["safetensors"],
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
