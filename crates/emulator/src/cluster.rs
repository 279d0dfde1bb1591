//! [`Cluster`]: thread blocks that run together, their warps, barriers and shared memory.
//!
//! In: a launch and the cluster's place in its grid, from the scheduler. Out: state that the units
//! (arithmetic apart) work on; who is meant by a component of clocks.

use flex_block_attn_ptx::Launch;

use crate::barrier::Named;
use crate::clock::{Clock, Component};
use crate::program::Program;
use crate::shadow::MAX_COMPONENTS;
use crate::shared::{RANK_SHIFT, Shared};
use crate::warp::{LANES, State, Warp};
use crate::wgmma::Log;

/// Registers of a multiprocessor.
const REGISTERS: u32 = 65536;

/// A thread block.
#[derive(Debug)]
pub(crate) struct Block {
    /// Its index in the grid, and that as one number.
    pub(crate) index: [u32; 3],
    pub(crate) number: u32,
    pub(crate) shared: Shared,
    pub(crate) warps: Vec<Warp>,
    pub(crate) named: [Named; 16],
    /// Registers that warps have given back.
    pub(crate) pool: u32,
    /// By warpgroup.
    pub(crate) logs: Vec<Log>,
    /// Warps not at their end.
    pub(crate) running: usize,
}

/// Whom a component of clocks stands for, beyond the warps.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Agent {
    /// Copies that complete on an mbarrier of a block of this rank.
    Mbarrier { rank: usize, address: u32 },
    /// Bulk stores of a lane of a warp.
    Bulk { rank: usize, warp: usize, lane: usize },
}

/// Blocks that run together.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) blocks: Vec<Block>,
    /// Components of clocks beyond the warps' (see `clock`).
    agents: Vec<Agent>,
    /// Warps that have arrived at the cluster barrier in this phase.
    pub(crate) arrived: usize,
    /// Phases of the cluster barrier that are over.
    pub(crate) phase: u64,
    pub(crate) gathered: Clock,
    pub(crate) released: Clock,
}

/// Registers of each thread at the start of a kernel that changes them: what ptxas gives to one of
/// `threads`, `blocks` of which are to fit a multiprocessor.
pub(crate) fn launch_registers(threads: u32, blocks: u32) -> u32 {
    (REGISTERS / (threads * blocks.max(1)) / 8 * 8).min(256)
}

impl Cluster {
    /// Cluster `number` of a launch.
    pub(crate) fn new(program: &Program, launch: &Launch, number: u32) -> Self {
        let kernel = program.kernel;
        let along_x = launch.grid[0] / kernel.cluster;
        let warps = kernel.threads as usize / 32;
        let registers = launch_registers(kernel.threads, kernel.min_blocks);
        let blocks = (0..kernel.cluster)
            .map(|rank| {
                let x = number % along_x * kernel.cluster + rank;
                let y = number / along_x % launch.grid[1];
                let z = number / along_x / launch.grid[1];
                let index = [x, y, z];
                let bytes = kernel.shared_bytes as usize;
                let of = (rank, kernel.cluster);
                let shared = Shared::new(index, of, kernel.threads, bytes, program.shared_cell);
                Block {
                    index,
                    number: (z * launch.grid[1] + y) * launch.grid[0] + x,
                    shared,
                    warps: (0..warps)
                        .map(|warp| Warp::new(program, warp, registers))
                        .collect(),
                    named: Default::default(),
                    pool: 0,
                    logs: (0..warps.div_ceil(4)).map(|_| Log::default()).collect(),
                    running: warps,
                }
            })
            .collect();
        let mut cluster = Self {
            blocks,
            agents: Vec::new(),
            arrived: 0,
            phase: 0,
            gathered: Clock::default(),
            released: Clock::default(),
        };
        for rank in 0..kernel.cluster as usize {
            for warp in 0..warps {
                for lane in 0..LANES {
                    let component = cluster.component(rank, warp, lane);
                    cluster.blocks[rank].warps[warp].clocks[lane].learn(component, 1);
                }
            }
        }
        cluster
    }

    fn warps_per_block(&self) -> usize {
        self.blocks[0].warps.len()
    }

    /// All warps.
    fn warp_count(&self) -> usize {
        self.blocks.len() * self.warps_per_block()
    }

    /// Components of ordinary accesses: they are the first.
    pub(crate) fn ordinary(&self) -> Component {
        (LANES * self.warp_count()) as Component
    }

    /// The component of a lane's ordinary accesses.
    pub(crate) fn component(&self, rank: usize, warp: usize, lane: usize) -> Component {
        (LANES * (rank * self.warps_per_block() + warp) + lane) as Component
    }

    /// The component of a warp's wgmma groups.
    pub(crate) fn wgmma_component(&self, rank: usize, warp: usize) -> Component {
        self.ordinary() + (rank * self.warps_per_block() + warp) as Component
    }

    /// A new component, or none if there are too many.
    pub(crate) fn new_component(&mut self, agent: Agent) -> Option<Component> {
        let component = (LANES + 1) * self.warp_count() + self.agents.len();
        self.agents.push(agent);
        (component < MAX_COMPONENTS).then_some(component as Component)
    }

    /// Who is meant by a component, for reports.
    pub(crate) fn describe(&self, component: Component) -> String {
        let (warps, component) = (self.warp_count(), usize::from(component));
        let warp = |i: usize| {
            let (rank, warp) = (i / self.warps_per_block(), i % self.warps_per_block());
            format!("warp {warp} of block {:?}", self.blocks[rank].index)
        };
        match component {
            _ if component < LANES * warps => {
                let lane = component % LANES;
                format!("lane {lane} of {}", warp(component / LANES))
            }
            _ if component < (LANES + 1) * warps => {
                format!("wgmma of {}", warp(component - LANES * warps))
            }
            _ => match self.agents.get(component - (LANES + 1) * warps) {
                Some(Agent::Mbarrier { rank, address }) => {
                    let place = self.blocks[*rank].shared.place(*address);
                    format!("a bulk copy on the mbarrier at {place}")
                }
                Some(Agent::Bulk { rank, warp, lane }) => format!(
                    "a bulk store of warp {warp}, lane {lane} of block {:?}",
                    self.blocks[*rank].index
                ),
                None => "an unknown agent".to_owned(),
            },
        }
    }

    /// The rank of the block that a shared::cluster address names, seen from `rank`.
    pub(crate) fn resolve(&self, rank: usize, address: u32) -> usize {
        match (address >> RANK_SHIFT) as usize {
            other if other < self.blocks.len() => other,
            // No such block: out of bounds anywhere.
            _ => rank,
        }
    }

    /// Lets warps that wait for an mbarrier of a block look again.
    pub(crate) fn wake_mbarrier(&mut self, rank: usize, barrier: u32) {
        for warp in &mut self.blocks[rank].warps {
            if matches!(warp.state, State::Mbarrier { address, .. } if address == barrier) {
                warp.state = State::Ready;
            }
        }
    }

    /// Whether all is over.
    pub(crate) fn is_over(&self) -> bool {
        self.blocks.iter().all(|block| block.running == 0)
    }
}
