//! [`emulate`]: runs a launch to its end or to its first fault; the scheduler.
//!
//! In: a kernel, its launch record, memory, options. Out: statistics, or the fault. Which
//! instruction does what is `execute`'s business.

use flex_block_attn_ptx::ir::{Kernel, Op, Space};
use flex_block_attn_ptx::{Arg, Launch, Ty};

use crate::bulk::{Captured, Load};
use crate::cluster::Cluster;
use crate::execute::Flow;
use crate::fault::{Done, Fault, Kind, Waiting, Wrong};
use crate::global::Ledger;
use crate::memory::Memory;
use crate::options::{Chance, Completion, Options, Schedule, Statistics};
use crate::program::{Program, Step};
use crate::shadow::{MAX_COMPONENTS, MAX_INSTRUCTIONS};
use crate::warp::{FULL, State, Warp};
use crate::wgmma::Scratch;

/// Steps of a warp's turn, when each has its turn.
const TURN: usize = 64;
/// Looks in vain (`mbarrier.test_wait` and its kin) between two copies' completions: a kernel that
/// polls always moves, so copies cannot wait until none does.
const PATIENCE: u64 = 256;
/// Looks in vain, with no copy under way and nobody telling anybody anything, before a kernel is given
/// up.
const LONGEST_PATIENCE: u64 = 1 << 16;

/// A warp's place: its cluster among those resident, its block there, its index.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Here {
    pub(crate) cluster: usize,
    pub(crate) rank: usize,
    pub(crate) warp: usize,
}

/// A launch that is being run.
pub(crate) struct Machine<'m> {
    pub(crate) program: &'m Program<'m>,
    pub(crate) launch: &'m Launch,
    pub(crate) memory: &'m mut Memory,
    pub(crate) options: &'m Options,
    pub(crate) ledger: Ledger,
    /// Those resident.
    pub(crate) clusters: Vec<Cluster>,
    /// Copies to shared memory under way.
    pub(crate) loads: Vec<Load>,
    /// Copies to global memory that have read shared memory, and not yet written.
    pub(crate) captured: Vec<Captured>,
    pub(crate) chance: Chance,
    pub(crate) statistics: Statistics,
    /// Instructions executed.
    pub(crate) count: u64,
    /// Looks in vain since the last progress.
    pub(crate) vain: u64,
    pub(crate) scratch: Scratch,
    started: u32,
    clusters_in_grid: u32,
}

/// Runs a launch of a kernel on emulated memory.
///
/// # Errors
/// The first fault. The memory is then in the state in which the fault found it.
pub fn emulate(
    kernel: &Kernel,
    launch: &Launch,
    memory: &mut Memory,
    options: &Options,
) -> Result<Statistics, Box<Fault>> {
    if let Err(reason) = fits(kernel, launch) {
        return Err(Box::new(Fault {
            kernel: kernel.name.clone(),
            kind: Kind::Launch { reason },
            instruction: "the launch".to_owned(),
            at: "its record".to_owned(),
            block: [0; 3],
            warp: 0,
            lanes: 0,
        }));
    }
    let program = Program::new(kernel);
    let ledger = Ledger::new(memory, program.global_cell);
    let seed = match options.schedule {
        Schedule::RoundRobin => 0,
        Schedule::Random(seed) => seed,
    };
    let warpgroups = (kernel.threads as usize).div_ceil(128);
    let mut machine = Machine {
        program: &program,
        launch,
        memory,
        options,
        ledger,
        clusters: Vec::new(),
        loads: Vec::new(),
        captured: Vec::new(),
        chance: Chance::new(seed),
        statistics: Statistics {
            instructions: vec![0; warpgroups],
            ..Statistics::default()
        },
        count: 0,
        vain: 0,
        scratch: Scratch::default(),
        started: 0,
        clusters_in_grid: launch.grid.iter().product::<u32>() / kernel.cluster,
    };
    machine.run()?;
    Ok(machine.statistics)
}

