//! Products of single warps, assembled too.

use flex_block_attn_emulator::Memory;
use flex_block_attn_lab::ptxas::assembled;
use flex_block_attn_ptx::builder::TmaOptions;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Module, print, verify};
use flex_block_attn_tile::{RegTile, Ring, Shape, Shared, WARPGROUP, Warpgroup};

use crate::{check, map, numbers, place, store};

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
        let Self {
            columns,
            inner,
            element,
            lie,
        } = self;
        let name = format!("product_{element:?}_{columns}x{inner}_{lie:?}");
        Builder::kernel(name.to_lowercase(), WARPGROUP, |k| {
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
                loaded.arrive_expect(self.left().bytes());
                left.load(a, place(k, k.var(0u32)), loaded, TmaOptions::default());
                for stage in 0..stages {
                    let (tile, full) = ring.wait_empty(k.var(stage));
                    full.arrive_expect(self.right().bytes());
                    let first = k.var(stage * self.right().rows);
                    tile.load(b, place(k, first), full, TmaOptions::default());
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
                store(k, wg, &sum, out, k.var(0u32));
            });
        })
    }

    fn check(self) {
        let (columns, inner) = (self.columns as usize, self.inner as usize);
        let numbers = |rows: u32, seed| numbers(self.element, rows * self.inner, seed);
        let (a_halves, a) = numbers(ROWS, 1);
        let (b_halves, b) = numbers(RIGHTS * self.columns, 20_000);
        let mut memory = Memory::new();
        let a_map = map(self.left(), memory.alloc_with("a", &a_halves), ROWS);
        let b_at = memory.alloc_with("b", &b_halves);
        let b_map = map(self.right(), b_at, RIGHTS * self.columns);
        let out = memory.alloc_with("out", &vec![0.0f32; ROWS as usize * columns]);
        let kernel = self.kernel();
        verify(&kernel).unwrap_or_else(|error| panic!("{self:?}: {error}"));
        for chosen in 0..RIGHTS {
            let launch = Launch {
                grid: [1; 3],
                args: vec![a_map, b_map, Arg::U64(out), Arg::U32(chosen)],
            };
            let b = &b[chosen as usize * columns * inner..];
            let expected = |row: usize, column: usize| match row as u32 / 16 {
                ABSENT => 0.0,
                _ => {
                    let of = |k| a[row * inner + k] * b[column * inner + k];
                    (0..inner).map(of).sum()
                }
            };
            check(
                &kernel,
                &launch,
                &memory,
                (out, ROWS, self.columns),
                expected,
            );
        }
        let name = kernel.name.clone();
        let kernels = vec![kernel];
        if let Some(report) = assembled(&print(&Module { kernels })) {
            assert_eq!(report.warnings, [""; 0]);
            let entry = report.entry(&name).expect("it was assembled");
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
