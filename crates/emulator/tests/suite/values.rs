//! Arithmetic, control flow and what the lanes of a warp do together.

use flex_block_attn_emulator::{Kind, Memory};
use flex_block_attn_ptx::{Arg, Builder, Reg};

use crate::{caught, launch, results};

/// What each of the 64 threads of a block makes of its index.
#[track_caller]
fn each(body: impl for<'k> FnOnce(&'k Builder, Reg<'k, u32>) -> Reg<'k, u32>) -> Vec<u32> {
    let kernel = Builder::kernel("each", 64, |k| {
        let out = k.param::<u64>("out");
        let tid = k.tid();
        let value = body(k, tid);
        k.store_global(out + tid.times_wide(4), value);
    });
    let mut memory = Memory::new();
    let out = memory.alloc("out", 256);
    results(&kernel, &launch(1, &[Arg::U64(out)]), &memory, |m| {
        m.read::<u32>(out, 64)
    })
}

#[track_caller]
fn expect(got: &[u32], expected: impl Fn(u32) -> u32) {
    let expected: Vec<u32> = (0..64).map(expected).collect();
    assert_eq!(got, expected);
}

#[test]
fn lanes_loop_as_often_as_they_must() {
    let got = each(|k, tid| {
        let (value, steps) = (k.var::<u32>(tid + 1), k.var::<u32>(0));
        k.loop_(|leave| {
            leave.when(value.equals(1));
            k.if_else(
                (value & 1).equals(0),
                || value.set(value >> 1),
                || value.set(value * 3 + 1),
            );
            steps.set(steps + 1);
        });
        steps
    });
    expect(&got, |tid| {
        let (mut value, mut steps) = (tid + 1, 0);
        while value != 1 {
            value = if value % 2 == 0 {
                value / 2
            } else {
                value * 3 + 1
            };
            steps += 1;
        }
        steps
    });
}

#[test]
fn lanes_leave_outer_loops_from_inside() {
    let got = each(|k, tid| {
        let count = k.var::<u32>(0);
        k.loop_(|outer| {
            k.for_(0, tid + 1, 1, |i| {
                count.set(count + 1);
                k.if_((count + i).gt(90), || outer.now());
            });
            outer.when(count.gt(200));
        });
        count
    });
    expect(&got, |tid| {
        let mut count = 0;
        'outer: loop {
            for i in 0..=tid {
                count += 1;
                if count + i > 90 {
                    break 'outer;
                }
            }
            if count > 200 {
                break;
            }
        }
        count
    });
}

#[test]
fn guards_and_selections() {
    let got = each(|k, tid| {
        let value = k.var::<u32>(7);
        k.where_((tid & 1).equals(0), || value.set(9));
        tid.lt(10).select(value, tid)
    });
    expect(&got, |tid| match tid {
        0..10 => {
            if tid % 2 == 0 {
                9
            } else {
                7
            }
        }
        _ => tid,
    });
}

#[test]
fn integers() {
    let got = each(|_, tid| ((tid * 40503) % 977) / 3 + (tid << 2) + (tid ^ 21).count_ones());
    expect(&got, |tid| {
        tid * 40503 % 977 / 3 + (tid << 2) + (tid ^ 21).count_ones()
    });
}

#[test]
fn floats() {
    let got = each(|_, tid| {
        let x = tid.to_f32() - 20.0;
        (x.fma(0.3, 1.0) * x.exp2() + x.abs().log2().max(-5.0)).to_bits()
    });
    expect(&got, |tid| {
        let x = tid as f32 - 20.0;
        let product = x.mul_add(0.3, 1.0) * f64::from(x).exp2() as f32;
        (product + (f64::from(x.abs()).log2() as f32).max(-5.0)).to_bits()
    });
}

#[test]
fn lanes_exchange_values() {
    let got =
        each(|_, tid| tid.butterfly(5) + tid.uniform() * 100 + tid.from_lane_below(3) * 10_000);
    expect(&got, |tid| {
        let lane = tid % 32;
        let below = if lane >= 3 { tid - 3 } else { tid };
        (tid ^ 5) + tid / 32 * 32 * 100 + below * 10_000
    });
    let got = each(|_, tid| {
        let odd = (tid & 1).equals(1);
        odd.ballot().count_ones()
            + odd.any().select::<u32>(100, 0)
            + odd.all().select::<u32>(1000, 0)
    });
    expect(&got, |_| 116);
    let got = each(|_, tid| tid.warp_sum() + tid.warp_max());
    expect(&got, |tid| {
        if tid < 32 {
            496 + 31
        } else {
            496 + 32 * 32 + 63
        }
    });
}

#[test]
fn shuffles_need_all_lanes() {
    let kernel = Builder::kernel("shuffle", 32, |k| {
        let tid = k.tid();
        k.if_(tid.lt(31), || {
            let _ = tid.butterfly(1);
        });
    });
    let fault = caught(&kernel, &launch(1, &[]), &Memory::new(), |kind| {
        *kind
            == Kind::Divergence {
                active: u32::MAX >> 1,
            }
    });
    assert!(fault.at.contains("values.rs"));
}

#[test]
fn registers_must_be_written_in_every_lane_that_reads() {
    let kernel = Builder::kernel("registers", 32, |k| {
        let tid = k.tid();
        let value = k.uninit::<u32>();
        k.if_(tid.gt(3), || value.set(1));
        k.if_(tid.gt(4), || {
            let _ = value + 1;
        });
        let _ = value + 1;
    });
    caught(&kernel, &launch(1, &[]), &Memory::new(), |kind| {
        matches!(kind, Kind::UninitialisedRegister { .. })
    });
}

#[test]
fn divisions_by_zero_and_traps_are_faults() {
    let kernel = Builder::kernel("division", 32, |k| {
        let tid = k.tid();
        let _ = tid / (tid & 7);
    });
    let fault = caught(&kernel, &launch(1, &[]), &Memory::new(), |kind| {
        *kind == Kind::DivisionByZero
    });
    assert_eq!(fault.lanes, 1);
    let kernel = Builder::kernel("trap", 32, |k| {
        k.if_(k.tid().equals(77), || {
            k.emit(flex_block_attn_ptx::ir::Op::Trap)
        });
        k.emit(flex_block_attn_ptx::ir::Op::Trap);
    });
    caught(&kernel, &launch(1, &[]), &Memory::new(), |kind| {
        *kind == Kind::Trap
    });
}

#[test]
fn launches_must_fit() {
    let kernel = Builder::kernel("launch", 32, |k| {
        k.param::<u64>("x");
    });
    for args in [vec![], vec![Arg::U32(1)], vec![Arg::U64(1), Arg::U64(1)]] {
        caught(&kernel, &launch(1, &args), &Memory::new(), |kind| {
            matches!(kind, Kind::Launch { .. })
        });
    }
}

/// Shadows have room for so many threads: of more, one would be taken for another.
#[test]
fn clusters_of_more_threads_than_are_told_apart_are_refused() {
    let kernel = |cluster: u32| {
        let mut kernel = Builder::kernel("threads", 1024, |k| {
            k.set_shared_bytes(4096);
            k.store_shared(k.shared_base() + (k.tid() << 2), k.tid());
        });
        kernel.cluster = cluster;
        kernel
    };
    results(&kernel(3), &launch(3, &[]), &Memory::new(), |_| ());
    caught(&kernel(4), &launch(4, &[]), &Memory::new(), |kind| {
        matches!(kind, Kind::Launch { .. })
    });
}
