//! The printer against NVIDIA's assembler: every instruction in every form assembles.

#[allow(dead_code)] // shared with the printer's own tests
#[path = "../../ptx/tests/every/mod.rs"]
mod every;

use flex_block_attn_lab::ptxas::{self, Error, assembled};
use flex_block_attn_ptx::{Module, print};

#[test]
fn every_instruction_assembles() {
    let kernels = every::kernels();
    let names: Vec<_> = kernels.iter().map(|kernel| kernel.name.clone()).collect();
    let Some(report) = assembled(&print(&Module { kernels })) else {
        return;
    };
    assert_eq!(report.warnings, [""; 0]);
    for name in names {
        let entry = report
            .entry(&name)
            .unwrap_or_else(|| panic!("no kernel {name}"));
        assert_eq!(
            (entry.spill_stores, entry.spill_loads),
            (0, 0),
            "{name} spills"
        );
        assert!(entry.registers > 0, "{name} has no registers");
    }
}

#[test]
fn what_is_not_ptx_is_refused() {
    let text = print(&Module {
        kernels: Vec::new(),
    }) + "\n.visible .entry k() {\n    bogus;\n}\n";
    match ptxas::assemble(&text) {
        Err(Error::Refused(message)) => assert!(message.contains("bogus;"), "{message}"),
        Err(Error::Absent { .. }) => {}
        other => panic!("{other:?}"),
    }
}
