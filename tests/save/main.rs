//! What is written, over what, and what a save leaves that fails, is killed, forked or cut off.

#[path = "../common/mod.rs"]
mod common;

mod atomic;
mod checkpoint_order;
mod checkpoints;
mod deltas;
mod directories;
mod faults;
mod forked;
mod invisible;
#[cfg(feature = "cli")]
mod over;
mod power;
mod reflink;
mod replaced;
mod round_trip;
mod tensors;