/// Whether a launch fits a kernel; if not, why.
fn fits(kernel: &Kernel, launch: &Launch) -> Result<(), String> {
    let check =
        |holds: bool, reason: &dyn Fn() -> String| if holds { Ok(()) } else { Err(reason()) };
    let threads = kernel.threads;
    check(
        (32..=1024).contains(&threads) && threads.is_multiple_of(32),
        &|| format!("{threads} threads are no positive multiple of 32 up to 1024"),
    )?;
    check((1..=16).contains(&kernel.cluster), &|| {
        format!("a cluster of {}", kernel.cluster)
    })?;
    // Threads, and each warp's products, are told apart.
    let components = (threads + threads / 32) * kernel.cluster;
    check(components as usize <= MAX_COMPONENTS, &|| {
        format!(
            "clusters of {} x {threads} threads: too many to tell apart",
            kernel.cluster
        )
    })?;
    check(kernel.shared_bytes <= 232_448, &|| {
        format!(
            "{} bytes of shared memory, 232448 at most",
            kernel.shared_bytes
        )
    })?;
    kernel
        .entry()
        .check(launch)
        .map_err(|error| error.problem)?;
    for arg in &launch.args {
        if let Arg::TensorMap(map) = arg {
            crate::tile::check(map)?;
        }
    }
    Ok(())
}

/// Whether an instruction has to do with global memory.
fn is_global(op: &Op) -> bool {
    match op {
        Op::Load { space, .. }
        | Op::Store { space, .. }
        | Op::Atomic { space, .. }
        | Op::Reduce { space, .. } => *space == Space::Global,
        _ => matches!(
            op,
            Op::LoadAcquire { .. }
                | Op::StoreRelease { .. }
                | Op::TmaLoad { .. }
                | Op::TmaStore { .. }
                | Op::TmaReduceAdd { .. }
                | Op::BulkLoad { .. }
                | Op::BulkStore { .. }
                | Op::BulkReduceAdd { .. }
        ),
    }
}

/// Whether an instruction may be what another warp looks for.
fn tells(op: &Op) -> bool {
    matches!(
        op,
        Op::Store { .. }
            | Op::StoreRelease { .. }
            | Op::StoreMatrix { .. }
            | Op::Atomic { .. }
            | Op::Reduce { .. }
            | Op::MbarrierArrive { .. }
            | Op::MbarrierArriveExpect { .. }
            | Op::BarrierSync { .. }
            | Op::BarrierArrive { .. }
            | Op::ClusterArrive
            | Op::BulkWait { .. }
    )
}

impl<'m> Machine<'m> {
    fn run(&mut self) -> Result<(), Box<Fault>> {
        if self.program.instructions.len() > MAX_INSTRUCTIONS {
            let kind = Kind::Unsupported {
                what: "so long a kernel".to_owned(),
            };
            return Err(self.fault(kind.into(), None));
        }
        let resident = (self.options.resident as u32 / self.program.kernel.cluster).max(1);
        while self.clusters.len() < resident as usize && self.start() {}
        loop {
            let moved = match self.options.schedule {
                Schedule::RoundRobin => self.each_in_turn()?,
                Schedule::Random(_) => self.by_chance()?,
            };
            if moved || self.complete_a_load()? {
                continue;
            }
            if self.clusters.is_empty() {
                break;
            }
            let waiting = self.waiting();
            return Err(self.fault(Kind::Deadlock { waiting }.into(), None));
        }
        while let Some(captured) = self.captured.pop() {
            self.write_captured(captured)
                .map_err(|wrong| self.fault(wrong, None))?;
        }
        Ok(())
    }

    /// Starts the next cluster of the grid, if there is one.
    fn start(&mut self) -> bool {
        if self.started == self.clusters_in_grid {
            return false;
        }
        self.clusters
            .push(Cluster::new(self.program, self.launch, self.started));
        self.started += 1;
        self.statistics.blocks += u64::from(self.program.kernel.cluster);
        true
    }

