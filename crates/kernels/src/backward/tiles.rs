//! Which keys a thread block has, and which part of their lists of queries; where it leaves dk and dv
//! that are of a part only.
//!
//! [`Tiles`], from a launch's parameters, numbers the tiles of keys of all heads as they are computed;
//! [`Job`] is what one thread block does, in its shared memory; [`Slots`] is the memory of parts' dk and
//! dv, rounded to 16 bits. Used by the main kernel and by [`join`](super::join).

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Arg, Builder, Reg};

use super::{Args, KEYS};
use crate::chunk::{Heads, Rows};
use crate::cut::Cut;
use crate::lists::{Call, Lists};

/// Bytes of a [`Job`].
pub(super) const JOB_BYTES: u32 = 32;
/// In it, where its share of each list starts and ends, in [`WHOLE`]ths.
const SHARE: u32 = 16;
/// So many that ends lie where those of exact fractions do, in lists of less than 2^25 entries.
const WHOLE: u32 = 1 << 28;
/// In the place of a slot: dk and dv are those of all queries.
const NO_SLOT: u32 = u32::MAX;

/// The tiles of keys of a launch.
pub(super) struct Tiles<'k> {
    k: &'k Builder,
    lists: Lists<'k>,
    /// Tiles of a head.
    of_head: Reg<'k, u32>,
    /// Of a column, if they are taken by the plan's order of columns; else 0.
    of_column: Reg<'k, u32>,
    /// Heads of k and v, and heads of q for each.
    kv_heads: Reg<'k, u32>,
    pub(super) group: Reg<'k, u32>,
    /// Which are computed in parts, if any may be.
    pub(super) cut: Option<CutTiles<'k>>,
}

/// The tiles that are computed in parts, as [`Cut`] has them.
pub(super) struct CutTiles<'k> {
    /// Tiles before them, which are computed whole.
    pub(super) whole: Reg<'k, u32>,
    pub(super) tiles: Reg<'k, u32>,
    parts: Reg<'k, u32>,
    pub(super) slots: Slots<'k>,
}

/// A tile of keys.
#[derive(Clone, Copy)]
pub(super) struct KeyTile<'k> {
    /// First of them.
    pub(super) first: Reg<'k, u32>,
    /// Head of k and v, and batch.
    pub(super) head: Reg<'k, u32>,
    pub(super) batch: Reg<'k, u32>,
}

/// Tiles of keys of a block of so many, if each is of one block; else 0.
pub(super) fn of_block(kv_block: u32) -> u32 {
    match kv_block.is_multiple_of(KEYS) {
        true => kv_block / KEYS,
        false => 0,
    }
}

/// Tiles of keys of a head.
pub(super) fn of_head(kv_len: u32, kv_block: u32) -> u32 {
    match of_block(kv_block) {
        0 => kv_len.div_ceil(KEYS),
        tiles => kv_len.div_ceil(kv_block) * tiles,
    }
}

/// The arguments for [`Tiles::new`], but for those of its lists.
pub(super) fn args(call: Call, cut: Cut, args: &Args<'_>) -> Vec<Arg> {
    let tiles = [
        of_head(call.kv_len, call.kv_block),
        of_block(call.kv_block),
        call.kv_heads,
        call.heads / call.kv_heads,
    ];
    let mut list = Vec::from(tiles.map(Arg::U32));
    if args.canvas.is_none() {
        list.extend([cut.whole, cut.tiles, cut.parts].map(Arg::U32));
        list.push(Arg::U64(args.in_parts.map_or(0, |of| of.slots)));
    }
    list
}

impl<'k> Tiles<'k> {
    /// Declares its parameters, but for those of its lists: with those of parts for tokens that are no
    /// video's, in rows of so many columns.
    pub(super) fn new(k: &'k Builder, lists: Lists<'k>, canvas: bool, head_dim: u32) -> Self {
        Self {
            k,
            lists,
            of_head: k.param("tiles_of_head"),
            of_column: k.param("tiles_of_column"),
            kv_heads: k.param("kv_heads"),
            group: k.param("group"),
            cut: (!canvas).then(|| CutTiles {
                whole: k.param("whole"),
                tiles: k.param("cut"),
                parts: k.param("parts"),
                slots: Slots::new(k, head_dim),
            }),
        }
    }

