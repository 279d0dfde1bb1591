//! The verifier: what ptxas would refuse, silently misread, or accept and hang on.
//!
//! In: a [`Kernel`]. Out: nothing, or the first [`VerifyError`], with its place in Rust source.
//! Called before a kernel is printed or emulated.
//!
//! - `flow`: every register that is read has been assigned; breaks leave loops they are in;
//! - `types`: instructions have the types that PTX has them for;
//! - `limits`: counts, sizes and constants;
//! - here: the error, and that operands are of their class.

mod flow;
mod limits;
mod types;

use std::fmt;
use std::panic::Location;

use thiserror::Error;

use crate::ir::{Inst, Kernel, Node, RegId};
use crate::operands::{Need, Use};
use crate::{Class, Ty};

/// A kernel that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("kernel `{kernel}`{place}: {fault}")]
pub struct VerifyError {
    /// Its name.
    pub kernel: String,
    /// Where the fault is; the whole kernel if there is no one place.
    pub place: Place,
    /// What is wrong.
    pub fault: Fault,
}

/// A statement of a kernel, or all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The kernel's name, parameters or sizes.
    Kernel,
    /// An instruction, or a statement of control flow.
    Statement {
        /// As it is printed (its first line).
        text: String,
        /// The place in Rust source that asked for it.
        at: &'static Location<'static>,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => Ok(()),
            Self::Statement { text, at } => write!(f, ", `{text}` ({at})"),
        }
    }
}

/// What can be wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    /// A register that the kernel does not have.
    #[error("there is no register {}; the kernel has {registers}", register.0)]
    NoRegister {
        /// The register.
        register: RegId,
        /// How many there are.
        registers: usize,
    },
    /// A register of the wrong class.
    #[error("register {} is {is}, but the instruction takes {needs}", register.0)]
    Class {
        /// The register.
        register: RegId,
        /// What it is.
        is: Class,
        /// What is allowed.
        needs: Need,
    },
    /// A constant with more bits than its operand has.
    #[error("the constant {value:#x} does not fit into {needs}")]
    Constant {
        /// Its bits.
        value: u64,
        /// What it must fit into.
        needs: Need,
    },
    /// A constant where only registers are allowed.
    #[error("operands of type {ty} must be registers, not constants")]
    ConstantOperand {
        /// The instruction's type.
        ty: Ty,
    },
    /// A register that is read before it is written.
    #[error("register {name} is read, but not assigned on every path to here")]
    Unassigned {
        /// The register.
        register: RegId,
        /// Its name in PTX.
        name: String,
    },
    /// A break out of a loop that does not enclose it.
    #[error("leaves loop {id}, which is not around it; around it are {around:?}")]
    Break {
        /// The loop.
        id: u32,
        /// The loops around it, outermost first.
        around: Vec<u32>,
    },
    /// A loop whose number is taken or too large.
    #[error("loop {id}: numbers must be below {loops}, and each used once")]
    Loop {
        /// The loop.
        id: u32,
        /// Loops of the kernel.
        loops: u32,
    },
    /// An instruction that PTX does not have for a type.
    #[error("{what} does not exist for {ty}; allowed: {}", list(allowed))]
    Type {
        /// The instruction.
        what: &'static str,
        /// The type.
        ty: Ty,
        /// Types that it exists for.
        allowed: &'static [Ty],
    },
    /// A value that is not allowed.
    #[error("{what} is {is}; allowed: {allowed}")]
    Value {
        /// Of what.
        what: &'static str,
        /// The value.
        is: String,
        /// What would be allowed.
        allowed: &'static str,
    },
}

impl Fault {
    fn value(what: &'static str, is: impl fmt::Display, allowed: &'static str) -> Self {
        Self::Value {
            what,
            is: is.to_string(),
            allowed,
        }
    }
}

fn list(types: &[Ty]) -> String {
    types
        .iter()
        .map(Ty::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Refuses `is` unless it is allowed.
fn require(
    ok: bool,
    what: &'static str,
    is: impl fmt::Display,
    allowed: &'static str,
) -> Result<(), Fault> {
    if ok {
        Ok(())
    } else {
        Err(Fault::value(what, is, allowed))
    }
}

/// Whether `kernel` may be printed and run; if not, the first thing that is wrong.
///
/// # Errors
/// See [`Fault`].
pub fn verify(kernel: &Kernel) -> Result<(), VerifyError> {
    limits::kernel(kernel).map_err(|fault| error(kernel, Place::Kernel, fault))?;
    flow::check(kernel)
}

/// All checks of one instruction that do not depend on those before it.
fn instruction(kernel: &Kernel, inst: &Inst) -> Result<(), Fault> {
    types::check(&inst.op)?;
    limits::check(kernel, &inst.op)?;
    let mut result = inst.guard.map_or(Ok(()), |guard| {
        operand(kernel, Use::Read(guard.pred, Need::of(Ty::Pred)))
    });
    inst.op.visit(&mut |used| {
        if result.is_ok() {
            result = operand(kernel, used);
        }
    });
    result
}

/// That an operand exists and is of its class.
fn operand(kernel: &Kernel, used: Use) -> Result<(), Fault> {
    match used {
        Use::Read(register, needs) | Use::Write(register, needs) => {
            let registers = kernel.registers.len();
            match kernel.registers.get(register.0 as usize) {
                None => Err(Fault::NoRegister {
                    register,
                    registers,
                }),
                Some(&is) if needs.allows(is) => Ok(()),
                Some(&is) => Err(Fault::Class {
                    register,
                    is,
                    needs,
                }),
            }
        }
        Use::Constant(value, needs) => {
            let fits = needs.bits() == 64 || value >> needs.bits() == 0;
            if fits {
                Ok(())
            } else {
                Err(Fault::Constant { value, needs })
            }
        }
    }
}

fn error(kernel: &Kernel, place: Place, fault: Fault) -> VerifyError {
    VerifyError {
        kernel: kernel.name.clone(),
        place,
        fault,
    }
}

/// An error at a statement.
fn error_at(kernel: &Kernel, node: &Node, fault: Fault) -> VerifyError {
    let (text, at) = match node {
        Node::Inst(inst) => {
            let text = crate::print::brief(kernel, inst);
            (text, inst.at)
        }
        Node::If { at, .. } => ("if".to_owned(), *at),
        Node::Loop { at, .. } => ("loop".to_owned(), *at),
        Node::Break { at, .. } => ("break".to_owned(), *at),
    };
    error(kernel, Place::Statement { text, at }, fault)
}
