//! Fences: of the async proxy, behind mbarriers' initialisation, of wgmma's registers.

use flex_block_attn_ptx::ir::{Fence, Op, Scope};

use crate::edit::Which::{All, Nth};
use crate::edit::{change, inits, move_before, op, remove};
use crate::{Base, By, Mutation};

pub fn table() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "no proxy fence before the store of c",
            kind: "proxy fence",
            base: Base::Gemm,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::Fence(Fence::ProxyAsyncShared))),
            by: By::Emulator(&["ProxyFence"]),
        },
        Mutation {
            name: "proxy fence of the wrong memory",
            kind: "proxy fence",
            base: Base::Gemm,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Fence(Fence::ProxyAsyncShared)),
                    |op| {
                        *op = Op::Fence(Fence::ProxyAsyncGlobal);
                    },
                )
            },
            by: By::Emulator(&["ProxyFence"]),
        },
        Mutation {
            name: "an ordinary fence for a proxy fence",
            kind: "proxy fence",
            base: Base::Gemm,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Fence(Fence::ProxyAsyncShared)),
                    |op| {
                        *op = Op::Fence(Fence::AcquireRelease(Scope::Gpu));
                    },
                )
            },
            by: By::Emulator(&["ProxyFence"]),
        },
        Mutation {
            name: "proxy fence before the last stmatrix",
            kind: "proxy fence",
            base: Base::Gemm,
            edit: |s| {
                let fence = op!(Op::Fence(Fence::ProxyAsyncShared));
                move_before(s.kernel_mut(), fence, op!(Op::StoreMatrix { .. }))
            },
            by: By::Emulator(&["ProxyFence"]),
        },
        Mutation {
            name: "no fence behind the init of mbarriers",
            kind: "mbarrier init fence",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::Fence(Fence::MbarrierInit))),
            by: By::Emulator(&["Mbarrier"]),
        },
        Mutation {
            // The one behind it, "empty", is not used by copies: it needs no fence.
            name: "fence before the last init of a full mbarrier",
            kind: "mbarrier init fence",
            base: Base::Gemm,
            edit: |s| {
                let last = inits(s.kernel(), 10);
                move_before(s.kernel_mut(), op!(Op::Fence(Fence::MbarrierInit)), last)
            },
            by: By::Emulator(&["Mbarrier"]),
        },
        Mutation {
            name: "no wgmma fence at all",
            kind: "wgmma fence",
            base: Base::Gemm,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::WgmmaFence)),
            by: By::Emulator(&["MissingWgmmaFence"]),
        },
        Mutation {
            name: "no wgmma fence before the first scores",
            kind: "wgmma fence",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(0), op!(Op::WgmmaFence)),
            by: By::Emulator(&["MissingWgmmaFence"]),
        },
        Mutation {
            name: "no wgmma fence before later scores, after the softmax of earlier ones",
            kind: "wgmma fence",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(1), op!(Op::WgmmaFence)),
            by: By::Emulator(&["MissingWgmmaFence"]),
        },
        Mutation {
            name: "no wgmma fence between rescaling the output and the product with v",
            kind: "wgmma fence",
            base: Base::Short,
            edit: |s| remove(s.kernel_mut(), Nth(2), op!(Op::WgmmaFence)),
            by: By::Emulator(&["MissingWgmmaFence"]),
        },
        Mutation {
            name: "no wgmma fence before the product with v that the next row's scores follow",
            kind: "wgmma fence",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(4), op!(Op::WgmmaFence)),
            by: By::Emulator(&["MissingWgmmaFence"]),
        },
        Mutation {
            name: "no wgmma fence before the last product of all",
            kind: "wgmma fence",
            base: Base::Short,
            edit: |s| remove(s.kernel_mut(), Nth(3), op!(Op::WgmmaFence)),
            by: By::Emulator(&["MissingWgmmaFence"]),
        },
    ]
}
