//! [`walk`] says which boxes of a video each tile of keys is put together from: the walker looks at
//! all boxes of a listed tile at once, one in each lane, and leaves [`Notes`] for the loaders, which have
//! no time for this between their copies, and for the consumers. It is some tiles ahead of them.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Barriers, Phases, Shared};

use super::Config;
use super::keys::Start;
use super::problem::Problem;
use super::work::Jobs;
use crate::canvas::{Grid, Stacks};

/// Notes there are.
const NOTES: u32 = 8;
/// A note is free when loaders have taken the tile so many before the one it is for. That tile has the
/// place of the one two before it in the ring of keys, and so the consumers are done with the notes of
/// that one, and of all before.
const AHEAD: u32 = NOTES - 2;
/// In a note: which columns of the scores do not all count, a bit for each 32 of them, and whether one
/// has a weight;
const UNLIKE: u32 = 0;
const HEAVY: u32 = 1 << 31;
/// which column that is;
const HEAVY_COLUMN: u32 = 4;
/// which pieces are copied as one;
const STACKS: u32 = 8;
/// which columns count, a bit each;
const BITS: u32 = 12;

/// What is known of each tile of keys, one after the other through all of a thread block's work. `turn`
/// is how many there were before.
pub(super) struct Notes<'k> {
    words: Address<'k, u32>,
    config: Config,
    /// The note is there.
    full: Barriers<'k>,
    /// Loaders have taken the tile: its places in the rings were free.
    taken: Barriers<'k>,
}

/// What a note says of the columns of the scores.
pub(super) struct Columns<'k> {
    at: Address<'k, u32>,
    /// See [`UNLIKE`].
    unlike: Reg<'k, u32>,
}

impl<'k> Notes<'k> {
    pub(super) fn new(shared: &Shared<'k>, config: Config) -> Self {
        Self {
            words: shared.bytes(NOTES * bytes(config), 16),
            config,
            full: shared.barriers(NOTES, 1),
            // By each loader.
            taken: shared.barriers(NOTES, 2),
        }
    }

    pub(super) fn init(&self) {
        self.full.init();
        self.taken.init();
    }

    /// Waits for the note of a tile. For loaders: consumers wait for the tile.
    pub(super) fn wait(&self, turn: Reg<'k, u32>) {
        self.full.wait_in_turn(turn);
    }

    /// Says that a loader has taken the tile.
    pub(super) fn take(&self, turn: Reg<'k, u32>) {
        self.taken.in_turn(turn).arrive();
    }

    /// Of a tile's note, the spot of the piece that a lane copies.
    pub(super) fn spot(&self, grid: &Grid<'k>, turn: Reg<'k, u32>) -> Reg<'k, u32> {
        grid.spot_of_lane(self.spots(turn), self.config.kv_tile)
    }

    /// Of a tile's note, where its pieces start, a word each.
    fn spots(&self, turn: Reg<'k, u32>) -> Address<'k, u32> {
        self.at(turn).at(spots_at(self.config))
    }

    /// Of a tile's note, which pieces make stacks.
    pub(super) fn stacks(&self, turn: Reg<'k, u32>) -> Stacks<'k> {
        Stacks(turn.builder().load_shared(self.at(turn).at(STACKS)))
    }

    /// What a tile's note says of its columns.
    pub(super) fn columns(&self, turn: Reg<'k, u32>) -> Columns<'k> {
        let at = self.at(turn);
        let unlike = turn.builder().load_shared_uniform(at.at(UNLIKE));
        Columns { at, unlike }
    }

    fn at(&self, turn: Reg<'k, u32>) -> Address<'k, u32> {
        self.words.plus((turn & (NOTES - 1)) * bytes(self.config))
    }
}

impl<'k> Columns<'k> {
    /// Whether there is more to say than that all count alike.
    pub(super) fn some_unlike(&self) -> Reg<'k, bool> {
        self.unlike.differs(0)
    }

    /// Whether some of the i-th 32 do not count.
    pub(super) fn has_blank(&self, i: u32) -> Reg<'k, bool> {
        (self.unlike & (1 << i)).differs(0)
    }

    /// Which of those count.
    pub(super) fn bits(&self, i: u32) -> Reg<'k, u32> {
        self.word(BITS + 4 * i)
    }

    /// Whether one has a weight.
    pub(super) fn has_heavy(&self) -> Reg<'k, bool> {
        (self.unlike & HEAVY).differs(0)
    }

    /// Which.
    pub(super) fn heavy(&self) -> Reg<'k, u32> {
        self.word(HEAVY_COLUMN)
    }

    /// A word, the same in all lanes.
    fn word(&self, at: u32) -> Reg<'k, u32> {
        self.unlike.builder().load_shared_uniform(self.at.at(at))
    }
}

/// Words of a tile's columns' bits.
fn words(config: Config) -> u32 {
    config.kv_tile / 32
}

/// Where a note has its pieces' spots: behind the bits.
fn spots_at(config: Config) -> u32 {
    BITS + 4 * words(config)
}

/// Bytes of a note.
fn bytes(config: Config) -> u32 {
    spots_at(config) + 4 * config.pieces()
}

