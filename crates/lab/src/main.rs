//! The developers' tool. In: a command. Out: text. Called by developers:
//!
//! ```sh
//! cargo run -p flex-block-attn-lab -- kernels            # a table of all kernels, assembled
//! cargo run -p flex-block-attn-lab -- kernels --ptx DIR  # writes each one's PTX besides
//! cargo run --release -p flex-block-attn-lab -- emulate  # how fast the emulator is
//! ```
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use flex_block_attn_emulator::Options;
use flex_block_attn_kernels as kernels;
use flex_block_attn_lab::emulated::Forward;
use flex_block_attn_lab::ptxas::assemble;
use flex_block_attn_ptx::{Kernel, Module, print, verify};

const USAGE: &str = "usage: lab kernels [--only TEXT] [--ptx DIR]
       lab emulate

kernels: lists all kernels in all configs, each verified, printed and assembled by ptxas
(PTXAS=path/to/ptxas, or `make .venv/.ptxas`): registers, spills, shared bytes,
lines of PTX, warnings.

  --only TEXT  only kernels whose names hold TEXT
  --ptx DIR    writes each kernel's PTX to DIR/NAME.ptx

emulate: runs attention forward in the emulator, one thread block over 16 tiles of
keys, and prints the seconds that a step of 128 queries by 128 keys takes.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let mut words = arguments.iter();
    match (words.next().map(String::as_str), words.len()) {
        (Some("kernels"), _) => list(words),
        (Some("emulate"), 0) => time_emulator(),
        _ => Err(USAGE.into()),
    }
}

/// A line for each way of running: the best of three runs, all of them checked.
fn time_emulator() -> Result<(), Box<dyn std::error::Error>> {
    const STEPS: usize = 16;
    let setup = Forward {
        heads: 1,
        group: 1,
        head_dim: 128,
        kv_tile: 128,
        q_block: 128,
        kv_block: 128,
        kv_len: 128 * STEPS,
        lists: vec![(0..STEPS).collect()],
        scale: 0.125,
    }
    .setup();
    println!("{:24} {:>14}", setup.kernel.name, "seconds a step");
    for options in Options::all(1) {
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            setup.run(&options)?;
            best = best.min(start.elapsed().as_secs_f64() / STEPS as f64);
        }
        let way = format!("{:?}, {:?}", options.mode, options.schedule);
        println!("{way:24} {best:>14.4}");
    }
    Ok(())
}

fn list<'a>(mut words: impl Iterator<Item = &'a String>) -> Result<(), Box<dyn std::error::Error>> {
    let (mut only, mut folder) = (String::new(), None);
    while let Some(word) = words.next() {
        match (word.as_str(), words.next()) {
            ("--only", Some(text)) => only.clone_from(text),
            ("--ptx", Some(path)) => folder = Some(PathBuf::from(path)),
            _ => return Err(USAGE.into()),
        }
    }
    println!(
        "{:32} {:>9} {:>6} {:>8} {:>7}  warnings",
        "kernel", "registers", "spills", "shared", "lines"
    );
    for kernel in kernels::all() {
        if kernel.name.contains(&only) {
            row(kernel, folder.as_deref())?;
        }
    }
    Ok(())
}

fn row(kernel: Kernel, folder: Option<&std::path::Path>) -> Result<(), Box<dyn std::error::Error>> {
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
