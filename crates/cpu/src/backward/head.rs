//! [`Head`]: the memory in which one head's backward pass works, used again for head after head.
//! In: tensors, packed. Out: operands for the products of `tile`, and at the end the sums dK, dV
//! and dQ written to their tensors. Called by the driver in `mod`, with all heads of a wave, so
//! that threads share the work of few heads as of many.

use std::ops::Range;

use crate::buffer::Buffer;
use crate::pack::{self, Tokens, Width};
use crate::simd::{Isa, Real};
use crate::view::ViewMut;
use crate::{Backward, Element, threads};

/// Tokens that are packed, or written out, by one task.
const PIECE_TOKENS: usize = 256;

/// Which head of a tensor: (batch, head).
pub(super) type Place = (usize, usize);

/// One head of k and v, and one query head that reads it.
pub(super) struct Head<I: Isa> {
    pub packed: Packed<I>,
    pub dk: Buffer<I::Real>,
    pub dv: Buffer<I::Real>,
    /// Summands of dQ, one for each stretch of keys.
    pub dq: Vec<Buffer<I::Real>>,
}

/// What all tasks of a head read.
pub(super) struct Packed<I: Isa> {
    pub width: Width,
    pub k_transposed: Buffer<I::Operand>,
    pub k_rows: Buffer<I::Operand>,
    pub v_transposed: Buffer<I::Operand>,
    pub q: Buffer<I::Operand>,
    pub dout: Buffer<I::Operand>,
    /// Each query's lse in base 2.
    pub lse: Buffer<I::Real>,
    /// Each query's sum of out * dout, less its lse's gradient.
    pub delta: Buffer<I::Real>,
}

impl<I: Isa> Head<I> {
    /// Bytes of a head with `parts` summands of dQ, about.
    pub fn bytes<T: Element<Real = I::Real>>(
        args: &Backward<'_, T>,
        width: Width,
        parts: usize,
    ) -> usize {
        let tokens = args.q.shape()[2].max(args.k.shape()[2]);
        size_of::<I::Real>() * width.rows_len(tokens) * (7 + parts)
    }

    pub fn new<T: Element<Real = I::Real>>(
        args: &Backward<'_, T>,
        width: Width,
        parts: usize,
    ) -> Self {
        let (q_len, kv_len) = (args.q.shape()[2], args.k.shape()[2]);
        let packed = Packed {
            width,
            k_transposed: Buffer::new(width.transposed_len(kv_len)),
            k_rows: Buffer::new(width.rows_len(kv_len)),
            v_transposed: Buffer::new(width.transposed_len(kv_len)),
            q: Buffer::new(width.rows_len(q_len)),
            dout: Buffer::new(width.rows_len(q_len)),
            lse: Buffer::new(q_len),
            delta: Buffer::new(q_len),
        };
        Self {
            packed,
            dk: Buffer::new(width.rows_len(kv_len)),
            dv: Buffer::new(width.rows_len(kv_len)),
            dq: (0..parts)
                .map(|_| Buffer::new(width.rows_len(q_len)))
                .collect(),
        }
    }
}

/// Packs keys and values; dK and dV become 0.
pub(super) fn take_keys<I: Isa, T: Element<Real = I::Real>>(
    args: &Backward<'_, T>,
    wave: &[Place],
    heads: &mut [Head<I>],
) {
    let kv_len = args.k.shape()[2];
    let mut pieces = Vec::new();
    for (&place, head) in wave.iter().zip(heads) {
        let keys = &mut head.packed;
        let width = keys.width;
        let (panels, rows) = (
            width.transposed_len(PIECE_TOKENS),
            width.rows_len(PIECE_TOKENS),
        );
        let packed = keys
            .k_transposed
            .chunks_mut(panels)
            .zip(keys.k_rows.chunks_mut(rows))
            .zip(keys.v_transposed.chunks_mut(panels));
        let sums = head.dk.chunks_mut(rows).zip(head.dv.chunks_mut(rows));
        for (index, (packed, sums)) in packed.zip(sums).enumerate() {
            pieces.push((place, piece(index, kv_len), width, packed, sums));
        }
    }
    threads::consume(args.setting.threads, pieces, |piece| {
        let ((batch, head), tokens, width, ((k_transposed, k_rows), v_transposed), (dk, dv)) =
            piece;
        let of = |tensor| Tokens {
            tensor,
            batch,
            head,
        };
        pack::transposed::<I, T>(&of(args.k), tokens.clone(), width, k_transposed);
        pack::depth_rows::<I, T>(&of(args.k), tokens.clone(), width, k_rows);
        pack::transposed::<I, T>(&of(args.v), tokens, width, v_transposed);
        dk.fill(I::Real::ZERO);
        dv.fill(I::Real::ZERO);
    });
}

