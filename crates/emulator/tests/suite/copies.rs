//! Bulk copies: tiles in and out, what lies outside of a tensor, multicast, reductions, groups.

use flex_block_attn_emulator::{Kind, Memory};
use flex_block_attn_ptx::builder::TmaOptions;
use flex_block_attn_ptx::ir::{Fence, Operand, Special};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Swizzle, TensorMap};

use crate::{caught, launch, results};

fn map(address: u64, dims: [u64; 2], tile: [u32; 2], swizzle: Swizzle) -> TensorMap {
    TensorMap {
        element: Element::F32,
        address,
        rank: 2,
        dims: [dims[0], dims[1], 0, 0, 0],
        strides: [4, dims[0] * 4, 0, 0, 0],
        tile: [tile[0], tile[1], 0, 0, 0],
        swizzle,
    }
}

fn at(x: i32, y: i32) -> [Operand; 2] {
    [x, y].map(|x| Operand::Imm(u64::from(x as u32)))
}

/// Copies the tile of `from` at (x, y) to that of `to` at (x2, y2), by one thread.
fn copy(from: [i32; 2], to: [i32; 2], bytes: u32, add: bool) -> Kernel {
    Builder::kernel("copy", 32, |k| {
        k.set_shared_bytes(bytes + 8);
        let (source, target) = (k.tensor_map("source"), k.tensor_map("target"));
        let smem = k.shared_base();
        k.if_(k.tid().equals(0), || {
            let barrier = smem.at(bytes);
            k.mbarrier_init(barrier, 1);
            k.fence(Fence::MbarrierInit);
            k.mbarrier_arrive_expect(barrier, bytes);
            k.tma_load(
                smem,
                source,
                &at(from[0], from[1]),
                barrier,
                TmaOptions::default(),
            );
            k.mbarrier_wait(barrier, 0);
            let to = at(to[0], to[1]);
            if add {
                k.tma_reduce_add(target, &to, smem);
            } else {
                k.tma_store(target, &to, smem);
            }
            k.bulk_commit();
            k.bulk_wait_read(0);
        });
    })
}

#[test]
fn tiles_go_in_and_out_under_every_swizzle() {
    for (swizzle, width) in [
        (Swizzle::None, 12),
        (Swizzle::B32, 8),
        (Swizzle::B64, 16),
        (Swizzle::B128, 32),
    ] {
        let tile = [width, 16];
        let values: Vec<f32> = (0..40 * 20).map(|i| i as f32).collect();
        let mut memory = Memory::new();
        let source = memory.alloc_with("source", &values);
        let target = memory.alloc_with("target", &vec![-1.0f32; 40 * 20]);
        let args =
            [source, target].map(|address| Arg::TensorMap(map(address, [40, 20], tile, swizzle)));
        let kernel = copy([-3, 10], [30, -2], width * 16 * 4, false);
        let got = results(&kernel, &launch(1, &args), &memory, |m| {
            m.read::<f32>(target, 800)
        });
        for y in 0..20i32 {
            for x in 0..40i32 {
                let (tx, ty) = (x - 30, y + 2);
                let inside = (0..width as i32).contains(&tx) && (0..16).contains(&ty);
                let (sx, sy) = (tx - 3, ty + 10);
                let expected = if !inside {
                    -1.0
                } else if (0..40).contains(&sx) && (0..20).contains(&sy) {
                    (sy * 40 + sx) as f32
                } else {
                    0.0
                };
                assert_eq!(got[(y * 40 + x) as usize], expected, "{swizzle:?} {x} {y}");
            }
        }
    }
}

#[test]
fn tiles_are_added() {
    let mut memory = Memory::new();
    let source = memory.alloc_with("source", &[1.5f32; 64]);
    let target = memory.alloc_with("target", &[2.0f32; 64]);
    let args = [source, target].map(|a| Arg::TensorMap(map(a, [8, 8], [8, 8], Swizzle::B32)));
    // Several blocks add to the same place: no race.
    let kernel = copy([0, 0], [0, 0], 256, true);
    let got = results(&kernel, &launch(3, &args), &memory, |m| {
        m.read::<f32>(target, 64)
    });
    assert_eq!(got, [6.5; 64]);
    // Several blocks store to the same place: a race.
    caught(
        &copy([0, 0], [0, 0], 256, false),
        &launch(3, &args),
        &memory,
        |kind| matches!(kind, Kind::Race { .. }),
    );
}

