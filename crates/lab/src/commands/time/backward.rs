//! The backward pass on a mask: all of it, deterministic, too, and its main kernel alone, with thread
//! blocks that start here and there.

use flex_block_attn::{Extents, Plan, builders};
use flex_block_attn_kernels::backward::{self, Config, WINDOW, Workspace, bounds, finish, prepare};
use flex_block_attn_kernels::cut::InParts;
use flex_block_attn_kernels::{Element, Strides, forward};
use flex_block_attn_lab::gpu::Gpu;

use super::{Mask, Measured, ROUNDS, Result, numbers};

/// Queries among which thread blocks start that walk all.
const WINDOWS: [u32; 5] = [0, 2048, WINDOW, 16_384, 1 << 20];

/// Times of one mask, with what was timed. The forward pass comes first, for its output and lse.
pub(super) fn backward(gpu: &mut Gpu, mask: Mask) -> Result<Vec<(String, Measured)>> {
    let (_, heads, tokens, head_dim, block, density) = mask;
    let extents = Extents::new(tokens, tokens, block as usize, block as usize)?;
    let mask = builders::random(extents, 1, heads as usize, density, 1)?;
    let plan = Plan::new(&mask);
    let words = plan.words().iter().flat_map(|word| word.to_le_bytes());
    let words: Vec<u8> = words.collect();
    let (element, scale) = (Element::Bf16, 1.0 / (head_dim as f32).sqrt());
    let head = u64::from(head_dim) * tokens as u64;
    let count = head as usize * heads as usize;
    let strides = Strides {
        row: head_dim.into(),
        head,
        batch: count as u64,
    };
    let tensor = |address| forward::Tensor { address, strides };
    let unsupported = "the kernels do not take it";

    let lse = gpu.alloc(4 * heads as usize * tokens)?;
    let before = forward::Args {
        q: tensor(gpu.alloc_with(&numbers(1, count))?),
        k: tensor(gpu.alloc_with(&numbers(2, count))?),
        v: tensor(gpu.alloc_with(&numbers(3, count))?),
        out: tensor(gpu.alloc(2 * count)?),
        lse: Some(lse),
        plan: gpu.alloc_with(&words)?,
        layout: plan.layout(),
        alike: false,
        batch: 1,
        heads,
        kv_heads: heads,
        scale,
        counter: gpu.alloc_with(&[0u8; 4])?,
        blocks: gpu.device().multiprocessors(),
        in_parts: None,
        tables: &[],
        canvas: None,
    };
    let config =
        forward::Config::choose(element, head_dim, block, block, None).ok_or(unsupported)?;
    gpu.launch(gpu.load(&config.kernel())?, &config.launch(&before))?;

    let workspace = Workspace::new(tokens);
    let line = 4 * heads as usize * workspace.line;
    let sums = heads as usize * workspace.units * 64 * head_dim as usize;
    let bound_words = heads as usize * bounds::WORDS;
    let q_len = tokens as u32;
    let shape = [1, heads as usize, heads as usize, head_dim as usize];
    let cut = backward::cut(extents, shape, gpu.device().multiprocessors()).ok_or(unsupported)?;
    let bounding = bounds::Args {
        k: before.k,
        v: before.v,
        bounds: gpu.alloc(4 * bound_words)?,
        batch: 1,
        heads,
        len: tokens as u32,
    };
    let first = prepare::Args {
        out: before.out,
        dout: tensor(gpu.alloc_with(&numbers(4, count))?),
        lse,
        dlse: 0,
        log2: gpu.alloc(line)?,
        delta: gpu.alloc(line)?,
        steps: gpu.alloc(line)?,
        bounds: bounding.bounds,
        sums: gpu.alloc(4 * sums)?,
        batch: 1,
        heads,
        kv_heads: heads,
        q_len,
        canvas: None,
    };
    let main = backward::Args {
        q: before.q,
        k: before.k,
        v: before.v,
        dout: first.dout,
        dk: tensor(gpu.alloc(2 * count)?),
        dv: tensor(gpu.alloc(2 * count)?),
        lse: first.log2,
        delta: first.delta,
        dq: first.sums,
        steps: first.steps,
        window: WINDOW,
        plan: before.plan,
        layout: before.layout,
        batch: 1,
        heads,
        kv_heads: heads,
        scale,
        tables: &[],
        in_parts: None,
        canvas: None,
    };
    let slots = gpu.alloc(4 * backward::slot_numbers(cut, head_dim as usize).max(1))?;
    let whole_pass = backward::Args {
        in_parts: (cut.tiles > 0).then_some(InParts { cut, slots }),
        ..main
    };
    let last = finish::Args {
        sums: main.dq,
        steps: first.steps,
        dq: tensor(gpu.alloc(2 * count)?),
        batch: 1,
        heads,
        q_len,
        scale,
        canvas: None,
    };

    let choose = |deterministic| {
        Config::choose(element, head_dim, block, block, None, deterministic).ok_or(unsupported)
    };
    let mut passes = Vec::new();
    for deterministic in [false, true] {
        let bounds = bounds::Config { element, head_dim };
        let prepare = prepare::Config {
            element,
            head_dim,
            deterministic,
            boxes: None,
        };
        let chosen = choose(deterministic)?;
        let finish = finish::Config {
            element,
            head_dim,
            deterministic,
            boxes: None,
        };
        let mut all = vec![
            (gpu.load(&prepare.kernel())?, prepare.launch(&first)),
            (gpu.load(&chosen.kernel())?, chosen.launch(&whole_pass)),
            (gpu.load(&finish.kernel())?, finish.launch(&last)),
        ];
        if let Some((join, launch)) = chosen.join(&whole_pass) {
            all.insert(2, (gpu.load(&join.kernel())?, launch));
        }
        if deterministic {
            all.insert(0, (gpu.load(&bounds.kernel())?, bounds.launch(&bounding)));
        }
        passes.push((
            if deterministic {
                "deterministic"
            } else {
                "whole"
            },
            all,
        ));
    }
    let mut mains = Vec::new();
    let chosen = choose(false)?;
    let like = |config: &Config| {
        let kind = (config.element, config.head_dim, config.deterministic);
        kind == (element, head_dim, false)
            && !config.canvas
            && (config.piece == 64 || *config == chosen)
            && block.is_multiple_of(config.piece)
    };
    for config in Config::all().into_iter().filter(like) {
        mains.push((config, gpu.load(&config.kernel())?));
    }

    let pairs = (tokens as f64).powi(2) * mask.density();
    let work = 10.0 * pairs * f64::from(head_dim * heads);
    let mut results = Vec::new();
    for _ in 0..ROUNDS {
        for (name, all) in &passes {
            let times = gpu.time(1, 10, || {
                // Bounds are made by a launch of their own.
                if *name == "deterministic" {
                    gpu.zero_words(bounding.bounds, bound_words)?;
                }
                let mut each = all.iter();
                each.try_for_each(|(function, launch)| gpu.launch(function, launch))
            })?;
            results.push(((*name).to_owned(), Measured { times, work }));
        }
        for (config, function) in &mains {
            // What depends on where lists of all queries are started.
            for window in WINDOWS.iter().filter(|&&w| density == 1.0 || w == WINDOW) {
                let window = *window;
                gpu.zero_words(main.dq, sums)?;
                let launch = config.launch(&backward::Args { window, ..main });
                let times = gpu.time(1, 10, || gpu.launch(function, &launch))?;
                let name = format!("{}, window {window}", config.kernel().name);
                results.push((name, Measured { times, work }));
            }
        }
    }
    Ok(results)
}
