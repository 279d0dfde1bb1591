//! A thread block's shared memory: [`Shared`] hands out tiles and barriers, [`SharedTile`] is a
//! swizzled tile. In: shapes, when the kernel is built. Out: addresses, copies, descriptors.

use std::cell::Cell;

use flex_block_attn_ptx::builder::{Address, TmaOptions};
use flex_block_attn_ptx::ir::Operand;
use flex_block_attn_ptx::{Builder, Reg};

use crate::barrier::BARRIER_BYTES;
use crate::shape::{MATRIX_AXES, PANEL_ROW};
use crate::{Barrier, Barriers, Place, Shape};

/// The swizzle's pattern repeats every 8 rows of 128 bytes; tiles start at a multiple of it.
const ATOM: u32 = 8 * PANEL_ROW;
/// Shared memory of a thread block on Hopper, at most.
const MOST_BYTES: u32 = 227 * 1024;
/// Bits of an address that descriptors have room for.
const DESCRIBED: u32 = (1 << 18) - 1;

/// The shared memory that is still to be given out. Whoever has taken what it needs calls
/// [`Shared::finish`].
#[derive(Debug)]
pub struct Shared<'k> {
    k: &'k Builder,
    base: Reg<'k, u32>,
    /// `base >> 4` without the rank in a cluster, what descriptors are made from.
    base16: Reg<'k, u32>,
    /// Thread blocks of the cluster that `base16` is made for.
    cluster: u32,
    used: Cell<u32>,
}

/// A tile in shared memory, in panels, swizzled.
#[derive(Debug, Clone, Copy)]
pub struct SharedTile<'k> {
    k: &'k Builder,
    /// What it is.
    pub shape: Shape,
    /// Where shared memory starts.
    base: Reg<'k, u32>,
    /// `base >> 4`, without the rank in a cluster.
    base16: Reg<'k, u32>,
    /// Bytes behind that, plus those of the view's first row and panel.
    offset: u32,
    /// Rows that a view of it starts with, if known only at run time: a multiple of 8.
    first_row: Option<Reg<'k, u32>>,
    /// Rows of the view.
    rows: u32,
}

impl<'k> Shared<'k> {
    /// All of it. A kernel in clusters says so before, by [`Builder::set_cluster`].
    #[track_caller]
    pub fn new(k: &'k Builder) -> Self {
        let (base, cluster) = (k.shared_base(), k.cluster());
        // In a cluster the address has the block's rank in its top byte, which would end up in the
        // descriptors' leading stride.
        let base16 = match cluster {
            1 => base >> 4,
            _ => (base & DESCRIBED) >> 4,
        };
        Self {
            k,
            base,
            base16,
            cluster,
            used: Cell::new(0),
        }
    }

    /// A tile.
    pub fn tile(&self, shape: Shape) -> SharedTile<'k> {
        let offset = self.take(shape.bytes(), ATOM);
        let (k, base, base16) = (self.k, self.base, self.base16);
        SharedTile {
            k,
            shape,
            base,
            base16,
            offset,
            first_row: None,
            rows: shape.rows,
        }
    }

    /// A barrier whose phases take `count` arrivals. One thread must [`Barrier::init`] it.
    pub fn barrier(&self, count: u32) -> Barrier<'k> {
        Barrier::new(self.k, self.bytes(BARRIER_BYTES, BARRIER_BYTES), count)
    }

    /// `number` such barriers.
    pub fn barriers(&self, number: u32, count: u32) -> Barriers<'k> {
        let address = self.bytes(number * BARRIER_BYTES, BARRIER_BYTES);
        Barriers::new(Barrier::new(self.k, address, count), number)
    }

    /// `bytes` bytes at a multiple of `alignment`.
    pub fn bytes(&self, bytes: u32, alignment: u32) -> Address<'k, u32> {
        self.base.at(self.take(bytes, alignment))
    }

    /// Says how much the kernel needs.
    ///
    /// # Panics
    /// If that is more than a thread block can have, or the kernel was put in clusters after
    /// [`Shared::new`].
    pub fn finish(self) {
        assert_eq!(self.k.cluster(), self.cluster, "blocks of the cluster");
        let used = self.used.get();
        assert!(
            used <= MOST_BYTES,
            "{used} bytes of shared memory, of {MOST_BYTES}"
        );
        self.k.set_shared_bytes(used);
    }

    fn take(&self, bytes: u32, alignment: u32) -> u32 {
        let start = self.used.get().next_multiple_of(alignment);
        self.used.set(start + bytes);
        start
    }
}

impl<'k> SharedTile<'k> {
    /// Rows of the tile, or of the view.
    pub fn rows(self) -> u32 {
        self.rows
    }

    /// Rows `first .. first + count`, `first` being known when the kernel is built.
    ///
    /// # Panics
    /// If they are not in the tile, or not whole groups of 8.
    pub fn row_range(self, first: u32, count: u32) -> Self {
        assert!(
            first + count <= self.rows && first.is_multiple_of(8),
            "rows {first}+{count}"
        );
        Self {
            offset: self.offset + first * PANEL_ROW,
            rows: count,
            ..self
        }
    }