#[test]
fn flat_copies_and_reductions() {
    let kernel = Builder::kernel("flat", 32, |k| {
        k.set_shared_bytes(272);
        let (source, target) = (k.param::<u64>("source"), k.param::<u64>("target"));
        let (smem, tid) = (k.shared_base(), k.tid());
        let barrier = smem.at(256);
        k.if_(tid.equals(0), || {
            k.mbarrier_init(barrier, 1);
            k.mbarrier_init_fence();
            k.bulk_load(smem, source, 256, barrier);
            k.mbarrier_arrive_expect(barrier, 256);
        });
        k.warp_sync();
        k.mbarrier_wait(barrier, 0);
        let value = k.load_shared::<f32>(smem + (tid << 2));
        k.store_shared(smem + (tid << 2), value + 1.0);
        k.fence(Fence::ProxyAsyncShared);
        k.warp_sync();
        k.if_(tid.equals(0), || {
            k.bulk_reduce_add::<f32>(target, smem, 128);
            k.bulk_store(target.at(128), smem.at(128), 128);
            k.bulk_commit();
            k.bulk_wait(0);
        });
        k.warp_sync();
        // All is written after a wait without .read.
        k.load_global::<f32>(target + tid.times_wide(4));
    });
    let values: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let mut memory = Memory::new();
    let source = memory.alloc_with("source", &values);
    let target = memory.alloc_with("target", &[10.0f32; 64]);
    let args = [Arg::U64(source), Arg::U64(target)];
    let got = results(&kernel, &launch(1, &args), &memory, |m| {
        m.read::<f32>(target, 64)
    });
    let expected: Vec<f32> = (0..64)
        .map(|i| i as f32 + if i < 32 { 11.0 } else { 0.0 })
        .collect();
    assert_eq!(got, expected);
}

/// Each block of a cluster of two loads half a tile for both.
fn multicast(expected: u32, synchronised: bool) -> Kernel {
    Builder::kernel("multicast", 32, |k| {
        k.set_cluster(2);
        k.set_shared_bytes(2056);
        let source = k.tensor_map("source");
        let out = k.param::<u64>("out");
        let (smem, tid) = (k.shared_base(), k.tid());
        let rank = k.special(Special::ClusterCtaRank);
        let barrier = smem.at(2048);
        k.if_(tid.equals(0), || {
            k.mbarrier_init(barrier, 1);
            k.mbarrier_init_fence();
            k.mbarrier_arrive_expect(barrier, expected);
        });
        if synchronised {
            k.cluster_sync();
        }
        let both = k.var::<u16>(3);
        k.if_(tid.equals(0), || {
            let row = Operand::Reg((rank << 3).id());
            let options = TmaOptions {
                multicast: Some(both),
                hint: None,
            };
            let dst = smem + (rank << 10);
            k.tma_load(dst, source, &[Operand::Imm(0), row], barrier, options);
        });
        k.mbarrier_wait(barrier, 0);
        // A column, through the swizzle: row r, chunk 0 lies at chunk r & 7.
        let row = tid & 15;
        let value = k.load_shared::<f32>(smem + (row << 7) + ((row & 7) << 4));
        let place = (k.cta_x() << 5) + tid;
        k.store_global(out + place.times_wide(4), value);
        k.cluster_sync();
    })
}

#[test]
fn tiles_are_multicast() {
    let values: Vec<f32> = (0..32 * 16).map(|i| i as f32).collect();
    let mut memory = Memory::new();
    let source = memory.alloc_with("source", &values);
    let out = memory.alloc("out", 4 * 32 * 4);
    let args = [
        Arg::TensorMap(map(source, [32, 16], [32, 8], Swizzle::B128)),
        Arg::U64(out),
    ];
    let run = launch(4, &args);
    let got = results(&multicast(2048, true), &run, &memory, |m| {
        m.read::<f32>(out, 128)
    });
    assert!(
        got.iter()
            .enumerate()
            .all(|(i, &x)| x == (i % 16 * 32) as f32),
        "{got:?}"
    );
    caught(&multicast(1024, true), &run, &memory, |kind| {
        matches!(
            kind,
            Kind::Mbarrier { .. } | Kind::UninitialisedMemory { .. } | Kind::Race { .. }
        )
    });
    caught(&multicast(2048, false), &run, &memory, |kind| {
        matches!(kind, Kind::Mbarrier { .. })
    });
}

/// A kernel of one thread with 512 bytes of shared memory, 256 of them written, and a barrier.
#[track_caller]
fn wrong(body: fn(&Builder), expected: impl Fn(&Kind) -> bool) -> String {
    let kernel = Builder::kernel("wrong", 32, |k| {
        k.set_shared_bytes(520);
        k.if_(k.tid().equals(0), || {
            k.mbarrier_init(k.shared_base().at(512), 1);
            k.mbarrier_init_fence();
            body(k);
        });
    });
    let kernel = Kernel {
        params: ["map", "buffer"]
            .map(|name| flex_block_attn_ptx::ir::Param {
                name: name.to_owned(),
                kind: match name {
                    "map" => flex_block_attn_ptx::ir::ParamKind::TensorMap,
                    _ => flex_block_attn_ptx::ir::ParamKind::Scalar(flex_block_attn_ptx::Ty::U64),
                },
            })
            .to_vec(),
        ..kernel
    };
    let mut memory = Memory::new();
    let buffer = memory.alloc_with("buffer", &[1.0f32; 64]);
    let args = [
        Arg::TensorMap(map(buffer, [8, 8], [8, 8], Swizzle::B32)),
        Arg::U64(buffer),
    ];
    caught(&kernel, &launch(1, &args), &memory, expected).to_string()
}

