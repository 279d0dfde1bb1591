//! The plan's lists, and how they are walked: from the end, a tile of keys at a time, each put
//! together from pieces.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};

use super::Config;

/// The plan in memory, and the keys that it lists.
#[derive(Clone, Copy)]
pub(super) struct Lists<'k> {
    plan: Reg<'k, u64>,
    kv_len: Reg<'k, u32>,
    kv_block: Reg<'k, u32>,
}

/// Where the walk through a list starts.
#[derive(Clone, Copy)]
pub(super) struct Start<'k> {
    /// The word of the plan behind the entry that comes next.
    pub(super) entry: Reg<'k, u32>,
    /// First key of the block at hand.
    pub(super) block: Reg<'k, u32>,
    /// Keys of that block, in whole pieces, that are still to come: those at its start.
    pub(super) left: Reg<'k, u32>,
    /// Keys, in whole pieces, that the first tile is short of.
    pub(super) missing: Reg<'k, u32>,
}

/// A walk through a list.
pub(super) struct Keys<'k> {
    k: &'k Builder,
    piece: u32,
    pieces: u32,
    lists: Lists<'k>,
    at: Start<'k>,
}

impl<'k> Lists<'k> {
    /// Declares its parameters.
    pub(super) fn new(k: &'k Builder) -> Self {
        Self {
            plan: k.param("plan"),
            kv_len: k.param("kv_len"),
            kv_block: k.param("kv_block"),
        }
    }

    /// A word of the plan. Words are counted by 32 bits from its start: addresses would take more
    /// registers, of which planner and loader have few.
    pub(super) fn word(self, at: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.plan.builder();
        k.load_constant(self.plan + at.times_wide(4))
    }

    /// Tiles of keys of a list of `count` blocks at word `list`, columns of the first that are keys,
    /// and where to start.
    pub(super) fn start(
        self,
        k: &'k Builder,
        config: Config,
        list: Reg<'k, u32>,
        count: Reg<'k, u32>,
    ) -> (Reg<'k, u32>, Reg<'k, u32>, Start<'k>) {
        let Config { kv_tile, piece, .. } = config;
        let zero = || k.var(0u32);
        let (tiles, columns) = (zero(), zero());
        let (block, left, missing) = (zero(), zero(), zero());
        let entry = list + count - 1;
        k.if_(count.gt(0), || {
            block.set(self.word(entry) * self.kv_block);
            // The block at the end of the list may be the sequence's last, and short.
            let keys_of_last = (self.kv_len - block).min(self.kv_block);
            let before = (count - 1) * self.kv_block;
            left.set(rounded_up(keys_of_last, piece));
            let padded = before + left;
            tiles.set((padded + (kv_tile - 1)) / kv_tile);
            missing.set(tiles * kv_tile - padded);
            columns.set(before + keys_of_last - (tiles - 1) * kv_tile);
        });
        let start = Start {
            entry,
            block,
            left,
            missing,
        };
        (tiles, columns, start)
    }
}

impl<'k> Keys<'k> {
    /// A walk, of which nothing is done yet; it changes the registers of `start`.
    pub(super) fn new(k: &'k Builder, config: Config, lists: Lists<'k>, start: Start<'k>) -> Self {
        Self {
            k,
            piece: config.piece,
            pieces: config.pieces(),
            lists,
            at: start,
        }
    }

    /// Writes the first keys of the next tile's pieces, one word each; those of pieces that only
    /// fill it up lie behind the sequence, where copies find zeros.
    pub(super) fn next_tile(&self, to: Address<'k, u32>) {
        let (k, pieces) = (self.k, self.pieces);
        // From the last to the first: what fills up is behind all keys.
        for piece in (0..pieces).rev() {
            let to = to.at(4 * piece);
            if pieces == 1 {
                k.store_shared(to, self.next_piece());
                continue;
            }
            let mut missing = self.at.missing;
            let short = missing.gt(0);
            let fill_up = || {
                missing -= self.piece;
                k.store_shared(to, self.lists.kv_len);
            };
            k.if_else(short, fill_up, || k.store_shared(to, self.next_piece()));
        }
    }

    fn next_piece(&self) -> Reg<'k, u32> {
        let Start {
            mut entry,
            block,
            mut left,
            ..
        } = self.at;
        self.k.if_(left.equals(0), || {
            entry -= 1;
            block.set(self.lists.word(entry) * self.lists.kv_block);
            left.set(self.lists.kv_block);
        });
        left -= self.piece;
        block + left
    }
}

/// The next multiple of `step`.
fn rounded_up(value: Reg<'_, u32>, step: u32) -> Reg<'_, u32> {
    if step.is_power_of_two() {
        (value + (step - 1)) & !(step - 1)
    } else {
        (value + (step - 1)) / step * step
    }
}