    /// Part `index` of the tile cut into parts of `count` rows, `index` being a register that is
    /// the same in the whole warp.
    ///
    /// # Panics
    /// If the tile is itself a view of some rows only, or not whole parts.
    #[track_caller]
    pub fn part(self, index: Reg<'k, u32>, count: u32) -> Self {
        assert!(
            self.rows.is_multiple_of(count) && count.is_multiple_of(8),
            "parts of {count}"
        );
        assert_eq!(self.rows, self.shape.rows, "a part of a part");
        let row = index * count;
        Self {
            first_row: Some(self.first_row.map_or(row, |first| first + row)),
            rows: count,
            ..self
        }
    }

    /// The tile's panel `panel`, alone.
    pub fn panel(self, panel: u32) -> Self {
        assert!(panel < self.shape.panels(), "panel {panel}");
        let shape = Shape {
            columns: self.shape.panel_columns(),
            ..self.shape
        };
        Self {
            shape,
            offset: self.offset + panel * self.shape.panel_bytes(),
            ..self
        }
    }

    /// The tile's panel `index`, alone, `index` being a register that is the same in the whole warp.
    ///
    /// # Panics
    /// If the tile is itself a view.
    #[track_caller]
    pub fn panel_at(self, index: Reg<'k, u32>) -> Self {
        assert!(
            self.first_row.is_none() && self.rows == self.shape.rows,
            "a panel of a view"
        );
        let shape = Shape {
            columns: self.shape.panel_columns(),
            ..self.shape
        };
        // Panels follow each other as if they were rows.
        Self {
            shape,
            first_row: Some(index * self.rows),
            ..self
        }
    }

    /// The `index`-th of some tiles of one shape that lie one after the other, of which this is the
    /// first; `index` is a register that is the same in the whole warp.
    ///
    /// # Panics
    /// If the tile is itself a view.
    #[track_caller]
    pub(crate) fn following(self, index: Reg<'k, u32>) -> Self {
        assert!(
            self.first_row.is_none() && self.rows == self.shape.rows,
            "a tile after a view"
        );
        // Tiles, too, follow each other as if they were rows.
        Self {
            first_row: Some(index * (self.shape.bytes() / PANEL_ROW)),
            ..self
        }
    }

    /// Loads the whole tile by one copy; the barrier counts its bytes.
    ///
    /// # Panics
    /// If it is a view of some rows only.
    #[track_caller]
    pub fn load(
        self,
        map: Reg<'k, u64>,
        place: Place,
        barrier: Barrier<'k>,
        options: TmaOptions<'k>,
    ) {
        assert_eq!(self.rows, self.shape.rows, "a copy fills a whole tile");
        self.k.tma_load(
            self.address(),
            map,
            &place.coordinates(),
            barrier.address(),
            options,
        );
    }

    /// Loads the view, one panel at a time, by a map for just as many rows and one panel
    /// ([`Shape::panel_map`]): the first panel from `place`, the next from the panel beside it, and
    /// so on. The barrier counts the bytes.
    #[track_caller]
    pub fn load_panels(
        self,
        map: Reg<'k, u64>,
        place: Place,
        barrier: Barrier<'k>,
        options: TmaOptions<'k>,
    ) {
        for panel in 0..self.shape.panels() {
            self.k.tma_load(
                self.panel(panel).address(),
                map,
                &place.panel(panel).coordinates(),
                barrier.address(),
                options,
            );
        }
    }

    /// Loads one panel of the view, as [`SharedTile::load_panels`] loads all, to this thread block and to the
    /// other one of a cluster of two: to the same place there, and counted by the same barrier.
    #[track_caller]
    pub fn load_panel_for_pair(
        self,
        panel: Reg<'k, u32>,
        map: Reg<'k, u64>,
        place: Place,
        barrier: Barrier<'k>,
    ) {
        let options = TmaOptions {
            multicast: Some(self.k.var(0b11u16)),
            hint: None,
        };
        self.k.tma_load(
            self.address().plus(panel * self.shape.panel_bytes()),
            map,
            &place.panel_at(panel).coordinates(),
            barrier.address(),
            options,
        );
    }

    /// Loads one panel of the view by any map whose copies are as many rows of a panel's width, from
    /// the coordinates that the map wants. The barrier counts the bytes.
    #[track_caller]
    pub fn load_panel(
        self,
        panel: u32,
        map: Reg<'k, u64>,
        coordinates: [Operand; MATRIX_AXES],
        barrier: Barrier<'k>,
    ) {
        self.k.tma_load(
            self.panel(panel).address(),
            map,
            &coordinates,
            barrier.address(),
            TmaOptions::default(),
        );
    }