    /// The plan's columns.
    pub(super) fn lists(&self) -> &Lists<'k> {
        &self.lists
    }

    /// The keys of a tile: of a head the longest lists come first, where a tile has one. (Heads that
    /// share keys may have lists of their own; the first one's decide.)
    pub(super) fn keys(&self, tile: Reg<'k, u32>) -> KeyTile<'k> {
        let k = self.k;
        let line = tile / self.of_head;
        let place = tile - line * self.of_head;
        let batch = line / self.kv_heads;
        let head = line - batch * self.kv_heads;
        let first = k.var(place * KEYS);
        k.if_(self.of_column.differs(0), || {
            let rank = place / self.of_column;
            let record = self.lists.record(head * self.group, batch);
            let column = self.lists.of_rank(record, rank);
            first.set((column * self.of_column + (place - rank * self.of_column)) * KEYS);
        });
        KeyTile { first, head, batch }
    }
}

/// What a thread block does: words in its shared memory, so that nobody keeps them in registers.
#[derive(Clone, Copy)]
pub(super) struct Job<'k> {
    pub(super) words: Address<'k, u32>,
}

impl<'k> Job<'k> {
    /// Writes it down. One thread.
    pub(super) fn find(self, tiles: &Tiles<'k>) {
        let k = tiles.k;
        let tile = k.var(k.cta_x());
        let (slot, ends) = (k.var(NO_SLOT), [k.var(0u32), k.var(WHOLE)]);
        if let Some(cut) = &tiles.cut {
            k.if_(tile.ge(cut.whole), || {
                slot.set(tile - cut.whole);
                let part = slot / cut.tiles;
                for (end, part) in ends.iter().zip([part, part + 1]) {
                    // Rounded up: what they are multiplied by, and divided, is rounded down.
                    end.set((part * WHOLE + (cut.parts - 1)) / cut.parts);
                }
                tile.set(cut.whole + (slot - part * cut.tiles));
            });
        }
        let KeyTile { first, head, batch } = tiles.keys(tile);
        k.store_shareds(self.words, [first, head, batch, slot]);
        k.store_shareds(self.words.at(SHARE), ends);
    }

    /// Its keys.
    pub(super) fn keys(self, k: &'k Builder) -> KeyTile<'k> {
        let [first, head, batch] = [0, 4, 8].map(|at| k.load_shared(self.words.at(at)));
        KeyTile { first, head, batch }
    }

    /// Its slot, and whether it has one: else its dk and dv are those of all queries.
    pub(super) fn slot(self, k: &'k Builder) -> (Reg<'k, u32>, Reg<'k, bool>) {
        let slot = k.load_shared::<u32>(self.words.at(12));
        (slot, slot.differs(NO_SLOT))
    }

    /// Which entries are its own of a list of so many: the first, and how many.
    pub(super) fn share(self, k: &'k Builder, count: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let ends = k.load_shareds::<u32, 2>(self.words.at(SHARE));
        let [first, end] = ends.map(|end| (count.times_wide(end) >> WHOLE.ilog2()).to_u32());
        (first, end - first)
    }
}

/// Where parts leave dk and dv, rounded to 16 bits: in each slot all rows of a tile, of the one and then
/// of the other.
#[derive(Clone, Copy)]
pub(super) struct Slots<'k> {
    heads: Heads<'k>,
}

impl<'k> Slots<'k> {
    /// Declares its parameter, for rows of so many columns.
    pub(super) fn new(k: &'k Builder, head_dim: u32) -> Self {
        let row = 2 * u64::from(head_dim);
        let tile = row * u64::from(KEYS);
        Self {
            heads: Heads::at(k.param("slots"), [row, 2 * tile, tile]),
        }
    }

    /// The rows of a slot's dk, which is 0, or dv, which is 1.
    pub(super) fn rows(self, slot: Reg<'k, u32>, which: Reg<'k, u32>) -> Rows<'k> {
        self.heads.rows(slot, which)
    }
}
