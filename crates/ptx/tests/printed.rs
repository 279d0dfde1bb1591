//! The printed text of every instruction.

mod every;

use flex_block_attn_ptx::{Module, print};
#[test]
fn dump() {
    let kernels = every::cases().into_iter().map(|c| c.kernel).collect();
    std::fs::write("/work/scratch-ptxas/all.ptx", print(&Module { kernels })).unwrap();
}
