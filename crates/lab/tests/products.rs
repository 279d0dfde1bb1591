//! The tile layer's products of single warps: in the emulator, against float64, and assembled.

use flex_block_attn_emulator::{Memory, Options, emulate};
use flex_block_attn_lab::ptxas::assembled;
use flex_block_attn_ptx::builder::{TmaOptions, Value};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Module, Reg, print, verify};
use flex_block_attn_tile::{Place, RegTile, Ring, Shape, Shared, Strides, WARPGROUP, Warpgroup};
use half::{bf16, f16};

/// Rows of the left operand.
const ROWS: u32 = 64;
/// Right operands in shared memory, of which one is chosen at run time.
const RIGHTS: u32 = 2;
/// The warp that computes nothing: a product of the warpgroup could not do without it.
const ABSENT: u32 = 2;

/// How right operands lie in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    /// Each is a stage of a ring.
    Stages,
    /// They are parts of one tile.
    Parts,
}

/// A product: a left operand, by the chosen one of the right operands.
#[derive(Debug, Clone, Copy)]
struct Problem {
    /// Rows of a right operand: the product's columns.
    columns: u32,
    /// Columns of both operands.
    inner: u32,
    element: Element,
    lie: Lie,
}

impl Problem {
    fn left(self) -> Shape {
        Shape::new(ROWS, self.inner, self.element)
    }

    /// What one copy brings of the right operands.
    fn right(self) -> Shape {
        let rows = match self.lie {
            Lie::Stages => self.columns,
            Lie::Parts => RIGHTS * self.columns,
        };
        Shape::new(rows, self.inner, self.element)
    }

    fn kernel(self) -> Kernel {
        Builder::kernel("product", WARPGROUP, |k| {
            let (a, b) = (k.tensor_map("a"), k.tensor_map("b"));
            let (out, chosen) = (k.param::<u64>("out"), k.param::<u32>("chosen"));
            let stages = match self.lie {
                Lie::Stages => RIGHTS,
                Lie::Parts => 1,
            };
            let shared = Shared::new(k);
            let left = shared.tile(self.left());
            let ring = Ring::new(&shared, stages as usize, self.right(), 4);
            let loaded = shared.barrier(1);
            shared.finish();
            k.if_(k.tid().equals(0), || {
                loaded.init();
                ring.init();
                k.mbarrier_init_fence();
                let at = |row: Reg<'_, u32>| Place {
                    row: row.operand(),
                    panel: 0u32.operand(),
                    head: 0u32.operand(),
                    batch: 0u32.operand(),
                };
                loaded.arrive_expect(self.left().bytes());
                left.load(a, at(k.var(0u32)), loaded, TmaOptions::default());
                for stage in 0..stages {
                    let (tile, full) = ring.wait_empty(k.var(stage));
                    full.arrive_expect(self.right().bytes());
                    let first = k.var(stage * self.right().rows);
                    tile.load(b, at(first), full, TmaOptions::default());
                }
            });
            k.sync_threads();
            loaded.wait_for(k.var(0u32));
            (0..stages).for_each(|stage| _ = ring.wait_full(k.var(stage)));
            let right = match self.lie {
                Lie::Stages => ring.wait_full(chosen),
                Lie::Parts => ring.wait_full(k.var(0u32)).part(chosen, self.columns),
            };
            let wg = Warpgroup::new(k, 0);
            k.if_(wg.warp.differs(ABSENT), || {
                let sum = RegTile::uninit(k, self.columns);
                wg.product_of_warp(&sum, left, right);
                let start = out + (wg.row() * self.columns + (wg.lane & 3) * 2).times_wide(4);
                for (i, (register, second)) in (0u32..).zip(sum.elements()) {
                    let column = 8 * (i / 4) + i % 2;
                    let bytes = 4 * (8 * self.columns * second as u32 + column);
                    k.store_global(start.at(bytes), register);
                }
            });
        })
    }

    /// Elements by chance, as the tensor has them and as they are: multiples of 1/16 below 8, so that
    /// sums of their products are exact in float32, too.
    fn numbers(self, rows: u32, seed: u32) -> (Vec<u16>, Vec<f64>) {
        let one = |i: u32| ((i + seed).wrapping_mul(2_654_435_761) >> 24) as f32 / 16.0 - 8.0;
        let values: Vec<f32> = (0..rows * self.inner).map(one).collect();
        let bits = |x: &f32| match self.element {
            Element::F16 => f16::from_f32(*x).to_bits(),
            _ => bf16::from_f32(*x).to_bits(),
        };
        let halves = values.iter().map(bits).collect();
        (halves, values.into_iter().map(f64::from).collect())
    }

    fn check(self) {
        let (columns, inner) = (self.columns as usize, self.inner as usize);
        let (a_halves, a) = self.numbers(ROWS, 1);
        let (b_halves, b) = self.numbers(RIGHTS * self.columns, 20_000);
        let mut memory = Memory::new();
        let (a_at, b_at) = (
            memory.alloc_with("a", &a_halves),
            memory.alloc_with("b", &b_halves),
        );
        let out = memory.alloc_with("out", &vec![0.0f32; ROWS as usize * columns]);
        let map = |shape: Shape, address, rows: u32| {
            let strides = Strides {
                row: self.inner.into(),
                head: 16,
                batch: 16,
            };
            let extents = [1, 1, rows.into(), self.inner.into()];
            Arg::TensorMap(shape.tensor_map(address, extents, strides))
        };
        let kernel = self.kernel();
        verify(&kernel).unwrap_or_else(|error| panic!("{self:?}: {error}"));
        for chosen in 0..RIGHTS {
            let launch = Launch {
                grid: [1; 3],
                args: vec![
                    map(self.left(), a_at, ROWS),
                    map(self.right(), b_at, RIGHTS * self.columns),
                    Arg::U64(out),
                    Arg::U32(chosen),
                ],
            };
            let b = &b[chosen as usize * columns * inner..];
            for options in Options::all(2) {
                let mut memory = memory.clone();
                if let Err(fault) = emulate(&kernel, &launch, &mut memory, &options) {
                    panic!("{self:?}, {options:?}: {fault}");
                }
                let got = memory.read::<f32>(out, ROWS as usize * columns);
                for (i, got) in got.into_iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let expected: f64 = match row as u32 / 16 {
                        ABSENT => 0.0,
                        _ => (0..inner)
                            .map(|k| a[row * inner + k] * b[column * inner + k])
                            .sum(),
                    };
                    assert_eq!(
                        f64::from(got),
                        expected,
                        "{self:?}, {options:?}, right operand {chosen}: row {row}, column {column}"
                    );
                }
            }
        }
        let kernels = vec![kernel];
        if let Some(report) = assembled(&print(&Module { kernels })) {
            assert_eq!(report.warnings, [""; 0]);
            let entry = report.entry("product").expect("it was assembled");
            assert_eq!((entry.spill_stores, entry.spill_loads), (0, 0), "{self:?}");
        }
    }
}

#[test]
fn a_warp_multiplies_its_rows_alone() {
    for element in [Element::Bf16, Element::F16] {
        for (columns, inner, lie) in [
            (192, 128, Lie::Stages),
            (128, 64, Lie::Stages),
            (128, 128, Lie::Parts),
        ] {
            Problem {
                columns,
                inner,
                element,
                lie,
            }
            .check();
        }
    }
}
