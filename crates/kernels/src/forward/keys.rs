//! How a list of key blocks is walked: from the end, a tile of keys at a time, each put together
//! from pieces.

use flex_block_attn_ptx::Reg;
use flex_block_attn_ptx::builder::Address;

use super::Config;
use super::problem::{Problem, Tile, rounded_up};
use crate::lists::PARTIAL;

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
    /// [`PARTIAL`] if the block at hand is partial, else 0.
    pub(super) partial: Reg<'k, u32>,
}

/// A walk through a list.
pub(super) struct Keys<'a, 'k> {
    problem: &'a Problem<'k>,
    config: Config,
    at: Start<'k>,
}

impl<'k> Start<'k> {
    /// Looks up where to start with a row of the mask, or with a part of it. Gives the tiles of keys, too,
    /// and the columns of the first that are keys.
    pub(super) fn look_up(
        problem: &Problem<'k>,
        config: Config,
        tile: Tile<'k>,
        row: Reg<'k, u32>,
    ) -> (Reg<'k, u32>, Reg<'k, u32>, Self) {
        let Config { kv_tile, piece, .. } = config;
        let zero = || problem.k.var(0u32);
        let (tiles, columns) = (zero(), zero());
        let (block, left, missing, partial) = (zero(), zero(), zero(), zero());
        let all = problem.lists.count(tile.record, row);
        let (before, count) = match &problem.parts {
            Some(parts) => parts.share(tile.part, all),
            None => (zero(), all),
        };
        let entry = problem.lists.list(tile.record, row) + before + count - 1;
        problem.k.if_(count.gt(0), || {
            config.set_block(problem, entry, block, partial);
            let keys_of_last = problem.keys_of_block(block);
            let before = (count - 1) * problem.kv_block;
            left.set(rounded_up(keys_of_last, piece));
            let padded = before + left;
            tiles.set((padded + (kv_tile - 1)) / kv_tile);
            missing.set(tiles * kv_tile - padded);
            columns.set(before + keys_of_last - (tiles - 1) * kv_tile);
        });
        let start = Self {
            entry,
            block,
            left,
            missing,
            partial,
        };
        (tiles, columns, start)
    }
}

impl<'a, 'k> Keys<'a, 'k> {
    /// A walk, of which nothing is done yet; it changes the registers of `start`.
    pub(super) fn new(problem: &'a Problem<'k>, config: Config, start: Start<'k>) -> Self {
        Self {
            problem,
            config,
            at: start,
        }
    }

    /// Writes the first keys of the next tile's pieces, one word each, which says whether the piece is
    /// of a partial block, too. Those of pieces that only fill the tile up lie behind the sequence,
    /// where copies find zeros.
    pub(super) fn next_tile(&self, to: Address<'k, u32>) {
        let (k, pieces) = (self.problem.k, self.config.pieces());
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
                missing -= self.config.piece;
                k.store_shared(to, self.problem.kv_len);
            };
            k.if_else(short, fill_up, || k.store_shared(to, self.next_piece()));
        }
    }

    fn next_piece(&self) -> Reg<'k, u32> {
        let Start {
            mut entry,
            block,
            mut left,
            partial,
            ..
        } = self.at;
        let (problem, config) = (self.problem, self.config);
        problem.k.if_(left.equals(0), || {
            entry -= 1;
            config.set_block(problem, entry, block, partial);
            left.set(problem.kv_block);
        });
        left -= config.piece;
        match config.mask {
            None => block + left,
            Some(_) => (block + left) | partial,
        }
    }
}

impl Config {
    /// Looks up an entry of a list: the block's first key, and whether it is partial, if any can be.
    fn set_block<'k>(
        self,
        problem: &Problem<'k>,
        entry: Reg<'k, u32>,
        first: Reg<'k, u32>,
        partial: Reg<'k, u32>,
    ) {
        let word = problem.lists.word(entry);
        match self.mask {
            None => first.set(word * problem.kv_block),
            Some(_) => {
                first.set((word & !PARTIAL) * problem.kv_block);
                partial.set(word & PARTIAL);
            }
        }
    }
}
