//! Means of all heads, of queries and of keys: a thread has four numbers of a head, and goes through the
//! heads, four at a time. They are summed in order.

use flex_block_attn_ptx::{Builder, Reg};

pub(super) const THREADS: u32 = 256;
/// Numbers of a thread.
const EACH: u32 = 4;
/// Heads whose loads are under way together.
const DEPTH: u32 = 4;

/// Thread blocks for the numbers of one head.
pub(super) fn blocks(numbers: u32) -> u32 {
    numbers.div_ceil(EACH * THREADS)
}

pub(super) fn body(k: &Builder) {
    let [q, keys] = ["q", "k"].map(|name| {
        let [means, average] =
            ["means", "average"].map(|of| k.param::<u64>(&format!("{name}_{of}")));
        (means, average, k.param::<u32>(&format!("{name}_heads")))
    });
    let numbers = k.param::<u32>("numbers");

    let of_q = k.cta_y().equals(0);
    let (means, average) = (of_q.select(q.0, keys.0), of_q.select(q.1, keys.1));
    let heads = of_q.select(q.2, keys.2);
    let own = (k.cta_x() * THREADS + k.tid()) * EACH;
    k.if_(own.lt(numbers), || {
        let batch = k.cta_z();
        let mut from = means + (((batch * heads).times_wide(numbers) + own.to_u64()) << 2);
        let head_bytes = numbers.times_wide(4);
        let mut sums = [0.0f32; EACH as usize].map(|zero| k.var(zero));
        k.for_(0, heads, DEPTH, |head| {
            let loaded: [_; DEPTH as usize] = std::array::from_fn(|i| {
                let values = k.load_constants_where((head + i as u32).lt(heads), from);
                from += head_bytes;
                values
            });
            for values in loaded {
                let values: [Reg<'_, f32>; EACH as usize] = values;
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += value;
                }
            }
        });
        let means = sums.map(|sum| sum / heads.to_f32());
        let to = average + ((batch.times_wide(numbers) + own.to_u64()) << 2);
        k.store_globals(to, means);
    });
}
