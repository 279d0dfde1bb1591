//! Races between warps, thread blocks and proxies; and orders that are none.

use flex_block_attn_emulator::{Kind, Memory, Options, emulate};
use flex_block_attn_ptx::ir::{Fence, Scope};
use flex_block_attn_ptx::{Arg, Builder, Kernel, Launch};

use crate::{caught, launch, results};

fn buffer() -> (Memory, Launch) {
    let mut memory = Memory::new();
    let at = memory.alloc_with("buffer", &[0u32; 256]);
    (memory, launch(2, &[Arg::U64(at)]))
}

#[track_caller]
fn right(kernel: &Kernel) {
    let (memory, launch) = buffer();
    results(kernel, &launch, &memory, |_| ());
}

#[track_caller]
fn race(kernel: &Kernel) -> String {
    let (memory, launch) = buffer();
    caught(kernel, &launch, &memory, |kind| {
        matches!(kind, Kind::Race { .. } | Kind::UninitialisedMemory { .. })
    })
    .to_string()
}

/// Warp 0 writes shared memory, warp 1 reads it.
fn hand_over(barrier: bool) -> Kernel {
    Builder::kernel("hand over", 64, |k| {
        k.param::<u64>("buffer");
        k.set_shared_bytes(256);
        let (smem, tid) = (k.shared_base(), k.tid());
        k.if_(tid.lt(32), || k.store_shared(smem + (tid << 2), tid));
        if barrier {
            k.sync_threads();
        }
        k.if_(tid.ge(32), || {
            k.load_shared::<u32>((smem + (tid << 2)) - 128);
        });
    })
}

#[test]
fn warps_need_a_barrier_between_write_and_read() {
    right(&hand_over(true));
    race(&hand_over(false));
}

#[test]
fn reads_come_before_later_writes() {
    let kernel = |last: bool| {
        Builder::kernel("overwrite", 64, |k| {
            k.param::<u64>("buffer");
            k.set_shared_bytes(256);
            let (smem, tid) = (k.shared_base(), k.tid());
            let own = smem + (tid << 2);
            k.store_shared(own, tid);
            k.sync_threads();
            k.load_shared::<u32>(smem + ((tid ^ 32) << 2));
            if last {
                k.sync_threads();
            }
            k.store_shared(own, tid);
        })
    };
    right(&kernel(true));
    // The write after the read, or the read after the write: whichever comes second.
    race(&kernel(false));
}

/// Lanes of a warp are threads: none knows what another has done before both sync.
#[test]
fn lanes_need_a_sync_between_write_and_read() {
    let kernel = |first_writes: bool, syncs: bool| {
        Builder::kernel("lanes", 32, |k| {
            k.param::<u64>("buffer");
            k.set_shared_bytes(128);
            let (smem, lane) = (k.shared_base(), k.lane());
            let write = || k.store_shared(smem + (lane << 2), lane);
            if first_writes {
                k.if_(lane.equals(0), write);
            } else {
                write();
            }
            if syncs {
                k.warp_sync();
            }
            if first_writes {
                k.load_shared::<u32>(smem);
            } else {
                k.if_(lane.equals(0), || {
                    k.load_shared::<u32>(smem.at(4 * 7));
                });
            }
        })
    };
    for first_writes in [false, true] {
        right(&kernel(first_writes, true));
        race(&kernel(first_writes, false));
    }
}

/// Who arrives for a warp tells of what its other lanes have done only if they have synced.
#[test]
fn arrivals_tell_of_lanes_that_have_synced() {
    let kernel = |syncs: bool| {
        Builder::kernel("arrival", 64, |k| {
            k.param::<u64>("buffer");
            k.set_shared_bytes(256);
            let (smem, tid) = (k.shared_base(), k.tid());
            let barrier = smem.at(128);
            k.if_(tid.equals(0), || k.mbarrier_init(barrier, 1));
            k.sync_threads();
            k.if_else(
                tid.lt(32),
                || {
                    k.store_shared(smem + (tid << 2), tid);
                    if syncs {
                        k.warp_sync();
                    }
                    k.if_(tid.equals(0), || k.mbarrier_arrive(barrier));
                },
                || {
                    k.mbarrier_wait(barrier, 0u32);
                    k.load_shared::<u32>((smem + (tid << 2)) - 128);
                },
            );
        })
    };
    right(&kernel(true));
    race(&kernel(false));
}

