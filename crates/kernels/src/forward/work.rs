//! What a thread block works on. [`Work`] says which tile of queries comes next and what its list of
//! keys is: the planner, one thread, looks these up while the tile before is under way, since a
//! look-up leads to the next and each takes long. [`Jobs`] hands them to the loader, another thread.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Barrier, Phases, Shared, Waiter};

use super::keys::{Lists, Start};
use super::queries::Note;
use super::{Config, QUERIES};

/// The whole problem, as the parameters say.
pub(super) struct Work<'k> {
    k: &'k Builder,
    config: Config,
    lists: Lists<'k>,
    counter: Reg<'k, u64>,
    /// Tiles of queries of all heads and batches.
    tiles: Reg<'k, u32>,
    /// Tiles of queries of a head.
    row_tiles: Reg<'k, u32>,
    /// Tiles of queries of a block.
    q_tiles_per_block: Reg<'k, u32>,
    heads: Reg<'k, u32>,
    q_len: Reg<'k, u32>,
    /// Heads of q for each of k and v.
    group: Reg<'k, u32>,
    /// Where a record has the order of its rows; their counts are at its start.
    order: Reg<'k, u32>,
    /// Where it has their lists, and words from one list to the next.
    first_list: Reg<'k, u32>,
    list_stride: Reg<'k, u32>,
    /// Words from one record to the next.
    head_record: Reg<'k, u32>,
    batch_record: Reg<'k, u32>,
}

/// A tile of queries, and where its keys start.
pub(super) struct Job<'k> {
    pub(super) note: Note<'k>,
    /// Head of k and v.
    pub(super) kv_head: Reg<'k, u32>,
    pub(super) start: Start<'k>,
}

/// A tile of queries, its list not looked up yet.
struct QueryTile<'k> {
    head: Reg<'k, u32>,
    batch: Reg<'k, u32>,
    /// First word of its record.
    record: Reg<'k, u32>,
    block: Reg<'k, u32>,
    first: Reg<'k, u32>,
}

impl<'k> Work<'k> {
    /// Declares its parameters; those of `lists`, heads and the queries' length are declared.
    pub(super) fn new(
        k: &'k Builder,
        config: Config,
        lists: Lists<'k>,
        heads: Reg<'k, u32>,
        q_len: Reg<'k, u32>,
    ) -> Self {
        Self {
            k,
            config,
            lists,
            heads,
            q_len,
            counter: k.param("counter"),
            tiles: k.param("tiles"),
            row_tiles: k.param("row_tiles"),
            q_tiles_per_block: k.param("q_tiles_per_block"),
            group: k.param("group"),
            order: k.param("order"),
            first_list: k.param("first_list"),
            list_stride: k.param("list_stride"),
            head_record: k.param("head_record"),
            batch_record: k.param("batch_record"),
        }
    }

    /// Puts up all the jobs that this thread block takes, then one that says that there are no more.
    pub(super) fn plan(&self, jobs: &Jobs<'k>) {
        let k = self.k;
        let emptied = Phases::new(k).waiter_ahead(jobs.empty);
        let tile = k.var(k.cta_x());
        k.loop_(|leave| {
            leave.when(tile.ge(self.tiles));
            let place = self.place(tile);
            // The sequence may end within its last block.
            k.if_(place.first.lt(self.q_len), || {
                let job = self.job(place);
                emptied.wait();
                jobs.put(k, &job);
            });
            tile.set(k.atomic_add_global(self.counter, 1) + k.grid_x());
        });
        emptied.wait();
        jobs.put(k, &self.end());
    }

    fn place(&self, tile: Reg<'k, u32>) -> QueryTile<'k> {
        let line = tile / self.row_tiles;
        let (head, batch) = (line % self.heads, line / self.heads);
        let in_head = tile % self.row_tiles;
        let record = head * self.head_record + batch * self.batch_record;
        let rank = in_head / self.q_tiles_per_block;
        let block = self.lists.word(record + self.order + rank);
        let part = in_head % self.q_tiles_per_block;
        QueryTile {
            head,
            batch,
            record,
            block,
            first: (block * self.q_tiles_per_block + part) * QUERIES,
        }
    }

    fn job(&self, tile: QueryTile<'k>) -> Job<'k> {
        let QueryTile {
            head,
            batch,
            record,
            block,
            first,
        } = tile;
        let count = self.lists.word(record + block);
        let list = record + self.first_list + block * self.list_stride;
        let (tiles, columns, start) = self.lists.start(self.k, self.config, list, count);
        Job {
            note: Note {
                first,
                place: head | (batch << 16),
                tiles,
                columns,
            },
            kv_head: head / self.group,
            start,
        }
    }

    fn end(&self) -> Job<'k> {
        let none = self.k.var(0u32);
        Job {
            note: Note::end(self.k),
            kv_head: none,
            start: Start {
                entry: none,
                block: none,
                left: none,
                missing: none,
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

/// Words of a job: three groups of four.
const JOB_BYTES: u32 = 48;

impl<'k> Jobs<'k> {
    pub(super) fn new(shared: &Shared<'k>) -> Self {
        Self {
            words: shared.bytes(JOB_BYTES, 16),
            full: shared.barrier(1),
            empty: shared.barrier(1),
        }
    }

    pub(super) fn init(&self) {
        self.full.init();
        self.empty.init();
    }

    fn put(&self, k: &'k Builder, job: &Job<'k>) {
        let Start {
            entry,
            block,
            left,
            missing,
        } = job.start;
        k.store_shareds(self.words, job.note.to_words());
        k.store_shareds(self.words.at(16), [entry, block, left, missing]);
        k.store_shared(self.words.at(32), job.kv_head);
        self.full.arrive();
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

    /// Gives the job's place back to the planner.
    pub(super) fn release(&self) {
        self.empty.arrive();
    }
}
