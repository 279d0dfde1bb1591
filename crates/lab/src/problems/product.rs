//! [`Product`]: the matrix product, against sums in float64.

use flex_block_attn_emulator::Memory;
use flex_block_attn_kernels::gemm;
use flex_block_attn_ptx::Element;

use super::tensor::{Layout, Tensor};
use super::{Close, Expected, Setup, Step};

/// A matrix product.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// bfloat16 or float16.
    pub element: Element,
    /// Rows.
    pub m: usize,
    /// Columns.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
}

impl Product {
    /// The kernel with operands.
    pub fn setup(self) -> Setup {
        let Self { element, m, n, k } = self;
        let matrix = |rows, columns| Tensor {
            element,
            shape: [1, 1, rows, columns],
            layout: Layout::default(),
        };
        let (a, b, c) = (matrix(m, k), matrix(k, n), matrix(m, n));
        let (a_values, b_values) = (a.normal(1), b.normal(2));
        let mut values = vec![0.0; m * n];
        for (a, row) in a_values.chunks_exact(k).zip(values.chunks_exact_mut(n)) {
            for (a, b) in a.iter().zip(b_values.chunks_exact(n)) {
                row.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
            }
        }
        let mut memory = Memory::new();
        let args = gemm::Args {
            a: a.put(&mut memory, "a", &a_values).address,
            b: b.put(&mut memory, "b", &b_values).address,
            c: c.alloc(&mut memory, "c").address,
            m: m as u32,
            n: n as u32,
            k: k as u32,
        };
        let config = gemm::Config { element };
        // What rounding the sums costs.
        let most = match element {
            Element::F16 => 4e-4,
            _ => 2.5e-3,
        };
        Setup::new(
            memory,
            vec![Step::new(config.kernel(), config.launch(&args))],
            vec![Expected::new(
                "c",
                args.c,
                element,
                values,
                Close::Norm(most),
            )],
        )
    }
}
