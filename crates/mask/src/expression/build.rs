//! Rust operators that write expressions: [`Number`] and [`Truth`]. In: [`q`], [`kv`], [`b`], [`h`],
//! numbers and tables. Out: a tree with shared parts, which `Expression::new` turns into steps.

use std::collections::HashMap;
use std::ops;
use std::sync::Arc;

use super::{Formula, Step, Steps, Table};

/// A number that depends on the pair. `/` rounds down, and `%` has the divisor's sign.
#[derive(Debug, Clone)]
pub struct Number(Arc<Node>);

/// A condition on the pair.
#[derive(Debug, Clone)]
pub struct Truth(Arc<Node>);

/// A step whose operands are nodes.
#[derive(Debug)]
struct Node {
    /// Its operands are numbered from 0.
    step: Step,
    operands: Vec<Arc<Node>>,
    /// Of a lookup.
    table: Option<Table>,
}

fn node(step: Step, operands: Vec<Arc<Node>>) -> Arc<Node> {
    Arc::new(Node {
        step,
        operands,
        table: None,
    })
}

/// The batch.
pub fn b() -> Number {
    Number(node(Step::Batch, vec![]))
}

/// The head of q.
pub fn h() -> Number {
    Number(node(Step::Head, vec![]))
}

/// The query's place in its sequence.
pub fn q() -> Number {
    Number(node(Step::Query, vec![]))
}

/// The key's place in its sequence.
pub fn kv() -> Number {
    Number(node(Step::Key, vec![]))
}

impl From<i32> for Number {
    fn from(n: i32) -> Self {
        Self(node(Step::Number(n), vec![]))
    }
}

impl From<bool> for Truth {
    fn from(truth: bool) -> Self {
        Self(node(Step::Truth(truth), vec![]))
    }
}

impl Table {
    /// The number at some indices, one for each dimension.
    ///
    /// # Panics
    /// If there are more indices, or fewer.
    pub fn at<const N: usize>(&self, indices: [Number; N]) -> Number {
        assert_eq!(N, self.extents().len(), "indices of {self:?}");
        Number(Arc::new(Node {
            step: Step::Table {
                table: 0,
                indices: (0..N).collect(),
            },
            operands: indices.into_iter().map(|index| index.0).collect(),
            table: Some(self.clone()),
        }))
    }
}

impl Number {
    fn with(self, step: Step, other: impl Into<Self>) -> Arc<Node> {
        node(step, vec![self.0, other.into().0])
    }

    /// The smaller of two.
    pub fn min(self, other: impl Into<Self>) -> Self {
        Self(self.with(Step::Min(0, 1), other))
    }

    /// The larger of two.
    pub fn max(self, other: impl Into<Self>) -> Self {
        Self(self.with(Step::Max(0, 1), other))
    }

    /// Without its sign.
    pub fn abs(self) -> Self {
        let negated = -self.clone();
        self.max(negated)
    }

    /// Whether it is less than another.
    pub fn less_than(self, other: impl Into<Self>) -> Truth {
        Truth(self.with(Step::Less(0, 1), other))
    }

    /// Whether it is more than another.
    pub fn more_than(self, other: impl Into<Self>) -> Truth {
        other.into().less_than(self)
    }

    /// Whether it is another, or less.
    pub fn at_most(self, other: impl Into<Self>) -> Truth {
        !self.more_than(other)
    }

    /// Whether it is another, or more.
    pub fn at_least(self, other: impl Into<Self>) -> Truth {
        !self.less_than(other)
    }

    /// Whether they are equal.
    pub fn equals(self, other: impl Into<Self>) -> Truth {
        Truth(self.with(Step::Equal(0, 1), other))
    }
}

macro_rules! of_numbers {
    ($($trait:ident $method:ident $step:ident;)*) => {$(
        impl<T: Into<Number>> ops::$trait<T> for Number {
            type Output = Number;
            fn $method(self, other: T) -> Number {
                Number(self.with(Step::$step(0, 1), other))
            }
        }
    )*};
}

of_numbers! {
    Add add Add;
    Sub sub Subtract;
    Mul mul Multiply;
    Div div Divide;
    Rem rem Remainder;
}

impl ops::Neg for Number {
    type Output = Self;

    fn neg(self) -> Self {
        Self::from(0) - self
    }
}

impl Truth {
    /// `a` where it holds, `b` elsewhere.
    pub fn choose(self, a: impl Into<Number>, b: impl Into<Number>) -> Number {
        let step = Step::Choose {
            condition: 0,
            a: 1,
            b: 2,
        };
        Number(node(step, vec![self.0, a.into().0, b.into().0]))
    }
}

impl ops::BitAnd for Truth {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(node(Step::And(0, 1), vec![self.0, other.0]))
    }
}

impl ops::BitOr for Truth {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(node(Step::Or(0, 1), vec![self.0, other.0]))
    }
}

impl ops::BitXor for Truth {
    type Output = Self;

    fn bitxor(self, other: Self) -> Self {
        (self.clone() & !other.clone()) | (!self & other)
    }
}

impl ops::Not for Truth {
    type Output = Self;

    fn not(self) -> Self {
        Self(node(Step::Not(0), vec![self.0]))
    }
}

/// A condition's formula, and its tables in the formula's order.
pub(super) fn lower(condition: &Truth) -> (Formula, Vec<Table>) {
    let mut lowering = Lowering::default();
    let root = lowering.node(&condition.0);
    let (formula, used) = lowering.steps.finish(root);
    let tables = used.into_iter().map(|i| lowering.tables[i].clone());
    (formula, tables.collect())
}

#[derive(Default)]
struct Lowering {
    steps: Steps,
    tables: Vec<Table>,
    /// Of nodes that several share.
    places: HashMap<*const Node, usize>,
}

impl Lowering {
    fn node(&mut self, node: &Arc<Node>) -> usize {
        let key = Arc::as_ptr(node);
        if let Some(&place) = self.places.get(&key) {
            return place;
        }
        let operands: Vec<usize> = node.operands.iter().map(|node| self.node(node)).collect();
        let mut step = node.step.map(|i| operands[i]);
        if let (Step::Table { table, .. }, Some(looked_up)) = (&mut step, &node.table) {
            *table = self.table(looked_up);
        }
        let place = self.steps.put(step);
        self.places.insert(key, place);
        place
    }

    /// The number of a table; clones are one table.
    fn table(&mut self, table: &Table) -> usize {
        let same = |known: &Table| Arc::ptr_eq(&known.values, &table.values);
        self.tables.iter().position(same).unwrap_or_else(|| {
            self.tables.push(table.clone());
            self.tables.len() - 1
        })
    }
}
