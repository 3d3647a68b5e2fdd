//! What is opened, and what is refused: files and sets that lie, against the reference reader too.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/oracle.rs"]
mod oracle;

mod api;
mod bad_inputs;
mod differential;
mod owned;
mod sources;
