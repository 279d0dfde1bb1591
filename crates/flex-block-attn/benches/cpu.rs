//! Speed of the CPU backend alone, without torch: `cargo bench --bench cpu [-- threads]`.
//!
//! Prints, for each dtype and density, milliseconds (median) and GFLOP/s of the computed blocks,
//! forward (4 S^2 D H density operations) and backward (2.5 times that).

use std::num::NonZeroUsize;
use std::time::Instant;

use flex_block_attn::{
    Element, Extents, Gradients, Options, Plan, Saved, Tensor, TensorMut, backward, bf16, builders,
    f16, forward,
};

const SHAPE: [usize; 4] = [1, 4, 4096, 128];
const BLOCK: usize = 128;
const REPEATS: usize = 5;

fn main() {
    let threads = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse::<NonZeroUsize>().ok());
    println!("{SHAPE:?}, blocks of {BLOCK}");
    for density in [1.0, 0.25] {
        run::<f32>(density, threads, |x| x);
        run::<bf16>(density, threads, bf16::from_f32);
        run::<f16>(density, threads, f16::from_f32);
    }
}

fn run<T: Element + Default>(
    density: f64,
    threads: Option<NonZeroUsize>,
    convert: impl Fn(f32) -> T,
) {
    let [batch, heads, tokens, head_dim] = SHAPE;
    let len = SHAPE.iter().product();
    let mut state = 1u32;
    let mut random = || -> Vec<T> {
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        // The sum of four uniform numbers is normal enough.
        (0..len)
            .map(|_| convert((uniform() + uniform() + uniform() + uniform()) * 1.7))
            .collect()
    };
    let (q, k, v, dout) = (random(), random(), random(), random());
    let extents = Extents::new(tokens, tokens, BLOCK, BLOCK).expect("sizes are fine");
    let mask = builders::random(extents, 1, heads, density, 1).expect("density is fine");
    let plan = Plan::new(&mask);
    let options = Options {
        threads,
        ..Options::default()
    };
    let tensor = |data| Tensor::new(data, SHAPE).expect("shape fits");
    let operations = 4.0 * (batch * heads * tokens * tokens * head_dim) as f64 * mask.density();

    let (mut out, mut lse) = (vec![T::default(); len], vec![0f32; batch * heads * tokens]);
    let lse_shape = [batch, heads, tokens, 1];
    report::<T>("forward", density, operations, || {
        forward(
            tensor(&q),
            tensor(&k),
            tensor(&v),
            plan.view(),
            &options,
            TensorMut::new(&mut out, SHAPE).expect("shape fits"),
            TensorMut::new(&mut lse, lse_shape).expect("shape fits"),
        )
        .expect("arguments are fine");
    });

    let mut gradients = [(); 3].map(|()| vec![T::default(); len]);
    report::<T>("backward", density, 2.5 * operations, || {
        let saved = Saved {
            q: tensor(&q),
            k: tensor(&k),
            v: tensor(&v),
            out: tensor(&out),
            lse: Tensor::new(&lse, lse_shape).expect("shape fits"),
        };
        let [dq, dk, dv] = gradients
            .each_mut()
            .map(|data| Some(TensorMut::new(data, SHAPE).expect("shape fits")));
        backward(
            saved,
            tensor(&dout),
            None,
            plan.view(),
            &options,
            Gradients { dq, dk, dv },
        )
        .expect("arguments are fine");
    });
}

fn report<T: Element>(pass: &str, density: f64, operations: f64, mut call: impl FnMut()) {
    call();
    let mut seconds: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[REPEATS / 2];
    println!(
        "{:<9} {pass:<8} density {density:.2} {:9.2} ms {:7.1} GFLOP/s",
        T::DTYPE.to_string(),
        median * 1e3,
        operations / median / 1e9
    );
}
