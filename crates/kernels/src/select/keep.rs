//! Scores, and the best of each row: a thread block has eight rows of queries, and keeps their scores with
//! all keys in shared memory.
//!
//! Scores: a thread has a key of 128 at a time, and its products with all eight queries. Tiles of keys and
//! queries come through shared memory, 32 features at a time.
//!
//! The best: scores are kept as integers of the same order, of which a warp finds the one of rank `top`,
//! from the highest bit to the lowest: as many of them as `top` are at least this one. Whatever is above is
//! kept, and of those that equal it the first.

use flex_block_attn_ptx::{Builder, Reg};

use super::{inverse_norm, warp_sum};

const WARPS: u32 = 4;
pub(super) const THREADS: u32 = 32 * WARPS;
/// Rows of a thread block.
const ROWS: u32 = 8;
/// Keys that are multiplied at a time, one for each thread.
const KEYS: u32 = THREADS;
/// Features at a time, and their bytes.
const FEATURES: u32 = 32;
const SLICE: u32 = 4 * FEATURES;
/// Bytes from a key to the next: a multiple of 16, but not of 32, lest neighbours be in one bank.
const KEY_BYTES: u32 = SLICE + 16;
/// Shared memory of a multiprocessor, and what it keeps for itself with each thread block.
const SHARED: u32 = 228 << 10;
const RESERVED: u32 = 1 << 10;
/// Thread blocks of a multiprocessor at most.
const MOST_BLOCKS: u32 = 5;
/// Columns of the mask whose loads are under way together, by 32.
const STEPS: usize = 4;

/// Thread blocks for so many rows of the mask.
pub(super) fn thread_blocks(rows: u32) -> u32 {
    rows.div_ceil(ROWS)
}

pub(super) fn body(k: &Builder, weighed: bool, room: u32) {
    let (q, keys) = (k.param::<u64>("q"), k.param::<u64>("k"));
    let mask = Mask::new(k);
    let (tiles, blocks) = (mask.tiles, mask.blocks);
    let features = k.param::<u32>("features");
    let (top, block) = (k.param::<u32>("top"), k.param::<u32>("block"));
    let (kv_heads, group) = (k.param::<u32>("kv_heads"), k.param::<u32>("group"));
    let weights = weighed.then(|| k.param::<u64>("weights"));

    let shared = k.shared_base();
    let slices = shared + ROWS * room * 4;
    let room = Room {
        first: shared,
        row_bytes: room * 4,
    };
    let queries = slices + KEYS * KEY_BYTES;
    let norms = queries + ROWS * SLICE;
    let shared_bytes = ROWS * room.row_bytes + KEYS * KEY_BYTES + ROWS * SLICE + 4 * ROWS;
    k.set_shared_bytes(shared_bytes);
    // Thread blocks that wait for memory in turn, as many as there is room for; beyond that registers would
    // not suffice.
    k.set_min_blocks((SHARED / (shared_bytes + RESERVED)).min(MOST_BLOCKS));

    let first_row = k.cta_x() * ROWS;
    let kv_line = k.cta_z() * kv_heads + k.cta_y() / group;
    let scores = Scores {
        k,
        q: q + (mask.line.times_wide(tiles) + first_row.to_u64()) * features.to_u64() * 4u64,
        rows: tiles - first_row.min(tiles),
        keys: keys + kv_line.times_wide(tiles) * features.to_u64() * 4u64,
        tiles,
        features,
        weights: weights.map(|weights| weights + (kv_line.times_wide(tiles) << 3)),
        slices,
        queries,
        norms,
    };
    // Rows of text have no scores.
    k.if_(first_row.lt(tiles), || scores.write(room));
    k.sync_threads();

    let seen = mask.seen(block);
    k.for_(k.tid() >> 5, ROWS, WARPS, |index| {
        let row = first_row + index;
        k.if_(row.lt(blocks), || {
            let own = room.row(index);
            let best = Best::none(k, row.lt(tiles).select(tiles, 0));
            k.if_(row.lt(tiles), || best.find(own, top));
            mask.write(row, own, &best, seen);
        });
    });
}

/// Where scores are kept.
#[derive(Clone, Copy)]
struct Room<'k> {
    first: Reg<'k, u32>,
    row_bytes: u32,
}

impl<'k> Room<'k> {
    fn row(self, index: Reg<'k, u32>) -> Reg<'k, u32> {
        self.first + index * self.row_bytes
    }
}

/// The products of this thread block's queries with all keys.
struct Scores<'k> {
    k: &'k Builder,
    /// The first of the queries, and how many there are, or more.
    q: Reg<'k, u64>,
    rows: Reg<'k, u32>,
    keys: Reg<'k, u64>,
    tiles: Reg<'k, u32>,
    features: Reg<'k, u32>,
    /// Of keys, two numbers each.
    weights: Option<Reg<'k, u64>>,
    /// In shared memory: some features of keys and of queries, and 1 over the queries' norms.
    slices: Reg<'k, u32>,
    queries: Reg<'k, u32>,
    norms: Reg<'k, u32>,
}

