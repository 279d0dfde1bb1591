//! Which registers an instruction reads and writes, for the checks before it is executed.
//!
//! In: an instruction of the table. Out: its ordinary register accesses. A wgmma's accumulators and
//! A registers are not among them: they have rules of their own (`wgmma`).

use flex_block_attn_ptx::ir::{Address, MatrixA, Op, Operand, RegId};

/// Registers read and written, in no particular order.
#[derive(Default)]
pub(crate) struct Uses {
    pub(crate) reads: Vec<RegId>,
    pub(crate) writes: Vec<RegId>,
}

impl Uses {
    fn read(&mut self, operand: &Operand) -> &mut Self {
        if let Operand::Reg(register) = operand {
            self.reads.push(*register);
        }
        self
    }

    fn read_all(&mut self, operands: &[Operand]) -> &mut Self {
        for operand in operands {
            self.read(operand);
        }
        self
    }

    fn at(&mut self, address: &Address) -> &mut Self {
        self.reads.push(address.base);
        self
    }

    fn register(&mut self, register: RegId) -> &mut Self {
        self.reads.push(register);
        self
    }

    fn write(&mut self, register: RegId) -> &mut Self {
        self.writes.push(register);
        self
    }
}

/// The registers that `op` uses.
pub(crate) fn uses(op: &Op) -> Uses {
    let mut uses = Uses::default();
    let u = &mut uses;
    match op {
        Op::Special { dst, .. }
        | Op::Param { dst, .. }
        | Op::ParamAddress { dst, .. }
        | Op::SharedBase { dst }
        | Op::Elect { dst }
        | Op::CachePolicy { dst, .. } => u.write(*dst),
        Op::Mov { dst, src, .. } | Op::Convert { dst, src, .. } => u.read(src).write(*dst),
        Op::WarpReduce { dst, src, .. } => u.read(src).write(*dst),
        Op::Unary { dst, a, .. } => u.read(a).write(*dst),
        Op::Binary { dst, a, b, .. } | Op::Compare { dst, a, b, .. } => {
            u.read(a).read(b).write(*dst)
        }
        Op::Ternary { dst, a, b, c, .. } | Op::Lop3 { dst, a, b, c, .. } => {
            u.read(a).read(b).read(c).write(*dst)
        }
        Op::MulWide { dst, a, b, c, .. } => {
            if let Some(c) = c {
                u.read(c);
            }
            u.read(a).read(b).write(*dst)
        }
        Op::Permute {
            dst,
            a,
            b,
            selector,
        } => u.read(a).read(b).read(selector).write(*dst),
        Op::Pack { dst, low, high, .. } | Op::Join { dst, low, high, .. } => {
            u.read(low).read(high).write(*dst)
        }
        Op::Split { low, high, src, .. } => u.read(src).write(*low).write(*high),
        Op::Select {
            dst, a, b, cond, ..
        } => u.read(a).read(b).register(*cond).write(*dst),
        Op::Load { dst, address, .. } | Op::LoadMatrix { dst, address, .. } => {
            u.writes.extend(dst);
            u.at(address)
        }
        Op::Store { src, address, .. } | Op::Reduce { src, address, .. } => {
            u.read_all(src).at(address)
        }
        Op::StoreMatrix { src, address, .. } => {
            u.reads.extend(src);
            u.at(address)
        }
        Op::Atomic {
            dst,
            address,
            src,
            swap,
            ..
        } => {
            if let Some(swap) = swap {
                u.read(swap);
            }
            u.read(src).at(address).write(*dst)
        }
        Op::LoadAcquire { dst, address, .. } => u.at(address).write(*dst),
        Op::StoreRelease { src, address, .. } => u.read(src).at(address),
        Op::Shuffle { dst, src, lane, .. } => u.read(src).read(lane).write(*dst),
        Op::Vote { dst, src, .. } | Op::Ballot { dst, src } => u.register(*src).write(*dst),
        Op::BarrierSync { id, threads } | Op::BarrierArrive { id, threads } => {
            u.read(id).read(threads)
        }
        Op::MapShared { dst, address, rank } => u.read(address).read(rank).write(*dst),
        Op::MbarrierInit { address, count } => u.at(address).read(count),
        Op::MbarrierInvalidate { address } | Op::MbarrierArrive { address, .. } => u.at(address),
        Op::MbarrierArriveExpect { address, bytes } => u.at(address).read(bytes),
        Op::MbarrierWait { address, parity } => u.at(address).read(parity),
        Op::MbarrierTest {
            dst,
            address,
            parity,
        } => u.at(address).read(parity).write(*dst),
        Op::TmaLoad {
            dst,
            map,
            coordinates,
            barrier,
            multicast,
            hint,
        } => {
            if let Some(multicast) = multicast {
                u.read(multicast);
            }
            u.reads.extend(hint);
            u.at(dst).at(barrier).register(*map).read_all(coordinates)
        }
        Op::TmaStore {
            map,
            coordinates,
            src,
            hint,
        } => {
            u.reads.extend(hint);
            u.at(src).register(*map).read_all(coordinates)
        }
        Op::TmaReduceAdd {
            map,
            coordinates,
            src,
        } => u.at(src).register(*map).read_all(coordinates),
        Op::PrefetchMap { map } => u.register(*map),
        Op::BulkLoad {
            dst,
            src,
            bytes,
            barrier,
            hint,
        } => {
            u.reads.extend(hint);
            u.at(dst).at(src).at(barrier).read(bytes)
        }
        Op::BulkStore { dst, src, bytes }
        | Op::BulkReduceAdd {
            dst, src, bytes, ..
        } => u.at(dst).at(src).read(bytes),
        Op::Wgmma {
            a, b, accumulate, ..
        } => {
            if let MatrixA::Shared { descriptor, .. } = a {
                u.read(descriptor);
            }
            u.read(b).read(accumulate)
        }
        Op::Sleep { nanoseconds } => u.read(nanoseconds),
        Op::Fence(_)
        | Op::WarpSync
        | Op::ClusterArrive
        | Op::ClusterWait
        | Op::BulkCommit
        | Op::BulkWait { .. }
        | Op::WgmmaFence
        | Op::WgmmaCommit
        | Op::WgmmaWait { .. }
        | Op::SetMaxRegisters { .. }
        | Op::GridWait
        | Op::GridLaunch
        | Op::Trap => u,
    };
    uses
}
