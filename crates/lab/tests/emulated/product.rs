//! The matrix product, against sums in float64.

use flex_block_attn_emulator::Options;
use flex_block_attn_lab::emulated::Product;

use crate::right_in_all_ways;

#[test]
fn products_are_right() {
    // Fewer steps than stages, just as many, and more; one tile, and a ragged group of them.
    for (m, n, k) in [(128, 256, 64), (256, 512, 192), (384, 256, 320)] {
        right_in_all_ways(&Product { m, n, k }.setup(), &Options::all(2));
    }
}
