//! The developers' tool. In: a command. Out: text. Called by developers:
//!
//! ```sh
//! cargo run -p flex-block-attn-lab -- kernels            # a table of all kernels, assembled
//! cargo run -p flex-block-attn-lab -- kernels --ptx DIR  # writes each one's PTX besides
//! cargo run -p flex-block-attn-lab --release -- emulate  # how fast the emulator is
//! cargo run -p flex-block-attn-lab --release -- load     # compiles and loads all, on a GPU
//! cargo run -p flex-block-attn-lab --release -- time     # times them there
//! ```
#![forbid(unsafe_code)]

mod commands {
    pub mod emulate;
    pub mod kernels;
    pub mod load;
    pub mod time;
}

use std::process::ExitCode;

use commands::{emulate, kernels, load, time};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, words) = match arguments.split_first() {
        Some((command, words)) => (command.as_str(), words),
        None => ("", &[][..]),
    };
    let result = match command {
        "kernels" => kernels::run(words),
        "emulate" => emulate::run(words),
        "load" => load::run(words),
        "time" => time::run(words),
        _ => Err([kernels::USAGE, emulate::USAGE, load::USAGE, time::USAGE]
            .join("\n\n")
            .into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
