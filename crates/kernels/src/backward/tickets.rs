//! [`Tickets`]: the deterministic kernel's reducers, which add to dq in one order.
//!
//! Each piece of dq's sums has a ticket: the number of the tile of keys that was added last, 0 before the
//! first. Tiles of keys are numbered from 1 in the order of their keys, and are added from the last to
//! the first: a reducer waits until the ticket names the next tile behind its own that sees the piece's
//! queries (the row list of their block says which), adds, waits until the sums are written, and puts
//! its own number there. Nobody else touches the ticket meanwhile.
//!
//! There is always somebody who can go on. Thread blocks do not choose their keys by their index, which
//! nobody promises to start in order: they draw numbers from a counter as they start, and get, of a head,
//! the last keys first. So who waits, in whatever order it walks its queries, waits for thread blocks
//! that drew before it and hence run; of those that run, the one with the least number waits for nobody.
//!
//! All lists are walked upwards from their start, and keys come downwards, because of masks with
//! neighbourhoods: of a band, the next thread block's first queries lie before this one's, and when it
//! comes to common ones this one has left them. (With both upwards each would wait for all before it.)
//! Where neighbours see the same queries, each trails by the time of one sum: with 3 us, and 2 us for a
//! tile, the last of 132 thread blocks starts to add 0.4 ms after the first. This is lost but once: who
//! comes after the first round starts as late as its predecessors came to their end. Of 24 heads of
//! 15360 keys and queries, some 11 ms, it is 4 %.

use flex_block_attn_mask::Side;
use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::ir::{Fence, Scope, Special};
use flex_block_attn_ptx::{Arg, Builder, Reg};
use flex_block_attn_tile::{Phases, Shared};

use super::kernel::{END, Outgoing, Stores};
use super::queries::{KeyTile, Problem};
use super::{Args, Config, HEADER, KEYS, ROW_BYTES, TICKET, UNIT, UNIT_BYTES};
use crate::lists::{self, Lists, PARTIAL};

/// In the place of an entry of a list: there is none.
const NO_ENTRY: u32 = u32::MAX;
/// In the place of a list: none has been looked at.
const NO_LIST: u32 = u32::MAX;
/// In the place of a ticket: of a lane that has no piece of the unit; of all when there are no more.
const NO_PIECE: u32 = u32::MAX - 1;

/// The order of thread blocks and of their sums.
pub(super) struct Tickets<'a, 'k> {
    k: &'k Builder,
    problem: &'a Problem<'k>,
    /// Address of the header, whose first word is the number that is drawn next.
    header: Reg<'k, u64>,
    /// The plan's rows.
    rows: Lists<'k>,
    /// In shared memory: the number that this thread block has drawn.
    drawn: Address<'k, u32>,
}

/// The unit that a reducer adds next, lane `i` having its piece `i`. In few registers: words are counted
/// by 32 bits, and what can be made again is not kept.
struct Unit<'k> {
    /// Which ticket is the piece's; [`NO_PIECE`] or [`END`].
    ticket: Reg<'k, u32>,
    /// What it says when it is this thread block's turn.
    turn: Reg<'k, u32>,
    /// The row of the mask that was looked at last, by its list's first word, and its turn: neighbours
    /// are of one block of queries.
    list: Reg<'k, u32>,
    turn_of_list: Reg<'k, u32>,
}

/// The arguments for [`Tickets::new`].
pub(super) fn args(args: &Args) -> Vec<Arg> {
    let mut list = vec![Arg::U64(args.tickets)];
    list.extend(lists::args_beside(args.layout, Side::Rows));
    list
}

impl<'a, 'k> Tickets<'a, 'k> {
    /// Declares its parameters, and takes its shared memory.
    pub(super) fn new(problem: &'a Problem<'k>, shared: &Shared<'k>) -> Self {
        let k = problem.k;
        Self {
            k,
            problem,
            header: k.param("tickets"),
            rows: problem.lists.beside(),
            drawn: shared.bytes(4, 4),
        }
    }

    /// Draws the thread block's number: one thread does, then all sync.
    pub(super) fn draw(&self) {
        let number = self.k.atomic_add_global(self.header, 1);
        self.k.store_shared(self.drawn, number);
    }