#[test]
fn copies_are_aligned_and_name_their_tensor() {
    wrong(
        |k| {
            let (map, smem) = (k.tensor_map("map"), k.shared_base());
            k.tma_load(
                smem.at(64),
                map,
                &at(0, 0),
                smem.at(512),
                TmaOptions::default(),
            );
        },
        |kind| matches!(kind, Kind::Misaligned { needed: 128, .. }),
    );
    wrong(
        |k| {
            let (map, smem) = (k.tensor_map("map"), k.shared_base());
            k.tma_load(
                smem,
                map + 64,
                &at(0, 0),
                smem.at(512),
                TmaOptions::default(),
            );
        },
        |kind| matches!(kind, Kind::Bulk { .. }),
    );
    wrong(
        |k| {
            k.tensor_map("map");
            let (buffer, smem) = (k.param::<u64>("buffer"), k.shared_base());
            k.bulk_load(smem, buffer.at(8), 16, smem.at(512));
        },
        |kind| matches!(kind, Kind::Misaligned { needed: 16, .. }),
    );
    wrong(
        |k| {
            k.tensor_map("map");
            let (buffer, smem) = (k.param::<u64>("buffer"), k.shared_base());
            k.bulk_load(smem, buffer, 24, smem.at(512));
        },
        |kind| matches!(kind, Kind::Bulk { .. }),
    );
    wrong(
        |k| {
            k.tensor_map("map");
            let (buffer, smem) = (k.param::<u64>("buffer"), k.shared_base());
            k.bulk_store(buffer, smem, 16);
            k.bulk_commit();
            k.bulk_wait(0);
        },
        |kind| matches!(kind, Kind::UninitialisedMemory { .. }),
    );
}

#[test]
fn copies_are_waited_for() {
    wrong(
        |k| {
            let (map, smem) = (k.tensor_map("map"), k.shared_base());
            k.mbarrier_arrive_expect(smem.at(512), 256);
            k.tma_load(smem, map, &at(0, 0), smem.at(512), TmaOptions::default());
        },
        |kind| matches!(kind, Kind::LeftBehind { .. }),
    );
    // Two copies to the same place, and one over what is being read.
    wrong(
        |k| {
            let (map, smem) = (k.tensor_map("map"), k.shared_base());
            k.mbarrier_arrive_expect(smem.at(512), 512);
            for _ in 0..2 {
                k.tma_load(smem, map, &at(0, 0), smem.at(512), TmaOptions::default());
            }
        },
        |kind| matches!(kind, Kind::Race { .. }),
    );
    let text = wrong(
        |k| {
            let (map, smem) = (k.tensor_map("map"), k.shared_base());
            k.mbarrier_arrive_expect(smem.at(512), 256);
            k.tma_load(smem, map, &at(0, 0), smem.at(512), TmaOptions::default());
            k.load_shared::<u32>(smem.at(8));
        },
        |kind| matches!(kind, Kind::Race { .. }),
    );
    assert!(text.contains("a bulk copy on the mbarrier"), "{text}");
}

/// The bulk engine is of the async proxy: that an mbarrier is there must be fenced for it, by
/// either fence, behind the initialisation.
#[test]
fn copies_need_a_fence_behind_the_init_of_their_barrier() {
    let kernel = |before: Option<Fence>, after: Option<Fence>| {
        Builder::kernel("init", 64, |k| {
            let source = k.param::<u64>("source");
            k.set_shared_bytes(128 + 8);
            let (smem, barrier) = (k.shared_base(), k.shared_base().at(128));
            k.if_(k.tid().equals(0), || {
                before.into_iter().for_each(|fence| k.fence(fence));
                k.mbarrier_init(barrier, 1);
                after.into_iter().for_each(|fence| k.fence(fence));
            });
            k.sync_threads();
            k.if_(k.tid().equals(32), || {
                k.mbarrier_arrive_expect(barrier, 128);
                k.bulk_load(smem, source, 128, barrier);
                k.mbarrier_wait(barrier, 0);
            });
        })
    };
    let mut memory = Memory::new();
    let source = memory.alloc_with("source", &[1u32; 32]);
    let launch = launch(1, &[Arg::U64(source)]);
    for fence in [Fence::MbarrierInit, Fence::ProxyAsyncShared] {
        results(&kernel(None, Some(fence)), &launch, &memory, |_| ());
        for wrong in [kernel(None, None), kernel(Some(fence), None)] {
            let fault = caught(&wrong, &launch, &memory, |kind| {
                matches!(kind, Kind::Mbarrier { .. })
            });
            assert!(fault.to_string().contains("fence.mbarrier_init"), "{fault}");
        }
    }
}
