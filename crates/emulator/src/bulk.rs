//! The bulk engine: `cp.async.bulk` and its tensor, reducing and multicast forms.
//!
//! In: copies, as warps issue them. Out: bytes moved, mbarriers told, groups that a thread can wait
//! for. Copies are checked and entered in the shadows when they are issued, and performed then or
//! later, as the options say.

use std::collections::VecDeque;

use flex_block_attn_ptx::ir::{Address, Binary, Operand, RegId};
use flex_block_attn_ptx::{Arg, Swizzle, TensorMap, Ty};

use crate::alu;
use crate::clock::{Clock, Component};
use crate::cluster::Agent;
use crate::execute::lanes_of;
use crate::fault::{Done, Kind, Wrong};
use crate::global::Use;
use crate::machine::{Here, Machine};
use crate::memory::Memory;
use crate::program::Decoded;
use crate::shadow::Access;
use crate::shared::{Shared, at_rank};
use crate::tile::{self, Coordinates, Row, map_token};
use crate::warp::Warp;

/// The side of a copy that lies in global memory.
#[derive(Debug, Clone, Copy)]
enum Outside {
    Tile(TensorMap, Coordinates),
    Flat { address: u64, bytes: u32 },
}

impl Outside {
    fn bytes(&self) -> u32 {
        match self {
            Self::Tile(map, _) => map.tile_bytes(),
            Self::Flat { bytes, .. } => *bytes,
        }
    }

    fn swizzle(&self) -> Swizzle {
        match self {
            Self::Tile(map, _) => map.swizzle,
            Self::Flat { .. } => Swizzle::None,
        }
    }

    fn rows(&self, mut f: impl FnMut(Row) -> Done) -> Done {
        match self {
            Self::Tile(map, coordinates) => tile::rows(map, coordinates, f),
            Self::Flat { address, bytes } => f(Row {
                offset: 0,
                skipped: 0,
                len: *bytes,
                address: *address,
            }),
        }
    }
}

/// Where a copy to shared memory goes: one block, of several if it is multicast.
#[derive(Debug, Clone, Copy)]
struct Target {
    rank: usize,
    address: u32,
    barrier: u32,
    /// The barrier's phase when the copy was issued.
    phase: u32,
}

/// A copy to shared memory under way.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) instruction: u32,
    block: [u32; 3],
    warp: u32,
    cluster: usize,
    source: Outside,
    targets: Vec<Target>,
}

impl Load {
    /// Whether it writes a block's shared memory.
    pub(crate) fn concerns(&self, cluster: usize, rank: usize) -> bool {
        self.cluster == cluster && self.targets.iter().any(|target| target.rank == rank)
    }

    /// A cluster is no longer among those resident.
    pub(crate) fn cluster_removed(&mut self, cluster: usize) {
        if self.cluster > cluster {
            self.cluster -= 1;
        }
    }
}

/// A copy from shared memory under way.
#[derive(Debug)]
struct Store {
    group: u32,
    source: u32,
    target: Outside,
    /// How elements are added, if they are.
    sum: Option<Ty>,
    /// The tile, once it was read.
    data: Option<Vec<u8>>,
}

/// A copy that has read shared memory, and is yet to write.
#[derive(Debug)]
pub(crate) struct Captured {
    target: Outside,
    sum: Option<Ty>,
    data: Vec<u8>,
}

/// The bulk stores of one thread.
#[derive(Debug)]
pub(crate) struct ThreadGroups {
    lane: usize,
    /// Components of clocks: groups that have read, groups that have written.
    reads: Component,
    writes: Component,
    committed: u32,
    /// The last group whose reads were waited for.
    waited: u32,
    /// The last group with copies in it, and the last of these.
    last: u32,
    last_store: u32,
    stores: VecDeque<Store>,
}

impl Warp {
    /// `cp.async.bulk.commit_group`
    pub(crate) fn bulk_commit(&mut self, lanes: u32) {
        for thread in &mut self.bulk {
            if lanes >> thread.lane & 1 != 0 {
                thread.committed += 1;
            }
        }
    }
}

fn problem(problem: String) -> Wrong {
    Kind::Bulk { problem }.into()
}

