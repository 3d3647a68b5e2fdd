//! The walk.
fn main() {}
