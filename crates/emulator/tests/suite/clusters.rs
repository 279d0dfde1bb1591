//! Addresses in clusters: the rank that they carry, and what they may name.

use flex_block_attn_emulator::{Kind, Memory};
use flex_block_attn_ptx::builder::{AddressOf, TmaOptions};
use flex_block_attn_ptx::ir::{AtomicOp, Cache, Fence, Op, Operand, Scope, Space, Special};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg, Swizzle, TensorMap, Ty};

use crate::{caught, launch, results};

/// Loads a word by a shared::cluster address.
#[track_caller]
fn load<'k>(k: &'k Builder, address: impl AddressOf<u32>) -> Reg<'k, u32> {
    let value = k.uninit::<u32>();
    k.emit(Op::Load {
        space: Space::Cluster,
        cache: Cache::Default,
        ty: Ty::U32,
        dst: vec![value.id()],
        address: address.address(),
    });
    value
}

/// Adds to a word at an address.
#[track_caller]
fn add(k: &Builder, space: Space, address: impl AddressOf<u32>, value: u32) {
    k.emit(Op::Reduce {
        op: AtomicOp::Add,
        scope: Scope::Cluster,
        space,
        ty: Ty::U32,
        address: address.address(),
        src: vec![Operand::Imm(value.into())],
    });
}

#[test]
fn own_addresses_carry_the_rank() {
    let addresses = |cluster: u32| {
        let kernel = Builder::kernel("addresses", 32, |k| {
            k.set_cluster(cluster);
            k.set_shared_bytes(16);
            let (out, smem) = (k.param::<u64>("out"), k.shared_base());
            let last = k.map_shared(smem + 8, cluster - 1);
            let out = out + (k.cta_x() * 2).times_wide(4);
            k.if_(k.tid().equals(0), || {
                k.store_global(out, smem);
                k.store_global(out.at(4), last);
            });
        });
        let mut memory = Memory::new();
        let out = memory.alloc("out", 4 * 8);
        results(&kernel, &launch(4, &[Arg::U64(out)]), &memory, |m| {
            m.read::<u32>(out, 8)
        })
    };
    let base = addresses(1)[0];
    assert!(base < 1 << 18, "descriptors have room for it: {base:#x}");
    assert_eq!(addresses(1), [base, base + 8].repeat(4));
    for cluster in [2, 4] {
        let last = (cluster - 1) << 24 | (base + 8);
        let expected: Vec<u32> = (0..4)
            .flat_map(|block| [(block % cluster) << 24 | base, last])
            .collect();
        assert_eq!(addresses(cluster), expected);
    }
}

/// Each block reads, writes and adds to words of the other, by mapped addresses, and of its own, by
/// its own addresses.
#[test]
fn addresses_name_a_block_of_the_cluster() {
    let kernel = Builder::kernel("exchange", 32, |k| {
        k.set_cluster(2);
        k.set_shared_bytes(32);
        let (out, smem) = (k.param::<u64>("out"), k.shared_base());
        let rank = k.special(Special::ClusterCtaRank);
        let other = k.map_shared(smem, rank ^ 1);
        let number = k.cta_x() + 10;
        k.if_(k.tid().equals(0), || {
            k.mbarrier_init(smem, 1);
            k.mbarrier_init_fence();
            k.store_shared(smem.at(8), number);
            k.store_shared(smem.at(16), number);
        });
        k.cluster_sync();
        k.if_(k.tid().equals(0), || {
            let (theirs, mine) = (load(k, other.at(8)), load(k, smem.at(8)));
            k.store_cluster(other.at(12), number * 10);
            add(k, Space::Cluster, other.at(16), 100);
            k.mbarrier_arrive_remote_release(other);
            k.mbarrier_wait_for_block(smem, 0);
            add(k, Space::Shared, smem.at(16), 1000);
            let out = out + (k.cta_x() * 4).times_wide(4);
            let (stored, sum) = (k.load_shared(smem.at(12)), k.load_shared(smem.at(16)));
            for (i, value) in [theirs, mine, stored, sum].into_iter().enumerate() {
                k.store_global(out.at(4 * i as u32), value);
            }
        });
        k.cluster_sync();
    });
    let mut memory = Memory::new();
    let out = memory.alloc("out", 4 * 4 * 4);
    let got = results(&kernel, &launch(4, &[Arg::U64(out)]), &memory, |m| {
        m.read::<u32>(out, 16)
    });
    let expected: Vec<u32> = (10..14)
        .flat_map(|own| {
            let other = ((own - 10) ^ 1) + 10;
            [other, own, other * 10, own + 1100]
        })
        .collect();
    assert_eq!(got, expected);
}