/// Packs queries and output gradients, and gathers what is known of each query; dQ becomes 0.
pub(super) fn take_queries<I: Isa, T: Element<Real = I::Real>>(
    args: &Backward<'_, T>,
    wave: &[Place],
    heads: &mut [Head<I>],
) {
    let q_len = args.q.shape()[2];
    let (mut pieces, mut sums) = (Vec::new(), Vec::new());
    for (&place, head) in wave.iter().zip(heads) {
        let queries = &mut head.packed;
        let width = queries.width;
        let rows = width.rows_len(PIECE_TOKENS);
        let packed = queries
            .q
            .chunks_mut(rows)
            .zip(queries.dout.chunks_mut(rows));
        let facts = queries
            .lse
            .chunks_mut(PIECE_TOKENS)
            .zip(queries.delta.chunks_mut(PIECE_TOKENS));
        for (index, (packed, facts)) in packed.zip(facts).enumerate() {
            pieces.push((place, piece(index, q_len), width, packed, facts));
        }
        sums.extend(head.dq.iter_mut().flat_map(|dq| dq.chunks_mut(rows)));
    }
    threads::consume(args.setting.threads, sums, |dq| dq.fill(I::Real::ZERO));
    threads::consume(args.setting.threads, pieces, |piece| {
        let ((batch, head), tokens, width, (q, dout), (lse, delta)) = piece;
        let of = |tensor| Tokens {
            tensor,
            batch,
            head,
        };
        pack::depth_rows::<I, T>(&of(args.q), tokens.clone(), width, q);
        pack::depth_rows::<I, T>(&of(args.dout), tokens.clone(), width, dout);
        let mut wide = [(); 2].map(|()| vec![I::Real::ZERO; args.out.shape()[3]]);
        for ((token, lse), delta) in tokens.zip(lse).zip(delta) {
            let [out, dout] = &mut wide;
            T::widen(args.out.row(batch, head, token), out);
            T::widen(args.dout.row(batch, head, token), dout);
            let dot = out
                .iter()
                .zip(dout)
                .fold(I::Real::ZERO, |sum, (&a, &mut b)| sum + a * b);
            let dlse = args
                .dlse
                .map_or(I::Real::ZERO, |dlse| dlse.row(batch, head, token)[0]);
            *delta = dot - dlse;
            *lse = args.lse.row(batch, head, token)[0] * I::Real::of(std::f64::consts::LOG2_E);
        }
    });
}

/// Writes dK and dV out.
pub(super) fn give_keys<I: Isa, T: Element<Real = I::Real>>(
    args: &Backward<'_, T>,
    wave: &[Place],
    heads: &[Head<I>],
) {
    let scale = I::Real::of(args.setting.scale);
    let outputs = [(&args.dk, scale), (&args.dv, I::Real::of(1.0))];
    for (which, (tensor, factor)) in outputs.into_iter().enumerate() {
        let Some(tensor) = tensor else { continue };
        let mut pieces = Vec::new();
        for (&place, head) in wave.iter().zip(heads) {
            let sum = if which == 0 { &head.dk } else { &head.dv };
            pieces.extend(write_pieces(place, tensor, std::slice::from_ref(sum)));
        }
        write::<I, T>(args, tensor, pieces, (heads[0].packed.width, factor));
    }
}

/// Adds up the summands of dQ, in order, and writes it out.
pub(super) fn give_queries<I: Isa, T: Element<Real = I::Real>>(
    args: &Backward<'_, T>,
    wave: &[Place],
    heads: &[Head<I>],
) {
    let Some(tensor) = &args.dq else { return };
    let pieces = wave
        .iter()
        .zip(heads)
        .flat_map(|(&place, head)| write_pieces(place, tensor, &head.dq))
        .collect();
    let scale = I::Real::of(args.setting.scale);
    write::<I, T>(args, tensor, pieces, (heads[0].packed.width, scale));
}

/// The tokens of a piece.
fn piece(index: usize, len: usize) -> Range<usize> {
    index * PIECE_TOKENS..((index + 1) * PIECE_TOKENS).min(len)
}

/// A piece of one head to be written, and the summands of its values.
type WritePiece<'a, R> = (Place, Range<usize>, &'a [Buffer<R>]);

fn write_pieces<'a, T, R>(
    place: Place,
    tensor: &ViewMut<'_, T>,
    summands: &'a [Buffer<R>],
) -> impl Iterator<Item = WritePiece<'a, R>> + use<'a, T, R> {
    let len = tensor.shape()[2];
    (0..len.div_ceil(PIECE_TOKENS)).map(move |index| (place, piece(index, len), summands))
}

/// Writes `factor` times the sum of each piece's summands.
fn write<I: Isa, T: Element<Real = I::Real>>(
    args: &Backward<'_, T>,
    tensor: &ViewMut<'_, T>,
    pieces: Vec<WritePiece<'_, I::Real>>,
    (width, factor): (Width, I::Real),
) {
    let head_dim = tensor.shape()[3];
    threads::consume(
        args.setting.threads,
        pieces,
        |((batch, head), tokens, summands)| {
            let mut sum = vec![I::Real::ZERO; head_dim];
            for token in tokens {
                sum.fill(I::Real::ZERO);
                for summand in summands {
                    let row = &summand[token * width.stride()..][..head_dim];
                    sum.iter_mut()
                        .zip(row)
                        .for_each(|(sum, &value)| *sum += value * factor);
                }
                // SAFETY: pieces do not overlap, and each is written by one task.
                T::narrow(&sum, unsafe { tensor.row_mut(batch, head, token) });
            }
        },
    );
}
