//! File formats: bytes to [`Layout`](crate::Layout) and back. Pure: no I/O, no mapping, no `unsafe`.

pub(crate) mod index;
pub(crate) mod safetensors;
