//! Live weights: publications and their subscribers.

#[path = "../common/mod.rs"]
mod common;

mod astray;
mod found;
mod generations;
mod places;
mod processes;