    /// The keys for that number: of each head the last come first.
    pub(super) fn keys(&self) -> KeyTile<'k> {
        let (k, tiles) = (self.k, self.k.grid_x());
        let kv_heads = k.special(Special::GridY);
        let number = k.load_shared_uniform(self.drawn);
        let line = number / tiles;
        KeyTile {
            first: (tiles - 1 - number % tiles) * KEYS,
            head: line % kv_heads,
            batch: line / kv_heads,
        }
    }

    /// Does reducer `index`'s work, a whole warp.
    pub(super) fn reduce(
        &self,
        config: Config,
        keys: KeyTile<'k>,
        index: Reg<'k, u32>,
        stores: &Stores<'k>,
    ) {
        let (k, problem) = (self.k, self.problem);
        let leader = k.lane().equals(0);
        let phases = Phases::new(k);
        let queries = stores.queries.consumer(leader, &phases);
        let full = |out: &Outgoing<'k>| phases.waiter(out.full.at(index));
        let full: Vec<_> = stores.dq.iter().map(full).collect();
        let bytes = config.piece * ROW_BYTES;
        let next = Unit {
            ticket: k.var(END),
            turn: k.var(0u32),
            list: k.var(NO_LIST),
            turn_of_list: k.var(0u32),
        };
        let look_ahead = |stage: usize| {
            queries.wait(stage);
            let (first, panel) = config.own_unit(index);
            let note = stores.notes[stage];
            let line = k.load_shared_uniform(note);
            let row = k.var(problem.padded());
            k.if_(
                k.lane().lt(config.unit_pieces()) & line.differs(END),
                || {
                    let own = note.plus((first + k.lane()) * 8);
                    row.set(k.load_shared::<u32>(own.at(4)));
                },
            );
            k.warp_sync();
            queries.release(stage);
            next.ticket
                .set(line.equals(END).select(k.var(END), k.var(NO_PIECE)));
            // What only fills the tile up is not wanted.
            k.if_(row.lt(problem.padded()), || {
                let panel = line * (config.head_dim / UNIT) + panel;
                next.ticket.set((panel * problem.padded() + row) / TICKET);
            });
            for i in 0..config.unit_pieces() {
                self.look_up(&next, keys, line, row, i);
            }
        };
        look_ahead(0);
        k.loop_(|leave| {
            for (stage, other) in [(0, 1), (1, 0)] {
                leave.when(next.ticket.equals(END));
                let number = stage % stores.dq.len();
                let out = &stores.dq[number];
                let ticket = next.ticket.copied();
                let address = || (self.header + ticket.times_wide(4)).at(4 * HEADER);
                // Before the unit is there: to ask takes long.
                k.if_(ticket.lt(NO_PIECE), || {
                    k.loop_(|leave| {
                        let last = k.load_acquire(address(), Scope::Gpu);
                        leave.when(last.equals(next.turn));
                    });
                });
                // What was read orders this thread's sums, which the async proxy makes.
                k.fence(Fence::ProxyAsyncGlobal);
                full[number].wait();
                k.if_(ticket.lt(NO_PIECE), || {
                    let to = problem.dq + ticket.times_wide(TICKET * ROW_BYTES);
                    let from = out.units.plus(index * UNIT_BYTES + k.lane() * bytes);
                    k.bulk_reduce_add(to, from, bytes);
                });
                k.bulk_commit();
                // The next tile is there: of it this consumer has made scores already.
                look_ahead(other);
                k.bulk_wait_read(0);
                k.warp_sync();
                k.where_(leader, || out.empty.at(index).arrive());
                // Sums that have been waited for are seen by whoever sees the ticket.
                k.bulk_wait(0);
                k.if_(ticket.lt(NO_PIECE), || {
                    k.store_release(address(), keys.first / KEYS + 1, Scope::Gpu);
                });
            }
        });
    }

    /// Notes for the lane with piece `i`, from query `row` of it on, whose turn comes before.
    fn look_up(
        &self,
        next: &Unit<'k>,
        keys: KeyTile<'k>,
        line: Reg<'k, u32>,
        row: Reg<'k, u32>,
        i: u32,
    ) {
        let (k, problem) = (self.k, self.problem);
        let row = row.from_lane(i);
        k.if_(row.lt(problem.padded()), || {
            let record = self
                .rows
                .record(line - keys.batch * problem.heads, keys.batch);
            let block = row / problem.q_block;
            let list = self.rows.list(record, block);
            k.if_(list.differs(next.list), || {
                next.list.set(list);
                let end = list + self.rows.count(record, block);
                next.turn_of_list.set(self.turn_before(keys, list, end));
            });
            let own = k.lane().equals(i);
            next.turn.set(own.select(next.turn_of_list, next.turn));
        });
    }

    /// The number of the first tile behind these keys that has one of the columns in words `list..end` of
    /// the plan; 0 if none does.
    fn turn_before(
        &self,
        keys: KeyTile<'k>,
        list: Reg<'k, u32>,
        end: Reg<'k, u32>,
    ) -> Reg<'k, u32> {
        let (k, problem) = (self.k, self.problem);
        let number = k.var(0u32);
        let behind = keys.first + KEYS;
        k.if_(behind.lt(problem.kv_len), || {
            // A column's last keys may lie there, too.
            let column = self.first_from(list, end, behind / problem.kv_block);
            k.if_(column.differs(NO_ENTRY), || {
                let first = (column * problem.kv_block).max(keys.first + KEYS);
                number.set(first / KEYS + 1);
            });
        });
        number
    }

    /// The first entry, of an ascending list in words `start..end` of the plan, that is not below
    /// `bound`; [`NO_ENTRY`] if all are. All lanes look at once.
    fn first_from(
        &self,
        start: Reg<'k, u32>,
        end: Reg<'k, u32>,
        bound: Reg<'k, u32>,
    ) -> Reg<'k, u32> {
        let k = self.k;
        let entry = k.var(NO_ENTRY);
        let look = |at: Reg<'k, u32>| {
            entry.set(NO_ENTRY);
            k.if_(at.lt(end), || {
                let word = self.rows.word(at);
                entry.set(match self.problem.exact {
                    None => word,
                    Some(_) => word & !PARTIAL,
                });
            });
        };
        // The starts of 32 parts of 32: it is in the last that starts below the bound, or behind it.
        look(start + k.lane() * 32);
        let below = entry.lt(bound).ballot().count_ones();
        let mut at = k.var(start + k.lane());
        k.if_(below.gt(0), || at += (below - 1) * 32);
        k.loop_(|leave| {
            look(at);
            leave.when(entry.ge(bound).any());
            at += 32;
        });
        entry.ge(bound).select(entry, k.var(NO_ENTRY)).warp_min()
    }
}