/// What arrives at a barrier without waiting is known to those who wait, not the other way round.
#[test]
fn arriving_orders_one_way() {
    let kernel = |back: bool| {
        Builder::kernel("one way", 64, |k| {
            k.param::<u64>("buffer");
            k.set_shared_bytes(256);
            let (smem, tid) = (k.shared_base(), k.tid());
            let own = smem + (tid << 2);
            k.store_shared(own, tid);
            k.if_else(
                tid.lt(32),
                || {
                    k.barrier_arrive(1, 64);
                    if back {
                        k.load_shared::<u32>(own.at(128));
                    }
                },
                || {
                    k.barrier_sync(1, 64);
                    k.load_shared::<u32>(own - 128);
                },
            );
        })
    };
    right(&kernel(false));
    race(&kernel(true));
}

/// A store by ordinary instructions, then a bulk store of the same bytes by another warp, with the
/// proxy fence on the writer's side, on the reader's, or nowhere.
fn publish(before: bool, after: bool) -> Kernel {
    Builder::kernel("publish", 64, |k| {
        let buffer = k.param::<u64>("buffer");
        k.set_shared_bytes(128);
        let (smem, tid) = (k.shared_base(), k.tid());
        k.if_(tid.lt(32), || {
            k.store_shared(smem + (tid << 2), tid);
            if before {
                k.fence(Fence::ProxyAsyncShared);
            }
        });
        k.sync_threads();
        k.if_(tid.equals(32), || {
            if after {
                k.fence(Fence::ProxyAsyncShared);
            }
            k.bulk_store(buffer + k.cta_x().times_wide(128), smem, 128);
            k.bulk_commit();
            k.bulk_wait_read(0);
        });
    })
}

#[test]
fn proxies_need_a_fence_on_either_side() {
    right(&publish(true, false));
    right(&publish(false, true));
    let (memory, launch) = buffer();
    let fault = caught(&publish(false, false), &launch, &memory, |kind| {
        matches!(kind, Kind::ProxyFence { .. })
    });
    assert!(
        fault.to_string().contains("the write by lane 0 of warp 0"),
        "{fault}"
    );
}

#[test]
fn blocks_do_not_share_words_without_order() {
    let kernel = Builder::kernel("blocks", 32, |k| {
        let buffer = k.param::<u64>("buffer");
        k.store_global(buffer + k.tid().times_wide(4), k.tid());
    });
    let text = race(&kernel);
    assert!(
        text.contains("buffer + 0") && text.contains("block ["),
        "{text}"
    );
    let kernel = Builder::kernel("reader", 32, |k| {
        let buffer = k.param::<u64>("buffer");
        let address = buffer + k.tid().times_wide(4);
        k.if_else(
            k.cta_x().equals(0),
            || k.store_global(address, k.tid()),
            || {
                k.load_global::<u32>(address);
            },
        );
    });
    race(&kernel);
}

/// The last block to come reads what all have written: the pattern of a split sum.
fn last_reads_all(fences: bool) -> Kernel {
    Builder::kernel("last", 64, |k| {
        let buffer = k.param::<u64>("buffer");
        k.set_shared_bytes(16);
        let (smem, tid) = (k.shared_base(), k.tid());
        let own = buffer + ((k.cta_x() << 6) + tid).times_wide(4);
        k.store_global(own, tid);
        k.sync_threads();
        k.if_(tid.equals(0), || {
            if fences {
                k.fence(Fence::AcquireRelease(Scope::Gpu));
            }
            let before = k.atomic_add_global(buffer.at(1020), 1);
            if fences {
                k.fence(Fence::AcquireRelease(Scope::Gpu));
            }
            k.store_shared(smem, before);
        });
        k.sync_threads();
        k.if_(k.load_shared::<u32>(smem).equals(1), || {
            k.load_global::<u32>(buffer + tid.times_wide(4));
            k.load_global::<u32>((buffer + tid.times_wide(4)).at(256));
        });
    })
}

#[test]
fn fences_and_atomics_order_blocks() {
    right(&last_reads_all(true));
    race(&last_reads_all(false));
}

