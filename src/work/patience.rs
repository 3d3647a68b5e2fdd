//! How long to look again at what is being replaced.

use std::time::{Duration, Instant};

/// Tries that are never too many, however slow the machine is.
const TRIES: u32 = 50;

/// Time that is never too long, however fast the machine is.
const TIME: Duration = Duration::from_secs(2);

/// Bounds the looks of a reader that finds each time that a saver was faster: what is replaced is old or new, and
/// a reader that looks again finds it so.
pub(crate) struct Patience {
    begun: Instant,
    tries: u32,
}

impl Patience {
    pub(crate) fn new() -> Self {
        Self { begun: Instant::now(), tries: 0 }
    }

    /// Whether to look once more; waits a moment where the first few looks were in vain.
    pub(crate) fn again(&mut self) -> bool {
        self.tries += 1;
        if self.tries > 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.tries < TRIES || self.begun.elapsed() < TIME
    }
}
