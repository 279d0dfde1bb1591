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

mod packed;
mod tile;

use std::ops::Range;

use packed::{KeyGradients, Keys, PIECE_TOKENS, Queries, piece};
use tile::Tiles;

use crate::buffer::Buffer;
use crate::pack::Width;
use crate::simd::{Isa, Job, Real};
use crate::{Backward, Element, threads};

/// Tasks of a wave for each thread: more even out what threads are kept from by other work, but
/// cost memory (a dQ, or a packed head, each).
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
        let [batch, kv_heads, kv_len, head_dim] = args.k.shape();
        let [_, q_heads, q_len, _] = args.q.shape();
        if batch == 0 || q_heads == 0 {
            return;
        }
        let width = Width::of(head_dim);
        let threads = args.setting.threads.get();
        // Five packed tensors, two accumulators of keys, one of queries at least.
        let head_bytes = size_of::<I::Real>() * width.rows_len(kv_len.max(q_len)) * 8;
        let at_once = (WAVE_BYTES / head_bytes.max(1)).clamp(1, threads * TASKS_PER_THREAD);
        let heads: Vec<(usize, usize)> = (0..batch)
            .flat_map(|b| (0..kv_heads).map(move |h| (b, h)))
            .collect();
        for wave in heads.chunks(at_once) {
            let keys = Keys::<I>::new(args, wave, width);
            let mut gradients = KeyGradients::<I>::new(args, wave.len(), width);
            let group = q_heads / kv_heads;
            for member in 0..group {
                let q_heads: Vec<(usize, usize)> =
                    wave.iter().map(|&(b, h)| (b, h * group + member)).collect();
                let queries = Queries::<I>::new(args, &q_heads, width);
                let parts = (threads * TASKS_PER_THREAD).div_ceil(wave.len());
                let mut dq = differentiate(args, &q_heads, &keys, &mut gradients, &queries, parts);
                sum_and_write_dq::<I, T>(args, &q_heads, width, &mut dq);
            }
            gradients.write(args, wave);
        }
    }
}

/// A stretch of one head's key blocks, with all that only its task writes.
struct Task<'a, R> {
    /// Which of the wave's heads.
    index: usize,
    /// (batch, query head).
    head: (usize, usize),
    columns: Range<usize>,
    /// Of the stretch's keys alone.
    dk: &'a mut [R],
    dv: &'a mut [R],
    /// Of all the head's queries.
    dq: &'a mut [R],
}

/// Adds one query head's share to dK and dV of each head of the wave; returns its dQ in
/// `parts` summands, (head, part, query).
fn differentiate<I: Isa, T: Element<Real = I::Real>>(
    args: &Backward<'_, T>,
    q_heads: &[(usize, usize)],
    keys: &Keys<I>,
    gradients: &mut KeyGradients<I>,
    queries: &Queries<I>,
    parts: usize,
) -> Buffer<I::Real> {
    let width = keys.width;
    let extents = args.plan.layout().extents;
    let (q_len, kv_len) = (extents.q_len(), extents.kv_len());
    let mut dq = Buffer::new(q_heads.len() * parts * width.rows_len(q_len));
    if q_len == 0 || kv_len == 0 {
        return dq;
    }
    let mut tasks = Vec::new();
    let by_head = gradients
        .dk
        .chunks_mut(width.rows_len(kv_len))
        .zip(gradients.dv.chunks_mut(width.rows_len(kv_len)))
        .zip(dq.chunks_mut(parts * width.rows_len(q_len)));
    for (index, (&head, ((mut dk, mut dv), dq))) in q_heads.iter().zip(by_head).enumerate() {
        let stretches = stretches(args, head, parts);
        for (columns, dq) in stretches
            .into_iter()
            .zip(dq.chunks_mut(width.rows_len(q_len)))
        {
            let tokens = columns.len() * extents.kv_block();
            let len = width.rows_len(tokens).min(dk.len());
            let (own_dk, own_dv);
            (own_dk, dk) = dk.split_at_mut(len);
            (own_dv, dv) = dv.split_at_mut(len);
            tasks.push(Task {
                index,
                head,
                columns,
                dk: own_dk,
                dv: own_dv,
                dq,
            });
        }
    }
    threads::consume(args.setting.threads, tasks, |mut task| {
        Tiles::new(args, keys, queries, task.index, q_heads.len()).run(&mut task);
    });
    dq
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

/// Adds up the summands of dQ, in order, and writes it out.
fn sum_and_write_dq<I: Isa, T: Element<Real = I::Real>>(
    args: &Backward<'_, T>,
    q_heads: &[(usize, usize)],
    width: Width,
    dq: &mut [I::Real],
) {
    let Some(tensor) = &args.dq else { return };
    let [_, _, q_len, head_dim] = tensor.shape();
    if q_len == 0 {
        return;
    }
    let scale = I::Real::of(args.setting.scale);
    let len = width.rows_len(q_len);
    let parts = dq.len() / (q_heads.len() * len);
    let mut pieces = Vec::new();
    for (&head, dq) in q_heads.iter().zip(dq.chunks(parts * len)) {
        for index in 0..q_len.div_ceil(PIECE_TOKENS) {
            pieces.push((head, piece(index, q_len), dq));
        }
    }
    threads::consume(
        args.setting.threads,
        pieces,
        |((batch, head), tokens, dq)| {
            let mut sum = Buffer::new(head_dim);
            for token in tokens {
                sum.fill(I::Real::ZERO);
                for part in dq.chunks(len) {
                    let row = &part[token * width.stride()..][..head_dim];
                    sum.iter_mut()
                        .zip(row)
                        .for_each(|(sum, &value)| *sum += value * scale);
                }
                // SAFETY: pieces do not overlap, and each is written by one task.
                T::narrow(&sum, unsafe { tensor.row_mut(batch, head, token) });
            }
        },
    );
}
