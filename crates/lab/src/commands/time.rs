//! `lab time`: how long kernels take on a GPU, on random data.

mod backward;
mod forward;
mod select;

use std::error::Error;

use flex_block_attn::{Extents, PlanLayout};
use flex_block_attn_kernels::backward::{Workspace, prepare};
use flex_block_attn_kernels::forward::Tensor;
use flex_block_attn_kernels::{Element, Strides, gemm, plan, pool};
use flex_block_attn_lab::gpu::{Gpu, Times};
use half::bf16;

pub const USAGE: &str = "lab time [CASE]...

Times kernels on the first GPU, by events, on random bfloat16 data: those cases whose names
start with a CASE, or all. Prints case, median, shortest and longest milliseconds of a call,
and its operations (products) or bytes (all else), tab-separated.";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Rounds in which kernels for the same are timed, one after the other: a GPU gets warm.
const ROUNDS: usize = 2;

/// A measurement: its times, and the work of a call.
struct Measured {
    times: Times,
    work: f64,
}

/// Gives measurements, each with what its name has besides the case's.
type Case = (
    String,
    Box<dyn Fn(&mut Gpu) -> Result<Vec<(String, Measured)>>>,
);

/// Name, heads, tokens, head dimension, tokens of a block, density.
type Mask = (&'static str, u32, usize, u32, u32, f64);

/// Masks for the forward pass.
const MASKS: [Mask; 14] = [
    ("dense h24 s15360", 24, 15_360, 128, 384, 1.0),
    ("dense h24 s30720", 24, 30_720, 128, 384, 1.0),
    ("random384 0.6 h24 s30720", 24, 30_720, 128, 384, 0.6),
    ("random384 0.2 h24 s30720", 24, 30_720, 128, 384, 0.2),
    ("random128 0.2 h24 s30720", 24, 30_720, 128, 128, 0.2),
    ("random64 0.2 h24 s30720", 24, 30_720, 128, 64, 0.2),
    ("random32 0.2 h24 s15360", 24, 15_360, 128, 32, 0.2),
    ("dense h1 s11520", 1, 11_520, 128, 384, 1.0),
    ("random384 0.6 h1 s11520", 1, 11_520, 128, 384, 0.6),
    ("dense h1 s61440", 1, 61_440, 128, 384, 1.0),
    ("dense h24 s15360 d64", 24, 15_360, 64, 384, 1.0),
    ("random384 0.2 h24 s30720 d64", 24, 30_720, 64, 384, 0.2),
    ("random128 0.2 h24 s30720 d64", 24, 30_720, 64, 128, 0.2),
    ("random64 0.2 h24 s30720 d64", 24, 30_720, 64, 64, 0.2),
];

/// Masks for the backward pass.
const BACKWARD_MASKS: [Mask; 9] = [
    ("dense h24 s15360", 24, 15_360, 128, 384, 1.0),
    ("dense h24 s30720", 24, 30_720, 128, 384, 1.0),
    ("random384 0.6 h24 s30720", 24, 30_720, 128, 384, 0.6),
    ("random384 0.2 h24 s30720", 24, 30_720, 128, 384, 0.2),
    ("random128 0.2 h24 s30720", 24, 30_720, 128, 128, 0.2),
    ("random64 0.2 h24 s30720", 24, 30_720, 128, 64, 0.2),
    ("dense h1 s61440", 1, 61_440, 128, 384, 1.0),
    ("dense h24 s15360 d64", 24, 15_360, 64, 384, 1.0),
    ("random384 0.2 h24 s30720 d64", 24, 30_720, 64, 384, 0.2),
];

/// A case of one measurement.
fn case(name: String, measure: impl Fn(&mut Gpu) -> Result<Measured> + 'static) -> Case {
    let one = move |gpu: &mut Gpu| Ok(vec![(String::new(), measure(gpu)?)]);
    (name, Box::new(one))
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for size in [4096, 8192] {
        let name = format!("gemm {size}");
        cases.push(case(name, move |gpu| product(gpu, size)));
    }
    for mask in MASKS {
        let measure = move |gpu: &mut Gpu| forward::forward(gpu, mask);
        cases.push((mask.0.to_owned(), Box::new(measure)));
    }
    for mask in BACKWARD_MASKS {
        let measure = move |gpu: &mut Gpu| backward::backward(gpu, mask);
        cases.push((format!("backward {}", mask.0), Box::new(measure)));
    }
    for (heads, rows, columns) in [(24, 240, 240), (16, 361, 361)] {
        let name = format!("plan h{heads} {rows}x{columns}");
        cases.push(case(name, move |gpu| plan(gpu, heads, rows, columns)));
    }
    cases.push(case("delta h24 s30720".to_owned(), rows_of_products));
    for block in [64, 384] {
        let name = format!("pool h24 s30720 b{block}");
        cases.push(case(name, move |gpu| means(gpu, block)));
    }
    for shared in [false, true] {
        let name = format!("select h16 31x45x80{}", if shared { " shared" } else { "" });
        cases.push((name, Box::new(move |gpu| select::select(gpu, shared))));
    }
    cases
}

pub fn run(words: &[String]) -> Result<()> {
    let wanted =
        |name: &str| words.is_empty() || words.iter().any(|word| name.starts_with(word.as_str()));
    let chosen: Vec<Case> = cases()
        .into_iter()
        .filter(|(name, _)| wanted(name))
        .collect();
    if chosen.is_empty() {
        return Err(USAGE.into());
    }
    for (name, case) in chosen {
        // Memory of a case is freed with its GPU.
        for (what, Measured { times, work }) in case(&mut Gpu::find()?)? {
            let Times { median, min, max } = times;
            let name = format!("{name} {what}");
            println!("{}\t{median:.5}\t{min:.5}\t{max:.5}\t{work:e}", name.trim());
        }
    }
    Ok(())
}

fn product(gpu: &mut Gpu, size: u32) -> Result<Measured> {
    let config = gemm::Config {
        element: Element::Bf16,
    };
    let count = size as usize * size as usize;
    let args = gemm::Args {
        a: gpu.alloc_with(&numbers(1, count))?,
        b: gpu.alloc_with(&numbers(2, count))?,
        c: gpu.alloc(2 * count)?,
        m: size,
        n: size,
        k: size,
    };
    let (function, launch) = (gpu.load(&config.kernel())?, config.launch(&args));
    let times = gpu.time(1, 30, || gpu.launch(function, &launch))?;
    Ok(Measured {
        times,
        work: 2.0 * f64::from(size).powi(3),
    })
}

/// Both launches; of the mask's blocks 3 in 10 are kept.
fn plan(gpu: &mut Gpu, heads: usize, rows: usize, columns: usize) -> Result<Measured> {
    let layout = PlanLayout {
        extents: Extents::new(rows * 128, columns * 128, 128, 128)?,
        batch: 1,
        heads,
    };
    let blocks = heads * rows * columns;
    let mask: Vec<u8> = numbers(1, blocks)
        .chunks_exact(2)
        .map(|number| u8::from(bf16::from_le_bytes([number[0], number[1]]).to_f32() > 0.524))
        .collect();
    let args = plan::Args {
        mask: plan::Mask::Bytes {
            address: gpu.alloc_with(&mask)?,
            strides: [blocks as u64, (rows * columns) as u64, columns as u64, 1],
        },
        layout,
        plan: gpu.alloc(4 * layout.words())?,
        canvas: None,
    };
    let mut launches = Vec::new();
    for config in plan::Config::of(&args) {
        launches.push((gpu.load(&config.kernel())?, config.launch(&args)));
    }
    let times = gpu.time(20, 30, || {
        let mut each = launches.iter();
        each.try_for_each(|(function, launch)| gpu.launch(function, launch))
    })?;
    Ok(Measured {
        times,
        work: blocks as f64,
    })
}

const HEADS: u32 = 24;
const TOKENS: u32 = 30_720;
const HEAD_DIM: u32 = 128;

fn tensor(gpu: &mut Gpu, seed: u64) -> Result<Tensor> {
    let strides = Strides {
        row: HEAD_DIM.into(),
        head: (TOKENS * HEAD_DIM).into(),
        batch: (HEADS * TOKENS * HEAD_DIM).into(),
    };
    let address = gpu.alloc_with(&numbers(seed, strides.batch as usize))?;
    Ok(Tensor { address, strides })
}

fn rows_of_products(gpu: &mut Gpu) -> Result<Measured> {
    let config = prepare::Config {
        element: Element::Bf16,
        head_dim: HEAD_DIM,
        deterministic: false,
        boxes: None,
    };
    let rows = HEADS * TOKENS;
    let line = 4 * HEADS as usize * Workspace::new(TOKENS as usize).line;
    let args = prepare::Args {
        out: tensor(gpu, 1)?,
        dout: tensor(gpu, 2)?,
        lse: gpu.alloc_with(&numbers(3, 2 * rows as usize))?,
        dlse: 0,
        log2: gpu.alloc(line)?,
        delta: gpu.alloc(line)?,
        steps: 0,
        bounds: 0,
        sums: gpu.alloc((4 * rows * HEAD_DIM) as usize)?,
        batch: 1,
        heads: HEADS,
        kv_heads: HEADS,
        q_len: TOKENS,
        canvas: None,
    };
    let (function, launch) = (gpu.load(&config.kernel())?, config.launch(&args));
    let times = gpu.time(1, 30, || gpu.launch(function, &launch))?;
    Ok(Measured {
        times,
        work: f64::from(rows * (8 * HEAD_DIM + 12)),
    })
}

fn means(gpu: &mut Gpu, block: u32) -> Result<Measured> {
    let config = pool::Config {
        element: Element::Bf16,
        head_dim: HEAD_DIM,
    };
    let (rows, blocks) = (HEADS * TOKENS, HEADS * TOKENS / block);
    let pooled = pool::Pooled {
        tensor: tensor(gpu, 1)?,
        heads: HEADS,
        means: gpu.alloc((4 * HEAD_DIM * blocks) as usize)?,
    };
    let args = pool::Args {
        tensors: [pooled, pool::Pooled { heads: 0, ..pooled }],
        batch: 1,
        tiles: pool::Tiles::blocks(TOKENS, block),
    };
    let (function, launch) = (gpu.load(&config.kernel())?, config.launch(&args));
    let times = gpu.time(1, 30, || gpu.launch(function, &launch))?;
    Ok(Measured {
        times,
        work: f64::from(2 * rows * HEAD_DIM) + f64::from(4 * blocks * HEAD_DIM),
    })
}

/// Numbers by chance, about normal, as bfloat16.
fn numbers(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut number = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // The sum of four uniform numbers below 2^16, brought to mean 0 and variance 1.
        let sum: u64 = (0..4).map(|part| (state >> (16 * part)) & 0xffff).sum();
        (sum as f32 - 131_070.0) / 37_837.0
    };
    let words = (0..count).flat_map(|_| bf16::from_f32(number()).to_bits().to_le_bytes());
    words.collect()
}
