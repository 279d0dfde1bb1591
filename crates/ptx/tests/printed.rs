//! The printed text of every instruction in every form, and of what is around instructions.
//!
//! Expectations lie in `snapshots/`; `INSTA_UPDATE=always cargo test` writes them anew.

#[allow(dead_code)] // shared with other tests
mod every;

use std::collections::BTreeSet;

use flex_block_attn_ptx::{Module, print, verify};

/// Compares a text with `snapshots/`.
fn expect(name: &str, text: &str) {
    insta::with_settings!({ omit_expression => true }, { insta::assert_snapshot!(name, text) });
}

#[test]
fn every_instruction() {
    for case in every::cases() {
        let lines = case.ops.iter().map(|op| {
            let inst = every::inst(op.clone());
            flex_block_attn_ptx::print::instruction(&case.kernel, &inst)
        });
        expect(case.name, &lines.collect::<Vec<_>>().join("\n"));
    }
}

#[test]
fn everything_around_instructions() {
    let kernels = every::structure::kernels();
    expect("structure", &print(&Module { kernels }));
}

#[test]
fn all_of_it_passes_the_verifier() {
    for kernel in every::kernels() {
        verify(&kernel).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// The text may key a cache: it must not change with lines of Rust source.
#[test]
fn text_does_not_depend_on_places() {
    let text = print(&Module {
        kernels: every::kernels(),
    });
    assert!(!text.contains(".rs"), "a path got into the text");
    assert!(!text.contains("//"), "a comment got into the text");
}

#[test]
fn mnemonics_start_the_printed_line() {
    let mut names = BTreeSet::new();
    for case in every::cases() {
        for op in &case.ops {
            let text =
                flex_block_attn_ptx::print::instruction(&case.kernel, &every::inst(op.clone()));
            let name = op.mnemonic();
            assert!(text.contains(&name), "{name} is not in `{text}`");
            names.insert(name);
        }
    }
    assert!(names.len() > 200, "only {} names", names.len());
}
