//! [`Warp`]: 32 lanes, their registers, and where they are in the program.
//!
//! In: steps of control flow, values of registers. Out: the same. Lanes that take different branches
//! execute one after the other, and meet again where the structure says so; a loop ends when all
//! its lanes have left it. So a lane never waits beside its warp: a kernel in which one branch waits
//! for the other branch of the same warp deadlocks here, though not on the hardware.

use std::collections::VecDeque;

use flex_block_attn_ptx::ir::{Guard, Operand, RegId};

use crate::bulk::ThreadGroups;
use crate::clock::{Clock, Published};
use crate::execute::lanes_of;
use crate::fault::{Done, Kind};
use crate::program::{Decoded, Program, Step};
use crate::wgmma::Issued;

/// All lanes.
pub(crate) const FULL: u32 = u32::MAX;
/// Lanes of a warp.
pub(crate) const LANES: usize = 32;
/// A 32-bit value of each lane.
pub(crate) type Words = [u32; 32];
/// A 64-bit value of each lane.
pub(crate) type Wides = [u64; 32];

/// What a warp waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum State {
    /// Nothing.
    #[default]
    Ready,
    /// The named barrier `id`.
    Barrier { id: u32 },
    /// Phase `parity` of the mbarrier at `address` of its own block.
    Mbarrier { address: u32, parity: u32 },
    /// The cluster barrier.
    Cluster,
    /// Registers of its block's pool.
    Registers { wanted: u32 },
    /// It is at its end.
    Done,
}

#[derive(Debug, Clone, Copy)]
enum Frame {
    /// Lanes that take the other branch later, and lanes that took the first one.
    If { rest: u32, joined: u32, otherwise: u32, end: u32 },
    /// Lanes that left the loop.
    Loop { id: u32, left: u32, end: u32 },
}

/// How far a register's uses by wgmma and by others go: numbers of groups and of fences.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Track {
    /// The group of the last wgmma that has it as an accumulator.
    pub(crate) accumulated: u32,
    /// The group of the last wgmma that reads it as A.
    pub(crate) read_as_a: u32,
    /// Fences passed when another instruction last wrote it (or, of accumulators, read it).
    pub(crate) used: u32,
    /// Columns of the last wgmma that had it as an accumulator.
    pub(crate) shape: u32,
    /// Fences passed when that one was issued.
    pub(crate) multiplied: u32,
}

/// A warp.
#[derive(Debug, Default)]
pub(crate) struct Warp {
    /// Its index in the block.
    pub(crate) index: usize,
    pub(crate) state: State,
    pub(crate) step: usize,
    pub(crate) active: u32,
    frames: Vec<Frame>,
    rows: Vec<Words>,
    /// By register: lanes that were written.
    known: Vec<u32>,
    pub(crate) tracks: Vec<Track>,
    /// What each lane knows: lanes are threads, and know of each other only what they have synced.
    pub(crate) clocks: [Clock; LANES],
    /// What a device-scope fence made ready to be published by a later relaxed atomic.
    pub(crate) fenced: Option<Vec<Published>>,
    /// What relaxed reads saw published, to be acquired by a later fence.
    pub(crate) glimpsed: Vec<Published>,
    /// Registers of each of its threads.
    pub(crate) register_count: u32,
    /// Times it arrived at the cluster barrier; whether it has yet to wait.
    pub(crate) cluster_phase: u64,
    pub(crate) cluster_arrived: bool,
    /// `wgmma.fence`s passed; 0 before the first.
    pub(crate) fences: u32,
    /// wgmma groups committed, and completed.
    pub(crate) committed: u32,
    pub(crate) completed: u32,
    /// Whether wgmmas have been issued since the last commit.
    pub(crate) open: bool,
    /// wgmmas not yet performed.
    pub(crate) issued: VecDeque<Issued>,
    /// Warpgroup instructions passed.
    pub(crate) warpgroup_steps: u64,
    /// Bulk stores, by thread; empty for threads that have none.
    pub(crate) bulk: Vec<ThreadGroups>,
    /// Instructions executed.
    pub(crate) count: u64,
    /// Lanes for which the launches before are over.
    pub(crate) alone: u32,
}

