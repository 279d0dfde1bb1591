//! [`Rule`]: a mask's formula with its tables, interpreted one pair at a time.

use flex_block_attn::expression::{self, Expression};
use flex_block_attn::{BlockMask, Plan};
use flex_block_attn_emulator::Memory;
use flex_block_attn_kernels::exact::{Formula, Mask, Step, Table};
use flex_block_attn_mask::Side;

/// In an entry of a plan's list: the block is partial.
const PARTIAL: i32 = i32::MIN;

/// Which pairs of a query and a key count, within the blocks that a mask keeps.
#[derive(Debug, Clone)]
pub struct Rule {
    /// By which.
    pub formula: Formula,
    /// Extents and numbers of its tables.
    pub tables: Vec<(Vec<u32>, Vec<i32>)>,
}

impl Rule {
    /// The rule of a mask's expression, if it has one; its tables are on the host.
    pub fn of(mask: &BlockMask) -> Option<Self> {
        let expression = mask.expression()?;
        let table = |table: &expression::Table| {
            let values = table.values().expect("the host has the table");
            (table.extents().to_vec(), values.to_vec())
        };
        Some(Self {
            formula: expression.formula().clone(),
            tables: expression.tables().iter().map(table).collect(),
        })
    }

    /// As masks are made of it.
    pub fn expression(&self) -> Expression {
        let table = |(extents, numbers): &(Vec<u32>, Vec<i32>)| {
            expression::Table::new(extents, numbers.clone())
                .expect("as many numbers as extents say")
        };
        let tables = self.tables.iter().map(table).collect();
        Expression::from_formula(self.formula.clone(), tables).expect("rules are well typed")
    }

    /// As kernels are built with it.
    pub fn mask(&self) -> Mask {
        Mask::new(self.formula.clone())
    }

    /// Its tables, in memory.
    pub fn tables(&self, memory: &mut Memory) -> Vec<Table> {
        let table = |(extents, numbers): &(Vec<u32>, Vec<i32>)| Table {
            address: memory.alloc_with("table", numbers),
            extents: extents.clone(),
        };
        self.tables.iter().map(table).collect()
    }

    /// Whether a pair counts.
    pub fn counts(&self, batch: usize, head: usize, query: usize, key: usize) -> bool {
        let mut values: Vec<i64> = Vec::new();
        for step in &self.formula.steps {
            let of = |i: usize| values[i];
            let value = match *step {
                Step::Batch => batch as i64,
                Step::Head => head as i64,
                Step::Query => query as i64,
                Step::Key => key as i64,
                Step::Number(n) => n.into(),
                Step::Truth(truth) => truth.into(),
                Step::Add(a, b) => of(a) + of(b),
                Step::Subtract(a, b) => of(a) - of(b),
                Step::Multiply(a, b) => of(a) * of(b),
                Step::Divide(a, b) => (of(a) as f64 / of(b) as f64).floor() as i64,
                Step::Remainder(a, b) => {
                    of(a) - of(b) * (of(a) as f64 / of(b) as f64).floor() as i64
                }
                Step::Min(a, b) => of(a).min(of(b)),
                Step::Max(a, b) => of(a).max(of(b)),
                Step::Choose { condition, a, b } => of(if of(condition) != 0 { a } else { b }),
                Step::Table { table, ref indices } => {
                    let (extents, numbers) = &self.tables[table];
                    let at = indices
                        .iter()
                        .zip(extents)
                        .fold(0, |at, (&i, &extent)| at * i64::from(extent) + of(i));
                    numbers[at as usize].into()
                }
                Step::Less(a, b) => (of(a) < of(b)).into(),
                Step::Equal(a, b) => (of(a) == of(b)).into(),
                Step::And(a, b) => of(a) & of(b),
                Step::Or(a, b) => of(a) | of(b),
                Step::Not(a) => 1 - of(a),
            };
            values.push(value);
        }
        values.last().is_some_and(|&value| value != 0)
    }

    /// The plan of a mask whose entries say which blocks are partial: those that do not count whole.
    /// It has a matrix for each batch and head if the rule depends on them.
    pub fn plan(&self, mask: &BlockMask) -> Vec<i32> {
        let plan = Plan::new(mask);
        let (layout, extents) = (plan.layout(), mask.extents());
        let mut words = plan.words().to_vec();
        let end = |block: usize, size: usize, len: usize| ((block + 1) * size).min(len);
        let partial = |batch: usize, head: usize, row: usize, column: usize| {
            let queries = row * extents.q_block()..end(row, extents.q_block(), extents.q_len());
            let mut pairs = queries.flat_map(|query| {
                let keys =
                    column * extents.kv_block()..end(column, extents.kv_block(), extents.kv_len());
                keys.map(move |key| (query, key))
            });
            !pairs.all(|(query, key)| self.counts(batch, head, query, key))
        };
        for (record, line) in words
            .chunks_exact_mut(layout.record_words())
            .zip(0..layout.batch * layout.heads)
        {
            let (batch, head) = (line / layout.heads, line % layout.heads);
            for which in [Side::Rows, Side::Columns] {
                let side = layout.side(which);
                for list in 0..side.lists {
                    for at in 0..record[side.count(list)] as usize {
                        let word = &mut record[side.list(list) + at];
                        let (row, column) = match which {
                            Side::Rows => (list, *word as usize),
                            Side::Columns => (*word as usize, list),
                        };
                        if partial(batch, head, row, column) {
                            *word |= PARTIAL;
                        }
                    }
                }
            }
        }
        words
    }
}
