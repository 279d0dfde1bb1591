//! [`Program`]: a kernel's structured body as one list of steps, decoded once for a launch.
//!
//! In: a kernel. Out: steps, for the warps; for each instruction the registers it reads and writes
//! and whether all lanes must execute it together; the granularity that race checks need; the text
//! and place of each step, for reports.

use flex_block_attn_ptx::ir::{
    Block, Guard, Inst, Kernel, MatrixA, Node, Op, Operand, RegId, Space,
};
use flex_block_attn_ptx::operands::Use;
use flex_block_attn_ptx::{Class, Ty, print};
use std::ops::Range;
use std::panic::Location;

/// A step. Numbers are indices of steps.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// An instruction, by its index.
    Inst(u32),
    /// Lanes for which the guard does not hold go on at `otherwise`, an [`Step::Else`].
    If { cond: Guard, otherwise: u32 },
    /// The first branch is over. The second, if some lanes take it, follows.
    Else { end: u32 },
    /// Both branches are over.
    EndIf,
    /// A loop begins.
    Loop { id: u32, end: u32 },
    /// Its body is over.
    EndLoop { start: u32 },
    /// Lanes leave loop `id`.
    Break { id: u32, cond: Option<Guard> },
    /// The kernel is over.
    Exit,
}

/// An instruction, with what the checks before its execution need.
#[derive(Debug)]
pub(crate) struct Decoded<'k> {
    pub(crate) inst: &'k Inst,
    /// Its index, for records of accesses.
    pub(crate) index: u32,
    reads: Range<u32>,
    writes: Range<u32>,
    /// Whether all lanes must execute it together.
    pub(crate) together: bool,
}

/// A kernel, decoded.
#[derive(Debug)]
pub(crate) struct Program<'k> {
    pub(crate) kernel: &'k Kernel,
    pub(crate) steps: Vec<Step>,
    pub(crate) instructions: Vec<Decoded<'k>>,
    /// The places of branches and loops, by step.
    places: Vec<&'static Location<'static>>,
    uses: Vec<RegId>,
    /// Where each register lies in the register file: 64 bits take two rows.
    pub(crate) rows: Vec<u32>,
    /// Rows of the register file.
    pub(crate) row_count: usize,
    /// Binary logarithms of the bytes of the finest access of shared and of global memory, at most
    /// 2: race checks go by such cells.
    pub(crate) shared_cell: u32,
    pub(crate) global_cell: u32,
    /// Whether it may start before the launches before it are over.
    pub(crate) early: bool,
}

impl<'k> Program<'k> {
    /// Decodes a kernel.
    pub(crate) fn new(kernel: &'k Kernel) -> Self {
        let mut rows = Vec::with_capacity(kernel.registers.len());
        let mut row_count = 0;
        for class in &kernel.registers {
            rows.push(row_count);
            row_count += if *class == Class::B64 { 2 } else { 1 };
        }
        let mut program = Self {
            kernel,
            steps: Vec::new(),
            instructions: Vec::new(),
            places: Vec::new(),
            uses: Vec::new(),
            rows,
            row_count: row_count as usize,
            shared_cell: 2,
            global_cell: 2,
            early: kernel.entry().early,
        };
        program.block(&kernel.body);
        let end = program.places.last().copied().unwrap_or(Location::caller());
        program.push(Step::Exit, end);
        program
    }

    fn push(&mut self, step: Step, at: &'static Location<'static>) -> usize {
        self.steps.push(step);
        self.places.push(at);
        self.steps.len() - 1
    }

    fn block(&mut self, block: &'k Block) {
        for node in block {
            match node {
                Node::Inst(inst) => self.inst(inst),
                Node::If {
                    cond,
                    then,
                    otherwise,
                    at,
                } => {
                    let start = self.push(
                        Step::If {
                            cond: *cond,
                            otherwise: 0,
                        },
                        at,
                    );
                    self.block(then);
                    let middle = self.push(Step::Else { end: 0 }, at);
                    self.block(otherwise);
                    let end = self.push(Step::EndIf, at);
                    self.steps[start] = Step::If {
                        cond: *cond,
                        otherwise: middle as u32,
                    };
                    self.steps[middle] = Step::Else { end: end as u32 };
                }
                Node::Loop { id, body, at } => {
                    let start = self.push(Step::Loop { id: *id, end: 0 }, at);
                    self.block(body);
                    let end = self.push(
                        Step::EndLoop {
                            start: start as u32,
                        },
                        at,
                    );
                    self.steps[start] = Step::Loop {
                        id: *id,
                        end: end as u32,
                    };
                }
                Node::Break { id, cond, at } => {
                    self.push(
                        Step::Break {
                            id: *id,
                            cond: *cond,
                        },
                        at,
                    );
                }
            }
        }
    }

