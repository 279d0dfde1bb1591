//! Where things lie: matrix descriptors, tensor maps, coordinates, addresses, lists.

use flex_block_attn_ptx::ir::{Binary, MatrixA, Op, Operand};
use flex_block_attn_ptx::{Arg, Swizzle, TensorMap};

use crate::edit::Which::{All, Nth, Within};
use crate::edit::{Side, change, descriptors, op};
use crate::{Base, By, Mutation, Setup};

// Arguments of attention, by their parameters' names, and those of the product.
const Q: &str = "q";
const K: &str = "k";
const V: &str = "v";
const OUT: &str = "out";
const OUT_ROW: &str = "out_row_stride";
const OUT_HEAD: &str = "out_head_stride";
const OUT_BATCH: &str = "out_batch_stride";
const LSE: &str = "lse";
const Q_LEN: &str = "q_len";
const PLAN: &str = "plan";
const KV_LEN: &str = "kv_len";
const KV_BLOCK: &str = "kv_block";
const COUNTER: &str = "counter";
const TILES: &str = "jobs";
const TOGETHER: &str = "together";
const APART: &str = "apart";
const Q_BLOCK: &str = "q_block";
const GROUP: &str = "group";
const ORDER: &str = "order";
const FIRST_LIST: &str = "first_list";
const LIST_STRIDE: &str = "list_stride";
const HEAD_RECORD: &str = "head_record";
const BATCH_RECORD: &str = "batch_record";
const A: &str = "a";
const B: &str = "b";
const C: &str = "c";

/// Stride and swizzle of all descriptors, as the tile layer has them.
const HIGH: u64 = 64 | 1 << 30;

fn high(s: &mut Setup, to: u64) -> usize {
    change(
        s.kernel_mut(),
        All,
        op!(Op::Mov {
            src: Operand::Imm(HIGH),
            ..
        }),
        |op| {
            if let Op::Mov { src, .. } = op {
                *src = Operand::Imm(to);
            }
        },
    )
}

/// The argument of a parameter.
pub(crate) fn argument<'s>(s: &'s mut Setup, name: &str) -> &'s mut Arg {
    let index = place(s, name);
    &mut s.launch_mut().args[index]
}

fn place(s: &Setup, name: &str) -> usize {
    let place = s
        .kernel()
        .params
        .iter()
        .position(|param| param.name == name);
    place.unwrap_or_else(|| panic!("no parameter {name}"))
}

/// Changes a tensor map.
fn map(s: &mut Setup, arg: &str, f: impl Fn(&mut TensorMap)) -> usize {
    match argument(s, arg) {
        Arg::TensorMap(map) => {
            f(map);
            1
        }
        _ => 0,
    }
}

pub(crate) fn wide(s: &mut Setup, arg: &str, f: impl Fn(u64) -> u64) -> usize {
    match argument(s, arg) {
        Arg::U64(value) => {
            *value = f(*value);
            1
        }
        _ => 0,
    }
}

/// Changes a number.
pub(crate) fn word(s: &mut Setup, arg: &str, f: impl Fn(u32) -> u32) -> usize {
    match argument(s, arg) {
        Arg::U32(value) => {
            *value = f(*value);
            1
        }
        _ => 0,
    }
}

/// Overwrites a number in memory: the `nth` behind an address.
pub(crate) fn number(s: &mut Setup, arg: &str, nth: u32, value: i32) -> usize {
    match *argument(s, arg) {
        Arg::U64(address) => {
            s.memory.write(address + 4 * u64::from(nth), &[value]);
            1
        }
        _ => 0,
    }
}

/// Overwrites the first block in row 0's list.
fn listed(s: &mut Setup, block: i32) -> usize {
    match *argument(s, FIRST_LIST) {
        Arg::U32(first) => number(s, PLAN, first, block),
        _ => 0,
    }
}

pub fn table() -> Vec<Mutation> {
    let mut table = matrices();
    table.extend(copies());
    table.extend(launches());
    table
}

