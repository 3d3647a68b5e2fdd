//! What we hand to Python: memory as arrays of numpy, torch and JAX, as buffers, and as DLPack's capsules.

mod all;
mod arrays;
pub(super) mod buffer;
mod dlpack;

pub(super) use all::arrays;
pub(super) use arrays::Array;
pub(super) use dlpack::{CPU, Exchange, Taken};