/// Copies a tile between a buffer and shared memory, 16 bytes at a time.
fn scatter(swizzle: Swizzle, address: u32, data: &[u8], shared: &mut Shared) -> Done {
    let range = shared.range(address, data.len())?;
    let to = shared.written(range);
    for (i, chunk) in data.chunks_exact(16).enumerate() {
        let at = (swizzle.apply(address + 16 * i as u32) - address) as usize;
        to[at..at + 16].copy_from_slice(chunk);
    }
    Ok(())
}

/// Writes a tile's rows to global memory.
fn write_rows(memory: &mut Memory, target: &Outside, sum: Option<Ty>, data: &[u8]) -> Done {
    let size = match target {
        Outside::Tile(map, _) => map.element.bytes() as usize,
        Outside::Flat { .. } => sum.map_or(1, |ty| ty.bytes() as usize),
    };
    target.rows(|row| {
        if row.len == 0 {
            return Ok(());
        }
        let span = memory.span(row.address, row.len as usize)?;
        let start = (row.offset + row.skipped) as usize;
        let data = &data[start..start + row.len as usize];
        let Some(ty) = sum else {
            memory.span_mut(span).copy_from_slice(data);
            return Ok(());
        };
        memory.known(span)?;
        for (to, from) in memory
            .span_mut(span)
            .chunks_mut(size)
            .zip(data.chunks(size))
        {
            let mut bits = [[0; 8]; 2];
            bits[0][..size].copy_from_slice(to);
            bits[1][..size].copy_from_slice(from);
            let [old, new] = bits.map(u64::from_le_bytes);
            let result = alu::binary(Binary::Add, ty, old, new)?;
            to.copy_from_slice(&result.to_le_bytes()[..size]);
        }
        Ok(())
    })
}

