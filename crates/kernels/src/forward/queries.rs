//! [`Queries`]: a thread block's tile of queries, and the [`Note`] that tells the consumers what it is.
//!
//! Notes come ahead of tiles: while there is one tile, notes are of it, the one before, whose output
//! consumers may still be busy with, and the one that comes next.

use flex_block_attn_ptx::builder::{Address, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Barrier, Barriers, Place, Shared, SharedTile};

use super::problem::{Part, Problem, Query, Tile};
use super::{Config, Rows};
use crate::canvas::{Grid, Maps};

/// In a note's count of tiles: there are no more queries.
const END: u32 = u32::MAX;
/// Bytes of a note; of a video's queries the spots of their pieces are behind it.
const NOTE_BYTES: u32 = 16;
/// Notes there are. A note's place is free when the tile before last has been given back, which is when
/// the queries before it are done with: that is known when the last tile is filled.
const NOTES: u32 = 4;

/// The tile, its barriers, and the notes.
#[derive(Clone, Copy)]
pub(super) struct Queries<'k> {
    pub(super) tile: SharedTile<'k>,
    notes: Address<'k, u32>,
    /// The note is there. In turn: a second may be left before the first is seen, a third may not.
    noted: Barriers<'k>,
    /// The tile is there.
    full: Barrier<'k>,
    /// Each consumer's warp needs the tile no longer; of mixed rows, the loader of values its note.
    empty: Barrier<'k>,
    /// Tokens of a video's pieces, and how many spots of them a note has; else none.
    piece: u32,
    spots: u32,
}

/// What consumers must know of a tile of queries.
#[derive(Clone, Copy)]
pub(super) struct Note<'k> {
    /// First query; of a video nothing.
    pub(super) first: Reg<'k, u32>,
    /// Head of q, and batch above it.
    pub(super) place: Reg<'k, u32>,
    /// Tiles of keys, at least one.
    pub(super) tiles: Reg<'k, u32>,
    /// See [`Note::columns_of`]; of a video, padding that is attended.
    pub(super) columns: Reg<'k, u32>,
}

/// Bits of a note's columns above which the part's slot is.
const COLUMN_BITS: u32 = 8;

/// The side that loads: one thread, or a warp.
pub(super) struct Filling<'a, 'k> {
    k: &'k Builder,
    queries: &'a Queries<'k>,
    /// Notes left.
    noted: Reg<'k, u32>,
}

/// The side that multiplies.
pub(super) struct Using<'a, 'k> {
    k: &'k Builder,
    queries: &'a Queries<'k>,
    leader: Reg<'k, bool>,
    /// Notes seen.
    seen: Reg<'k, u32>,
}

impl<'k> Queries<'k> {
    pub(super) fn new(shared: &Shared<'k>, config: Config) -> Self {
        let shape = config.q_shape();
        let spots = if config.canvas { config.q_pieces() } else { 0 };
        let readers = match config.rows {
            Rows::Mixed => 1,
            Rows::Whole(_) | Rows::Pairs(_) => 0,
        };
        Self {
            tile: shared.tile(shape),
            notes: shared.bytes(NOTES * (NOTE_BYTES + 4 * spots), NOTE_BYTES),
            noted: shared.barriers(2, 1),
            full: shared.barrier(1),
            empty: shared.barrier(shape.rows / 16 + readers),
            piece: config.piece,
            spots,
        }
    }

    pub(super) fn init(&self) {
        self.noted.init();
        self.full.init();
        self.empty.init();
    }

    pub(super) fn filling(&self, k: &'k Builder) -> Filling<'_, 'k> {
        Filling {
            k,
            queries: self,
            noted: k.var(0u32),
        }
    }

    /// `leader` is one lane of each warp.
    pub(super) fn using(&self, leader: Reg<'k, bool>) -> Using<'_, 'k> {
        let k = leader.builder();
        Using {
            k,
            queries: self,
            leader,
            seen: k.var(0u32),
        }
    }

    /// The place of the note after so many.
    fn note(&self, notes: Reg<'k, u32>) -> Address<'k, u32> {
        self.notes
            .plus((notes & (NOTES - 1)) * (NOTE_BYTES + 4 * self.spots))
    }

    /// The i-th query of the note after so many.
    fn query(&self, problem: &Problem<'k>, notes: Reg<'k, u32>, i: Reg<'k, u32>) -> Query<'k> {
        let k = problem.k;
        match &problem.grid {
            None => {
                let first = k.load_shared_uniform(self.note(notes));
                problem.query(first + i)
            }
            Some(grid) => query_of_box(grid, self.note(notes).at(NOTE_BYTES), self.piece, i),
        }
    }
}

/// The i-th query of a tile whose pieces' spots are at `spots`.
pub(super) fn query_of_box<'k>(
    grid: &Grid<'k>,
    spots: Address<'k, u32>,
    piece: u32,
    i: Reg<'k, u32>,
) -> Query<'k> {
    let k = i.builder();
    let spot = k.load_shared(spots.plus((i >> piece.ilog2()) * 4));
    grid.token_of_box(spot, i & (piece - 1))
}

