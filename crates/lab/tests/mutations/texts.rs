//! Reports, read as a user: kernel, instruction, place in Rust source, warp, address.
