//! wgmma: layouts, operands from registers, accumulation, and the rules of its registers; mma, which
//! a warp performs alone.

use flex_block_attn_emulator::{Kind, Memory};
use flex_block_attn_ptx::builder::{A, Pair};
use flex_block_attn_ptx::ir::Operand;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg, Swizzle, TensorMap};

use crate::{caught, launch, numbers, results, to_bf16};

/// The high word of descriptors of tiles with swizzled rows of 128 bytes, eight of them 1024.
const HIGH: u32 = 64 | 1 << 30;

/// How a 64 x n x 64 product is made.
#[derive(Debug, Clone, Copy)]
struct Shape {
    n: u32,
    a_in_registers: bool,
    /// m contiguous in memory (64 by 64).
    a_transposed: bool,
    /// n contiguous in memory.
    b_transposed: bool,
}

/// What is left out of a right kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    Fence,
    Wait,
    Commit,
    WaitForCopy,
    ReadEarly,
    /// A warp's own product adds to accumulators before the wait.
    MultiplyEarly,
    OverwriteA,
    UninitialisedAccumulator,
    OneWarpLess,
    WrongDescriptor,
    /// What descriptors are made from has the block's rank in its cluster in it.
    RankInDescriptor,
    /// Each warp overwrites its rows of A behind its wait: at once, or (no mistake) when all warps
    /// have waited.
    ReuseA,
    ReuseASynced,
}

/// A product in each block: 128 threads, B at 0 (panels of 64 columns if transposed), A behind it,
/// then the mbarrier. D goes to global memory row by row.
fn product(shape: Shape, mistake: Mistake) -> Kernel {
    let Shape { n, .. } = shape;
    Builder::kernel("product", 128, |k| {
        let b_bytes = n * 128;
        let barrier = b_bytes + 8192;
        k.set_shared_bytes(barrier + 8);
        let (a, b) = (k.tensor_map("a"), k.tensor_map("b"));
        let out = k.param::<u64>("out");
        let smem = k.shared_base();
        let tid = k.tid();
        k.if_(tid.equals(0), || {
            k.mbarrier_init(smem.at(barrier), 1);
            k.mbarrier_init_fence();
        });
        k.sync_threads();
        k.if_(tid.equals(0), || {
            k.mbarrier_arrive_expect(smem.at(barrier), b_bytes + 8192);
            let zero = [Operand::Imm(0), Operand::Imm(0)];
            let dst = smem.at(b_bytes);
            k.tma_load(dst, a, &zero, smem.at(barrier), Default::default());
            if shape.b_transposed {
                for panel in 0..n / 64 {
                    let at = [Operand::Imm(u64::from(64 * panel)), Operand::Imm(0)];
                    let dst = smem.at(8192 * panel);
                    k.tma_load(dst, b, &at, smem.at(barrier), Default::default());
                }
            } else {
                k.tma_load(smem, b, &zero, smem.at(barrier), Default::default());
            }
        });
        if mistake != Mistake::WaitForCopy {
            k.mbarrier_wait(smem.at(barrier), 0);
        }
        let acc: Vec<Reg<'_, f32>> = (0..n / 2)
            .map(|_| match mistake {
                Mistake::UninitialisedAccumulator => k.uninit(),
                _ => k.var(1.0),
            })
            .collect();
        let low = match mistake {
            Mistake::RankInDescriptor => smem >> 4,
            _ => (smem & 0x3_ffff) >> 4,
        };
        let (lane, warp) = (tid & 31, tid >> 5);
        let mut fragments = Vec::new();
        if shape.a_in_registers {
            for step in 0..4 {
                // Rows 16 w + lane % 16, chunk 2 step + lane / 16, swizzled.
                let row = (warp << 4) + (lane & 15);
                let chunk = ((lane >> 4) + 2 * step) ^ (row & 7);
                let address = (smem + (row << 7) + (chunk << 4)).at(b_bytes);
                fragments.push(k.load_matrices::<4>(address, false));
            }
        }
        if mistake != Mistake::Fence {
            k.wgmma_fence();
        }
        for step in 0..4u32 {
            let b_step = if shape.b_transposed { 128 } else { 2 } * step;
            let b_lead = if shape.b_transposed {
                512 << 16
            } else {
                1 << 16
            };
            let shift = if mistake == Mistake::WrongDescriptor {
                1 << 12
            } else {
                0
            };
            let b = (low + (b_step + shift)) + b_lead;
            let a = if shape.a_in_registers {
                A::Registers(fragments[step as usize])
            } else {
                let a_step = if shape.a_transposed { 128 } else { 2 } * step;
                let bits = (low + ((b_bytes >> 4) + a_step + (1 << 16))).join(HIGH);
                A::Shared {
                    descriptor: bits,
                    transposed: shape.a_transposed,
                }
            };
            let accumulate =
                step > 0 || matches!(mistake, Mistake::UninitialisedAccumulator | Mistake::Fence);
            let multiply = || {
                k.wgmma(
                    Element::Bf16,
                    &acc,
                    a,
                    b.join(HIGH),
                    shape.b_transposed,
                    accumulate,
                );
            };
            if mistake == Mistake::OneWarpLess && step == 3 {
                k.if_(warp.differs(2), multiply);
            } else {
                multiply();
            }
            if mistake == Mistake::OverwriteA && step == 3 {
                fragments[0][0].set(0);
            }
        }
        if mistake != Mistake::Commit {
            k.wgmma_commit();
        }
        if mistake == Mistake::ReadEarly {
            let _ = acc[5] + 1.0;
        }
        if mistake == Mistake::MultiplyEarly {
            let sums = [acc[4], acc[5], acc[6], acc[7]];
            k.mma(Element::Bf16, sums, [tid; 4], [tid; 2]);
        }
        if mistake != Mistake::Wait {
            k.wgmma_wait(0);
        }
        if mistake == Mistake::ReuseASynced {
            k.sync_threads();
        }
        if matches!(mistake, Mistake::ReuseA | Mistake::ReuseASynced) {
            k.store_shared((smem + (tid << 6)).at(b_bytes), tid);
        }
        let row = (k.cta_x() << 6) + (warp << 4) + (lane >> 2);
        let start = out + (row * n + ((lane & 3) << 1)).times_wide(4);
        for (i, acc) in acc.iter().enumerate() {
            let i = i as u32;
            k.store_global(
                start.at(4 * (n * 8 * (i >> 1 & 1) + 8 * (i >> 2) + (i & 1))),
                *acc,
            );
        }
    })
}

