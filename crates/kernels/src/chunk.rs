//! Rows of 16-bit floats in chunks of 16 bytes, as plain loads bring them: which lane of a warp has
//! which chunk, where a head's rows lie, and a chunk's floats. Used by the kernels that stream
//! whole tensors once.

use flex_block_attn_ptx::{Arg, Builder, Element, Reg};

use crate::forward::Tensor;
use crate::gemm::pair;

/// Floats of a chunk.
pub(crate) const CHUNK: u32 = 8;

/// How a warp's lanes share rows: a row's chunks are in neighbouring lanes.
#[derive(Clone, Copy)]
pub(crate) struct Lanes {
    /// Chunks of a row.
    pub(crate) chunks: u32,
    /// Lanes that a row takes: a power of two, so some may have no chunk.
    pub(crate) each: u32,
    /// Rows that a warp has at a time.
    pub(crate) rows: u32,
}

impl Lanes {
    /// For rows of `head_dim` floats.
    pub(crate) fn new(head_dim: u32) -> Self {
        assert!(
            head_dim.is_multiple_of(CHUNK) && (32..=256).contains(&head_dim),
            "rows of {head_dim}"
        );
        let chunks = head_dim / CHUNK;
        let each = chunks.next_power_of_two();
        let rows = 32 / each;
        Self { chunks, each, rows }
    }

    /// The sum over a row's lanes, in all of them.
    pub(crate) fn sum(self, own: Reg<'_, f32>) -> Reg<'_, f32> {
        distances(1, self.each).fold(own, |sum, distance| sum + sum.butterfly(distance))
    }

    /// The sum over lanes that have the same chunk of different rows, in all of them.
    pub(crate) fn sum_rows(self, own: Reg<'_, f32>) -> Reg<'_, f32> {
        distances(self.each, 32).fold(own, |sum, distance| sum + sum.butterfly(distance))
    }
}

/// Powers of two from `first` up to `end`, which is not among them.
fn distances(first: u32, end: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(first), |distance| Some(2 * distance))
        .take_while(move |&distance| distance < end)
}

/// A tensor, of whose heads a kernel reads or writes the rows.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'k> {
    address: Reg<'k, u64>,
    /// Bytes from one row, head and batch to the next.
    row: Reg<'k, u64>,
    head: Reg<'k, u64>,
    batch: Reg<'k, u64>,
}

impl<'k> Heads<'k> {
    /// Declares the parameters of [`args`].
    pub(crate) fn new(k: &'k Builder, name: &str) -> Self {
        let address = k.param(name);
        let stride = |of: &str| k.param(&format!("{name}_{of}_stride"));
        let (row, head, batch) = (stride("row"), stride("head"), stride("batch"));
        Self {
            address,
            row,
            head,
            batch,
        }
    }

    /// Those at an address, of which rows, heads and batches are so many bytes apart.
    pub(crate) fn at(address: Reg<'k, u64>, bytes: [u64; 3]) -> Self {
        let [row, head, batch] = bytes.map(|bytes| address.builder().var(bytes));
        Self {
            address,
            row,
            head,
            batch,
        }
    }

    /// Those of `then` where `cond` holds, else these.
    pub(crate) fn or(self, cond: Reg<'k, bool>, then: Self) -> Self {
        let pick = |then: Reg<'k, u64>, otherwise: Reg<'k, u64>| cond.select(then, otherwise);
        Self {
            address: pick(then.address, self.address),
            row: pick(then.row, self.row),
            head: pick(then.head, self.head),
            batch: pick(then.batch, self.batch),
        }
    }

    /// The rows of a head, in a batch.
    pub(crate) fn rows(self, head: Reg<'k, u32>, batch: Reg<'k, u32>) -> Rows<'k> {
        Rows {
            first: self.address + head.to_u64() * self.head + batch.to_u64() * self.batch,
            stride: self.row,
        }
    }
}

/// The rows of a head, in a batch.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'k> {
    /// Address of the first.
    pub(crate) first: Reg<'k, u64>,
    /// Bytes from one to the next.
    pub(crate) stride: Reg<'k, u64>,
}

impl<'k> Rows<'k> {
    /// Declares the parameters of [`args`]: the rows of this thread block's head, in its batch, `cta_y` and
    /// `cta_z`.
    pub(crate) fn new(k: &'k Builder, name: &str) -> Self {
        Heads::new(k, name).rows(k.cta_y(), k.cta_z())
    }

    /// Those of `then` where `cond` holds, else these.
    pub(crate) fn or(self, cond: Reg<'k, bool>, then: Self) -> Self {
        Self {
            first: cond.select(then.first, self.first),
            stride: cond.select(then.stride, self.stride),
        }
    }

    /// Address of row `row`.
    pub(crate) fn row(self, row: Reg<'k, u32>) -> Reg<'k, u64> {
        self.first + row.to_u64() * self.stride
    }

    /// Address of chunk `chunk` of row `row`.
    pub(crate) fn chunk(self, row: Reg<'k, u32>, chunk: Reg<'k, u32>) -> Reg<'k, u64> {
        self.row(row) + chunk.times_wide(2 * CHUNK)
    }
}

/// The arguments for [`Heads::new`] and [`Rows::new`]: the address, then bytes from one row, head and
/// batch to the next.
///
/// # Panics
/// If a row does not start at a multiple of 16 bytes.
pub(crate) fn args(tensor: Tensor) -> [Arg; 4] {
    let Tensor { address, strides } = tensor;
    let bytes = [strides.row, strides.head, strides.batch].map(|stride| 2 * stride);
    let aligned = |bytes: u64| bytes.is_multiple_of(16);
    assert!(
        aligned(address) && bytes.into_iter().all(aligned),
        "{tensor:?}"
    );
    let [row, head, batch] = bytes;
    [address, row, head, batch].map(Arg::U64)
}

/// A number as an element holds it.
pub(crate) fn rounded(x: Reg<'_, f32>, element: Element) -> Reg<'_, f32> {
    let word = x.pack(0.0, pair(element));
    match element {
        Element::F16 => word.f16_pair()[0],
        _ => word.low_bf16(),
    }
}

/// A chunk's floats.
pub(crate) fn floats<'k>(words: [Reg<'k, u32>; 4], element: Element) -> [Reg<'k, f32>; 8] {
    let pairs = words.map(|word| match element {
        Element::F16 => word.f16_pair(),
        _ => [word.low_bf16(), word.high_bf16()],
    });
    std::array::from_fn(|i| pairs[i / 2][i % 2])
}

/// A chunk of floats, rounded.
pub(crate) fn packed<'k>(floats: [Reg<'k, f32>; 8], element: Element) -> [Reg<'k, u32>; 4] {
    [0, 2, 4, 6].map(|i| floats[i].pack(floats[i + 1], pair(element)))
}
