//! Masks with an expression: [`Mask`], what a kernel is built with, and `Exact`, its instructions, which
//! hide of a partial block what the expression hides.
//!
//! In: a tile of scores in registers, and where in the problem it lies. Out: -inf in the place of what
//! does not count. Called by both passes, for tiles of partial blocks only.
//!
//! What an expression asks of queries alone, or of keys alone, is computed once for each row and each
//! column that a thread has, not for each score.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

pub use flex_block_attn_mask::expression::{Formula, Step};
use flex_block_attn_ptx::{Arg, Builder, Reg};
use flex_block_attn_tile::RegTile;

/// A formula, kept for as long as the process lives: kernels are built and found by it.
#[derive(Debug, Clone, Copy)]
pub struct Mask(&'static Formula);

/// A table's place in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Address of its int32 numbers, contiguous.
    pub address: u64,
    /// Its extents, outermost first.
    pub extents: Vec<u32>,
}

/// Bits of what a step depends on, besides batch and head.
const QUERY: u8 = 1;
const KEY: u8 = 2;

impl Mask {
    /// The mask of a formula; of equal formulas the same.
    ///
    /// # Panics
    /// If a step names one that is not before it.
    pub fn new(formula: Formula) -> Self {
        static KEPT: Mutex<Option<HashSet<&'static Formula>>> = Mutex::new(None);
        for (at, step) in formula.steps.iter().enumerate() {
            assert!(step.operands().iter().all(|&i| i < at), "{formula:?}");
        }
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = kept.get_or_insert_default();
        if let Some(&formula) = kept.get(&formula) {
            return Self(formula);
        }
        let formula: &'static Formula = Box::leak(Box::new(formula));
        kept.insert(formula);
        Self(formula)
    }

    /// Its formula.
    pub fn formula(self) -> &'static Formula {
        self.0
    }

    /// What tells kernels of different masks apart, in their names.
    pub(crate) fn tag(self) -> String {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        format!("_exact_{:016x}", hasher.finish())
    }

    /// The arguments for [`Exact::new`].
    ///
    /// # Panics
    /// If there are other tables than the formula has.
    pub(crate) fn args(self, tables: &[Table]) -> Vec<Arg> {
        let given = tables.iter().map(|table| table.extents.len());
        assert!(given.eq(self.0.tables.iter().copied()), "{tables:?}");
        let of = |table: &Table| {
            let inner = table.extents[1..].iter().map(|&extent| Arg::U32(extent));
            std::iter::once(Arg::U64(table.address))
                .chain(inner)
                .collect::<Vec<_>>()
        };
        tables.iter().flat_map(of).collect()
    }
}

impl PartialEq for Mask {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Mask {}

impl Hash for Mask {
    fn hash<H: Hasher>(&self, state: &mut H) {
        std::ptr::from_ref(self.0).hash(state);
    }
}

/// A tile of scores in the problem.
pub(crate) struct Where<'k> {
    pub(crate) batch: Reg<'k, u32>,
    /// Head of q.
    pub(crate) head: Reg<'k, u32>,
    /// The first of the thread's two rows; the other is 8 on.
    pub(crate) rows: Axis<'k>,
    /// The tile's first column, of the other axis.
    pub(crate) first_column: Reg<'k, u32>,
    /// Lane in the warp.
    pub(crate) lane: Reg<'k, u32>,
}

/// A place on one of the axes.
pub(crate) enum Axis<'k> {
    Queries(Reg<'k, u32>),
    Keys(Reg<'k, u32>),
}

/// A mask's formula in a kernel.
pub(crate) struct Exact<'k> {
    k: &'k Builder,
    formula: &'static Formula,
    tables: Vec<Memory<'k>>,
    /// Queries and keys of a sequence.
    lengths: [Reg<'k, u32>; 2],
}

/// A table in a kernel.
struct Memory<'k> {
    address: Reg<'k, u64>,
    /// All extents but the first.
    inner: Vec<Reg<'k, u32>>,
}