    fn inst(&mut self, inst: &'k Inst) {
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        inst.op.visit(&mut |operand| match operand {
            Use::Read(register, _) => reads.push(register),
            Use::Write(register, _) => writes.push(register),
            Use::Constant(..) => {}
        });
        if let Op::Wgmma {
            a, b, accumulate, ..
        } = &inst.op
        {
            // Accumulators and A registers have rules of their own (`wgmma`).
            let descriptor = match a {
                MatrixA::Shared { descriptor, .. } => Some(*descriptor),
                MatrixA::Registers(_) => None,
            };
            let plain = descriptor.into_iter().chain([*b, *accumulate]);
            reads = plain.filter_map(register).collect();
            writes.clear();
        }
        reads.extend(inst.guard.map(|guard| guard.pred));
        let start = self.uses.len() as u32;
        let middle = start + reads.len() as u32;
        self.uses.extend(reads);
        self.uses.extend(writes);
        let end = self.uses.len() as u32;
        let index = self.instructions.len() as u32;
        self.instructions.push(Decoded {
            inst,
            index,
            reads: start..middle,
            writes: middle..end,
            together: together(&inst.op),
        });
        if let Some((space, bytes)) = plain_access(&inst.op) {
            let cell = bytes.trailing_zeros().min(2);
            match space {
                Space::Global => self.global_cell = self.global_cell.min(cell),
                Space::Shared | Space::Cluster => self.shared_cell = self.shared_cell.min(cell),
            }
        }
        self.push(Step::Inst(index), inst.at);
    }

    /// Registers that an instruction reads.
    pub(crate) fn reads(&self, inst: &Decoded) -> &[RegId] {
        &self.uses[inst.reads.start as usize..inst.reads.end as usize]
    }

    /// Registers that an instruction writes.
    pub(crate) fn writes(&self, inst: &Decoded) -> &[RegId] {
        &self.uses[inst.writes.start as usize..inst.writes.end as usize]
    }

    /// An instruction as text.
    pub(crate) fn text(&self, instruction: u32) -> String {
        let inst = self.instructions[instruction as usize].inst;
        print::brief(self.kernel, inst)
    }

    /// A register's name in PTX.
    pub(crate) fn name(&self, register: RegId) -> String {
        print::register(self.kernel, register)
    }

    /// An instruction's place in Rust source.
    pub(crate) fn place(&self, instruction: u32) -> String {
        self.instructions[instruction as usize].inst.at.to_string()
    }

    /// Text and place of a step.
    pub(crate) fn describe(&self, step: usize) -> (String, String) {
        let text = match self.steps[step] {
            Step::Inst(instruction) => self.text(instruction),
            Step::If { .. } | Step::Else { .. } | Step::EndIf => "if".to_owned(),
            Step::Loop { .. } | Step::EndLoop { .. } => "loop".to_owned(),
            Step::Break { .. } => "break".to_owned(),
            Step::Exit => "the end of the kernel".to_owned(),
        };
        (text, self.places[step].to_string())
    }
}

/// Whether all 32 lanes must execute an instruction together.
fn together(op: &Op) -> bool {
    matches!(
        op,
        Op::LoadMatrix { .. }
            | Op::StoreMatrix { .. }
            | Op::Shuffle { .. }
            | Op::Vote { .. }
            | Op::Ballot { .. }
            | Op::WarpReduce { .. }
            | Op::Elect { .. }
            | Op::WarpSync
            | Op::Mma { .. }
            | Op::BarrierSync { .. }
            | Op::BarrierArrive { .. }
            | Op::ClusterArrive
            | Op::ClusterWait
            | Op::WgmmaFence
            | Op::WgmmaCommit
            | Op::WgmmaWait { .. }
            | Op::Wgmma { .. }
            | Op::SetMaxRegisters { .. }
    )
}

/// The space and the bytes of one lane's ordinary access.
fn plain_access(op: &Op) -> Option<(Space, u32)> {
    let of = |space: Space, ty: Ty, count: usize| Some((space, ty.bytes() * count as u32));
    match op {
        Op::Load { space, ty, dst, .. } => of(*space, *ty, dst.len()),
        Op::Store { space, ty, src, .. } | Op::Reduce { space, ty, src, .. } => {
            of(*space, *ty, src.len())
        }
        Op::Atomic { space, ty, .. } => of(*space, *ty, 1),
        Op::LoadAcquire { ty, .. } | Op::StoreRelease { ty, .. } => of(Space::Global, *ty, 1),
        _ => None,
    }
}

/// The registers of a wgmma's A operand.
pub(crate) fn a_registers(a: &MatrixA) -> &[RegId] {
    match a {
        MatrixA::Shared { .. } => &[],
        MatrixA::Registers(registers) => registers,
    }
}

fn register(operand: Operand) -> Option<RegId> {
    match operand {
        Operand::Reg(register) => Some(register),
        Operand::Imm(_) => None,
    }
}
