//! Every instruction that is there to order others, left out alone, is missed: by the emulator or by
//! the results. What is not is listed here, with the reason.

use std::collections::BTreeMap;

use flex_block_attn_ptx::ir::Op;

use crate::edit::{Which, all, remove};
use crate::{Base, each, found, ways};

/// By kernel and instruction, how many are not missed. None of them is needed for right results.
const HARMLESS: &[(&str, &str, usize)] = &[
    // A stage of b is empty when a's is, which the producer has just waited for.
    ("gemm_bf16", "mbarrier.try_wait.parity.shared::cta.b64", 3),
    // Only products touch the sum once the first fence is passed.
    ("gemm_bf16", "wgmma.fence.sync.aligned", 2),
    // Who does not ask for more registers must do with fewer: ptxas would see to it.
    ("gemm_bf16", "setmaxnreg.inc.sync.aligned.u32", 1),
    (WIDE, "setmaxnreg.inc.sync.aligned.u32", 1),
    // No register of the product was touched since the fence before.
    (WIDE, "wgmma.fence.sync.aligned", 1),
    // Lanes that are done with a loop wait for the others there: the next instruction would, too.
    (WIDE, "bar.warp.sync", 1),
    (MIXED, "setmaxnreg.inc.sync.aligned.u32", 1),
    (PAIRS, "setmaxnreg.inc.sync.aligned.u32", 1),
    (PAIRS, "wgmma.fence.sync.aligned", 1),
    (PAIRS, "bar.warp.sync", 1),
    (VIDEO, "setmaxnreg.inc.sync.aligned.u32", 1),
    (VIDEO, "wgmma.fence.sync.aligned", 1),
    // Likewise. Of queries each lane writes the same spot twice where no box is left out; spots are read
    // when all tiles of keys are computed. And of the two syncs in a tile's load either is enough; what the
    // walker has read of a job, it tells of by the notes that loaders wait for before they give the job
    // back.
    (VIDEO, "bar.warp.sync", 10),
    (INTEGERS, "setmaxnreg.inc.sync.aligned.u32", 1),
    // A stage of dout is empty when q's is; a note is there when the dq before it is; whose gradients of
    // scores are wanted has passed its turn on since, but for the last; the first of all that is stored
    // finds its place empty.
    (INTEGERS, "mbarrier.try_wait.parity.shared::cta.b64", 8),
    // No register of the product was touched since the fence before.
    (INTEGERS, "wgmma.fence.sync.aligned", 12),
    // dv is of one group with dq, or with dk, which are waited for, too.
    (INTEGERS, "wgmma.commit_group.sync.aligned", 3),
    // Nobody fills the first tile's dout before its q is given back, which is later.
    (INTEGERS, "wgmma.wait_group.sync.aligned", 1),
    // Between the copy of steps and the end of most tiles dq is given, with a sync.
    (INTEGERS, "bar.warp.sync", 2),
];

const WIDE: &str = "forward_bf16_d128_q128_kv128_p128";
const MIXED: &str = "forward_bf16_d128_mixed_p64";
const PAIRS: &str = "forward_bf16_d128_pairs192_kv64_p64";
const VIDEO: &str = "forward_bf16_d64_q128_kv192_p16_canvas";
const INTEGERS: &str = "backward_bf16_d128_p64_deterministic";

fn orders(op: &Op) -> bool {
    matches!(
        op,
        Op::Fence(_)
            | Op::LoadAcquire { .. }
            | Op::StoreRelease { .. }
            | Op::BarrierSync { .. }
            | Op::WarpSync
            | Op::BarrierArrive { .. }
            | Op::ClusterArrive
            | Op::ClusterWait
            | Op::MbarrierInit { .. }
            | Op::MbarrierArrive { .. }
            | Op::MbarrierArriveExpect { .. }
            | Op::MbarrierWait { .. }
            | Op::BulkCommit
            | Op::GridWait
            | Op::BulkWait { .. }
            | Op::WgmmaFence
            | Op::WgmmaCommit
            | Op::WgmmaWait { .. }
            | Op::SetMaxRegisters { .. }
    )
}

#[test]
fn every_instruction_that_orders_others_is_missed() {
    let mut cases = Vec::new();
    // The other bases execute less of what orders others.
    for base in [
        Base::Gemm,
        Base::Wide,
        Base::Integers,
        Base::Mixed,
        Base::Pairs,
        Base::Video,
        Base::Means,
        Base::Weights,
        Base::Masks,
    ] {
        let setup = base.setup();
        let insts = all(setup.kernel())
            .into_iter()
            .filter(|inst| orders(&inst.op))
            .enumerate();
        cases.extend(insts.map(|(nth, inst)| (setup.clone(), nth, inst)));
    }
    assert!(cases.len() > 60, "{} instructions", cases.len());
    let missed = each(&cases, |(setup, nth, _)| {
        let mut setup = setup.clone();
        assert_eq!(remove(setup.kernel_mut(), Which::Nth(*nth), orders), 1);
        found(&setup, &ways(1)).is_some()
    });

    let mut counts = BTreeMap::new();
    let mut places = String::new();
    for ((setup, _, inst), _) in cases.iter().zip(missed).filter(|(_, missed)| !missed) {
        let (kernel, mnemonic) = (setup.kernel().name.clone(), inst.op.mnemonic());
        places += &format!("\n{kernel}, {}: {mnemonic}", inst.at);
        *counts.entry((kernel, mnemonic)).or_insert(0) += 1;
    }
    let known = |&(kernel, mnemonic, count): &(&str, &str, usize)| {
        ((kernel.to_owned(), mnemonic.to_owned()), count)
    };
    let expected: BTreeMap<_, usize> = HARMLESS.iter().map(known).collect();
    assert_eq!(counts, expected, "nobody misses:{places}");
}
