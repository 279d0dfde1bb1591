//! Counts and lists of both sides. Rows: a warp takes one, 32 columns at a time. Columns: a thread
//! block takes 32 side by side, so that its loads are as contiguous as those of rows; a lane
//! gathers its column's bits, and then a warp takes one column at a time, as if it were a row.

use flex_block_attn_ptx::{Builder, Reg};

use super::{Record, THREADS};

const WARPS: u32 = THREADS / 32;
/// Steps of 32 columns of a row whose loads are under way together: their latency is most of the
/// time that a mask takes.
const STEPS: usize = 12;
/// Columns of a strip, which a thread block has.
const STRIP: u32 = 32;
/// Chunks of 32 rows of a strip whose bits are in shared memory together.
const CHUNKS: u32 = 2 * WARPS;
/// Where, behind its bits, the length of a column's list so far lies.
const COUNT: u32 = 4 * CHUNKS;
/// Bytes from a column's bits to the next's: a multiple of 16, but not of 128, lest all be in one
/// bank.
const COLUMN_BYTES: u32 = COUNT + 16;

/// Thread blocks for one matrix: those for columns, which take longer, then those for rows.
pub(super) fn blocks(rows: u32, columns: u32) -> u32 {
    columns.div_ceil(STRIP) + rows.div_ceil(WARPS)
}

pub(super) fn body(k: &Builder) {
    let mask = Mask::new(k);
    let record = Record::new(k);
    let rows = Lists::new(k, record, ["row_counts", "row_lists"], mask.columns);
    let columns = Lists::new(k, record, ["column_counts", "column_lists"], mask.rows);
    k.set_shared_bytes(STRIP * COLUMN_BYTES);

    // Known to be the same in all lanes: so are the branches around votes.
    let warp = (k.tid() >> 5).uniform();
    let strips = (mask.columns + (STRIP - 1)) / STRIP;
    k.if_else(
        k.cta_x().lt(strips),
        || mask.strip(k.cta_x() * STRIP, warp, &columns),
        || {
            let row = (k.cta_x() - strips) * WARPS + warp;
            k.if_(row.lt(mask.rows), || {
                let list = rows.list(row);
                k.for_(0, mask.columns, 32 * STEPS as u32, |first| {
                    for (step, word) in (0..).zip(mask.row_bits(row, first)) {
                        list.append(word, first + 32 * step);
                    }
                });
                list.finish();
            });
        },
    );
}

/// The (batch, head) matrix of this thread block.
struct Mask<'k> {
    address: Reg<'k, u64>,
    row_stride: Reg<'k, u64>,
    column_stride: Reg<'k, u64>,
    rows: Reg<'k, u32>,
    columns: Reg<'k, u32>,
}

impl<'k> Mask<'k> {
    fn new(k: &'k Builder) -> Self {
        let mask = k.param::<u64>("mask");
        let batch = k.cta_z().to_u64() * k.param::<u64>("batch_stride");
        let head = k.cta_y().to_u64() * k.param::<u64>("head_stride");
        Self {
            address: mask + batch + head,
            row_stride: k.param("row_stride"),
            column_stride: k.param("column_stride"),
            rows: k.param("rows"),
            columns: k.param("columns"),
        }
    }

