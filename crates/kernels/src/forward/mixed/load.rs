//! What the loaders of mixed rows do, a whole warp each: one of keys, which takes tiles of queries, loads
//! them, and says who wants which keys; one of values. Both walk the same lists.

use flex_block_attn_ptx::builder::{Leave, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Barrier, Phases, Place, SharedTile};

use super::{END, OWN_WARPS, QUERIES, Stores, WARPS};
use crate::forward::Config;
use crate::forward::kernel::Maps;
use crate::forward::problem::{Problem, rounded_up};
use crate::forward::queries::Note;
use crate::merge::{Merge, NO_BLOCK, TOKENS};

/// A piece: its first key, and who wants it.
type Piece<'k> = (Reg<'k, u32>, Reg<'k, u32>);

/// The pieces of several lists, walked as one.
struct Pieces<'a, 'k> {
    problem: &'a Problem<'k>,
    config: Config,
    /// Head of k and v, and batch.
    line: [Reg<'k, u32>; 2],
    lists: Merge<'k>,
    /// First key that is still to come of the block at hand, how many are, in whole pieces, and the
    /// warps that want them.
    key: Reg<'k, u32>,
    left: Reg<'k, u32>,
    warps: Reg<'k, u32>,
}

impl Config {
    /// What the loader of keys does.
    pub(super) fn load_keys<'k>(self, maps: Maps<'k>, problem: &Problem<'k>, stores: &Stores<'k>) {
        let k = problem.k;
        let wants = stores.wants;
        let phases = Phases::new(k);
        let keys = stores.keys.producer(&phases);
        let queries = stores.queries.filling(k);
        let leader = k.lane().equals(0);
        problem.each_tile(None, |of| {
            let some = k.var(1u32);
            let note = Note {
                first: of.number * QUERIES,
                place: Note::place(of),
                tiles: some,
                columns: some,
            };
            let pieces = Pieces::new(problem, self, note);
            queries.announce(note);
            queries.wait();
            k.if_(leader, || queries.fill(maps.q.rows(), note));
            in_turn(k, self.stages()[0], |leave, stage| {
                let found = pieces.next_tile();
                let (tile, full) = keys.wait(stage as usize);
                let wants = wants.at(stage * self.stage_bytes());
                let end = found[0].1.equals(0);
                k.if_(leader & end, || {
                    for i in 0..self.pieces() {
                        k.store_shared(wants.at(4 * i), k.var(END));
                    }
                    full.arrive();
                });
                leave.when(end);
                k.if_(leader, || {
                    for (i, &(row, want)) in (0..).zip(&found) {
                        k.store_shared(wants.at(4 * i), want);
                        if self.mask.is_some() {
                            k.store_shared(wants.at(self.want_bytes() + 4 * i), row);
                        }
                    }
                    pieces.load(&found, maps.k.rows(), (tile, full));
                });
            });
        });
        queries.announce(Note::end(k));
    }

    /// What the loader of values does, for the tiles of queries that the other one has taken.
    pub(super) fn load_values<'k>(
        self,
        maps: Maps<'k>,
        problem: &Problem<'k>,
        stores: &Stores<'k>,
    ) {
        let k = problem.k;
        let phases = Phases::new(k);
        let values = stores.values.producer(&phases);
        let queries = stores.queries.using(k.lane().equals(0));
        k.loop_(|leave| {
            queries.next();
            let note = queries.note();
            leave.when(note.is_end());
            let pieces = Pieces::new(problem, self, note);
            in_turn(k, self.stages()[1], |leave, stage| {
                let found = pieces.next_tile();
                let (tile, full) = values.wait(stage as usize);
                let end = found[0].1.equals(0);
                // Warpgroups that want none of it will not come by: a lane gives it back for each of their
                // warps. The end nobody wants.
                let wants = found.iter().fold(k.var(0u32), |all, &(_, want)| all | want);
                let group = wants >> (k.lane() & !(OWN_WARPS - 1));
                let unwanted = (group & ((1 << OWN_WARPS) - 1)).equals(0);
                k.if_(k.lane().lt(WARPS) & unwanted, || {
                    values.release(stage as usize);
                });
                k.if_(k.lane().equals(0) & end, || full.arrive());
                leave.when(end);
                k.if_(k.lane().equals(0), || {
                    pieces.load(&found, maps.v.rows(), (tile, full));
                });
            });
            // Not before the tile is there: until then the one before may have readers.
            queries.wait();
            queries.release();
        });
    }
}

impl<'a, 'k> Pieces<'a, 'k> {
    /// Those of the blocks that a tile of queries is in.
    fn new(problem: &'a Problem<'k>, config: Config, of: Note<'k>) -> Self {
        let k = problem.k;
        let record = problem.lists.record(of.head(), of.batch());
        let lists = Merge::new(k, WARPS, problem.lists.plan, config.mask.is_some());
        lists.start(of.first, problem.q_len, |query| {
            let row = query / problem.q_block;
            let lists = &problem.lists;
            (lists.list(record, row), lists.count(record, row))
        });
        Self {
            problem,
            config,
            line: [problem.kv_head(of.head()), of.batch()],
            lists,
            key: k.var(0u32),
            left: k.var(0u32),
            warps: k.var(0u32),
        }
    }

    /// The pieces of the next tile.
    fn next_tile(&self) -> Vec<Piece<'k>> {
        (0..self.config.pieces()).map(|_| self.next()).collect()
    }

    /// The next piece's first key, and who wants it: nobody, if there are no more; its keys then lie
    /// behind the sequence, where copies find zeros. All lanes.
    fn next(&self) -> Piece<'k> {
        let (k, problem, piece) = (self.problem.k, self.problem, self.config.piece);
        let (mut key, mut left) = (self.key, self.left);
        k.if_(left.equals(0), || {
            let (block, warps) = self.lists.take();
            k.if_(block.lt(NO_BLOCK), || {
                self.warps.set(warps);
                key.set(block * problem.kv_block);
                left.set(rounded_up(problem.keys_of_block(key), piece));
            });
        });
        let (row, want) = (k.var(problem.kv_len), k.var(0u32));
        k.if_(left.gt(0), || {
            row.set(key);
            let keys = (problem.kv_len - key).min(piece);
            want.set(self.warps | (keys << TOKENS));
            key += piece;
            left -= piece;
        });
        (row, want)
    }

    /// Has a tile put together from pieces found.
    fn load(
        &self,
        found: &[Piece<'k>],
        map: Reg<'k, u64>,
        (tile, full): (SharedTile<'k>, Barrier<'k>),
    ) {
        let piece = self.config.piece;
        full.arrive_expect(tile.shape.bytes());
        for (i, &(row, _)) in (0..).zip(found) {
            let place = Place::rows(row, self.line[0], self.line[1]);
            let part = tile.row_range(i * piece, piece);
            part.load_panels(map, place, full, TmaOptions::default());
        }
    }
}

/// Does `body` for one of so many stages after the other, until it leaves.
fn in_turn<'k>(k: &'k Builder, stages: u32, body: impl Fn(Leave<'k>, u32)) {
    k.loop_(|leave| {
        for stage in 0..stages {
            body(leave, stage);
        }
    });
}
