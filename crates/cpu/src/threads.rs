//! Work on several threads: [`for_each`] hands out numbered tasks in order, each to the next free
//! thread. Called by the drivers. A pool of each size is made once and kept.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::ThreadPool;

/// Runs `task(scratch, i)` for `i` in `0..tasks`, `scratch` being each thread's own.
///
/// Tasks start in order, so that a caller who puts the longest first wastes no time at the end.
pub(crate) fn for_each<S>(
    threads: NonZeroUsize,
    tasks: usize,
    scratch: impl Fn() -> S + Sync,
    task: impl Fn(&mut S, usize) + Sync,
) {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut own = None;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            task(own.get_or_insert_with(&scratch), index);
        }
    };
    match pool(threads.get().min(tasks)) {
        Some(pool) => {
            pool.broadcast(|_| work());
        }
        None => work(),
    }
}

/// Runs `task` once for each item, which it takes over. For work with no scratch.
pub(crate) fn consume<S: Send>(threads: NonZeroUsize, items: Vec<S>, task: impl Fn(S) + Sync) {
    let items: Vec<Mutex<Option<S>>> = items
        .into_iter()
        .map(|item| Mutex::new(Some(item)))
        .collect();
    for_each(
        threads,
        items.len(),
        || (),
        |(), index| {
            let item = items[index]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(item) = item {
                task(item);
            }
        },
    );
}

/// The pool of a size; none for a single thread, or where threads cannot be had.
fn pool(threads: usize) -> Option<Arc<ThreadPool>> {
    /// A pool belongs to its process: a forked child inherits the memory, but not the threads.
    type Key = (u32, usize);
    static POOLS: Mutex<Vec<(Key, Arc<ThreadPool>)>> = Mutex::new(Vec::new());

    if threads <= 1 {
        return None;
    }
    let key = (std::process::id(), threads);
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, pool)) = pools.iter().find(|(known, _)| *known == key) {
        return Some(pool.clone());
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("flex-block-attn-{index}"))
        .build()
        .ok()?;
    let pool = Arc::new(pool);
    pools.push((key, pool.clone()));
    Some(pool)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..5 {
            for tasks in [0, 1, 3, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                let threads = NonZeroUsize::new(threads).unwrap();
                for_each(
                    threads,
                    tasks,
                    || (),
                    |(), i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    },
                );
                assert!(
                    counts
                        .iter()
                        .all(|count| count.load(Ordering::Relaxed) == 1)
                );
            }
        }
    }

    #[test]
    fn calls_from_several_threads_at_once() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let sum = AtomicUsize::new(0);
                    for_each(
                        NonZeroUsize::new(3).unwrap(),
                        1000,
                        || (),
                        |(), i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        },
                    );
                    assert_eq!(sum.into_inner(), 499_500);
                });
            }
        });
    }
}
