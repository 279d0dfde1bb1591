//! [`Shared`]: the shared memory of one thread block.
//!
//! In: reads and writes by address, from warps, the bulk engine and the matrix unit. Out: bytes, or
//! the fault that an access is: out of bounds, misaligned, uninitialised, on top of an mbarrier.
//! Order is the shadow's business.

use std::ops::Range;

use crate::clock::Component;
use crate::fault::{Done, Kind, Place};
use crate::mbarrier::Mbarrier;
use crate::shadow::Shadow;

/// Where shared memory starts: not at zero, so that an address without its base is noticed.
const BASE: u32 = 1024;
/// Bits of an address within a block. Above them stands the block's rank in its cluster, as on the
/// hardware: in shared::cta addresses, too.
pub(crate) const RANK_SHIFT: u32 = 24;

/// Where the block of a rank has what another block has at `address`.
pub(crate) fn at_rank(address: u32, rank: usize) -> u32 {
    address & ((1 << RANK_SHIFT) - 1) | (rank as u32) << RANK_SHIFT
}

/// The shared memory of one thread block.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Whose it is, for reports.
    pub(crate) name: String,
    /// Where it starts, the block's rank included.
    pub(crate) base: u32,
    pub(crate) bytes: Vec<u8>,
    /// 1 for each byte that was written.
    known: Vec<u8>,
    pub(crate) shadow: Shadow,
    /// Binary logarithm of a shadow cell's bytes.
    cell: u32,
    /// Those in use.
    pub(crate) barriers: Vec<Mbarrier>,
    /// For each 8 bytes: 1 + the index of the mbarrier there, or 0.
    barrier_at: Vec<u16>,
}

impl Shared {
    /// Uninitialised shared memory of so many bytes, of the block of `rank`, of so many threads, in a cluster
    /// of `cluster`.
    pub(crate) fn new(
        block: [u32; 3],
        (rank, cluster): (u32, u32),
        threads: u32,
        bytes: usize,
        cell: u32,
    ) -> Self {
        let mut name = format!("shared memory of block {block:?}");
        if cluster > 1 {
            // Reports show addresses, of which the rank is a part.
            name += &format!(" (rank {rank} of its cluster)");
        }
        Self {
            name,
            base: at_rank(BASE, rank as usize),
            bytes: vec![0xcd; bytes],
            known: vec![0; bytes],
            shadow: Shadow::new(bytes.div_ceil(1 << cell), threads as Component),
            cell,
            barriers: Vec::new(),
            barrier_at: vec![0; bytes.div_ceil(8)],
        }
    }

    /// The address that a matrix descriptor means, which has no room for the rank.
    pub(crate) fn described(&self, address: u32) -> u32 {
        at_rank(address, (self.base >> RANK_SHIFT) as usize)
    }

    /// The name of an address.
    pub(crate) fn place(&self, address: u32) -> Place {
        Place {
            region: self.name.clone(),
            offset: i64::from(address) - i64::from(self.base),
            address: u64::from(address),
        }
    }

    /// The name of a shadow cell.
    pub(crate) fn place_of_cell(&self, cell: usize) -> Place {
        self.place(self.base + ((cell as u32) << self.cell))
    }

    /// The bytes `len` from `address`. Addresses of other blocks, by their ranks, are out of bounds.
    pub(crate) fn range(&self, address: u32, len: usize) -> Done<Range<usize>> {
        let start = address.wrapping_sub(self.base) as usize;
        if address < self.base || start + len > self.bytes.len() {
            let place = self.place(address);
            return Err(Kind::OutOfBounds {
                place,
                bytes: len as u32,
            }
            .into());
        }
        Ok(start..start + len)
    }

    /// As [`Shared::range`], of an aligned address, where no mbarrier may be.
    pub(crate) fn data(&self, address: u32, len: usize, align: u32) -> Done<Range<usize>> {
        let range = self.range(address, len)?;
        if !address.is_multiple_of(align) {
            return Err(Kind::Misaligned {
                place: self.place(address),
                needed: align,
            }
            .into());
        }
        if !self.barriers.is_empty() {
            let words = range.start / 8..range.end.div_ceil(8);
            let start = words.start;
            if let Some(at) = self.barrier_at[words]
                .iter()
                .position(|&barrier| barrier != 0)
            {
                let place = self.place(self.base + 8 * (start + at) as u32);
                return Err(Kind::LiveMbarrier { place }.into());
            }
        }
        Ok(range)
    }

    /// The shadow's cells of some bytes.
    pub(crate) fn cells(&self, bytes: &Range<usize>) -> Range<usize> {
        bytes.start >> self.cell..((bytes.end - 1) >> self.cell) + 1
    }

    /// The contents of bytes, all of them written before.
    pub(crate) fn known(&self, bytes: Range<usize>) -> Done<&[u8]> {
        if self.known[bytes.clone()].contains(&0) {
            let at = self.known[bytes.clone()]
                .iter()
                .position(|&known| known == 0);
            let place = self.place(self.base + (bytes.start + at.unwrap_or(0)) as u32);
            return Err(Kind::UninitialisedMemory { place }.into());
        }
        Ok(&self.bytes[bytes])
    }

    /// Bytes to be written, all of them.
    pub(crate) fn written(&mut self, bytes: Range<usize>) -> &mut [u8] {
        self.known[bytes.clone()].fill(1);
        &mut self.bytes[bytes]
    }

    /// Makes an mbarrier of 8 bytes.
    pub(crate) fn add_barrier(&mut self, barrier: Mbarrier) -> Done {
        let bytes = self.data(barrier.address, 8, 8)?;
        self.known[bytes.clone()].fill(0);
        self.barriers.push(barrier);
        self.barrier_at[bytes.start / 8] = self.barriers.len() as u16;
        Ok(())
    }

    /// The index of the mbarrier at an address.
    pub(crate) fn barrier(&self, address: u32) -> Done<usize> {
        let bytes = self.range(address, 8)?;
        if !address.is_multiple_of(8) {
            return Err(Kind::Misaligned {
                place: self.place(address),
                needed: 8,
            }
            .into());
        }
        match self.barrier_at[bytes.start / 8] {
            0 => Err(self.no_barrier(address, "none was initialised there")),
            index => Ok(usize::from(index) - 1),
        }
    }

    /// Makes plain bytes of an mbarrier.
    pub(crate) fn remove_barrier(&mut self, address: u32) -> Done {
        let index = self.barrier(address)?;
        self.barrier_at[(address - self.base) as usize / 8] = 0;
        self.barriers[index].invalid = true;
        Ok(())
    }

    /// A fault of the mbarrier at an address.
    pub(crate) fn no_barrier(&self, address: u32, problem: &str) -> crate::fault::Wrong {
        let (place, problem) = (self.place(address), problem.to_owned());
        Kind::Mbarrier { place, problem }.into()
    }
}