impl<'k> Filling<'_, 'k> {
    /// Leaves the next note: that of a tile, which must be filled, or that there are no more. The tile
    /// before the one before has been waited for.
    pub(super) fn announce(&self, note: Note<'k>) {
        let Self { k, queries, .. } = *self;
        let mut noted = self.noted;
        k.if_(k.lane().equals(0), || {
            k.store_shareds(queries.note(noted), note.to_words());
            queries.noted.in_turn(noted).arrive();
        });
        noted += 1;
    }

    /// As [`Filling::announce`], of a video, by a whole warp: the spots of the tile's pieces are at
    /// `spots`, but where there are no more.
    pub(super) fn announce_boxes(&self, note: Note<'k>, spots: Address<'k, u32>) {
        let Self { k, queries, .. } = *self;
        k.if_(k.lane().lt(queries.spots) & !note.is_end(), || {
            let spot = k.load_shared::<u32>(spots.plus(k.lane() * 4));
            let to = queries.note(self.noted).at(NOTE_BYTES);
            k.store_shared(to.plus(k.lane() * 4), spot);
        });
        k.warp_sync();
        self.announce(note);
    }

    /// Waits until the tile before is done with.
    pub(super) fn wait(&self) {
        // Of the first tile there is no one before: the wait passes at once.
        self.queries.empty.wait_for(self.noted & 1);
    }

    /// Loads the tile that was announced. Its place is empty.
    pub(super) fn fill(&self, map: Reg<'k, u64>, note: Note<'k>) {
        let Queries { tile, full, .. } = *self.queries;
        full.arrive_expect(tile.shape.bytes());
        let place = Place::rows(note.first, note.head(), note.batch());
        tile.load(map, place, full, TmaOptions::default());
    }

    /// As [`Filling::fill`], of a video, by a whole warp: the spots of its pieces are at `spots`.
    pub(super) fn fill_boxes(
        &self,
        grid: &Grid<'k>,
        maps: Maps<'k>,
        note: Note<'k>,
        spots: Address<'k, u32>,
    ) {
        let Queries { tile, full, .. } = *self.queries;
        let spot = grid.spot_of_lane(spots, tile.shape.rows);
        let line = [note.head(), note.batch()];
        grid.fill((tile, full), maps, spot, None, line);
    }
}

impl<'k> Using<'_, 'k> {
    /// Waits for the next note.
    pub(super) fn next(&self) {
        let mut seen = self.seen;
        self.queries.noted.wait_in_turn(seen);
        seen += 1;
    }

    /// Waits for the tile that the last note is of.
    pub(super) fn wait(&self) {
        self.queries.full.wait_for((self.seen & 1) ^ 1);
    }

    /// Says that this warp needs the tile no longer. Its note it may read until it gives back the next.
    pub(super) fn release(&self) {
        self.k.where_(self.leader, || self.queries.empty.arrive());
    }

    /// The last note.
    pub(super) fn note(&self) -> Note<'k> {
        self.read(self.seen - 1)
    }

    /// The note before.
    pub(super) fn note_before(&self) -> Note<'k> {
        self.read(self.seen - 2)
    }

    /// The i-th query of the last note.
    pub(super) fn query(&self, problem: &Problem<'k>, i: Reg<'k, u32>) -> Query<'k> {
        self.queries.query(problem, self.seen - 1, i)
    }

    /// And of the note before.
    pub(super) fn query_before(&self, problem: &Problem<'k>, i: Reg<'k, u32>) -> Query<'k> {
        self.queries.query(problem, self.seen - 2, i)
    }

    fn read(&self, notes: Reg<'k, u32>) -> Note<'k> {
        let at = self.queries.note(notes);
        Note::from_words([0, 1, 2, 3].map(|i| self.k.load_shared_uniform(at.at(4 * i))))
    }
}

impl<'k> Note<'k> {
    /// The note that there are no more queries.
    pub(super) fn end(k: &'k Builder) -> Self {
        Self::from_words([k.var(END); 4])
    }

    /// Whether it says so.
    pub(super) fn is_end(self) -> Reg<'k, bool> {
        self.tiles.equals(END)
    }

    /// A tile's head and batch in a word.
    pub(super) fn place(tile: Tile<'k>) -> Reg<'k, u32> {
        tile.head | (tile.batch << 16)
    }

    /// Columns of the first tile of keys that are keys, at most 192, and above them a part's slot.
    pub(super) fn columns_of(columns: Reg<'k, u32>, part: Part<'k>) -> Reg<'k, u32> {
        columns | (part.slot << COLUMN_BITS)
    }

    /// Those columns.
    pub(super) fn first_columns(self) -> Reg<'k, u32> {
        self.columns & ((1 << COLUMN_BITS) - 1)
    }

    /// As [`Part::slot`].
    pub(super) fn slot(self) -> Reg<'k, u32> {
        self.columns >> COLUMN_BITS
    }

    pub(super) fn head(self) -> Reg<'k, u32> {
        self.place & 0xffff
    }

    pub(super) fn batch(self) -> Reg<'k, u32> {
        self.place >> 16
    }

    pub(super) fn to_words(self) -> [Reg<'k, u32>; 4] {
        [self.first, self.place, self.tiles, self.columns]
    }

    pub(super) fn from_words([first, place, tiles, columns]: [Reg<'k, u32>; 4]) -> Self {
        Self {
            first,
            place,
            tiles,
            columns,
        }
    }
}