impl Warp {
    /// A warp at a program's first step.
    pub(crate) fn new(program: &Program, index: usize, register_count: u32) -> Self {
        let registers = program.kernel.registers.len();
        Self {
            index,
            active: FULL,
            rows: vec![[0; 32]; program.row_count],
            known: vec![0; registers],
            tracks: vec![Track::default(); registers],
            register_count,
            alone: if program.early { 0 } else { FULL },
            ..Self::default()
        }
    }

    /// What some of its lanes know together.
    pub(crate) fn knowledge(&self, lanes: u32) -> Clock {
        let mut all = Clock::default();
        for lane in lanes_of(lanes) {
            all.join(&self.clocks[lane]);
        }
        all
    }

    /// All lanes learn what each knows.
    pub(crate) fn sync(&mut self) {
        self.learn(&self.knowledge(FULL));
    }

    /// All lanes learn what somebody knows.
    pub(crate) fn learn(&mut self, clock: &Clock) {
        for own in &mut self.clocks {
            own.join(clock);
        }
    }

    /// The values of a 32-bit or 16-bit operand.
    pub(crate) fn words(&self, program: &Program, operand: Operand) -> Words {
        match operand {
            Operand::Reg(register) => self.rows[program.rows[register.0 as usize] as usize],
            Operand::Imm(bits) => [bits as u32; 32],
        }
    }

    /// The values of a 64-bit operand.
    pub(crate) fn wides(&self, program: &Program, operand: Operand) -> Wides {
        match operand {
            Operand::Reg(register) => {
                let row = program.rows[register.0 as usize] as usize;
                let (low, high) = (&self.rows[row], &self.rows[row + 1]);
                std::array::from_fn(|lane| u64::from(low[lane]) | u64::from(high[lane]) << 32)
            }
            Operand::Imm(bits) => [bits; 32],
        }
    }

    /// The lanes for which a predicate holds.
    pub(crate) fn mask(&self, program: &Program, operand: Operand) -> u32 {
        match operand {
            Operand::Reg(register) => self.rows[program.rows[register.0 as usize] as usize][0],
            Operand::Imm(bits) => {
                if bits != 0 {
                    FULL
                } else {
                    0
                }
            }
        }
    }

    /// Writes a 32-bit or 16-bit register of some lanes.
    pub(crate) fn set(&mut self, program: &Program, dst: RegId, lanes: u32, values: &Words) {
        let row = &mut self.rows[program.rows[dst.0 as usize] as usize];
        if lanes == FULL {
            *row = *values;
        } else {
            for (lane, (to, &value)) in row.iter_mut().zip(values).enumerate() {
                if lanes >> lane & 1 != 0 {
                    *to = value;
                }
            }
        }
        self.known[dst.0 as usize] |= lanes;
    }

    /// Writes a 64-bit register of some lanes.
    pub(crate) fn set_wide(&mut self, program: &Program, dst: RegId, lanes: u32, values: &Wides) {
        let row = program.rows[dst.0 as usize] as usize;
        for (lane, &value) in values.iter().enumerate() {
            if lanes >> lane & 1 != 0 {
                self.rows[row][lane] = value as u32;
                self.rows[row + 1][lane] = (value >> 32) as u32;
            }
        }
        self.known[dst.0 as usize] |= lanes;
    }

    /// Writes a predicate of some lanes.
    pub(crate) fn set_mask(&mut self, program: &Program, dst: RegId, lanes: u32, mask: u32) {
        let row = &mut self.rows[program.rows[dst.0 as usize] as usize][0];
        *row = *row & !lanes | mask & lanes;
        self.known[dst.0 as usize] |= lanes;
    }

    /// A 32-bit register's row, for the matrix unit.
    pub(crate) fn row(&self, program: &Program, register: RegId) -> &Words {
        &self.rows[program.rows[register.0 as usize] as usize]
    }

    /// Likewise, to be written in all lanes.
    pub(crate) fn row_mut(&mut self, program: &Program, register: RegId) -> &mut Words {
        self.known[register.0 as usize] = FULL;
        &mut self.rows[program.rows[register.0 as usize] as usize]
    }

