//! Order of the lists of both sides: a thread takes one and counts those that come before it.
//!
//! A key holds what a list costs above its number, the smaller number above the larger: keys differ,
//! and the greatest comes first. All are compared with all, which for hundreds of lists is faster
//! than any sorting.
//!
//! What a list costs is its length; of a video's tiles, the boxes that they are computed by, of which
//! tiles at the borders have fewer. Lists that run together walk through the keys at the same pace only
//! if they cost the same, and only then the next one finds in the L2 cache what the last one has read.

use flex_block_attn_ptx::{Builder, Reg};

use super::{MOST_LINES, Record, THREADS};
use crate::canvas::{Grid, PIECE};

/// Keys in shared memory at a time.
const KEYS: u32 = 1024;
/// Entries of a list that are looked up together.
const ENTRIES: usize = 8;
/// The most that a key has room for.
const MOST_COST: u32 = 0xffff;

/// Thread blocks for one matrix: those for rows, then those for columns.
pub(super) fn blocks(rows: u32, columns: u32) -> u32 {
    rows.div_ceil(THREADS) + columns.div_ceil(THREADS)
}

pub(super) fn body(k: &Builder, canvas: bool) {
    let (rows, columns) = (k.param::<u32>("rows"), k.param::<u32>("columns"));
    let record = Record::new(k);
    let array = |name| record.array(k, name);
    let arrays = |counts, order, lists| Arrays {
        counts: array(counts),
        order: array(order),
        lists: canvas.then(|| array(lists)),
    };
    let of_rows = arrays("row_counts", "row_order", "row_lists");
    let of_columns = arrays("column_counts", "column_order", "column_lists");
    let grid = canvas.then(|| Grid::new(k, PIECE));
    k.set_shared_bytes(4 * KEYS);
    let keys = k.shared_base();

    let row_blocks = (rows + (THREADS - 1)) / THREADS;
    let for_rows = k.cta_x().lt(row_blocks);
    let side = Side {
        lines: for_rows.select(rows, columns),
        entries: for_rows.select(columns, rows),
        arrays: of_rows.or(for_rows, of_columns),
        grid,
    };
    let lines = side.lines;
    let block = k.cta_x() - for_rows.select(0, row_blocks);

    let line = block * THREADS + k.tid();
    let own = side.key(line);
    let mut rank = k.var(0u32);
    k.for_(0, lines, KEYS, |first| {
        for i in 0..KEYS / THREADS {
            let place = k.tid() + i * THREADS;
            k.store_shared(keys + (place << 2), side.key(first + place));
        }
        k.sync_threads();
        k.for_(0, (lines - first).min(KEYS), 8, |place| {
            let at = keys + (place << 2);
            for half in [0, 16] {
                for other in k.load_shareds::<u32, 4>(at.at(half)) {
                    k.where_(other.gt(own), || rank += 1);
                }
            }
        });
        k.sync_threads();
    });
    k.if_(line.lt(lines), || {
        k.store_global(side.arrays.order + rank.times_wide(4), line);
    });
}

/// A side's arrays.
#[derive(Clone, Copy)]
struct Arrays<'k> {
    counts: Reg<'k, u64>,
    order: Reg<'k, u64>,
    /// The lists, if they are looked into.
    lists: Option<Reg<'k, u64>>,
}

impl<'k> Arrays<'k> {
    /// These if `cond` holds, else the others.
    fn or(self, cond: Reg<'k, bool>, others: Self) -> Self {
        let lists = self.lists.zip(others.lists);
        Self {
            counts: cond.select(self.counts, others.counts),
            order: cond.select(self.order, others.order),
            lists: lists.map(|(own, other)| cond.select(own, other)),
        }
    }
}

/// The side of the plan that a thread block has.
struct Side<'k> {
    lines: Reg<'k, u32>,
    /// Places of a list.
    entries: Reg<'k, u32>,
    arrays: Arrays<'k>,
    grid: Option<Grid<'k>>,
}

impl<'k> Side<'k> {
    /// The key of a list; 0, which no list has, if there is none of this number.
    fn key(&self, line: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = line.builder();
        let inside = line.lt(self.lines);
        let [count] =
            k.load_constants_where::<u32, 1>(inside, self.arrays.counts + line.times_wide(4));
        let number = k.var(MOST_LINES as u32) - line;
        let cost = match (self.arrays.lists, &self.grid) {
            (Some(lists), Some(grid)) => {
                let list = lists + (line.times_wide(self.entries) << 2);
                boxes(grid, list, count).min(MOST_COST)
            }
            _ => count,
        };
        inside.select((cost << 16) | number, 0)
    }
}

/// Boxes of a list of tiles. All lanes of a warp come here, each with a list of its own.
fn boxes<'k>(grid: &Grid<'k>, list: Reg<'k, u64>, count: Reg<'k, u32>) -> Reg<'k, u32> {
    let k = count.builder();
    let mut sum = k.var(0u32);
    k.for_(0, count.warp_max(), ENTRIES as u32, |first| {
        let tiles: [_; ENTRIES] = std::array::from_fn(|i| {
            let place = first + i as u32;
            let inside = place.lt(count);
            let [tile] = k.load_constants_where::<u32, 1>(inside, list + place.times_wide(4));
            (inside, tile)
        });
        for (inside, tile) in tiles {
            let (boxes, _) = grid.counts(tile);
            sum += inside.select(boxes, 0);
        }
    });
    sum
}
