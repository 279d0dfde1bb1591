//! The matrix product, against sums in float64.

use flex_block_attn_emulator::{Memory, Options};
use flex_block_attn_kernels::gemm::{Args, Config};
use flex_block_attn_ptx::Element;
use half::bf16;

use crate::{bits, in_all_ways, normal, read, relative_error};

fn product(a: &[bf16], b: &[bf16], [m, n, k]: [usize; 3]) -> Vec<f64> {
    let element = |i: usize| {
        let (row, column) = (i / n, i % n);
        (0..k)
            .map(|j| a[row * k + j].to_f64() * b[j * n + column].to_f64())
            .sum()
    };
    (0..m * n).map(element).collect()
}

#[test]
fn products_are_right() {
    // Fewer steps than stages, just as many, and more; one tile, and a ragged group of them.
    for (m, n, k) in [(128, 256, 64), (256, 512, 192), (384, 256, 320)] {
        let a = normal(1, m * k);
        let b = normal(2, k * n);
        let expected = product(&a, &b, [m, n, k]);
        let config = Config {
            element: Element::Bf16,
        };
        let prepare = || {
            let mut memory = Memory::new();
            let args = Args {
                a: memory.alloc_with("a", &bits(&a)),
                b: memory.alloc_with("b", &bits(&b)),
                c: memory.alloc("c", 2 * m * n),
                m: m as u32,
                n: n as u32,
                k: k as u32,
            };
            (memory, config.launch(&args), args.c)
        };
        in_all_ways(&config.kernel(), &Options::all(2), prepare, |memory, &c| {
            let error = relative_error(&read(memory, c, m * n), &expected);
            assert!(error < 2.5e-3, "{m} x {n} x {k}: relative error {error}");
        });
    }
}
