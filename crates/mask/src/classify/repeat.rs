//! [`Area`]: the blocks that have to be looked at. In: a program, lengths and block sizes. Out: how far
//! queries and keys may move together without a change of the formula's value, and the rectangles of
//! blocks that do not repeat others, moved by that. Called by the search for blocks.
//!
//! `q - kv` stays when both move by anything, `q // n - kv // n` and `q % n` when they move by a multiple
//! of n: so windows repeat from frame to frame, and what is about distances alone from block to block.

use std::ops::Range;

use super::program::{Node, Program, operands};
use crate::Extents;

/// Cuts between strips of rows are at multiples of this.
const STEP: usize = 8;

/// The blocks that have to be looked at.
pub(super) struct Area {
    rows: usize,
    columns: usize,
    /// Blocks that are not cut off at the end of their axis.
    whole: [usize; 2],
    /// By how many blocks of queries and of keys all may move.
    pub shift: Option<[usize; 2]>,
}

impl Area {
    /// All blocks.
    pub fn all(extents: Extents) -> Self {
        Self {
            rows: extents.q_blocks(),
            columns: extents.kv_blocks(),
            whole: extents.whole_blocks(),
            shift: None,
        }
    }

    /// Without those that repeat others. They move by less than half of each side, if at all.
    pub fn without_repeats(program: &Program<'_>, extents: Extents) -> Self {
        let blocks = [extents.q_block() as i64, extents.kv_block() as i64];
        let most = extents.q_len().min(extents.kv_len()) as i64 / 2;
        let step = least_common(blocks[0], blocks[1]);
        let distance = step.and_then(|step| distance(program, step, most));
        Self {
            shift: distance.map(|distance| blocks.map(|block| (distance / block) as usize)),
            ..Self::all(extents)
        }
    }

