//! Which blocks an expression wants, and which of them whole. In: lengths, block sizes, an
//! [`Expression`]. Out: a [`BlockMask`] with its partial blocks.
//!
//! All blocks together are a rectangle. The expression is evaluated on it with ranges of numbers instead
//! of numbers; if that does not say that all pairs count, or none, the rectangle is quartered. So wide
//! areas cost nothing, and a mask costs as much as its border has blocks. A single block that ranges do
//! not decide is partial if the ends of ranges, or a few of its pairs, tell so; if they do not, it is
//! quartered too, down to tiles that are evaluated pair by pair, until one pair counts and another does
//! not, or all are known to be alike. The result is exact: it is what evaluating every pair would give.
//!
//! Two things spare most of that: blocks that repeat others are copied, and where keys grow from block to
//! block a row is found by bisection.
//!
//! - `interval`: ranges of numbers. `extremes`: those of tables.
//! - `program`: a formula, as far as ranges go. `axis`: queries and keys in halves.
//! - `tight`: which ranges have their ends. `sorted`: rows of blocks without a search.
//! - `repeat`: how far blocks repeat, so that only the first are looked at.

mod axis;
mod extremes;
mod interval;
mod program;
mod repeat;
mod sorted;
mod tight;

use std::ops::Range;
use std::sync::Arc;

use axis::{Axis, SAMPLES, Side};
use interval::Interval;
use program::{Program, Region};
use repeat::Area;
use sorted::Sorted;

use crate::block_mask::Strip;
use crate::expression::{Evaluator, Expression};
use crate::{BlockMask, Extents, MaskError, parallel};

impl BlockMask {
    /// The blocks with a pair that counts by an expression; those are partial that have others too.
    ///
    /// The mask has as many batches and heads as the expression tells apart of those given.
    ///
    /// # Errors
    /// An expression that leaves int32, may divide by 0, or looks behind a table's end.
    pub fn from_expression(
        extents: Extents,
        batch: usize,
        heads: usize,
        expression: &Expression,
    ) -> Result<Self, MaskError> {
        let program = Program::new(expression);
        check(extents, [batch, heads], expression, &program)?;
        let formula = expression.formula();
        let batch = if formula.depends_on_batch() {
            batch
        } else {
            batch.min(1)
        };
        let heads = if formula.depends_on_head() {
            heads
        } else {
            heads.min(1)
        };
        let mut mask = Self::partly_empty(extents, batch, heads, Arc::new(expression.clone()));
        let (q_len, kv_len) = (extents.q_len(), extents.kv_len());
        if q_len == 0 || kv_len == 0 {
            return Ok(mask);
        }
        let evaluator = Evaluator::new(expression);
        // What is not known exactly may differ where blocks repeat.
        let area = match evaluator {
            Some(_) => Area::without_repeats(&program, extents),
            None => Area::all(extents),
        };
        let blocks = batch * heads * area.blocks();
        let strips = mask.strips(&area.cuts(parallel::pieces(blocks)));
        let search = || Search {
            queries: Axis::new(Side::Queries, q_len, extents.q_block(), &program),
            keys: Axis::new(Side::Keys, kv_len, extents.kv_block(), &program),
            known: vec![Interval::EITHER; program.nodes.len()],
            region: everywhere(extents, [1, 1]),
            evaluator: evaluator.clone(),
            program: &program,
            sorted: None,
            line: None,
        };
        parallel::consume_with(blocks, strips, search, |search, mut strip| {
            search.strip(&mut strip, &area);
        });
        if let Some(shift) = area.shift {
            mask.repeat(shift);
        }
        Ok(mask)
    }
}

/// Whether an expression can be evaluated everywhere.
pub(crate) fn check_expression(
    extents: Extents,
    lines: [usize; 2],
    expression: &Expression,
) -> Result<(), MaskError> {
    check(extents, lines, expression, &Program::new(expression))
}

fn check(
    extents: Extents,
    lines: [usize; 2],
    expression: &Expression,
    program: &Program<'_>,
) -> Result<(), MaskError> {
    if extents.q_len() == 0 || extents.kv_len() == 0 || lines.contains(&0) {
        return Ok(());
    }
    let everywhere = everywhere(extents, lines);
    program::check(expression, program, &everywhere).map_err(|reason| MaskError::Formula {
        text: expression.to_string(),
        reason,
    })
}

fn everywhere(extents: Extents, [batch, heads]: [usize; 2]) -> Region {
    let below = |n: usize| Interval::new(0, n as i64 - 1);
    Region {
        batch: below(batch),
        head: below(heads),
        query: below(extents.q_len()),
        key: below(extents.kv_len()),
    }
}

struct Search<'a> {
    program: &'a Program<'a>,
    queries: Axis,
    keys: Axis,
    /// Ranges of the nodes, in the region that was looked at last.
    known: Vec<Interval>,
    /// Its batch and head.
    region: Region,
    /// None if the host lacks numbers of tables.
    evaluator: Option<Evaluator<'a>>,
    /// The columns that rows were looked up in last.
    sorted: Option<Columns>,
    /// The batch and the head that it is at.
    line: Option<(usize, usize)>,
}

