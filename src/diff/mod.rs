//! What differs between two states of a model, and the checksums of its tensors.
#![forbid(unsafe_code)]

mod changes;
mod compare;
mod contents;
mod differences;
pub(crate) mod digest;
mod verify;

pub use changes::{Change, Changes};
pub(crate) use compare::Difference;
pub(crate) use contents::{Contents, Found, Marks, Span, Until, hash_all};
pub(crate) use differences::compare_contents;
pub use differences::{Differences, Reshaped};
pub use verify::Verify;
