//! A kernel as real ones are: a producer warpgroup that copies tiles through a ring of stages, two
//! consumer warpgroups that multiply, results through shared memory and a bulk store; persistent
//! over several tiles. And the same kernel with one thing wrong.

use flex_block_attn_emulator::{Completion, Fault, Kind, Memory, Options, Schedule, emulate};
use flex_block_attn_ptx::builder::A;
use flex_block_attn_ptx::ir::{Fence, Operand};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg, Swizzle, TensorMap};

use crate::{launch, numbers, results, to_bf16};

const HIGH: u32 = 64 | 1 << 30;
/// Bytes of a tile: 128 rows of 64 bfloat16.
const TILE: u32 = 128 * 128;
const STAGES: u32 = 2;
/// The ring: a tile of A and one of B for each stage; then the output (128 by 64 float32, two
/// halves of 32 columns), then barriers: full and empty of each stage.
const OUT: u32 = 2 * STAGES * TILE;
const FULL: u32 = OUT + 2 * TILE;
const EMPTY: u32 = FULL + 8 * STAGES;
const BYTES: u32 = EMPTY + 8 * STAGES;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// Too few or too many bytes expected.
    FewBytes,
    ManyBytes,
    /// The consumers wait for the wrong phase.
    FlippedParity,
    /// Nobody waits for a stage to be empty.
    NoEmptyWait,
    /// A stage is given back before it was read.
    EarlyRelease,
    /// One warp less gives it back.
    FewReleases,
    /// The output is stored without a proxy fence, or without waiting for the other warps, or
    /// overwritten before it was read.
    NoProxyFence,
    NoBarrier,
    NoReadWait,
    /// No bulk wait at the end.
    NoLastWait,
    /// mbarriers are used before others know of them.
    NoFirstBarrier,
    /// A third consumer's share of registers that nobody gives back.
    GreedyRegisters,
    /// A tile too many is loaded.
    ExtraLoad,
    /// A barrier with the wrong number of threads.
    BarrierCount,
}

