//! `lab kernels`: a table of all kernels, assembled.

use std::error::Error;
use std::path::{Path, PathBuf};

use flex_block_attn_kernels as kernels;
use flex_block_attn_lab::ptxas::assemble;
use flex_block_attn_lab::rules;
use flex_block_attn_ptx::{Kernel, Module, print, verify};

pub const USAGE: &str = "lab kernels [--only TEXT] [--ptx DIR]

Lists all kernels in all configs, and those of some masks' expressions, each verified, printed and
assembled by ptxas
(PTXAS=path/to/ptxas, or `make .venv/.ptxas`): registers, spills, shared bytes,
lines of PTX, warnings.

  --only TEXT  only kernels whose names hold TEXT
  --ptx DIR    writes each kernel's PTX to DIR/NAME.ptx";

pub fn run(words: &[String]) -> Result<(), Box<dyn Error>> {
    let (mut only, mut folder) = (String::new(), None);
    for pair in words.chunks(2) {
        match pair {
            [word, text] if word == "--only" => only.clone_from(text),
            [word, path] if word == "--ptx" => folder = Some(PathBuf::from(path)),
            _ => return Err(USAGE.into()),
        }
    }
    println!(
        "{:32} {:>9} {:>6} {:>8} {:>7}  warnings",
        "kernel", "registers", "spills", "shared", "lines"
    );
    for kernel in kernels::all().into_iter().chain(rules::kernels()) {
        if kernel.name.contains(&only) {
            row(kernel, folder.as_deref())?;
        }
    }
    Ok(())
}

fn row(kernel: Kernel, folder: Option<&Path>) -> Result<(), Box<dyn Error>> {
    verify(&kernel)?;
    let (name, shared) = (kernel.name.clone(), kernel.shared_bytes);
    let text = print(&Module {
        kernels: vec![kernel],
    });
    if let Some(folder) = folder {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join(format!("{name}.ptx")), &text)?;
    }
    let report = assemble(&text)?;
    let entry = report
        .entry(&name)
        .ok_or("ptxas did not report the kernel")?;
    println!(
        "{name:32} {:>9} {:>6} {shared:>8} {:>7}  {}",
        entry.registers,
        entry.spill_stores + entry.spill_loads,
        text.lines().count(),
        report.warnings.join("; ")
    );
    Ok(())
}
