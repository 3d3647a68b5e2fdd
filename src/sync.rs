//! The locks and threads of what is tried in many orders (`make interleavings`): those of `std` but for that.

#[cfg(all(test, interleavings))]
pub(crate) use shuttle::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
};
#[cfg(not(all(test, interleavings)))]
pub(crate) use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
};
