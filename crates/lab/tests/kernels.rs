//! Every kernel in every config: verified, printed, assembled without spills or warnings.

use std::collections::BTreeSet;

use flex_block_attn_kernels as kernels;
use flex_block_attn_lab::ptxas::assembled;
use flex_block_attn_ptx::{Module, print, verify};

#[test]
fn all_kernels_verify_and_assemble() {
    let mut names = BTreeSet::new();
    for kernel in kernels::all() {
        let name = kernel.name.clone();
        assert!(names.insert(name.clone()), "two kernels are named {name}");
        verify(&kernel).unwrap_or_else(|error| panic!("{error}"));
        let Some(report) = assembled(&print(&Module {
            kernels: vec![kernel],
        })) else {
            return;
        };
        assert_eq!(report.warnings, [""; 0], "{name}");
        let entry = report.entry(&name).expect("ptxas reports each kernel");
        assert_eq!(
            (entry.spill_stores, entry.spill_loads),
            (0, 0),
            "{name} spills"
        );
    }
}
