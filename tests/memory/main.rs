//! What memory does under an open model: mapped, copied when written, brought, given back, locked; and what it costs.

#[path = "../common/mod.rs"]
mod common;

mod costs;
mod lazy;
mod options;
mod shared_edit;
mod writable;
mod zero_copy;
