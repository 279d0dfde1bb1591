//! Tiles of queries of several blocks.

use flex_block_attn_kernels::{Element, forward};
use flex_block_attn_lab::problems::Forward;
use flex_block_attn_ptx::ir::{Op, Operand};

use crate::edit::Which::All;
use crate::edit::{change, op};
use crate::{Base, By, FAR, Mutation, Setup, mask};

/// Tiles of three blocks on one thread block, the last block short: lists of all keys' blocks, of some in a
/// row, far apart, few, and none. Tiles of keys end in all stages, which are used again.
pub fn forward() -> Setup {
    let all: Vec<usize> = (0..20).collect();
    let lists: [[&[usize]; 3]; 8] = [
        [&all, &[0, 1, 2, 15, 17], &[]],
        [&[3], &[4, 19], &[]],
        [&[], &[], &[]],
        [&[3, 4, 5, 6, 19], &[6], &[3, 19]],
        [&[0], &[], &[]],
        [&[1, 2], &[2, 3, 4], &[1]],
        [&[], &[19], &[7]],
        [&[0, 9], &all, &[5]],
    ];
    let mask = mask([8 * 192 - 14, 1270, 64, 64], [1, 1], &lists.concat());
    let config = forward::Config::choose(Element::Bf16, 128, 64, 64, None).expect("blocks of 64");
    Forward {
        blocks: 1,
        scale: FAR,
        ..Forward::new(config, mask)
    }
    .setup()
}

pub fn table() -> Vec<Mutation> {
    vec![Mutation {
        name: "a warpgroup holds values and waits for keys behind all that come for sure",
        kind: "ring",
        base: Base::Mixed,
        edit: |s| {
            let reach = op!(Op::Compare {
                b: Operand::Imm(11),
                ..
            });
            change(s.kernel_mut(), All, reach, |op| {
                if let Op::Compare { b, .. } = op {
                    *b = Operand::Imm(1000);
                }
            })
        },
        by: By::Emulator(&["Deadlock"]),
    }]
}
