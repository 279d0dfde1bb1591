//! Barriers between warps: named barriers, the cluster barrier, mbarriers as warps see them, and the
//! pool of registers that `setmaxnreg` moves.
//!
//! In: arrivals and waits of warps. Out: warps that wait, warps that wake, and what they know then.

use flex_block_attn_ptx::ir::{Address, Operand, RegId, Scope};

use crate::clock::Clock;
use crate::cluster::Agent;
use crate::execute::{Flow, lanes_of};
use crate::fault::{Done, Kind, Wrong};
use crate::machine::{Here, Machine};
use crate::mbarrier::Mbarrier;
use crate::program::Decoded;
use crate::warp::{FULL, State, Warp};

/// A named barrier.
#[derive(Debug, Default)]
pub(crate) struct Named {
    /// Threads it is for, as the first of this round said; 0 between rounds.
    threads: u32,
    /// Threads that have arrived.
    arrived: u32,
    /// Whether somebody waits for this round.
    awaited: bool,
    gathered: Clock,
}

impl Named {
    /// Its state, for reports.
    pub(crate) fn describe(&self) -> String {
        format!("{} of {} threads have arrived", self.arrived, self.threads)
    }
}

impl Machine<'_> {
    /// A named barrier's id and thread count, the same for all lanes.
    pub(crate) fn barrier_operands(
        &self,
        warp: &Warp,
        id: Operand,
        threads: Operand,
    ) -> Done<(u32, u32)> {
        let ids = warp.words(self.program, id);
        let counts = warp.words(self.program, threads);
        let (id, threads) = (ids[0], counts[0]);
        let problem = if ids != [id; 32] || counts != [threads; 32] {
            "lanes name different barriers or thread counts".to_owned()
        } else if id > 15 {
            "there are 16 barriers, 0 to 15".to_owned()
        } else if threads == 0
            || !threads.is_multiple_of(32)
            || threads > self.program.kernel.threads
        {
            format!("{threads} threads: must be a multiple of 32, no more than the block has")
        } else {
            return Ok((id, threads));
        };
        Err(Kind::NamedBarrier { id, problem }.into())
    }

    /// A warp's arrival; if that completes the barrier, what all who arrived knew.
    fn arrive_named(
        &mut self,
        here: Here,
        warp: &mut Warp,
        (id, threads): (u32, u32),
        waits: bool,
    ) -> Done<Option<Clock>> {
        let cluster = &mut self.clusters[here.cluster];
        let barrier = &mut cluster.blocks[here.rank].named[id as usize];
        if barrier.threads != 0 && barrier.threads != threads {
            let problem = format!(
                "it is used for {threads} threads, while warps have arrived for {}",
                barrier.threads
            );
            return Err(Kind::NamedBarrier { id, problem }.into());
        }
        barrier.threads = threads;
        barrier.arrived += 32;
        barrier.awaited |= waits;
        barrier.gathered.join(&warp.knowledge(FULL));
        let complete = barrier.arrived >= threads;
        // The hardware would not mind, but a signal is lost: whoever waits later waits in vain, or
        // for another's sake.
        if complete && !barrier.awaited {
            let problem = format!("{threads} threads have arrived, and nobody waits for them");
            return Err(Kind::NamedBarrier { id, problem }.into());
        }
        warp.next_epoch(cluster, here, FULL);
        if !complete {
            return Ok(None);
        }
        let block = &mut self.clusters[here.cluster].blocks[here.rank];
        let clock = std::mem::take(&mut block.named[id as usize]).gathered;
        for other in &mut block.warps {
            if other.state == (State::Barrier { id }) {
                other.state = State::Ready;
                other.learn(&clock);
            }
        }
        Ok(Some(clock))
    }

    /// `bar.sync`
    pub(crate) fn barrier_sync(
        &mut self,
        here: Here,
        warp: &mut Warp,
        id: u32,
        threads: u32,
    ) -> Done<Flow> {
        let Some(clock) = self.arrive_named(here, warp, (id, threads), true)? else {
            return Ok(Flow::Wait(State::Barrier { id }));
        };
        warp.learn(&clock);
        Ok(Flow::Next)
    }

    /// `bar.arrive`
    pub(crate) fn barrier_arrive(
        &mut self,
        here: Here,
        warp: &mut Warp,
        id: u32,
        threads: u32,
    ) -> Done {
        self.arrive_named(here, warp, (id, threads), false)?;
        Ok(())
    }

    /// `barrier.cluster.arrive.release`
    pub(crate) fn cluster_arrive(&mut self, here: Here, warp: &mut Warp) -> Done {
        if warp.cluster_arrived {
            let problem = "arrived twice without waiting".to_owned();
            return Err(Kind::ClusterBarrier { problem }.into());
        }
        let cluster = &mut self.clusters[here.cluster];
        warp.cluster_arrived = true;
        warp.cluster_phase = cluster.phase;
        cluster.arrived += 1;
        cluster.gathered.join(&warp.knowledge(FULL));
        warp.next_epoch(cluster, here, FULL);
        self.cluster_barrier_advance(here.cluster);
        Ok(())
    }

    /// Ends the cluster barrier's phase if all warps that have not left have arrived.
    pub(crate) fn cluster_barrier_advance(&mut self, cluster: usize) {
        let cluster = &mut self.clusters[cluster];
        let running: usize = cluster.blocks.iter().map(|block| block.running).sum();
        if cluster.arrived == 0 || cluster.arrived < running {
            return;
        }
        cluster.arrived = 0;
        cluster.phase += 1;
        cluster.released = std::mem::take(&mut cluster.gathered);
        cluster.released.tell();
        for warp in cluster.blocks.iter_mut().flat_map(|block| &mut block.warps) {
            if warp.state == State::Cluster {
                warp.state = State::Ready;
            }
        }
    }

    /// `barrier.cluster.wait.acquire`
    pub(crate) fn cluster_wait(&mut self, here: Here, warp: &mut Warp) -> Done<Flow> {
        if !warp.cluster_arrived {
            let problem = "waits without having arrived".to_owned();
            return Err(Kind::ClusterBarrier { problem }.into());
        }
        let cluster = &self.clusters[here.cluster];
        if cluster.phase == warp.cluster_phase {
            return Ok(Flow::Again(State::Cluster));
        }
        warp.learn(&cluster.released);
        warp.cluster_arrived = false;
        Ok(Flow::Next)
    }

    /// `mbarrier.init`
    pub(crate) fn mbarrier_init(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        lanes: u32,
        (address, count): (&Address, &Operand),
    ) -> Done {
        let addresses = warp.addresses(self.program, address);
        let counts = warp.words(self.program, *count);
        for lane in lanes_of(lanes) {
            let (address, count) = (addresses[lane], counts[lane]);
            let mut one = || {
                let cluster = &mut self.clusters[here.cluster];
                let shared = &mut cluster.blocks[here.rank].shared;
                if shared.barrier(address).is_ok() {
                    let problem = "it is initialised again, without mbarrier.inval before";
                    return Err(shared.no_barrier(address, problem));
                }
                let bytes = shared.data(address, 8, 8)?;
                if count == 0 || count >= 1 << 20 {
                    return Err(shared.no_barrier(address, &format!("a count of {count}")));
                }
                let cells = shared.cells(&bytes);
                let agent = Agent::Mbarrier {
                    rank: here.rank,
                    address,
                };
                let Some(component) = cluster.new_component(agent) else {
                    let what = "so many mbarriers".to_owned();
                    return Err(Kind::Unsupported { what }.into());
                };
                let access = warp.access(cluster, here, inst, lane);
                let by = (access.component, access.epoch);
                let shared = &mut cluster.blocks[here.rank].shared;
                if let Err(conflict) = shared.shadow.write(&access, cells) {
                    return Err(self.race(here, here.rank, conflict, true));
                }
                shared.add_barrier(Mbarrier::new(address, count, component, by))
            };
            one().map_err(|wrong: Wrong| wrong.at_lane(lane))?;
        }
        Ok(())
    }

    /// `fence.mbarrier_init`: of the mbarriers that these lanes have initialised.
    pub(crate) fn mbarrier_init_fence(&mut self, here: Here, warp: &mut Warp, lanes: u32) {
        let cluster = &mut self.clusters[here.cluster];
        for lane in lanes_of(lanes) {
            let own = cluster.component(here.rank, here.warp, lane);
            for barrier in &mut cluster.blocks[here.rank].shared.barriers {
                if barrier.initialised.0 == own && barrier.fenced.is_none() {
                    barrier.fenced = Some(warp.clocks[lane].seen(own));
                }
            }
        }
        warp.next_epoch(cluster, here, lanes);
    }

    /// The mbarrier at an address of a block, which the warp must know to be initialised.
    pub(crate) fn mbarrier(
        &mut self,
        here: Here,
        clock: &Clock,
        rank: usize,
        address: u32,
    ) -> Done<&mut Mbarrier> {
        let shared = &mut self.clusters[here.cluster].blocks[rank].shared;
        let index = shared.barrier(address)?;
        let (component, epoch) = shared.barriers[index].initialised;
        if clock.seen(component) < epoch {
            let problem = "this use is not ordered after its initialisation";
            return Err(shared.no_barrier(address, problem));
        }
        Ok(&mut shared.barriers[index])
    }

    /// `mbarrier.arrive`, with bytes to expect or none; in which scope if it may be of another block.
    pub(crate) fn mbarrier_arrive(
        &mut self,
        here: Here,
        warp: &mut Warp,
        lanes: u32,
        address: &Address,
        (bytes, remote): (Option<&Operand>, Option<Scope>),
    ) -> Done {
        let addresses = warp.addresses(self.program, address);
        let bytes = bytes.map_or([0; 32], |bytes| warp.words(self.program, *bytes));
        for lane in lanes_of(lanes) {
            let mut one = || {
                let address = addresses[lane];
                let rank = match remote {
                    Some(_) => self.remote(here, address)?,
                    None => here.rank,
                };
                let far = remote.filter(|_| rank != here.rank);
                let clock = &warp.clocks[lane];
                let barrier = self.mbarrier(here, clock, rank, address)?;
                let result = barrier.arrive(clock, bytes[lane], far);
                self.after_mbarrier(here.cluster, rank, address, result)
            };
            one().map_err(|wrong: Wrong| wrong.at_lane(lane))?;
        }
        warp.next_epoch(&self.clusters[here.cluster], here, lanes);
        Ok(())
    }

    /// Wakes those who wait for an mbarrier whose phase ended; reports mistakes.
    pub(crate) fn after_mbarrier(
        &mut self,
        cluster: usize,
        rank: usize,
        address: u32,
        result: Result<bool, String>,
    ) -> Done {
        match result {
            Ok(true) => self.clusters[cluster].wake_mbarrier(rank, address),
            Ok(false) => {}
            Err(problem) => {
                let shared = &self.clusters[cluster].blocks[rank].shared;
                return Err(shared.no_barrier(address, &problem));
            }
        }
        Ok(())
    }

    /// `mbarrier.try_wait` until it is true
    pub(crate) fn mbarrier_wait(
        &mut self,
        here: Here,
        warp: &mut Warp,
        lanes: u32,
        address: &Address,
        (parity, scope): (&Operand, Scope),
    ) -> Done<Flow> {
        let addresses = warp.addresses(self.program, address);
        let parities = warp.words(self.program, *parity);
        for lane in lanes_of(lanes) {
            let (address, parity) = (addresses[lane], parities[lane]);
            let barrier = self
                .mbarrier(here, &warp.clocks[lane], here.rank, address)
                .map_err(|wrong| wrong.at_lane(lane))?;
            if !barrier.is_over(parity) {
                return Ok(Flow::Again(State::Mbarrier { address, parity }));
            }
            barrier.acquire(&mut warp.clocks[lane], scope);
        }
        Ok(Flow::Next)
    }

    /// `mbarrier.test_wait`
    pub(crate) fn mbarrier_test(
        &mut self,
        here: Here,
        warp: &mut Warp,
        lanes: u32,
        (dst, address, parity): (RegId, &Address, &Operand),
    ) -> Done<Flow> {
        let addresses = warp.addresses(self.program, address);
        let parities = warp.words(self.program, *parity);
        let mut over = 0;
        for lane in lanes_of(lanes) {
            let barrier = self
                .mbarrier(here, &warp.clocks[lane], here.rank, addresses[lane])
                .map_err(|wrong| wrong.at_lane(lane))?;
            if barrier.is_over(parities[lane]) {
                over |= 1 << lane;
                barrier.acquire(&mut warp.clocks[lane], Scope::Cta);
            }
        }
        warp.set_mask(self.program, dst, lanes, over);
        Ok(if over == lanes {
            Flow::Next
        } else {
            Flow::Vain
        })
    }

    /// `setmaxnreg`
    pub(crate) fn set_max_registers(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        increase: bool,
        count: u32,
    ) -> Done<Flow> {
        let old = warp.register_count;
        let problem = if !(24..=256).contains(&count) || !count.is_multiple_of(8) {
            Some(format!("{count} is no multiple of 8 from 24 to 256"))
        } else if increase && count < old {
            Some(format!("increase to {count}, but a thread has {old}"))
        } else if !increase && count > old {
            Some(format!("decrease to {count}, but a thread has {old}"))
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(Kind::RegisterCount { problem }.into());
        }
        let block = &mut self.clusters[here.cluster].blocks[here.rank];
        let (now, then) = (32 * count, 32 * old);
        if now > then + block.pool {
            return Ok(Flow::Again(State::Registers { wanted: now - then }));
        }
        block.pool = block.pool + then - now;
        if !increase {
            for other in &mut block.warps {
                if matches!(other.state, State::Registers { .. }) {
                    other.state = State::Ready;
                }
            }
        }
        warp.register_count = count;
        self.log_warpgroup(here, warp, inst, [u64::from(count), 0])?;
        Ok(Flow::Next)
    }
}
