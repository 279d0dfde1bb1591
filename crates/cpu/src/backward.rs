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

use std::ops::Range;

use crate::buffer::Buffer;
use crate::pack::{self, Tokens, Width};
use crate::simd::gemm::{Gemm, Left, Run};
use crate::simd::rows::{self, RowFacts, Scores};
use crate::simd::{Isa, Job, PANEL, Real};
use crate::{Backward, Element, threads, tiles};

/// Queries of a tile at most; with [`TILE_KEYS`], a tile's operands fit a second-level cache.
const TILE_QUERIES: usize = 128;
/// Keys of a tile at most.
const TILE_KEYS: usize = 128;
/// Rows of scores lie a panel further apart than they are long, as packed tokens do.
const SCORE_STRIDE: usize = TILE_KEYS + PANEL;
/// Tokens that are packed, or written out, by one task.
const PIECE_TOKENS: usize = 256;
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

/// The rows of a head, packed or accumulated: a slice for each head of a wave.
fn head_slice<X>(all: &[X], index: usize, heads: usize) -> &[X] {
    let len = all.len() / heads;
    &all[index * len..][..len]
}

/// Keys and values of a wave's heads, packed.
struct Keys<I: Isa> {
    width: Width,
    heads: usize,
    k_transposed: Buffer<I::Operand>,
    k_rows: Buffer<I::Operand>,
    v_transposed: Buffer<I::Operand>,
}

impl<I: Isa> Keys<I> {
    fn new<T: Element<Real = I::Real>>(
        args: &Backward<'_, T>,
        wave: &[(usize, usize)],
        width: Width,
    ) -> Self {
        let kv_len = args.k.shape()[2];
        let heads = wave.len();
        let operands = |len| Buffer::new(heads * len);
        let mut keys = Self {
            width,
            heads,
            k_transposed: operands(width.transposed_len(kv_len)),
            k_rows: operands(width.rows_len(kv_len)),
            v_transposed: operands(width.transposed_len(kv_len)),
        };
        if kv_len == 0 {
            return keys;
        }
        let mut pieces = Vec::new();
        let by_head = keys
            .k_transposed
            .chunks_mut(width.transposed_len(kv_len))
            .zip(keys.k_rows.chunks_mut(width.rows_len(kv_len)))
            .zip(keys.v_transposed.chunks_mut(width.transposed_len(kv_len)));
        for (&head, ((kt, k), vt)) in wave.iter().zip(by_head) {
            let by_piece = kt
                .chunks_mut(width.transposed_len(PIECE_TOKENS))
                .zip(k.chunks_mut(width.rows_len(PIECE_TOKENS)))
                .zip(vt.chunks_mut(width.transposed_len(PIECE_TOKENS)));
            for (index, ((kt, k), vt)) in by_piece.enumerate() {
                pieces.push((head, piece(index, kv_len), kt, k, vt));
            }
        }
        threads::consume(
            args.setting.threads,
            pieces,
            |((batch, head), tokens, kt, k, vt)| {
                let of = |tensor| Tokens {
                    tensor,
                    batch,
                    head,
                };
                pack::transposed::<I, T>(&of(args.k), tokens.clone(), width, kt);
                pack::depth_rows::<I, T>(&of(args.k), tokens.clone(), width, k);
                pack::transposed::<I, T>(&of(args.v), tokens, width, vt);
            },
        );
        keys
    }
}

/// Gradients of a wave's keys and values so far.
struct KeyGradients<I: Isa> {
    width: Width,
    dk: Buffer<I::Real>,
    dv: Buffer<I::Real>,
}

impl<I: Isa> KeyGradients<I> {
    fn new<T: Element<Real = I::Real>>(args: &Backward<'_, T>, heads: usize, width: Width) -> Self {
        let len = heads * width.rows_len(args.k.shape()[2]);
        Self {
            width,
            dk: Buffer::new(len),
            dv: Buffer::new(len),
        }
    }

    /// Writes dK and dV out.
    fn write<T: Element<Real = I::Real>>(
        &mut self,
        args: &Backward<'_, T>,
        wave: &[(usize, usize)],
    ) {
        let scale = I::Real::of(args.setting.scale);
        let outputs = [
            (&args.dk, &mut self.dk, scale),
            (&args.dv, &mut self.dv, I::Real::of(1.0)),
        ];
        for (tensor, values, factor) in outputs {
            let Some(tensor) = tensor else { continue };
            let [_, _, kv_len, head_dim] = tensor.shape();
            if kv_len == 0 {
                continue;
            }
            let mut pieces = Vec::new();
            for (&head, values) in wave
                .iter()
                .zip(values.chunks_mut(self.width.rows_len(kv_len)))
            {
                let values = values.chunks_mut(self.width.rows_len(PIECE_TOKENS));
                for (index, values) in values.enumerate() {
                    pieces.push((head, piece(index, kv_len), values));
                }
            }
            let stride = self.width.stride();
            threads::consume(
                args.setting.threads,
                pieces,
                |((batch, head), tokens, values)| {
                    for (token, row) in tokens.zip(values.chunks_mut(stride)) {
                        let row = &mut row[..head_dim];
                        row.iter_mut().for_each(|value| *value = *value * factor);
                        // SAFETY: pieces do not overlap, and each is written by one task.
                        T::narrow(row, unsafe { tensor.row_mut(batch, head, token) });
                    }
                },
            );
        }
    }
}

