//! [`Step`]s, and the [`Formula`] that they make. In: steps in the order of their computation. Out:
//! what they name, and whether types fit. Read by all that evaluate formulas, here, on CPUs and in
//! kernels.

use crate::MaskError;

/// A step of a [`Formula`]; others are named by their place in it, before this one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // operands
pub enum Step {
    /// The batch.
    Batch,
    /// The head of q.
    Head,
    /// The query's place in its sequence.
    Query,
    /// The key's.
    Key,
    /// A number.
    Number(i32),
    /// True or false.
    Truth(bool),
    /// The sum of two numbers.
    Add(usize, usize),
    /// Their difference.
    Subtract(usize, usize),
    /// Their product.
    Multiply(usize, usize),
    /// The quotient, rounded down.
    Divide(usize, usize),
    /// What is left, of the divisor's sign.
    Remainder(usize, usize),
    /// The smaller of two numbers.
    Min(usize, usize),
    /// The larger.
    Max(usize, usize),
    /// `if condition { a } else { b }`, of numbers.
    Choose { condition: usize, a: usize, b: usize },
    /// A number of a table of int32 by its indices.
    Table { table: usize, indices: Vec<usize> },
    /// Whether a number is less than another.
    Less(usize, usize),
    /// Whether two numbers are equal.
    Equal(usize, usize),
    /// Whether both hold.
    And(usize, usize),
    /// Whether one or both hold.
    Or(usize, usize),
    /// Whether it does not hold.
    Not(usize),
}

/// Which pairs of a query and a key count: the value of its last step.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Formula {
    /// In the order of their computation.
    pub steps: Vec<Step>,
    /// Dimensions of each table.
    pub tables: Vec<usize>,
}

/// What a step depends on, in bits.
pub(crate) mod on {
    pub const QUERY: u8 = 1;
    pub const KEY: u8 = 2;
    pub const BATCH: u8 = 4;
    pub const HEAD: u8 = 8;
}

impl Step {
    /// The steps that it names.
    pub fn operands(&self) -> Vec<usize> {
        match *self {
            Self::Batch
            | Self::Head
            | Self::Query
            | Self::Key
            | Self::Number(_)
            | Self::Truth(_) => vec![],
            Self::Add(a, b)
            | Self::Subtract(a, b)
            | Self::Multiply(a, b)
            | Self::Divide(a, b)
            | Self::Remainder(a, b)
            | Self::Min(a, b)
            | Self::Max(a, b)
            | Self::Less(a, b)
            | Self::Equal(a, b)
            | Self::And(a, b)
            | Self::Or(a, b) => vec![a, b],
            Self::Choose { condition, a, b } => vec![condition, a, b],
            Self::Table { ref indices, .. } => indices.clone(),
            Self::Not(a) => vec![a],
        }
    }

    /// The same step, of operands that `of` finds.
    pub fn map(&self, of: impl Fn(usize) -> usize) -> Self {
        match *self {
            Self::Batch => Self::Batch,
            Self::Head => Self::Head,
            Self::Query => Self::Query,
            Self::Key => Self::Key,
            Self::Number(n) => Self::Number(n),
            Self::Truth(truth) => Self::Truth(truth),
            Self::Add(a, b) => Self::Add(of(a), of(b)),
            Self::Subtract(a, b) => Self::Subtract(of(a), of(b)),
            Self::Multiply(a, b) => Self::Multiply(of(a), of(b)),
            Self::Divide(a, b) => Self::Divide(of(a), of(b)),
            Self::Remainder(a, b) => Self::Remainder(of(a), of(b)),
            Self::Min(a, b) => Self::Min(of(a), of(b)),
            Self::Max(a, b) => Self::Max(of(a), of(b)),
            Self::Choose { condition, a, b } => Self::Choose {
                condition: of(condition),
                a: of(a),
                b: of(b),
            },
            Self::Table { table, ref indices } => Self::Table {
                table,
                indices: indices.iter().map(|&i| of(i)).collect(),
            },
            Self::Less(a, b) => Self::Less(of(a), of(b)),
            Self::Equal(a, b) => Self::Equal(of(a), of(b)),
            Self::And(a, b) => Self::And(of(a), of(b)),
            Self::Or(a, b) => Self::Or(of(a), of(b)),
            Self::Not(a) => Self::Not(of(a)),
        }
    }

    /// Whether it is true or false, and no number.
    pub fn is_truth(&self) -> bool {
        matches!(
            self,
            Self::Truth(_)
                | Self::Less(..)
                | Self::Equal(..)
                | Self::And(..)
                | Self::Or(..)
                | Self::Not(_)
        )
    }

    /// Whether its operand number `i` is to be true or false.
    pub(crate) fn wants_truth(&self, i: usize) -> bool {
        match self {
            Self::And(..) | Self::Or(..) | Self::Not(_) => true,
            Self::Choose { .. } => i == 0,
            _ => false,
        }
    }
}

impl Formula {
    /// Whether every step names earlier ones of the right type, and the last is true or false.
    pub(crate) fn check(&self) -> Result<(), MaskError> {
        let error = |reason: String| MaskError::Formula {
            text: format!("{self:?}"),
            reason,
        };
        for (at, step) in self.steps.iter().enumerate() {
            for (i, operand) in step.operands().into_iter().enumerate() {
                if operand >= at {
                    return Err(error(format!("step {at} names step {operand}")));
                }
                if self.steps[operand].is_truth() != step.wants_truth(i) {
                    return Err(error(format!(
                        "step {operand} is of the wrong type for {at}"
                    )));
                }
            }
            if let Step::Table { table, indices } = step
                && self.tables.get(*table) != Some(&indices.len())
            {
                return Err(error(format!("step {at} does not fit its table")));
            }
        }
        match self.steps.last() {
            Some(last) if last.is_truth() => Ok(()),
            _ => Err(error("it is neither true nor false".into())),
        }
    }

    /// What each step depends on, in bits of [`on`].
    pub(crate) fn dependences(&self) -> Vec<u8> {
        let mut all: Vec<u8> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let own = match step {
                Step::Query => on::QUERY,
                Step::Key => on::KEY,
                Step::Batch => on::BATCH,
                Step::Head => on::HEAD,
                _ => 0,
            };
            let operands = step.operands().into_iter().map(|i| all[i]);
            all.push(operands.fold(own, |bits, more| bits | more));
        }
        all
    }

    fn depends(&self, bit: u8) -> bool {
        self.dependences()
            .last()
            .is_some_and(|bits| bits & bit != 0)
    }

    /// Whether batches may have different masks.
    pub fn depends_on_batch(&self) -> bool {
        self.depends(on::BATCH)
    }

    /// Whether heads may have different masks.
    pub fn depends_on_head(&self) -> bool {
        self.depends(on::HEAD)
    }
}
