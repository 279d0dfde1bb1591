//! [`walk`] says which boxes of a video each tile of keys is put together from: the walker looks at
//! all boxes of a listed tile at once, one in each lane, and leaves [`Notes`] for the loader, which has
//! no time for this between its copies, and for the consumers. It is some tiles ahead of them.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Barriers, Phases, Shared};

use super::Config;
use super::keys::Start;
use super::problem::Problem;
use super::work::Jobs;
use crate::canvas::Grid;

/// Notes there are.
const NOTES: u32 = 8;
/// A note is free when the loader has taken the tile so many before the one it is for. That tile has
/// the place of the one two before it in the ring of keys, and so the consumers are done with the notes
/// of that one, and of all before.
const AHEAD: u32 = NOTES - 2;
/// Bytes of what a note says of a piece.
const PIECE_BYTES: u32 = 16;
/// Where that has the piece's kind, behind its spot and the bits of its keys.
const KIND: u32 = 12;

/// Kinds of pieces: those some of whose keys do not count,
pub(super) const UNLIKE: u32 = 1;
/// and those one of whose keys has a weight.
pub(super) const HEAVY: u32 = 2;
const KIND_BITS: u32 = 2;

/// What is known of each tile of keys, one after the other through all of a thread block's work. `turn`
/// is how many there were before.
pub(super) struct Notes<'k> {
    words: Address<'k, u32>,
    pieces: u32,
    /// The note is there.
    full: Barriers<'k>,
    /// The loader has taken the tile: its place in the ring of keys was free.
    taken: Barriers<'k>,
}

/// What a note says of a piece.
pub(super) struct Piece<'k> {
    k: &'k Builder,
    at: Address<'k, u32>,
}

impl<'k> Notes<'k> {
    pub(super) fn new(shared: &Shared<'k>, config: Config) -> Self {
        let pieces = config.pieces();
        Self {
            words: shared.bytes(NOTES * pieces * PIECE_BYTES, PIECE_BYTES),
            pieces,
            full: shared.barriers(NOTES, 1),
            taken: shared.barriers(NOTES, 1),
        }
    }

    pub(super) fn init(&self) {
        self.full.init();
        self.taken.init();
    }

    /// Waits for the note of a tile. For the loader: consumers wait for the tile.
    pub(super) fn wait(&self, turn: Reg<'k, u32>) {
        self.full.wait_in_turn(turn);
    }

    /// Says that the loader has taken the tile.
    pub(super) fn take(&self, turn: Reg<'k, u32>) {
        self.taken.in_turn(turn).arrive();
    }

    /// Of a tile's note, the i-th piece.
    pub(super) fn piece(&self, turn: Reg<'k, u32>, i: u32) -> Piece<'k> {
        Piece {
            k: turn.builder(),
            at: self.at(turn).at(i * PIECE_BYTES),
        }
    }

    /// The kinds of all its pieces, in a word, the same in all lanes: see [`has`].
    pub(super) fn kinds(&self, turn: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = turn.builder();
        let at = self.at(turn);
        let kind = |i: u32| k.load_shared::<u32>(at.at(i * PIECE_BYTES + KIND)) << (i * KIND_BITS);
        (1..self.pieces)
            .fold(kind(0), |all, i| all | kind(i))
            .uniform()
    }

    fn at(&self, turn: Reg<'k, u32>) -> Address<'k, u32> {
        let bytes = self.pieces * PIECE_BYTES;
        self.words.plus((turn & (NOTES - 1)) * bytes)
    }
}

impl<'k> Piece<'k> {
    /// Where it starts.
    pub(super) fn spot(&self) -> Reg<'k, u32> {
        self.k.load_shared(self.at)
    }

    /// A word, the same in all lanes.
    fn word(&self, at: u32) -> Reg<'k, u32> {
        self.k.load_shared_uniform(self.at.at(at))
    }

    /// Which of its keys count.
    pub(super) fn bits(&self, config: Config) -> Vec<Reg<'k, u32>> {
        (1..=words_of_bits(config))
            .map(|i| self.word(4 * i))
            .collect()
    }

    /// Of a kind of piece that has a key with a weight: which.
    pub(super) fn heavy_row(&self, grid: &Grid<'k>) -> Reg<'k, u32> {
        grid.heavy_row(self.word(0))
    }
}

/// Whether the i-th piece is of a kind, by the kinds of all.
pub(super) fn has<'k>(kinds: Reg<'k, u32>, kind: u32, i: u32) -> Reg<'k, bool> {
    (kinds & (kind << (i * KIND_BITS))).differs(0)
}

/// Words that a piece's keys have bits in.
fn words_of_bits(config: Config) -> u32 {
    config.piece.div_ceil(32)
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
        let nothing = k.var(0u32);
        let few = missing >> config.piece.ilog2();
        writer.add(
            k.lane().lt(few),
            k.lane(),
            few,
            [grid.nowhere(), nothing, nothing, k.var(UNLIKE)],
        );
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
                writer.add(there, rank, those.count_ones(), note_of(grid, config, spot));
            });
        });
    });
}

/// What there is to say of a box.
fn note_of<'k>(grid: &Grid<'k>, config: Config, spot: Reg<'k, u32>) -> [Reg<'k, u32>; 4] {
    let k: &'k Builder = spot.builder();
    let bits = grid.bits(spot);
    let heavy = grid.heavy_row(spot).lt(config.piece);
    let kind = grid.is_full(&bits).select(0u32, UNLIKE) | heavy.select(HEAVY, 0u32);
    let [low, high] = [0, 1].map(|i| bits.get(i).copied().unwrap_or(k.var(0u32)));
    [spot, low, high, kind]
}

/// Puts pieces into tiles, and says which are complete.
struct Writer<'a, 'k> {
    k: &'k Builder,
    notes: &'a Notes<'k>,
    /// Tiles noted.
    turn: Reg<'k, u32>,
    /// Pieces that the next one has.
    held: Reg<'k, u32>,
}

impl<'k> Writer<'_, 'k> {
    /// Adds `count` pieces: of the lanes that have one, the one of `rank` in this order says `words`.
    fn add(
        &self,
        there: Reg<'k, bool>,
        rank: Reg<'k, u32>,
        count: Reg<'k, u32>,
        words: [Reg<'k, u32>; 4],
    ) {
        let Self {
            k,
            notes,
            mut turn,
            mut held,
        } = *self;
        let mut done = k.var(0u32);
        k.loop_(|leave| {
            leave.when(done.ge(count));
            k.if_(held.equals(0) & turn.ge(AHEAD), || {
                notes.taken.wait_in_turn(turn - AHEAD);
            });
            let room = k.var(notes.pieces) - held;
            // Of those that are done with this is a large number.
            let at = rank - done;
            k.if_(there & at.lt(room), || {
                let own = notes.at(turn).plus((held + at) * PIECE_BYTES);
                k.store_shareds(own, words);
            });
            let added = (count - done).min(room);
            done += added;
            held += added;
            k.if_(held.equals(notes.pieces), || {
                // All lanes have written.
                k.warp_sync();
                k.if_(k.lane().equals(0), || {
                    notes.full.in_turn(turn).arrive();
                });
                turn += 1;
                held.set(0u32);
            });
        });
    }
}
