//! [`Warpgroup`]: four warps that multiply together, each thread knowing its place.

use flex_block_attn_ptx::builder::Pair;
use flex_block_attn_ptx::ir::Fence;
use flex_block_attn_ptx::{Builder, Reg};

use crate::{Fragments, Left, RegTile, Right, SharedTile, mma};

/// Threads of a warpgroup.
pub const WARPGROUP: u32 = 128;

/// A warpgroup, as seen by one of its threads.
#[derive(Debug, Clone, Copy)]
pub struct Warpgroup<'k> {
    k: &'k Builder,
    /// Which of the thread block's warpgroups, less `first`; the same in the whole warp.
    pub index: Reg<'k, u32>,
    /// Warp in the warpgroup, 0 to 3.
    pub warp: Reg<'k, u32>,
    /// Lane in the warp.
    pub lane: Reg<'k, u32>,
    /// True in lane 0 of each warp.
    pub leader: Reg<'k, bool>,
    /// True in the first thread.
    pub first_thread: Reg<'k, bool>,
}

impl<'k> Warpgroup<'k> {
    /// The calling thread's warpgroup, counted from warpgroup `first` of the thread block.
    #[track_caller]
    pub fn new(k: &'k Builder, first: u32) -> Self {
        let tid = k.tid();
        let lane = tid & 31;
        Self {
            k,
            index: Self::number(k) - first,
            warp: (tid >> 5) & 3,
            lane,
            leader: lane.equals(0),
            first_thread: (tid & (WARPGROUP - 1)).equals(0),
        }
    }

    /// Which of the thread block's warpgroups the calling thread is in, in a form that ptxas knows
    /// to be the same in the whole warp: branches on it may hold products.
    #[track_caller]
    pub fn number(k: &Builder) -> Reg<'_, u32> {
        (k.tid() >> 7).uniform()
    }

    /// The row, of the 64 of a [`RegTile`], that the thread's first row is; the second is 8 on.
    #[track_caller]
    pub fn row(self) -> Reg<'k, u32> {
        self.warp * 16 + (self.lane >> 2)
    }

    /// Gives up registers until `count` are left for each thread.
    #[track_caller]
    pub fn release_registers(k: &Builder, count: u32) {
        k.set_max_registers(false, count);
    }

    /// Waits until each thread has `count` registers.
    #[track_caller]
    pub fn acquire_registers(k: &Builder, count: u32) {
        k.set_max_registers(true, count);
    }

    /// Issues `acc = left right`, see [`Warpgroup::add_product`].
    #[track_caller]
    pub fn product(self, acc: &RegTile<'k>, left: Left<'_, 'k>, right: Right<'k>) {
        mma::issue(self.k, acc, left, right, false);
        self.k.wgmma_commit();
    }

    /// Issues `acc += left right` as a group of its own and leaves it in flight. Registers written
    /// by other instructions ask for a [`Warpgroup::fence`] before; results for a
    /// [`Warpgroup::wait`] after.
    #[track_caller]
    pub fn add_product(self, acc: &RegTile<'k>, left: Left<'_, 'k>, right: Right<'k>) {
        mma::issue(self.k, acc, left, right, true);
        self.k.wgmma_commit();
    }

    /// `acc = left right^T`, of which this warp computes its own 16 rows, alone and at once: no other
    /// warp need do the same, and nothing is left to wait for. Right has the inner dimension along its
    /// columns, as in [`Right::Transposed`]. Slower than [`Warpgroup::product`], and its sums may be
    /// rounded otherwise.
    ///
    /// # Panics
    /// If shapes do not fit, or elements do not have 16 bits.
    #[track_caller]
    pub fn product_of_warp(self, acc: &RegTile<'k>, left: SharedTile<'k>, right: SharedTile<'k>) {
        mma::of_warp(self.k, acc, left, right, (self.warp, self.lane));
    }

    /// Orders what was written to registers before the products that follow.
    #[track_caller]
    pub fn fence(self) {
        self.k.wgmma_fence();
    }

    /// Waits until at most `pending` products are in flight.
    #[track_caller]
    pub fn wait(self, pending: u32) {
        self.k.wgmma_wait(pending);
    }

    /// Waits for all threads of the warpgroup, at named barrier `id`.
    #[track_caller]
    pub fn sync(self, id: Reg<'k, u32>) {
        self.k.barrier_sync(id, WARPGROUP);
    }

    /// Loads 64 rows of a tile as a left operand.
    #[track_caller]
    pub fn load_fragments(self, tile: SharedTile<'k>) -> Fragments<'k> {
        assert_eq!(tile.rows(), 64, "rows of a left operand");
        let rows = tile.matrix_rows(self.warp, self.lane);
        let steps = (0..tile.shape.columns / 16)
            .map(|step| self.k.load_matrices(tile.chunk(rows, 16 * step), false));
        Fragments::from_steps(steps.collect())
    }

    /// Writes 64 rows to a tile, and makes them visible to copies; other threads' rows want a
    /// barrier besides.
    #[track_caller]
    pub fn store_fragments(self, fragments: &Fragments<'k>, tile: SharedTile<'k>) {
        assert_eq!(tile.rows(), 64, "rows of a warpgroup's tile");
        assert_eq!(fragments.steps() as u32 * 16, tile.shape.columns, "columns");
        let rows = tile.matrix_rows(self.warp, self.lane);
        for step in 0..fragments.steps() {
            let chunk = tile.chunk(rows, 16 * step as u32);
            self.k.store_matrices(chunk, fragments.step(step), false);
        }
        self.k.fence(Fence::ProxyAsyncShared);
    }

    /// Writes 64 rows, transposed, to a panel: row `r` of a fragment is column `r` of the panel, whose
    /// rows are the fragments' columns. Makes them visible to copies and products; other threads'
    /// want a barrier besides.
    #[track_caller]
    pub fn store_transposed(self, fragments: &Fragments<'k>, panel: SharedTile<'k>) {
        assert_eq!(panel.shape.columns, 64, "columns of a panel");
        assert_eq!(fragments.steps() as u32 * 16, panel.rows(), "rows");
        let rows = panel.transposed_rows(self.warp, self.lane);
        for step in 0..fragments.steps() {
            let part = panel.row_range(16 * step as u32, 16);
            let chunk = part.chunk(rows, 0);
            self.k.store_matrices(chunk, fragments.step(step), true);
        }
        self.k.fence(Fence::ProxyAsyncShared);
    }

    /// [`Warpgroup::store_fragments`] of a tile rounded to 16 bits.
    #[track_caller]
    pub fn store(self, values: &RegTile<'k>, pair: Pair, tile: SharedTile<'k>) {
        let fragments = Fragments::uninit(self.k, values.columns() / 16);
        values.round_to(&fragments, pair);
        self.store_fragments(&fragments, tile);
    }
}
