//! What each instruction does: values here, all else in the units' own rooms.
//!
//! In: an instruction and the lanes that execute it, from a warp's turn. Out: changed state, and
//! whether the warp goes on. The `match` has no wildcard: a new instruction does not compile until
//! it is given a meaning.

use flex_block_attn_ptx::Arg;
use flex_block_attn_ptx::Class;
use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{
    Binary, Fence, Op, Operand, Packed, RegId, Scope, ShuffleMode, Special, VoteMode,
};

use crate::access::{AtomicAccess, Plain};
use crate::alu;
use crate::fault::{Done, Kind};
use crate::machine::{Here, Machine};
use crate::program::{Decoded, Program};
use crate::shared::{RANK_SHIFT, at_rank};
use crate::tile::map_token;
use crate::warp::{FULL, State, Warp, Wides, Words};

/// How a warp goes on after an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// With the next one.
    Next,
    /// With this one again, once the state is over.
    Again(State),
    /// With the next one, once the state is over.
    Wait(State),
    /// With the next one, after the others had a turn: it looked for something in vain.
    Vain,
}

/// The lanes of a mask.
pub(crate) fn lanes_of(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let lane = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            lane
        })
    })
}

impl Warp {
    /// An operand's values by a type's class, as 64 bits each. Predicates are 0 or 1.
    pub(crate) fn values(&self, program: &Program, class: Class, operand: Operand) -> Wides {
        match class {
            Class::B64 => self.wides(program, operand),
            Class::Pred => {
                let mask = self.mask(program, operand);
                std::array::from_fn(|lane| u64::from(mask >> lane & 1))
            }
            _ => self.words(program, operand).map(u64::from),
        }
    }

    /// Writes values to a register by its class.
    pub(crate) fn put(&mut self, program: &Program, dst: RegId, lanes: u32, values: &Wides) {
        match program.kernel.registers[dst.0 as usize] {
            Class::B64 => self.set_wide(program, dst, lanes, values),
            Class::Pred => {
                let mask = (0..32).fold(0, |mask, lane| mask | ((values[lane] & 1) as u32) << lane);
                self.set_mask(program, dst, lanes, mask);
            }
            Class::B16 => self.set(
                program,
                dst,
                lanes,
                &values.map(|value| value as u32 & 0xffff),
            ),
            _ => self.set(program, dst, lanes, &values.map(|value| value as u32)),
        }
    }

    fn put_float2(
        &mut self,
        program: &Program,
        (dst, lanes): (RegId, u32),
        (a, b): (&Operand, &Operand),
        f: impl Fn(f32, f32) -> f32,
    ) {
        let (a, b) = (self.words(program, *a), self.words(program, *b));
        let values: Words =
            std::array::from_fn(|i| f(f32::from_bits(a[i]), f32::from_bits(b[i])).to_bits());
        self.set(program, dst, lanes, &values);
    }
}

/// Applies a function to the values of executing lanes; the others' results do not matter.
fn map<const N: usize>(
    lanes: u32,
    operands: [Wides; N],
    f: impl Fn([u64; N]) -> Done<u64>,
) -> Done<Wides> {
    let mut result = [0; 32];
    for lane in lanes_of(lanes) {
        let mut values = [0; N];
        for (value, operand) in values.iter_mut().zip(&operands) {
            *value = operand[lane];
        }
        result[lane] = f(values).map_err(|wrong| wrong.at_lane(lane))?;
    }
    Ok(result)
}

