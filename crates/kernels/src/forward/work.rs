//! [`plan`] says which tile of queries comes next and what its list of keys is: the planner looks
//! these up while the last keys of the tile before are under way, since a look-up leads to the next
//! and each takes long. [`Jobs`] hands them to the loader, another thread. Queries without any key the planner sees to
//! itself.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Barrier, Phases, Shared, Waiter};

use super::board::Board;
use super::keys::Start;
use super::output::Results;
use super::problem::Problem;
use super::queries::Note;
use super::{Config, Rows};

/// A tile of queries, and where its keys start.
pub(super) struct Job<'k> {
    pub(super) note: Note<'k>,
    /// Head of k and v.
    pub(super) kv_head: Reg<'k, u32>,
    pub(super) start: Start<'k>,
}

/// What the planner does, a whole warp: puts up all the jobs that this thread block takes, then one that
/// says that there are no more.
pub(super) fn plan<'k>(
    problem: &Problem<'k>,
    config: Config,
    results: &Results<'k>,
    jobs: &Jobs<'k>,
    board: Option<&Board<'k>>,
) {
    let k = problem.k;
    let taken = jobs.taken(k);
    let queries = config.queries();
    problem.each_tile(board, |tile| {
        let (row, first) = problem.row(tile, queries);
        // The sequence may end within its last block; of a pair who has no queries loads for the other.
        let counts = match config.rows {
            Rows::Pairs(_) => k.var(true),
            Rows::Whole(_) | Rows::Mixed => first.lt(problem.q_len),
        };
        k.if_(counts, || {
            let (tiles, columns, start) = Start::look_up(problem, config, tile, row);
            let note = Note {
                first,
                place: Note::place(tile),
                tiles,
                columns: Note::columns_of(columns, tile.part),
            };
            let some = || {
                jobs.put(&Job {
                    note,
                    kv_head: tile.kv_head,
                    start,
                });
                taken.wait();
            };
            let none = || {
                let log_sum = k.var(f32::NEG_INFINITY);
                let query = |i| problem.query(first + i);
                results.store_none(problem, note, (queries, query), config.head_dim, log_sum);
            };
            k.if_else(tiles.gt(0), some, none);
        });
    });
    jobs.put(&Job::none(k));
}

impl<'k> Job<'k> {
    /// That there are no more.
    pub(super) fn none(k: &'k Builder) -> Self {
        let none = k.var(0u32);
        Self {
            note: Note::end(k),
            kv_head: none,
            start: Start {
                entry: none,
                block: none,
                left: none,
                missing: none,
                partial: none,
            },
        }
    }
}

/// A job's place in shared memory.
pub(super) struct Jobs<'k> {
    words: Address<'k, u32>,
    full: Barrier<'k>,
    empty: Barrier<'k>,
}

/// Tiles of keys that are left to load when the planner takes the next tile of queries. A tile that a
/// thread block has taken early is one that no other can compute, though it be idle: the later, the
/// better. But to take one and to look up its list takes some 3 us, in which up to four tiles of keys
/// are computed.
pub(super) const LATE: u32 = 7;

/// Words of a job: three groups of four.
const JOB_BYTES: u32 = 48;
/// Behind them, for a video, the spots of the pieces of queries, at most 8.
const SPOT_BYTES: u32 = 4 * 8;

impl<'k> Jobs<'k> {
    pub(super) fn new(shared: &Shared<'k>, canvas: bool) -> Self {
        let bytes = JOB_BYTES + if canvas { SPOT_BYTES } else { 0 };
        Self {
            words: shared.bytes(bytes, 16),
            full: shared.barrier(1),
            // The loader reads it, and of a video the other one and the walker do.
            empty: shared.barrier(if canvas { 3 } else { 1 }),
        }
    }

    pub(super) fn init(&self) {
        self.full.init();
        self.empty.init();
    }

    /// Who waits until a job's place is free again.
    pub(super) fn taken(&self, k: &'k Builder) -> Waiter<'k> {
        Phases::new(k).waiter(self.empty)
    }

    /// Where the spots of the pieces of queries lie.
    pub(super) fn spots(&self) -> Address<'k, u32> {
        self.words.at(JOB_BYTES)
    }

    /// Puts one up: a whole warp.
    pub(super) fn put(&self, job: &Job<'k>) {
        let k = job.kv_head.builder();
        let Start {
            entry,
            block,
            left,
            missing,
            partial,
        } = job.start;
        k.if_(k.lane().equals(0), || {
            k.store_shareds(self.words, job.note.to_words());
            k.store_shareds(self.words.at(16), [entry, block, left, missing]);
            k.store_shareds(self.words.at(32), [job.kv_head, partial]);
            self.full.arrive();
        });
    }

    /// Who waits for the next job.
    pub(super) fn filled(&self, phases: &Phases<'k>) -> Waiter<'k> {
        phases.waiter(self.full)
    }

    /// The note, which has been waited for.
    pub(super) fn note(&self, k: &'k Builder) -> Note<'k> {
        Note::from_words(std::array::from_fn(|i| self.word(k, i)))
    }

    /// Where keys start.
    pub(super) fn start(&self, k: &'k Builder) -> Start<'k> {
        Start {
            entry: self.word(k, 4),
            block: self.word(k, 5),
            left: self.word(k, 6),
            missing: self.word(k, 7),
            partial: self.word(k, 9),
        }
    }

    /// Head of k and v.
    pub(super) fn kv_head(&self, k: &'k Builder) -> Reg<'k, u32> {
        self.word(k, 8)
    }

    /// One word at a time, and again when needed again: the loader has few registers.
    fn word(&self, k: &'k Builder, word: usize) -> Reg<'k, u32> {
        k.load_shared(self.words.at(4 * word as u32))
    }

    /// Gives the job's place back to the planner, who then looks for the next one: all who read it do,
    /// the loader when [`LATE`] tiles of keys are left.
    pub(super) fn release(&self) {
        self.empty.arrive();
    }
}
