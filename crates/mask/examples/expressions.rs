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

/// Times of this many runs, of which the median counts.
const RUNS: usize = 21;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The last canvas has frames that blocks do not divide.
    for (tokens, block, canvas) in [
        (30_720, 128, [40, 48]),
        (98_304, 128, [64, 96]),
        (1 << 20, 512, [128, 128]),
        (75_600, 128, [45, 80]),
    ] {
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
            ("3-D window", window(canvas, [2, 6, 6])),
            (
                "dilated",
                causal() & ((q() - kv()) % 4).equals(0) & (q() - kv()).less_than(4096),
            ),
        ];
        for (name, condition) in masks {
            let expression = Expression::new(&condition)?;
            let mut taken = [Vec::new(), Vec::new()];
            let mut text = String::new();
            for _ in 0..RUNS {
                let start = Instant::now();
                let mask = BlockMask::from_expression(extents, 1, 1, &expression)?;
                taken[0].push(1e3 * start.elapsed().as_secs_f64());
                let start = Instant::now();
                let plan = Plan::new(&mask);
                taken[1].push(1e3 * start.elapsed().as_secs_f64());
                text = format!(
                    "{} blocks, {} partial, plan {} MB",
                    mask.count(),
                    mask.count_partial(),
                    plan.words().len() / 250_000
                );
            }
            let [blocks, plan] = taken.map(|mut taken| {
                taken.sort_by(f64::total_cmp);
                taken[RUNS / 2]
            });
            println!("{tokens:8} {name:16} {blocks:7.3} ms, plan {plan:7.3} ms: {text}");
        }
    }
    Ok(())
}
