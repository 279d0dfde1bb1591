//! Bulk copies: between global and shared memory, by the TMA unit, asynchronously. Each is issued
//! by one thread.

use super::{AddressOf, Builder, Reg, Value};
use crate::Scalar;
use crate::ir::{Op, Operand, Policy};

/// What a tensor load may ask for besides.
#[derive(Debug, Clone, Copy, Default)]
pub struct TmaOptions<'k> {
    /// A bit for each block of the cluster that gets the tile, at the same offsets of its shared
    /// memory, its mbarrier included.
    pub multicast: Option<Reg<'k, u16>>,
    /// A cache policy of [`Builder::cache_policy`].
    pub hint: Option<Reg<'k, u64>>,
}

impl Builder {
    /// Loads the tile at `coordinates`, dimension 0 first, of the tensor behind `map`; its bytes
    /// are counted at `barrier`.
    #[track_caller]
    pub fn tma_load(
        &self,
        dst: impl AddressOf<u32>,
        map: Reg<'_, u64>,
        coordinates: &[Operand],
        barrier: impl AddressOf<u32>,
        options: TmaOptions<'_>,
    ) {
        self.emit(Op::TmaLoad {
            dst: dst.address(),
            map: map.id,
            coordinates: coordinates.to_vec(),
            barrier: barrier.address(),
            multicast: options.multicast.map(Value::operand),
            hint: options.hint.map(Reg::id),
        });
    }

    /// Stores a tile from shared memory, as part of the thread's current bulk group.
    #[track_caller]
    pub fn tma_store(&self, map: Reg<'_, u64>, coordinates: &[Operand], src: impl AddressOf<u32>) {
        let (coordinates, src) = (coordinates.to_vec(), src.address());
        self.emit(Op::TmaStore {
            map: map.id,
            coordinates,
            src,
            hint: None,
        });
    }

    /// Adds a tile in shared memory to the tensor behind `map`.
    #[track_caller]
    pub fn tma_reduce_add(
        &self,
        map: Reg<'_, u64>,
        coordinates: &[Operand],
        src: impl AddressOf<u32>,
    ) {
        let (coordinates, src) = (coordinates.to_vec(), src.address());
        self.emit(Op::TmaReduceAdd {
            map: map.id,
            coordinates,
            src,
        });
    }

    /// Fetches a tensor map ahead of its first use.
    #[track_caller]
    pub fn prefetch_map(&self, map: Reg<'_, u64>) {
        self.emit(Op::PrefetchMap { map: map.id });
    }

    /// Loads `bytes` contiguous bytes, a multiple of 16, counted at `barrier`.
    #[track_caller]
    pub fn bulk_load(
        &self,
        dst: impl AddressOf<u32>,
        src: impl AddressOf<u64>,
        bytes: impl Value<u32>,
        barrier: impl AddressOf<u32>,
    ) {
        self.emit(Op::BulkLoad {
            dst: dst.address(),
            src: src.address(),
            bytes: bytes.operand(),
            barrier: barrier.address(),
            hint: None,
        });
    }

    /// Stores `bytes` contiguous bytes, as part of the thread's current bulk group.
    #[track_caller]
    pub fn bulk_store(
        &self,
        dst: impl AddressOf<u64>,
        src: impl AddressOf<u32>,
        bytes: impl Value<u32>,
    ) {
        let (dst, src, bytes) = (dst.address(), src.address(), bytes.operand());
        self.emit(Op::BulkStore { dst, src, bytes });
    }

    /// Adds `bytes` contiguous bytes of numbers `T` to global memory.
    #[track_caller]
    pub fn bulk_reduce_add<T: Scalar>(
        &self,
        dst: impl AddressOf<u64>,
        src: impl AddressOf<u32>,
        bytes: impl Value<u32>,
    ) {
        let (dst, src, bytes) = (dst.address(), src.address(), bytes.operand());
        self.emit(Op::BulkReduceAdd {
            ty: T::TY,
            dst,
            src,
            bytes,
        });
    }

    /// Closes the thread's current bulk group.
    #[track_caller]
    pub fn bulk_commit(&self) {
        self.emit(Op::BulkCommit);
    }

    /// Waits until at most `pending` of the thread's bulk groups are unfinished.
    #[track_caller]
    pub fn bulk_wait(&self, pending: u32) {
        self.emit(Op::BulkWait {
            pending,
            read: false,
        });
    }

    /// Waits until at most `pending` of them have yet to read shared memory, which may then be
    /// used again.
    #[track_caller]
    pub fn bulk_wait_read(&self, pending: u32) {
        self.emit(Op::BulkWait {
            pending,
            read: true,
        });
    }

    /// A policy for the cache hint of copies.
    #[track_caller]
    pub fn cache_policy(&self, which: Policy) -> Reg<'_, u64> {
        self.write(|dst| Op::CachePolicy { dst, which })
    }

    /// Waits until the launches before are over. A kernel that does so anywhere may start before, so
    /// each of its threads does, before it has to do with global memory.
    #[track_caller]
    pub fn grid_wait(&self) {
        self.emit(Op::GridWait);
    }

    /// Lets the next launch start, if its kernel waits itself, once all thread blocks have come here or
    /// to their end.
    #[track_caller]
    pub fn grid_launch(&self) {
        self.emit(Op::GridLaunch);
    }
}
