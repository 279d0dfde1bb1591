//! Ordinary memory accesses: loads, stores, atomics, `ldmatrix` and `stmatrix`.
//!
//! In: address registers and values of a warp's lanes. Out: changed memory or registers, entries in
//! the shadows, or the fault that an access is. Atomics and fences at device scope order thread
//! blocks; at block scope they only exempt accesses from races with other atomics.

use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{Address, AtomicOp, Cache, Operand, Order, RegId, Scope, Space};

use crate::alu;
use crate::clock::Published;
use crate::cluster::Cluster;
use crate::execute::{Flow, lanes_of};
use crate::fault::{Done, Earlier, Kind, Wrong};
use crate::global::{self, Use};
use crate::machine::{Here, Machine};
use crate::memory::Span;
use crate::program::{Decoded, Program};
use crate::shadow::{Access, Conflict, Lack};
use crate::warp::{FULL, Warp, Wides, Words};

/// Space, type and address of an access.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plain {
    pub(crate) space: Space,
    pub(crate) ty: Ty,
    pub(crate) address: Address,
}

/// What an atomic access does and orders.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AtomicAccess {
    pub(crate) op: AtomicOp,
    pub(crate) order: Order,
    pub(crate) scope: Scope,
    pub(crate) swap: Option<Operand>,
}

impl AtomicAccess {
    /// One that orders nothing.
    pub(crate) fn relaxed(op: AtomicOp, scope: Scope) -> Self {
        Self {
            op,
            order: Order::Relaxed,
            scope,
            swap: None,
        }
    }
}

/// Bytes of memory: a stretch of a block's shared memory or of an allocation.
#[derive(Debug, Clone)]
enum Bytes {
    Shared(usize, std::ops::Range<usize>),
    Global(Span),
}

/// How bytes are used.
#[derive(Debug, Clone, Copy)]
struct How {
    lane: usize,
    what: Use,
    atomic: bool,
}

impl Warp {
    /// The shared addresses of all lanes.
    pub(crate) fn addresses(&self, program: &Program, address: &Address) -> Words {
        let base = self.words(program, Operand::Reg(address.base));
        base.map(|base| base.wrapping_add_signed(address.offset))
    }

    /// The global addresses of all lanes.
    pub(crate) fn wide_addresses(&self, program: &Program, address: &Address) -> Wides {
        let base = self.wides(program, Operand::Reg(address.base));
        base.map(|base| base.wrapping_add_signed(i64::from(address.offset)))
    }

    /// How ordinary accesses of a lane are entered in shadows.
    pub(crate) fn access(
        &self,
        cluster: &Cluster,
        here: Here,
        inst: &Decoded,
        lane: usize,
    ) -> Access<'_> {
        let component = cluster.component(here.rank, here.warp, lane);
        let clock = &self.clocks[lane];
        Access {
            component,
            epoch: clock.seen(component),
            instruction: inst.index,
            clock,
            asynchronous: false,
            atomic: false,
            threads: cluster.ordinary(),
        }
    }

    /// After a release by some lanes: what follows is not covered by it.
    pub(crate) fn next_epoch(&mut self, cluster: &Cluster, here: Here, lanes: u32) {
        for lane in lanes_of(lanes) {
            let component = cluster.component(here.rank, here.warp, lane);
            let clock = &mut self.clocks[lane];
            clock.learn(component, clock.seen(component) + 1);
        }
    }
}

