//! Sliding-tile attention over a small video of random tokens: builds the mask, shows it, and
//! compares its time with that of full attention. `cargo run --release --example sliding_tiles`

use std::time::{Duration, Instant};

use flex_block_attn::builders::{self, StaCanvas};
use flex_block_attn::{BlockMask, Options, Plan, Tensor, TensorMut, forward};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // 6 x 6 x 8 tiles of 128 tokens (2 frames of 8 x 8), then 100 tokens of text.
    let canvas = StaCanvas {
        tiles: [6, 6, 8],
        window: [3, 3, 3],
        tile_tokens: 128,
        text_tokens: 100,
    };
    let sliding = builders::sta(&canvas)?;
    let full = builders::full(canvas.extents()?);
    println!("{sliding:?}\n{}", sliding.picture(0, 0, 72));

    let (heads, head_dim) = (1, 64);
    let shape = [1, heads, canvas.extents()?.q_len(), head_dim];
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0)
        .collect();
    let tensor = Tensor::new(&values, shape)?;

    let time = |mask: &BlockMask| -> Result<Duration, Box<dyn std::error::Error>> {
        let plan = Plan::new(mask);
        let mut out = vec![0f32; values.len()];
        let mut lse = vec![0f32; values.len() / head_dim];
        let start = Instant::now();
        forward(
            tensor,
            tensor,
            tensor,
            plan.view(),
            &Options::default(),
            TensorMut::new(&mut out, shape)?,
            TensorMut::new(&mut lse, [shape[0], shape[1], shape[2], 1])?,
        )?;
        Ok(start.elapsed())
    };
    let (all, some) = (time(&full)?, time(&sliding)?);
    println!("full    {all:8.2?}");
    println!(
        "sliding {some:8.2?}: {:.1} times as fast",
        all.as_secs_f64() / some.as_secs_f64()
    );
    Ok(())
}