/// What the walker does, a whole warp: leaves a note of each tile of keys of each job.
pub(super) fn walk<'k>(
    problem: &Problem<'k>,
    grid: &Grid<'k>,
    config: Config,
    jobs: &Jobs<'k>,
    notes: &Notes<'k>,
) {
    let k = problem.k;
    let writer = Writer {
        k,
        grid,
        notes,
        turn: k.var(0u32),
        held: k.var(0u32),
    };
    let lanes_before = (k.var(1u32) << k.lane()) - 1;
    let boxes = grid.boxes_of_tile();
    let filled = jobs.filled(&Phases::new(k));
    k.loop_(|leave| {
        filled.wait();
        let end = jobs.note(k).is_end();
        let Start {
            mut entry,
            mut left,
            missing,
            ..
        } = jobs.start(k);
        // All lanes have read it.
        k.warp_sync();
        leave.when(end);
        k.if_(k.lane().equals(0), || jobs.release());

        // What only fills the first tile up lies behind the video, where copies find zeros.
        let few = missing >> config.piece.ilog2();
        k.if_(few.gt(0), || writer.start_with(few, grid.nowhere()));
        k.loop_(|leave| {
            leave.when(left.equals(0));
            left -= 1;
            entry -= 1;
            let corner = grid.corner(problem.lists.word(entry));
            k.for_(0, boxes, 32, |first| {
                let i = first + k.lane();
                let spot = grid.nth_box(corner, i);
                let there = i.lt(boxes) & grid.is_inside(spot);
                let those = there.ballot();
                let rank = (those & lanes_before).count_ones();
                writer.add(there, rank, those.count_ones(), spot);
            });
        });
    });
}

/// Puts pieces into tiles, and says which are complete.
struct Writer<'a, 'k> {
    k: &'k Builder,
    grid: &'a Grid<'k>,
    notes: &'a Notes<'k>,
    /// Tiles noted.
    turn: Reg<'k, u32>,
    /// Pieces that the next one has.
    held: Reg<'k, u32>,
}

impl<'k> Writer<'_, 'k> {
    /// Starts a tile with `count` pieces, fewer than it has, that are all the same.
    fn start_with(&self, count: Reg<'k, u32>, spot: Reg<'k, u32>) {
        let Self {
            k,
            notes,
            turn,
            held,
            ..
        } = *self;
        self.wait_for_room();
        k.if_(k.lane().lt(count), || {
            k.store_shared(notes.spots(turn).plus(k.lane() * 4), spot);
        });
        held.set(count);
    }

    /// Waits until the tile's note is free.
    fn wait_for_room(&self) {
        let Self { k, notes, turn, .. } = *self;
        k.if_(turn.ge(AHEAD), || {
            notes.taken.wait_in_turn(turn - AHEAD);
        });
    }

    /// Adds `count` pieces: each lane that has one is told its rank among those.
    fn add(
        &self,
        there: Reg<'k, bool>,
        rank: Reg<'k, u32>,
        count: Reg<'k, u32>,
        spot: Reg<'k, u32>,
    ) {
        let Self {
            k,
            notes,
            mut turn,
            mut held,
            ..
        } = *self;
        let pieces = notes.config.pieces();
        let mut done = k.var(0u32);
        k.loop_(|leave| {
            leave.when(done.ge(count));
            k.if_(held.equals(0), || self.wait_for_room());
            let room = k.var(pieces) - held;
            // Of those that are done with this is a large number.
            let at = rank - done;
            k.if_(there & at.lt(room), || {
                k.store_shared(notes.spots(turn).plus((held + at) * 4), spot);
            });
            let added = (count - done).min(room);
            done += added;
            held += added;
            k.if_(held.equals(pieces), || {
                // All lanes have written.
                k.warp_sync();
                self.finish();
                turn += 1;
                held.set(0u32);
            });
        });
    }

    /// Says of the tile's columns what follows from its pieces, and that the note is complete.
    fn finish(&self) {
        let Self {
            k,
            grid,
            notes,
            turn,
            ..
        } = *self;
        let config = notes.config;
        let note = notes.at(turn);
        // Lane i looks at piece i.
        let has_piece = k.lane().lt(config.pieces());
        let spot = notes.spot(grid, turn);
        let bits = grid.bits(spot);
        let to = note.at(BITS);
        match config.piece {
            16 => {
                let pair = bits[0] | (bits[0].butterfly(1) << 16);
                let is_first = (k.lane() & 1).equals(0);
                k.if_(has_piece & is_first, || {
                    k.store_shared(to.plus(k.lane() * 2), pair);
                });
            }
            piece => k.if_(has_piece, || {
                for (i, &word) in (0..).zip(&bits) {
                    k.store_shared(to.plus(k.lane() * (piece / 8)).at(4 * i), word);
                }
            }),
        }
        let row = grid.heavy_row(spot);
        let is_heavy = has_piece & row.lt(config.piece);
        k.if_(is_heavy, || {
            k.store_shared(note.at(HEAVY_COLUMN), k.lane() * config.piece + row);
        });
        let heavy = is_heavy.any().select(HEAVY, 0u32);
        let Stacks(stacks) = grid.stacks(spot, config.pieces());
        k.warp_sync();
        // And then at the bits of 32 columns.
        let own = k.lane().min(words(config) - 1);
        let all = k.load_shared::<u32>(to.plus(own * 4)).equals(u32::MAX);
        let unlike = (!all & k.lane().lt(words(config))).ballot() | heavy;
        k.if_(k.lane().equals(0), || {
            k.store_shared(note.at(UNLIKE), unlike);
            k.store_shared(note.at(STACKS), stacks);
            notes.full.in_turn(turn).arrive();
        });
    }
}