/// The tokens of a piece.
fn piece(index: usize, len: usize) -> Range<usize> {
    index * PIECE_TOKENS..((index + 1) * PIECE_TOKENS).min(len)
}

/// Queries and output gradients of some query heads, packed, and what is known of each row.
struct Queries<I: Isa> {
    q: Buffer<I::Operand>,
    dout: Buffer<I::Operand>,
    /// lse in base 2.
    lse: Buffer<I::Real>,
    /// Sum of out * dout, less the lse's gradient.
    delta: Buffer<I::Real>,
}

impl<I: Isa> Queries<I> {
    fn new<T: Element<Real = I::Real>>(
        args: &Backward<'_, T>,
        heads: &[(usize, usize)],
        width: Width,
    ) -> Self {
        let [_, _, q_len, head_dim] = args.q.shape();
        let len = width.rows_len(q_len);
        let mut queries = Self {
            q: Buffer::new(heads.len() * len),
            dout: Buffer::new(heads.len() * len),
            lse: Buffer::new(heads.len() * q_len),
            delta: Buffer::new(heads.len() * q_len),
        };
        if q_len == 0 {
            return queries;
        }
        let mut pieces = Vec::new();
        let by_head = queries
            .q
            .chunks_mut(len)
            .zip(queries.dout.chunks_mut(len))
            .zip(
                queries
                    .lse
                    .chunks_mut(q_len)
                    .zip(queries.delta.chunks_mut(q_len)),
            );
        for (&head, ((q, dout), (lse, delta))) in heads.iter().zip(by_head) {
            let by_piece = q
                .chunks_mut(width.rows_len(PIECE_TOKENS))
                .zip(dout.chunks_mut(width.rows_len(PIECE_TOKENS)))
                .zip(
                    lse.chunks_mut(PIECE_TOKENS)
                        .zip(delta.chunks_mut(PIECE_TOKENS)),
                );
            for (index, ((q, dout), (lse, delta))) in by_piece.enumerate() {
                pieces.push((head, piece(index, q_len), (q, dout), (lse, delta)));
            }
        }
        threads::consume(
            args.setting.threads,
            pieces,
            |((batch, head), tokens, packed, facts)| {
                let of = |tensor| Tokens {
                    tensor,
                    batch,
                    head,
                };
                pack::depth_rows::<I, T>(&of(args.q), tokens.clone(), width, packed.0);
                pack::depth_rows::<I, T>(&of(args.dout), tokens.clone(), width, packed.1);
                let mut rows = [(); 2].map(|()| Buffer::new(head_dim));
                for (index, token) in tokens.enumerate() {
                    let [out, dout] = &mut rows;
                    T::widen(args.out.row(batch, head, token), out);
                    T::widen(args.dout.row(batch, head, token), dout);
                    let dot = out
                        .iter()
                        .zip(dout.iter())
                        .fold(I::Real::ZERO, |sum, (&a, &b)| sum + a * b);
                    let dlse = args
                        .dlse
                        .map_or(I::Real::ZERO, |dlse| dlse.row(batch, head, token)[0]);
                    facts.1[index] = dot - dlse;
                    facts.0[index] =
                        args.lse.row(batch, head, token)[0] * I::Real::of(std::f64::consts::LOG2_E);
                }
            },
        );
        queries
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

/// Computes the tiles of one task.
struct Tiles<'a, I: Isa, T: Element> {
    args: &'a Backward<'a, T>,
    width: Width,
    k_transposed: &'a [I::Operand],
    k_rows: &'a [I::Operand],
    v_transposed: &'a [I::Operand],
    q: &'a [I::Operand],
    dout: &'a [I::Operand],
    lse: &'a [I::Real],
    delta: &'a [I::Real],
    value_panels: Vec<usize>,
    /// Scores, then P.
    p: Buffer<I::Real>,
    /// dP, then dS.
    ds: Buffer<I::Real>,
}

impl<'a, I: Isa, T: Element<Real = I::Real>> Tiles<'a, I, T> {
    fn new(
        args: &'a Backward<'_, T>,
        keys: &'a Keys<I>,
        queries: &'a Queries<I>,
        index: usize,
        heads: usize,
    ) -> Self {
        debug_assert_eq!(keys.heads, heads);
        Self {
            args,
            width: keys.width,
            k_transposed: head_slice(&keys.k_transposed, index, heads),
            k_rows: head_slice(&keys.k_rows, index, heads),
            v_transposed: head_slice(&keys.v_transposed, index, heads),
            q: head_slice(&queries.q, index, heads),
            dout: head_slice(&queries.dout, index, heads),
            lse: head_slice(&queries.lse, index, heads),
            delta: head_slice(&queries.delta, index, heads),
            value_panels: keys.width.panels::<I>(),
            p: Buffer::new(TILE_QUERIES * SCORE_STRIDE),
            ds: Buffer::new(TILE_QUERIES * SCORE_STRIDE),
        }
    }