    /// Rectangles of blocks, of some rows.
    pub fn rectangles(
        &self,
        rows: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<> {
        let [first_rows, first_columns] = self.shift.unwrap_or([self.rows, self.columns]);
        let [whole_rows, whole_columns] = match self.shift {
            Some(_) => self.whole,
            None => [self.rows, self.columns],
        };
        let columns = self.columns;
        let inside = |from: usize, to: usize| rows.start.max(from)..rows.end.min(to);
        let later = inside(first_rows, whole_rows);
        let all = [
            (inside(0, first_rows), 0..columns),
            (later.clone(), 0..first_columns),
            (later, whole_columns..columns),
            (inside(whole_rows, self.rows), 0..columns),
        ];
        let all = all.into_iter();
        all.filter(|(rows, columns)| !rows.is_empty() && !columns.is_empty())
    }

    /// How many blocks these are in all.
    pub fn blocks(&self) -> usize {
        self.blocks_of(0..self.rows)
    }

    fn blocks_of(&self, rows: Range<usize>) -> usize {
        let rectangles = self.rectangles(rows);
        rectangles
            .map(|(rows, columns)| rows.len() * columns.len())
            .sum()
    }

    /// The ends of about so many strips of rows, with about as many blocks to look at in each.
    pub fn cuts(&self, pieces: usize) -> Vec<usize> {
        let each = self.blocks().div_ceil(pieces);
        let (mut cuts, mut blocks) = (Vec::new(), 0);
        // Rows that are halved together stay together.
        for end in (STEP..self.rows).step_by(STEP) {
            blocks += self.blocks_of(end - STEP..end);
            if blocks >= each {
                cuts.push(end);
                blocks = 0;
            }
        }
        cuts.push(self.rows);
        cuts
    }
}

/// The smallest multiple of `step` tokens, up to `most`, for which that is known.
fn distance(program: &Program<'_>, step: i64, most: i64) -> Option<i64> {
    let mut distance = step;
    // By how much each node grows.
    let mut growth: Vec<i64> = Vec::with_capacity(program.nodes.len());
    for node in &program.nodes {
        if distance > most {
            return None;
        }
        if let Some((of, divisor)) = division(program, node) {
            // Growths are in proportion to the distance.
            let factor = divisor / greatest_common(growth[of], divisor);
            distance = distance.checked_mul(factor)?;
            for known in &mut growth {
                *known = known.checked_mul(factor)?;
            }
        }
        growth.push(growth_of(program, node, &growth, distance)?);
    }
    (growth[program.root] == 0 && distance <= most).then_some(distance)
}

/// The operand and the divisor of a division by a positive number.
fn division(program: &Program<'_>, node: &Node) -> Option<(usize, i64)> {
    let (Node::Divide(a, by) | Node::Remainder(a, by)) = *node else {
        return None;
    };
    match program.nodes[by] {
        Node::Constant(n) if n > 0 => Some((a, n)),
        _ => None,
    }
}

/// By how much a node grows, if that is the same everywhere.
fn growth_of(program: &Program<'_>, node: &Node, growth: &[i64], distance: i64) -> Option<i64> {
    let of = |i: usize| growth[i];
    match *node {
        Node::Query | Node::Key => Some(distance),
        Node::Sum(_, ref terms) => terms.iter().try_fold(0i64, |sum, &(factor, node)| {
            sum.checked_add(factor.checked_mul(of(node))?)
        }),
        Node::Difference(a, b) => of(a).checked_sub(of(b)),
        Node::Divide(..) if let Some((a, n)) = division(program, node) => Some(of(a) / n),
        Node::Remainder(..) if division(program, node).is_some() => Some(0),
        Node::Min(a, b) | Node::Max(a, b) if of(a) == of(b) => Some(of(a)),
        Node::Band(ref band) if of(band.query) == of(band.key) => Some(0),
        Node::Choose(condition, a, b) if of(condition) == 0 && of(a) == of(b) => Some(of(a)),
        // What is computed of what stays.
        _ => operands(node).into_iter().all(|i| of(i) == 0).then_some(0),
    }
}

fn greatest_common(a: i64, b: i64) -> i64 {
    match b {
        0 => a.abs(),
        _ => greatest_common(b, a % b),
    }
}

fn least_common(a: i64, b: i64) -> Option<i64> {
    (a / greatest_common(a, b)).checked_mul(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expression::{Expression, Table, Truth, h, kv, q};

    #[test]
    fn how_far_blocks_repeat() {
        let distance = |condition: Truth, len: usize| {
            let expression = Expression::new(&condition).unwrap();
            let extents = Extents::new(len, len, 32, 48).unwrap();
            Area::without_repeats(&Program::new(&expression), extents).shift
        };
        assert_eq!(distance(kv().at_most(q() + h() * 3), 400), Some([3, 2]));
        assert_eq!(distance(kv().at_most(q()), 190), None, "half of it is less");
        let frames = |n: i32| (q() / n - kv() / n).abs().at_most(2);
        assert_eq!(distance(frames(96), 960), Some([3, 2]));
        assert_eq!(distance(frames(64), 960), Some([6, 4]));
        assert_eq!(distance(frames(100), 6000), Some([75, 50]));
        assert_eq!(
            distance((q() % 64 / 8).equals(kv() % 64 / 8), 960),
            Some([6, 4])
        );
        assert_eq!(
            distance((q() / 8 % 6).equals(kv() / 8 % 6), 960),
            Some([3, 2])
        );
        let table = Table::new(&[960], vec![0; 960]).unwrap();
        assert_eq!(
            distance(table.at([q()]).equals(table.at([kv()])), 960),
            None
        );
        let table = Table::new(&[64], vec![0; 64]).unwrap();
        assert_eq!(
            distance(table.at([q() % 64]).equals(kv() % 64), 960),
            Some([6, 4])
        );
        assert_eq!(distance(kv().less_than(40) | kv().at_most(q()), 960), None);
    }

    #[test]
    fn strips_have_about_as_much_to_look_at() {
        let expression = Expression::new(&kv().at_most(q())).unwrap();
        let extents = Extents::new(1000, 1000, 16, 16).unwrap();
        let area = Area::without_repeats(&Program::new(&expression), extents);
        // The first and the last row, which is short, and the first and the last column.
        assert_eq!(area.blocks(), 4 * 63 - 4);
        assert_eq!(area.cuts(1), [63]);
        assert_eq!(Area::all(extents).cuts(4), [16, 32, 48, 63]);
    }
}
