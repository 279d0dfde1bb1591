//! PTX text.
//!
//! In: a [`Module`] that [`crate::verify()`] has passed. Out: what the driver or `ptxas` loads. The
//! text depends on the kernels alone, not on where in Rust source they were written, so that it
//! can key a cache. Called by whoever loads kernels, and by reports of faults.
//!
//! - `mnemonic`: an instruction's name; `arguments`: its operands;
//! - here: what surrounds them: directives, declarations, labels.

mod arguments;
mod mnemonic;

use std::fmt::Write as _;

use arguments::{CLASSES, Names, arguments};

use crate::ir::{Guard, Inst, Kernel, Module, Node, Op, ParamKind, RegId};

/// The name of dynamic shared memory.
const SHARED: &str = "smem";

/// The predicate of an mbarrier wait's loop, known within its braces only.
const DONE: &str = "%done";

/// Nanoseconds for which one try of an mbarrier wait may sleep.
const PATIENCE: &str = "10000000";

/// A module's PTX.
///
/// ```
/// use flex_block_attn_ptx::{Module, print};
///
/// assert!(print(&Module { kernels: Vec::new() }).starts_with(".version 8.1\n.target sm_90a\n"));
/// ```
pub fn print(module: &Module) -> String {
    let mut text = format!(
        ".version 8.1\n.target sm_90a\n.address_size 64\n\n.extern .shared .align 1024 .b8 {SHARED}[];\n"
    );
    for kernel in &module.kernels {
        text.push('\n');
        text.push_str(&entry(kernel));
    }
    text
}

/// One instruction of a kernel as it is printed, for reports of faults: one line, or several if it
/// takes several instructions.
pub fn instruction(kernel: &Kernel, inst: &Inst) -> String {
    let mut printer = Printer::new(kernel);
    printer.depth = 0;
    printer.instruction(inst);
    printer.text.trim_end().to_owned()
}

/// As [`instruction`], for a line of a report: of several instructions the one that counts, and of
/// very long lines the beginning.
pub fn brief(kernel: &Kernel, inst: &Inst) -> String {
    let (text, mnemonic) = (instruction(kernel, inst), inst.op.mnemonic());
    let line = text.lines().find(|line| line.contains(&mnemonic));
    let line = line.unwrap_or(&text).trim_start();
    // wgmmas have up to 128 registers.
    match line.char_indices().nth(160) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

/// A register of a kernel as it is printed.
pub fn register(kernel: &Kernel, register: RegId) -> String {
    Names::new(kernel).register(register)
}

fn entry(kernel: &Kernel) -> String {
    let mut printer = Printer::new(kernel);
    printer.header(kernel);
    printer.block(&kernel.body);
    printer.line("ret;");
    printer.text.push_str("}\n");
    printer.text
}

struct Printer<'k> {
    names: Names<'k>,
    text: String,
    depth: usize,
    /// Labels given out so far.
    labels: u32,
}

impl<'k> Printer<'k> {
    fn new(kernel: &'k Kernel) -> Self {
        Self {
            names: Names::new(kernel),
            text: String::new(),
            depth: 1,
            labels: 0,
        }
    }

    fn line(&mut self, text: impl AsRef<str>) {
        let indent = 4 * self.depth;
        let _ = writeln!(self.text, "{:indent$}{}", "", text.as_ref());
    }

    /// A label, one step less indented than what it stands before.
    fn label(&mut self, name: &str) {
        self.depth -= 1;
        self.line(format!("{name}:"));
        self.depth += 1;
    }

    fn next_label(&mut self) -> u32 {
        self.labels += 1;
        self.labels - 1
    }

