//! The house rules that a program can check: which crate may use which, and that every file says
//! at its top what it is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The arrows of `docs/architecture.md`: a crate, and the crates of ours that it may use.
const ARROWS: &[(&str, &[&str])] = &[
    (
        "flex-block-attn-kernels",
        &[
            "flex-block-attn-mask",
            "flex-block-attn-ptx",
            "flex-block-attn-tile",
        ],
    ),
    ("flex-block-attn-tile", &["flex-block-attn-ptx"]),
    ("flex-block-attn-ptx", &[]),
    ("flex-block-attn-emulator", &["flex-block-attn-ptx"]),
    ("flex-block-attn-cuda", &["flex-block-attn-ptx"]),
    ("flex-block-attn-mask", &[]),
    ("flex-block-attn-cpu", &["flex-block-attn-mask"]),
    (
        "flex-block-attn",
        &[
            "flex-block-attn-cpu",
            "flex-block-attn-cuda",
            "flex-block-attn-kernels",
            "flex-block-attn-mask",
        ],
    ),
    ("flex-block-attn-python", &["flex-block-attn"]),
    // The lab may use every other Rust library; nothing may use the lab.
    (
        "flex-block-attn-lab",
        &[
            "flex-block-attn",
            "flex-block-attn-cpu",
            "flex-block-attn-cuda",
            "flex-block-attn-emulator",
            "flex-block-attn-kernels",
            "flex-block-attn-mask",
            "flex-block-attn-ptx",
            "flex-block-attn-tile",
        ],
    ),
];

/// Lines of a source file at most: beyond that a noun is missing.
const LONGEST_FILE: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn crates_use_only_what_they_may() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let mut seen = BTreeSet::new();
    for package in metadata["packages"].as_array().expect("a list of packages") {
        let name = package["name"].as_str().expect("a name");
        let (_, allowed) = ARROWS
            .iter()
            .find(|(known, _)| *known == name)
            .unwrap_or_else(|| panic!("{name} is not in the list of arrows"));
        for dependency in package["dependencies"].as_array().expect("a list") {
            let used = dependency["name"].as_str().expect("a name");
            if used.starts_with("flex-block-attn") {
                assert!(allowed.contains(&used), "{name} may not use {used}");
            }
        }
        seen.insert(name.to_owned());
    }
    assert_eq!(
        seen.len(),
        ARROWS.len(),
        "a crate of the list is gone: {seen:?}"
    );
}

/// Source files below a folder, by ending.
fn sources(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            sources(&path, ending, found);
        } else if path
            .extension()
            .is_some_and(|extension| extension == ending)
        {
            found.push(path);
        }
    }
}

#[test]
fn every_file_says_what_it_is_and_is_not_long() {
    for (folder, ending, opening) in [
        ("crates", "rs", "//!"),
        ("python", "py", "\"\"\""),
        ("python", "pyi", "\"\"\""),
        ("demo", "py", "\"\"\""),
        ("benchmark", "py", "\"\"\""),
        ("examples", "py", "\"\"\""),
    ] {
        let mut files = Vec::new();
        sources(&root().join(folder), ending, &mut files);
        assert!(!files.is_empty(), "no .{ending} file below {folder}");
        for file in files {
            let text = std::fs::read_to_string(&file).expect("source files are text");
            assert!(
                text.starts_with(opening),
                "{} opens without a word",
                file.display()
            );
            let lines = text.lines().count();
            assert!(
                lines <= LONGEST_FILE,
                "{} has {lines} lines",
                file.display()
            );
        }
    }
}

/// `unsafe` stays in the rooms that argue for it.
#[test]
fn unsafe_code_stays_where_it_is_argued() {
    let mut files = Vec::new();
    sources(&root().join("crates"), "rs", &mut files);
    let rooms = [
        "crates/cpu/src/simd/",
        "crates/cpu/src/view.rs",
        // A row of the output is one task's: the callers of `row_mut` say why.
        "crates/cpu/src/order.rs",
        "crates/cpu/src/forward.rs",
        "crates/cpu/src/backward/",
        // Every line of it calls the driver.
        "crates/cuda/",
        // Launches of kernels in memory of its own.
        "crates/lab/src/gpu.rs",
        // Tensors at emulated addresses, which nobody reads.
        "crates/lab/tests/gpu_steps.rs",
        "crates/flex-block-attn/src/tensor.rs",
        "crates/flex-block-attn/src/attention.rs",
        "crates/flex-block-attn/src/gpu/",
        "crates/python/src/",
        "crates/lab/tests/house.rs",
    ];
    for file in files {
        let text = std::fs::read_to_string(&file).expect("source files are text");
        let code = |line: &&str| !line.trim_start().starts_with("//");
        let has_unsafe = text
            .lines()
            .filter(code)
            .any(|line| line.contains("unsafe ") && !line.contains("unsafe_"));
        let path = file.to_string_lossy().replace('\\', "/");
        let path = path.split("../../").last().unwrap_or(&path);
        assert!(
            !has_unsafe || rooms.iter().any(|room| path.starts_with(room)),
            "{path} has unsafe code: give it a room of its own, or argue for this one here"
        );
    }
}