    /// Whether a register was written in all of `lanes`.
    pub(crate) fn is_known(&self, register: RegId, lanes: u32) -> bool {
        self.known[register.0 as usize] & lanes == lanes
    }

    /// The active lanes for which a guard holds.
    pub(crate) fn guarded(&self, program: &Program, guard: Option<Guard>) -> Done<u32> {
        let Some(guard) = guard else {
            return Ok(self.active);
        };
        if !self.is_known(guard.pred, self.active) {
            return Err(Kind::UninitialisedRegister {
                register: program.name(guard.pred),
            }
            .into());
        }
        let mask = self.mask(program, Operand::Reg(guard.pred));
        Ok(self.active & if guard.negated { !mask } else { mask })
    }

    /// Checks an instruction's registers before it is executed by `lanes`.
    pub(crate) fn check(&mut self, program: &Program, inst: &Decoded, lanes: u32) -> Done {
        let (fences, completed) = (self.fences, self.completed);
        for &register in program.reads(inst) {
            let index = register.0 as usize;
            if self.known[index] & lanes != lanes {
                return Err(Kind::UninitialisedRegister {
                    register: program.name(register),
                }
                .into());
            }
            let track = &mut self.tracks[index];
            if track.accumulated != 0 {
                if track.accumulated > completed {
                    return Err(Kind::AccumulatorInFlight {
                        register: program.name(register),
                    }
                    .into());
                }
                track.used = fences + 1;
            }
        }
        for &register in program.writes(inst) {
            let track = &mut self.tracks[register.0 as usize];
            if track.accumulated > completed {
                return Err(Kind::AccumulatorInFlight {
                    register: program.name(register),
                }
                .into());
            }
            if track.read_as_a > completed {
                return Err(Kind::OperandInFlight {
                    register: program.name(register),
                }
                .into());
            }
            track.used = fences + 1;
        }
        Ok(())
    }

    /// Executes a step that is not an instruction; returns whether the warp is at its end.
    pub(crate) fn flow(&mut self, program: &Program, step: Step) -> Done<bool> {
        self.step += 1;
        match step {
            Step::Inst(_) => unreachable!("instructions are executed elsewhere"),
            Step::If { cond, otherwise } => {
                let taken = self.guarded(program, Some(cond))?;
                let Step::Else { end } = program.steps[otherwise as usize] else {
                    unreachable!("an If names its Else");
                };
                let rest = self.active & !taken;
                self.frames.push(Frame::If {
                    rest,
                    joined: 0,
                    otherwise,
                    end,
                });
                self.active = taken;
            }
            Step::Else { end } => {
                let Some(Frame::If { rest, joined, .. }) = self.frames.last_mut() else {
                    unreachable!("an Else stands in an If");
                };
                *joined |= self.active;
                self.active = std::mem::take(rest);
                if self.active == 0 {
                    self.step = end as usize;
                    return Ok(false);
                }
            }
            Step::EndIf => {
                let Some(Frame::If { joined, .. }) = self.frames.pop() else {
                    unreachable!("an EndIf ends an If");
                };
                self.active |= joined;
            }
            Step::Loop { id, end } => self.frames.push(Frame::Loop { id, left: 0, end }),
            Step::EndLoop { start } => {
                if self.active != 0 {
                    self.step = start as usize + 1;
                } else if let Some(Frame::Loop { left, .. }) = self.frames.pop() {
                    self.active = left;
                }
            }
            Step::Break { id, cond } => {
                let leaving = self.guarded(program, cond)?;
                self.active &= !leaving;
                for frame in self.frames.iter_mut().rev() {
                    if let Frame::Loop {
                        id: other, left, ..
                    } = frame
                        && *other == id
                    {
                        *left |= leaving;
                        break;
                    }
                }
            }
            Step::Exit => return Ok(true),
        }
        // Nobody is left here: go on where the innermost structure says.
        if self.active == 0 {
            self.step = match self.frames.last() {
                Some(Frame::If {
                    rest, otherwise, ..
                }) if *rest != 0 => *otherwise as usize,
                Some(Frame::If { end, .. } | Frame::Loop { end, .. }) => *end as usize,
                None => program.steps.len() - 1,
            };
        }
        Ok(false)
    }
}
