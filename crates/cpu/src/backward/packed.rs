//! What the backward pass reads and sums up, head by head: keys and values packed, queries and
//! output gradients packed, gradients of keys and values. In: tensors. Out: operands for the
//! products of `tile`, and at the end dK and dV in their tensors. Called by the driver in `mod`.

use std::ops::Range;

use crate::buffer::Buffer;
use crate::pack::{self, Tokens, Width};
use crate::simd::{Isa, Real};
use crate::{Backward, Element, threads};

/// Tokens that are packed, or written out, by one task.
pub(super) const PIECE_TOKENS: usize = 256;

/// The rows of a head, packed or accumulated: a slice for each head of a wave.
pub(super) fn head_slice<X>(all: &[X], index: usize, heads: usize) -> &[X] {
    let len = all.len() / heads;
    &all[index * len..][..len]
}

/// Keys and values of a wave's heads, packed.
pub(super) struct Keys<I: Isa> {
    pub width: Width,
    pub heads: usize,
    pub k_transposed: Buffer<I::Operand>,
    pub k_rows: Buffer<I::Operand>,
    pub v_transposed: Buffer<I::Operand>,
}

impl<I: Isa> Keys<I> {
    pub fn new<T: Element<Real = I::Real>>(
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
pub(super) struct KeyGradients<I: Isa> {
    pub width: Width,
    pub dk: Buffer<I::Real>,
    pub dv: Buffer<I::Real>,
}

impl<I: Isa> KeyGradients<I> {
    pub fn new<T: Element<Real = I::Real>>(
        args: &Backward<'_, T>,
        heads: usize,
        width: Width,
    ) -> Self {
        let len = heads * width.rows_len(args.k.shape()[2]);
        Self {
            width,
            dk: Buffer::new(len),
            dv: Buffer::new(len),
        }
    }

    /// Writes dK and dV out.
    pub fn write<T: Element<Real = I::Real>>(
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
pub(super) fn piece(index: usize, len: usize) -> Range<usize> {
    index * PIECE_TOKENS..((index + 1) * PIECE_TOKENS).min(len)
}

/// Queries and output gradients of some query heads, packed, and what is known of each row.
pub(super) struct Queries<I: Isa> {
    pub q: Buffer<I::Operand>,
    pub dout: Buffer<I::Operand>,
    /// lse in base 2.
    pub lse: Buffer<I::Real>,
    /// Sum of out * dout, less the lse's gradient.
    pub delta: Buffer<I::Real>,
}

impl<I: Isa> Queries<I> {
    pub fn new<T: Element<Real = I::Real>>(
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
