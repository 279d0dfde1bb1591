//! Large masks are made by several threads. In: pieces of work, and how many blocks they are about. Out:
//! each piece done once, by whichever thread was free. Called by the search for blocks and by plans.
//!
//! Threads are the standard library's, and end with the call: a mask is made once, and starting a few
//! costs less than a thousandth of a second. A pool would be one more dependency of whoever reads masks.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Fewer blocks are not worth a thread.
const WORTH_IT: usize = 1 << 19;
/// Threads at most: memory has to keep up.
const MOST: usize = 8;

/// How many pieces are worth making of so many blocks: 1 if one thread will do them all.
pub(crate) fn threads(blocks: usize) -> usize {
    match blocks < WORTH_IT {
        true => 1,
        false => thread::available_parallelism().map_or(1, NonZeroUsize::get),
    }
    .min(MOST)
}

/// Calls `work` for each piece, the first ones first.
pub(crate) fn consume<T: Send>(blocks: usize, pieces: Vec<T>, work: impl Fn(T) + Sync) {
    consume_with(blocks, pieces, || (), |(), piece| work(piece));
}

/// Likewise, with something of each thread's own.
pub(crate) fn consume_with<T: Send, S>(
    blocks: usize,
    pieces: Vec<T>,
    own: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) + Sync,
) {
    let threads = threads(blocks).min(pieces.len());
    let pieces = Mutex::new(pieces.into_iter());
    let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        let mut own = own();
        while let Some(piece) = next() {
            work(&mut own, piece);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        for blocks in [0, WORTH_IT] {
            let sum = AtomicUsize::new(0);
            consume(blocks, (1..=100).collect(), |piece: usize| {
                sum.fetch_add(piece, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 5050);
        }
    }
}
