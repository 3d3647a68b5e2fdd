//! How far work is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes done, of how many; and who is told. Clones count together.
#[derive(Clone, Default)]
pub(crate) struct Progress {
    told: Option<Told>,
    done: Arc<AtomicU64>,
    total: Option<u64>,
}

type Told = Arc<dyn Fn(u64, u64) + Send + Sync>;

impl Progress {
    /// Of work that has not begun.
    pub(crate) fn telling(told: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        Self { told: Some(Arc::new(told)), ..Self::default() }
    }

    /// The same listener, for work of `total` bytes that begins, in however many files.
    pub(crate) fn over(&self, total: u64) -> Self {
        Self { told: self.told.clone(), done: Arc::default(), total: Some(total) }
    }

    /// Whether the work has begun.
    pub(crate) fn has_begun(&self) -> bool {
        self.total.is_some()
    }

    pub(crate) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if let (Some(told), Some(total)) = (&self.told, self.total) {
            told(done, total);
        }
    }

    /// Bytes done, and their total.
    pub(crate) fn so_far(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.unwrap_or_default())
    }
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.told.is_some() { "told" } else { "nobody" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn clones_count_together_and_what_begins_again_counts_from_zero() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let note = told.clone();
        let progress = Progress::telling(move |done, total| note.lock().unwrap().push((done, total)));
        progress.add(1);
        let (first, second) = (progress.over(10), progress.over(20));
        first.clone().add(4);
        first.add(6);
        second.add(5);
        assert_eq!(*told.lock().unwrap(), [(4, 10), (10, 10), (5, 20)]);
        assert_eq!((first.so_far(), second.so_far()), ((10, 10), (5, 20)));
    }
}
