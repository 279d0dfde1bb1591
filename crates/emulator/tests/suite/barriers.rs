//! Named barriers, mbarriers, the cluster barrier, registers that move between warpgroups.

use flex_block_attn_emulator::{Kind, Memory};
use flex_block_attn_ptx::{Arg, Builder, Kernel};

use crate::{caught, launch, results};

#[track_caller]
fn wrong(kernel: &Kernel, expected: impl Fn(&Kind) -> bool) -> String {
    caught(
        kernel,
        &launch(kernel.cluster, &[]),
        &Memory::new(),
        expected,
    )
    .to_string()
}

#[test]
fn warpgroups_take_turns() {
    // Two warps alternate by two barriers, each adding a digit to a word of shared memory.
    let kernel = Builder::kernel("turns", 64, |k| {
        k.set_shared_bytes(16);
        let (out, smem, tid) = (k.param::<u64>("out"), k.shared_base(), k.tid());
        let warp = (tid >> 5).uniform();
        k.if_(tid.equals(0), || k.store_shared(smem, k.var::<u32>(0)));
        k.if_(warp.equals(1), || k.barrier_arrive(1, 64));
        k.for_(0, 4, 1, |_| {
            k.barrier_sync(warp + 1, 64);
            k.if_((tid & 31).equals(0), || {
                let value = k.load_shared::<u32>(smem);
                k.store_shared(smem, value * 10 + warp + 1);
            });
            k.barrier_arrive((warp ^ 1) + 1, 64);
        });
        k.if_(tid.equals(32), || {
            k.store_global(out, k.load_shared::<u32>(smem));
        });
    });
    let mut memory = Memory::new();
    let out = memory.alloc("out", 4);
    let got = results(&kernel, &launch(1, &[Arg::U64(out)]), &memory, |m| {
        m.read::<u32>(out, 1)
    });
    assert_eq!(got, [12_121_212]);
}

#[test]
fn named_barriers_are_used_alike() {
    let text = wrong(
        &Builder::kernel("counts", 96, |k| {
            let warp = (k.tid() >> 5).uniform();
            k.if_(warp.equals(0), || k.barrier_sync(1, 96));
            k.if_(warp.equals(1), || k.barrier_sync(1, 64));
        }),
        |kind| matches!(kind, Kind::NamedBarrier { id: 1, .. }),
    );
    assert!(text.contains("threads"), "{text}");
    wrong(
        &Builder::kernel("id", 32, |k| k.barrier_sync(16, 32)),
        |kind| matches!(kind, Kind::NamedBarrier { id: 16, .. }),
    );
    wrong(
        &Builder::kernel("part", 32, |k| k.if_(k.tid().lt(5), || k.sync_threads())),
        |kind| matches!(kind, Kind::Divergence { active: 31 }),
    );
}

#[test]
fn somebody_waits_for_each_round_of_a_named_barrier() {
    // Warp 1 gives warp 0 two turns, which it gives back; without taking them, they pair up.
    let turns = |waits: bool| {
        Builder::kernel("turns", 64, |k| {
            let warp = (k.tid() >> 5).uniform();
            let first = || {
                if waits {
                    k.barrier_sync(1, 64);
                }
                k.barrier_arrive(2, 64);
            };
            let second = || {
                k.barrier_arrive(1, 64);
                k.barrier_sync(2, 64);
            };
            k.for_(0, 2, 1, |_| k.if_else(warp.equals(0), first, second));
        })
    };
    results(&turns(true), &launch(1, &[]), &Memory::new(), |_| ());
    let text = wrong(&turns(false), |kind| {
        matches!(kind, Kind::NamedBarrier { .. })
    });
    assert!(text.contains("nobody waits"), "{text}");
}

#[test]
fn warps_that_nobody_joins_are_named() {
    let text = wrong(
        &Builder::kernel("alone", 96, |k| {
            let warp = (k.tid() >> 5).uniform();
            k.if_(warp.differs(1), || k.barrier_sync(3, 96));
        }),
        |kind| matches!(kind, Kind::Deadlock { .. }),
    );
    assert!(
        text.contains("warps [0, 2] wait for barrier 3: 64 of 96 threads"),
        "{text}"
    );
}

#[test]
fn mbarriers_are_used_rightly() {
    let one = |body: fn(&Builder)| {
        Builder::kernel("mbarrier", 32, |k| {
            k.set_shared_bytes(64);
            k.if_(k.tid().equals(0), || body(k));
        })
    };
    let text = wrong(&one(|k| k.mbarrier_wait(k.shared_base(), 0)), |kind| {
        matches!(kind, Kind::Mbarrier { .. })
    });
    assert!(text.contains("none was initialised"), "{text}");
    let text = wrong(
        &one(|k| {
            let barrier = k.shared_base();
            k.mbarrier_init(barrier, 1);
            k.mbarrier_arrive_expect(barrier, 64);
            k.mbarrier_arrive(barrier);
        }),
        |kind| matches!(kind, Kind::Mbarrier { .. }),
    );
    assert!(text.contains("beyond its count of 1"), "{text}");
    wrong(
        &one(|k| {
            let barrier = k.shared_base();
            k.mbarrier_init(barrier, 1);
            k.mbarrier_arrive_expect(barrier, 64);
        }),
        |kind| matches!(kind, Kind::LeftBehind { .. }),
    );
    let text = wrong(
        &one(|k| {
            let barrier = k.shared_base();
            k.mbarrier_init(barrier, 2);
            k.mbarrier_arrive(barrier);
            k.mbarrier_wait(barrier, 1);
            k.mbarrier_wait(barrier, 0);
        }),
        |kind| matches!(kind, Kind::Deadlock { .. }),
    );
    assert!(text.contains("1 of 2 arrivals"), "{text}");
    wrong(
        &one(|k| k.mbarrier_init(k.shared_base().at(4), 1)),
        |kind| matches!(kind, Kind::Misaligned { needed: 8, .. }),
    );
}