impl<'k> Scores<'k> {
    /// Writes them, as integers of the same order; zeros, which no score is, for keys that fill up the
    /// last of those that come together.
    fn write(&self, room: Room<'k>) {
        let (k, tid) = (self.k, self.k.tid());
        if self.weights.is_some() {
            // Read behind the barriers of the products.
            self.write_norms();
        }
        k.for_(0, self.tiles, KEYS, |first| {
            let products = [0.0f32; ROWS as usize].map(|zero| k.var(zero));
            k.for_(0, self.features, FEATURES, |feature| {
                self.load(first, feature);
                self.multiply(products);
            });
            let column = first + tid;
            let inside = column.lt(self.tiles);
            let weight = self.weights.map(|weights| {
                k.load_constants_where::<f32, 2>(inside, weights + column.times_wide(8))
            });
            for (row, product) in (0..).zip(products) {
                let score = match weight {
                    None => product,
                    Some([factor, more]) => {
                        let norm = k.load_shared::<f32>(self.norms.at(4 * row));
                        (product * norm).fma(factor, more)
                    }
                };
                let at = room.first + (column << 2);
                k.store_shared(
                    at.at(row * room.row_bytes),
                    inside.select(ordered(score), 0),
                );
            }
        });
    }

    /// Leaves 1 over each query's norm in shared memory.
    fn write_norms(&self) {
        let (k, lane) = (self.k, self.k.lane());
        k.for_(k.tid() >> 5, ROWS, WARPS, |row| {
            let mut squares = k.var(0.0f32);
            k.for_(lane, self.features, 32, |feature| {
                let at = self.q + (row * self.features + feature).times_wide(4);
                let [x] = k.load_constants_where::<f32, 1>(row.lt(self.rows), at);
                squares += x * x;
            });
            let inverse = inverse_norm(k, warp_sum(squares));
            k.where_(lane.equals(0), || {
                k.store_shared(self.norms + (row << 2), inverse)
            });
        });
    }

    /// Brings features from `feature` on, of all queries and of the keys from `first` on.
    fn load(&self, first: Reg<'k, u32>, feature: Reg<'k, u32>) {
        // A thread has 16 bytes of a row, and of each so many behind.
        const TOGETHER: u32 = 4 * THREADS / FEATURES;
        let (k, tid) = (self.k, self.k.tid());
        let (row, part) = (tid / (FEATURES / 4), tid % (FEATURES / 4) * 16);
        let slice = |rows: Reg<'k, u64>, row: Reg<'k, u32>| {
            rows + (row * self.features + feature).times_wide(4) + part.to_u64()
        };
        let keys: [_; (KEYS / TOGETHER) as usize] = std::array::from_fn(|i| {
            let number = first + row + i as u32 * TOGETHER;
            k.load_constants_where::<f32, 4>(number.lt(self.tiles), slice(self.keys, number))
        });
        let has_query = row.lt(ROWS);
        let inside = has_query & row.lt(self.rows);
        let query = k.load_constants_where::<f32, 4>(inside, slice(self.q, row));
        // The features before have been multiplied.
        k.sync_threads();
        for (i, key) in (0..).zip(keys) {
            let at = self.slices + row * KEY_BYTES + part;
            k.store_shareds(at.at(i * TOGETHER * KEY_BYTES), key);
        }
        k.if_(has_query, || {
            k.store_shareds(self.queries + row * SLICE + part, query)
        });
        k.sync_threads();
    }

