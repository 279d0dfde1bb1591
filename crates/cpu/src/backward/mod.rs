//! The backward pass. In: what the forward read and wrote, the output's gradient (and perhaps the
//! lse's). Out: the gradients of q, k and v that are wanted.
//!
//! P is recomputed from the lse, tile by tile (FlashAttention-2, arXiv 2307.08691, algorithm 2).
//! Keys are stationary: a task owns a stretch of a head's key blocks and with it their dK and dV,
//! and adds to a dQ of its own; the dQs of a head's tasks are then summed in order. So nothing is
//! locked, and results repeat bit by bit for the same number of threads.
//!
//! ```text
//! S  = Q K^T        P  = exp(scale S - lse)      dV += P^T dO
//! dP = dO V^T       dS = P (dP - delta)          dK += dS^T Q     dQ += dS K
//! ```

mod head;
mod tile;

use std::ops::Range;

use head::{Head, Packed, Place, give_keys, give_queries, take_keys, take_queries};
use tile::Tiles;

use crate::pack::Width;
use crate::simd::{Isa, Job};
use crate::{Backward, Element, threads};

/// Tasks for each thread: more even out what threads are kept from by other work, but cost memory
/// (a dQ each).
const TASKS_PER_THREAD: usize = 2;
/// Heads that are worked on at once take about this many bytes (one head at least).
const WAVE_BYTES: usize = 1 << 30;

pub(crate) fn backward<T: Element>(args: &Backward<'_, T>) {
    T::run_exact(BackwardJob(args));
}

struct BackwardJob<'a, 'b, T: Element>(&'a Backward<'b, T>);

impl<T: Element> Job<T::Real> for BackwardJob<'_, '_, T> {
    fn run<I: Isa<Real = T::Real>>(self) {
        // `run_exact` chooses instructions whose operands are reals: a word is one of them, and
        // what is packed in rows serves as either side of a product.
        assert_eq!(I::DEPTH, 1);
        let args = self.0;
        let [batch, kv_heads, _, head_dim] = args.k.shape();
        let q_heads = args.q.shape()[1];
        let wave: Vec<Place> = (0..batch)
            .flat_map(|b| (0..kv_heads).map(move |h| (b, h)))
            .collect();
        if wave.is_empty() {
            return;
        }
        let width = Width::of(head_dim);
        let threads = args.setting.threads.get();
        // One head a thread if they can be had; the tasks of few heads are stretches of keys.
        let parts = |heads: usize| (threads * TASKS_PER_THREAD).div_ceil(heads);
        let most = threads.min(wave.len());
        let affordable = WAVE_BYTES / Head::<I>::bytes(args, width, parts(most)).max(1);
        let at_once = affordable.clamp(1, most);
        let mut heads: Vec<Head<I>> = (0..at_once)
            .map(|_| Head::new(args, width, parts(at_once)))
            .collect();
        for wave in wave.chunks(at_once) {
            let heads = &mut heads[..wave.len()];
            take_keys(args, wave, heads);
            let group = q_heads / kv_heads;
            for member in 0..group {
                let queries: Vec<Place> =
                    wave.iter().map(|&(b, h)| (b, h * group + member)).collect();
                take_queries(args, &queries, heads);
                differentiate(args, &queries, heads);
                give_queries(args, &queries, heads);
            }
            give_keys(args, wave, heads);
        }
    }
}

/// A stretch of one head's key blocks, with all that only its task writes.
struct Task<'a, I: Isa> {
    packed: &'a Packed<I>,
    /// Of the query head.
    place: Place,
    columns: Range<usize>,
    /// Of the stretch's keys alone.
    dk: &'a mut [I::Real],
    dv: &'a mut [I::Real],
    /// Of all the head's queries.
    dq: &'a mut [I::Real],
}

/// Adds one query head's share to dK and dV of each head of the wave, and computes its dQ.
fn differentiate<I: Isa, T: Element<Real = I::Real>>(
    args: &Backward<'_, T>,
    queries: &[Place],
    heads: &mut [Head<I>],
) {
    let kv_block = args.plan.layout().extents.kv_block();
    let mut tasks = Vec::new();
    for (&place, head) in queries.iter().zip(heads) {
        let Head { packed, dk, dv, dq } = head;
        let (mut dk, mut dv) = (&mut dk[..], &mut dv[..]);
        let stretches = stretches(args, place, dq.len());
        for (columns, dq) in stretches.into_iter().zip(dq) {
            let len = packed
                .width
                .rows_len(columns.len() * kv_block)
                .min(dk.len());
            let (own_dk, own_dv);
            (own_dk, dk) = dk.split_at_mut(len);
            (own_dv, dv) = dv.split_at_mut(len);
            tasks.push(Task {
                packed,
                place,
                columns,
                dk: own_dk,
                dv: own_dv,
                dq,
            });
        }
    }
    threads::consume(args.setting.threads, tasks, |task| {
        Tiles::new(args, task).run()
    });
}

/// Cuts a head's key blocks into stretches of about equal work.
fn stretches<T: Element>(
    args: &Backward<'_, T>,
    (batch, head): (usize, usize),
    parts: usize,
) -> Vec<Range<usize>> {
    let columns = args.plan.layout().extents.kv_blocks();
    // One more than the list's length: what a column costs even if no row keeps it.
    let cost = |column| args.plan.column(batch, head, column).len() + 1;
    let total: usize = (0..columns).map(cost).sum();
    let mut stretches = Vec::new();
    let (mut start, mut spent) = (0, 0);
    for column in 0..columns {
        spent += cost(column);
        let due = total * (stretches.len() + 1) / parts;
        if spent >= due && stretches.len() + 1 < parts {
            stretches.push(start..column + 1);
            start = column + 1;
        }
    }
    stretches.push(start..columns);
    stretches
}
