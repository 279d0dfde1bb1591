//! [`Sorted`]: key blocks whose ranges grow from each to the next. In: these ranges, of a formula that is
//! a conjunction of bands. Out: of a row of blocks those that are whole, and those that are open.
//!
//! As keys grow, they enter each band once and leave it once: what a row wants is found by bisection, of
//! a short stretch around what the row before wanted. Called by the search for blocks; most masks of text
//! are such formulas, and those of windows are not.

use std::ops::Range;

use super::interval::Interval;
use super::program::{Band, Program};

/// Fewer blocks along either side are not worth it.
pub(super) const FEWEST: usize = 8;

/// Of each band the ends of all blocks.
pub(super) struct Sorted {
    blocks: usize,
    bands: Vec<Ends>,
}

/// The smallest numbers of all blocks, and the largest.
struct Ends {
    lows: Growing,
    highs: Growing,
}

/// Numbers that grow, or stay.
struct Growing {
    numbers: Vec<i64>,
    /// Where the last two searches ended.
    last: [usize; 2],
}

impl Sorted {
    /// Of the ranges of blocks, for each those of all bands. None if they do not grow.
    pub fn new(program: &Program<'_>, ranges: &[Interval]) -> Option<Self> {
        let bands = program.bands.len();
        let column = |band: usize, of: fn(&Interval) -> i64| {
            Growing::new(ranges.iter().skip(band).step_by(bands).map(of).collect())
        };
        let ends = (0..bands).map(|band| {
            Some(Ends {
                lows: column(band, |range| range.low)?,
                highs: column(band, |range| range.high)?,
            })
        });
        Some(Self {
            blocks: ranges.len() / bands,
            bands: ends.collect::<Option<_>>()?,
        })
    }

    /// Blocks of which all pairs count, and those with pairs that may: the former are among the latter.
    pub fn row(&mut self, bands: &[Band], queries: &[Interval]) -> [Range<usize>; 2] {
        let (mut whole, mut any) = (0..self.blocks, 0..self.blocks);
        for ((band, &query), ends) in bands.iter().zip(queries).zip(&mut self.bands) {
            let [inner, outer] = band.keys(query);
            // From the first that reaches it to the last that does not begin behind it.
            let first = ends.highs.first(0, |n| n >= outer.low);
            let end = ends.lows.first(0, |n| n > outer.high);
            any = any.start.max(first)..any.end.min(end);
            let first = ends.lows.first(1, |n| n >= inner.low);
            let end = ends.highs.first(1, |n| n > inner.high);
            whole = whole.start.max(first)..whole.end.min(end);
        }
        any.start = any.start.min(any.end);
        // Where bands leave nothing, it is nothing inside of the other.
        whole.end = whole.end.clamp(any.start, any.end);
        whole.start = whole.start.clamp(any.start, whole.end);
        [whole, any]
    }
}

impl Growing {
    fn new(numbers: Vec<i64>) -> Option<Self> {
        let last = [0; 2];
        numbers.is_sorted().then_some(Self { numbers, last })
    }

    /// The place of the first number that is large enough, or behind the last one. Searches of one kind
    /// begin where theirs ended: from row to row it moves little.
    fn first(&mut self, kind: usize, is_enough: impl Fn(i64) -> bool) -> usize {
        let (numbers, last) = (&self.numbers[..], self.last[kind]);
        let (mut start, mut end, mut step) = (0, numbers.len(), 1);
        if numbers[last..].first().is_some_and(|&n| !is_enough(n)) {
            start = last + 1;
            while let Some(&n) = numbers.get(start + step) {
                if is_enough(n) {
                    end = start + step;
                    break;
                }
                start += step + 1;
                step *= 2;
            }
        } else {
            end = last;
            while let Some(at) = end.checked_sub(step) {
                if !is_enough(numbers[at]) {
                    start = at + 1;
                    break;
                }
                end = at;
                step *= 2;
            }
        }
        let inside = numbers[start..end].partition_point(|&n| !is_enough(n));
        self.last[kind] = start + inside;
        start + inside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn searches_end_at_the_same_place_wherever_they_begin() {
        let mut state = 1u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            i64::from((state >> 8) % below)
        };
        for len in 0..60 {
            let mut numbers: Vec<i64> = (0..len).map(|_| random(40)).collect();
            numbers.sort_unstable();
            let mut growing = Growing::new(numbers.clone()).unwrap();
            for _ in 0..200 {
                let (kind, least) = (random(2) as usize, random(44) - 2);
                let expected = numbers.partition_point(|&n| n < least);
                assert_eq!(growing.first(kind, |n| n >= least), expected);
            }
        }
        assert!(Growing::new(vec![0, 2, 1]).is_none());
    }
}
