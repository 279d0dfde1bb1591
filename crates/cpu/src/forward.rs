//! The forward pass. In: q, k, v and a plan. Out: the output and the lse.
//!
//! FlashAttention's online softmax (arXiv 2205.14135, algorithm 1) over the key blocks that the
//! plan keeps. The heads of k and v are packed in waves, as many at once as a memory budget
//! allows; then every tile of queries is a task of its own, longest rows first.

use flex_block_attn_mask::expression::Evaluator;

use crate::buffer::Buffer;
use crate::pack::{self, Tokens, Width};
use crate::simd::exact::{self, Hidden};
use crate::simd::gemm::{Gemm, Left, Run};
use crate::simd::rows::{self, Running, Scores};
use crate::simd::{Isa, Job, PANEL, Real};
use crate::tiles::{self, KeyTile, KeyTiles};
use crate::{Element, Forward, threads};

/// Queries of a tile at most. With [`TILE_KEYS`], chosen by measurement: scores, output, queries
/// and a stretch of k and v are together about 400 KB at head_dim 128, inside a second-level cache.
const TILE_QUERIES: usize = 128;
/// Keys of a tile at most.
const TILE_KEYS: usize = 128;
/// Tokens that are packed by one task.
const PACK_TOKENS: usize = 256;
/// Packed heads of k and v take about this many bytes at a time (one head at least).
const WAVE_BYTES: usize = 512 << 20;

pub(crate) fn forward<T: Element>(args: &Forward<'_, T>) {
    T::run_products(ForwardJob(args));
}

struct ForwardJob<'a, 'b, T: Element>(&'a Forward<'b, T>);

impl<T: Element> Job<T::Real> for ForwardJob<'_, '_, T> {
    fn run<I: Isa<Real = T::Real>>(self) {
        let args = self.0;
        let [batch, kv_heads, kv_len, head_dim] = args.k.shape();
        let width = Width::of(head_dim);
        let head_bytes =
            size_of::<I::Operand>() * (width.transposed_len(kv_len) + width.rows_len(kv_len));
        let heads: Vec<(usize, usize)> = (0..batch)
            .flat_map(|b| (0..kv_heads).map(move |h| (b, h)))
            .collect();
        for wave in heads.chunks((WAVE_BYTES / head_bytes.max(1)).max(1)) {
            let packed = PackedWave::<I>::new(args, wave, width);
            let tasks = tasks(args, wave);
            threads::for_each(
                args.setting.threads,
                tasks.len(),
                || Scratch::<I>::new(width, exact::evaluator(args.plan)),
                |scratch, index| {
                    let task = &tasks[index];
                    attend(args, task, packed.head(task.packed), scratch);
                },
            );
        }
    }
}

/// Keys and values of some heads, packed.
struct PackedWave<I: Isa> {
    k: Buffer<I::Operand>,
    v: Buffer<I::Operand>,
    k_len: usize,
    v_len: usize,
}

/// Keys, transposed, and values, in rows, of one head.
#[derive(Clone, Copy)]
struct PackedHead<'a, I: Isa> {
    k: &'a [I::Operand],
    v: &'a [I::Operand],
}

impl<I: Isa> PackedWave<I> {
    fn new<T: Element<Real = I::Real>>(
        args: &Forward<'_, T>,
        wave: &[(usize, usize)],
        width: Width,
    ) -> Self {
        let kv_len = args.k.shape()[2];
        let (k_len, v_len) = (width.transposed_len(kv_len), width.rows_len(kv_len));
        let mut packed = Self {
            k: Buffer::new(wave.len() * k_len),
            v: Buffer::new(wave.len() * v_len),
            k_len,
            v_len,
        };
        if k_len == 0 {
            return packed;
        }
        // (head, first token, where its operands go), for `PACK_TOKENS` tokens each.
        let mut pieces = Vec::new();
        let by_head = packed.k.chunks_mut(k_len).zip(packed.v.chunks_mut(v_len));
        for (&head, (k, v)) in wave.iter().zip(by_head) {
            let k = k.chunks_mut(width.transposed_len(PACK_TOKENS));
            let v = v.chunks_mut(width.rows_len(PACK_TOKENS));
            for (index, (k, v)) in k.zip(v).enumerate() {
                pieces.push((head, index * PACK_TOKENS, k, v));
            }
        }
        threads::consume(
            args.setting.threads,
            pieces,
            |((batch, head), first, k, v)| {
                let tokens = first..(first + PACK_TOKENS).min(kv_len);
                let of = |tensor| Tokens {
                    tensor,
                    batch,
                    head,
                };
                pack::transposed::<I, T>(&of(args.k), tokens.clone(), width, k);
                pack::depth_rows::<I, T>(&of(args.v), tokens, width, v);
            },
        );
        packed
    }

