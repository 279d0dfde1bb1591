//! [`Parts`]: the tiles of queries that are computed in parts ([`Cut`]), and the slots where their parts
//! leave output and logarithms, as if each were all there is. Called by the planner, by who stores, and
//! by [`super::join`], which puts them together.

use flex_block_attn_ptx::{Arg, Builder, Reg};

use super::Config;
use super::problem::Part;
use super::queries::Note;
use crate::chunk::Rows;
use crate::cut::Cut;

/// What the parameters say of them.
pub(super) struct Parts<'k> {
    k: &'k Builder,
    config: Config,
    /// As [`Cut`] has them.
    pub(super) whole: Reg<'k, u32>,
    tiles: Reg<'k, u32>,
    parts: Reg<'k, u32>,
    /// Address of the outputs, (slots, queries, head_dim), and of the logarithms, (slots, queries).
    out: Reg<'k, u64>,
    lse: Reg<'k, u64>,
}

/// The arguments for [`Parts::new`].
pub(super) fn args(config: Config, cut: Cut, slots: u64) -> [Arg; 5] {
    let out_bytes =
        u64::from(cut.slots() * config.queries()) * u64::from(config.row_bytes_of_out());
    [
        Arg::U32(cut.whole),
        Arg::U32(cut.tiles),
        Arg::U32(cut.parts),
        Arg::U64(slots),
        Arg::U64(slots + out_bytes),
    ]
}

impl Config {
    /// Whether it can compute tiles in parts: their keys are of one list.
    pub(super) fn has_parts(self) -> bool {
        matches!(self.rows, super::Rows::Whole(_)) && !self.canvas
    }

    /// Bytes of a row of the output.
    fn row_bytes_of_out(self) -> u32 {
        2 * self.head_dim
    }

    /// Bytes of the slots, see [`InParts`](crate::cut::InParts).
    pub fn slot_bytes(self, cut: Cut) -> usize {
        let row = self.row_bytes_of_out() as usize + size_of::<f32>();
        cut.slots() as usize * self.queries() as usize * row
    }
}

impl<'k> Parts<'k> {
    /// Declares its parameters.
    pub(super) fn new(k: &'k Builder, config: Config) -> Self {
        Self {
            k,
            config,
            whole: k.param("whole_tiles"),
            tiles: k.param("cut_tiles"),
            parts: k.param("parts"),
            out: k.param("slots"),
            lse: k.param("slots_lse"),
        }
    }

    /// Which tile, and which part of it, a job is.
    pub(super) fn of_job(&self, job: Reg<'k, u32>) -> (Reg<'k, u32>, Part<'k>) {
        let k = self.k;
        let (tile, part) = (k.var(job), Part::whole(k));
        let Part { slot, number } = part;
        k.if_(job.ge(self.whole), || {
            let own = job - self.whole;
            tile.set(self.whole + own % self.tiles);
            slot.set(own + 1);
            number.set(own / self.tiles);
        });
        (tile, part)
    }

    /// Of a list of so many entries, how many lie before a part's, and how many it has.
    pub(super) fn share(&self, part: Part<'k>, all: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let k = self.k;
        let (before, count) = (k.var(0u32), k.var(all));
        k.if_(part.slot.differs(0), || {
            before.set(all * part.number / self.parts);
            count.set(all * (part.number + 1) / self.parts - before);
        });
        (before, count)
    }

    /// The rows of a part's output, and where its logarithms are: by the numbers that queries have in
    /// their head.
    pub(super) fn of_note(&self, note: Note<'k>) -> (Rows<'k>, Reg<'k, u64>) {
        let (rows, lse) = self.of_slot(note.slot() - 1);
        let first = note.first.times_wide(self.config.row_bytes_of_out());
        let rows = Rows {
            first: rows.first - first,
            stride: rows.stride,
        };
        (rows, lse - note.first.times_wide(4))
    }

    /// Those of part `number` of the tile that is the `tile`-th in parts, from its first query on.
    pub(super) fn of_part(&self, tile: Reg<'k, u32>, number: u32) -> (Rows<'k>, Reg<'k, u64>) {
        self.of_slot(self.tiles * number + tile)
    }

    fn of_slot(&self, slot: Reg<'k, u32>) -> (Rows<'k>, Reg<'k, u64>) {
        let row = slot * self.config.queries();
        let row_bytes = self.config.row_bytes_of_out();
        let rows = Rows {
            first: self.out + row.times_wide(row_bytes),
            stride: self.k.var(u64::from(row_bytes)),
        };
        (rows, self.lse + row.times_wide(4))
    }
}
