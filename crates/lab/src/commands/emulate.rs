//! `lab emulate`: how fast the emulator is.

use std::error::Error;
use std::time::Instant;

use flex_block_attn::{Extents, builders};
use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::{Element, forward};
use flex_block_attn_lab::problems::Forward;

pub const USAGE: &str = "lab emulate

Runs attention forward in the emulator, one thread block over 16 tiles of keys, and
prints the seconds that a step of 128 queries by 128 keys takes.";

const STEPS: usize = 16;

/// A line for each way of running: the best of three runs, all of them checked.
pub fn run(words: &[String]) -> Result<(), Box<dyn Error>> {
    if !words.is_empty() {
        return Err(USAGE.into());
    }
    let tokens = 128 * STEPS;
    let extents = Extents::new(128, tokens, 128, 128)?;
    let config = forward::Config {
        element: Element::Bf16,
        head_dim: 128,
        rows: forward::Rows::Whole(128),
        kv_tile: 128,
        piece: 128,
        mask: None,
        canvas: false,
    };
    let setup = Forward::new(config, builders::full(extents)).setup();
    println!("{:24} {:>14}", setup.kernel().name, "seconds a step");
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
