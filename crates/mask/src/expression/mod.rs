//! Expressions: which pairs of a query and a key count, token by token.
//!
//! In: Rust operators on [`Number`] and [`Truth`], steps put down one by one ([`Steps`]), or text. Out:
//! a [`Formula`], which the CPU backend evaluates ([`Evaluator`]) and from which GPU kernels are built;
//! with its tables an [`Expression`], from which [`crate::BlockMask::from_expression`] finds the blocks.
//!
//! - `step`: a formula's steps. `steps`: equal ones are kept once, known ones computed.
//! - `build`: operators. `text`: formulas to text and back.
//! - `evaluate`: values of the pairs of a tile.
//!
//! Numbers are int32, as on the device. Quotients are rounded down, and remainders have the divisor's
//! sign, as in Python.
//!
//! ```
//! use flex_block_attn_mask::expression::{Expression, Table, kv, q};
//! use flex_block_attn_mask::{BlockMask, Extents};
//!
//! let document = Table::new(&[256], (0..256).map(|token| token / 100).collect())?;
//! let causal = kv().at_most(q());
//! let same = document.at([q()]).equals(document.at([kv()]));
//! let expression = Expression::new(&(causal & same))?;
//! assert_eq!(expression.to_string(), "q >= kv and t0[q] == t0[kv]");
//!
//! let mask = BlockMask::from_expression(Extents::new(256, 256, 64, 64)?, 1, 1, &expression)?;
//! assert_eq!(mask.count(), 8);
//! # Ok::<(), flex_block_attn_mask::MaskError>(())
//! ```

mod build;
mod evaluate;
pub(crate) mod step;
pub(crate) mod steps;
mod text;

use std::sync::Arc;

pub use build::{Number, Truth, b, h, kv, q};
pub use evaluate::Evaluator;
pub use step::{Formula, Step};
pub use steps::Steps;

use crate::MaskError;

/// Dimensions of a table at most.
const MOST_DIMENSIONS: usize = 4;

/// A table of int32 numbers that a formula looks up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    extents: Vec<u32>,
    /// Tables that share it are one.
    values: Arc<Option<Vec<i32>>>,
}

impl Table {
    /// A table of 1 to 4 dimensions, outermost first, with its numbers.
    ///
    /// # Errors
    /// Other numbers of dimensions or of values.
    pub fn new(extents: &[u32], values: Vec<i32>) -> Result<Self, MaskError> {
        let table = Self::elsewhere(extents)?;
        if values.len() != table.len() {
            return Err(MaskError::Parameter {
                argument: "values",
                got: values.len().to_string(),
                allowed: "as many as the table's extents say",
            });
        }
        let values = Arc::new(Some(values));
        Ok(Self { values, ..table })
    }

    /// A table whose numbers only a device has: nothing is known of them, and blocks that depend on
    /// them are partial.
    ///
    /// # Errors
    /// Other than 1 to 4 dimensions, or 2^31 numbers or more.
    pub fn elsewhere(extents: &[u32]) -> Result<Self, MaskError> {
        if extents.is_empty() || extents.len() > MOST_DIMENSIONS {
            return Err(MaskError::Parameter {
                argument: "a table's number of dimensions",
                got: extents.len().to_string(),
                allowed: "1 to 4",
            });
        }
        let len = extents
            .iter()
            .try_fold(1u32, |len, &extent| len.checked_mul(extent));
        if len.is_none_or(|len| i32::try_from(len).is_err()) {
            return Err(MaskError::Parameter {
                argument: "a table's number of values",
                got: format!("{extents:?}"),
                allowed: "less than 2^31",
            });
        }
        let extents = extents.to_vec();
        Ok(Self {
            extents,
            values: Arc::new(None),
        })
    }

    /// Extents, outermost first.
    pub fn extents(&self) -> &[u32] {
        &self.extents
    }

    /// Its numbers, if the host has them.
    pub fn values(&self) -> Option<&[i32]> {
        self.values.as_ref().as_deref()
    }

    fn len(&self) -> usize {
        self.extents.iter().map(|&extent| extent as usize).product()
    }
}

/// A formula with its tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expression {
    formula: Formula,
    tables: Vec<Table>,
}

impl Expression {
    /// The formula of a condition, and the tables it looks up.
    ///
    /// # Errors
    /// None but those of [`Expression::from_formula`], which operators do not let happen.
    pub fn new(condition: &Truth) -> Result<Self, MaskError> {
        let (formula, tables) = build::lower(condition);
        Self::from_formula(formula, tables)
    }

    /// A formula with its tables, in the order of their numbers.
    ///
    /// # Errors
    /// Steps of the wrong type, steps that name later ones, and tables that do not fit.
    pub fn from_formula(formula: Formula, tables: Vec<Table>) -> Result<Self, MaskError> {
        formula.check()?;
        let given: Vec<usize> = tables.iter().map(|table| table.extents.len()).collect();
        if given != formula.tables {
            return Err(MaskError::Formula {
                text: formula.to_string(),
                reason: format!(
                    "its tables have {:?} dimensions, but those given {given:?}",
                    formula.tables
                ),
            });
        }
        Ok(Self { formula, tables })
    }

    /// Its formula.
    pub fn formula(&self) -> &Formula {
        &self.formula
    }

    /// Its tables.
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }
}

impl std::fmt::Display for Expression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.formula.fmt(f)
    }
}
