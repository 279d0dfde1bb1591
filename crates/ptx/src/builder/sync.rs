//! What threads do together: shuffles and votes of a warp, named barriers, mbarriers, clusters.

use super::{AddressOf, Builder, Reg, Value};
use crate::ir::{Binary, Fence, Op, Scope, ShuffleMode, VoteMode};
use crate::{Scalar, Ty};

impl<'k> Reg<'k, f32> {
    /// What the lane `distance` (XOR) away has here.
    #[track_caller]
    pub fn butterfly(self, distance: u32) -> Self {
        self.builder.shuffle(ShuffleMode::Butterfly, self, distance)
    }
}

impl<'k> Reg<'k, u32> {
    /// What lane `lane` has here.
    #[track_caller]
    pub fn from_lane(self, lane: impl Value<u32>) -> Self {
        self.builder.shuffle(ShuffleMode::Index, self, lane)
    }

    /// What lane 0 has here. ptxas then knows that it is the same in all lanes, which descriptors
    /// and branches around wgmma ask for.
    #[track_caller]
    pub fn uniform(self) -> Self {
        self.from_lane(0)
    }

    /// What the lane `distance` (XOR) away has here.
    #[track_caller]
    pub fn butterfly(self, distance: u32) -> Self {
        self.builder.shuffle(ShuffleMode::Butterfly, self, distance)
    }

    /// What the lane `distance` before has here; own contents where there is none.
    #[track_caller]
    pub fn from_lane_below(self, distance: u32) -> Self {
        self.builder.shuffle(ShuffleMode::Up, self, distance)
    }

    /// The sum over the warp, in all lanes.
    #[track_caller]
    pub fn warp_sum(self) -> Self {
        self.warp_reduce(Binary::Add)
    }

    /// The smallest of the warp, in all lanes.
    #[track_caller]
    pub fn warp_min(self) -> Self {
        self.warp_reduce(Binary::Min)
    }

    /// The largest of the warp, in all lanes.
    #[track_caller]
    pub fn warp_max(self) -> Self {
        self.warp_reduce(Binary::Max)
    }

    #[track_caller]
    fn warp_reduce(self, op: Binary) -> Self {
        let src = self.operand();
        self.builder.write(|dst| Op::WarpReduce {
            op,
            ty: Ty::U32,
            dst,
            src,
        })
    }
}

impl<'k> Reg<'k, bool> {
    /// Whether it holds in one lane at least.
    #[track_caller]
    pub fn any(self) -> Self {
        self.vote(VoteMode::Any)
    }

    /// Whether it holds in all lanes.
    #[track_caller]
    pub fn all(self) -> Self {
        self.vote(VoteMode::All)
    }

    /// A bit for each lane.
    #[track_caller]
    pub fn ballot(self) -> Reg<'k, u32> {
        let src = self.id;
        self.builder.write(|dst| Op::Ballot { dst, src })
    }

    #[track_caller]
    fn vote(self, mode: VoteMode) -> Self {
        let src = self.id;
        self.builder.write(|dst| Op::Vote { mode, dst, src })
    }
}

