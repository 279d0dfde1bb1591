//! Ordinary memory accesses: bounds, alignment, what was never written, matrices, atomics.

use flex_block_attn_emulator::{Kind, Memory};
use flex_block_attn_ptx::{Arg, Builder, Kernel, Reg};

use crate::{caught, launch, results};

/// A kernel of one warp with 1 KB of shared memory and a buffer of 256 bytes, half of it written.
fn kernel(
    body: impl for<'k> FnOnce(&'k Builder, Reg<'k, u64>, Reg<'k, u32>, Reg<'k, u32>),
) -> Kernel {
    Builder::kernel("memory", 32, |k| {
        k.set_shared_bytes(1024);
        let (buffer, smem, tid) = (k.param::<u64>("buffer"), k.shared_base(), k.tid());
        body(k, buffer, smem, tid);
    })
}

fn memory() -> (Memory, u64) {
    let mut memory = Memory::new();
    let buffer = memory.alloc("buffer", 256);
    memory.write(buffer, &[1u32; 32]);
    (memory, buffer)
}

#[track_caller]
fn wrong(kernel: &Kernel, expected: impl Fn(&Kind) -> bool) -> String {
    let (memory, buffer) = memory();
    caught(kernel, &launch(1, &[Arg::U64(buffer)]), &memory, expected).to_string()
}

#[test]
fn global_memory_has_bounds() {
    let text = wrong(
        &kernel(|k, buffer, _, tid| {
            k.store_global(buffer + (tid + 33).times_wide(4), tid);
        }),
        |kind| matches!(kind, Kind::OutOfBounds { .. }),
    );
    assert!(
        text.contains("buffer + 256") && text.contains("lane 31"),
        "{text}"
    );
}

#[test]
fn shared_memory_has_bounds() {
    wrong(
        &kernel(|k, _, smem, tid| k.store_shared((smem + (tid << 5)).at(32), tid)),
        |kind| matches!(kind, Kind::OutOfBounds { place, .. } if place.offset == 1024),
    );
    wrong(
        &kernel(|k, _, _, tid| k.store_shared((tid << 2).at(0), tid)),
        |kind| matches!(kind, Kind::OutOfBounds { .. }),
    );
}

#[test]
fn vectors_must_be_aligned() {
    wrong(
        &kernel(|k, buffer, _, _| {
            k.load_globals::<u32, 4>(buffer.at(8));
        }),
        |kind| matches!(kind, Kind::Misaligned { needed: 16, .. }),
    );
    wrong(
        &kernel(|k, _, smem, tid| k.store_shareds((smem + (tid << 3)).at(4), [tid, tid])),
        |kind| matches!(kind, Kind::Misaligned { needed: 8, .. }),
    );
}

#[test]
fn memory_must_be_written_before_it_is_read() {
    wrong(
        &kernel(|k, buffer, _, tid| {
            k.load_global::<u32>((buffer + tid.times_wide(4)).at(64));
        }),
        |kind| matches!(kind, Kind::UninitialisedMemory { place } if place.offset == 128),
    );
    wrong(
        &kernel(|k, _, smem, tid| {
            k.if_(tid.differs(9), || k.store_shared(smem + (tid << 2), tid));
            k.load_shared::<u32>(smem + (tid << 2));
        }),
        |kind| matches!(kind, Kind::UninitialisedMemory { place } if place.offset == 36),
    );
}

#[test]
fn lanes_may_not_store_to_the_same_bytes() {
    let text = wrong(
        &kernel(|k, _, smem, tid| k.store_shared(smem + ((tid & 15) << 2), tid)),
        |kind| matches!(kind, Kind::LaneOverlap { .. }),
    );
    assert!(text.contains("lanes"), "{text}");
}

#[test]
fn mbarriers_are_not_ordinary_memory() {
    wrong(
        &kernel(|k, _, smem, tid| {
            k.if_(tid.equals(0), || k.mbarrier_init(smem.at(64), 1));
            k.store_shared(smem + (tid << 2), tid);
        }),
        |kind| matches!(kind, Kind::LiveMbarrier { place } if place.offset == 64),
    );
}

#[test]
fn what_is_loaded_as_constant_is_not_written() {
    wrong(
        &kernel(|k, buffer, _, tid| {
            k.load_constant::<u32>(buffer + tid.times_wide(4));
            k.store_global((buffer + tid.times_wide(4)).at(64), tid);
        }),
        |kind| matches!(kind, Kind::ConstantWritten { .. }),
    );
}

#[test]
fn lanes_left_out_of_a_load_get_zeros_and_read_nothing() {
    // The buffer ends behind what the first half of the lanes reads.
    let kernel = Builder::kernel("where", 32, |k| {
        let (buffer, out) = (k.param::<u64>("buffer"), k.param::<u64>("out"));
        let tid = k.tid();
        let far = buffer + tid.times_wide(16);
        let [a, b] = k.load_constants_where::<u32, 2>(tid.lt(16), far);
        let byte = k.load_constant_byte_where(tid.lt(16), far.at(5));
        k.store_globals(out + tid.times_wide(16), [a, b, byte, tid]);
    });
    let (mut memory, _) = memory();
    let words: Vec<u32> = (0..64).map(|i| i * 0x0101).collect();
    let buffer = memory.alloc_with("words", &words);
    let out = memory.alloc("out", 512);
    let args = [Arg::U64(buffer), Arg::U64(out)];
    let got = results(&kernel, &launch(1, &args), &memory, |m| {
        m.read::<u32>(out, 128)
    });
    for (tid, four) in (0..).zip(got.chunks(4)) {
        let first = 4 * tid * 0x0101;
        let read = [first, first + 0x0101, 4 * tid + 1, tid];
        let expected = if tid < 16 { read } else { [0, 0, 0, tid] };
        assert_eq!(four, expected);
    }
}