    fn each_in_turn(&mut self) -> Result<bool, Box<Fault>> {
        let mut moved = false;
        let mut cluster = 0;
        while cluster < self.clusters.len() {
            for rank in 0..self.clusters[cluster].blocks.len() {
                for warp in 0..self.clusters[cluster].blocks[rank].warps.len() {
                    let here = Here {
                        cluster,
                        rank,
                        warp,
                    };
                    if self.warp(here).state == State::Ready {
                        self.turn(here, TURN)?;
                        moved = true;
                    }
                }
            }
            if !self.retire(cluster)? {
                cluster += 1;
            }
        }
        Ok(moved)
    }

    /// One period in which all but one warp get turns by chance.
    fn by_chance(&mut self) -> Result<bool, Box<Fault>> {
        let mut ready = Vec::new();
        for (cluster, blocks) in self.clusters.iter().enumerate() {
            for (rank, block) in blocks.blocks.iter().enumerate() {
                for (warp, state) in block.warps.iter().enumerate() {
                    if state.state == State::Ready {
                        ready.push(Here {
                            cluster,
                            rank,
                            warp,
                        });
                    }
                }
            }
        }
        if ready.is_empty() {
            return Ok(false);
        }
        if ready.len() > 1 && self.chance.below(4) == 0 {
            let starved = self.chance.below(ready.len());
            ready.swap_remove(starved);
        }
        for _ in 0..2 * ready.len() {
            let here = ready[self.chance.below(ready.len())];
            if self.warp(here).state == State::Ready {
                let most = [1, 8, 64, 512][self.chance.below(4)];
                let steps = 1 + self.chance.below(most);
                self.turn(here, steps)?;
            }
            if !self.loads.is_empty() && self.chance.below(16) == 0 {
                self.complete_a_load()?;
            }
        }
        for cluster in (0..self.clusters.len()).rev() {
            self.retire(cluster)?;
        }
        Ok(true)
    }

    pub(crate) fn warp(&mut self, here: Here) -> &mut Warp {
        &mut self.clusters[here.cluster].blocks[here.rank].warps[here.warp]
    }

    /// Lets a warp go on for some steps, or until it waits.
    fn turn(&mut self, here: Here, steps: usize) -> Result<(), Box<Fault>> {
        let mut warp = std::mem::take(self.warp(here));
        let result = self.go_on(here, &mut warp, steps);
        let lanes = warp.active;
        *self.warp(here) = warp;
        let end = match result {
            Ok(end) => end,
            Err(mut wrong) => {
                if wrong.lanes == 0 {
                    wrong.lanes = lanes;
                }
                return Err(self.fault(wrong, Some(here)));
            }
        };
        if end {
            self.leave(here)
                .map_err(|wrong| self.fault(wrong, Some(here)))?;
        }
        Ok(())
    }

