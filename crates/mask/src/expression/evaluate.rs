//! [`Evaluator`]: which pairs of a tile count. In: an expression, a batch and a head, the tile's keys,
//! then query after query. Out: for each a row of 0 and -1.
//!
//! What keys alone are asked is computed once for a tile, what a query alone is once for a row; the
//! rest in loops over a row that compilers vectorise. All of it is inlined, so that it is compiled for
//! the caller's instruction set. Called by the CPU backend, and for blocks that ranges of numbers do
//! not decide.

use super::step::on;
use super::{Expression, Step};

/// Evaluates an expression. In a tile at most [`Evaluator::MOST_KEYS`] keys.
#[derive(Debug, Clone)]
pub struct Evaluator<'a> {
    expression: &'a Expression,
    /// Of each table.
    values: Vec<&'a [i32]>,
    depends: Vec<u8>,
    /// Values of steps that do not depend on keys; 0 and -1 are false and true.
    scalars: Vec<i32>,
    /// Values of the others, a row of them each.
    rows: Vec<i32>,
    /// Keys of the tile.
    keys: usize,
}

impl<'a> Evaluator<'a> {
    /// Keys of a tile at most.
    pub const MOST_KEYS: usize = 128;

    /// None if the host lacks the numbers of a table.
    pub fn new(expression: &'a Expression) -> Option<Self> {
        let steps = expression.formula.steps.len();
        let values = expression.tables.iter().map(|table| table.values());
        Some(Self {
            expression,
            values: values.collect::<Option<_>>()?,
            depends: expression.formula.dependences(),
            scalars: vec![0; steps],
            rows: vec![0; steps * Self::MOST_KEYS],
            keys: 0,
        })
    }

    /// Goes to a batch, a head and a tile's keys.
    ///
    /// # Panics
    /// If there are too many keys.
    #[inline(always)]
    pub fn tile(&mut self, batch: usize, head: usize, keys: impl Iterator<Item = usize>) {
        self.keys = 0;
        let mut numbers = [0; Self::MOST_KEYS];
        for key in keys {
            numbers[self.keys] = key as i32;
            self.keys += 1;
        }
        for i in 0..self.depends.len() {
            if self.depends[i] & on::QUERY != 0 {
                continue;
            }
            match self.expression.formula.steps[i] {
                Step::Batch => self.scalars[i] = batch as i32,
                Step::Head => self.scalars[i] = head as i32,
                Step::Key => self.rows[i * Self::MOST_KEYS..][..self.keys]
                    .copy_from_slice(&numbers[..self.keys]),
                _ => self.step(i),
            }
        }
    }

    /// For each of the tile's keys -1 if it counts for a query, and 0 if not.
    #[inline(always)]
    pub fn row(&mut self, query: usize) -> &[i32] {
        for i in 0..self.depends.len() {
            if self.depends[i] & on::QUERY == 0 {
                continue;
            }
            match self.expression.formula.steps[i] {
                Step::Query => self.scalars[i] = query as i32,
                _ => self.step(i),
            }
        }
        let last = self.depends.len() - 1;
        let all = &mut self.rows[last * Self::MOST_KEYS..][..self.keys];
        if self.depends[last] & on::KEY == 0 {
            all.fill(self.scalars[last]);
        }
        all
    }

    #[inline(always)]
    fn step(&mut self, i: usize) {
        match self.depends[i] & on::KEY {
            0 => self.scalars[i] = self.scalar(i),
            _ => self.across(i),
        }
    }

    /// A step that does not depend on keys.
    #[inline(always)]
    fn scalar(&self, i: usize) -> i32 {
        let of = |i: usize| self.scalars[i];
        match self.expression.formula.steps[i] {
            Step::Batch | Step::Head | Step::Query | Step::Key => of(i),
            Step::Number(n) => n,
            Step::Truth(truth) => -i32::from(truth),
            Step::Add(a, b) => of(a).wrapping_add(of(b)),
            Step::Subtract(a, b) => of(a).wrapping_sub(of(b)),
            Step::Multiply(a, b) => of(a).wrapping_mul(of(b)),
            Step::Divide(a, b) => divide(of(a), of(b)),
            Step::Remainder(a, b) => remainder(of(a), of(b)),
            Step::Min(a, b) => of(a).min(of(b)),
            Step::Max(a, b) => of(a).max(of(b)),
            Step::Choose { condition, a, b } => of(if of(condition) != 0 { a } else { b }),
            Step::Table { table, ref indices } => {
                let extents = self.expression.tables[table].extents();
                let at = indices.iter().zip(extents).fold(0i32, |at, (&i, &extent)| {
                    at.wrapping_mul(extent as i32).wrapping_add(of(i))
                });
                look_up(self.values[table], at)
            }
            Step::Less(a, b) => -i32::from(of(a) < of(b)),
            Step::Equal(a, b) => -i32::from(of(a) == of(b)),
            Step::And(a, b) => of(a) & of(b),
            Step::Or(a, b) => of(a) | of(b),
            Step::Not(a) => !of(a),
        }
    }

