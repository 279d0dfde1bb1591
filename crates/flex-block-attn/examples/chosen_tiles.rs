//! Tiles chosen by what they hold, over a small video: the masks of sliding tiles, of chosen tiles
//! and of both, and what each saves. `cargo run --release --example chosen_tiles`

use std::time::Instant;

use flex_block_attn::builders::{self, StaCanvas};
use flex_block_attn::select::{Choice, Scoring, video_tiles};
use flex_block_attn::{BlockMask, Options, Plan, Tensor, TensorMut, forward};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // 4 x 6 x 8 tiles of 128 tokens (2 frames of 8 x 8), then 100 tokens of text.
    let canvas = StaCanvas {
        tiles: [4, 6, 8],
        window: [3, 1, 3],
        tile_tokens: 128,
        text_tokens: 100,
    };
    let shape = [1, 1, canvas.extents()?.q_len(), 64];
    // Tokens whose meaning drifts slowly, so that tiles differ.
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|i| ((i / 64) as f32 * 1e-3 * (1 + i % 64) as f32).sin())
        .collect();
    let tensor = Tensor::new(&values, shape)?;

    let start = Instant::now();
    let choice = Choice::new(12, Scoring::Importance { lambda: 0.7 });
    let chosen = video_tiles(tensor, tensor, &canvas, &choice)?;
    println!("tiles chosen in {:.2?}", start.elapsed());
    let sliding = builders::sta(&canvas)?;
    let both = chosen.union(&sliding)?;
    println!("{}", both.picture(0, 0, 72));

    let full = builders::full(canvas.extents()?);
    for (name, mask) in [
        ("full", &full),
        ("sliding", &sliding),
        ("chosen", &chosen),
        ("both", &both),
    ] {
        let seconds = attend(tensor, mask)?;
        println!("{name:8} density {:.3}, {seconds:.2} s", mask.density());
    }
    Ok(())
}

/// Seconds of an attention under a mask.
fn attend(tensor: Tensor<'_>, mask: &BlockMask) -> Result<f64, Box<dyn std::error::Error>> {
    let shape = tensor.shape();
    let rows = shape[..3].iter().product();
    let (mut out, mut lse) = (vec![0f32; rows * shape[3]], vec![0f32; rows]);
    let plan = Plan::new(mask);
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
    Ok(start.elapsed().as_secs_f64())
}
