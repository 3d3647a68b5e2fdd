//! How long work is done, and by how many threads: canceling, progress, patience.

pub(crate) mod cancel;
pub(crate) mod inherited;
mod parallel;
mod patience;
mod progress;

pub(crate) use parallel::each_in_parallel;
pub(crate) use patience::Patience;
pub(crate) use progress::Progress;