    /// A step that depends on keys, for all of them.
    #[inline(always)]
    fn across(&mut self, i: usize) {
        let (keys, depends, scalars) = (self.keys, &self.depends, &self.scalars);
        let (before, out) = self.rows.split_at_mut(i * Self::MOST_KEYS);
        let out = &mut out[..keys];
        let of = |i: usize| match depends[i] & on::KEY {
            0 => Operand::One(scalars[i]),
            _ => Operand::Many(&before[i * Self::MOST_KEYS..][..keys]),
        };
        match self.expression.formula.steps[i] {
            Step::Add(a, b) => pairs(out, of(a), of(b), i32::wrapping_add),
            Step::Subtract(a, b) => pairs(out, of(a), of(b), i32::wrapping_sub),
            Step::Multiply(a, b) => pairs(out, of(a), of(b), i32::wrapping_mul),
            // Shifts round down, and so does cutting off bits.
            Step::Divide(a, b) => match of(b) {
                Operand::One(n) if is_power(n) => {
                    let shift = n.trailing_zeros();
                    pairs(out, of(a), Operand::One(0), |a, _| a >> shift);
                }
                b => pairs(out, of(a), b, divide),
            },
            Step::Remainder(a, b) => match of(b) {
                Operand::One(n) if is_power(n) => {
                    pairs(out, of(a), Operand::One(n - 1), |a, b| a & b);
                }
                b => pairs(out, of(a), b, remainder),
            },
            Step::Min(a, b) => pairs(out, of(a), of(b), Ord::min),
            Step::Max(a, b) => pairs(out, of(a), of(b), Ord::max),
            Step::Choose { condition, a, b } => {
                pairs(out, of(condition), of(b), |condition, b| !condition & b);
                add_to(out, of(condition), of(a), |out, condition, a| {
                    out | (condition & a)
                });
            }
            Step::Table { table, ref indices } => {
                let extents = self.expression.tables[table].extents();
                pairs(out, of(indices[0]), Operand::One(0), |a, _| a);
                for (&index, &extent) in indices[1..].iter().zip(&extents[1..]) {
                    let extent = extent as i32;
                    add_to(out, of(index), Operand::One(0), |out, index, _| {
                        out.wrapping_mul(extent).wrapping_add(index)
                    });
                }
                let values = self.values[table];
                out.iter_mut().for_each(|at| *at = look_up(values, *at));
            }
            Step::Less(a, b) => pairs(out, of(a), of(b), |a, b| -i32::from(a < b)),
            Step::Equal(a, b) => pairs(out, of(a), of(b), |a, b| -i32::from(a == b)),
            Step::And(a, b) => pairs(out, of(a), of(b), |a, b| a & b),
            Step::Or(a, b) => pairs(out, of(a), of(b), |a, b| a | b),
            Step::Not(a) => pairs(out, of(a), Operand::One(0), |a, _| !a),
            // Neither depends on keys, nor is computed here.
            Step::Batch
            | Step::Head
            | Step::Query
            | Step::Key
            | Step::Number(_)
            | Step::Truth(_) => {}
        }
    }
}

/// What a step is computed of.
#[derive(Clone, Copy)]
enum Operand<'a> {
    One(i32),
    Many(&'a [i32]),
}

#[inline(always)]
fn pairs(out: &mut [i32], a: Operand<'_>, b: Operand<'_>, f: impl Fn(i32, i32) -> i32) {
    add_to(out, a, b, |_, a, b| f(a, b));
}

#[inline(always)]
fn add_to(out: &mut [i32], a: Operand<'_>, b: Operand<'_>, f: impl Fn(i32, i32, i32) -> i32) {
    match (a, b) {
        (Operand::Many(a), Operand::Many(b)) => {
            for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
                *out = f(*out, a, b);
            }
        }
        (Operand::Many(a), Operand::One(b)) => {
            for (out, &a) in out.iter_mut().zip(a) {
                *out = f(*out, a, b);
            }
        }
        (Operand::One(a), Operand::Many(b)) => {
            for (out, &b) in out.iter_mut().zip(b) {
                *out = f(*out, a, b);
            }
        }
        (Operand::One(a), Operand::One(b)) => {
            out.iter_mut().for_each(|out| *out = f(*out, a, b));
        }
    }
}

#[inline(always)]
fn is_power(n: i32) -> bool {
    n > 0 && n & (n - 1) == 0
}

/// Rounded down; 0 by 0.
#[inline(always)]
fn divide(a: i32, b: i32) -> i32 {
    if b == 0 {
        return 0;
    }
    let (quotient, rest) = (a.wrapping_div(b), a.wrapping_rem(b));
    quotient - i32::from(rest != 0 && (rest < 0) != (b < 0))
}

/// Of the divisor's sign; 0 by 0.
#[inline(always)]
fn remainder(a: i32, b: i32) -> i32 {
    if b == 0 {
        return 0;
    }
    let rest = a.wrapping_rem(b);
    match rest != 0 && (rest < 0) != (b < 0) {
        true => rest + b,
        false => rest,
    }
}

/// A number of a table; of its ends if the index lies outside, which checked masks do not let happen.
#[inline(always)]
fn look_up(values: &[i32], at: i32) -> i32 {
    let last = values.len().wrapping_sub(1);
    values
        .get((at.max(0) as usize).min(last))
        .copied()
        .unwrap_or(0)
}