/// Matrix descriptors.
fn matrices() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "b starts 32 bytes on",
            kind: "descriptor",
            base: Base::Gemm,
            edit: |s| {
                descriptors(s.kernel_mut(), Side::B, op!(Op::Wgmma { .. }), |low| {
                    low + 2
                })
            },
            by: By::Emulator(&["Unsupported", "LiveMbarrier", "UninitialisedMemory", "Race"]),
        },
        Mutation {
            name: "a starts 32 bytes on",
            kind: "descriptor",
            base: Base::Gemm,
            edit: |s| {
                descriptors(s.kernel_mut(), Side::A, op!(Op::Wgmma { .. }), |low| {
                    low + 2
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "the second step along k starts where the first does",
            kind: "descriptor",
            base: Base::Wide,
            edit: |s| {
                descriptors(
                    s.kernel_mut(),
                    Side::B,
                    op!(Op::Wgmma {
                        b_transposed: false,
                        ..
                    }),
                    |low| low & !2,
                )
            },
            by: By::Result,
        },
        Mutation {
            name: "panels of v half as far apart",
            kind: "descriptor",
            base: Base::Wide,
            edit: |s| {
                let of_v = op!(Op::Wgmma {
                    b_transposed: true,
                    ..
                });
                descriptors(s.kernel_mut(), Side::B, of_v, |low| {
                    (low >> 17 << 16) | (low & 0xffff)
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "a descriptor points beyond shared memory",
            kind: "descriptor",
            base: Base::Wide,
            edit: |s| {
                descriptors(s.kernel_mut(), Side::B, op!(Op::Wgmma { .. }), |low| {
                    low + 0x2800
                })
            },
            by: By::Emulator(&["OutOfBounds", "Descriptor"]),
        },
        Mutation {
            name: "groups of rows half as far apart",
            kind: "descriptor",
            base: Base::Wide,
            edit: |s| high(s, 32 | 1 << 30),
            by: By::Result,
        },
        Mutation {
            name: "no swizzle in the descriptors",
            kind: "descriptor",
            base: Base::Short,
            edit: |s| high(s, 64),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a 64-byte swizzle in the descriptors",
            kind: "descriptor",
            base: Base::Gemm,
            edit: |s| high(s, 64 | 2 << 30),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "k is taken for transposed",
            kind: "descriptor",
            base: Base::Wide,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Wgmma {
                        a: MatrixA::Shared { .. },
                        ..
                    }),
                    |op| {
                        if let Op::Wgmma { b_transposed, .. } = op {
                            *b_transposed = true;
                        }
                    },
                )
            },
            by: By::Result,
        },
        Mutation {
            name: "columns of a fragment in reverse",
            kind: "descriptor",
            base: Base::Wide,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Wgmma {
                        a: MatrixA::Registers(_),
                        ..
                    }),
                    |op| {
                        if let Op::Wgmma {
                            a: MatrixA::Registers(registers),
                            ..
                        } = op
                        {
                            registers.reverse();
                        }
                    },
                )
            },
            by: By::Result,
        },
    ]
}

