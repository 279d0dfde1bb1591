//! What the verifier knows of control flow: assignments on all paths, loops and their breaks, and
//! the place that an error names.

#[allow(dead_code)] // shared with other tests
mod every;

use every::structure::{break_, fails, guarded, holds, if_, loop_, one};
use every::*;
use flex_block_attn_ptx::ir::*;
use flex_block_attn_ptx::verify::{Fault, VerifyError};
use flex_block_attn_ptx::{Element, Ty, verify};

fn refusal(kernel: &Kernel) -> VerifyError {
    verify(kernel).expect_err("should be refused")
}

fn kernel(loops: u32, body: Block) -> Kernel {
    Kernel {
        loops,
        body,
        ..empty("k")
    }
}

fn set(register: u32) -> Node {
    one(Op::Mov {
        ty: Ty::U32,
        dst: r(register),
        src: imm(1),
    })
}

fn set_pred(register: u32) -> Node {
    one(Op::Mov {
        ty: Ty::Pred,
        dst: p(register),
        src: imm(1),
    })
}

fn read(register: u32) -> Op {
    let (src, address) = (vec![imm(0)], at(r(register), 0));
    Op::Store {
        space: Space::Shared,
        ty: Ty::U32,
        src,
        address,
    }
}

#[track_caller]
fn assert_unassigned(register: RegId, body: Block) {
    let kernel = kernel(2, body);
    let name = flex_block_attn_ptx::print::register(&kernel, register);
    assert_eq!(refusal(&kernel).fault, Fault::Unassigned { register, name });
}