/// D = A B^T by tiles of 128 by 64 over k in steps of 64; block b makes tiles b, b + grid...
fn kernel(mistake: Mistake) -> Kernel {
    Builder::kernel("pipeline", 384, |k| {
        k.set_shared_bytes(BYTES);
        let (a, b, d) = (k.tensor_map("a"), k.tensor_map("b"), k.tensor_map("d"));
        let (tiles, steps) = (k.param::<u32>("tiles"), k.param::<u32>("steps"));
        let smem = k.shared_base();
        let tid = k.tid();
        let group = (tid >> 7).uniform();
        k.if_(tid.equals(0), || {
            for stage in 0..STAGES {
                k.mbarrier_init(smem.at(FULL + 8 * stage), 1);
                k.mbarrier_init(smem.at(EMPTY + 8 * stage), 8);
            }
            k.mbarrier_init_fence();
        });
        if mistake != Mistake::NoFirstBarrier {
            k.sync_threads();
        }
        let stage = k.var::<u32>(0);
        let phase = k.var::<u32>(0);
        let advance = || {
            stage.set(stage + 1);
            let wraps = stage.equals(STAGES);
            phase.set(phase ^ wraps.select(1, 0));
            stage.set(wraps.select(0, stage));
        };
        let produce = || {
            k.set_max_registers(false, 24);
            k.if_(tid.equals(0), || {
                k.for_(k.cta_x(), tiles, k.grid_x(), |tile| {
                    let extra = u32::from(mistake == Mistake::ExtraLoad);
                    k.for_(0, steps + extra, 1, |step| {
                        let full = smem + (stage << 3) + FULL;
                        if mistake != Mistake::NoEmptyWait {
                            let empty = smem + (stage << 3) + EMPTY;
                            k.mbarrier_wait(empty, phase ^ 1);
                        }
                        let bytes = match mistake {
                            Mistake::FewBytes => TILE + TILE / 2 - 16,
                            Mistake::ManyBytes => TILE + TILE / 2 + 16,
                            _ => TILE + TILE / 2,
                        };
                        k.mbarrier_arrive_expect(full, bytes);
                        let dst = smem + stage * (2 * TILE);
                        let column = Operand::Reg((step << 6).id());
                        let row = Operand::Reg((tile << 7).id());
                        k.tma_load(dst, a, &[column, row], full, Default::default());
                        let zero = Operand::Imm(0);
                        k.tma_load(dst.at(TILE), b, &[column, zero], full, Default::default());
                        advance();
                    });
                });
            });
        };
        let consume = || {
            let count = if mistake == Mistake::GreedyRegisters {
                248
            } else {
                240
            };
            k.set_max_registers(true, count);
            let group = group - 1;
            let lane = tid & 31;
            let warp = (tid >> 5) & 3;
            let acc: Vec<Reg<'_, f32>> = (0..32).map(|_| k.var(0.0)).collect();
            k.for_(k.cta_x(), tiles, k.grid_x(), |tile| {
                k.for_(0, steps, 1, |step| {
                    let parity = match mistake {
                        Mistake::FlippedParity => phase ^ 1,
                        _ => phase,
                    };
                    k.mbarrier_wait(smem + (stage << 3) + FULL, parity);
                    let first = step.differs(0);
                    let low = (smem + stage * (2 * TILE)) >> 4;
                    let release = || {
                        let last = if mistake == Mistake::FewReleases {
                            1
                        } else {
                            0
                        };
                        let leads = (lane + (warp.equals(3).select(last, 0))).equals(0);
                        k.where_(leads, || {
                            k.mbarrier_arrive((smem + (stage << 3)).at(EMPTY));
                        });
                    };
                    k.wgmma_fence();
                    for slice in 0..4u32 {
                        let a = low + (group << 9) + (2 * slice + (1 << 16));
                        let b = low + (TILE / 16 + 2 * slice + (1 << 16));
                        let a = A::Shared {
                            descriptor: a.join(HIGH),
                            transposed: false,
                        };
                        if slice == 0 {
                            k.wgmma(Element::Bf16, &acc, a, b.join(HIGH), false, first);
                        } else {
                            k.wgmma(Element::Bf16, &acc, a, b.join(HIGH), false, true);
                        }
                    }
                    k.wgmma_commit();
                    if mistake == Mistake::EarlyRelease {
                        release();
                    }
                    k.wgmma_wait(0);
                    if mistake != Mistake::EarlyRelease {
                        release();
                    }
                    advance();
                });
                // The last store of this warpgroup must have read its half before it is written.
                let leads = (tid & 127).equals(0);
                if mistake != Mistake::NoReadWait {
                    k.if_(leads, || k.bulk_wait_read(0));
                }
                let threads = if mistake == Mistake::BarrierCount {
                    96
                } else {
                    128
                };
                k.barrier_sync(group + 1, threads);
                // Rows of 128 bytes: 32 float32, swizzled; two panels, 64 rows for each group.
                let row = (group << 6) + (warp << 4) + (lane >> 2);
                for (i, acc) in acc.iter().enumerate() {
                    let i = i as u32;
                    let row = row + 8 * (i >> 1 & 1);
                    let column = ((lane & 3) << 1) + (8 * (i >> 2) + (i & 1));
                    let chunk = ((column & 31) >> 2) ^ (row & 7);
                    let address = smem
                        + ((column >> 5) * TILE + (row << 7) + (chunk << 4) + ((column & 3) << 2));
                    k.store_shared(address.at(OUT), *acc);
                }
                if mistake != Mistake::NoProxyFence {
                    k.fence(Fence::ProxyAsyncShared);
                }
                if mistake != Mistake::NoBarrier {
                    k.barrier_sync(group + 1, 128);
                }
                k.if_(leads, || {
                    for panel in 0..2u32 {
                        let row = Operand::Reg(((tile << 7) + (group << 6)).id());
                        let src = (smem + (group << 13)).at(OUT + panel * TILE);
                        k.tma_store(d, &[Operand::Imm(u64::from(32 * panel)), row], src);
                    }
                    k.bulk_commit();
                });
            });
            if mistake != Mistake::NoLastWait {
                k.if_((tid & 127).equals(0), || k.bulk_wait_read(0));
            }
        };
        k.if_else(group.equals(0), produce, consume);
    })
}

/// Memory, launch, address and expected contents of the output.
fn problem(tiles: u32, steps: u32, blocks: u32) -> (Memory, Launch, u64, Vec<f32>) {
    // The last tile is not full: 100 rows of its 128.
    let (rows, depth) = ((tiles * 128 - 28) as usize, (steps * 64) as usize);
    let (a, b) = (numbers(rows * depth, 3), numbers(64 * depth, 4));
    let mut memory = Memory::new();
    let map = |element: Element, address, rows: usize, columns: usize, tile: [u32; 2]| {
        let stride = columns as u64 * u64::from(element.bytes());
        Arg::TensorMap(TensorMap {
            element,
            address,
            rank: 2,
            dims: [columns as u64, rows as u64, 0, 0, 0],
            strides: [element.bytes().into(), stride, 0, 0, 0],
            tile: [tile[0], tile[1], 0, 0, 0],
            swizzle: Swizzle::B128,
        })
    };
    let a_at = memory.alloc_with("a", &to_bf16(&a));
    let b_at = memory.alloc_with("b", &to_bf16(&b));
    let d_at = memory.alloc("d", rows * 64 * 4);
    let args = [
        map(Element::Bf16, a_at, rows, depth, [64, 128]),
        map(Element::Bf16, b_at, 64, depth, [64, 64]),
        map(Element::F32, d_at, rows, 64, [32, 64]),
        Arg::U32(tiles),
        Arg::U32(steps),
    ];
    let mut expected = vec![0.0; rows * 64];
    for row in 0..rows {
        for column in 0..64 {
            let products = (0..depth).map(|i| a[row * depth + i] * b[column * depth + i]);
            expected[row * 64 + column] = products.sum();
        }
    }
    (memory, launch(blocks, &args), d_at, expected)
}