    fn head(&self, index: usize) -> PackedHead<'_, I> {
        PackedHead {
            k: &self.k[index * self.k_len..][..self.k_len],
            v: &self.v[index * self.v_len..][..self.v_len],
        }
    }
}

/// A tile of queries, and the key blocks that it reads.
struct Task<'a> {
    batch: usize,
    q_head: usize,
    queries: std::ops::Range<usize>,
    list: &'a [i32],
    /// Which of the wave's packed heads.
    packed: usize,
}

/// The tiles of all query heads that read the wave's heads, those with most keys first.
fn tasks<'a, T: Element>(args: &'a Forward<'_, T>, wave: &[(usize, usize)]) -> Vec<Task<'a>> {
    let extents = args.plan.layout().extents;
    let group = args.q.shape()[1] / args.k.shape()[1];
    let mut tasks = Vec::new();
    for (packed, &(batch, kv_head)) in wave.iter().enumerate() {
        for q_head in kv_head * group..(kv_head + 1) * group {
            for row in 0..extents.q_blocks() {
                let list = args.plan.row(batch, q_head, row);
                for queries in tiles::cut(extents.q_tokens(row), TILE_QUERIES) {
                    tasks.push(Task {
                        batch,
                        q_head,
                        queries,
                        list,
                        packed,
                    });
                }
            }
        }
    }
    // Stable: tiles of one head stay together, and with them its keys in the cache.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.list.len() * task.queries.len()));
    tasks
}

/// What a thread works in.
struct Scratch<'a, I: Isa> {
    width: Width,
    /// Where the panels of a token's values start.
    value_panels: Vec<usize>,
    queries: Buffer<I::Operand>,
    /// Scores, then probabilities.
    scores: Buffer<I::Real>,
    out: Buffer<I::Real>,
    max: Buffer<I::Real>,
    sum: Buffer<I::Real>,
    key_panels: Vec<usize>,
    value_runs: Vec<Run>,
    keys: KeyTile,
    /// Of a mask with an expression.
    evaluator: Option<Evaluator<'a>>,
}

/// Rows of scores lie a panel further apart than they are long, as packed tokens do.
const SCORE_STRIDE: usize = TILE_KEYS + PANEL;

impl<'a, I: Isa> Scratch<'a, I> {
    fn new(width: Width, evaluator: Option<Evaluator<'a>>) -> Self {
        Self {
            width,
            value_panels: width.panels::<I>(),
            queries: Buffer::new(width.rows_len(TILE_QUERIES)),
            scores: Buffer::new(TILE_QUERIES * SCORE_STRIDE),
            out: Buffer::new(width.rows_len(TILE_QUERIES)),
            max: Buffer::new(TILE_QUERIES),
            sum: Buffer::new(TILE_QUERIES),
            key_panels: Vec::new(),
            value_runs: Vec::new(),
            keys: KeyTile::default(),
            evaluator,
        }
    }

    /// Where the products find the keys and values of `self.keys`.
    fn locate_keys(&mut self) {
        self.key_panels.clear();
        self.value_runs.clear();
        for panels in &self.keys.panels {
            self.key_panels.extend(
                panels
                    .clone()
                    .map(|panel| panel * PANEL * self.width.values()),
            );
            self.value_runs.push(Run {
                start: panels.start * PANEL * self.width.stride(),
                words: panels.len() * PANEL / I::DEPTH,
            });
        }
    }
}

