//! Python's cycle collector.

use pyo3::prelude::*;

/// Python's cycle collector, off until this is dropped. It would go through all objects again and again while many
/// are made at once, none of which can be garbage yet: a third of the time that 20,000 tensors take.
pub(super) struct PausedCollector {
    was_on: bool,
}

impl PausedCollector {
    pub(super) fn new(_attached: Python<'_>) -> Self {
        // SAFETY: the interpreter is attached. Returns whether the collector was on.
        Self { was_on: unsafe { pyo3::ffi::PyGC_Disable() } == 1 }
    }
}

impl Drop for PausedCollector {
    fn drop(&mut self) {
        if self.was_on {
            // SAFETY: dropped by the function that made it, attached as then.
            unsafe { pyo3::ffi::PyGC_Enable() };
        }
    }
}