    fn run(&mut self, task: &mut Task<'_, I::Real>) {
        let extents = self.args.plan.layout().extents;
        let first_key = extents.kv_tokens(task.columns.start).start;
        for column in task.columns.clone() {
            let rows = self.args.plan.column(task.head.0, task.head.1, column);
            for keys in tiles::cut(extents.kv_tokens(column), TILE_KEYS) {
                for &row in rows {
                    for queries in tiles::cut(extents.q_tokens(row as usize), TILE_QUERIES) {
                        self.tile(task, first_key, keys.clone(), queries);
                    }
                }
            }
        }
    }

    /// The five products of one tile. `first_key` is the first of the task's stretch.
    fn tile(
        &mut self,
        task: &mut Task<'_, I::Real>,
        first_key: usize,
        keys: Range<usize>,
        queries: Range<usize>,
    ) {
        let stride = self.width.stride();
        let columns = keys.len().next_multiple_of(PANEL);
        let wants_scores = self.args.dq.is_some() || self.args.dk.is_some();

        self.against_keys(self.q, self.k_transposed, &keys, &queries, Target::P);
        if wants_scores {
            self.against_keys(self.dout, self.v_transposed, &keys, &queries, Target::Ds);
        }
        rows::softmax_gradient::<I>(
            Scores {
                values: &mut self.p,
                stride: SCORE_STRIDE,
                rows: queries.len(),
                columns,
                pad: columns - keys.len(),
            },
            &mut self.ds,
            I::Real::of(self.args.setting.scale * std::f64::consts::LOG2_E),
            RowFacts {
                lse: &self.lse[queries.clone()],
                delta: &self.delta[queries.clone()],
            },
        );
        let key_rows = (keys.start - first_key) * stride;
        if self.args.dv.is_some() {
            self.over_queries(
                &self.p,
                self.dout,
                columns,
                &queries,
                &mut task.dv[key_rows..],
            );
        }
        if self.args.dk.is_some() {
            self.over_queries(
                &self.ds,
                self.q,
                columns,
                &queries,
                &mut task.dk[key_rows..],
            );
        }
        if self.args.dq.is_some() {
            // dQ += dS K
            Gemm::<I> {
                rows: queries.len(),
                a: Left {
                    values: rows::as_operands::<I>(&self.ds),
                    stride: SCORE_STRIDE,
                    transposed: false,
                },
                b: self.k_rows,
                b_step: stride,
                panels: &self.value_panels,
                runs: &[Run {
                    start: keys.start * stride,
                    words: columns,
                }],
                c_row: stride,
                accumulate: true,
            }
            .run(&mut task.dq[queries.start * stride..]);
        }
    }

    /// A product of queries' rows with transposed keys: S = Q K^T or dP = dO V^T.
    fn against_keys(
        &mut self,
        a: &[I::Operand],
        b: &[I::Operand],
        keys: &Range<usize>,
        queries: &Range<usize>,
        target: Target,
    ) {
        let panels: Vec<usize> = (keys.start / PANEL..keys.end.div_ceil(PANEL))
            .map(|panel| panel * PANEL * self.width.values())
            .collect();
        let stride = self.width.stride();
        Gemm::<I> {
            rows: queries.len(),
            a: Left {
                values: &a[queries.start * stride..],
                stride,
                transposed: false,
            },
            b,
            b_step: PANEL,
            panels: &panels,
            runs: &[Run {
                start: 0,
                words: self.width.values(),
            }],
            c_row: SCORE_STRIDE,
            accumulate: false,
        }
        .run(match target {
            Target::P => &mut self.p,
            Target::Ds => &mut self.ds,
        });
    }

    /// A product summed over queries: dV += P^T dO or dK += dS^T Q.
    fn over_queries(
        &self,
        tile: &[I::Real],
        b: &[I::Operand],
        columns: usize,
        queries: &Range<usize>,
        to: &mut [I::Real],
    ) {
        let stride = self.width.stride();
        Gemm::<I> {
            rows: columns,
            // Keys lie next to each other, queries a row apart.
            a: Left {
                values: rows::as_operands::<I>(tile),
                stride: SCORE_STRIDE,
                transposed: true,
            },
            b,
            b_step: stride,
            panels: &self.value_panels,
            runs: &[Run {
                start: queries.start * stride,
                words: queries.len(),
            }],
            c_row: stride,
            accumulate: true,
        }
        .run(to);
    }
}

/// Which tile a product goes to.
#[derive(Clone, Copy)]
enum Target {
    P,
    Ds,
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