impl Machine<'_> {
    /// The tensor map that a register's value stands for.
    pub(crate) fn tensor_map(&self, token: u64) -> Done<TensorMap> {
        let named = (0..self.launch.args.len()).find(|&param| map_token(param as u32) == token);
        match named.map(|param| self.launch.args[param]) {
            Some(Arg::TensorMap(map)) => Ok(map),
            _ => Err(problem(format!(
                "{token:#x} is not the address of a tensor map parameter"
            ))),
        }
    }

    fn tile(&self, warp: &Warp, lane: usize, map: RegId, coordinates: &[Operand]) -> Done<Outside> {
        let map = self.tensor_map(warp.wides(self.program, Operand::Reg(map))[lane])?;
        if coordinates.len() != map.rank as usize {
            let (got, rank) = (coordinates.len(), map.rank);
            return Err(problem(format!(
                "{got} coordinates for a tensor map of rank {rank}"
            )));
        }
        let mut at = [0; 5];
        for (at, coordinate) in at.iter_mut().zip(coordinates) {
            *at = warp.words(self.program, *coordinate)[lane] as i32;
        }
        Ok(Outside::Tile(map, at))
    }

    fn flat(&self, address: u64, bytes: u32) -> Done<Outside> {
        if !address.is_multiple_of(16) {
            return Err(Kind::Misaligned {
                place: self.memory.place(address),
                needed: 16,
            }
            .into());
        }
        if bytes == 0 || !bytes.is_multiple_of(16) {
            return Err(problem(format!(
                "{bytes} bytes are no positive multiple of 16"
            )));
        }
        Ok(Outside::Flat { address, bytes })
    }

    /// `cp.async.bulk.tensor...mbarrier`
    pub(crate) fn tma_load(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        (addresses, map, coordinates, multicast): (
            [&Address; 2],
            RegId,
            &[Operand],
            &Option<Operand>,
        ),
    ) -> Done {
        let addresses = addresses.map(|address| warp.addresses(self.program, address));
        let masks = multicast.map(|mask| warp.words(self.program, mask));
        for lane in lanes_of(lanes) {
            let ranks = masks.map(|masks| masks[lane] & 0xffff);
            let addresses = addresses.map(|addresses| addresses[lane]);
            self.tile(warp, lane, map, coordinates)
                .and_then(|tile| {
                    let clock = &warp.clocks[lane];
                    self.issue_load(here, clock, inst, tile, (addresses, ranks, 128))
                })
                .map_err(|wrong| wrong.at_lane(lane))?;
        }
        Ok(())
    }

    /// `cp.async.bulk...mbarrier`
    pub(crate) fn bulk_load(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        (addresses, src, bytes): ([&Address; 2], &Address, &Operand),
    ) -> Done {
        let addresses = addresses.map(|address| warp.addresses(self.program, address));
        let sources = warp.wide_addresses(self.program, src);
        let bytes = warp.words(self.program, *bytes);
        for lane in lanes_of(lanes) {
            let addresses = addresses.map(|addresses| addresses[lane]);
            self.flat(sources[lane], bytes[lane])
                .and_then(|flat| {
                    let clock = &warp.clocks[lane];
                    self.issue_load(here, clock, inst, flat, (addresses, None, 16))
                })
                .map_err(|wrong| wrong.at_lane(lane))?;
        }
        Ok(())
    }

    fn issue_load(
        &mut self,
        here: Here,
        clock: &Clock,
        inst: &Decoded,
        source: Outside,
        ([dst, barrier], ranks, align): ([u32; 2], Option<u32>, u32),
    ) -> Done {
        let bytes = source.bytes();
        let mut places = Vec::with_capacity(2);
        match ranks {
            // Of this block only: what the hardware makes of another's addresses is not known.
            None => places.push((here.rank, dst, barrier)),
            Some(ranks) => {
                let blocks = &self.clusters[here.cluster].blocks;
                if ranks == 0 || ranks >> blocks.len() != 0 {
                    let count = blocks.len();
                    let what = format!("multicast to {ranks:#x} in a cluster of {count}");
                    return Err(problem(what));
                }
                let own = &blocks[here.rank].shared;
                own.range(barrier, 8)?;
                own.range(dst, bytes as usize)?;
                // The same offsets in each block.
                let at = |rank| (rank, at_rank(dst, rank), at_rank(barrier, rank));
                places.extend(lanes_of(ranks).map(at));
            }
        }
        let threads = self.clusters[here.cluster].ordinary();
        let mut targets = Vec::with_capacity(places.len());
        for (rank, address, barrier) in places {
            let state = self.mbarrier(here, clock, rank, barrier)?;
            if !state.is_fenced(clock) {
                let problem = "neither fence.mbarrier_init nor fence.proxy.async lies between its \
                               initialisation and this copy";
                let shared = &self.clusters[here.cluster].blocks[rank].shared;
                return Err(shared.no_barrier(barrier, problem));
            }
            let phase = state.phase;
            state.copied = phase + 1;
            let access = Access {
                component: state.component,
                epoch: phase + 1,
                instruction: inst.index,
                clock,
                asynchronous: true,
                atomic: false,
                threads,
            };
            let shared = &mut self.clusters[here.cluster].blocks[rank].shared;
            let range = shared.data(address, bytes as usize, align)?;
            let cells = shared.cells(&range);
            if let Err(conflict) = shared.shadow.write(&access, cells) {
                return Err(self.race(here, rank, conflict, true));
            }
            if targets.is_empty() {
                self.enter_rows(here, &source, &access, Use::Read)?;
            }
            targets.push(Target {
                rank,
                address,
                barrier,
                phase,
            });
        }
        let load = Load {
            instruction: inst.index,
            block: self.clusters[here.cluster].blocks[here.rank].index,
            warp: here.warp as u32,
            cluster: here.cluster,
            source,
            targets,
        };
        if self.is_eager() {
            return self.perform_load(load);
        }
        self.loads.push(load);
        Ok(())
    }

    /// Enters a copy's rows in the ledger of global memory.
    fn enter_rows(&mut self, here: Here, outside: &Outside, access: &Access, what: Use) -> Done {
        let number = self.clusters[here.cluster].blocks[here.rank].number;
        outside.rows(|row| {
            if row.len == 0 {
                return Ok(());
            }
            let span = self.memory.span(row.address, row.len as usize)?;
            let result = self.ledger.enter(self.memory, span, number, access, what);
            result.map_err(|c| self.global_race(here, span, c, what == Use::Write))
        })
    }

    /// Performs a copy to shared memory.
    pub(crate) fn perform_load(&mut self, load: Load) -> Done {
        let origin = (load.instruction, load.block, load.warp);
        self.move_in(load).map_err(|mut wrong| {
            wrong.origin = Some(origin);
            wrong
        })
    }

    fn move_in(&mut self, load: Load) -> Done {
        let bytes = load.source.bytes();
        let mut data = vec![0; bytes as usize];
        load.source.rows(|row| {
            if row.len > 0 {
                let span = self.memory.span(row.address, row.len as usize)?;
                let start = (row.offset + row.skipped) as usize;
                data[start..start + row.len as usize].copy_from_slice(self.memory.known(span)?);
            }
            Ok(())
        })?;
        for target in load.targets {
            let blocks = &mut self.clusters[load.cluster].blocks;
            let shared = &mut blocks[target.rank].shared;
            scatter(load.source.swizzle(), target.address, &data, shared)?;
            let index = shared.barrier(target.barrier)?;
            let result = shared.barriers[index].complete(bytes, target.phase);
            self.statistics.bulk_loaded += u64::from(bytes);
            self.after_mbarrier(load.cluster, target.rank, target.barrier, result)?;
        }
        Ok(())
    }

    /// `cp.async.bulk.tensor...bulk_group` and `cp.reduce.async.bulk.tensor`
    pub(crate) fn tma_store(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        (map, coordinates, src, add): (RegId, &[Operand], &Address, bool),
    ) -> Done {
        let sources = warp.addresses(self.program, src);
        for lane in lanes_of(lanes) {
            let mut one = || {
                let target = self.tile(warp, lane, map, coordinates)?;
                let mut sum = None;
                if let (Outside::Tile(map, _), true) = (&target, add) {
                    sum = tile::sum_type(map.element);
                    if sum.is_none() {
                        return Err(problem(format!("{:?} cannot be added", map.element)));
                    }
                }
                self.issue_store(here, warp, inst, lane, (sources[lane], target, sum, 128))
            };
            one().map_err(|wrong| wrong.at_lane(lane))?;
        }
        Ok(())
    }

    /// `cp.async.bulk...bulk_group` and `cp.reduce.async.bulk`
    pub(crate) fn bulk_store(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        (dst, src, bytes, sum): (&Address, &Address, &Operand, Option<Ty>),
    ) -> Done {
        let targets = warp.wide_addresses(self.program, dst);
        let sources = warp.addresses(self.program, src);
        let bytes = warp.words(self.program, *bytes);
        for lane in lanes_of(lanes) {
            self.flat(targets[lane], bytes[lane])
                .and_then(|target| {
                    self.issue_store(here, warp, inst, lane, (sources[lane], target, sum, 16))
                })
                .map_err(|wrong| wrong.at_lane(lane))?;
        }
        Ok(())
    }

    fn issue_store(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lane: usize,
        (source, target, sum, align): (u32, Outside, Option<Ty>, u32),
    ) -> Done {
        let thread = match warp.bulk.iter().position(|thread| thread.lane == lane) {
            Some(thread) => thread,
            None => {
                let agent = Agent::Bulk {
                    rank: here.rank,
                    warp: here.warp,
                    lane,
                };
                let cluster = &mut self.clusters[here.cluster];
                let components = [cluster.new_component(agent), cluster.new_component(agent)];
                let [Some(reads), Some(writes)] = components else {
                    let what = "so many threads with bulk stores".to_owned();
                    return Err(Kind::Unsupported { what }.into());
                };
                warp.bulk.push(ThreadGroups {
                    lane,
                    reads,
                    writes,
                    committed: 0,
                    waited: 0,
                    last: 0,
                    last_store: 0,
                    stores: VecDeque::new(),
                });
                warp.bulk.len() - 1
            }
        };
        let (reads, writes) = (warp.bulk[thread].reads, warp.bulk[thread].writes);
        let group = warp.bulk[thread].committed + 1;
        let bytes = target.bytes();
        let cluster = &mut self.clusters[here.cluster];
        let mut access = Access {
            component: reads,
            epoch: group,
            instruction: inst.index,
            clock: &warp.clocks[lane],
            asynchronous: true,
            atomic: false,
            threads: cluster.ordinary(),
        };
        let shared = &mut cluster.blocks[here.rank].shared;
        let range = shared.data(source, bytes as usize, align)?;
        let cells = shared.cells(&range);
        if let Err(conflict) = shared.shadow.read(&access, cells) {
            return Err(self.race(here, here.rank, conflict, false));
        }
        access.component = writes;
        access.atomic = sum.is_some_and(|ty| self.any_order(ty));
        // Within a block, proxies of global memory are not told apart.
        access.threads = 0;
        self.enter_rows(here, &target, &access, Use::Write)?;
        self.statistics.bulk_stored += u64::from(bytes);
        let mut store = Store {
            group,
            source,
            target,
            sum,
            data: None,
        };
        // Read once now in any case: what is not there is found at the guilty instruction.
        let data = self.move_out(here, &store)?;
        let thread = &mut warp.bulk[thread];
        thread.last = group;
        thread.last_store = inst.index;
        if self.is_eager() {
            return write_rows(self.memory, &store.target, sum, &data);
        }
        store.data = None;
        thread.stores.push_back(store);
        Ok(())
    }

    /// Reads a tile from shared memory.
    fn move_out(&self, here: Here, store: &Store) -> Done<Vec<u8>> {
        let shared = &self.clusters[here.cluster].blocks[here.rank].shared;
        let mut data = vec![0; store.target.bytes() as usize];
        let swizzle = store.target.swizzle();
        store.target.rows(|row| {
            let from = (row.offset + row.skipped) / 16 * 16;
            let to = row.offset + row.skipped + row.len;
            for at in (from..to).step_by(16) {
                let range = shared.range(swizzle.apply(store.source + at), 16)?;
                let chunk = shared.known(range)?;
                data[at as usize..at as usize + 16].copy_from_slice(chunk);
            }
            Ok(())
        })?;
        Ok(data)
    }

    /// `cp.async.bulk.wait_group`
    pub(crate) fn bulk_wait(
        &mut self,
        here: Here,
        warp: &mut Warp,
        lanes: u32,
        pending: u32,
        read: bool,
    ) -> Done {
        let mut threads = std::mem::take(&mut warp.bulk);
        for thread in &mut threads {
            if lanes >> thread.lane & 1 == 0 {
                continue;
            }
            let until = thread.committed.saturating_sub(pending);
            for store in thread
                .stores
                .iter_mut()
                .filter(|store| store.group <= until)
            {
                if store.data.is_none() {
                    store.data = Some(self.move_out(here, store)?);
                }
            }
            thread.waited = thread.waited.max(until);
            warp.clocks[thread.lane].learn(thread.reads, until);
            if read {
                continue;
            }
            warp.clocks[thread.lane].learn(thread.writes, until);
            while let Some(store) = thread.stores.pop_front_if(|store| store.group <= until) {
                if let Some(data) = store.data {
                    write_rows(self.memory, &store.target, store.sum, &data)?;
                }
            }
        }
        warp.bulk = threads;
        Ok(())
    }

    /// Whether a warp at its end has waited for its bulk stores to have read shared memory; those
    /// that are yet to write do so when the kernel ends.
    pub(crate) fn check_bulk_left_behind(&mut self, here: Here) -> Done {
        let threads = std::mem::take(&mut self.warp(here).bulk);
        for thread in threads {
            if thread.waited < thread.last {
                let problem = format!(
                    "a bulk store may still read shared memory: it needs commit_group and \
                     wait_group.read; of {}: {}",
                    self.program.place(thread.last_store),
                    self.program.text(thread.last_store)
                );
                let mut wrong = Wrong::from(Kind::LeftBehind { problem });
                wrong.lanes = 1 << thread.lane;
                return Err(wrong);
            }
            for store in thread.stores {
                if let Some(data) = store.data {
                    let Store { target, sum, .. } = store;
                    self.captured.push(Captured { target, sum, data });
                }
            }
        }
        Ok(())
    }

    /// Performs the second half of a copy to global memory.
    pub(crate) fn write_captured(&mut self, captured: Captured) -> Done {
        write_rows(self.memory, &captured.target, captured.sum, &captured.data)
    }
}
