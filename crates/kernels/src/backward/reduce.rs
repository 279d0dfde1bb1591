//! The reducers: one for each consumer, a thread, which has the units of dq that the consumer leaves
//! added to memory.

use flex_block_attn_ptx::Reg;
use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::ir::Fence;
use flex_block_attn_tile::Phases;

use super::kernel::{END, NEXT_PIECE, ROWS, Stores, WHOLE};
use super::queries::Problem;
use super::{Config, ROW_BYTES, UNIT};

/// Does reducer `index`'s work.
pub(super) fn reduce<'k>(
    config: Config,
    problem: &Problem<'k>,
    index: Reg<'k, u32>,
    stores: &Stores<'k>,
) {
    let k = problem.k;
    let phases = Phases::new(k);
    let queries = stores.queries.consumer(k.lane().equals(0), &phases);
    let out = &stores.dq;
    let full = phases.waiter(out.full.at(index));
    let bytes = config.piece * ROW_BYTES;
    let (first, panel) = config.own_unit(index);
    // The next unit's head and pieces, noted before the loader writes the next note.
    let line = k.var(END);
    let rows: Vec<Reg<'k, u32>> = (0..config.unit_pieces()).map(|_| k.var(0u32)).collect();
    let whole = k.var(1u32);
    let read_note = |stage: usize| {
        queries.wait(stage);
        let note = stores.notes[stage];
        line.set(k.load_shared::<u32>(note));
        k.if_(line.differs(END), || {
            let own = note.plus(first * NEXT_PIECE);
            for (i, row) in (0..).zip(&rows) {
                row.set(k.load_shared::<u32>(own.at(ROWS + NEXT_PIECE * i)));
            }
            if config.pieces() > 1 {
                whole.set(k.load_shared::<u32>(note.at(WHOLE)));
            }
        });
        queries.release(stage);
    };
    read_note(0);
    k.loop_(|leave| {
        for other in [1, 0] {
            leave.when(line.equals(END));
            full.wait();
            // Between the consumer's stores and the copies that read them: by one thread here, not by all
            // of those, which would wait for it with their products in flight.
            k.fence(Fence::ProxyAsyncShared);
            let panel = (line * (config.head_dim / UNIT) + panel).times_wide(problem.padded());
            let unit = out.units.plus(index * config.unit_bytes());
            let add = |row: Reg<'k, u32>, from: Address<'k, u32>, bytes: u32| {
                let to = problem.dq + (panel + row.to_u64()) * u64::from(ROW_BYTES);
                match config.deterministic {
                    false => k.bulk_reduce_add::<f32>(to, from, bytes),
                    true => k.bulk_reduce_add::<i32>(to, from, bytes),
                }
            };
            let together = || add(rows[0], unit, config.unit_bytes());
            let apart = || {
                for (i, &row) in (0..).zip(&rows) {
                    // What only fills the tile up is not wanted.
                    k.if_(row.lt(problem.padded()), || {
                        add(row, unit.at(i * bytes), bytes)
                    });
                }
            };
            match config.pieces() {
                // Tiles of a video may hold nothing, where the last boxes of a list have no token.
                1 if config.canvas => apart(),
                1 => together(),
                _ => k.if_else(whole.differs(0), together, apart),
            }
            k.bulk_commit();
            // The next tile is there: of it this consumer has made scores already.
            read_note(other);
            // Sums that have been read are written before the launch ends: nothing here waits for that.
            k.bulk_wait_read(0);
            out.empty.at(index).arrive();
        }
    });
}
