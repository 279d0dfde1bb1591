//! Counts and lists of both sides. Rows: a warp takes one, 32 columns at a time. Columns: a thread
//! block takes 32 side by side, so that its loads are as contiguous as those of rows; a lane
//! gathers its column's bits, and then a warp takes one column at a time, as if it were a row.

use flex_block_attn_mask::PARTIAL;
use flex_block_attn_ptx::{Builder, Reg};

use super::{Form, Record, THREADS};

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
/// From a strip's bits to those of its partial blocks.
const PARTIAL_BITS: u32 = STRIP * COLUMN_BYTES;

/// Thread blocks for one matrix: those for columns, which take longer, then those for rows.
pub(super) fn blocks(rows: u32, columns: u32) -> u32 {
    columns.div_ceil(STRIP) + rows.div_ceil(WARPS)
}

pub(super) fn body(k: &Builder, form: Form) {
    let mask = Mask::new(k, form);
    let record = Record::new(k);
    let rows = Lists::new(k, record, ["row_counts", "row_lists"], mask.columns);
    let columns = Lists::new(k, record, ["column_counts", "column_lists"], mask.rows);
    k.set_shared_bytes(match form {
        Form::Bytes => STRIP * COLUMN_BYTES,
        Form::Bits => 2 * STRIP * COLUMN_BYTES,
    });

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
                    for (step, word) in (0..).zip(mask.row_words(row, first)) {
                        list.append(word, first + 32 * step);
                    }
                });
                list.finish();
            });
        },
    );
}

/// 32 blocks of a line, a bit each: whether they are kept, and, where it may be so, in part.
#[derive(Clone, Copy)]
struct Word<'k> {
    kept: Reg<'k, u32>,
    partial: Option<Reg<'k, u32>>,
}

/// The (batch, head) matrix of this thread block.
struct Mask<'k> {
    entries: Entries<'k>,
    rows: Reg<'k, u32>,
    columns: Reg<'k, u32>,
}