#[track_caller]
fn assert_passes(body: Block) {
    verify(&kernel(2, body)).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn reads_follow_writes() {
    assert_passes(vec![set(0), one(read(0))]);
    assert_unassigned(r(0), vec![one(read(0))]);
    assert_unassigned(r(0), vec![one(read(0)), set(0)]);
    // An instruction reads before it writes.
    let copy = Op::Mov {
        ty: Ty::U32,
        dst: r(0),
        src: reg(r(0)),
    };
    assert_unassigned(r(0), vec![one(copy)]);
    assert_unassigned(p(0), vec![set(0), guarded(holds(0), read(0))]);
    assert_unassigned(p(0), vec![if_(holds(0), vec![], vec![])]);
    assert_unassigned(p(0), vec![loop_(0, vec![break_(0, Some(holds(0)))])]);
}

#[test]
fn products_read_their_accumulators() {
    let product = |accumulate| {
        one(Op::Wgmma {
            element: Element::Bf16,
            n: 8,
            acc: (0..4).map(f).collect(),
            a: MatrixA::Shared {
                descriptor: imm(1),
                transposed: false,
            },
            b: imm(1),
            b_transposed: false,
            accumulate,
        })
    };
    assert_passes(vec![product(imm(0)), product(imm(1))]);
    assert_unassigned(f(0), vec![product(imm(1))]);
    assert_unassigned(f(0), vec![set_pred(0), product(reg(p(0)))]);
    let of_warp = one(Op::Mma {
        element: Element::Bf16,
        acc: [0, 1, 2, 3].map(f),
        a: [r(0); 4],
        b: [r(0); 2],
    });
    assert_passes(vec![set(0), product(imm(0)), of_warp.clone()]);
    assert_unassigned(f(0), vec![set(0), of_warp]);
}

#[test]
fn both_sides_of_a_branch_count() {
    let branch = |then, otherwise| vec![set_pred(0), if_(holds(0), then, otherwise), one(read(0))];
    assert_passes(branch(vec![set(0)], vec![set(0)]));
    assert_unassigned(r(0), branch(vec![set(0)], vec![]));
    assert_unassigned(r(0), branch(vec![], vec![set(0)]));
    // A side that ends in a trap goes nowhere.
    assert_passes(branch(vec![set(0)], vec![one(Op::Trap)]));
    assert_unassigned(
        r(0),
        branch(vec![set(0)], vec![set_pred(1), guarded(holds(1), Op::Trap)]),
    );
}

#[test]
fn loops_are_left_by_their_breaks() {
    let leave = |id| break_(id, Some(holds(0)));
    let body = |nodes: Block| vec![set_pred(0), loop_(0, nodes), one(read(0))];
    assert_passes(body(vec![set(0), leave(0)]));
    assert_unassigned(r(0), body(vec![leave(0), set(0)]));
    assert_unassigned(r(0), body(vec![leave(0), set(0), leave(0)]));
    assert_passes(body(vec![set(0), break_(0, None)]));
    // What follows a loop that is never left, or a break, is never reached.
    assert_passes(body(vec![]));
    assert_passes(body(vec![set(0), break_(0, None), one(read(7))]));
    // What one round assigns, the next may not rely on.
    assert_unassigned(r(1), body(vec![set(0), one(read(1)), set(1), leave(0)]));
    // A break out of two loops carries what is assigned where it stands.
    assert_unassigned(r(0), body(vec![loop_(1, vec![leave(0), set(0), leave(1)])]));
    assert_passes(body(vec![set(0), loop_(1, vec![leave(0), leave(1)])]));
}

#[test]
fn writes_under_a_guard_hold_under_it_only() {
    let write = || Op::Mov {
        ty: Ty::U32,
        dst: r(0),
        src: imm(1),
    };
    let start = |nodes: Block| [vec![set_pred(0), set_pred(1)], nodes].concat();
    assert_unassigned(r(0), start(vec![guarded(holds(0), write()), one(read(0))]));
    assert_passes(start(vec![
        guarded(holds(0), write()),
        guarded(holds(0), read(0)),
    ]));
    assert_unassigned(
        r(0),
        start(vec![guarded(holds(0), write()), guarded(fails(0), read(0))]),
    );
    assert_unassigned(
        r(0),
        start(vec![guarded(holds(0), write()), guarded(holds(1), read(0))]),
    );
    // The predicate has changed meanwhile.
    assert_unassigned(
        r(0),
        start(vec![
            guarded(holds(0), write()),
            set_pred(0),
            guarded(holds(0), read(0)),
        ]),
    );
    // What was assigned stays so.
    assert_passes(start(vec![
        set(0),
        guarded(holds(0), write()),
        one(read(0)),
    ]));
}

#[test]
fn breaks_and_loops_match() {
    let fault = |loops, body| refusal(&kernel(loops, body)).fault;
    assert_eq!(
        fault(1, vec![break_(0, None)]),
        Fault::Break {
            id: 0,
            around: vec![]
        }
    );
    let body = vec![loop_(0, vec![loop_(1, vec![break_(2, None)])])];
    assert_eq!(
        fault(2, body),
        Fault::Break {
            id: 2,
            around: vec![0, 1]
        }
    );
    let twice = || loop_(0, vec![break_(0, None)]);
    assert_eq!(
        fault(1, vec![twice(), twice()]),
        Fault::Loop { id: 0, loops: 1 }
    );
    assert_eq!(fault(0, vec![twice()]), Fault::Loop { id: 0, loops: 0 });
    let (register, registers) = (RegId(9), 0);
    let missing = Kernel {
        registers: Vec::new(),
        ..kernel(0, vec![one(Op::Elect { dst: RegId(9) })])
    };
    assert_eq!(
        refusal(&missing).fault,
        Fault::NoRegister {
            register,
            registers
        }
    );
}

#[test]
fn an_error_names_kernel_instruction_and_place() {
    let kernel = kernel(0, vec![one(read(3))]);
    let Node::Inst(Inst { at, .. }) = &kernel.body[0] else {
        panic!("made above")
    };
    assert_eq!(
        refusal(&kernel).to_string(),
        format!(
            "kernel `k`, `st.shared.u32 [%r3], 0;` ({at}): \
             register %r3 is read, but not assigned on every path to here"
        )
    );
    assert!(at.file().ends_with("flow.rs"), "{at}");
}
