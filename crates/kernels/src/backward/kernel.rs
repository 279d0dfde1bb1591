//! The main kernel: what is in a thread block's shared memory, who does what, and the loader.
//!
//! A thread block has 128 keys; two consumers, 64 each. The loader walks the queries that see them and
//! fills tiles, the consumers multiply, and for each of them a reducer has its part of dq added to
//! memory.

use flex_block_attn_ptx::builder::{Address, Leave, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Barrier, Barriers, Phases, Place, Ring, Shape, Shared, SharedTile, WARPGROUP, Warpgroup,
};

use super::consume::{Consumer, KEPT_BYTES};
use super::queries::{Problem, WALK_BYTES, Walk};
use super::tiles::{JOB_BYTES, Job};
use super::{Config, KEYS, ROW_BYTES, UNIT, reduce};
use crate::canvas::{Boxes, Source};

/// Stages of q, of dout and of the scores' gradients.
pub(super) const STAGES: usize = 2;
/// Warpgroups that multiply.
pub(super) const CONSUMERS: u32 = 2;
/// Their warps.
pub(super) const WARPS: u32 = 4 * CONSUMERS;
/// In a note's place of a line: there are no more queries.
pub(super) const END: u32 = u32::MAX;
/// Places in a note, and bytes from a piece to the next.
pub(super) const WHOLE: u32 = 4;
pub(super) const ROWS: u32 = 8;
pub(super) const WANTS: u32 = 12;
pub(super) const NEXT_PIECE: u32 = 8;

/// The tensor maps.
#[derive(Clone, Copy)]
struct Maps<'k> {
    /// Of pieces; and of whole tiles, but for videos.
    q: (Source<'k>, Option<Reg<'k, u64>>),
    dout: (Source<'k>, Option<Reg<'k, u64>>),
    k: Source<'k>,
    v: Source<'k>,
}

/// What is in shared memory.
pub(super) struct Stores<'k> {
    pub(super) keys: SharedTile<'k>,
    pub(super) values: SharedTile<'k>,
    /// K is there, and V is.
    pub(super) keys_full: Barrier<'k>,
    pub(super) values_full: Barrier<'k>,
    pub(super) queries: Ring<'k>,
    pub(super) douts: Ring<'k>,
    /// Gradients of the scores, queries by keys: what consumers tell each other.
    pub(super) gradients: Ring<'k>,
    /// dq on its way out.
    pub(super) dq: Outgoing<'k>,
    /// For each stage: lse and deltas of its queries.
    pub(super) lse: Vec<Address<'k, u32>>,
    pub(super) deltas: Vec<Address<'k, u32>>,
    /// And, if dq's sums are of integers, how many steps of them make 1.
    pub(super) steps: Vec<Address<'k, u32>>,
    /// The same of the tile whose dq is made, of each consumer.
    pub(super) kept_steps: Vec<Address<'k, u32>>,
    /// For each stage a note: the line of the workspace that is the queries' head's; at [`WHOLE`],
    /// whether the tile's pieces follow each other in the sequence; for each piece, at [`ROWS`], its
    /// first query, and at [`WANTS`] a bit for each warp whose keys it sees.
    pub(super) notes: Vec<Address<'k, u32>>,
    /// What this thread block does.
    pub(super) job: Job<'k>,
    /// Of a video: where the loader is.
    walk: Option<Address<'k, u32>>,
}

/// What the consumers have made of a tile's dq: of each a unit, and whether it is there, and gone
/// again.
pub(super) struct Outgoing<'k> {
    pub(super) units: Address<'k, u32>,
    pub(super) full: Barriers<'k>,
    pub(super) empty: Barriers<'k>,
}

impl<'k> Stores<'k> {
    /// Makes all barriers ready. One thread.
    fn init(&self, k: &'k Builder) {
        self.keys_full.init();
        self.values_full.init();
        self.queries.init();
        self.douts.init();
        self.gradients.init();
        self.dq.full.init();
        self.dq.empty.init();
        k.mbarrier_init_fence();
    }
}

/// How consumers share the making of a tile's dq, a unit each.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// Half of the columns.
    Columns,
    /// Half of the queries.
    Rows,
}

impl Config {
    pub(super) fn share(self) -> Share {
        match self.head_dim {
            UNIT => Share::Rows,
            _ => Share::Columns,
        }
    }

