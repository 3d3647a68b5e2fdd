//! The `maptensors` command, run as a user runs it.

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod interrupted;
mod publications;
mod see;
