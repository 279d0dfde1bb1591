//! The forward pass on a mask, by every kernel that takes it.

use flex_block_attn::{Extents, Plan, builders};
use flex_block_attn_kernels::forward::{Args, Config, Tensor};
use flex_block_attn_kernels::{Element, Strides};
use flex_block_attn_lab::gpu::Gpu;

use super::{Mask, Measured, ROUNDS, Result, numbers};

/// Times of one mask, with the kernels' names; one is marked as chosen.
pub(super) fn forward(gpu: &mut Gpu, mask: Mask) -> Result<Vec<(String, Measured)>> {
    let (_, heads, tokens, head_dim, block, density) = mask;
    let extents = Extents::new(tokens, tokens, block as usize, block as usize)?;
    let mask = builders::random(extents, 1, heads as usize, density, 1)?;
    let plan = Plan::new(&mask);
    let words = plan.words().iter().flat_map(|word| word.to_le_bytes());
    let words: Vec<u8> = words.collect();
    let head = u64::from(head_dim) * tokens as u64;
    let count = head as usize * heads as usize;
    let strides = Strides {
        row: head_dim.into(),
        head,
        batch: count as u64,
    };
    let tensor = |address| Tensor { address, strides };
    let args = Args {
        q: tensor(gpu.alloc_with(&numbers(1, count))?),
        k: tensor(gpu.alloc_with(&numbers(2, count))?),
        v: tensor(gpu.alloc_with(&numbers(3, count))?),
        out: tensor(gpu.alloc(2 * count)?),
        lse: Some(gpu.alloc(4 * heads as usize * tokens)?),
        plan: gpu.alloc_with(&words)?,
        layout: plan.layout(),
        alike: false,
        batch: 1,
        heads,
        kv_heads: heads,
        scale: 1.0 / (head_dim as f32).sqrt(),
        counter: gpu.alloc_with(&[0u8; 4])?,
        blocks: gpu.device().multiprocessors(),
        in_parts: None,
        tables: &[],
        canvas: None,
    };
    let chosen = Config::choose(Element::Bf16, head_dim, block, block, None);
    let fits = |config: &Config| {
        (config.element, config.head_dim, config.canvas) == (Element::Bf16, head_dim, false)
            && config.takes(block, block)
    };
    let mut kernels = Vec::new();
    for config in Config::all().into_iter().filter(fits) {
        let mut name = config.kernel().name;
        if Some(config) == chosen {
            name += ", chosen";
        }
        kernels.push((name, gpu.load(&config.kernel())?, config.launch(&args)));
    }
    let pairs = (tokens as f64).powi(2) * mask.density();
    let work = 4.0 * pairs * f64::from(head_dim * heads);
    let mut results = Vec::new();
    for _ in 0..ROUNDS {
        for (name, function, launch) in &kernels {
            let times = gpu.time(1, 10, || gpu.launch(function, launch))?;
            results.push((name.clone(), Measured { times, work }));
        }
    }
    Ok(results)
}
