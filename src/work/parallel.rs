//! Work on several threads.

use super::{cancel, inherited};

/// Runs `work` on every item, on as many threads as help. The first error stops handing out items.
pub(crate) fn each_in_parallel<T: Send, E: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    // More threads than this contend for the kernel's page-cache locks and gain nothing.
    const MOST: usize = 8;
    // Asking reads the cgroup's files each time.
    static CORES: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    let cores = || *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
    let threads = if items.len() <= 1 { 1 } else { cores().min(MOST).min(items.len()) };
    if threads <= 1 {
        return items.into_iter().try_for_each(work);
    }
    let queue = std::sync::Mutex::new((items.into_iter(), None));
    let lock = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let take_and_work = || {
        loop {
            let next = {
                let mut state = lock();
                if state.1.is_some() { None } else { state.0.next() }
            };
            let Some(item) = next else { break };
            if let Err(error) = work(item) {
                lock().1.get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            let (inherited, cancel, take_and_work) =
                (inherited::current(), cancel::current(), &take_and_work);
            // Where the system gives no thread (RLIMIT_AS, RLIMIT_NPROC, a cgroup's pids.max), there are fewer.
            if std::thread::Builder::new()
                .spawn_scoped(scope, move || {
                    inherited::with(inherited, || cancel::under(cancel, take_and_work));
                })
                .is_err()
            {
                break;
            }
        }
        take_and_work();
    });
    match lock().1.take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_in_parallel_work_is_returned() {
        let done = each_in_parallel((0..100).collect(), |i| if i == 50 { Err(i) } else { Ok(()) });
        assert_eq!(done, Err(50));
        assert_eq!(each_in_parallel(Vec::<u8>::new(), |_| Err(())), Ok(()));
    }
}