fn value(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn put_value(bytes: &mut [u8], value: u64) {
    let len = bytes.len();
    bytes.copy_from_slice(&value.to_le_bytes()[..len]);
}

impl Machine<'_> {
    /// The fault of two accesses of shared memory of a block that are not ordered.
    pub(crate) fn race(&self, here: Here, rank: usize, conflict: Conflict, write: bool) -> Wrong {
        let cluster = &self.clusters[here.cluster];
        let place = cluster.blocks[rank].shared.place_of_cell(conflict.cell);
        let earlier = Box::new(Earlier {
            what: if conflict.write { "write" } else { "read" },
            who: cluster.describe(conflict.component),
            instruction: self.program.text(conflict.instruction),
            at: self.program.place(conflict.instruction),
        });
        let what = if write { "write" } else { "read" };
        match conflict.lack {
            Lack::Order => Kind::Race {
                place,
                what,
                earlier,
            },
            Lack::Fence => Kind::ProxyFence {
                place,
                what,
                earlier,
            },
            Lack::Scope => Kind::Scope {
                place,
                what,
                earlier,
            },
        }
        .into()
    }

    /// The fault of two accesses of global memory that are not ordered.
    pub(crate) fn global_race(
        &self,
        here: Here,
        span: Span,
        conflict: global::Conflict,
        write: bool,
    ) -> Wrong {
        let base = self.memory.allocations()[span.allocation].base;
        let place = self.memory.place(base + conflict.offset as u64);
        if conflict.constant {
            return Kind::ConstantWritten { place }.into();
        }
        let cluster = &self.clusters[here.cluster];
        let own = cluster.blocks[here.rank].number == conflict.block;
        let grid = self.launch.grid;
        let number = conflict.block;
        let block = [
            number % grid[0],
            number / grid[0] % grid[1],
            number / grid[0] / grid[1],
        ];
        let earlier = Box::new(Earlier {
            what: if conflict.write { "write" } else { "read" },
            who: if own {
                cluster.describe(conflict.component)
            } else {
                format!("block {block:?}")
            },
            instruction: self.program.text(conflict.instruction),
            at: self.program.place(conflict.instruction),
        });
        let what = if write { "write" } else { "read" };
        if conflict.fence {
            Kind::ProxyFence {
                place,
                what,
                earlier,
            }
            .into()
        } else {
            Kind::Race {
                place,
                what,
                earlier,
            }
            .into()
        }
    }

    /// The bytes that a lane accesses, aligned to their number.
    fn locate(&self, here: Here, space: Space, address: u64, len: usize) -> Done<Bytes> {
        let blocks = &self.clusters[here.cluster].blocks;
        match space {
            Space::Shared => {
                let range = blocks[here.rank]
                    .shared
                    .data(address as u32, len, len as u32)?;
                Ok(Bytes::Shared(here.rank, range))
            }
            Space::Cluster => {
                let address = address as u32;
                let rank = self.remote(here, address)?;
                Ok(Bytes::Shared(
                    rank,
                    blocks[rank].shared.data(address, len, len as u32)?,
                ))
            }
            Space::Global => {
                let span = self.memory.span(address, len)?;
                if !address.is_multiple_of(len as u64) {
                    let place = self.memory.place(address);
                    return Err(Kind::Misaligned {
                        place,
                        needed: len as u32,
                    }
                    .into());
                }
                Ok(Bytes::Global(span))
            }
        }
    }

    /// The rank of the block that a shared::cluster address names, which must not have left.
    pub(crate) fn remote(&self, here: Here, address: u32) -> Done<usize> {
        let cluster = &self.clusters[here.cluster];
        let rank = cluster.resolve(here.rank, address);
        if rank != here.rank && cluster.blocks[rank].running == 0 {
            let index = cluster.blocks[rank].index;
            let problem = format!("block {index:?}, which this accesses, is at its end");
            return Err(Kind::ClusterBarrier { problem }.into());
        }
        Ok(rank)
    }

    /// Enters an access in the shadow.
    fn enter(&mut self, here: Here, warp: &Warp, inst: &Decoded, bytes: &Bytes, how: How) -> Done {
        let cluster = &mut self.clusters[here.cluster];
        let mut access = warp.access(cluster, here, inst, how.lane);
        access.atomic = how.atomic;
        let write = how.what == Use::Write;
        match bytes {
            Bytes::Shared(rank, range) => {
                let shared = &mut cluster.blocks[*rank].shared;
                let cells = shared.cells(range);
                let result = if write {
                    shared.shadow.write(&access, cells)
                } else {
                    shared.shadow.read(&access, cells)
                };
                result.map_err(|conflict| self.race(here, *rank, conflict, write))
            }
            Bytes::Global(span) => {
                let number = cluster.blocks[here.rank].number;
                self.ledger
                    .enter(self.memory, *span, number, &access, how.what)
                    .map_err(|conflict| self.global_race(here, *span, conflict, write))
            }
        }
    }

    fn known(&self, here: Here, bytes: &Bytes) -> Done<&[u8]> {
        match bytes {
            Bytes::Shared(rank, range) => self.clusters[here.cluster].blocks[*rank]
                .shared
                .known(range.clone()),
            Bytes::Global(span) => self.memory.known(*span),
        }
    }

    fn written(&mut self, here: Here, bytes: &Bytes) -> &mut [u8] {
        match bytes {
            Bytes::Shared(rank, range) => self.clusters[here.cluster].blocks[*rank]
                .shared
                .written(range.clone()),
            Bytes::Global(span) => self.memory.span_mut(*span),
        }
    }

    fn lane_addresses(&self, warp: &Warp, plain: &Plain) -> Wides {
        match plain.space {
            Space::Global => warp.wide_addresses(self.program, &plain.address),
            _ => warp.addresses(self.program, &plain.address).map(u64::from),
        }
    }

    /// `ld`
    pub(crate) fn load(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        plain: Plain,
        (cache, dst): (Cache, &[RegId]),
    ) -> Done<Flow> {
        let size = plain.ty.bytes() as usize;
        let addresses = self.lane_addresses(warp, &plain);
        let volatile = cache == Cache::Volatile;
        let what = if cache == Cache::Constant {
            Use::Constant
        } else {
            Use::Read
        };
        let mut values = [[0; 32]; 4];
        if dst.len() > values.len() {
            return Err(Kind::Unsupported {
                what: "a load of more than four".to_owned(),
            }
            .into());
        }
        for lane in lanes_of(lanes) {
            let mut one = || {
                let bytes = self.locate(here, plain.space, addresses[lane], size * dst.len())?;
                self.enter(
                    here,
                    warp,
                    inst,
                    &bytes,
                    How {
                        lane,
                        what,
                        atomic: volatile,
                    },
                )?;
                let bytes = self.known(here, &bytes)?;
                for (values, bytes) in values.iter_mut().zip(bytes.chunks_exact(size)) {
                    values[lane] = value(bytes);
                }
                Ok(())
            };
            one().map_err(|wrong: Wrong| wrong.at_lane(lane))?;
            if volatile && plain.space == Space::Global {
                warp.glimpsed
                    .extend_from_slice(self.ledger.published(addresses[lane]));
            }
        }
        for (&dst, values) in dst.iter().zip(&values) {
            warp.put(self.program, dst, lanes, values);
        }
        if plain.space == Space::Global {
            self.statistics.loaded += u64::from(lanes.count_ones()) * (size * dst.len()) as u64;
        }
        Ok(if volatile { Flow::Vain } else { Flow::Next })
    }

    /// `st`
    pub(crate) fn store(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        plain: Plain,
        src: &[Operand],
    ) -> Done {
        let size = plain.ty.bytes() as usize;
        let len = size * src.len();
        let addresses = self.lane_addresses(warp, &plain);
        self.check_overlap(here, plain.space, &addresses, lanes, len)?;
        let mut values = [[0; 32]; 4];
        if src.len() > values.len() {
            return Err(Kind::Unsupported {
                what: "a store of more than four".to_owned(),
            }
            .into());
        }
        for (values, src) in values.iter_mut().zip(src) {
            *values = warp.values(self.program, plain.ty.class(), *src);
        }
        for lane in lanes_of(lanes) {
            let mut one = || {
                let bytes = self.locate(here, plain.space, addresses[lane], len)?;
                self.enter(
                    here,
                    warp,
                    inst,
                    &bytes,
                    How {
                        lane,
                        what: Use::Write,
                        atomic: false,
                    },
                )?;
                let bytes = self.written(here, &bytes);
                for (values, bytes) in values.iter().zip(bytes.chunks_exact_mut(size)) {
                    put_value(bytes, values[lane]);
                }
                Ok(())
            };
            one().map_err(|wrong: Wrong| wrong.at_lane(lane))?;
        }
        if plain.space == Space::Global {
            self.statistics.stored += u64::from(lanes.count_ones()) * len as u64;
        }
        Ok(())
    }

    /// Whether no two lanes write the same byte.
    fn check_overlap(
        &self,
        here: Here,
        space: Space,
        addresses: &Wides,
        lanes: u32,
        len: usize,
    ) -> Done {
        let mut sorted = [0; 32];
        let mut count = 0;
        for lane in lanes_of(lanes) {
            sorted[count] = addresses[lane];
            count += 1;
        }
        let sorted = &mut sorted[..count];
        if !sorted.is_sorted() {
            sorted.sort_unstable();
        }
        for pair in sorted.windows(2) {
            if pair[1] - pair[0] < len as u64 {
                let place = match space {
                    Space::Global => self.memory.place(pair[1]),
                    _ => {
                        let cluster = &self.clusters[here.cluster];
                        let address = pair[1] as u32;
                        let rank = cluster.resolve(here.rank, address);
                        cluster.blocks[rank].shared.place(address)
                    }
                };
                let mut wrong = Wrong::from(Kind::LaneOverlap { place });
                for lane in lanes_of(lanes) {
                    if pair.contains(&addresses[lane]) {
                        wrong.lanes |= 1 << lane;
                    }
                }
                return Err(wrong);
            }
        }
        Ok(())
    }

    /// `atom` and `red`: lane after lane; the old values of the first element.
    pub(crate) fn atomic(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        plain: Plain,
        (atomic, src): (AtomicAccess, &[Operand]),
    ) -> Done<Wides> {
        let size = plain.ty.bytes() as usize;
        let class = plain.ty.class();
        let addresses = self.lane_addresses(warp, &plain);
        let sources: Vec<Wides> = src
            .iter()
            .map(|src| warp.values(self.program, class, *src))
            .collect();
        let swap = atomic
            .swap
            .map(|swap| warp.values(self.program, class, swap));
        let device = plain.space == Space::Global && atomic.scope != Scope::Cta;
        let mut result = [0; 32];
        for lane in lanes_of(lanes) {
            let mut one = || {
                let at = self.locate(here, plain.space, addresses[lane], size * src.len())?;
                self.enter(
                    here,
                    warp,
                    inst,
                    &at,
                    How {
                        lane,
                        what: Use::Write,
                        atomic: self.any_order(plain.ty),
                    },
                )?;
                for (i, source) in sources.iter().enumerate() {
                    let range = i * size..(i + 1) * size;
                    let old = value(&self.known(here, &at)?[range.clone()]);
                    let swap = swap.map(|swap| swap[lane]);
                    let new = alu::atomic(atomic.op, plain.ty, old, source[lane], swap)?;
                    put_value(&mut self.written(here, &at)[range], new);
                    if i == 0 {
                        result[lane] = old;
                    }
                }
                Ok(())
            };
            one().map_err(|wrong: Wrong| wrong.at_lane(lane))?;
            if device {
                self.synchronise(here, warp, lane, addresses[lane], atomic.order);
            }
        }
        if plain.space == Space::Global {
            let bytes = size * src.len();
            self.statistics.stored += u64::from(lanes.count_ones()) * bytes as u64;
        }
        Ok(result)
    }

    /// What an atomic at device scope orders.
    fn synchronise(
        &mut self,
        here: Here,
        warp: &mut Warp,
        lane: usize,
        address: u64,
        order: Order,
    ) {
        if !self.ledger.published(address).is_empty() {
            let published = self.ledger.published(address).to_vec();
            if matches!(order, Order::Acquire | Order::AcquireRelease) {
                self.acquire(here, warp, 1 << lane, &published);
            } else {
                warp.glimpsed.extend(published);
            }
        }
        if matches!(order, Order::Release | Order::AcquireRelease) {
            self.release(here, warp, lane, address);
        } else if let Some(fenced) = &warp.fenced {
            self.ledger.publish(address, fenced);
        }
    }

    fn acquire(&self, here: Here, warp: &mut Warp, lanes: u32, published: &[Published]) {
        let own = self.clusters[here.cluster].blocks[here.rank].number;
        for (block, clock) in published {
            for lane in lanes_of(lanes) {
                let known = &mut warp.clocks[lane];
                if *block == own {
                    for (component, &epoch) in clock.iter().enumerate() {
                        known.learn(component as u16, epoch);
                    }
                } else {
                    known.acquire(*block, clock);
                }
            }
        }
    }

    fn release(&mut self, here: Here, warp: &mut Warp, lane: usize, address: u64) {
        let cluster = &self.clusters[here.cluster];
        let clock = &warp.clocks[lane];
        let published = clock.publish(cluster.blocks[here.rank].number);
        self.ledger.publish(address, &published);
        warp.next_epoch(cluster, here, 1 << lane);
    }

    /// `fence.acq_rel` at device (or cluster) scope.
    pub(crate) fn device_fence(&mut self, here: Here, warp: &mut Warp, lanes: u32) {
        let glimpsed = std::mem::take(&mut warp.glimpsed);
        self.acquire(here, warp, lanes, &glimpsed);
        let cluster = &self.clusters[here.cluster];
        let known = warp.knowledge(lanes);
        warp.fenced = Some(known.publish(cluster.blocks[here.rank].number));
        warp.next_epoch(cluster, here, lanes);
    }

    /// `ld.acquire`
    pub(crate) fn load_acquire(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        (ty, dst, address): (Ty, RegId, Address),
    ) -> Done<Flow> {
        let plain = Plain {
            space: Space::Global,
            ty,
            address,
        };
        self.load(here, warp, inst, lanes, plain, (Cache::Volatile, &[dst]))?;
        let glimpsed = std::mem::take(&mut warp.glimpsed);
        self.acquire(here, warp, lanes, &glimpsed);
        Ok(Flow::Vain)
    }

    /// `st.release`
    pub(crate) fn store_release(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        (ty, src, address): (Ty, Operand, Address),
    ) -> Done {
        let addresses = warp.wide_addresses(self.program, &address);
        let values = warp.values(self.program, ty.class(), src);
        let len = ty.bytes() as usize;
        self.check_overlap(here, Space::Global, &addresses, lanes, len)?;
        for lane in lanes_of(lanes) {
            let mut one = || {
                let bytes = self.locate(here, Space::Global, addresses[lane], len)?;
                self.enter(
                    here,
                    warp,
                    inst,
                    &bytes,
                    How {
                        lane,
                        what: Use::Write,
                        atomic: true,
                    },
                )?;
                put_value(self.written(here, &bytes), values[lane]);
                Ok(())
            };
            one().map_err(|wrong: Wrong| wrong.at_lane(lane))?;
            self.release(here, warp, lane, addresses[lane]);
        }
        Ok(())
    }

    /// The row addresses of `ldmatrix` and `stmatrix`, by matrix and row.
    fn rows(
        &self,
        here: Here,
        warp: &Warp,
        address: &Address,
        count: usize,
    ) -> Done<Vec<(usize, std::ops::Range<usize>)>> {
        let addresses = warp.addresses(self.program, address);
        let shared = &self.clusters[here.cluster].blocks[here.rank].shared;
        (0..8 * count)
            .map(|lane| {
                let range = shared.data(addresses[lane], 16, 16);
                Ok((lane, range.map_err(|wrong| wrong.at_lane(lane))?))
            })
            .collect()
    }

    /// `ldmatrix`
    pub(crate) fn load_matrix(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        transposed: bool,
        (dst, address): (&[RegId], &Address),
    ) -> Done {
        let mut matrices = [[[0u16; 8]; 8]; 4];
        for (lane, range) in self.rows(here, warp, address, dst.len())? {
            let bytes = Bytes::Shared(here.rank, range);
            self.enter(
                here,
                warp,
                inst,
                &bytes,
                How {
                    lane,
                    what: Use::Read,
                    atomic: false,
                },
            )
            .map_err(|wrong| wrong.at_lane(lane))?;
            let bytes = self
                .known(here, &bytes)
                .map_err(|wrong| wrong.at_lane(lane))?;
            for (to, bytes) in matrices[lane / 8][lane % 8]
                .iter_mut()
                .zip(bytes.chunks_exact(2))
            {
                *to = value(bytes) as u16;
            }
        }
        for (&dst, matrix) in dst.iter().zip(&matrices) {
            let element = |lane: usize, half: usize| {
                let (row, column) = (lane / 4, 2 * (lane % 4) + half);
                u32::from(if transposed {
                    matrix[column][row]
                } else {
                    matrix[row][column]
                })
            };
            let values: Words =
                std::array::from_fn(|lane| element(lane, 0) | element(lane, 1) << 16);
            warp.set(self.program, dst, FULL, &values);
        }
        Ok(())
    }

    /// `stmatrix`
    pub(crate) fn store_matrix(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        transposed: bool,
        (src, address): (&[RegId], &Address),
    ) -> Done {
        let addresses = warp.addresses(self.program, address).map(u64::from);
        let lanes = u32::MAX >> (32 - 8 * src.len());
        self.check_overlap(here, Space::Shared, &addresses, lanes, 16)?;
        for (lane, range) in self.rows(here, warp, address, src.len())? {
            let bytes = Bytes::Shared(here.rank, range);
            self.enter(
                here,
                warp,
                inst,
                &bytes,
                How {
                    lane,
                    what: Use::Write,
                    atomic: false,
                },
            )
            .map_err(|wrong| wrong.at_lane(lane))?;
            let values = *warp.row(self.program, src[lane / 8]);
            let row = lane % 8;
            let bytes = self.written(here, &bytes);
            for (column, bytes) in bytes.chunks_exact_mut(2).enumerate() {
                let (holder, half) = if transposed {
                    (4 * column + row / 2, row % 2)
                } else {
                    (4 * row + column / 2, column % 2)
                };
                put_value(bytes, u64::from(values[holder] >> (16 * half)));
            }
        }
        Ok(())
    }
}