    /// Whether the warp came to its end.
    fn go_on(&mut self, here: Here, warp: &mut Warp, steps: usize) -> Done<bool> {
        let program = self.program;
        for _ in 0..steps {
            let step = program.steps[warp.step];
            let Step::Inst(index) = step else {
                if warp.flow(program, step)? {
                    return Ok(true);
                }
                continue;
            };
            let inst = &program.instructions[index as usize];
            let lanes = warp.guarded(program, inst.inst.guard)?;
            if lanes == 0 {
                warp.step += 1;
                continue;
            }
            if inst.together && lanes != FULL {
                return Err(Kind::Divergence { active: lanes }.into());
            }
            let early = lanes & !warp.alone;
            if early != 0 && is_global(&inst.inst.op) {
                let what = "global memory is used";
                let mut wrong = Wrong::from(Kind::Early { what });
                wrong.lanes = early;
                return Err(wrong);
            }
            self.count += 1;
            warp.count += 1;
            if self.count > self.options.limit {
                return Err(Kind::Limit {
                    limit: self.options.limit,
                }
                .into());
            }
            if !matches!(inst.inst.op, Op::Wgmma { .. }) {
                warp.check(program, inst, lanes)?;
            }
            if self.vain > 0 && tells(&inst.inst.op) {
                self.vain = 0;
            }
            match self.execute(here, warp, inst, lanes)? {
                Flow::Next => warp.step += 1,
                Flow::Again(state) => {
                    warp.state = state;
                    break;
                }
                Flow::Wait(state) => {
                    warp.step += 1;
                    warp.state = state;
                    break;
                }
                Flow::Vain => {
                    warp.step += 1;
                    self.vain += 1;
                    if self.vain.is_multiple_of(PATIENCE) && self.complete_a_load_quietly()? {
                        self.vain = 0;
                    }
                    if self.vain > LONGEST_PATIENCE {
                        return Err(Kind::Deadlock {
                            waiting: self.waiting(),
                        }
                        .into());
                    }
                    break;
                }
            }
        }
        Ok(false)
    }

    /// A warp is at its end.
    fn leave(&mut self, here: Here) -> Done {
        self.check_left_behind(here)?;
        let warp = self.warp(here);
        if warp.alone != FULL {
            // Who waits for this launch relies on it for those before.
            let what = "a thread ends";
            let mut wrong = Wrong::from(Kind::Early { what });
            wrong.lanes = !warp.alone;
            return Err(wrong);
        }
        warp.state = State::Done;
        let count = warp.count;
        self.statistics.instructions[here.warp / 4] += count;
        let cluster = &mut self.clusters[here.cluster];
        cluster.blocks[here.rank].running -= 1;
        self.cluster_barrier_advance(here.cluster);
        let block = &self.clusters[here.cluster].blocks[here.rank];
        if block.running > 0 {
            return Ok(());
        }
        for log in &block.logs {
            log.check_end()?;
        }
        if let Some(load) = self
            .loads
            .iter()
            .find(|load| load.concerns(here.cluster, here.rank))
        {
            let (text, place) = (
                self.program.text(load.instruction),
                self.program.place(load.instruction),
            );
            let problem =
                format!("a copy to the block's shared memory is under way, of {place}: {text}");
            return Err(Kind::LeftBehind { problem }.into());
        }
        for barrier in &block.shared.barriers {
            let place = block.shared.place(barrier.address);
            let problem = match barrier.describe() {
                _ if barrier.invalid => continue,
                state if barrier.bytes != 0 => format!("mbarrier at {place}: {state}"),
                _ if barrier.copied > barrier.acquired => {
                    format!("nobody waited for the last copies on the mbarrier at {place}")
                }
                _ => continue,
            };
            return Err(Kind::LeftBehind { problem }.into());
        }
        Ok(())
    }

    /// What a warp leaves undone at its end.
    fn check_left_behind(&mut self, here: Here) -> Done {
        let warp = self.warp(here);
        if warp.open || warp.completed != warp.committed {
            let problem = "wgmmas were not waited for".to_owned();
            return Err(Kind::LeftBehind { problem }.into());
        }
        if warp.cluster_arrived {
            let problem = "arrived at the cluster barrier without waiting".to_owned();
            return Err(Kind::ClusterBarrier { problem }.into());
        }
        self.check_bulk_left_behind(here)
    }

    /// Takes a cluster that is over out, and starts another; whether it was over.
    fn retire(&mut self, cluster: usize) -> Result<bool, Box<Fault>> {
        if !self.clusters[cluster].is_over() {
            return Ok(false);
        }
        self.clusters.remove(cluster);
        for load in &mut self.loads {
            load.cluster_removed(cluster);
        }
        self.start();
        Ok(true)
    }

    /// Performs a pending copy to shared memory, if there is one.
    fn complete_a_load(&mut self) -> Result<bool, Box<Fault>> {
        self.complete_a_load_quietly()
            .map_err(|wrong| self.fault(wrong, None))
    }