/// A map of a matrix of `rows` by `columns` bfloat16, in boxes of 64 columns.
fn map(address: u64, rows: u32, columns: u32) -> TensorMap {
    TensorMap {
        element: Element::Bf16,
        address,
        rank: 2,
        dims: [columns.into(), rows.into(), 1, 1, 1],
        strides: [2, u64::from(columns) * 2, 0, 0, 0],
        tile: [64, rows, 1, 1, 1],
        swizzle: Swizzle::B128,
    }
}

/// Memory, launch, output address, expected output.
fn problem(shape: Shape) -> (Memory, Launch, u64, Vec<f32>) {
    let n = shape.n as usize;
    let (a, b) = (numbers(64 * 64, 1), numbers(n * 64, 2));
    let mut memory = Memory::new();
    let a_at = memory.alloc_with("a", &to_bf16(&a));
    let b_at = memory.alloc_with("b", &to_bf16(&b));
    let out = memory.alloc("out", 64 * n * 4);
    let b_map = if shape.b_transposed {
        map(b_at, 64, shape.n)
    } else {
        map(b_at, shape.n, 64)
    };
    let args = [
        Arg::TensorMap(map(a_at, 64, 64)),
        Arg::TensorMap(b_map),
        Arg::U64(out),
    ];
    let mut expected = vec![0.0; 64 * n];
    for row in 0..64 {
        for column in 0..n {
            expected[row * n + column] = (0..64)
                .map(|i| {
                    let a = if shape.a_transposed {
                        a[i * 64 + row]
                    } else {
                        a[row * 64 + i]
                    };
                    a * if shape.b_transposed {
                        b[i * n + column]
                    } else {
                        b[column * 64 + i]
                    }
                })
                .sum();
        }
    }
    (memory, launch(1, &args), out, expected)
}

fn shape(n: u32, a_in_registers: bool, a_transposed: bool, b_transposed: bool) -> Shape {
    Shape {
        n,
        a_in_registers,
        a_transposed,
        b_transposed,
    }
}

