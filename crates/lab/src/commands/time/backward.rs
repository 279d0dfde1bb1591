//! The backward pass on a mask: all of it, and its main kernel alone in each order, deterministic, too.

use flex_block_attn::{Extents, Plan, builders};
use flex_block_attn_kernels::backward::{self, Config, Order, Workspace, finish, prepare};
use flex_block_attn_kernels::{Element, Strides, forward};
use flex_block_attn_lab::gpu::Gpu;

use super::{Mask, Measured, Result, numbers};

/// Rounds in which all are timed, one after the other: a GPU gets warm.
const ROUNDS: usize = 2;

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

    let before = forward::Args {
        q: tensor(gpu.alloc_with(&numbers(1, count))?),
        k: tensor(gpu.alloc_with(&numbers(2, count))?),
        v: tensor(gpu.alloc_with(&numbers(3, count))?),
        out: tensor(gpu.alloc(2 * count)?),
        lse: gpu.alloc(4 * heads as usize * tokens)?,
        plan: gpu.alloc_with(&words)?,
        layout: plan.layout(),
        batch: 1,
        heads,
        kv_heads: heads,
        scale,
        counter: gpu.alloc(4)?,
        blocks: gpu.device().multiprocessors(),
        tables: &[],
        canvas: None,
    };
    let config =
        forward::Config::choose(element, head_dim, block, block, None).ok_or(unsupported)?;
    gpu.zero_words(before.counter, 1)?;
    gpu.launch(gpu.load(&config.kernel())?, &config.launch(&before))?;

    let workspace = Workspace::new(tokens);
    let line = 4 * heads as usize * workspace.line;
    let sums = heads as usize * workspace.units * 64 * head_dim as usize;
    let tickets = workspace.tickets(heads as usize, head_dim as usize);
    let q_len = tokens as u32;
    let first = prepare::Args {
        out: before.out,
        dout: tensor(gpu.alloc_with(&numbers(4, count))?),
        lse: before.lse,
        dlse: 0,
        log2: gpu.alloc(line)?,
        delta: gpu.alloc(line)?,
        batch: 1,
        heads,
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
        dq: gpu.alloc(4 * sums)?,
        tickets: gpu.alloc(4 * tickets)?,
        plan: before.plan,
        layout: before.layout,
        batch: 1,
        heads,
        kv_heads: heads,
        scale,
        tables: &[],
        canvas: None,
    };
    let last = finish::Args {
        sums: main.dq,
        dq: tensor(gpu.alloc(2 * count)?),
        batch: 1,
        heads,
        q_len,
        scale,
        canvas: None,
    };

    let chosen = Config::choose(element, head_dim, block, block, None).ok_or(unsupported)?;
    let (prepare, finish) = (
        prepare::Config {
            element,
            head_dim,
            boxes: None,
        },
        finish::Config {
            element,
            head_dim,
            boxes: None,
        },
    );
    let all = [
        (gpu.load(&prepare.kernel())?, prepare.launch(&first)),
        (gpu.load(&chosen.kernel())?, chosen.launch(&main)),
        (gpu.load(&finish.kernel())?, finish.launch(&last)),
    ];
    let mut variants = Vec::new();
    for order in Order::all() {
        let config = Config { order, ..chosen };
        if Config::all().contains(&config)
            || order
                == (Order {
                    spread: false,
                    ..chosen.order
                })
        {
            let name = match order {
                Order { settled: false, .. } => "main unsettled",
                Order { outgoing: 2, .. } => "main out2",
                Order { spread: false, .. } => "main sorted",
                _ => "main",
            };
            variants.push((name, gpu.load(&config.kernel())?, config.launch(&main)));
        }
    }
    let repeating = Config {
        deterministic: true,
        ..chosen
    };
    let (ordered, ordered_launch) = (gpu.load(&repeating.kernel())?, repeating.launch(&main));

    let pairs = (tokens as f64).powi(2) * mask.density();
    let work = 10.0 * pairs * f64::from(head_dim * heads);
    let mut results = Vec::new();
    for _ in 0..ROUNDS {
        let times = gpu.time(1, 10, || {
            gpu.zero_words(main.dq, sums)?;
            let mut each = all.iter();
            each.try_for_each(|(function, launch)| gpu.launch(function, launch))
        })?;
        results.push(("whole".to_owned(), Measured { times, work }));
        for (name, function, launch) in &variants {
            gpu.zero_words(main.dq, sums)?;
            let times = gpu.time(1, 10, || gpu.launch(function, launch))?;
            results.push(((*name).to_owned(), Measured { times, work }));
        }
        gpu.zero_words(main.dq, sums)?;
        let times = gpu.time(1, 10, || {
            gpu.zero_words(main.tickets, tickets)?;
            gpu.launch(ordered, &ordered_launch)
        })?;
        results.push(("main deterministic".to_owned(), Measured { times, work }));
    }
    Ok(results)
}
