//! [`Results`]: output and the logarithms of sums, in global memory. Consumers store a tile's from their
//! registers: its place in shared memory has the next tile of queries by then. Rows without any key are
//! the planner's.

use flex_block_attn_ptx::builder::Pair;
use flex_block_attn_ptx::{Arg, Builder, Reg};
use flex_block_attn_tile::{RegTile, RowPair, Warpgroup, four_of_sixteen};

use super::Args;
use super::problem::{Problem, Query};
use super::queries::Note;
use crate::chunk::{self, Heads, Lanes, Rows};

/// Where results go.
pub(super) struct Results<'k> {
    out: Heads<'k>,
    /// Address of the logarithms; 0 if nobody wants them.
    lse: Reg<'k, u64>,
}

/// The arguments for [`Results::new`].
pub(super) fn args(args: &Args<'_>) -> impl Iterator<Item = Arg> {
    chunk::args(args.out)
        .into_iter()
        .chain([Arg::U64(args.lse.unwrap_or(0))])
}

impl<'k> Results<'k> {
    /// Declares its parameters.
    pub(super) fn new(k: &'k Builder) -> Self {
        Self {
            out: Heads::new(k, "out"),
            lse: k.param("lse"),
        }
    }

    /// Stores a warpgroup's output and logarithms: each thread has two queries' rows, if they are tokens.
    pub(super) fn store(
        &self,
        problem: &Problem<'k>,
        wg: Warpgroup<'k>,
        note: Note<'k>,
        queries: [Query<'k>; 2],
        (output, pair): (&RegTile<'k>, Pair),
        log_sum: RowPair<'k>,
    ) {
        let k = problem.k;
        let at = self.of_note(problem, note);
        // A row lies in the four threads of a quad: one of them writes its logarithm.
        let writes = (wg.lane & 3).equals(0) & at.wants_lse;
        let own = (four_of_sixteen(wg.lane) * 2).to_u64();
        let fours = output.fours(wg.lane, pair);
        for (row, (token, inside)) in queries.into_iter().enumerate() {
            let lse = at.logarithm(token);
            k.where_(writes & inside, || k.store_global(lse, log_sum[row]));
            let address = at.rows.row(token) + own;
            // Products are in flight: branches that only some threads take would have ptxas wait for
            // them.
            k.where_(inside, || {
                for (i, four) in (0..).zip(&fours) {
                    k.store_globals(address.at(2 * 16 * i), four[row]);
                }
            });
        }
    }

    /// Stores zeros and logarithms for as many queries without any key. A whole warp.
    pub(super) fn store_none(
        &self,
        problem: &Problem<'k>,
        note: Note<'k>,
        (queries, query): (u32, impl Fn(Reg<'k, u32>) -> Query<'k>),
        head_dim: u32,
        log_sum: Reg<'k, f32>,
    ) {
        let k = problem.k;
        let at = self.of_note(problem, note);
        k.for_(k.lane(), queries, 32, |i| {
            let (token, inside) = query(i);
            k.if_(inside & at.wants_lse, || {
                k.store_global(at.logarithm(token), log_sum);
            });
        });
        let lanes = Lanes::new(head_dim);
        let chunk = k.lane() & (lanes.each - 1);
        let zero = k.var(0u32);
        k.for_(k.lane() / lanes.each, queries, lanes.rows, |i| {
            let (token, inside) = query(i);
            k.if_(inside, || {
                k.store_globals(at.rows.chunk(token, chunk), [zero; 4]);
            });
        });
        k.warp_sync();
    }

    /// Where the results of a note's queries go: to its head's, or to a part's slot.
    fn of_note(&self, problem: &Problem<'k>, note: Note<'k>) -> Place<'k> {
        let whole = self.of_head(problem, note.head(), note.batch());
        let Some(parts) = &problem.parts else {
            return whole;
        };
        let is_part = note.slot().differs(0);
        let (rows, lse) = parts.of_note(note);
        Place {
            rows: whole.rows.or(is_part, rows),
            lse: is_part.select(lse, whole.lse),
            wants_lse: whole.wants_lse | is_part,
        }
    }

    /// Where a head's go.
    pub(super) fn of_head(
        &self,
        problem: &Problem<'k>,
        head: Reg<'k, u32>,
        batch: Reg<'k, u32>,
    ) -> Place<'k> {
        let line = batch * problem.heads + head;
        Place {
            rows: self.out.rows(head, batch),
            lse: self.lse + (line.times_wide(problem.q_len) << 2),
            wants_lse: self.lse.differs(0),
        }
    }
}

/// Where results of a head's queries go.
pub(super) struct Place<'k> {
    pub(super) rows: Rows<'k>,
    /// Of the first query.
    lse: Reg<'k, u64>,
    /// Whether anybody wants logarithms.
    pub(super) wants_lse: Reg<'k, bool>,
}

impl<'k> Place<'k> {
    /// Where the logarithm of a query is: of a video, its token's.
    pub(super) fn logarithm(&self, query: Reg<'k, u32>) -> Reg<'k, u64> {
        self.lse + query.times_wide(4)
    }
}
