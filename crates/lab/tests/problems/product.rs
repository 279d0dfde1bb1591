//! The matrix product, against sums in float64.

use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::Element;
use flex_block_attn_lab::problems::Product;

use crate::right_in_all_ways;

#[test]
fn products_are_right() {
    // Fewer steps than stages, just as many, and more; one tile, and a ragged group of them.
    for (m, n, k) in [(128, 256, 64), (256, 512, 192), (384, 256, 320)] {
        let element = Element::Bf16;
        right_in_all_ways(&Product { element, m, n, k }.setup(), &Options::all(2));
    }
}

#[test]
fn float16() {
    let problem = Product {
        element: Element::F16,
        m: 128,
        n: 256,
        k: 256,
    };
    right_in_all_ways(&problem.setup(), &Options::all(0));
}