/// A step's value.
#[derive(Clone, Copy)]
enum Value<'k> {
    Number(Reg<'k, i32>),
    Truth(Reg<'k, bool>),
}

/// Values of the steps that have been computed.
type Known<'k> = Vec<Option<Value<'k>>>;

/// Where steps are computed: on an axis that they do not depend on, anywhere.
#[derive(Clone, Copy)]
struct Point<'k> {
    batch: Reg<'k, u32>,
    head: Reg<'k, u32>,
    query: Reg<'k, u32>,
    key: Reg<'k, u32>,
}

impl<'k> Exact<'k> {
    /// Declares its parameters.
    pub(crate) fn new(k: &'k Builder, mask: Mask, lengths: [Reg<'k, u32>; 2]) -> Self {
        let formula = mask.0;
        let table = |(number, &dimensions): (usize, &usize)| Memory {
            address: k.param(&format!("table{number}")),
            inner: (1..dimensions)
                .map(|i| k.param(&format!("table{number}_extent{i}")))
                .collect(),
        };
        Self {
            k,
            formula,
            tables: formula.tables.iter().enumerate().map(table).collect(),
            lengths,
        }
    }

    /// A token of an axis. A tile may reach behind the sequence, where tables have nothing: what is
    /// found for the last token will do, since nothing counts there anyhow.
    fn token(&self, token: Reg<'k, u32>, length: Reg<'k, u32>) -> Value<'k> {
        let inside = match self.tables.is_empty() {
            true => token,
            false => token.min(length - 1),
        };
        Value::Number(inside.as_i32())
    }

    /// Puts -inf in the place of what does not count.
    pub(crate) fn hide(&self, tile: &RegTile<'k>, at: &Where<'k>) {
        let (rows, row_bit, column_bit) = match at.rows {
            Axis::Queries(first) => ([first, first + 8], QUERY, KEY),
            Axis::Keys(first) => ([first, first + 8], KEY, QUERY),
        };
        let point = |row, column| {
            let (query, key) = match at.rows {
                Axis::Queries(_) => (row, column),
                Axis::Keys(_) => (column, row),
            };
            Point {
                batch: at.batch,
                head: at.head,
                query,
                key,
            }
        };
        let depends = self.depends();
        let first = at.first_column + (at.lane & 3) * 2;
        let nowhere = point(rows[0], first);
        let common = self.compute(vec![None; depends.len()], nowhere, |i| depends[i] == 0);
        let by_row = rows.map(|row| {
            let at = point(row, first);
            self.compute(common.clone(), at, |i| depends[i] == row_bit)
        });
        // Of every 8 columns a thread has two, in both of its rows.
        for (eight, four) in (0..).zip(tile.registers().chunks_exact(4)) {
            for x in 0..2 {
                let column = first + (8 * eight + x);
                let here = point(rows[0], column);
                let by_column = self.compute(common.clone(), here, |i| depends[i] == column_bit);
                for (row, &place) in rows.iter().enumerate() {
                    let known = by_row[row].iter().zip(&by_column);
                    let known = known.map(|(&a, &b)| a.or(b)).collect();
                    let all = self.compute(known, point(place, column), |_| true);
                    let register = four[2 * row + x as usize];
                    let counts = truth(&all, depends.len() - 1);
                    register.set(counts.select(register, f32::NEG_INFINITY));
                }
            }
        }
    }

    /// What each step depends on.
    fn depends(&self) -> Vec<u8> {
        let mut depends: Vec<u8> = Vec::new();
        for step in &self.formula.steps {
            let own = match step {
                Step::Query => QUERY,
                Step::Key => KEY,
                _ => 0,
            };
            let operands = step.operands().into_iter().map(|i| depends[i]);
            depends.push(operands.fold(own, |all, bits| all | bits));
        }
        depends
    }

    /// Computes the steps that are wanted, and not known yet.
    fn compute(
        &self,
        mut known: Known<'k>,
        at: Point<'k>,
        wanted: impl Fn(usize) -> bool,
    ) -> Known<'k> {
        for i in 0..known.len() {
            if known[i].is_none() && wanted(i) {
                known[i] = Some(self.step(i, &known, at));
            }
        }
        known
    }

    fn step(&self, i: usize, known: &Known<'k>, at: Point<'k>) -> Value<'k> {
        let k = self.k;
        let number = |i| number(known, i);
        let truth = |i| truth(known, i);
        match self.formula.steps[i] {
            Step::Batch => Value::Number(at.batch.as_i32()),
            Step::Head => Value::Number(at.head.as_i32()),
            Step::Query => self.token(at.query, self.lengths[0]),
            Step::Key => self.token(at.key, self.lengths[1]),
            Step::Number(n) => Value::Number(k.var(n)),
            Step::Truth(truth) => Value::Truth(k.var(u32::from(truth)).differs(0)),
            Step::Add(a, b) => Value::Number(number(a) + number(b)),
            Step::Subtract(a, b) => Value::Number(number(a) - number(b)),
            Step::Multiply(a, b) => Value::Number(number(a) * number(b)),
            Step::Divide(a, b) => Value::Number(self.divide(a, b, known).0),
            Step::Remainder(a, b) => Value::Number(self.divide(a, b, known).1),
            Step::Min(a, b) => Value::Number(number(a).min(number(b))),
            Step::Max(a, b) => Value::Number(number(a).max(number(b))),
            Step::Choose { condition, a, b } => {
                Value::Number(truth(condition).select(number(a), number(b)))
            }
            Step::Table { table, ref indices } => {
                let Memory { address, inner } = &self.tables[table];
                let mut at = number(indices[0]).as_u32();
                for (&index, &extent) in indices[1..].iter().zip(inner) {
                    at = at * extent + number(index).as_u32();
                }
                let word: Reg<'k, u32> = k.load_constant(*address + at.times_wide(4));
                Value::Number(word.as_i32())
            }
            Step::Less(a, b) => Value::Truth(number(a).lt(number(b))),
            Step::Equal(a, b) => Value::Truth(number(a).equals(number(b))),
            Step::And(a, b) => Value::Truth(truth(a) & truth(b)),
            Step::Or(a, b) => Value::Truth(truth(a) | truth(b)),
            Step::Not(a) => Value::Truth(!truth(a)),
        }
    }

    /// Quotient rounded down, and remainder.
    fn divide(&self, a: usize, b: usize, known: &Known<'k>) -> (Reg<'k, i32>, Reg<'k, i32>) {
        let (a_value, b_value) = (number(known, a), number(known, b));
        if self.is_natural(a) && self.is_natural(b) {
            let (a, b) = (a_value.as_u32(), b_value.as_u32());
            return ((a / b).as_i32(), (a % b).as_i32());
        }
        // The instruction rounds towards zero.
        let (quotient, rest) = (a_value / b_value, a_value % b_value);
        let down = rest.differs(0) & (rest ^ b_value).lt(0);
        (
            down.select(quotient - 1, quotient),
            down.select(rest + b_value, rest),
        )
    }

    /// Whether a number is known not to be negative.
    fn is_natural(&self, step: usize) -> bool {
        match self.formula.steps[step] {
            Step::Batch | Step::Head | Step::Query | Step::Key => true,
            Step::Number(n) => n >= 0,
            Step::Add(a, b)
            | Step::Multiply(a, b)
            | Step::Divide(a, b)
            | Step::Remainder(a, b)
            | Step::Min(a, b) => self.is_natural(a) && self.is_natural(b),
            Step::Max(a, b) => self.is_natural(a) || self.is_natural(b),
            Step::Choose { a, b, .. } => self.is_natural(a) && self.is_natural(b),
            _ => false,
        }
    }
}

fn number<'k>(known: &Known<'k>, i: usize) -> Reg<'k, i32> {
    match known[i] {
        Some(Value::Number(value)) => value,
        _ => panic!("step {i} is no number, or not known yet"),
    }
}

fn truth<'k>(known: &Known<'k>, i: usize) -> Reg<'k, bool> {
    match known[i] {
        Some(Value::Truth(value)) => value,
        _ => panic!("step {i} is neither true nor false, or not known yet"),
    }
}
