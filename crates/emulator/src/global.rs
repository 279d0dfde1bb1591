//! [`Ledger`]: who accessed each cell of global memory last in this launch, and what releases at
//! device scope published.
//!
//! In: accesses of spans, with the accessor's thread block and clock. Out: nothing, or the earlier
//! access in the way. Accesses of different blocks are ordered by atomics and fences at device scope
//! alone; those of the async proxy need a proxy fence besides, behind what orders them. A cell remembers its last write and its last readers of two blocks: of three readers, one
//! of them unordered, that one can be missed.

use std::collections::HashMap;

use crate::clock::{Component, Published};
use crate::memory::{Memory, Span};
use crate::shadow::Access;

/// An earlier access in the way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conflict {
    /// Bytes from the start of the allocation.
    pub(crate) offset: usize,
    pub(crate) block: u32,
    pub(crate) component: Component,
    pub(crate) instruction: u32,
    pub(crate) write: bool,
    /// Whether the conflict is that memory loaded as constant is written.
    pub(crate) constant: bool,
    /// Whether it is ordered, and only a proxy fence is missing.
    pub(crate) fence: bool,
}

/// An entry: epoch (32 bits), instruction (32), component (16), flags (16), block + 1 (32). 0: none.
type Entry = u128;
const ATOMIC: Entry = 1 << 80;
const CONSTANT: Entry = 1 << 81;

#[derive(Debug)]
struct Cells {
    writes: Vec<Entry>,
    reads: Vec<Entry>,
    /// The last reader of another block than that of `reads`.
    others: Vec<Entry>,
}

/// How two accesses are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// The earlier is over.
    Over,
    /// It is, but a proxy fence is missing.
    Unfenced,
    None,
}

/// The shadow of global memory, for one launch.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Binary logarithm of a cell's bytes.
    cell: u32,
    /// By allocation.
    cells: Vec<Option<Cells>>,
    /// By address: what was published there.
    published: HashMap<u64, Vec<Published>>,
}

fn block_of(entry: Entry) -> u32 {
    (entry >> 96) as u32
}

/// How an entry's access and a later one of block `block` are ordered.
fn order(entry: Entry, block: u32, access: &Access) -> Order {
    let (component, epoch) = ((entry >> 64) as Component, entry as u32);
    if entry & ATOMIC != 0 && access.atomic {
        return Order::Over;
    }
    let clock = access.clock;
    let (over, fenced) = match block_of(entry) {
        0 => (true, true),
        own if own == block + 1 => (clock.seen(component) >= epoch, true),
        other => (
            clock.knows_foreign(other - 1, component, epoch),
            !access.asynchronous || clock.has_fenced_foreign(other - 1, component, epoch),
        ),
    };
    match (over, fenced) {
        (false, _) => Order::None,
        (true, false) => Order::Unfenced,
        (true, true) => Order::Over,
    }
}

impl Ledger {
    /// An empty ledger for a memory's present allocations.
    pub(crate) fn new(memory: &Memory, cell: u32) -> Self {
        let cells = memory.allocations().iter().map(|_| None).collect();
        Self {
            cell,
            cells,
            published: HashMap::new(),
        }
    }

    /// Enters a read (`constant`: by `ld.global.nc`) or a write of some bytes by block `block`.
    pub(crate) fn enter(
        &mut self,
        memory: &Memory,
        span: Span,
        block: u32,
        access: &Access,
        kind: Use,
    ) -> Result<(), Conflict> {
        if span.len == 0 {
            return Ok(());
        }
        let cell = self.cell;
        let count = memory.allocations()[span.allocation]
            .bytes
            .len()
            .div_ceil(1 << cell);
        let cells = self.cells[span.allocation].get_or_insert_with(|| Cells {
            writes: vec![0; count],
            reads: vec![0; count],
            others: vec![0; count],
        });
        let conflict = |at: usize, entry: Entry, write: bool, constant: bool| Conflict {
            offset: at << cell,
            block: block_of(entry).saturating_sub(1),
            component: (entry >> 64) as Component,
            instruction: (entry >> 32) as u32,
            write,
            constant,
            fence: order(entry, block, access) == Order::Unfenced,
        };
        let mut entry = Entry::from(block + 1) << 96
            | Entry::from(access.component) << 64
            | Entry::from(access.instruction) << 32
            | Entry::from(access.epoch);
        if access.atomic {
            entry |= ATOMIC;
        }
        if kind == Use::Constant {
            entry |= CONSTANT;
        }
        let range = span.start >> cell..((span.start + span.len - 1) >> cell) + 1;
        let (mut last_write, mut last_read) = (0, 0);
        for at in range {
            let write = cells.writes[at];
            if write != last_write {
                if kind == Use::Constant {
                    return Err(conflict(at, write, true, true));
                }
                if order(write, block, access) != Order::Over {
                    return Err(conflict(at, write, true, false));
                }
                last_write = write;
            }
            let read = cells.reads[at];
            if kind == Use::Write {
                for read in [read, cells.others[at]] {
                    if read != 0 && read != last_read {
                        if read & CONSTANT != 0 {
                            return Err(conflict(at, read, false, true));
                        }
                        if order(read, block, access) != Order::Over {
                            return Err(conflict(at, read, false, false));
                        }
                        last_read = read;
                    }
                }
                cells.writes[at] = entry;
            } else {
                if read != 0 && block_of(read) != block + 1 {
                    cells.others[at] = read;
                }
                cells.reads[at] = entry | read & CONSTANT;
            }
        }
        Ok(())
    }

    /// A release: whoever acquires at this address learns this.
    pub(crate) fn publish(&mut self, address: u64, what: &[Published]) {
        let known = self.published.entry(address).or_default();
        for (block, clock) in what {
            match known.iter_mut().find(|(other, _)| other == block) {
                None => known.push((*block, clock.clone())),
                Some((_, old)) => {
                    // One block's releases may come from warps that know different things.
                    let most = (0..old.len().max(clock.len())).map(|i| {
                        let of = |values: &[u32]| values.get(i).copied().unwrap_or(0);
                        of(old).max(of(clock))
                    });
                    *old = most.collect();
                }
            }
        }
    }

    /// What was published at an address.
    pub(crate) fn published(&self, address: u64) -> &[Published] {
        self.published.get(&address).map_or(&[], Vec::as_slice)
    }
}

/// What is done to a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// An ordinary read.
    Read,
    /// A read by `ld.global.nc`.
    Constant,
    /// A write.
    Write,
}
