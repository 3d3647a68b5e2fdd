//! The `maptensors` command.
fn main() {}
