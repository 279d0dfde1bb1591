//! [`Queries`]: a thread block's tile of queries, from its load to the output that takes its place
//! in shared memory, and the [`Note`] that tells the consumers what it is.

use flex_block_attn_ptx::builder::{Address, Pair, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Barrier, Phases, Place, RegTile, Shared, SharedTile, Waiter, Warpgroup,
};

use super::problem::Tile;
use super::{Config, OWN};
use crate::canvas::{Grid, Maps, Source};

/// In a note's place of tiles: there are no more queries.
const END: u32 = u32::MAX;
/// Named barriers: warpgroup `w` waits for its own threads at `OWN_SYNC + w`.
const OWN_SYNC: u32 = 5;
/// Pieces of a tile of queries at most, of a video.
pub(super) const MOST_PIECES: u32 = 8;

/// The tile, its barriers, and the note.
#[derive(Clone, Copy)]
pub(super) struct Queries<'k> {
    pub(super) tile: SharedTile<'k>,
    note: Address<'k, u32>,
    /// For a video: the spots of its pieces, so many rows each.
    spots: Option<(Address<'k, u32>, u32)>,
    /// Tile and note are there.
    full: Barrier<'k>,
    /// Each consumer has stored its output, and each of its warps has read the note for the last time.
    empty: Barrier<'k>,
}

/// What consumers must know of a tile of queries.
#[derive(Clone, Copy)]
pub(super) struct Note<'k> {
    /// First query.
    pub(super) first: Reg<'k, u32>,
    /// Head of q, and batch above it.
    pub(super) place: Reg<'k, u32>,
    /// Tiles of keys.
    pub(super) tiles: Reg<'k, u32>,
    /// Columns of the first of them that are keys.
    pub(super) columns: Reg<'k, u32>,
}

impl<'k> Queries<'k> {
    pub(super) fn new(shared: &Shared<'k>, config: Config) -> Self {
        let shape = config.q_shape();
        let (tile, note) = (shared.tile(shape), shared.bytes(16, 16));
        let spots = || (shared.bytes(4 * MOST_PIECES, 4), config.piece);
        Self {
            tile,
            note,
            spots: config.canvas.then(spots),
            full: shared.barrier(1),
            empty: shared.barrier(shape.rows / 16),
        }
    }

    pub(super) fn init(&self) {
        self.full.init();
        self.empty.init();
    }

    /// Who waits until the tile before is done with.
    pub(super) fn emptied(&self, phases: &Phases<'k>) -> Waiter<'k> {
        phases.waiter_ahead(self.empty)
    }

    /// Who waits for the next tile.
    pub(super) fn filled(&self, phases: &Phases<'k>) -> Waiter<'k> {
        phases.waiter(self.full)
    }

    /// Leaves a note and loads the tile. The place is empty.
    pub(super) fn fill(&self, k: &'k Builder, map: Reg<'k, u64>, note: Note<'k>) {
        k.store_shareds(self.note, note.to_words());
        self.full.arrive_expect(self.tile.shape.bytes());
        let place = Place::rows(note.first, note.head(), note.batch());
        self.tile.load(map, place, self.full, TmaOptions::default());
    }

    /// Keeps the spots of a video's pieces, which are at `spots`, if it is a video. The place is empty.
    pub(super) fn keep_spots(&self, k: &'k Builder, spots: Address<'k, u32>) {
        if let Some((kept, piece)) = self.spots {
            for i in 0..self.tile.shape.rows / piece {
                k.store_shared(kept.at(4 * i), k.load_shared::<u32>(spots.at(4 * i)));
            }
        }
    }

    /// As [`Queries::fill`], of a video, whose spots are kept.
    pub(super) fn fill_boxes(&self, grid: &Grid<'k>, maps: Maps<'k>, note: Note<'k>) {
        let k = note.first.builder();
        let (kept, piece) = self.spots.expect("a video's spots");
        k.store_shareds(self.note, note.to_words());
        self.full.arrive_expect(self.tile.shape.bytes());
        for i in 0..self.tile.shape.rows / piece {
            let spot = k.load_shared(kept.at(4 * i));
            let part = self.tile.row_range(i * piece, piece);
            grid.load(part, maps, spot, [note.head(), note.batch()], self.full);
        }
    }

    /// Leaves a note of no tile, or of one without keys. The place is empty.
    pub(super) fn pass(&self, k: &'k Builder, note: Note<'k>) {
        k.store_shareds(self.note, note.to_words());
        self.full.arrive();
    }

    /// The note, which has been waited for.
    pub(super) fn note(&self, k: &'k Builder) -> Note<'k> {
        Note::from_words([0, 1, 2, 3].map(|i| k.load_shared_uniform(self.note.at(4 * i))))
    }

    /// Puts this warpgroup's output in its queries' place, stores it, and gives the place back.
    pub(super) fn store(
        &self,
        k: &'k Builder,
        wg: Warpgroup<'k>,
        note: Note<'k>,
        to: (Source<'k>, Option<&Grid<'k>>),
        output: &RegTile<'k>,
        pair: Pair,
    ) {
        let own = self.tile.part(wg.index, OWN);
        // All warps have done with the queries.
        wg.sync(wg.index + OWN_SYNC);
        wg.store(output, pair, own);
        wg.sync(wg.index + OWN_SYNC);
        k.if_(wg.first_thread, || {
            match to {
                (Source::Canvas(maps), Some(grid)) => {
                    let (spots, piece) = self.spots.expect("a video's spots");
                    let spots = spots.plus(wg.index * (OWN / piece * 4));
                    for i in 0..OWN / piece {
                        let spot = k.load_shared(spots.at(4 * i));
                        let part = own.row_range(i * piece, piece);
                        grid.store(part, maps, spot, [note.head(), note.batch()]);
                    }
                }
                (map, _) => {
                    let first = note.first + wg.index * OWN;
                    let place = Place::rows(first, note.head(), note.batch());
                    let panels = (0..own.shape.panels()).map(|panel| place.panel(panel));
                    own.store(map.rows(), panels);
                }
            }
            k.bulk_commit();
            k.bulk_wait_read(0);
        });
        k.where_(wg.leader, || self.empty.arrive());
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