impl Builder {
    #[track_caller]
    fn shuffle<T: Scalar>(
        &self,
        mode: ShuffleMode,
        value: Reg<'_, T>,
        lane: impl Value<u32>,
    ) -> Reg<'_, T> {
        let (src, lane) = (value.operand(), lane.operand());
        self.write(|dst| Op::Shuffle {
            mode,
            dst,
            src,
            lane,
        })
    }

    /// True in one lane of the warp, the same each time.
    #[track_caller]
    pub fn elect(&self) -> Reg<'_, bool> {
        self.write(|dst| Op::Elect { dst })
    }

    /// Waits for all lanes of the warp; what they wrote before is seen after.
    #[track_caller]
    pub fn warp_sync(&self) {
        self.emit(Op::WarpSync);
    }

    /// Waits for all threads of the thread block.
    #[track_caller]
    pub fn sync_threads(&self) {
        let threads = self.threads();
        self.barrier_sync(0, threads);
    }

    /// Waits at named barrier `id` until `threads` threads have synced or arrived.
    #[track_caller]
    pub fn barrier_sync(&self, id: impl Value<u32>, threads: u32) {
        let (id, threads) = (id.operand(), threads.operand());
        self.emit(Op::BarrierSync { id, threads });
    }

    /// Counts at named barrier `id` without waiting.
    #[track_caller]
    pub fn barrier_arrive(&self, id: impl Value<u32>, threads: u32) {
        let (id, threads) = (id.operand(), threads.operand());
        self.emit(Op::BarrierArrive { id, threads });
    }

    // ---- clusters ------------------------------------------------------------------------------

    /// Waits for all threads of the cluster; what they wrote before is seen after.
    #[track_caller]
    pub fn cluster_sync(&self) {
        self.emit(Op::ClusterArrive);
        self.emit(Op::ClusterWait);
    }

    /// Where block `rank` of the cluster has what this one has at `address`.
    #[track_caller]
    pub fn map_shared(&self, address: impl Value<u32>, rank: impl Value<u32>) -> Reg<'_, u32> {
        let (address, rank) = (address.operand(), rank.operand());
        self.write(|dst| Op::MapShared { dst, address, rank })
    }

    // ---- mbarriers -----------------------------------------------------------------------------

    /// Makes an mbarrier whose phases are complete after `count` arrivals and all bytes expected.
    #[track_caller]
    pub fn mbarrier_init(&self, address: impl AddressOf<u32>, count: u32) {
        let (address, count) = (address.address(), count.operand());
        self.emit(Op::MbarrierInit { address, count });
    }

    /// After the last [`Builder::mbarrier_init`], before the barrier that lets others use them.
    #[track_caller]
    pub fn mbarrier_init_fence(&self) {
        self.emit(Op::Fence(Fence::MbarrierInit));
    }

    /// Arrives; what this thread did before is seen by who waits.
    #[track_caller]
    pub fn mbarrier_arrive(&self, address: impl AddressOf<u32>) {
        let address = address.address();
        self.emit(Op::MbarrierArrive {
            address,
            remote: false,
            scope: Scope::Cta,
        });
    }

    /// Arrives at another block's mbarrier, its address being from [`Builder::map_shared`].
    #[track_caller]
    pub fn mbarrier_arrive_remote(&self, address: impl AddressOf<u32>) {
        let address = address.address();
        self.emit(Op::MbarrierArrive {
            address,
            remote: true,
            scope: Scope::Cta,
        });
    }

    /// The same; what this thread stored before to that block's shared memory is seen by who waits by
    /// [`Builder::mbarrier_wait_for_block`].
    #[track_caller]
    pub fn mbarrier_arrive_remote_release(&self, address: impl AddressOf<u32>) {
        let address = address.address();
        self.emit(Op::MbarrierArrive {
            address,
            remote: true,
            scope: Scope::Cluster,
        });
    }

    /// Arrives, and makes the phase wait for `bytes` bytes of bulk copies.
    #[track_caller]
    pub fn mbarrier_arrive_expect(&self, address: impl AddressOf<u32>, bytes: impl Value<u32>) {
        let (address, bytes) = (address.address(), bytes.operand());
        self.emit(Op::MbarrierArriveExpect { address, bytes });
    }

    /// Waits until the phase of parity `parity` is complete: phases alternate 0, 1, 0...; before
    /// the first is complete, a wait for parity 1 passes at once.
    #[track_caller]
    pub fn mbarrier_wait(&self, address: impl AddressOf<u32>, parity: impl Value<u32>) {
        let (address, parity) = (address.address(), parity.operand());
        self.emit(Op::MbarrierWait {
            address,
            parity,
            scope: Scope::Cta,
        });
    }

    /// The same; then sees what another block of the cluster had stored, see
    /// [`Builder::mbarrier_arrive_remote_release`].
    #[track_caller]
    pub fn mbarrier_wait_for_block(&self, address: impl AddressOf<u32>, parity: impl Value<u32>) {
        let (address, parity) = (address.address(), parity.operand());
        self.emit(Op::MbarrierWait {
            address,
            parity,
            scope: Scope::Cluster,
        });
    }

    /// Whether the phase of parity `parity` is complete.
    #[track_caller]
    pub fn mbarrier_test(
        &self,
        address: impl AddressOf<u32>,
        parity: impl Value<u32>,
    ) -> Reg<'_, bool> {
        let (address, parity) = (address.address(), parity.operand());
        self.write(|dst| Op::MbarrierTest {
            dst,
            address,
            parity,
        })
    }
}