    /// Adds what they multiply to.
    fn multiply(&self, products: [Reg<'k, f32>; ROWS as usize]) {
        let k = self.k;
        let own = self.slices + k.tid() * KEY_BYTES;
        let mut sums = products;
        for part in (0..SLICE).step_by(16) {
            let key: [Reg<'k, f32>; 4] = k.load_shareds(own.at(part));
            for (row, sum) in (0..).zip(&mut sums) {
                let query: [Reg<'k, f32>; 4] = k.load_shareds(self.queries.at(row * SLICE + part));
                for (q, key) in query.into_iter().zip(key) {
                    *sum = q.fma(key, *sum);
                }
            }
        }
        for (product, sum) in products.into_iter().zip(sums) {
            product.set(sum);
        }
    }
}

/// An integer for a score: the larger the one, the larger the other.
fn ordered(score: Reg<'_, f32>) -> Reg<'_, u32> {
    const SIGN: u32 = 1 << 31;
    let bits = score.to_bits();
    bits.ge(SIGN).select(!bits, bits | SIGN)
}

/// What a row keeps, the same in all lanes: scores above a threshold, and the first of those that equal
/// it.
struct Best<'k> {
    k: &'k Builder,
    /// Scores that there are.
    count: Reg<'k, u32>,
    threshold: Reg<'k, u32>,
    equal: Reg<'k, u32>,
}

impl<'k> Best<'k> {
    /// Nothing yet.
    fn none(k: &'k Builder, count: Reg<'k, u32>) -> Self {
        Self {
            k,
            count,
            threshold: k.var(u32::MAX),
            equal: k.var(0u32),
        }
    }

    /// Keeps so many of a row's scores.
    fn find(&self, row: Reg<'k, u32>, top: Reg<'k, u32>) {
        let Self { k, threshold, .. } = *self;
        threshold.set(0u32);
        let bit = k.var(1u32 << 31);
        k.loop_(|leave| {
            let candidate = threshold | bit;
            let enough = self.count(row, |score| score.ge(candidate)).ge(top);
            threshold.set(enough.select(candidate, threshold));
            bit.set(bit >> 1);
            leave.when(bit.equals(0));
        });
        let above = self.count(row, |score| score.gt(threshold));
        self.equal.set(top - above);
    }

    /// Of how many scores something holds.
    fn count(
        &self,
        row: Reg<'k, u32>,
        holds: impl Fn(Reg<'k, u32>) -> Reg<'k, bool>,
    ) -> Reg<'k, u32> {
        let k = self.k;
        let mut count = k.var(0u32);
        k.for_(0, self.count, KEYS, |first| {
            let at = row + ((first + k.lane() * 4) << 2);
            for score in k.load_shareds::<u32, 4>(at) {
                k.where_(holds(score), || count += 1);
            }
        });
        count.warp_sum()
    }
}

/// The mask of this thread block's head, in its batch.
struct Mask<'k> {
    k: &'k Builder,
    base: Reg<'k, u64>,
    text_lengths: Reg<'k, u64>,
    mask: Reg<'k, u64>,
    tiles: Reg<'k, u32>,
    blocks: Reg<'k, u32>,
    /// The head, among those of all batches.
    line: Reg<'k, u32>,
}

impl<'k> Mask<'k> {
    /// Declares its parameters.
    fn new(k: &'k Builder) -> Self {
        let (base, text_lengths) = (k.param("base"), k.param("text_lengths"));
        Self {
            k,
            base,
            text_lengths,
            mask: k.param("mask"),
            tiles: k.param("tiles"),
            blocks: k.param("blocks"),
            line: k.cta_z() * k.special(flex_block_attn_ptx::ir::Special::GridY) + k.cta_y(),
        }
    }

    /// Blocks that see others, by the tokens of text that count.
    fn seen(&self, block: Reg<'k, u32>) -> Reg<'k, u32> {
        let (k, seen) = (self.k, self.blocks.copied());
        k.if_(self.text_lengths.differs(0), || {
            let length: Reg<'k, u32> = k.load_constant(self.text_lengths + k.cta_z().times_wide(8));
            seen.set(self.tiles + ((length + (block - 1)) / block).max(1));
        });
        seen
    }

    /// Writes a row, given its scores and what it keeps of them.
    fn write(&self, row: Reg<'k, u32>, scores: Reg<'k, u32>, best: &Best<'k>, seen: Reg<'k, u32>) {
        let (k, lane) = (self.k, self.k.lane());
        let base = self.base + row.times_wide(self.blocks);
        let mask =
            self.mask + (self.line.times_wide(self.blocks) + row.to_u64()) * self.blocks.to_u64();
        let lanes_below = (k.var(1u32) << lane) - 1;
        let mut equal = k.var(0u32);
        k.for_(0, self.blocks, 32 * STEPS as u32, |first| {
            let columns: [_; STEPS] = std::array::from_fn(|step| first + lane + 32 * step as u32);
            let bytes = columns.map(|column| {
                let inside = column.lt(self.blocks);
                k.load_constant_byte_where(inside, base + column.to_u64())
            });
            for (column, byte) in columns.into_iter().zip(bytes) {
                let score = k.var(0u32);
                let scored = column.lt(best.count);
                k.if_(scored, || {
                    score.set(k.load_shared::<u32>(scores + (column << 2)))
                });
                let equals = scored & score.equals(best.threshold);
                let all = equals.ballot();
                let number = equal + (all & lanes_below).count_ones();
                let kept = score.gt(best.threshold) | equals & number.lt(best.equal);
                equal += all.count_ones();
                // Blocks that count for nothing see themselves.
                let counts = row.lt(seen) & column.lt(seen);
                let byte =
                    (counts & (kept | byte.differs(0)) | !counts & row.equals(column)).select(1, 0);
                let (at, byte) = (mask + column.to_u64(), byte.to_u16());
                k.where_(column.lt(self.blocks), || k.store_global_byte(at, byte));
            }
        });
    }
}