/// What wrong kernels work with.
#[derive(Clone, Copy)]
struct Parts<'k> {
    k: &'k Builder,
    map: Reg<'k, u64>,
    buffer: Reg<'k, u64>,
    /// The block's own 256 words, and its mbarrier.
    smem: Reg<'k, u32>,
    barrier: Reg<'k, u32>,
    /// The other block's.
    other: Reg<'k, u32>,
    other_barrier: Reg<'k, u32>,
}

/// What a thread does with them.
type Body = fn(Parts<'_>);

/// A cluster of two, the second block of which does something wrong.
fn problem(body: impl Fn(Parts<'_>)) -> (Kernel, Launch, Memory) {
    let kernel = Builder::kernel("wrong", 32, |k| {
        k.set_cluster(2);
        k.set_shared_bytes(1032);
        let (map, buffer) = (k.tensor_map("map"), k.param::<u64>("buffer"));
        let rank = k.special(Special::ClusterCtaRank);
        let smem = k.shared_base();
        let barrier = smem + 1024;
        let [other, other_barrier] = [smem, barrier].map(|own| k.map_shared(own, rank ^ 1));
        k.for_(0, 8, 1, |i| {
            k.store_shared(smem + (i << 7) + (k.tid() << 2), i);
        });
        k.fence(Fence::ProxyAsyncShared);
        k.if_(k.tid().equals(0), || {
            k.mbarrier_init(barrier, 1);
            k.mbarrier_init_fence();
        });
        k.cluster_sync();
        k.if_(k.cta_x().equals(1), || {
            body(Parts {
                k,
                map,
                buffer,
                smem,
                barrier,
                other,
                other_barrier,
            });
        });
        k.cluster_sync();
    });
    let mut memory = Memory::new();
    let buffer = memory.alloc_with("buffer", &[1.0f32; 64]);
    let map = TensorMap {
        element: Element::F32,
        address: buffer,
        rank: 2,
        dims: [8, 8, 0, 0, 0],
        strides: [4, 32, 0, 0, 0],
        tile: [8, 8, 0, 0, 0],
        swizzle: Swizzle::None,
    };
    let args = [Arg::TensorMap(map), Arg::U64(buffer)];
    (kernel, launch(2, &args), memory)
}

#[track_caller]
fn wrong(body: impl Fn(Parts<'_>), expected: impl Fn(&Kind) -> bool) -> String {
    let (kernel, launch, memory) = problem(body);
    caught(&kernel, &launch, &memory, expected).to_string()
}

/// What a body does, and only one thread.
fn by_one(body: impl Fn(Parts<'_>)) -> impl Fn(Parts<'_>) {
    move |parts| parts.k.if_(parts.k.tid().equals(0), || body(parts))
}

#[test]
fn own_shared_memory_is_not_at_anothers_address() {
    let foreign: [(&str, Body); 11] = [
        ("load", |p| _ = p.k.load_shared::<u32>(p.other)),
        ("store", |p| p.k.store_shared(p.other, p.k.var(1u32))),
        ("atomic", |p| add(p.k, Space::Shared, p.other, 1)),
        ("init", |p| p.k.mbarrier_init(p.other, 1)),
        ("arrive", |p| p.k.mbarrier_arrive(p.other_barrier)),
        ("expect", |p| {
            p.k.mbarrier_arrive_expect(p.other_barrier, 256);
        }),
        ("wait", |p| p.k.mbarrier_wait(p.other_barrier, 1)),
        ("bulk load", |p| {
            p.k.mbarrier_arrive_expect(p.barrier, 256);
            p.k.bulk_load(p.other, p.buffer, 256, p.barrier);
        }),
        ("its barrier", |p| {
            p.k.bulk_load(p.smem, p.buffer, 256, p.other_barrier);
        }),
        ("multicast", |p| {
            p.k.mbarrier_arrive_expect(p.barrier, 256);
            let zero = [Operand::Imm(0), Operand::Imm(0)];
            let options = TmaOptions {
                multicast: Some(p.k.var::<u16>(3)),
                hint: None,
            };
            p.k.tma_load(p.other, p.map, &zero, p.barrier, options);
        }),
        ("tensor store", |p| {
            let zero = [Operand::Imm(0), Operand::Imm(0)];
            p.k.tma_store(p.map, &zero, p.other);
            p.k.bulk_commit();
            p.k.bulk_wait(0);
        }),
    ];
    let check = |what: &str, text: String| {
        let problem = "block [1, 0, 0] (rank 1 of its cluster)";
        assert!(text.contains(problem), "{what}: {text}");
    };
    for (what, body) in foreign {
        let text = wrong(by_one(body), |kind| {
            matches!(kind, Kind::OutOfBounds { .. })
        });
        check(what, text);
    }
    // All lanes give addresses.
    let text = wrong(
        |p| _ = p.k.load_matrices::<1>(p.other + (p.k.tid() << 4), false),
        |kind| matches!(kind, Kind::OutOfBounds { .. }),
    );
    check("ldmatrix", text);
}

#[test]
fn addresses_name_no_block_beyond_the_cluster() {
    wrong(by_one(|p| _ = load(p.k, p.smem + (1 << 24))), |kind| {
        matches!(kind, Kind::OutOfBounds { .. })
    });
    // Only one's own addresses are mapped, to ranks that there are.
    let bodies: [Body; 2] = [
        |p| _ = p.k.map_shared(p.other, 0),
        |p| _ = p.k.map_shared(p.smem, 2),
    ];
    for body in bodies {
        wrong(by_one(body), |kind| {
            matches!(kind, Kind::ClusterBarrier { .. })
        });
    }
}

/// Block 1 stores a word in block 0 and arrives there; of block 0 one thread waits, and another one, which
/// it syncs with, reads the word.
fn handed_over(releases: bool, acquires: bool) -> (Kernel, Launch, Memory, u64) {
    let kernel = Builder::kernel("handed_over", 64, |k| {
        k.set_cluster(2);
        k.set_shared_bytes(16);
        let (out, smem) = (k.param::<u64>("out"), k.shared_base());
        let rank = k.special(Special::ClusterCtaRank);
        k.if_(k.tid().equals(0), || {
            k.mbarrier_init(smem, 1);
            k.mbarrier_init_fence();
        });
        k.cluster_sync();
        k.if_(k.tid().equals(0) & rank.equals(1), || {
            let first = k.map_shared(smem, 0);
            k.store_cluster(first.at(8), k.var(7u32));
            match releases {
                true => k.mbarrier_arrive_remote_release(first),
                false => k.mbarrier_arrive_remote(first),
            }
        });
        k.if_(rank.equals(0), || {
            k.if_(k.tid().equals(0), || match acquires {
                true => k.mbarrier_wait_for_block(smem, 0),
                false => k.mbarrier_wait(smem, 0),
            });
            k.sync_threads();
            k.if_(k.tid().equals(33), || {
                k.store_global(out, k.load_shared::<u32>(smem.at(8)));
            });
        });
        k.cluster_sync();
    });
    let mut memory = Memory::new();
    let out = memory.alloc("out", 4);
    (kernel, launch(2, &[Arg::U64(out)]), memory, out)
}

#[test]
fn what_another_block_stored_is_seen_in_the_clusters_scope_only() {
    let (kernel, launch, memory, out) = handed_over(true, true);
    let got = results(&kernel, &launch, &memory, |m| m.read::<u32>(out, 1));
    assert_eq!(got, [7]);
    for (releases, acquires) in [(false, true), (true, false), (false, false)] {
        let (kernel, launch, memory, _) = handed_over(releases, acquires);
        let fault = caught(&kernel, &launch, &memory, |kind| {
            matches!(kind, Kind::Scope { .. })
        });
        let text = fault.to_string();
        assert!(text.contains(".release.cluster"), "{text}");
        assert!(text.contains("block [1, 0, 0]"), "{text}");
    }
}
