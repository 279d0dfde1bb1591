//! Means over blocks of tokens, or over parts of blocks: what a mask is chosen from. Called through
//! [`crate::pool`].

use crate::simd::Real;
use crate::threads;
use crate::{Element, Pool};

/// One task for each head: sums are of the element's own [`Real`], in the order of tokens.
pub(crate) fn pool<T: Element>(args: &Pool<'_, T>, means: &mut [f32]) {
    let [batch, heads, len, head_dim] = args.tensor.shape();
    let features = args.cells.len() * head_dim;
    let places = args.order.map_or(len, |order| order.tokens.len());
    let of_head = places.div_ceil(args.block) * features;
    assert_eq!(means.len(), batch * heads * of_head, "one mean for each");
    if means.is_empty() {
        return;
    }
    let tasks = means.chunks_exact_mut(of_head).enumerate().collect();
    threads::consume(args.threads, tasks, |(line, means): (usize, &mut [f32])| {
        let row = |token| args.tensor.row(line / heads, line % heads, token);
        let mut values = vec![T::Real::ZERO; head_dim];
        let mut sums = values.clone();
        let mut rounded = Vec::with_capacity(head_dim);
        for (number, means) in means.chunks_exact_mut(features).enumerate() {
            let block = number * args.block;
            for (cell, means) in args.cells.iter().zip(means.chunks_exact_mut(head_dim)) {
                sums.fill(T::Real::ZERO);
                let mut count = 0u32;
                let there = cell.iter().map(|offset| block + offset);
                for place in there.filter(|&place| place < places) {
                    let found = args.order.map_or(Some(place), |order| order.tokens[place]);
                    if let Some(token) = found {
                        T::widen(row(token), &mut values);
                        for (sum, &value) in sums.iter_mut().zip(&values) {
                            *sum += value;
                        }
                    }
                    let counts = args.order.is_some_and(|order| order.zeros_count);
                    count += u32::from(found.is_some() || counts);
                }
                let share = T::Real::of(1.0 / f64::from(count.max(1)));
                for sum in &mut sums {
                    *sum = *sum * share;
                }
                rounded.clear();
                rounded.extend_from_slice(row(0));
                T::narrow(&sums, &mut rounded);
                T::widen(&rounded, &mut values);
                for (mean, &value) in means.iter_mut().zip(&values) {
                    *mean = value.to_f32();
                }
            }
        }
    });
}