    /// Stores the view, one panel at a time, by a map for just as many rows and one panel
    /// ([`Shape::panel_map`]): the first panel goes to `places[0]`, and so on. One thread calls
    /// it, after the writers' fence and a barrier, and commits and waits for the copies.
    ///
    /// # Panics
    /// If there are not as many places as panels.
    #[track_caller]
    pub fn store(self, map: Reg<'k, u64>, places: impl IntoIterator<Item = Place>) {
        let places: Vec<_> = places.into_iter().collect();
        assert_eq!(
            places.len(),
            self.shape.panels() as usize,
            "a place for each panel"
        );
        for (panel, place) in (0..).zip(places) {
            self.k
                .tma_store(map, &place.coordinates(), self.panel(panel).address());
        }
    }

    /// Where the tile or view starts.
    #[track_caller]
    pub fn address(self) -> Address<'k, u32> {
        match self.first_row {
            None => self.base.at(self.offset),
            Some(row) => (self.base + row * PANEL_ROW).at(self.offset),
        }
    }

    /// The address of the chunk of 16 bytes that holds `column`, in row `row` (counted in the
    /// view), for `column` a multiple of a chunk's elements plus what `chunk` adds.
    ///
    /// `chunk` is a register of 0 or 1; `column` is known when the kernel is built.
    #[track_caller]
    pub fn chunk(self, row: RowAddress<'k>, column: u32) -> Address<'k, u32> {
        let chunk_elements = 16 / self.shape.element.bytes();
        assert!(column.is_multiple_of(2 * chunk_elements), "column {column}");
        let (panel, inside) = (
            column / self.shape.panel_columns(),
            column % self.shape.panel_columns(),
        );
        let swizzled = (row.chunk + inside / chunk_elements) ^ row.pattern;
        (row.start + (swizzled << 4)).at(self.offset + panel * self.shape.panel_bytes())
    }

    /// As [`SharedTile::chunk`], for a step of two chunks that is known at run time; `first` is what
    /// [`RowAddress::first`] gives.
    #[track_caller]
    pub(crate) fn chunks_of_step(
        self,
        first: Reg<'k, u32>,
        step: Reg<'k, u32>,
    ) -> Address<'k, u32> {
        // Rows start at multiples of a panel's row, so steps and the swizzle change the same bits.
        let steps = PANEL_ROW / 32;
        let inside = first ^ ((step & (steps - 1)) << 5);
        let panel = (step >> steps.ilog2()) * self.shape.panel_bytes();
        (inside + panel).at(self.offset)
    }

    /// What [`SharedTile::chunk`] needs of a lane's row: made once, used for all columns. Lane
    /// `l` of warp `warp` has row `16 warp + l % 16` and the even (`l < 16`) or odd chunks, as
    /// `ldmatrix` and `stmatrix` of 16 x 16 elements want it.
    #[track_caller]
    pub fn matrix_rows(self, warp: Reg<'k, u32>, lane: Reg<'k, u32>) -> RowAddress<'k> {
        let row = warp * 16 + (lane & 15);
        let first = match self.first_row {
            None => self.base,
            Some(first) => self.base + first * PANEL_ROW,
        };
        // Views start at whole groups of 8 rows, so the pattern is that of the row in the view.
        RowAddress {
            start: first + row * PANEL_ROW,
            pattern: row & 7,
            chunk: lane >> 4,
        }
    }

    /// As [`SharedTile::matrix_rows`], for 16 x 16 elements that are stored transposed: lane `l` has
    /// row `l % 8`, or the eighth after it from lane 16 on, and warp `warp` the 16 columns from
    /// `16 warp` on, the second 8 of them in lanes with bit 3 set.
    #[track_caller]
    pub fn transposed_rows(self, warp: Reg<'k, u32>, lane: Reg<'k, u32>) -> RowAddress<'k> {
        let row = ((lane >> 4) << 3) + (lane & 7);
        let first = match self.first_row {
            None => self.base,
            Some(first) => self.base + first * PANEL_ROW,
        };
        RowAddress {
            start: first + row * PANEL_ROW,
            pattern: row & 7,
            chunk: warp * 2 + ((lane >> 3) & 1),
        }
    }

    /// `address >> 4` of the view's start, less a constant that is returned beside it.
    #[track_caller]
    pub(crate) fn start16(self) -> (Reg<'k, u32>, u32) {
        let base16 = match self.first_row {
            None => self.base16,
            Some(row) => self.base16 + row * (PANEL_ROW >> 4),
        };
        (base16, self.offset >> 4)
    }
}

/// A lane's row of a tile, see [`SharedTile::matrix_rows`].
#[derive(Debug, Clone, Copy)]
pub struct RowAddress<'k> {
    start: Reg<'k, u32>,
    pattern: Reg<'k, u32>,
    chunk: Reg<'k, u32>,
}

impl<'k> RowAddress<'k> {
    /// Where the row's first chunk is, or its second, in a tile at the start of shared memory.
    #[track_caller]
    pub(crate) fn first(self) -> Reg<'k, u32> {
        self.start + ((self.chunk ^ self.pattern) << 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "blocks of the cluster")]
    fn clusters_are_known_before_shared_memory_is_given_out() {
        Builder::kernel("late", 128, |k| {
            let shared = Shared::new(k);
            k.set_cluster(2);
            shared.finish();
        });
    }
}