#[test]
fn narrow_accesses_keep_to_their_bytes() {
    let kernel = Builder::kernel("narrow", 64, |k| {
        k.set_shared_bytes(256);
        let (out, smem, tid) = (k.param::<u64>("out"), k.shared_base(), k.tid());
        // Neighbouring halves of a word belong to different warps: no race.
        let warp = tid >> 5;
        let half = k.uninit::<u16>();
        k.emit(flex_block_attn_ptx::ir::Op::Convert {
            to: flex_block_attn_ptx::Ty::U16,
            from: flex_block_attn_ptx::Ty::U32,
            dst: half.id(),
            src: flex_block_attn_ptx::ir::Operand::Reg((tid + 500).id()),
        });
        k.store_shared(smem + ((tid & 31) << 2) + (warp << 1), half);
        k.sync_threads();
        let word = k.load_shared::<u32>(smem + ((tid & 31) << 2));
        k.if_(tid.lt(32), || k.store_global(out + tid.times_wide(4), word));
    });
    let mut memory = Memory::new();
    let out = memory.alloc("out", 128);
    let got = results(&kernel, &launch(1, &[Arg::U64(out)]), &memory, |m| {
        m.read::<u32>(out, 32)
    });
    assert!((0..32).all(|i| got[i as usize] == (500 + i) | (532 + i) << 16));
}

#[test]
fn matrices_come_back_and_transpose() {
    for transposed in [false, true] {
        let kernel = Builder::kernel("matrices", 32, |k| {
            k.set_shared_bytes(1024);
            let (out, smem, tid) = (k.param::<u64>("out"), k.shared_base(), k.tid());
            let values: [Reg<'_, u32>; 4] = std::array::from_fn(|i| {
                let i = 256 * i as u32;
                (tid * 2 + i) | ((tid * 2 + (i + 1)) << 16)
            });
            k.store_matrices(smem + (tid << 4), values, transposed);
            let back = k.load_matrices::<4>(smem + (tid << 4), false);
            for (i, back) in back.into_iter().enumerate() {
                k.store_global((out + tid.times_wide(4)).at(128 * i as u32), back);
            }
        });
        let mut memory = Memory::new();
        let out = memory.alloc("out", 512);
        let args = [Arg::U64(out)];
        let got = results(&kernel, &launch(1, &args), &memory, |m| {
            m.read::<u16>(out, 256)
        });
        for (i, value) in got.iter().enumerate() {
            let (matrix, row, column) = (i / 64, i % 64 / 8, i % 8);
            let at = if transposed {
                8 * column + row
            } else {
                8 * row + column
            };
            assert_eq!(usize::from(*value), 256 * matrix + at, "{transposed} {i}");
        }
    }
}

#[test]
fn atomics_add_up() {
    let kernel = Builder::kernel("atomics", 64, |k| {
        k.set_shared_bytes(16);
        let (sums, smem, tid) = (k.param::<u64>("sums"), k.shared_base(), k.tid());
        k.if_(tid.equals(0), || k.store_shared(smem, k.var::<u32>(0)));
        k.sync_threads();
        k.atomic_add_shared(smem, tid);
        k.sync_threads();
        k.if_(tid.equals(0), || {
            let sum = k.load_shared::<u32>(smem);
            k.atomic_add_global(sums, sum);
        });
        let one = k.var::<f32>(1.0);
        k.reduce_add_global(sums.at(16), [one, one + 1.0, one, one]);
    });
    let mut memory = Memory::new();
    let sums = memory.alloc_with("sums", &[0u32; 8]);
    let args = [Arg::U64(sums)];
    let (count, floats) = results(&kernel, &launch(5, &args), &memory, |m| {
        (m.read::<u32>(sums, 1), m.read::<f32>(sums + 16, 4))
    });
    assert_eq!(count, [5 * 2016]);
    assert_eq!(floats, [320.0, 640.0, 320.0, 320.0]);
}

#[test]
fn early_kernels_wait_before_they_use_global_memory() {
    let early = |kind: &Kind| matches!(kind, Kind::Early { .. });
    let body = |before: bool, lanes: u32| {
        kernel(|k, buffer, smem, tid| {
            k.store_shared(smem + (tid << 2), tid);
            let store = || k.store_global(buffer + tid.times_wide(4), tid);
            if before {
                store();
            }
            k.if_(tid.lt(lanes), || {
                k.grid_wait();
                store();
            });
        })
    };
    let text = wrong(&body(true, 32), early);
    assert!(text.contains("global memory is used"), "{text}");
    let text = wrong(&body(false, 31), early);
    assert!(
        text.contains("a thread ends") && text.contains("lane 31"),
        "{text}"
    );
    let (memory, buffer) = memory();
    let right = body(false, 32);
    assert!(right.entry().early && !kernel(|_, _, _, _| {}).entry().early);
    let got = results(&right, &launch(1, &[Arg::U64(buffer)]), &memory, |m| {
        m.read::<u32>(buffer, 32)
    });
    assert!(got.into_iter().eq(0..32));
}