/// How it lies in memory.
enum Entries<'k> {
    Bytes { address: Reg<'k, u64>, row_stride: Reg<'k, u64>, column_stride: Reg<'k, u64> },
    Bits { kept: Reg<'k, u64>, partial: Reg<'k, u64>, row_bytes: Reg<'k, u32> },
}

impl<'k> Mask<'k> {
    fn new(k: &'k Builder, form: Form) -> Self {
        let entries = match form {
            Form::Bytes => {
                let mask = k.param::<u64>("mask");
                let batch = k.cta_z().to_u64() * k.param::<u64>("batch_stride");
                let head = k.cta_y().to_u64() * k.param::<u64>("head_stride");
                Entries::Bytes {
                    address: mask + batch + head,
                    row_stride: k.param("row_stride"),
                    column_stride: k.param("column_stride"),
                }
            }
            Form::Bits => {
                let [kept, partial] = ["kept", "partial"].map(|name| k.param::<u64>(name));
                let matrix = Record::number(k).to_u64() * k.param::<u64>("matrix_bytes");
                Entries::Bits {
                    kept: kept + matrix,
                    partial: partial + matrix,
                    row_bytes: k.param("row_bytes"),
                }
            }
        };
        Self {
            entries,
            rows: k.param("rows"),
            columns: k.param("columns"),
        }
    }

    /// `STEPS` words of a row, from column `first` on, the same in all lanes.
    fn row_words(&self, row: Reg<'k, u32>, first: Reg<'k, u32>) -> [Word<'k>; STEPS] {
        let k = row.builder();
        match self.entries {
            Entries::Bytes {
                address,
                row_stride,
                column_stride,
            } => {
                let column = first + k.lane();
                let mut entry =
                    address + row.to_u64() * row_stride + column.to_u64() * column_stride;
                let step_bytes = column_stride << 5;
                let bytes: [Reg<'k, u32>; STEPS] = std::array::from_fn(|step| {
                    let inside = (column + 32 * step as u32).lt(self.columns);
                    let byte = k.load_constant_byte_where(inside, entry);
                    entry += step_bytes;
                    byte
                });
                bytes.map(|byte| Word {
                    kept: byte.differs(0).ballot(),
                    partial: None,
                })
            }
            Entries::Bits {
                kept,
                partial,
                row_bytes,
            } => {
                let place = row.times_wide(row_bytes) + (first >> 3).to_u64();
                let [kept, partial] = [kept, partial].map(|bits| bits + place);
                std::array::from_fn(|step| {
                    let inside = (first + 32 * step as u32).lt(self.columns);
                    let [kept, partial] = [kept, partial].map(|bits| {
                        let [word] = k.load_constants_where(inside, bits.at(4 * step as u32));
                        word
                    });
                    Word {
                        kept,
                        partial: Some(partial),
                    }
                })
            }
        }
    }

    /// 32 bits of each lane's column of a strip, from row `first` on.
    fn column_words(&self, first: Reg<'k, u32>, strip: Reg<'k, u32>) -> Word<'k> {
        let k = first.builder();
        let column = strip + k.lane();
        match self.entries {
            Entries::Bytes {
                address,
                row_stride,
                column_stride,
            } => {
                let rows = column.lt(self.columns).select(self.rows, 0);
                let mut entry =
                    address + first.to_u64() * row_stride + column.to_u64() * column_stride;
                let bytes: [Reg<'k, u32>; 32] = std::array::from_fn(|row| {
                    let byte = k.load_constant_byte_where((first + row as u32).lt(rows), entry);
                    entry += row_stride;
                    byte
                });
                Word {
                    kept: gathered(k, bytes.map(|byte| byte.differs(0))),
                    partial: None,
                }
            }
            Entries::Bits {
                kept,
                partial,
                row_bytes,
            } => {
                let place = first.times_wide(row_bytes) + (strip >> 3).to_u64();
                let own = k.var(1u32) << k.lane();
                let [kept, partial] = [kept, partial].map(|bits| {
                    let mut at = bits + place;
                    let words: [Reg<'k, u32>; 32] = std::array::from_fn(|row| {
                        let inside = (first + row as u32).lt(self.rows);
                        let [word] = k.load_constants_where(inside, at);
                        at += row_bytes.to_u64();
                        word
                    });
                    gathered(k, words.map(|word| (word & own).differs(0)))
                });
                Word {
                    kept,
                    partial: Some(partial),
                }
            }
        }
    }

    /// Lists the columns from `strip` on.
    fn strip(&self, strip: Reg<'k, u32>, warp: Reg<'k, u32>, columns: &Lists<'k>) {
        let k = strip.builder();
        let (lane, shared) = (k.lane(), k.shared_base());
        k.for_(0, self.rows, 32 * CHUNKS, |first| {
            // Whole fours, which are read together.
            let chunks = ((self.rows - first).min(32 * CHUNKS) + 127) / 128 * 4;
            k.for_(warp, chunks, WARPS, |chunk| {
                let word = self.column_words(first + chunk * 32, strip);
                let place = shared + lane * COLUMN_BYTES + (chunk << 2);
                k.store_shared(place, word.kept);
                if let Some(partial) = word.partial {
                    k.store_shared(place.at(PARTIAL_BITS), partial);
                }
            });
            k.sync_threads();
            k.for_(warp, (self.columns - strip).min(STRIP), WARPS, |column| {
                let bits = shared + column * COLUMN_BYTES;
                let list = columns.list(strip + column);
                k.if_(first.gt(0), || {
                    list.count.set(k.load_shared_uniform(bits.at(COUNT)));
                });
                k.for_(0, chunks, 4, |chunk| {
                    let place = bits + (chunk << 2);
                    let kept = k.load_shareds::<u32, 4>(place);
                    let partial = matches!(self.entries, Entries::Bits { .. })
                        .then(|| k.load_shareds::<u32, 4>(place.at(PARTIAL_BITS)));
                    for (i, kept) in kept.into_iter().enumerate() {
                        let partial = partial.map(|words| words[i]);
                        list.append(Word { kept, partial }, first + (chunk + i as u32) * 32);
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

/// A bit for each that holds.
fn gathered<'k>(k: &'k Builder, bits: [Reg<'k, bool>; 32]) -> Reg<'k, u32> {
    let mut word = k.var(0u32);
    for (i, bit) in bits.into_iter().enumerate() {
        k.where_(bit, || word |= 1 << i);
    }
    word
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
    /// Appends the places of the blocks that are kept, the lowest being `first`. The word is the same
    /// in all lanes.
    fn append(&self, word: Word<'k>, first: Reg<'k, u32>) {
        let k = first.builder();
        let Word { kept, partial } = word;
        let bit = k.var(1u32) << self.lane;
        let at = self.count + (kept & (bit - 1)).count_ones();
        let (address, mut entry) = (self.words + at.times_wide(4), first + self.lane);
        if let Some(partial) = partial {
            entry |= (partial & bit).differs(0).select(PARTIAL as u32, 0);
        }
        k.where_((kept & bit).differs(0), || k.store_global(address, entry));
        self.count.set(self.count + kept.count_ones());
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
