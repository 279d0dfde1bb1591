//! The printer against NVIDIA's assembler: every instruction in every form assembles.

#[allow(dead_code)] // shared with the printer's own tests
#[path = "../../ptx/tests/every/mod.rs"]
mod every;

use flex_block_attn_lab::ptxas::{self, Error, assembled};
use flex_block_attn_ptx::{Builder, Module, print, verify};

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

/// Each thread sums what its warp's lanes of equal parity loaded; one lane of each stores it.
#[test]
fn what_the_builder_makes_passes_and_assembles() {
    let kernel = Builder::kernel("sums", 128, |k| {
        k.set_shared_bytes(1024);
        let (from, to, n) = (
            k.param::<u64>("from"),
            k.param::<u64>("to"),
            k.param::<u32>("n"),
        );
        let (thread, lane) = (k.cta_x() * 128 + k.tid(), k.lane());
        let sum = k.var::<f32>(0.0);
        k.for_(thread, n, k.grid_x() * 128, |i| {
            let value = k.load_constant::<f32>(from + i.times_wide(4));
            k.if_else(
                value.lt(0.0),
                || sum.set(sum + value.exp2()),
                || sum.set(value.fma(2.0, sum)),
            );
        });
        for distance in [2, 4, 8, 16] {
            sum.set(sum + sum.butterfly(distance));
        }
        k.where_(lane.lt(2), || {
            let slot = (thread >> 5) * 2 + lane;
            k.store_global(to + slot.times_wide(4), sum);
        });
    });
    verify(&kernel).unwrap_or_else(|error| panic!("{error}"));
    let Some(report) = assembled(&print(&Module {
        kernels: vec![kernel],
    })) else {
        return;
    };
    assert_eq!(report.warnings, [""; 0]);
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
