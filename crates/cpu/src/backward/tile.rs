//! The five products of the backward pass, tile by tile. In: packed heads. Out: sums in the task's
//! dK, dV and dQ. Called by the driver in `mod`, one [`Tiles`] for each task.

use std::ops::Range;

use flex_block_attn_mask::expression::Evaluator;
use flex_block_attn_mask::{block_of, is_partial};

use super::Task;
use crate::buffer::Buffer;
use crate::simd::exact::{self, Hidden};
use crate::simd::gemm::{Gemm, Left, Run};
use crate::simd::rows::{self, RowFacts, Scores};
use crate::simd::{Isa, PANEL, Real};
use crate::{Backward, Element, tiles};

/// Queries of a tile at most; with [`TILE_KEYS`], a tile's operands fit a second-level cache.
const TILE_QUERIES: usize = 128;
/// Keys of a tile at most.
const TILE_KEYS: usize = 128;
/// Rows of scores lie a panel further apart than they are long, as packed tokens do.
const SCORE_STRIDE: usize = TILE_KEYS + PANEL;

/// Computes the tiles of one task.
pub(super) struct Tiles<'a, I: Isa, T: Element> {
    args: &'a Backward<'a, T>,
    task: Task<'a, I>,
    /// Where each panel of a token's values starts.
    value_panels: Vec<usize>,
    /// Scores, then P.
    p: Buffer<I::Real>,
    /// dP, then dS.
    ds: Buffer<I::Real>,
    /// Of a mask with an expression.
    evaluator: Option<Evaluator<'a>>,
}

impl<'a, I: Isa, T: Element<Real = I::Real>> Tiles<'a, I, T> {
    pub fn new(args: &'a Backward<'a, T>, task: Task<'a, I>) -> Self {
        Self {
            args,
            value_panels: task.packed.width.panels::<I>(),
            task,
            p: Buffer::new(TILE_QUERIES * SCORE_STRIDE),
            ds: Buffer::new(TILE_QUERIES * SCORE_STRIDE),
            evaluator: exact::evaluator(args.plan),
        }
    }

    pub fn run(&mut self) {
        let extents = self.args.plan.layout().extents;
        let (batch, head) = self.task.place;
        for column in self.task.columns.clone() {
            let rows = self.args.plan.column(batch, head, column);
            for keys in tiles::cut(extents.kv_tokens(column), TILE_KEYS) {
                for &row in rows {
                    for queries in tiles::cut(extents.q_tokens(block_of(row)), TILE_QUERIES) {
                        self.tile(keys.clone(), queries, is_partial(row));
                    }
                }
            }
        }
    }

    /// The five products of one tile.
    fn tile(&mut self, keys: Range<usize>, queries: Range<usize>, is_partial: bool) {
        let packed = self.task.packed;
        let stride = packed.width.stride();
        let columns = keys.len().next_multiple_of(PANEL);
        let wants_scores = self.args.dq.is_some() || self.args.dk.is_some();

        self.against_keys(&packed.q, &packed.k_transposed, &keys, &queries, Target::P);
        if wants_scores {
            self.against_keys(
                &packed.dout,
                &packed.v_transposed,
                &keys,
                &queries,
                Target::Ds,
            );
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
                lse: &packed.lse[queries.clone()],
                delta: &packed.delta[queries.clone()],
            },
        );
        if let (true, Some(evaluator)) = (is_partial, &mut self.evaluator) {
            let (batch, head) = self.task.place;
            let hidden = Hidden {
                batch,
                head,
                queries: queries.clone(),
                keys: keys.clone(),
                columns: 0..keys.len(),
                stride: SCORE_STRIDE,
            };
            // P and dS, not the scores: of a row of which nothing counts, the lse is -inf.
            let tiles = [&mut self.p[..], &mut self.ds[..]];
            exact::hide::<I, 2>(evaluator, &hidden, tiles, I::Real::ZERO);
        }
        // dK and dV are those of the task's stretch alone.
        let first_key = self.task.columns.start * self.args.plan.layout().extents.kv_block();
        let key_rows = (keys.start - first_key) * stride;
        let over = |operands, tokens| TokenRows::<I> {
            operands,
            tokens,
            stride,
            panels: &self.value_panels,
        };
        // In a tile, keys lie next to each other, and queries a row apart.
        let left = |tile, transposed| Left::<I> {
            values: rows::as_operands::<I>(tile),
            stride: SCORE_STRIDE,
            transposed,
        };
        if self.args.dv.is_some() {
            let dout = over(&packed.dout, queries.clone());
            add_product(
                columns,
                left(&self.p, true),
                dout,
                &mut self.task.dv[key_rows..],
            );
        }
        if self.args.dk.is_some() {
            let q = over(&packed.q, queries.clone());
            add_product(
                columns,
                left(&self.ds, true),
                q,
                &mut self.task.dk[key_rows..],
            );
        }
        if self.args.dq.is_some() {
            let k = over(&packed.k_rows, keys.start..keys.start + columns);
            let dq = &mut self.task.dq[queries.start * stride..];
            add_product(queries.len(), left(&self.ds, false), k, dq);
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
            .map(|panel| panel * PANEL * self.task.packed.width.values())
            .collect();
        let stride = self.task.packed.width.stride();
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
                words: self.task.packed.width.values(),
            }],
            c_row: SCORE_STRIDE,
            accumulate: false,
        }
        .run(match target {
            Target::P => &mut self.p,
            Target::Ds => &mut self.ds,
        });
    }
}

/// Packed tokens in rows, to be summed over.
struct TokenRows<'a, I: Isa> {
    operands: &'a [I::Operand],
    tokens: Range<usize>,
    stride: usize,
    /// Where each panel of a token's values starts.
    panels: &'a [usize],
}

/// A product summed over tokens: dV += P^T dO, dK += dS^T Q, dQ += dS K.
fn add_product<I: Isa>(rows: usize, a: Left<'_, I>, b: TokenRows<'_, I>, to: &mut [I::Real]) {
    Gemm::<I> {
        rows,
        a,
        b: b.operands,
        b_step: b.stride,
        panels: b.panels,
        runs: &[Run {
            start: b.tokens.start * b.stride,
            words: b.tokens.len(),
        }],
        c_row: b.stride,
        accumulate: true,
    }
    .run(to);
}

/// Which tile a product goes to.
#[derive(Clone, Copy)]
enum Target {
    P,
    Ds,
}
