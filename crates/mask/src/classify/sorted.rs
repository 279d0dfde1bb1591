//! [`Sorted`]: key blocks whose ranges grow from each to the next. In: these ranges, of a formula that is
//! a conjunction of bands. Out: of a row of blocks those that are whole, and those that are open.
//!
//! As keys grow, they enter each band once and leave it once: what a row wants is found by bisection.
//! Called by the search for blocks; most masks of text are such formulas, and those of windows are not.

use std::ops::Range;

use super::interval::Interval;
use super::program::{Band, Program};

/// Fewer blocks along either side are not worth it.
pub(super) const FEWEST: usize = 8;

/// Of each band the smallest numbers of all blocks, and the largest.
pub(super) struct Sorted {
    blocks: usize,
    lows: Vec<Vec<i64>>,
    highs: Vec<Vec<i64>>,
}

impl Sorted {
    /// Of the ranges of blocks, for each those of all bands. None if they do not grow.
    pub fn new(program: &Program<'_>, ranges: &[Interval]) -> Option<Self> {
        let bands = program.bands.len();
        let column = |band: usize, of: fn(&Interval) -> i64| -> Vec<i64> {
            ranges.iter().skip(band).step_by(bands).map(of).collect()
        };
        let lows: Vec<_> = (0..bands)
            .map(|band| column(band, |range| range.low))
            .collect();
        let highs: Vec<_> = (0..bands)
            .map(|band| column(band, |range| range.high))
            .collect();
        let all_grow = lows.iter().chain(&highs).all(|ends| ends.is_sorted());
        let blocks = ranges.len() / bands;
        all_grow.then_some(Self {
            blocks,
            lows,
            highs,
        })
    }

    /// Blocks of which all pairs count, and those with pairs that may: the former are among the latter.
    pub fn row(&self, bands: &[Band], queries: &[Interval]) -> [Range<usize>; 2] {
        let ends = self.lows.iter().zip(&self.highs);
        let all = bands.iter().zip(queries).zip(ends);
        let all = all.map(|((band, &query), (lows, highs))| (band.keys(query), lows, highs));
        let mut any = 0..self.blocks;
        for ([_, outer], lows, highs) in all.clone() {
            // From the first that reaches it to the last that does not begin behind it.
            any = within(any, highs, lows, outer);
        }
        let mut whole = any.clone();
        for ([inner, _], lows, highs) in all {
            whole = within(whole, lows, highs, inner);
        }
        [whole, any]
    }
}

/// Of some blocks those whose first ends are not below an interval, and whose second ends are not above.
fn within(
    blocks: Range<usize>,
    firsts: &[i64],
    seconds: &[i64],
    interval: Interval,
) -> Range<usize> {
    let start = firsts[blocks.clone()].partition_point(|&n| n < interval.low);
    let end = seconds[blocks.clone()].partition_point(|&n| n <= interval.high);
    let end = blocks.start + end;
    (blocks.start + start).min(end)..end
}
