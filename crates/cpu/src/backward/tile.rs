//! The five products of the backward pass, tile by tile. In: packed heads. Out: sums in the task's
//! dK, dV and dQ. Called by the driver in `mod`, one [`Tiles`] for each task.

use std::ops::Range;

use super::Task;
use super::packed::{Keys, Queries, head_slice};
use crate::buffer::Buffer;
use crate::pack::Width;
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
    pub fn new(
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

    pub fn run(&mut self, task: &mut Task<'_, I::Real>) {
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