    fn complete_a_load_quietly(&mut self) -> Done<bool> {
        if self.loads.is_empty() {
            return Ok(false);
        }
        let index = match self.options.schedule {
            Schedule::RoundRobin => 0,
            Schedule::Random(_) => self.chance.below(self.loads.len()),
        };
        let load = self.loads.remove(index);
        self.perform_load(load)?;
        Ok(true)
    }

    /// Whether sums of this type may come in any order.
    pub(crate) fn any_order(&self, ty: Ty) -> bool {
        let rounded = matches!(ty, Ty::F32 | Ty::Bf16x2 | Ty::F16x2);
        !(rounded && self.options.ordered_sums)
    }

    /// Whether asynchronous operations are performed when they are issued.
    pub(crate) fn is_eager(&self) -> bool {
        self.options.mode == Completion::Earliest
    }

    /// A fault of a warp, or of nobody in particular.
    fn fault(&mut self, wrong: Wrong, here: Option<Here>) -> Box<Fault> {
        let program = self.program;
        let (mut instruction, mut at) = ("the end of the run".to_owned(), "no place".to_owned());
        let (mut block, mut index) = ([0; 3], 0);
        if let Some(here) = here {
            let step = self.warp(here).step.min(program.steps.len() - 1);
            (instruction, at) = program.describe(step);
            block = self.clusters[here.cluster].blocks[here.rank].index;
            index = here.warp as u32;
        }
        if let Kind::Deadlock { waiting } = &*wrong.kind
            && let Some(first) = waiting.first()
        {
            (instruction, at) = (first.instruction.clone(), first.at.clone());
            (block, index) = (first.block, first.warps[0]);
        }
        if let Some((origin, origin_block, warp)) = wrong.origin {
            (instruction, at) = (program.text(origin), program.place(origin));
            (block, index) = (origin_block, warp);
        }
        Box::new(Fault {
            kernel: program.kernel.name.clone(),
            kind: *wrong.kind,
            instruction,
            at,
            block,
            warp: index,
            lanes: wrong.lanes,
        })
    }

    /// Who waits for what.
    fn waiting(&self) -> Vec<Waiting> {
        let mut waiting: Vec<Waiting> = Vec::new();
        for cluster in &self.clusters {
            for block in &cluster.blocks {
                for warp in &block.warps {
                    let what = match warp.state {
                        State::Ready | State::Done => continue,
                        State::Barrier { id } => {
                            format!("barrier {id}: {}", block.named[id as usize].describe())
                        }
                        State::Mbarrier { address, parity } => {
                            let place = block.shared.place(address);
                            let state = match block.shared.barrier(address) {
                                Ok(index) => block.shared.barriers[index].describe(),
                                Err(_) => "there is none".to_owned(),
                            };
                            format!("parity {parity} of the mbarrier at {place}: {state}")
                        }
                        State::Cluster => format!(
                            "the cluster barrier: {} warps have arrived in phase {}",
                            cluster.arrived, cluster.phase
                        ),
                        State::Registers { wanted } => format!(
                            "registers: {wanted} for the warp, {} are free in its block",
                            block.pool
                        ),
                    };
                    // A warp at a named barrier stands behind its instruction.
                    let step = match warp.state {
                        State::Barrier { .. } => warp.step - 1,
                        _ => warp.step,
                    };
                    let (instruction, at) = self.program.describe(step);
                    let index = warp.index as u32;
                    let same =
                        |w: &&mut Waiting| w.block == block.index && w.what == what && w.at == at;
                    match waiting.iter_mut().find(same) {
                        Some(known) => known.warps.push(index),
                        None => waiting.push(Waiting {
                            block: block.index,
                            warps: vec![index],
                            what,
                            instruction,
                            at,
                        }),
                    }
                }
            }
        }
        waiting
    }
}
