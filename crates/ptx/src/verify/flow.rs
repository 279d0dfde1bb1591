//! What happens before what: registers are assigned before they are read, on every path, and
//! breaks leave loops that they are in.
//!
//! In: a kernel. Out: the first fault. On the way every instruction passes the other rooms'
//! checks. Called by [`super::verify`].

use super::{Fault, VerifyError, error_at, instruction, operand};
use crate::Ty;
use crate::ir::{Block, Guard, Inst, Kernel, Node, Op, RegId};
use crate::operands::{Need, Use};

pub(super) fn check(kernel: &Kernel) -> Result<(), VerifyError> {
    let mut walk = Walk {
        kernel,
        assigned: Set::empty(kernel.registers.len()),
        partial: None,
        around: Vec::new(),
        seen: vec![false; kernel.loops as usize],
    };
    walk.block(&kernel.body)
}

/// A set of registers. Where control never comes it is full: that way it does not narrow what is
/// known where paths meet.
#[derive(Debug, Clone)]
struct Set(Vec<u64>);

impl Set {
    fn empty(registers: usize) -> Self {
        Self(vec![0; registers.div_ceil(64)])
    }

    fn fill(&mut self) {
        self.0.fill(u64::MAX);
    }

    fn has(&self, RegId(id): RegId) -> bool {
        self.0[id as usize / 64] >> (id % 64) & 1 == 1
    }

    fn add(&mut self, RegId(id): RegId) {
        self.0[id as usize / 64] |= 1 << (id % 64);
    }

    fn intersect(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a &= b);
    }
}

/// A loop that is being walked through.
struct Around {
    id: u32,
    /// What is assigned on all ways out so far.
    leaving: Set,
}

struct Walk<'k> {
    kernel: &'k Kernel,
    /// Registers assigned on every path to here.
    assigned: Set,
    /// What instructions under the last guard have assigned: known to those that follow under the
    /// same one, until its predicate changes.
    partial: Option<(Guard, Vec<RegId>)>,
    /// Loops around here, outermost first.
    around: Vec<Around>,
    /// Loops met so far.
    seen: Vec<bool>,
}

impl Walk<'_> {
    fn block(&mut self, block: &Block) -> Result<(), VerifyError> {
        for node in block {
            match node {
                Node::Inst(inst) => self
                    .instruction(inst)
                    .map_err(|fault| self.error(node, fault))?,
                Node::If {
                    cond,
                    then,
                    otherwise,
                    ..
                } => {
                    self.condition(*cond)
                        .map_err(|fault| self.error(node, fault))?;
                    self.branch(then, otherwise)?;
                }
                Node::Loop { id, body, .. } => {
                    self.enter(*id).map_err(|fault| self.error(node, fault))?;
                    self.block(body)?;
                    self.leave();
                }
                Node::Break { id, cond, .. } => {
                    self.break_(*id, *cond)
                        .map_err(|fault| self.error(node, fault))?;
                }
            }
        }
        Ok(())
    }

    fn error(&self, node: &Node, fault: Fault) -> VerifyError {
        error_at(self.kernel, node, fault)
    }

    fn instruction(&mut self, inst: &Inst) -> Result<(), Fault> {
        instruction(self.kernel, inst)?;
        if let Some(guard) = inst.guard {
            self.read(guard.pred, None)?;
        }
        let mut result = Ok(());
        inst.op.visit(&mut |used| match used {
            Use::Read(register, _) if result.is_ok() => result = self.read(register, inst.guard),
            Use::Write(register, _) => self.write(register, inst.guard),
            Use::Read(..) | Use::Constant(..) => {}
        });
        if inst.op == Op::Trap && inst.guard.is_none() {
            self.assigned.fill();
        }
        result
    }

    fn read(&self, register: RegId, guard: Option<Guard>) -> Result<(), Fault> {
        let partly = self.partial.as_ref().is_some_and(|(under, registers)| {
            guard == Some(*under) && registers.contains(&register)
        });
        if partly || self.assigned.has(register) {
            Ok(())
        } else {
            let name = crate::print::register(self.kernel, register);
            Err(Fault::Unassigned { register, name })
        }
    }

    fn write(&mut self, register: RegId, guard: Option<Guard>) {
        match guard {
            None => self.assigned.add(register),
            Some(guard) => match &mut self.partial {
                Some((under, registers)) if *under == guard => registers.push(register),
                _ => self.partial = Some((guard, vec![register])),
            },
        }
        if self
            .partial
            .as_ref()
            .is_some_and(|(under, _)| under.pred == register)
        {
            self.partial = None;
        }
    }

    fn condition(&self, guard: Guard) -> Result<(), Fault> {
        operand(self.kernel, Use::Read(guard.pred, Need::of(Ty::Pred)))?;
        self.read(guard.pred, None)
    }

    fn branch(&mut self, then: &Block, otherwise: &Block) -> Result<(), VerifyError> {
        self.partial = None;
        let before = self.assigned.clone();
        self.block(then)?;
        self.partial = None;
        let after_then = std::mem::replace(&mut self.assigned, before);
        self.block(otherwise)?;
        self.partial = None;
        self.assigned.intersect(&after_then);
        Ok(())
    }

    /// The next time round at least as much is assigned as the first time: one walk through the
    /// body is enough.
    fn enter(&mut self, id: u32) -> Result<(), Fault> {
        self.partial = None;
        match self.seen.get_mut(id as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => {
                return Err(Fault::Loop {
                    id,
                    loops: self.kernel.loops,
                });
            }
        }
        let mut leaving = self.assigned.clone();
        leaving.fill();
        self.around.push(Around { id, leaving });
        Ok(())
    }

    fn leave(&mut self) {
        self.partial = None;
        if let Some(Around { leaving, .. }) = self.around.pop() {
            self.assigned = leaving;
        }
    }

    fn break_(&mut self, id: u32, cond: Option<Guard>) -> Result<(), Fault> {
        if let Some(guard) = cond {
            self.condition(guard)?;
        }
        let Some(around) = self.around.iter_mut().find(|around| around.id == id) else {
            let around = self.around.iter().map(|around| around.id).collect();
            return Err(Fault::Break { id, around });
        };
        around.leaving.intersect(&self.assigned);
        if cond.is_none() {
            self.assigned.fill();
        }
        Ok(())
    }
}