#[test]
fn releases_and_acquisitions_order_blocks() {
    let kernel = |scope_ok: bool| {
        Builder::kernel("flag", 32, |k| {
            let buffer = k.param::<u64>("buffer");
            let (tid, flag) = (k.tid(), buffer.at(512));
            k.if_else(
                k.cta_x().equals(0),
                || {
                    k.store_global(buffer + tid.times_wide(4), tid);
                    k.warp_sync();
                    k.if_(tid.equals(0), || k.store_release(flag, 1, Scope::Gpu));
                },
                || {
                    if scope_ok {
                        k.loop_(|leave| {
                            leave.when(k.load_acquire(flag, Scope::Gpu).equals(1));
                        });
                    }
                    k.load_global::<u32>(buffer + tid.times_wide(4));
                },
            );
        })
    };
    right(&kernel(true));
    race(&kernel(false));
}

/// A fence is for what was written before it, not for what the same warp writes next; and for its
/// own kind of memory.
#[test]
fn fences_cover_earlier_writes_of_their_memory() {
    let kernel = |before: Option<Fence>, after: Option<Fence>| {
        Builder::kernel("early fence", 64, |k| {
            let buffer = k.param::<u64>("buffer");
            k.set_shared_bytes(128);
            let (smem, tid) = (k.shared_base(), k.tid());
            k.if_(tid.lt(32), || {
                before.into_iter().for_each(|fence| k.fence(fence));
                k.store_shared(smem + (tid << 2), tid);
                after.into_iter().for_each(|fence| k.fence(fence));
            });
            k.sync_threads();
            k.if_(tid.equals(32), || {
                k.bulk_store(buffer + k.cta_x().times_wide(128), smem, 128);
                k.bulk_commit();
                k.bulk_wait_read(0);
            });
        })
    };
    let fence = Some(Fence::ProxyAsyncShared);
    right(&kernel(None, fence));
    let (memory, launch) = buffer();
    for wrong in [
        kernel(fence, None),
        kernel(None, Some(Fence::ProxyAsyncGlobal)),
    ] {
        caught(&wrong, &launch, &memory, |kind| {
            matches!(kind, Kind::ProxyFence { .. })
        });
    }
}

/// What may be missing of what orders two blocks' sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    Nothing,
    WaitForTurn,
    ProxyFence,
    WaitForSums,
    Release,
}

/// Two blocks add to the same numbers, the first one first.
fn sums_in_turn(missing: Missing) -> Kernel {
    Builder::kernel("sums", 32, |k| {
        let buffer = k.param::<u64>("buffer");
        k.set_shared_bytes(128);
        let (smem, tid, turn) = (k.shared_base(), k.tid(), buffer.at(512));
        k.store_shared(smem + (tid << 2), tid.to_f32());
        k.fence(Fence::ProxyAsyncShared);
        k.warp_sync();
        k.if_(tid.equals(0), || {
            if missing != Missing::WaitForTurn {
                k.loop_(|leave| {
                    leave.when(k.load_acquire(turn, Scope::Gpu).equals(k.cta_x()));
                });
            }
            if missing != Missing::ProxyFence {
                k.fence(Fence::ProxyAsyncGlobal);
            }
            k.bulk_reduce_add::<f32>(buffer, smem, 128u32);
            k.bulk_commit();
            match missing {
                Missing::WaitForSums => k.bulk_wait_read(0),
                _ => k.bulk_wait(0),
            }
            match missing {
                Missing::Release => {
                    k.atomic_add_global(turn, 1);
                }
                _ => k.store_release(turn, k.cta_x() + 1, Scope::Gpu),
            }
        });
    })
}

#[test]
fn sums_that_must_repeat_need_an_order() {
    let (memory, launch) = buffer();
    let run = |missing, options: Options, ordered_sums| {
        let options = Options {
            ordered_sums,
            ..options
        };
        let result = emulate(
            &sums_in_turn(missing),
            &launch,
            &mut memory.clone(),
            &options,
        );
        result.map_err(|fault| fault.kind)
    };
    for options in Options::all(4) {
        run(Missing::Nothing, options, true).expect("the order is whole");
        for missing in [Missing::WaitForTurn, Missing::WaitForSums, Missing::Release] {
            run(missing, options, false).expect("sums may come in any order");
            let kind = run(missing, options, true).expect_err("a part of the order is missing");
            assert!(matches!(kind, Kind::Race { .. }), "{missing:?}: {kind}");
        }
        let kind = run(Missing::ProxyFence, options, true).expect_err("the fence is missing");
        assert!(matches!(kind, Kind::ProxyFence { .. }), "{kind}");
    }
}
