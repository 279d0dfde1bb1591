//! [`Tensor`]: values by (batch, head, token, column), and how they lie in memory.
//!
//! In: sizes and values in float64. Out: 16-bit values in emulated memory, and the kernels' view of
//! them.

use flex_block_attn::{bf16, f16};
use flex_block_attn_emulator::Memory;
use flex_block_attn_kernels::{Strides, forward};
use flex_block_attn_ptx::Element;

use super::normal;

/// How a (batch, heads, tokens, head_dim) tensor lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    /// Whether tokens come before heads.
    pub tokens_first: bool,
    /// Elements behind each row that are not its own: NaN. A multiple of 8.
    pub gap: usize,
}

/// A tensor of bfloat16 or float16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tensor {
    pub(super) element: Element,
    /// Batch, heads, tokens, head_dim.
    pub(super) shape: [usize; 4],
    pub(super) layout: Layout,
}

impl Tensor {
    /// Elements, those between rows not counted.
    pub(super) fn count(self) -> usize {
        self.shape.iter().product()
    }

    /// Numbers by chance for its elements, which can hold them.
    pub(super) fn normal(self, seed: u64) -> Vec<f64> {
        let values = normal(seed, self.count());
        values
            .into_iter()
            .map(|x| rounded(self.element, x))
            .collect()
    }

    /// Elements from one batch, head and token to the next.
    fn strides(self) -> [usize; 3] {
        let [_, heads, tokens, head_dim] = self.shape;
        let row = head_dim + self.layout.gap;
        if self.layout.tokens_first {
            [tokens * heads * row, row, heads * row]
        } else {
            [heads * tokens * row, tokens * row, row]
        }
    }

    /// Values in order, as they lie in memory.
    pub(super) fn stored(self, values: &[f64]) -> Vec<f64> {
        let [batch, heads, tokens, head_dim] = self.shape;
        let [of_batch, of_head, of_token] = self.strides();
        let mut stored = vec![f64::NAN; batch * of_batch];
        for (at, row) in values.chunks_exact(head_dim).enumerate() {
            let (token, line) = (at % tokens, at / tokens);
            let start = line / heads * of_batch + line % heads * of_head + token * of_token;
            stored[start..start + head_dim].copy_from_slice(row);
        }
        stored
    }

    /// Allocates it with values, given in order.
    pub(super) fn put(self, memory: &mut Memory, name: &str, values: &[f64]) -> forward::Tensor {
        let bits: Vec<u16> = self
            .stored(values)
            .into_iter()
            .map(|x| match self.element {
                Element::F16 => f16::from_f64(x).to_bits(),
                _ => bf16::from_f64(x).to_bits(),
            })
            .collect();
        self.at(memory.alloc_with(name, &bits))
    }

    /// Allocates it, to be written.
    pub(super) fn alloc(self, memory: &mut Memory, name: &str) -> forward::Tensor {
        self.at(memory.alloc(name, 2 * self.shape[0] * self.strides()[0]))
    }

    fn at(self, address: u64) -> forward::Tensor {
        let [batch, head, row] = self.strides().map(|stride| stride as u64);
        forward::Tensor {
            address,
            strides: Strides { row, head, batch },
        }
    }
}

/// What an element holds of a number.
pub(super) fn rounded(element: Element, x: f64) -> f64 {
    match element {
        Element::F16 => f16::from_f64(x).to_f64(),
        _ => bf16::from_f64(x).to_f64(),
    }
}
