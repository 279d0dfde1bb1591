//! [`Shadow`]: who accessed each cell of a block's shared memory last, to find races.
//!
//! In: accesses of ranges, with the accessor's clock. Out: nothing, or the earlier access that this
//! one conflicts with. A cell is as fine as the kernel's finest ordinary access, four bytes at most,
//! so that neighbours are never taken for one another. Per cell there is the last write, and per
//! component the last read. Asynchronous operations are entered when they are issued, so the
//! verdict depends neither on the schedule nor on when they complete.

use std::ops::Range;

use crate::clock::{Clock, Component};

/// One access, as far as its order goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access<'a> {
    /// Under which component and epoch it is entered.
    pub(crate) component: Component,
    pub(crate) epoch: u32,
    /// The instruction, by its index.
    pub(crate) instruction: u32,
    /// What its issuer knows.
    pub(crate) clock: &'a Clock,
    /// Whether the async proxy makes it.
    pub(crate) asynchronous: bool,
    /// Atomic accesses do not conflict with each other.
    pub(crate) atomic: bool,
    /// Components below this are threads: their writes need a proxy fence before async accesses.
    pub(crate) threads: Component,
}

/// What an access lacks that an earlier one is in the way of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lack {
    /// They are not ordered.
    Order,
    /// They are, but there is no proxy fence.
    Fence,
    /// They are, but not in the cluster's scope.
    Scope,
}

/// An earlier access in the way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conflict {
    /// The first cell concerned.
    pub(crate) cell: usize,
    pub(crate) component: Component,
    pub(crate) instruction: u32,
    /// Whether it was a write.
    pub(crate) write: bool,
    pub(crate) lack: Lack,
}

/// The shadow of one block's shared memory.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    /// Threads of a thread block: what one of another wrote must have been told in the cluster's scope.
    of_block: Component,
    /// Per cell: component (12 bits), whether atomic, instruction (19), epoch (32). 0: none.
    writes: Vec<u64>,
    /// By component and cell: epoch (32 bits), instruction (32).
    reads: Vec<Option<Box<[u64]>>>,
    /// By 64 components and cell: which of them have read it since it was last written. What was read
    /// before is over for whoever writes behind that write.
    readers: Vec<Option<Box<[u64]>>>,
}

/// Components and instructions that fit an entry.
pub(crate) const MAX_COMPONENTS: usize = 1 << 12;
pub(crate) const MAX_INSTRUCTIONS: usize = 1 << 19;

impl Access<'_> {
    fn entry(&self) -> u64 {
        u64::from(self.component) << 52
            | u64::from(self.atomic) << 51
            | u64::from(self.instruction) << 32
            | u64::from(self.epoch)
    }

    /// Whether an earlier write is in the way.
    fn blocked_by(&self, write: u64, cell: usize, of_block: Component) -> Result<(), Conflict> {
        if write == 0 || (self.atomic && write >> 51 & 1 != 0) {
            return Ok(());
        }
        let (component, epoch) = ((write >> 52) as Component, write as u32);
        let by_thread = component < self.threads;
        let lack = if self.clock.seen(component) < epoch {
            Lack::Order
        } else if self.asynchronous && by_thread && self.clock.fenced(component) < epoch {
            Lack::Fence
        } else if by_thread
            && !self.asynchronous
            && component / of_block != self.component / of_block
            && self.clock.told(component) < epoch
        {
            Lack::Scope
        } else {
            return Ok(());
        };
        Err(Conflict {
            cell,
            component,
            instruction: (write >> 32) as u32 & (MAX_INSTRUCTIONS as u32 - 1),
            write: true,
            lack,
        })
    }
}

impl Shadow {
    /// The shadow of so many cells, none accessed, of a thread block of so many threads.
    pub(crate) fn new(cells: usize, of_block: Component) -> Self {
        Self {
            of_block,
            writes: vec![0; cells],
            reads: Vec::new(),
            readers: Vec::new(),
        }
    }

    fn after_writes(&self, access: &Access, cells: Range<usize>) -> Result<(), Conflict> {
        // Neighbours mostly have the same entry.
        let mut last = 0;
        for (i, &write) in self.writes[cells.clone()].iter().enumerate() {
            if write != last {
                access.blocked_by(write, cells.start + i, self.of_block)?;
                last = write;
            }
        }
        Ok(())
    }

    /// Enters a read of some cells.
    pub(crate) fn read(&mut self, access: &Access, cells: Range<usize>) -> Result<(), Conflict> {
        self.after_writes(access, cells.clone())?;
        let component = usize::from(access.component);
        let count = self.writes.len();
        let entry = u64::from(access.epoch) << 32 | u64::from(access.instruction);
        array(&mut self.reads, component, count)[cells.clone()].fill(entry);
        for readers in &mut array(&mut self.readers, component / 64, count)[cells] {
            *readers |= 1 << (component % 64);
        }
        Ok(())
    }

    /// Enters a write of some cells.
    pub(crate) fn write(&mut self, access: &Access, cells: Range<usize>) -> Result<(), Conflict> {
        self.after_writes(access, cells.clone())?;
        for (word, readers) in self.readers.iter_mut().enumerate() {
            let Some(readers) = readers else { continue };
            let readers = &mut readers[cells.clone()];
            let mut some = readers.iter().fold(0, |all, &one| all | one);
            while some != 0 {
                let component = 64 * word + some.trailing_zeros() as usize;
                some &= some - 1;
                let Some(reads) = &self.reads[component] else {
                    continue;
                };
                let run = &reads[cells.clone()];
                let component = component as Component;
                let latest = u64::from(access.clock.seen(component)) << 32 | u64::from(u32::MAX);
                if run.iter().fold(0, |most, &entry| entry.max(most)) > latest {
                    let at = run.iter().position(|&entry| entry > latest).unwrap_or(0);
                    return Err(Conflict {
                        cell: cells.start + at,
                        component,
                        instruction: run[at] as u32,
                        write: false,
                        lack: Lack::Order,
                    });
                }
            }
            // Atomic accesses do not wait for each other, and so not for what came before.
            if !access.atomic {
                readers.fill(0);
            }
        }
        self.writes[cells].fill(access.entry());
        Ok(())
    }
}

/// The array of some index, of a number for each cell.
fn array(arrays: &mut Vec<Option<Box<[u64]>>>, index: usize, cells: usize) -> &mut [u64] {
    if arrays.len() <= index {
        arrays.resize_with(index + 1, || None);
    }
    arrays[index].get_or_insert_with(|| vec![0; cells].into())
}