/// Bulk copies.
fn copies() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "rows and panels of loads in each other's place",
            kind: "coordinates",
            base: Base::Wide,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::TmaLoad { .. }), |op| {
                    if let Op::TmaLoad { coordinates, .. } = op {
                        coordinates.swap(1, 2);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "rows and panels of c in each other's place",
            kind: "coordinates",
            base: Base::Gemm,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::TmaStore { .. }), |op| {
                    if let Op::TmaStore { coordinates, .. } = op {
                        coordinates.swap(1, 2);
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a coordinate too few",
            kind: "coordinates",
            base: Base::Gemm,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::TmaLoad { .. }), |op| {
                    if let Op::TmaLoad { coordinates, .. } = op {
                        coordinates.pop();
                    }
                })
            },
            by: By::Emulator(&["Bulk"]),
        },
        Mutation {
            name: "k and v in each other's place",
            kind: "coordinates",
            base: Base::Wide,
            edit: |s| {
                let (k, v) = (place(s, K), place(s, V));
                s.launch_mut().args.swap(k, v);
                1
            },
            by: By::Result,
        },
        Mutation {
            name: "a tile 64 bytes off",
            kind: "shared address",
            base: Base::Wide,
            edit: |s| {
                change(s.kernel_mut(), Nth(0), op!(Op::TmaLoad { .. }), |op| {
                    if let Op::TmaLoad { dst, .. } = op {
                        dst.offset += 64;
                    }
                })
            },
            by: By::Emulator(&["Misaligned"]),
        },
        Mutation {
            name: "the swizzle's pattern 128 bytes off",
            kind: "shared address",
            base: Base::Gemm,
            edit: |s| {
                // Of all panels but the last, behind which there is nothing.
                change(
                    s.kernel_mut(),
                    Within(0, 12),
                    op!(Op::StoreMatrix { .. }),
                    |op| {
                        if let Op::StoreMatrix { address, .. } = op {
                            address.offset ^= 128;
                        }
                    },
                )
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "OutOfBounds"]),
        },
        Mutation {
            name: "stmatrix without a swizzle",
            kind: "shared address",
            base: Base::Gemm,
            edit: |s| {
                // Rows' patterns are all XORed in with one register; parities with constants.
                let swizzles = op!(Op::Binary {
                    op: Binary::Xor,
                    b: Operand::Reg(_),
                    ..
                });
                change(s.kernel_mut(), All, swizzles, |op| {
                    if let Op::Binary { b, .. } = op {
                        *b = Operand::Imm(0);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "a stage loaded over its neighbour",
            kind: "shared address",
            base: Base::Gemm,
            edit: |s| {
                change(s.kernel_mut(), Nth(2), op!(Op::TmaLoad { .. }), |op| {
                    if let Op::TmaLoad { dst, .. } = op {
                        dst.offset -= 128 * 128;
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
    ]
}

/// Launches and plans.
fn launches() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "k lies beyond its memory",
            kind: "out of bounds",
            base: Base::Wide,
            edit: |s| map(s, K, |map| map.address += map.strides[1] * map.dims[1]),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "the map of a starts a row late and is a row too long",
            kind: "out of bounds",
            base: Base::Gemm,
            edit: |s| {
                map(s, A, |map| {
                    map.dims[1] += 1;
                    map.address += map.strides[1];
                })
            },
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "a block of keys that is not there, in a map that is too long",
            kind: "out of bounds",
            base: Base::Wide,
            edit: |s| map(s, K, |map| map.dims[1] *= 2) + listed(s, 6),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            // The copies bring zeros: the hardware does not mind.
            name: "a block of keys that is not there",
            kind: "out of bounds",
            base: Base::Wide,
            edit: |s| listed(s, 6),
            by: By::Result,
        },
        Mutation {
            name: "lse lies beyond its memory",
            kind: "out of bounds",
            base: Base::Short,
            edit: |s| wide(s, LSE, |address| address + 1024),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "lse is not aligned",
            kind: "alignment",
            base: Base::Short,
            edit: |s| wide(s, LSE, |address| address + 2),
            by: By::Emulator(&["Misaligned"]),
        },
        Mutation {
            name: "a tensor map is not aligned",
            kind: "alignment",
            base: Base::Wide,
            edit: |s| map(s, Q, |map| map.address += 8),
            by: By::Emulator(&["Launch"]),
        },
        Mutation {
            name: "too long a row: its list goes on behind the last list",
            kind: "out of bounds",
            base: Base::Wide,
            edit: |s| number(s, PLAN, 0, 600),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "lists too close together",
            kind: "plan",
            base: Base::Wide,
            edit: |s| word(s, LIST_STRIDE, |stride| stride - 1),
            by: By::Result,
        },
        Mutation {
            name: "lists start where the order of rows does",
            kind: "plan",
            base: Base::Wide,
            edit: |s| {
                let order = *argument(s, ORDER);
                *argument(s, FIRST_LIST) = order;
                1
            },
            by: By::Result,
        },
        Mutation {
            name: "rows in the order of their counts",
            kind: "plan",
            base: Base::Wide,
            edit: |s| word(s, ORDER, |_| 0),
            by: By::Result,
        },
        Mutation {
            name: "the mask of another head",
            kind: "plan",
            base: Base::Short,
            edit: |s| word(s, HEAD_RECORD, |_| 0),
            by: By::Result,
        },
        Mutation {
            name: "the mask of another batch",
            kind: "plan",
            base: Base::Ragged,
            edit: |s| word(s, BATCH_RECORD, |_| 0),
            by: By::Result,
        },
        Mutation {
            name: "masks too far apart",
            kind: "plan",
            base: Base::Ragged,
            edit: |s| word(s, BATCH_RECORD, |words| 2 * words),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "each head has keys of its own",
            kind: "plan",
            base: Base::Short,
            edit: |s| word(s, GROUP, |_| 1),
            by: By::Result,
        },
        Mutation {
            name: "blocks of keys of one tile instead of two",
            kind: "plan",
            base: Base::Short,
            edit: |s| word(s, KV_BLOCK, |keys| keys / 2),
            by: By::Result,
        },
        Mutation {
            name: "blocks of one tile of queries instead of two",
            kind: "plan",
            base: Base::Ragged,
            edit: |s| word(s, Q_BLOCK, |block| block / 2),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "keys behind the last",
            kind: "plan",
            base: Base::Ragged,
            edit: |s| word(s, KV_LEN, |keys| keys + 1),
            by: By::Result,
        },
        Mutation {
            name: "queries behind the last",
            kind: "plan",
            base: Base::Ragged,
            edit: |s| word(s, Q_LEN, |queries| queries + 1),
            by: By::Emulator(&["Race", "OutOfBounds"]),
        },
        Mutation {
            name: "a tile of queries too many",
            kind: "plan",
            base: Base::Ragged,
            edit: |s| word(s, TILES, |tiles| tiles + 1),
            by: By::Emulator(&["DivisionByZero"]),
        },
        Mutation {
            name: "of two heads that come together but one does",
            kind: "plan",
            base: Base::Short,
            edit: |s| word(s, TOGETHER, |heads| heads - 1),
            by: By::Result,
        },
        Mutation {
            name: "a tile of the heads that come apart is taken for one of those that come together",
            kind: "plan",
            base: Base::Ragged,
            edit: |s| word(s, APART, |tiles| tiles - 1),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a tile of queries too few",
            kind: "plan",
            base: Base::Ragged,
            edit: |s| word(s, TILES, |tiles| tiles - 2),
            by: By::Result,
        },
        Mutation {
            name: "the counter does not start at zero: a tile is left out",
            kind: "counter",
            base: Base::Ragged,
            edit: |s| number(s, COUNTER, 0, 1),
            by: By::Result,
        },
        Mutation {
            name: "the counter starts below zero: a tile is done twice",
            kind: "counter",
            base: Base::Ragged,
            edit: |s| number(s, COUNTER, 0, -2),
            by: By::Result,
        },
        Mutation {
            name: "thread blocks above others, which do the same",
            kind: "counter",
            base: Base::Short,
            edit: |s| {
                s.launch_mut().grid[1] += 1;
                1
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a thread block too few",
            kind: "plan",
            base: Base::Gemm,
            edit: |s| {
                s.launch_mut().grid[0] -= 1;
                1
            },
            by: By::Emulator(&["DivisionByZero"]),
        },
        Mutation {
            name: "tiles of b have half of their rows",
            kind: "tensor map",
            base: Base::Gemm,
            edit: |s| map(s, B, |map| map.tile[1] /= 2),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "tiles of q have twice their rows",
            kind: "tensor map",
            base: Base::Wide,
            edit: |s| map(s, Q, |map| map.tile[1] *= 2),
            by: By::Emulator(&["LiveMbarrier"]),
        },
        Mutation {
            name: "pieces of keys have twice their rows",
            kind: "tensor map",
            base: Base::Ragged,
            edit: |s| map(s, K, |map| map.tile[1] *= 2),
            by: By::Emulator(&["Race", "Deadlock"]),
        },
        Mutation {
            name: "the map of k has no swizzle",
            kind: "tensor map",
            base: Base::Wide,
            edit: |s| map(s, K, |map| map.swizzle = Swizzle::None),
            by: By::Result,
        },
        Mutation {
            name: "the map of c has a swizzle that its rows do not fit",
            kind: "tensor map",
            base: Base::Gemm,
            edit: |s| map(s, C, |map| map.swizzle = Swizzle::B64),
            by: By::Emulator(&["Launch"]),
        },
        Mutation {
            name: "rows of the output overlap",
            kind: "output's place",
            base: Base::Wide,
            edit: |s| wide(s, OUT_ROW, |bytes| bytes - 16),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "rows of the output lie a column too far apart",
            kind: "alignment",
            base: Base::Wide,
            edit: |s| wide(s, OUT_ROW, |bytes| bytes + 2),
            by: By::Emulator(&["Misaligned"]),
        },
        Mutation {
            name: "rows of the output are aligned to 8 bytes: zeros are stored by 16",
            kind: "alignment",
            base: Base::Wide,
            edit: |s| wide(s, OUT_ROW, |bytes| bytes + 8),
            by: By::Emulator(&["Misaligned"]),
        },
        Mutation {
            name: "the output lies beyond its memory",
            kind: "out of bounds",
            base: Base::Short,
            edit: |s| wide(s, OUT, |address| address + 1024),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "all heads of the output start where the first does",
            kind: "output's place",
            base: Base::Short,
            edit: |s| wide(s, OUT_HEAD, |_| 0),
            by: By::Result,
        },
        Mutation {
            name: "all batches of the output start where the first does",
            kind: "output's place",
            base: Base::Ragged,
            edit: |s| wide(s, OUT_BATCH, |_| 0),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "the output's heads and rows in each other's place",
            kind: "output's place",
            base: Base::Short,
            edit: |s| {
                let (row, head) = (place(s, OUT_ROW), place(s, OUT_HEAD));
                s.launch_mut().args.swap(row, head);
                1
            },
            by: By::Emulator(&["OutOfBounds", "Race"]),
        },
    ]
}
