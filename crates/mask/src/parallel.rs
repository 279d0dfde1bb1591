//! Work on large masks is shared by several threads. In: pieces of work, and how many blocks they are
//! about. Out: each piece done once, by whichever thread was free. Called by the search for blocks and
//! by plans.
//!
//! How long a piece takes depends on the mask more than on its size: of most masks one thread is done
//! before others would have started. So it begins alone, and calls for help once what is left is worth
//! it; at once where there are so many blocks that it surely is.
//!
//! Threads are the standard library's, and end with the call: a mask is made once, and starting a few
//! costs less than a thousandth of a second. A pool would be one more dependency of whoever reads masks.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// So many blocks are worth all threads.
const SURELY: usize = 1 << 19;
/// Fewer blocks are one piece.
const FEW: usize = 1 << 13;
/// What a thread must take off the others: several times what it costs to start.
const WORTH_IT: Duration = Duration::from_micros(400);
/// Threads at most: memory has to keep up.
const MOST: usize = 8;

/// Into how many pieces a matrix is best cut where there are so many blocks in all.
pub(crate) fn pieces(blocks: usize) -> usize {
    match blocks {
        ..FEW => 1,
        FEW..SURELY => 2 * MOST,
        SURELY.. => 4 * MOST,
    }
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
    let count = pieces.len();
    let pieces = Mutex::new(pieces.into_iter());
    let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        let mut own = own();
        while let Some(piece) = next() {
            work(&mut own, piece);
        }
    };
    thread::scope(|scope| {
        let call = |wanted: usize| {
            let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
            for _ in 1..cores.min(MOST).min(wanted + 1) {
                scope.spawn(run);
            }
        };
        let mut is_alone = blocks < SURELY;
        if !is_alone {
            call(count.saturating_sub(1));
        }
        let (mut own, start) = (own(), Instant::now());
        let mut done = 0;
        while let Some(piece) = next() {
            work(&mut own, piece);
            done += 1;
            if is_alone && done < count {
                let left = start.elapsed().as_secs_f64() / done as f64 * (count - done) as f64;
                let wanted = ((left / WORTH_IT.as_secs_f64()) as usize).min(count - done);
                if wanted > 0 {
                    is_alone = false;
                    call(wanted);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        for blocks in [0, SURELY] {
            let sum = AtomicUsize::new(0);
            consume(blocks, (1..=100).collect(), |piece: usize| {
                sum.fetch_add(piece, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 5050);
        }
    }

    #[test]
    fn help_is_called_where_pieces_take_long() {
        for count in [1, 40] {
            let threads = Mutex::new(std::collections::HashSet::new());
            consume(1, (0..count).collect(), |_: usize| {
                thread::sleep(5 * WORTH_IT);
                threads.lock().unwrap().insert(thread::current().id());
            });
            let helped = threads.into_inner().unwrap().len() > 1;
            let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
            assert_eq!(helped, count > 1 && cores > 1);
        }
    }
}
