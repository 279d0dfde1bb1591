//! How long masks with an expression take, and their plans: a million tokens and fewer. Run as
//! `cargo run --release -p flex-block-attn-mask --example expressions`.

use std::time::Instant;

use flex_block_attn_mask::expression::{Expression, Number, Table, Truth, kv, q};
use flex_block_attn_mask::{BlockMask, Extents, Plan};

/// A window of tokens of a (time, height, width) canvas.
fn window([height, width]: [i32; 2], reach: [i32; 3]) -> Truth {
    let places = |token: Number| {
        let plane = height * width;
        [
            token.clone() / plane,
            token.clone() % plane / width,
            token % width,
        ]
    };
    let pairs = places(q()).into_iter().zip(places(kv())).zip(reach);
    pairs.fold(Truth::from(true), |all, ((a, b), reach)| {
        all & (a - b).abs().at_most(reach)
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for (tokens, block) in [(30_720, 128), (98_304, 128), (1 << 20, 512)] {
        let extents = Extents::new(tokens, tokens, block, block)?;
        let document = |length: usize| {
            let values = (0..tokens).map(|token| (token / length) as i32).collect();
            let table = Table::new(&[tokens as u32], values)?;
            Ok::<_, flex_block_attn_mask::MaskError>(table.at([q()]).equals(table.at([kv()])))
        };
        let causal = || kv().at_most(q());
        let masks = [
            ("causal", causal()),
            ("document", document(3000)?),
            ("causal document", causal() & document(3000)?),
            ("3-D window", window([64, 96], [2, 6, 6])),
            (
                "dilated",
                causal() & ((q() - kv()) % 4).equals(0) & (q() - kv()).less_than(4096),
            ),
        ];
        for (name, condition) in masks {
            let expression = Expression::new(&condition)?;
            let mut best = [f64::INFINITY; 2];
            let mut text = String::new();
            for _ in 0..5 {
                let start = Instant::now();
                let mask = BlockMask::from_expression(extents, 1, 1, &expression)?;
                best[0] = best[0].min(start.elapsed().as_secs_f64());
                let start = Instant::now();
                let plan = Plan::new(&mask);
                best[1] = best[1].min(start.elapsed().as_secs_f64());
                text = format!(
                    "{} blocks, {} partial, plan {} MB",
                    mask.count(),
                    mask.count_partial(),
                    plan.words().len() / 250_000
                );
            }
            let [blocks, plan] = best.map(|seconds| 1e3 * seconds);
            println!("{tokens:8} {name:16} {blocks:8.2} ms, plan {plan:6.2} ms: {text}");
        }
    }
    Ok(())
}