impl Machine<'_> {
    /// Executes an instruction on some lanes of a warp.
    pub(crate) fn execute(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
    ) -> Done<Flow> {
        let p = self.program;
        let (b32, b64) = (Class::B32, Class::B64);
        match &inst.inst.op {
            Op::Mov { ty, dst, src } => {
                if matches!(ty.class(), Class::B32 | Class::F32) {
                    let values = warp.words(p, *src);
                    warp.set(p, *dst, lanes, &values);
                } else {
                    let values = warp.values(p, ty.class(), *src);
                    warp.put(p, *dst, lanes, &values);
                }
            }
            Op::Special { dst, which } => {
                let values = self.special(here, *which);
                warp.set(p, *dst, lanes, &values);
            }
            Op::Param { dst, param, .. } => {
                let bits = match self.launch.args[*param as usize] {
                    Arg::U32(value) => u64::from(value),
                    Arg::U64(value) => value,
                    Arg::F32(value) => u64::from(value.to_bits()),
                    Arg::TensorMap(_) => {
                        let reason = format!("parameter {param} is a tensor map, not a number");
                        return Err(Kind::Launch { reason }.into());
                    }
                };
                warp.put(p, *dst, lanes, &[bits; 32]);
            }
            Op::ParamAddress { dst, param } => {
                warp.set_wide(p, *dst, lanes, &[map_token(*param); 32]);
            }
            Op::SharedBase { dst } => {
                let block = &self.clusters[here.cluster].blocks[here.rank];
                warp.set(p, *dst, lanes, &[block.shared.base; 32]);
            }
            Op::Unary { op, ty, dst, a } => {
                let a = warp.values(p, ty.class(), *a);
                let values = map(lanes, [a], |[a]| alu::unary(*op, *ty, a))?;
                warp.put(p, *dst, lanes, &values);
            }
            // The bulk of a softmax, straight.
            Op::Binary {
                op: Binary::Mul,
                ty: Ty::F32,
                dst,
                a,
                b,
            } => {
                warp.put_float2(p, (*dst, lanes), (a, b), |a, b| a * b);
            }
            Op::Binary {
                op: Binary::Add,
                ty: Ty::F32,
                dst,
                a,
                b,
            } => {
                warp.put_float2(p, (*dst, lanes), (a, b), |a, b| a + b);
            }
            Op::Binary {
                op: Binary::Sub,
                ty: Ty::F32,
                dst,
                a,
                b,
            } => {
                warp.put_float2(p, (*dst, lanes), (a, b), |a, b| a - b);
            }
            Op::Binary {
                op: op @ (Binary::Shl | Binary::Shr),
                ty,
                dst,
                a,
                b,
            } => {
                let a = warp.values(p, ty.class(), *a);
                let b = warp.values(p, b32, *b);
                let values = map(lanes, [a, b], |[a, b]| alu::binary(*op, *ty, a, b))?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::Binary { op, ty, dst, a, b } => {
                let a = warp.values(p, ty.class(), *a);
                let b = warp.values(p, ty.class(), *b);
                let values = map(lanes, [a, b], |[a, b]| alu::binary(*op, *ty, a, b))?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::Ternary {
                op,
                ty,
                dst,
                a,
                b,
                c,
            } => {
                let operands = [a, b, c].map(|operand| warp.values(p, ty.class(), *operand));
                let values = map(lanes, operands, |[a, b, c]| alu::ternary(*op, *ty, a, b, c))?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::MulWide { ty, dst, a, b, c } => {
                let a = warp.values(p, ty.class(), *a);
                let b = warp.values(p, ty.class(), *b);
                let c = c.map_or([0; 32], |c| warp.wides(p, c));
                let values = map(lanes, [a, b, c], |[a, b, c]| {
                    Ok(alu::mul_wide(*ty, a, b)?.wrapping_add(c))
                })?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::Lop3 {
                dst,
                a,
                b,
                c,
                table,
            } => {
                let operands = [a, b, c].map(|operand| warp.values(p, b32, *operand));
                let values = map(lanes, operands, |[a, b, c]| Ok(alu::lop3(*table, a, b, c)))?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::Permute {
                dst,
                a,
                b,
                selector,
            } => {
                let operands = [a, b, selector].map(|operand| warp.values(p, b32, *operand));
                let values = map(lanes, operands, |[a, b, s]| Ok(alu::permute(a, b, s)))?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::Convert { to, from, dst, src } => {
                let src = warp.values(p, from.class(), *src);
                let values = map(lanes, [src], |[a]| alu::convert(*to, *from, a))?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::Pack {
                format,
                dst,
                low,
                high,
            } => self.pack(warp, lanes, *format, *dst, low, high),
            Op::Join { ty, dst, low, high } => {
                let (class, shift) = halves(*ty);
                let low = warp.values(p, class, *low);
                let high = warp.values(p, class, *high);
                let values = map(lanes, [low, high], |[low, high]| Ok(low | high << shift))?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::Split { ty, low, high, src } => {
                let (_, shift) = halves(*ty);
                let src = warp.values(p, ty.class(), *src);
                warp.put(
                    p,
                    *low,
                    lanes,
                    &src.map(|value| value & (u64::MAX >> (64 - shift))),
                );
                warp.put(p, *high, lanes, &src.map(|value| value >> shift));
            }
            Op::Compare { cmp, ty, dst, a, b } => {
                let a = warp.values(p, ty.class(), *a);
                let b = warp.values(p, ty.class(), *b);
                let values = map(lanes, [a, b], |[a, b]| {
                    Ok(alu::compare(*cmp, *ty, a, b)?.into())
                })?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::Select {
                ty,
                dst,
                a,
                b,
                cond,
            } => {
                let a = warp.values(p, ty.class(), *a);
                let b = warp.values(p, ty.class(), *b);
                let cond = warp.mask(p, Operand::Reg(*cond));
                let pick = |i: usize| if cond >> i & 1 != 0 { a[i] } else { b[i] };
                warp.put(p, *dst, lanes, &std::array::from_fn(pick));
            }

            Op::Load {
                space,
                cache,
                ty,
                dst,
                address,
            } => {
                let plain = Plain {
                    space: *space,
                    ty: *ty,
                    address: *address,
                };
                return self.load(here, warp, inst, lanes, plain, (*cache, dst));
            }
            Op::Store {
                space,
                ty,
                src,
                address,
            } => {
                let plain = Plain {
                    space: *space,
                    ty: *ty,
                    address: *address,
                };
                self.store(here, warp, inst, lanes, plain, src)?;
            }
            Op::Atomic {
                op,
                order,
                scope,
                space,
                ty,
                dst,
                address,
                src,
                swap,
            } => {
                let plain = Plain {
                    space: *space,
                    ty: *ty,
                    address: *address,
                };
                let atomic = AtomicAccess {
                    op: *op,
                    order: *order,
                    scope: *scope,
                    swap: *swap,
                };
                let old = self.atomic(here, warp, inst, lanes, plain, (atomic, &[*src]))?;
                warp.put(p, *dst, lanes, &old);
            }
            Op::Reduce {
                op,
                scope,
                space,
                ty,
                address,
                src,
            } => {
                let plain = Plain {
                    space: *space,
                    ty: *ty,
                    address: *address,
                };
                let atomic = AtomicAccess::relaxed(*op, *scope);
                self.atomic(here, warp, inst, lanes, plain, (atomic, src))?;
            }
            Op::LoadAcquire {
                ty, dst, address, ..
            } => {
                return self.load_acquire(here, warp, inst, lanes, (*ty, *dst, *address));
            }
            Op::StoreRelease {
                ty, src, address, ..
            } => {
                self.store_release(here, warp, inst, lanes, (*ty, *src, *address))?;
            }
            Op::LoadMatrix {
                transposed,
                dst,
                address,
            } => {
                self.load_matrix(here, warp, inst, *transposed, (dst, address))?;
            }
            Op::StoreMatrix {
                transposed,
                src,
                address,
            } => {
                self.store_matrix(here, warp, inst, *transposed, (src, address))?;
            }
            Op::Fence(fence) => match fence {
                Fence::ProxyAsyncShared => {
                    for lane in lanes_of(lanes) {
                        warp.clocks[lane].fence();
                    }
                    // What follows is not covered by it.
                    warp.next_epoch(&self.clusters[here.cluster], here, lanes);
                }
                Fence::MbarrierInit => self.mbarrier_init_fence(here, warp, lanes),
                Fence::ProxyAsyncGlobal => {
                    for lane in lanes_of(lanes) {
                        warp.clocks[lane].fence_foreign();
                    }
                }
                Fence::AcquireRelease(Scope::Cta) => {}
                Fence::AcquireRelease(_) => self.device_fence(here, warp, lanes),
            },

            Op::Shuffle {
                mode,
                dst,
                src,
                lane,
            } => {
                let src = warp.words(p, *src);
                let lane = warp.words(p, *lane);
                let partner = |i: usize| match mode {
                    ShuffleMode::Index => lane[i] as usize & 31,
                    ShuffleMode::Butterfly => i ^ (lane[i] as usize & 31),
                    ShuffleMode::Up => i.checked_sub(lane[i] as usize & 31).unwrap_or(i),
                    ShuffleMode::Down => match i + (lane[i] as usize & 31) {
                        other if other < 32 => other,
                        _ => i,
                    },
                };
                warp.set(p, *dst, FULL, &std::array::from_fn(|i| src[partner(i)]));
            }
            Op::Vote { mode, dst, src } => {
                let votes = warp.mask(p, Operand::Reg(*src));
                let holds = match mode {
                    VoteMode::All => votes == FULL,
                    VoteMode::Any => votes != 0,
                };
                warp.set_mask(p, *dst, FULL, if holds { FULL } else { 0 });
            }
            Op::Ballot { dst, src } => {
                let votes = warp.mask(p, Operand::Reg(*src));
                warp.set(p, *dst, FULL, &[votes; 32]);
            }
            Op::WarpReduce { op, ty, dst, src } => {
                let values = warp.values(p, ty.class(), *src);
                let mut all = values[0];
                for &value in &values[1..] {
                    all = alu::binary(*op, *ty, all, value)?;
                }
                warp.put(p, *dst, FULL, &[all; 32]);
            }
            Op::Elect { dst } => warp.set_mask(p, *dst, FULL, 1),
            Op::WarpSync => {
                warp.sync();
                // What follows is not covered by it.
                warp.next_epoch(&self.clusters[here.cluster], here, FULL);
            }

            Op::Mma { element, acc, a, b } => self.mma(warp, *element, (acc, a, b)),

            Op::BarrierSync { id, threads } => {
                let (id, threads) = self.barrier_operands(warp, *id, *threads)?;
                return self.barrier_sync(here, warp, id, threads);
            }
            Op::BarrierArrive { id, threads } => {
                let (id, threads) = self.barrier_operands(warp, *id, *threads)?;
                self.barrier_arrive(here, warp, id, threads)?;
            }
            Op::ClusterArrive => self.cluster_arrive(here, warp)?,
            Op::ClusterWait => return self.cluster_wait(here, warp),
            Op::MapShared { dst, address, rank } => {
                let address = warp.values(p, b32, *address);
                let rank = warp.values(p, b32, *rank);
                let ranks = self.clusters[here.cluster].blocks.len() as u64;
                let values = map(lanes, [address, rank], |[address, rank]| {
                    if address >> RANK_SHIFT != here.rank as u64 || rank >= ranks {
                        let problem = format!("mapa of address {address:#x} to rank {rank}");
                        return Err(Kind::ClusterBarrier { problem }.into());
                    }
                    Ok(at_rank(address as u32, rank as usize).into())
                })?;
                warp.put(p, *dst, lanes, &values);
            }
            Op::MbarrierInit { address, count } => {
                self.mbarrier_init(here, warp, inst, lanes, (address, count))?;
            }
            Op::MbarrierInvalidate { address } => {
                let addresses = warp.addresses(p, address);
                for lane in lanes_of(lanes) {
                    let shared = &mut self.clusters[here.cluster].blocks[here.rank].shared;
                    shared
                        .remove_barrier(addresses[lane])
                        .map_err(|w| w.at_lane(lane))?;
                }
            }
            Op::MbarrierArrive {
                address,
                remote,
                scope,
            } => {
                let scope = remote.then_some(*scope);
                self.mbarrier_arrive(here, warp, lanes, address, (None, scope))?;
            }
            Op::MbarrierArriveExpect { address, bytes } => {
                self.mbarrier_arrive(here, warp, lanes, address, (Some(bytes), None))?;
            }
            Op::MbarrierWait {
                address,
                parity,
                scope,
            } => {
                return self.mbarrier_wait(here, warp, lanes, address, (parity, *scope));
            }
            Op::MbarrierTest {
                dst,
                address,
                parity,
            } => {
                return self.mbarrier_test(here, warp, lanes, (*dst, address, parity));
            }

            Op::TmaLoad {
                dst,
                map,
                coordinates,
                barrier,
                multicast,
                ..
            } => {
                let addresses = [dst, barrier];
                self.tma_load(
                    here,
                    warp,
                    inst,
                    lanes,
                    (addresses, *map, coordinates, multicast),
                )?;
            }
            Op::TmaStore {
                map,
                coordinates,
                src,
                ..
            } => {
                self.tma_store(here, warp, inst, lanes, (*map, coordinates, src, false))?;
            }
            Op::TmaReduceAdd {
                map,
                coordinates,
                src,
            } => {
                self.tma_store(here, warp, inst, lanes, (*map, coordinates, src, true))?;
            }
            Op::PrefetchMap { map } => {
                let tokens = warp.wides(p, Operand::Reg(*map));
                for lane in lanes_of(lanes) {
                    self.tensor_map(tokens[lane])
                        .map_err(|wrong| wrong.at_lane(lane))?;
                }
            }
            Op::BulkLoad {
                dst,
                src,
                bytes,
                barrier,
                ..
            } => {
                self.bulk_load(here, warp, inst, lanes, ([dst, barrier], src, bytes))?;
            }
            Op::BulkStore { dst, src, bytes } => {
                self.bulk_store(here, warp, inst, lanes, (dst, src, bytes, None))?;
            }
            Op::BulkReduceAdd {
                ty,
                dst,
                src,
                bytes,
            } => {
                self.bulk_store(here, warp, inst, lanes, (dst, src, bytes, Some(*ty)))?;
            }
            Op::BulkCommit => warp.bulk_commit(lanes),
            Op::BulkWait { pending, read } => {
                self.bulk_wait(here, warp, lanes, *pending, *read)?;
            }
            Op::CachePolicy { dst, .. } => {
                // Nobody looks at it: hints do not change results.
                let policy = warp.values(p, b64, Operand::Imm(0));
                warp.put(p, *dst, lanes, &policy);
            }

            Op::WgmmaFence => self.wgmma_fence(here, warp, inst)?,
            Op::WgmmaCommit => self.wgmma_commit(here, warp, inst)?,
            Op::WgmmaWait { pending } => self.wgmma_wait(here, warp, inst, *pending)?,
            Op::Wgmma { .. } => self.wgmma(here, warp, inst)?,
            Op::SetMaxRegisters { increase, count } => {
                return self.set_max_registers(here, warp, inst, *increase, *count);
            }

            Op::GridWait => warp.alone |= lanes,
            Op::GridLaunch => {}
            Op::Sleep { .. } => return Ok(Flow::Vain),
            Op::Trap => return Err(Kind::Trap.into()),
        }
        Ok(Flow::Next)
    }

    fn pack(
        &self,
        warp: &mut Warp,
        lanes: u32,
        format: Packed,
        dst: RegId,
        low: &Operand,
        high: &Operand,
    ) {
        let low = warp.words(self.program, *low);
        let high = warp.words(self.program, *high);
        let values: Words = std::array::from_fn(|lane| {
            alu::pack(format, u64::from(low[lane]), u64::from(high[lane])) as u32
        });
        warp.set(self.program, dst, lanes, &values);
    }

    fn special(&self, here: Here, which: Special) -> Words {
        let block = &self.clusters[here.cluster].blocks[here.rank];
        let one = match which {
            Special::TidX => return std::array::from_fn(|i| (here.warp * 32 + i) as u32),
            Special::LaneId => return std::array::from_fn(|i| i as u32),
            Special::CtaIdX => block.index[0],
            Special::CtaIdY => block.index[1],
            Special::CtaIdZ => block.index[2],
            Special::GridX => self.launch.grid[0],
            Special::GridY => self.launch.grid[1],
            Special::GridZ => self.launch.grid[2],
            Special::ClusterCtaRank | Special::SmId => here.rank as u32,
            Special::Clock => self.count as u32,
        };
        [one; 32]
    }
}

/// The class of the halves of a joined type, and the bits of one.
fn halves(ty: Ty) -> (Class, u32) {
    match ty.class() {
        Class::B64 => (Class::B32, 32),
        _ => (Class::B16, 16),
    }
}