#[test]
fn products_are_right_in_every_layout() {
    for shape in [
        shape(64, false, false, false),
        shape(128, false, false, false),
        shape(192, true, false, false),
        shape(128, true, false, true),
        shape(64, false, true, false),
        shape(192, false, true, true),
    ] {
        let (memory, launch, out, expected) = problem(shape);
        let kernel = product(shape, Mistake::None);
        let got = results(&kernel, &launch, &memory, |m| {
            m.read::<f32>(out, expected.len())
        });
        assert_eq!(got, expected, "{shape:?}");
    }
}

#[test]
fn mistakes_around_products_are_caught() {
    let shape = shape(64, true, false, false);
    let (memory, launch, _, _) = problem(shape);
    type Expected = fn(&Kind) -> bool;
    let mistakes: [(Mistake, Expected); 9] = [
        (Mistake::Fence, |kind| {
            matches!(kind, Kind::MissingWgmmaFence { .. })
        }),
        (Mistake::Wait, |kind| {
            matches!(kind, Kind::AccumulatorInFlight { .. })
        }),
        (Mistake::Commit, |kind| {
            matches!(kind, Kind::AccumulatorInFlight { .. })
        }),
        // Which one depends on who comes first.
        (Mistake::WaitForCopy, |kind| {
            matches!(kind, Kind::Race { .. } | Kind::UninitialisedMemory { .. })
        }),
        (Mistake::ReadEarly, |kind| {
            matches!(kind, Kind::AccumulatorInFlight { .. })
        }),
        (Mistake::MultiplyEarly, |kind| {
            matches!(kind, Kind::AccumulatorInFlight { .. })
        }),
        (Mistake::OverwriteA, |kind| {
            matches!(kind, Kind::OperandInFlight { .. })
        }),
        (Mistake::UninitialisedAccumulator, |kind| {
            matches!(kind, Kind::UninitialisedRegister { .. })
        }),
        (Mistake::OneWarpLess, |kind| {
            matches!(kind, Kind::Warpgroup { .. })
        }),
    ];
    for (mistake, expected) in mistakes {
        let fault = caught(&product(shape, mistake), &launch, &memory, expected);
        assert!(fault.at.contains("products.rs"), "{mistake:?}: {fault}");
    }
    caught(
        &product(shape, Mistake::WrongDescriptor),
        &launch,
        &memory,
        |kind| matches!(kind, Kind::OutOfBounds { .. }),
    );
}

/// Panels of columns lie a leading offset apart: a rank in it moves all of them but the first.
#[test]
fn descriptors_do_without_the_rank() {
    let shape = shape(128, true, false, true);
    let (mut memory, mut launch, _, expected) = problem(shape);
    let out = memory.alloc("out of both blocks", 2 * 64 * 128 * 4);
    launch.grid[0] = 2;
    launch.args[2] = Arg::U64(out);
    let run = |mistake| {
        let mut kernel = product(shape, mistake);
        kernel.cluster = 2;
        let got = results(&kernel, &launch, &memory, |m| {
            m.read::<f32>(out, 2 * expected.len())
        });
        let (first, second) = got.split_at(expected.len());
        assert_eq!(first, expected, "{mistake:?}");
        second.to_vec()
    };
    assert_eq!(run(Mistake::None), expected);
    let wrong = run(Mistake::RankInDescriptor);
    for (wrong, right) in wrong.chunks(128).zip(expected.chunks(128)) {
        assert_eq!(wrong[..64], right[..64]);
        assert_ne!(wrong[64..], right[64..]);
    }
}

/// PTX does not say which warp's part of a product reads which rows of A.
#[test]
fn warps_wait_for_each_other_before_they_overwrite_a() {
    let shape = shape(64, false, false, false);
    let (memory, launch, _, _) = problem(shape);
    results(
        &product(shape, Mistake::ReuseASynced),
        &launch,
        &memory,
        |_| (),
    );
    caught(&product(shape, Mistake::ReuseA), &launch, &memory, |kind| {
        matches!(kind, Kind::Race { .. })
    });
}

/// Accumulator fragments, rounded, are the next product's A operand without moving anything.
#[test]
fn accumulators_become_operands() {
    let kernel = Builder::kernel("pack", 32, |k| {
        let out = k.param::<u64>("out");
        let lane = k.lane();
        let pair = (lane.to_f32()).pack(lane.to_f32() + 0.5, Pair::Bf16);
        k.store_global(out + lane.times_wide(4), pair);
    });
    let mut memory = Memory::new();
    let out = memory.alloc("out", 128);
    let got = results(&kernel, &launch(1, &[Arg::U64(out)]), &memory, |m| {
        m.read::<u32>(out, 32)
    });
    for (lane, pair) in got.iter().enumerate() {
        assert_eq!(f32::from_bits(pair << 16), lane as f32);
        assert_eq!(f32::from_bits(pair & 0xffff_0000), lane as f32 + 0.5);
    }
}

