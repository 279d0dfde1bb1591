//! Matrix product `c = a b` of 16-bit matrices: the plainest kernel that uses the whole tile
//! layer, as its proof and as its yardstick. Not used by attention.
//!
//! A producer warp streams tiles of `a` and `b` through two rings; two warpgroups multiply, 64 rows
//! each. Called by tests and by the developers' tool.

use flex_block_attn_ptx::builder::{Pair, TmaOptions, Value};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};
use flex_block_attn_tile::{
    Left, Phases, Place, RegTile, Right, Ring, Shape, Shared, Strides, WARPGROUP, Warpgroup,
};

/// Rows of a thread block's part of c.
const ROWS: u32 = 128;
/// Columns of it.
const COLUMNS: u32 = 256;
/// Length of the inner dimension that a stage holds.
const INNER: u32 = 64;
/// Stages of the rings.
const STAGES: usize = 3;
/// Tiles of rows that are worked on side by side, so that they share b's tiles in the L2 cache.
const GROUP: u32 = 16;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
}

/// A product's operands, all row-major and contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Address of a, m x k.
    pub a: u64,
    /// Address of b, k x n.
    pub b: u64,
    /// Address of c, m x n.
    pub c: u64,
    /// Rows of c, a multiple of 128.
    pub m: u32,
    /// Columns of c, a multiple of 256.
    pub n: u32,
    /// The inner dimension, a multiple of 64, at least 64.
    pub k: u32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        vec![
            Self {
                element: Element::Bf16,
            },
            Self {
                element: Element::F16,
            },
        ]
    }

    fn shape(self, rows: u32, columns: u32) -> Shape {
        Shape::new(rows, columns, self.element)
    }

    /// The launch for some operands.
    ///
    /// # Panics
    /// If m, n or k are not multiples of the tile.
    pub fn launch(self, args: &Args) -> Launch {
        let Args { m, n, k, .. } = *args;
        assert!(
            m % ROWS == 0 && n % COLUMNS == 0 && k % INNER == 0 && k > 0,
            "{args:?}"
        );
        let matrix = |address, rows: u32, columns: u32| {
            let strides = Strides {
                row: columns.into(),
                head: 16,
                batch: 16,
            };
            (address, [1, 1, rows.into(), columns.into()], strides)
        };
        let whole = |shape: Shape, (address, extents, strides)| {
            Arg::TensorMap(shape.tensor_map(address, extents, strides))
        };
        let (address, extents, strides) = matrix(args.c, m, n);
        Launch {
            grid: [m / ROWS * (n / COLUMNS), 1, 1],
            args: vec![
                whole(self.shape(ROWS, INNER), matrix(args.a, m, k)),
                whole(self.shape(INNER, COLUMNS), matrix(args.b, k, n)),
                Arg::TensorMap(self.shape(64, 64).panel_map(address, extents, strides)),
                Arg::U32(m / ROWS),
                Arg::U32(k / INNER),
            ],
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let name = format!("gemm_{:?}", self.element).to_lowercase();
        Builder::kernel(name, 3 * WARPGROUP, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let (a, b, c) = (k.tensor_map("a"), k.tensor_map("b"), k.tensor_map("c"));
        let row_tiles = k.param::<u32>("row_tiles");
        let steps = k.param::<u32>("steps");

        let shared = Shared::new(k);
        let a_ring = Ring::new(&shared, STAGES, self.shape(ROWS, INNER), 8);
        let b_ring = Ring::new(&shared, STAGES, self.shape(INNER, COLUMNS), 8);
        let c_tile = shared.tile(self.shape(ROWS, COLUMNS));
        shared.finish();
        k.if_(k.tid().equals(0), || {
            a_ring.init();
            b_ring.init();
            k.mbarrier_init_fence();
        });
        k.sync_threads();

        let (row, column) = part_of_c(k, row_tiles);
        let at = |row: Reg<'_, u32>, panel: Reg<'_, u32>| Place {
            row: row.operand(),
            panel: panel.operand(),
            head: 0u32.operand(),
            batch: 0u32.operand(),
        };
        k.if_else(
            Warpgroup::number(k).equals(0),
            || {
                Warpgroup::release_registers(k, 40);
                k.if_(k.tid().equals(0), || {
                    let phases = Phases::new(k);
                    let (a_ring, b_ring) = (a_ring.producer(&phases), b_ring.producer(&phases));
                    // A stage's inner length is a's panel, and that many rows of b.
                    in_turn(k, steps, |stage, step| {
                        let options = TmaOptions::default();
                        a_ring.load(stage, a, at(row, step), options);
                        b_ring.load(stage, b, at(step * INNER, column / 64), options);
                    });
                });
            },
            || {
                Warpgroup::acquire_registers(k, 232);
                let wg = Warpgroup::new(k, 1);
                let phases = Phases::new(k);
                let a_ring = a_ring.consumer(wg.leader, &phases);
                let b_ring = b_ring.consumer(wg.leader, &phases);
                let sum = RegTile::uninit(k, COLUMNS);
                sum.fill(0.0);
                in_turn(k, steps, |stage, step| {
                    let (a, b) = (a_ring.wait(stage), b_ring.wait(stage));
                    wg.fence();
                    wg.add_product(&sum, Left::Tile(a.part(wg.index, 64)), Right::Tile(b));
                    // The product before this one is done: its tiles are free.
                    wg.wait(1);
                    let before = (stage + STAGES - 1) % STAGES;
                    k.if_(step.gt(0), || {
                        a_ring.release(before);
                        b_ring.release(before);
                    });
                });
                wg.wait(0);
                let mine = c_tile.part(wg.index, 64);
                wg.store(&sum, pair(self.element), mine);
                wg.sync(wg.index + 1);
                k.if_(wg.first_thread, || {
                    let panels = (0..COLUMNS / 64).map(|panel| column / 64 + panel);
                    mine.store(c, panels.map(|panel| at(row + wg.index * 64, panel)));
                    k.bulk_commit();
                    k.bulk_wait(0);
                });
            },
        );
    }
}

/// First row and column of this thread block's part of c. Blocks go down `GROUP` tiles of rows,
/// then on to the next columns: those that run together share tiles of both operands in L2.
fn part_of_c<'k>(k: &'k Builder, row_tiles: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>) {
    let column_tiles = k.grid_x() / row_tiles;
    let group_tiles = column_tiles * GROUP;
    let first_row = k.cta_x() / group_tiles * GROUP;
    let inside = k.cta_x() % group_tiles;
    // The last group may have fewer rows.
    let rows = (row_tiles - first_row).min(GROUP);
    ((first_row + inside % rows) * ROWS, inside / rows * COLUMNS)
}

/// Does `body` for each of `steps` steps, with its stage of the rings.
fn in_turn<'k>(k: &'k Builder, steps: Reg<'k, u32>, body: impl Fn(usize, Reg<'k, u32>)) {
    let mut step = k.var(0u32);
    k.loop_(|leave| {
        for stage in 0..STAGES {
            leave.when(step.ge(steps));
            body(stage, step);
            step += 1;
        }
    });
}

/// The packed pairs of an element type.
pub(crate) fn pair(element: Element) -> Pair {
    match element {
        Element::F16 => Pair::F16,
        _ => Pair::Bf16,
    }
}