#[test]
fn polling_sees_the_others_arrive() {
    let kernel = Builder::kernel("polling", 64, |k| {
        k.set_shared_bytes(16);
        let (smem, tid) = (k.shared_base(), k.tid());
        k.if_(tid.equals(0), || k.mbarrier_init(smem, 32));
        k.sync_threads();
        k.if_else(
            tid.lt(32),
            || {
                k.loop_(|leave| leave.when(k.mbarrier_test(smem, 0)));
                k.load_shared::<u32>(smem.at(8));
            },
            || {
                k.if_(tid.equals(40), || k.store_shared(smem.at(8), tid));
                k.mbarrier_arrive(smem);
            },
        );
    });
    results(&kernel, &launch(1, &[]), &Memory::new(), |_| ());
}

/// Blocks of a cluster exchange words of shared memory.
fn exchange(arrives: bool, synchronises: bool) -> Kernel {
    Builder::kernel("exchange", 32, |k| {
        k.set_cluster(2);
        k.set_shared_bytes(16);
        let (smem, tid) = (k.shared_base(), k.tid());
        let rank = k.special(flex_block_attn_ptx::ir::Special::ClusterCtaRank);
        k.if_(tid.equals(0), || k.mbarrier_init(smem, 1));
        k.if_(tid.equals(0), || k.mbarrier_init_fence());
        if synchronises {
            k.cluster_sync();
        }
        if arrives {
            let other = k.map_shared(smem, rank ^ 1);
            k.if_(tid.equals(0), || k.mbarrier_arrive_remote(other));
        }
        k.mbarrier_wait(smem, 0);
        if synchronises {
            k.cluster_sync();
        }
    })
}

#[test]
fn clusters_synchronise() {
    results(
        &exchange(true, true),
        &launch(4, &[]),
        &Memory::new(),
        |_| (),
    );
    let text = wrong(&exchange(false, true), |kind| {
        matches!(kind, Kind::Deadlock { .. })
    });
    assert!(text.contains("block [1, 0, 0]"), "{text}");
    wrong(&exchange(true, false), |kind| {
        matches!(kind, Kind::Mbarrier { .. } | Kind::ClusterBarrier { .. })
    });
}

#[test]
fn the_cluster_barrier_is_arrived_at_before_it_is_waited_for() {
    use flex_block_attn_ptx::ir::Op;
    wrong(
        &Builder::kernel("wait", 32, |k| k.emit(Op::ClusterWait)),
        |kind| matches!(kind, Kind::ClusterBarrier { .. }),
    );
    wrong(
        &Builder::kernel("arrive", 32, |k| k.emit(Op::ClusterArrive)),
        |kind| matches!(kind, Kind::ClusterBarrier { .. }),
    );
}

/// 384 threads have 168 registers each: what one warpgroup gives back, the others can have.
fn registers(given: u32, taken: u32) -> Kernel {
    Builder::kernel("registers", 384, |k| {
        let group = (k.tid() >> 7).uniform();
        k.if_else(
            group.equals(0),
            || k.set_max_registers(false, given),
            || k.set_max_registers(true, taken),
        );
    })
}

#[test]
fn registers_come_from_a_pool() {
    results(&registers(24, 240), &launch(2, &[]), &Memory::new(), |_| ());
    let text = wrong(&registers(32, 240), |kind| {
        matches!(kind, Kind::Deadlock { .. })
    });
    assert!(text.contains("waits for registers"), "{text}");
    for (given, taken) in [(176, 240), (24, 160), (20, 240), (24, 244)] {
        wrong(&registers(given, taken), |kind| {
            matches!(kind, Kind::RegisterCount { .. })
        });
    }
    wrong(
        &Builder::kernel("one warp", 128, |k| {
            let warp = (k.tid() >> 5).uniform();
            k.if_(warp.equals(2), || k.set_max_registers(false, 24));
        }),
        |kind| matches!(kind, Kind::Warpgroup { .. }),
    );
}

#[test]
fn mbarriers_are_initialised_once() {
    let kernel = Builder::kernel("again", 32, |k| {
        k.set_shared_bytes(8);
        k.if_(k.tid().equals(0), || {
            k.mbarrier_init(k.shared_base(), 1);
            k.mbarrier_init(k.shared_base(), 1);
        });
    });
    let text = wrong(&kernel, |kind| matches!(kind, Kind::Mbarrier { .. }));
    assert!(text.contains("initialised again"), "{text}");
}