/// Computes one tile of queries from start to end.
fn attend<I: Isa, T: Element<Real = I::Real>>(
    args: &Forward<'_, T>,
    task: &Task<'_>,
    packed: PackedHead<'_, I>,
    scratch: &mut Scratch<'_, I>,
) {
    let rows = task.queries.len();
    let width = scratch.width;
    // The softmax asks for a positive scale: a negative one's sign goes to q, and 0 (all keys
    // weigh the same) is as good as a number too small to show.
    let sign = I::Real::of(1f64.copysign(args.setting.scale));
    let scale = (args.setting.scale.abs() * std::f64::consts::LOG2_E).max(1e-30);
    let scale = I::Real::of(scale);
    let q = Tokens {
        tensor: args.q,
        batch: task.batch,
        head: task.q_head,
    };
    pack::row_major::<I, T>(&q, task.queries.clone(), width, sign, &mut scratch.queries);
    scratch.max[..rows].fill(I::Real::NEG_INFINITY);
    scratch.sum[..rows].fill(I::Real::ZERO);
    scratch.out[..rows * width.stride()].fill(I::Real::ZERO);

    let mut tiles = KeyTiles::new(task.list, args.plan.layout().extents, TILE_KEYS);
    while tiles.next_into(&mut scratch.keys) {
        scratch.locate_keys();
        // S = Q K^T
        Gemm::<I> {
            rows,
            a: Left {
                values: &scratch.queries,
                stride: width.stride(),
                transposed: false,
            },
            b: packed.k,
            b_step: PANEL * I::DEPTH,
            panels: &scratch.key_panels,
            runs: &[Run {
                start: 0,
                words: width.values() / I::DEPTH,
            }],
            c_row: SCORE_STRIDE,
            accumulate: false,
        }
        .run(&mut scratch.scores);
        if let Some(evaluator) = &mut scratch.evaluator {
            for (columns, first_key) in scratch.keys.partial.iter().cloned() {
                let hidden = Hidden {
                    batch: task.batch,
                    head: task.q_head,
                    queries: task.queries.clone(),
                    keys: first_key..first_key + columns.len(),
                    columns,
                    stride: SCORE_STRIDE,
                };
                let scores = [&mut scratch.scores[..]];
                exact::hide::<I, 1>(evaluator, &hidden, scores, I::Real::NEG_INFINITY);
            }
        }
        rows::softmax::<I>(
            Scores {
                values: &mut scratch.scores,
                stride: SCORE_STRIDE,
                rows,
                columns: scratch.keys.columns,
                pad: scratch.keys.pad,
            },
            scale,
            Running {
                max: &mut scratch.max,
                sum: &mut scratch.sum,
                out: &mut scratch.out,
                out_stride: width.stride(),
            },
        );
        // O += P V
        Gemm::<I> {
            rows,
            a: Left {
                values: rows::as_operands::<I>(&scratch.scores),
                stride: rows::operand_stride::<I>(SCORE_STRIDE),
                transposed: false,
            },
            b: packed.v,
            b_step: width.stride() * I::DEPTH,
            panels: &scratch.value_panels,
            runs: &scratch.value_runs,
            c_row: width.stride(),
            accumulate: true,
        }
        .run(&mut scratch.out);
    }
    write(args, task, scratch);
}

/// Divides by the sums, and writes output and lse. Rows without a key get 0 and -inf.
fn write<I: Isa, T: Element<Real = I::Real>>(
    args: &Forward<'_, T>,
    task: &Task<'_>,
    scratch: &mut Scratch<'_, I>,
) {
    let head_dim = args.q.shape()[3];
    for (r, query) in task.queries.clone().enumerate() {
        let out = &mut scratch.out[r * scratch.width.stride()..][..head_dim];
        let (max, sum) = (scratch.max[r], scratch.sum[r]);
        // No key was seen, or none that counts.
        let lse = if max == I::Real::NEG_INFINITY {
            I::Real::NEG_INFINITY
        } else {
            let share = sum.recip();
            out.iter_mut().for_each(|value| *value = *value * share);
            max * I::Real::of(std::f64::consts::LN_2) + sum.ln()
        };
        // SAFETY: each task has tokens of its own (heads and tiles do not overlap), and only it
        // writes their rows.
        let (out_row, lse_row) = unsafe {
            (
                args.out.row_mut(task.batch, task.q_head, query),
                args.lse.row_mut(task.batch, task.q_head, query),
            )
        };
        T::narrow(out, out_row);
        lse_row[0] = lse;
    }
}
