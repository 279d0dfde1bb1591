//! Order of the lists of both sides: a thread takes one and counts those that come before it.
//!
//! A key holds a list's length above its number, the smaller number above the larger: keys differ,
//! and the greatest comes first. All are compared with all, which for hundreds of lists is faster
//! than any sorting.

use flex_block_attn_ptx::{Builder, Reg};

use super::{MOST_LINES, Record, THREADS};

/// Keys in shared memory at a time.
const KEYS: u32 = 1024;

/// Thread blocks for one matrix: those for rows, then those for columns.
pub(super) fn blocks(rows: u32, columns: u32) -> u32 {
    rows.div_ceil(THREADS) + columns.div_ceil(THREADS)
}

pub(super) fn body(k: &Builder) {
    let (rows, columns) = (k.param::<u32>("rows"), k.param::<u32>("columns"));
    let record = Record::new(k);
    let array = |name| record.array(k, name);
    let of_rows = [array("row_counts"), array("row_order")];
    let of_columns = [array("column_counts"), array("column_order")];
    k.set_shared_bytes(4 * KEYS);
    let keys = k.shared_base();

    let row_blocks = (rows + (THREADS - 1)) / THREADS;
    let for_rows = k.cta_x().lt(row_blocks);
    let lines = for_rows.select(rows, columns);
    let counts = for_rows.select(of_rows[0], of_columns[0]);
    let order = for_rows.select(of_rows[1], of_columns[1]);
    let block = k.cta_x() - for_rows.select(0, row_blocks);

    let line = block * THREADS + k.tid();
    let own = key(line, lines, counts);
    let mut rank = k.var(0u32);
    k.for_(0, lines, KEYS, |first| {
        for i in 0..KEYS / THREADS {
            let place = k.tid() + i * THREADS;
            k.store_shared(keys + (place << 2), key(first + place, lines, counts));
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
        k.store_global(order + rank.times_wide(4), line);
    });
}

/// The key of a list; 0, which no list has, if there is none of this number.
fn key<'k>(line: Reg<'k, u32>, lines: Reg<'k, u32>, counts: Reg<'k, u64>) -> Reg<'k, u32> {
    let k = line.builder();
    let inside = line.lt(lines);
    let [count] = k.load_constants_where::<u32, 1>(inside, counts + line.times_wide(4));
    let number = k.var(MOST_LINES as u32) - line;
    inside.select((count << 16) | number, 0)
}
