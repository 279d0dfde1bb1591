//! [`Extremes`]: the smallest and the largest number of any stretch of a table. In: its numbers. Out:
//! two numbers, whatever the stretch's length, in about the same time.
//!
//! Of each [`CHUNK`] numbers the extremes are kept, and of each power of two of chunks: what lies
//! between whole chunks is two of those that overlap, and their ends are looked at one by one. Numbers that
//! grow, as documents' do, need none of that: a stretch's extremes are its ends.

use super::interval::Interval;

const CHUNK: usize = 64;

pub(super) struct Extremes<'a> {
    values: &'a [i32],
    /// Of 1, 2, 4, ... chunks from each chunk on; none if the values grow.
    levels: Option<Vec<Vec<(i32, i32)>>>,
}

fn of(values: &[i32]) -> (i32, i32) {
    values.iter().fold((i32::MAX, i32::MIN), |(low, high), &n| {
        (low.min(n), high.max(n))
    })
}

fn both(a: (i32, i32), b: (i32, i32)) -> (i32, i32) {
    (a.0.min(b.0), a.1.max(b.1))
}

impl<'a> Extremes<'a> {
    pub fn new(values: &'a [i32]) -> Self {
        let levels = (!values.is_sorted()).then(|| Self::levels(values));
        Self { values, levels }
    }

    fn levels(values: &[i32]) -> Vec<Vec<(i32, i32)>> {
        let mut levels: Vec<Vec<(i32, i32)>> = vec![values.chunks_exact(CHUNK).map(of).collect()];
        let mut step = 1;
        while let Some(last) = levels.last().filter(|last| last.len() > step) {
            let next = last.iter().zip(&last[step..]);
            let next = next.map(|(&a, &b)| both(a, b)).collect();
            levels.push(next);
            step *= 2;
        }
        levels
    }

    /// Of the numbers from `first` to `last`, both included.
    pub fn between(&self, first: usize, last: usize) -> Interval {
        let Some(levels) = &self.levels else {
            return Interval::new(self.values[first].into(), self.values[last].into());
        };
        let whole = first.div_ceil(CHUNK)..(last + 1) / CHUNK;
        let (low, high) = if whole.len() < 2 {
            of(&self.values[first..=last])
        } else {
            let level = whole.len().ilog2() as usize;
            let inner = both(
                levels[level][whole.start],
                levels[level][whole.end - (1 << level)],
            );
            let ends = both(
                of(&self.values[first..whole.start * CHUNK]),
                of(&self.values[whole.end * CHUNK..=last]),
            );
            both(inner, ends)
        };
        Interval::new(low.into(), high.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_stretches() {
        let mut state = 1u32;
        let values: Vec<i32> = (0..700)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as i32 - (1 << 23)
            })
            .collect();
        let mut growing = values.clone();
        growing.sort_unstable();
        for values in [values, growing] {
            check_all(&values);
        }
    }

    fn check_all(values: &[i32]) {
        let extremes = Extremes::new(values);
        for first in 0..values.len() {
            for last in (first..values.len()).step_by(7) {
                let stretch = &values[first..=last];
                let expected = (stretch.iter().min(), stretch.iter().max());
                let found = extremes.between(first, last);
                let found = (found.low as i32, found.high as i32);
                assert_eq!(
                    expected,
                    (Some(&found.0), Some(&found.1)),
                    "{first}..={last}"
                );
            }
        }
    }
}
