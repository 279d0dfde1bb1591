//! Every kernel in every config: verified, printed, assembled without spills or warnings.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::thread::available_parallelism;

use flex_block_attn_kernels as kernels;
use flex_block_attn_lab::ptxas::{allowed_spills, assembled};
use flex_block_attn_lab::rules;
use flex_block_attn_ptx::{Kernel, Module, print, verify};

#[test]
fn all_kernels_verify_and_assemble() {
    let kernels: Vec<Kernel> = kernels::all().into_iter().chain(rules::kernels()).collect();
    let mut names = BTreeSet::new();
    for Kernel { name, .. } in &kernels {
        assert!(names.insert(name), "two kernels are named {name}");
    }
    let workers = available_parallelism().map_or(1, NonZeroUsize::get);
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let own = kernels.iter().skip(worker).step_by(workers);
            scope.spawn(|| own.for_each(verifies_and_assembles));
        }
    });
}

fn verifies_and_assembles(kernel: &Kernel) {
    let name = &kernel.name;
    verify(kernel).unwrap_or_else(|error| panic!("{error}"));
    let kernels = vec![kernel.clone()];
    let Some(report) = assembled(&print(&Module { kernels })) else {
        return;
    };
    assert_eq!(report.warnings, [""; 0], "{name}");
    let entry = report.entry(name).expect("ptxas reports each kernel");
    let spills = entry.spill_stores.max(entry.spill_loads);
    assert!(
        spills <= allowed_spills(name),
        "{name} spills {spills} bytes"
    );
}