/// What is wrong with a warp's own product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// A register of this operand holds nothing.
    UninitialisedSum,
    UninitialisedA,
    UninitialisedB,
    MissingLane,
}

/// A 16 x 8 x 16 product by one warp: a row by row, b column by column, c and the result row by row.
fn product_of_warp(element: Element, flaw: Flaw) -> Kernel {
    Builder::kernel("product_of_warp", 32, |k| {
        let [a, b, c, out] = ["a", "b", "c", "out"].map(|name| k.param::<u64>(name));
        let lane = k.lane();
        let (group, column) = (lane >> 2, (lane & 3) * 2);
        // Pairs along k, of rows of a and of columns of b.
        let [a, b] = [a, b].map(|start| start + (group * 16 + column).times_wide(2));
        let mut a = [0, 256, 16, 256 + 16].map(|bytes| k.load_global::<u32>(a.at(bytes)));
        let mut b = [0, 16].map(|bytes| k.load_global::<u32>(b.at(bytes)));
        let place = (group * 8 + column).times_wide(4);
        let places = [0, 4, 256, 256 + 4];
        let mut sums = places.map(|bytes| k.load_global::<f32>((c + place).at(bytes)));
        match flaw {
            Flaw::UninitialisedSum => sums[2] = k.uninit(),
            Flaw::UninitialisedA => a[3] = k.uninit(),
            Flaw::UninitialisedB => b[1] = k.uninit(),
            Flaw::None | Flaw::MissingLane => {}
        }
        let multiply = || k.mma(element, sums, a, b);
        match flaw {
            Flaw::MissingLane => k.if_(lane.differs(7), multiply),
            _ => multiply(),
        }
        for (bytes, sum) in places.into_iter().zip(sums) {
            k.store_global((out + place).at(bytes), sum);
        }
    })
}

/// Memory, launch, output address, expected output.
fn problem_of_warp(element: Element) -> (Memory, Launch, u64, Vec<f32>) {
    let [a, b, c] = [(256, 1), (128, 2), (128, 3)].map(|(count, seed)| numbers(count, seed));
    let bits = |values: &[f32]| match element {
        Element::F16 => values
            .iter()
            .map(|x| half::f16::from_f32(*x).to_bits())
            .collect(),
        _ => to_bf16(values),
    };
    let mut memory = Memory::new();
    let addresses = [
        memory.alloc_with("a", &bits(&a)),
        memory.alloc_with("b", &bits(&b)),
        memory.alloc_with("c", &c),
        memory.alloc("out", 128 * 4),
    ];
    let mut expected = c;
    for (i, sum) in expected.iter_mut().enumerate() {
        let (row, column) = (i / 8, i % 8);
        for k in 0..16 {
            *sum += a[16 * row + k] * b[16 * column + k];
        }
    }
    let launch = launch(1, &addresses.map(Arg::U64));
    (memory, launch, addresses[3], expected)
}

#[test]
fn a_warp_multiplies_alone() {
    for element in [Element::Bf16, Element::F16] {
        let (memory, launch, out, expected) = problem_of_warp(element);
        let kernel = product_of_warp(element, Flaw::None);
        let got = results(&kernel, &launch, &memory, |m| m.read::<f32>(out, 128));
        assert_eq!(got, expected, "{element:?}");
    }
}

#[test]
fn flaws_of_a_warps_product_are_caught() {
    let (memory, launch, _, _) = problem_of_warp(Element::Bf16);
    let check = |flaw, expected: fn(&Kind) -> bool| {
        let kernel = product_of_warp(Element::Bf16, flaw);
        let fault = caught(&kernel, &launch, &memory, expected);
        assert!(fault.instruction.contains("mma.sync"), "{flaw:?}: {fault}");
    };
    for flaw in [
        Flaw::UninitialisedSum,
        Flaw::UninitialisedA,
        Flaw::UninitialisedB,
    ] {
        check(flaw, |kind| {
            matches!(kind, Kind::UninitialisedRegister { .. })
        });
    }
    check(
        Flaw::MissingLane,
        |kind| matches!(kind, Kind::Divergence { active } if *active == !(1 << 7)),
    );
}