#[test]
fn a_pipeline_is_right_under_all_schedules() {
    for (tiles, steps, blocks) in [(3, 5, 2), (1, 1, 1), (4, 2, 4)] {
        let (memory, launch, d, expected) = problem(tiles, steps, blocks);
        let count = expected.len();
        let got = results(&kernel(Mistake::None), &launch, &memory, |m| {
            m.read::<f32>(d, count)
        });
        assert_eq!(got, expected);
    }
}

/// The faults of all ways to run a wrong kernel: (latest completion, the others).
fn faults(mistake: Mistake) -> (Fault, Vec<Option<Fault>>) {
    let (memory, launch, _, _) = problem(3, 5, 2);
    let kernel = kernel(mistake);
    let run = |options: &Options| {
        emulate(&kernel, &launch, &mut memory.clone(), options)
            .err()
            .map(|fault| *fault)
    };
    let first = run(&Options::default()).unwrap_or_else(|| panic!("{mistake:?} is not caught"));
    (first, Options::all(3).iter().map(run).collect())
}

#[test]
fn every_mistake_is_caught() {
    type Expected = fn(&Kind) -> bool;
    let mistakes: [(Mistake, Expected); 15] = [
        (Mistake::FewBytes, |k| {
            matches!(k, Kind::Mbarrier { .. } | Kind::Deadlock { .. })
        }),
        (Mistake::ManyBytes, |k| matches!(k, Kind::Deadlock { .. })),
        (Mistake::FlippedParity, |k| {
            // In step with each other, producer and consumers wait for one another; otherwise...
            matches!(
                k,
                Kind::Deadlock { .. } | Kind::UninitialisedMemory { .. } | Kind::Race { .. }
            )
        }),
        (Mistake::NoEmptyWait, |k| {
            matches!(k, Kind::Race { .. } | Kind::Mbarrier { .. })
        }),
        (Mistake::EarlyRelease, |k| matches!(k, Kind::Race { .. })),
        (Mistake::FewReleases, |k| matches!(k, Kind::Deadlock { .. })),
        (Mistake::NoProxyFence, |k| {
            matches!(k, Kind::ProxyFence { .. })
        }),
        (Mistake::NoBarrier, |k| {
            matches!(k, Kind::Race { .. } | Kind::UninitialisedMemory { .. })
        }),
        (Mistake::NoReadWait, |k| matches!(k, Kind::Race { .. })),
        (Mistake::NoLastWait, |k| {
            matches!(k, Kind::LeftBehind { .. })
        }),
        (Mistake::NoFirstBarrier, |k| {
            matches!(k, Kind::Mbarrier { .. })
        }),
        (Mistake::GreedyRegisters, |k| {
            matches!(k, Kind::Deadlock { .. })
        }),
        (Mistake::ExtraLoad, |k| {
            matches!(
                k,
                Kind::LeftBehind { .. } | Kind::Deadlock { .. } | Kind::Mbarrier { .. }
            )
        }),
        (Mistake::BarrierCount, |k| {
            matches!(k, Kind::NamedBarrier { .. } | Kind::Race { .. })
        }),
        (Mistake::None, |_| false),
    ];
    for (mistake, expected) in mistakes {
        if mistake == Mistake::None {
            continue;
        }
        let (first, others) = faults(mistake);
        println!("{mistake:?}: {first}\n");
        assert!(expected(&first.kind), "{mistake:?}: {first}");
        for fault in &others {
            match fault {
                Some(fault) => assert!(expected(&fault.kind), "{mistake:?}: {fault}"),
                None => panic!("{mistake:?} is not caught in every way"),
            }
        }
    }
}

#[test]
fn deadlocks_tell_who_waits_for_what() {
    let (fault, _) = faults(Mistake::FewReleases);
    let text = fault.to_string();
    for part in [
        "deadlock",
        "warp 0 waits for parity",
        "2 of 8 arrivals",
        "pipeline.rs",
    ] {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
}

/// How long a step takes; run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed_of_a_step() {
    let (memory, launch, _, _) = problem(8, 64, 1);
    let kernel = kernel(Mistake::None);
    for mode in [Completion::Latest, Completion::Earliest] {
        let options = Options {
            mode,
            schedule: Schedule::RoundRobin,
            ..Options::default()
        };
        let mut memory = memory.clone();
        let start = std::time::Instant::now();
        let statistics = emulate(&kernel, &launch, &mut memory, &options).expect("it is right");
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{mode:?}: {:.2} ms a step of 128 x 64 x 64, {:.1} GFLOP/s, {statistics:?}",
            seconds * 1e3 / 512.0,
            statistics.wgmma_flops as f64 / seconds / 1e9
        );
    }
}