/// Key blocks in a row.
struct Columns {
    blocks: Range<u32>,
    pieces: Range<u32>,
    /// None if they do not grow.
    ends: Option<Sorted>,
}

fn numbers(range: Range<usize>) -> Range<u32> {
    range.start as u32..range.end as u32
}

/// Whether a pair has been found that does not count, and one that does.
type Found = [bool; 2];

impl Search<'_> {
    /// Finds the blocks of some rows.
    fn strip(&mut self, strip: &mut Strip<'_>, area: &Area) {
        self.go_to(strip.batch, strip.head);
        for (rows, columns) in area.rectangles(strip.rows.clone()) {
            let (rows, columns) = (numbers(rows), numbers(columns));
            if self.sort(&columns, rows.len()) {
                for piece in self.queries.singles(rows) {
                    self.sorted_row(piece, strip);
                }
                continue;
            }
            let rows = self.queries.blocks(rows.start, rows.end);
            let columns = self.keys.blocks(columns.start, columns.end);
            self.rectangle(rows, columns, strip);
        }
    }

    /// Makes ready for [`Self::sorted_row`]. Gives whether so many rows are best found that way.
    fn sort(&mut self, columns: &Range<u32>, rows: usize) -> bool {
        let program = self.program;
        if !program.may_be_sorted() || rows.min(columns.len()) < sorted::FEWEST {
            return false;
        }
        let known = self.sorted.as_ref();
        if known.is_none_or(|known| known.blocks != *columns) {
            let pieces = self.keys.singles(columns.clone());
            for piece in pieces.clone() {
                let known = &mut self.known;
                self.keys.find(piece, program, known, &self.region);
            }
            self.sorted = Some(Columns {
                blocks: columns.clone(),
                ends: Sorted::new(program, self.keys.ranges_of(pieces.clone())),
                pieces,
            });
        }
        self.sorted
            .as_ref()
            .is_some_and(|columns| columns.ends.is_some())
    }

    /// Finds the blocks of a row.
    fn sorted_row(&mut self, row_piece: u32, strip: &mut Strip<'_>) {
        let Some(Columns {
            ends: Some(ends),
            blocks,
            pieces,
        }) = &mut self.sorted
        else {
            return;
        };
        let (first, first_piece) = (blocks.start as usize, pieces.start);
        self.queries
            .find(row_piece, self.program, &mut self.known, &self.region);
        let [whole, any] = ends.row(&self.program.bands, self.queries.ranges(row_piece));
        let row = self.queries.piece(row_piece).first_block as usize;
        strip.insert_all(row..row + 1, first + whole.start..first + whole.end);
        // What is whole lies inside.
        let (before, after) = match whole.is_empty() {
            true => (any.clone(), any.end..any.end),
            false => (any.start..whole.start, whole.end..any.end),
        };
        for column in before.chain(after) {
            self.open_block(row_piece, first_piece + column as u32, strip);
        }
    }

    fn go_to(&mut self, batch: usize, head: usize) {
        if self.line == Some((batch, head)) {
            return;
        }
        self.line = Some((batch, head));
        self.region.batch = Interval::one(batch as i64);
        self.region.head = Interval::one(head as i64);
        self.sorted = None;
        self.queries.reset();
        self.keys.reset();
        for node in 0..self.program.nodes.len() {
            if self.program.on_no_axis(node) {
                self.known[node] = self.program.range(node, &self.known, &self.region);
            }
        }
    }

    fn place(&self) -> (usize, usize) {
        self.line.unwrap_or_default()
    }

    /// Whether the pairs of some queries and keys count.
    #[inline]
    fn verdict(&mut self, rows: u32, columns: u32) -> Interval {
        let (program, known) = (self.program, &mut self.known[..]);
        self.queries.find(rows, program, known, &self.region);
        self.keys.find(columns, program, known, &self.region);
        if !program.parts.is_empty() {
            self.queries.load(rows, program, known);
            self.keys.load(columns, program, known);
        }
        let (queries, keys) = (self.queries.ranges(rows), self.keys.ranges(columns));
        let mut all = program.of_bands(queries, keys);
        if all == program.decisive {
            return all;
        }
        for part in &program.parts {
            for &node in &part.nodes {
                known[node] = program.range(node, known, &self.region);
            }
            let range = known[part.node];
            if range == program.decisive {
                return range;
            }
            if !range.is_one() {
                all = Interval::EITHER;
            }
        }
        all
    }

    /// What the bands say of a rectangle that is not decided. Pairs that are outside of one are not
    /// in any conjunction; those inside are in it if the other conditions hold everywhere.
    fn ends(&self, rows: u32, columns: u32, found: &mut Found) {
        let program = self.program;
        let (queries, keys) = (self.queries.ranges(rows), self.keys.ranges(columns));
        let decides = usize::from(program.decisive == Interval::TRUE);
        let (mut open, mut other) = (program.parts.len(), false);
        for ((band, &query), &key) in program.bands.iter().zip(queries).zip(keys) {
            if band.range(query, key).is_one() {
                continue;
            }
            let ends = band.found(query, key);
            found[decides] |= ends[decides];
            other = ends[1 - decides];
            open += 1;
        }
        found[1 - decides] |= other && open == 1;
    }

    fn rectangle(&mut self, rows: u32, columns: u32, strip: &mut Strip<'_>) {
        let verdict = self.verdict(rows, columns);
        if verdict == Interval::FALSE {
            return;
        }
        let (r, c) = (self.queries.piece(rows), self.keys.piece(columns));
        if verdict == Interval::TRUE {
            let blocks = |first: u32, end: u32| first as usize..end as usize;
            let (r, c) = (
                blocks(r.first_block, r.end_block),
                blocks(c.first_block, c.end_block),
            );
            strip.insert_all(r, c);
            return;
        }
        if r.is_block() && c.is_block() {
            self.open_block(rows, columns, strip);
            return;
        }
        // What is much longer than wide is halved, all else quartered.
        let rows_stay = r.is_block() || !c.is_block() && c.len() > 2 * r.len();
        let columns_stay = c.is_block() || !r.is_block() && r.len() > 2 * c.len();
        let parts = |axis: &mut Axis, at: u32, stays: bool| match stays {
            true => at..at + 1,
            false => axis.halves(at),
        };
        let all_rows = parts(&mut self.queries, rows, rows_stay);
        let all_columns = parts(&mut self.keys, columns, columns_stay);
        for rows in all_rows {
            for columns in all_columns.clone() {
                self.rectangle(rows, columns, strip);
            }
        }
    }

    /// Decides a block that ranges have not decided.
    fn open_block(&mut self, rows: u32, columns: u32, strip: &mut Strip<'_>) {
        let [outside, inside] = self.block(rows, columns);
        if inside {
            let row = self.queries.piece(rows).first_block as usize;
            let column = self.keys.piece(columns).first_block as usize;
            strip.insert(row, column, outside);
        }
    }

    /// Looks into a block that is not decided.
    fn block(&mut self, rows: u32, columns: u32) -> Found {
        let mut found = [false; 2];
        if self.evaluator.is_none() {
            return [true; 2];
        }
        self.ends(rows, columns, &mut found);
        if found != [true; 2] && !self.samples(rows, columns, &mut found) {
            self.quarters(rows, columns, &mut found);
        }
        found
    }

    /// Looks at a few pairs. Gives whether both have been found.
    fn samples(&mut self, rows: u32, columns: u32, found: &mut Found) -> bool {
        let (some_rows, some_columns) = (self.queries.samples(rows), self.keys.samples(columns));
        // The corners and the middle.
        const PAIRS: [(usize, usize); 5] = [(0, 0), (1, 0), (1, 1), (0, 1), (2, 2)];
        const { assert!(SAMPLES == 3) };
        for (row, column) in PAIRS {
            match self.verdict(some_rows[row], some_columns[column]) {
                Interval::FALSE => found[0] = true,
                Interval::TRUE => found[1] = true,
                _ => {}
            }
            if *found == [true; 2] {
                return true;
            }
        }
        false
    }

    /// Looks into the quarters of a rectangle that is not decided, until both have been found.
    fn quarters(&mut self, rows: u32, columns: u32, found: &mut Found) {
        let (all_rows, all_columns) = (self.queries.halves(rows), self.keys.halves(columns));
        if all_rows.len() == 1 && all_columns.len() == 1 {
            if !self.samples(rows, columns, found) {
                self.pairs(rows, columns, found);
            }
            return;
        }
        for rows in all_rows {
            for columns in all_columns.clone() {
                match self.verdict(rows, columns) {
                    Interval::FALSE => found[0] = true,
                    Interval::TRUE => found[1] = true,
                    _ => {
                        self.ends(rows, columns, found);
                        if *found != [true; 2] {
                            self.quarters(rows, columns, found);
                        }
                    }
                }
                if *found == [true; 2] {
                    return;
                }
            }
        }
    }

    /// Evaluates all pairs of a small rectangle.
    fn pairs(&mut self, rows: u32, columns: u32, found: &mut Found) {
        let (batch, head) = self.place();
        let (rows, columns) = (self.queries.piece(rows), self.keys.piece(columns));
        let Some(evaluator) = &mut self.evaluator else {
            return;
        };
        let keys = columns.start as usize..columns.end as usize;
        evaluator.tile(batch, head, keys);
        for query in rows.start..rows.end {
            let row = evaluator.row(query as usize);
            found[0] |= row.contains(&0);
            found[1] |= row.iter().any(|&counts| counts != 0);
            if *found == [true; 2] {
                return;
            }
        }
    }
}