    /// `STEPS` words of a row's bits, from column `first` on.
    fn row_bits(&self, row: Reg<'k, u32>, first: Reg<'k, u32>) -> [Reg<'k, u32>; STEPS] {
        let k = row.builder();
        let column = first + k.lane();
        let mut entry =
            self.address + row.to_u64() * self.row_stride + column.to_u64() * self.column_stride;
        let step_bytes = self.column_stride << 5;
        let bytes: [Reg<'k, u32>; STEPS] = std::array::from_fn(|step| {
            let inside = (column + 32 * step as u32).lt(self.columns);
            let byte = k.load_constant_byte_where(inside, entry);
            entry += step_bytes;
            byte
        });
        bytes.map(|byte| byte.differs(0).ballot())
    }

    /// 32 bits of each lane's column, from row `first` on.
    fn column_bits(&self, first: Reg<'k, u32>, column: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = first.builder();
        let rows = column.lt(self.columns).select(self.rows, 0);
        let mut entry =
            self.address + first.to_u64() * self.row_stride + column.to_u64() * self.column_stride;
        let bytes: [Reg<'k, u32>; 32] = std::array::from_fn(|row| {
            let byte = k.load_constant_byte_where((first + row as u32).lt(rows), entry);
            entry += self.row_stride;
            byte
        });
        let mut word = k.var(0u32);
        for (row, byte) in bytes.into_iter().enumerate() {
            k.where_(byte.differs(0), || word |= 1 << row);
        }
        word
    }

    /// Lists the columns from `strip` on.
    fn strip(&self, strip: Reg<'k, u32>, warp: Reg<'k, u32>, columns: &Lists<'k>) {
        let k = strip.builder();
        let (lane, shared) = (k.lane(), k.shared_base());
        k.for_(0, self.rows, 32 * CHUNKS, |first| {
            // Whole fours, which are read together.
            let chunks = ((self.rows - first).min(32 * CHUNKS) + 127) / 128 * 4;
            k.for_(warp, chunks, WARPS, |chunk| {
                let word = self.column_bits(first + chunk * 32, strip + lane);
                k.store_shared(shared + lane * COLUMN_BYTES + (chunk << 2), word);
            });
            k.sync_threads();
            k.for_(warp, (self.columns - strip).min(STRIP), WARPS, |column| {
                let bits = shared + column * COLUMN_BYTES;
                let list = columns.list(strip + column);
                k.if_(first.gt(0), || {
                    list.count.set(k.load_shared_uniform(bits.at(COUNT)));
                });
                k.for_(0, chunks, 4, |chunk| {
                    let words = k.load_shareds::<u32, 4>(bits + (chunk << 2));
                    for (i, word) in (0..).zip(words) {
                        list.append(word, first + (chunk + i) * 32);
                    }
                });
                k.if_else(
                    (first + 32 * CHUNKS).ge(self.rows),
                    || list.finish(),
                    || {
                        k.where_(lane.equals(0), || {
                            k.store_shared(bits.at(COUNT), list.count)
                        })
                    },
                );
            });
            k.sync_threads();
        });
    }
}

/// The counts and lists of one side.
struct Lists<'k> {
    counts: Reg<'k, u64>,
    lists: Reg<'k, u64>,
    /// Words of a list.
    stride: Reg<'k, u32>,
}

impl<'k> Lists<'k> {
    fn new(
        k: &'k Builder,
        record: Record<'k>,
        [counts, lists]: [&str; 2],
        stride: Reg<'k, u32>,
    ) -> Self {
        Self {
            counts: record.array(k, counts),
            lists: record.array(k, lists),
            stride,
        }
    }

    fn list(&self, line: Reg<'k, u32>) -> List<'k> {
        let k = line.builder();
        List {
            count_at: self.counts + line.times_wide(4),
            words: self.lists + ((line.times_wide(self.stride)) << 2),
            stride: self.stride,
            count: k.var(0),
            lane: k.lane(),
        }
    }
}

/// A list that a warp is writing.
struct List<'k> {
    count_at: Reg<'k, u64>,
    words: Reg<'k, u64>,
    stride: Reg<'k, u32>,
    /// Entries so far; the same in all lanes.
    count: Reg<'k, u32>,
    lane: Reg<'k, u32>,
}

impl<'k> List<'k> {
    /// Appends the places of the bits that are set in `word`, the lowest being `first`. The word is
    /// the same in all lanes.
    fn append(&self, word: Reg<'k, u32>, first: Reg<'k, u32>) {
        let k = word.builder();
        let bit = k.var(1u32) << self.lane;
        let at = self.count + (word & (bit - 1)).count_ones();
        let (address, entry) = (self.words + at.times_wide(4), first + self.lane);
        k.where_((word & bit).differs(0), || k.store_global(address, entry));
        self.count.set(self.count + word.count_ones());
    }

    /// Writes the count, and zeros to the words that are not used.
    fn finish(&self) {
        let k = self.lane.builder();
        k.for_(self.count + self.lane, self.stride, 32, |at| {
            k.store_global(self.words + at.times_wide(4), k.var(0u32));
        });
        k.where_(self.lane.equals(0), || {
            k.store_global(self.count_at, self.count)
        });
    }
}