    /// Which part of a tile's dq is the unit of consumer `index`: its first piece, and which panel.
    pub(super) fn own_unit<'k>(self, index: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let none = || index.builder().var(0u32);
        match self.share() {
            Share::Columns => (none(), index),
            Share::Rows => (index * self.unit_pieces(), none()),
        }
    }

    /// Queries of a unit.
    pub(super) fn unit_rows(self) -> u32 {
        match self.share() {
            Share::Columns => self.queries(),
            Share::Rows => UNIT,
        }
    }

    /// Pieces of a unit, and its bytes.
    pub(super) fn unit_pieces(self) -> u32 {
        self.unit_rows() / self.piece
    }

    pub(super) fn unit_bytes(self) -> u32 {
        self.unit_rows() * ROW_BYTES
    }

    /// Registers that the loader's warpgroup and each of the consumers have: to find boxes takes more,
    /// where consumers have them to spare.
    fn registers(self) -> (u32, u32) {
        match (self.canvas, self.head_dim) {
            (true, 64) => (40, 232),
            _ => (24, 240),
        }
    }

    /// Bytes of a tile's lse, or of its deltas.
    fn numbers_bytes(self) -> u32 {
        4 * self.queries()
    }

    pub(super) fn body(self, k: &Builder) {
        let source = |name| Source::new(k, name, self.canvas.then_some(Boxes::Single));
        let whole = |name| (!self.canvas).then(|| k.tensor_map(name));
        let maps = Maps {
            q: (source("q"), whole("whole_q")),
            dout: (source("dout"), whole("whole_dout")),
            k: source("k"),
            v: source("v"),
        };
        let problem = Problem::new(k, self);
        let shared = Shared::new(k);
        let each = |bytes| -> Vec<_> { (0..STAGES).map(|_| shared.bytes(bytes, 16)).collect() };
        let gradient = Shape::new(self.queries(), KEYS, self.element);
        let if_integers = |bytes| match self.deterministic {
            true => each(bytes),
            false => Vec::new(),
        };
        let outgoing = || Outgoing {
            units: shared.bytes(CONSUMERS * self.unit_bytes(), 128),
            full: shared.barriers(CONSUMERS, WARPS / CONSUMERS),
            empty: shared.barriers(CONSUMERS, 1),
        };
        // What is small lies behind the barriers of a ring: the next one's tiles are aligned.
        let stores = Stores {
            keys: shared.tile(self.kv_shape()),
            values: shared.tile(self.kv_shape()),
            // The reducers read the notes of these.
            queries: Ring::new(&shared, STAGES, self.q_shape(), WARPS + CONSUMERS),
            lse: each(self.numbers_bytes()),
            notes: each(ROWS + NEXT_PIECE * self.pieces()),
            douts: Ring::new(&shared, STAGES, self.q_shape(), WARPS),
            deltas: each(self.numbers_bytes()),
            steps: if_integers(self.numbers_bytes()),
            kept_steps: if_integers(CONSUMERS * KEPT_BYTES),
            gradients: Ring::stored(&shared, STAGES, gradient, WARPS, WARPS),
            dq: outgoing(),
            keys_full: shared.barrier(1),
            values_full: shared.barrier(1),
            job: Job {
                words: shared.bytes(JOB_BYTES, 16),
            },
            walk: self.canvas.then(|| shared.bytes(WALK_BYTES, 16)),
        };
        shared.finish();

        // All sync once barriers are ready; what comes before is what the loader's first copies wait for.
        // The launch may be early, so what was launched before is waited for, too.
        let (producer, consumer) = self.registers();
        k.if_else(
            Warpgroup::number(k).equals(0),
            || {
                Warpgroup::release_registers(k, producer);
                let others = || {
                    // The warps behind the loader's.
                    let reducer = (k.tid() >> 5) - 1;
                    let first_lane = k.lane().equals(0);
                    k.if_(first_lane & reducer.equals(0), || stores.init(k));
                    k.grid_wait();
                    k.grid_launch();
                    k.sync_threads();
                    k.if_(first_lane & reducer.lt(CONSUMERS), || {
                        reduce::reduce(self, &problem, reducer, &stores);
                    });
                };
                let load = || self.load(maps, &problem, &stores);
                k.if_else(k.tid().lt(32), load, others);
            },
            || {
                Warpgroup::acquire_registers(k, consumer);
                k.grid_wait();
                // They have registers for it.
                k.if_(k.tid().equals(WARPGROUP), || {
                    stores.job.find(&problem.tiles)
                });
                k.sync_threads();
                Consumer::new(self, &problem, &stores).run();
            },
        );
    }

    fn load<'k>(self, maps: Maps<'k>, problem: &Problem<'k>, stores: &Stores<'k>) {
        let (k, options) = (problem.k, TmaOptions::default());
        let leader = k.lane().equals(0);
        let phases = Phases::new(k);
        let queries = stores.queries.producer(&phases);
        let douts = stores.douts.producer(&phases);
        k.if_(leader, || {
            for from in [maps.k, maps.v, maps.q.0, maps.dout.0] {
                from.prefetch(k);
            }
            for map in [maps.q.1, maps.dout.1].into_iter().flatten() {
                k.prefetch_map(map);
            }
        });
        k.grid_wait();
        k.sync_threads();
        let keys = stores.job.keys(k);
        let tiles = [
            (stores.keys, maps.k, stores.keys_full),
            (stores.values, maps.v, stores.values_full),
        ];
        k.if_(leader, || {
            for (tile, from, full) in tiles {
                full.arrive_expect(tile.shape.bytes());
                if problem.grid.is_none() {
                    let place = Place::rows(keys.first, keys.head, keys.batch);
                    tile.load(from.rows(), place, full, options);
                }
            }
        });
        if let Some(grid) = &problem.grid {
            k.warp_sync();
            k.if_(k.lane().lt(KEYS / self.piece), || {
                let spot = grid.spot(keys.first + k.lane() * self.piece);
                for (tile, from, full) in tiles {
                    let part = tile.part(k.lane(), self.piece);
                    let line = [keys.head, keys.batch];
                    grid.load(part, from.boxes(), spot, line, full);
                }
            });
        }
        let walk = Walk::new(problem, self, stores.job, stores.walk);
        // Tiles go into the stages in turn, whatever head they are of. Lane i has a tile's piece i.
        let copies = k.lane().lt(self.pieces());
        in_turn(k, |leave, stage| {
            let some = walk.seek();
            // All that can be known is found out before the stage is free: the consumer that is ahead
            // waits for the tile as soon as the other has given its place back.
            let (row, want) = (k.var(0u32), k.var(0u32));
            let spot = problem.grid.as_ref().map(|_| k.var(0u32));
            for i in 0..self.pieces() {
                let next = match (&problem.grid, spot) {
                    (Some(grid), Some(spot)) => {
                        let (row, want, next) = walk.next_box(grid);
                        spot.set(k.lane().equals(i).select(next, spot));
                        (row, want)
                    }
                    _ => walk.next_piece(),
                };
                let own = k.lane().equals(i);
                row.set(own.select(next.0, row));
                want.set(own.select(next.1, want));
            }
            let whole = (self.pieces() > 1).then(|| {
                let first = row.from_lane(0);
                let follows = row.equals(first + k.lane() * self.piece) | !copies;
                let inside = (first + (self.queries() - self.piece)).lt(problem.padded());
                follows.all() & inside
            });
            let line = walk.line();
            let number = line.times_wide(problem.line) + row.to_u64();
            let (tile, full) = queries.wait(stage);
            let note = stores.notes[stage];
            k.if_(leader & !some, || {
                k.store_shared(note, k.var(END));
                full.arrive();
            });
            leave.when(!some);
            let own = note.plus(k.lane() * NEXT_PIECE);
            k.where_(leader, || k.store_shared(note, line));
            if let Some(whole) = whole {
                let word = whole.select(k.var(1u32), k.var(0u32));
                k.where_(leader, || k.store_shared(note.at(WHOLE), word));
            }
            k.where_(copies, || {
                k.store_shared(own.at(ROWS), row);
                k.store_shared(own.at(WANTS), want);
            });
            // A tile, with some numbers for each of its queries.
            type Numbers<'k> = (Address<'k, u32>, Reg<'k, u64>);
            let load = |tile: SharedTile<'k>,
                        full: Barrier<'k>,
                        (pieces, all): (Source<'k>, Option<Reg<'k, u64>>),
                        numbers: &[Numbers<'k>]| {
                // Behind the notes, and before the copies that it expects: of other lanes, too.
                let sync = || {
                    if self.pieces() > 1 {
                        k.warp_sync();
                    }
                };
                sync();
                let bytes = tile.shape.bytes() + numbers.len() as u32 * self.numbers_bytes();
                k.if_(leader, || full.arrive_expect(bytes));
                sync();
                // A lane's queries, `rows` of them.
                let copy = |rows: u32, tile: &dyn Fn(Place)| {
                    let [head, batch] = walk.place();
                    tile(Place::rows(row, head, batch));
                    for &(to, from) in numbers {
                        let to = to.plus(k.lane() * (4 * rows));
                        full.load_bytes(to, from + (number << 2), 4 * rows);
                    }
                };
                let together = |all| {
                    k.if_(leader, || {
                        copy(self.queries(), &|place| {
                            tile.load(all, place, full, options)
                        });
                    });
                };
                let apart = || {
                    k.if_(copies, || {
                        let part = tile.part(k.lane(), self.piece);
                        copy(self.piece, &|place| match (&problem.grid, spot) {
                            (Some(grid), Some(spot)) => {
                                grid.load(part, pieces.boxes(), spot, walk.place(), full);
                            }
                            _ => part.load_panels(pieces.rows(), place, full, options),
                        });
                    });
                };
                match (all, whole) {
                    (None, _) => apart(),
                    (Some(all), None) => together(all),
                    (Some(all), Some(whole)) => k.if_else(whole, || together(all), apart),
                }
            };
            load(tile, full, maps.q, &[(stores.lse[stage], problem.lse)]);
            let (tile, full) = douts.wait(stage);
            let mut numbers = vec![(stores.deltas[stage], problem.delta)];
            if let Some(from) = problem.steps {
                numbers.push((stores.steps[stage], from));
            }
            load(tile, full, maps.dout, &numbers);
        });
    }
}

/// Does `body` for one stage after the other, until it leaves.
fn in_turn<'k>(k: &'k Builder, body: impl Fn(Leave<'k>, usize)) {
    k.loop_(|leave| {
        for stage in 0..STAGES {
            body(leave, stage);
        }
    });
}