    fn header(&mut self, kernel: &Kernel) {
        let params: Vec<_> = (kernel.params.iter().zip(0..))
            .map(
                |(param, index)| match (param.kind, self.names.param(index)) {
                    (ParamKind::Scalar(ty), name) => format!("    .param .{ty} {name}"),
                    (ParamKind::TensorMap, name) => format!("    .param .align 64 .b8 {name}[128]"),
                },
            )
            .collect();
        let _ = match params.len() {
            0 => writeln!(self.text, ".visible .entry {}()", kernel.name),
            _ => writeln!(
                self.text,
                ".visible .entry {}(\n{}\n)",
                kernel.name,
                params.join(",\n")
            ),
        };
        let _ = writeln!(self.text, ".maxntid {}, 1, 1", kernel.threads);
        let _ = writeln!(self.text, ".minnctapersm {}", kernel.min_blocks);
        if kernel.cluster > 1 {
            let _ = writeln!(self.text, ".reqnctapercluster {}, 1, 1", kernel.cluster);
        }
        self.text.push_str("{\n");
        for ((class, letter), count) in CLASSES.into_iter().zip(self.names.counts) {
            if count > 0 {
                self.line(format!(".reg .{class} %{letter}<{count}>;"));
            }
        }
    }

    fn block(&mut self, nodes: &[Node]) {
        for node in nodes {
            match node {
                Node::Inst(inst) => self.instruction(inst),
                Node::If {
                    cond,
                    then,
                    otherwise,
                    ..
                } => self.branch(*cond, then, otherwise),
                Node::Loop { id, body, .. } => {
                    self.label(&format!("LOOP_{id}"));
                    self.nested(body);
                    self.line(format!("bra LOOP_{id};"));
                    self.label(&format!("AFTER_{id}"));
                }
                Node::Break { id, cond, .. } => {
                    let line = format!("{}bra AFTER_{id};", self.guard(*cond));
                    self.line(line);
                }
            }
        }
    }

    fn nested(&mut self, nodes: &[Node]) {
        self.depth += 1;
        self.block(nodes);
        self.depth -= 1;
    }

    fn branch(&mut self, cond: Guard, then: &[Node], otherwise: &[Node]) {
        let n = self.next_label();
        let opposite = Guard {
            negated: !cond.negated,
            ..cond
        };
        // With one side only, one jump around it is all there is.
        if then.is_empty() || otherwise.is_empty() {
            let (skip, side) = if otherwise.is_empty() {
                (opposite, then)
            } else {
                (cond, otherwise)
            };
            let line = format!("{}bra END_{n};", self.guard(Some(skip)));
            self.line(line);
            self.nested(side);
        } else {
            let line = format!("{}bra ELSE_{n};", self.guard(Some(opposite)));
            self.line(line);
            self.nested(then);
            self.line(format!("bra END_{n};"));
            self.label(&format!("ELSE_{n}"));
            self.nested(otherwise);
        }
        self.label(&format!("END_{n}"));
    }

    fn guard(&self, guard: Option<Guard>) -> String {
        match guard {
            None => String::new(),
            Some(Guard { pred, negated }) => {
                format!(
                    "@{}{} ",
                    if negated { "!" } else { "" },
                    self.names.register(pred)
                )
            }
        }
    }

    fn instruction(&mut self, inst: &Inst) {
        let guard = self.guard(inst.guard);
        let arguments = arguments(&inst.op, &self.names).join(", ");
        let space = if arguments.is_empty() { "" } else { " " };
        let main = format!("{}{space}{arguments};", inst.op.mnemonic());
        match &inst.op {
            Op::MbarrierWait { .. } => self.wait(inst.guard, &main),
            Op::ParamAddress { dst, param } => {
                let (dst, param) = (self.names.register(*dst), self.names.param(*param));
                self.line(format!("{guard}mov.b64 {dst}, {param};"));
                self.line(format!("{guard}{main}"));
            }
            _ => self.line(format!("{guard}{main}")),
        }
    }

    /// Tries again until `attempt` sets its predicate; a guard jumps around it all.
    fn wait(&mut self, guard: Option<Guard>, attempt: &str) {
        let n = self.next_label();
        self.line("{");
        self.depth += 1;
        self.line(format!(".reg .pred {DONE};"));
        if let Some(guard) = guard {
            let skip = Guard {
                negated: !guard.negated,
                ..guard
            };
            let line = format!("{}bra DONE_{n};", self.guard(Some(skip)));
            self.line(line);
        }
        self.label(&format!("WAIT_{n}"));
        self.line(attempt);
        self.line(format!("@{DONE} bra DONE_{n};"));
        self.line(format!("bra WAIT_{n};"));
        self.label(&format!("DONE_{n}"));
        self.depth -= 1;
        self.line("}");
    }
}
