//! [`Program`]: a formula as ranges of numbers are found by it. In: a formula. Out: nodes in the order
//! of their computation, sorted by the axes they depend on.
//!
//! Sums and differences become linear forms, in which what occurs on both sides of a comparison meets
//! itself: `q - kv < w` and `q < kv + w` are one form, of two independent parts, whose range is exact.

use std::collections::{BTreeMap, HashMap};

use super::extremes::Extremes;
use super::interval::Interval;
use super::tight::tight;
use crate::expression::{Expression, Formula, Step, step, steps};

/// A node, of earlier ones.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Node {
    Batch,
    Head,
    Query,
    Key,
    Constant(i64),
    /// A constant, and factors of nodes.
    Sum(i64, Vec<(i64, usize)>),
    /// A sum as it mostly is: one node less another.
    Difference(usize, usize),
    Product(usize, usize),
    Divide(usize, usize),
    Remainder(usize, usize),
    Min(usize, usize),
    Max(usize, usize),
    Abs(usize),
    Choose(usize, usize, usize),
    Table(usize, Vec<usize>),
    /// Whether a node is less than a number.
    IsBelow(usize, i64),
    /// Whether it is more.
    IsAbove(usize, i64),
    IsZero(usize),
    /// What most conditions on both axes come to.
    Band(Band),
    And(usize, usize),
    Or(usize, usize),
    Not(usize),
}

/// Whether a node of the queries less one of the keys lies in a range.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Band {
    pub query: usize,
    pub key: usize,
    low: i64,
    high: i64,
    /// Whether both nodes have the ends of their ranges.
    is_tight: bool,
}

impl Band {
    /// Whether some pair lies outside, and whether some pair lies inside, as far as the pairs tell that
    /// have the ends of both ranges.
    pub fn found(&self, query: Interval, key: Interval) -> [bool; 2] {
        let ends = [query.low - key.high, query.high - key.low];
        let is_inside = |&end: &i64| self.low <= end && end <= self.high;
        [
            self.is_tight && !ends.iter().all(is_inside),
            self.is_tight && ends.iter().any(is_inside),
        ]
    }

    /// Where keys are inside with all of some queries, and where they are with one of them, perhaps.
    pub fn keys(&self, query: Interval) -> [Interval; 2] {
        let from = |n: i64, less: i64| n.saturating_sub(less);
        [
            Interval::new(from(query.high, self.high), from(query.low, self.low)),
            Interval::new(from(query.low, self.high), from(query.high, self.low)),
        ]
    }

    #[inline]
    pub fn range(&self, query: Interval, key: Interval) -> Interval {
        let (low, high) = (query.low - key.high, query.high - key.low);
        Interval::new(
            i64::from(self.low <= low && high <= self.high),
            i64::from(self.low <= high && low <= self.high),
        )
    }
}

/// A condition of those that the root joins.
#[derive(Debug)]
pub(super) struct Part {
    pub node: usize,
    /// Nodes of both axes to be computed for it, itself included.
    pub nodes: Vec<usize>,
}

/// Where a range is wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Region {
    pub batch: Interval,
    pub head: Interval,
    pub query: Interval,
    pub key: Interval,
}

pub(super) struct Program<'a> {
    pub nodes: Vec<Node>,
    /// What each depends on, in bits of `step::on`.
    pub depends: Vec<u8>,
    /// The node that is the formula's value.
    pub root: usize,
    /// Of the root's chain of `and`, or of `or`: the operands that are bands; the root if it is one.
    pub bands: Vec<Band>,
    /// The others.
    pub parts: Vec<Part>,
    /// What of a part decides the root.
    pub decisive: Interval,
    /// Nodes of the queries, and of the keys, that others ask for: for each band its own, then those
    /// of which nodes on more axes ask, or whose value is that of a part.
    pub asked: [Vec<usize>; 2],
    tables: Vec<(Vec<i64>, Option<Extremes<'a>>)>,
}

/// `constant + sum of factor * node`.
#[derive(Debug, Clone, Default)]
struct Linear {
    constant: i64,
    terms: BTreeMap<usize, i64>,
}

impl Linear {
    fn add(mut self, other: &Self, factor: i64) -> Self {
        // Where that is not enough, the formula leaves int32, and is refused.
        let times = |n: i64| n.saturating_mul(factor);
        self.constant = self.constant.saturating_add(times(other.constant));
        for (&node, &own) in &other.terms {
            let sum = self.terms.entry(node).or_default();
            *sum = sum.saturating_add(times(own));
        }
        self.terms.retain(|_, factor| *factor != 0);
        self
    }

    fn scaled(self, factor: i64) -> Self {
        Self::default().add(&self, factor)
    }
}

/// What is being written.
struct Writer {
    nodes: Vec<Node>,
    depends: Vec<u8>,
    places: HashMap<Node, usize>,
}

/// A step's value so far.
enum Value {
    Number(Linear),
    Truth(usize),
}

impl<'a> Program<'a> {
    pub fn new(expression: &'a Expression) -> Self {
        let formula = expression.formula();
        let mut writer = Writer {
            nodes: Vec::new(),
            depends: Vec::new(),
            places: HashMap::new(),
        };
        let mut values: Vec<Value> = Vec::new();
        for step in &formula.steps {
            let value = writer.step(step, &values);
            values.push(value);
        }
        let root = match values.last() {
            Some(&Value::Truth(root)) => root,
            _ => unreachable!("checked formulas end with a condition: {formula:?}"),
        };
        let tables = expression.tables().iter().map(|table| {
            let extents = table.extents().iter().map(|&extent| extent.into());
            (extents.collect(), table.values().map(Extremes::new))
        });
        let mut program = Self {
            bands: Vec::new(),
            parts: Vec::new(),
            decisive: match writer.nodes[root] {
                Node::Or(..) => Interval::TRUE,
                _ => Interval::FALSE,
            },
            asked: Default::default(),
            nodes: writer.nodes,
            depends: writer.depends,
            root,
            tables: tables.collect(),
        };
        program.find_bands();
        program.find_parts();
        program
    }

    fn find_bands(&mut self) {
        let is_tight = tight(&self.nodes, &self.depends);
        for i in 0..self.nodes.len() {
            if let Some(band) = self.band(&self.nodes[i], &is_tight) {
                self.nodes[i] = Node::Band(band);
            }
        }
    }

    /// A comparison of a difference of two axes with numbers.
    fn band(&self, node: &Node, is_tight: &[bool]) -> Option<Band> {
        let (of, low, high) = match *node {
            Node::IsBelow(a, n) => match self.nodes[a] {
                Node::Abs(of) => (
                    of,
                    n.saturating_neg().saturating_add(1),
                    n.saturating_sub(1),
                ),
                _ => (a, i64::MIN, n.saturating_sub(1)),
            },
            Node::IsAbove(a, n) => (a, n.saturating_add(1), i64::MAX),
            Node::IsZero(a) => (a, 0, 0),
            _ => return None,
        };
        let (a, b, constant) = match self.nodes[of] {
            Node::Difference(a, b) => (a, b, 0),
            Node::Sum(constant, ref terms) => match terms[..] {
                [(1, a), (-1, b)] | [(-1, b), (1, a)] => (a, b, constant),
                _ => return None,
            },
            _ => return None,
        };
        let (low, high) = (low.saturating_sub(constant), high.saturating_sub(constant));
        if !(self.is_small(a) && self.is_small(b)) {
            return None;
        }
        let is_tight = is_tight[a] && is_tight[b];
        match (self.axes(a), self.axes(b)) {
            (step::on::QUERY, step::on::KEY) => Some(Band {
                query: a,
                key: b,
                low,
                high,
                is_tight,
            }),
            (step::on::KEY, step::on::QUERY) => Some(Band {
                query: b,
                key: a,
                low: high.saturating_neg(),
                high: low.saturating_neg(),
                is_tight,
            }),
            _ => None,
        }
    }

    /// Whether i64 holds the difference of two such nodes. Those that are no sums are steps of the
    /// formula, of int32.
    fn is_small(&self, node: usize) -> bool {
        match self.nodes[node] {
            Node::Sum(constant, ref terms) => {
                let factors = terms.iter().map(|&(factor, _)| factor.saturating_abs());
                let factors = factors.fold(0, i64::saturating_add);
                factors < 1 << 29 && constant.saturating_abs() < 1 << 60
            }
            _ => true,
        }
    }

    fn axes(&self, node: usize) -> u8 {
        self.depends[node] & (step::on::QUERY | step::on::KEY)
    }

    fn find_parts(&mut self) {
        let mut joined = Vec::new();
        self.join(self.root, &mut joined);
        let mut seen = vec![false; self.nodes.len()];
        for node in joined {
            if let Node::Band(band) = &self.nodes[node] {
                self.bands.push(band.clone());
                continue;
            }
            let mut nodes = Vec::new();
            self.visit(node, &mut seen, &mut nodes);
            self.parts.push(Part { node, nodes });
        }
        let mut asked: Vec<usize> = self.parts.iter().map(|part| part.node).collect();
        for &node in self.parts.iter().flat_map(|part| &part.nodes) {
            asked.extend(operands(&self.nodes[node]));
        }
        asked.sort_unstable();
        asked.dedup();
        let this = &*self;
        let on = |bit: u8| asked.iter().copied().filter(move |&i| this.axes(i) == bit);
        let queries = self
            .bands
            .iter()
            .map(|band| band.query)
            .chain(on(step::on::QUERY));
        let keys = self
            .bands
            .iter()
            .map(|band| band.key)
            .chain(on(step::on::KEY));
        self.asked = [queries.collect(), keys.collect()];
    }

    /// Operands of the root's chain of `and`, or of `or`.
    fn join(&self, node: usize, parts: &mut Vec<usize>) {
        match (&self.nodes[self.root], &self.nodes[node]) {
            (Node::And(..), &Node::And(a, b)) | (Node::Or(..), &Node::Or(a, b)) => {
                self.join(a, parts);
                self.join(b, parts);
            }
            _ => parts.push(node),
        }
    }

    fn visit(&self, node: usize, seen: &mut [bool], order: &mut Vec<usize>) {
        let both = step::on::QUERY | step::on::KEY;
        if self.axes(node) != both || std::mem::replace(&mut seen[node], true) {
            return;
        }
        for operand in operands(&self.nodes[node]) {
            self.visit(operand, seen, order);
        }
        order.push(node);
    }

    /// Whether it is a conjunction of bands whose keys do not begin anew now and then.
    pub fn may_be_sorted(&self) -> bool {
        let begins_anew = |(node, &on): (&Node, &u8)| {
            on & step::on::KEY != 0 && matches!(node, Node::Remainder(..))
        };
        self.parts.is_empty()
            && self.decisive == Interval::FALSE
            && !self.nodes.iter().zip(&self.depends).any(begins_anew)
    }

    /// Whether a node is the same for all pairs of a batch and a head.
    pub fn on_no_axis(&self, node: usize) -> bool {
        self.axes(node) == 0
    }

    /// What the bands make of the root, given the ranges that the axes are asked for.
    #[inline]
    pub fn of_bands(&self, queries: &[Interval], keys: &[Interval]) -> Interval {
        let mut all = self.decisive.negated();
        for ((band, &query), &key) in self.bands.iter().zip(queries).zip(keys) {
            let range = band.range(query, key);
            if range == self.decisive {
                return range;
            }
            if !range.is_one() {
                all = Interval::EITHER;
            }
        }
        all
    }

    /// The range of a node in a region, given those of earlier ones.
    #[inline]
    pub fn range(&self, node: usize, known: &[Interval], region: &Region) -> Interval {
        let of = |i: usize| known[i];
        match self.nodes[node] {
            Node::Batch => region.batch,
            Node::Head => region.head,
            Node::Query => region.query,
            Node::Key => region.key,
            Node::Constant(n) => Interval::one(n),
            Node::Sum(constant, ref terms) => {
                let mut sum = Interval::one(constant);
                for &(factor, node) in terms {
                    sum = sum.plus(match factor {
                        1 => of(node),
                        factor => of(node).scaled(factor),
                    });
                }
                sum
            }
            Node::Difference(a, b) => {
                let (a, b) = (of(a), of(b));
                Interval::new(a.low - b.high, a.high - b.low)
            }
            Node::Product(a, b) => of(a).times(of(b)),
            Node::Divide(a, b) => of(a).divided(of(b)),
            Node::Remainder(a, b) => of(a).remainder(of(b)),
            Node::Min(a, b) => of(a).min(of(b)),
            Node::Max(a, b) => of(a).max(of(b)),
            Node::Abs(a) => of(a).abs(),
            Node::Choose(condition, a, b) => of(condition).choose(of(a), of(b)),
            Node::Table(table, ref indices) => self.look_up(table, indices, known),
            Node::IsBelow(a, n) => of(a).is_below(n),
            Node::IsAbove(a, n) => of(a).is_below(n.saturating_add(1)).negated(),
            Node::IsZero(a) => of(a).is_zero(),
            Node::Band(ref band) => band.range(of(band.query), of(band.key)),
            Node::And(a, b) => of(a).min(of(b)),
            Node::Or(a, b) => of(a).max(of(b)),
            Node::Not(a) => of(a).negated(),
        }
    }

    fn look_up(&self, table: usize, indices: &[usize], known: &[Interval]) -> Interval {
        let (extents, extremes) = &self.tables[table];
        let Some(extremes) = extremes else {
            return Interval::ANY;
        };
        // From the first of the numbers to the last, as they lie: all, and perhaps some more.
        let (mut first, mut last) = (0, 0);
        for (&index, &extent) in indices.iter().zip(extents) {
            let inside = |n: i64| n.clamp(0, (extent - 1).max(0));
            first = first * extent + inside(known[index].low);
            last = last * extent + inside(known[index].high);
        }
        match extents.contains(&0) {
            true => Interval::ANY,
            false => extremes.between(first as usize, last as usize),
        }
    }
}

pub(super) fn operands(node: &Node) -> Vec<usize> {
    match *node {
        Node::Batch | Node::Head | Node::Query | Node::Key | Node::Constant(_) => vec![],
        Node::Sum(_, ref terms) => terms.iter().map(|&(_, node)| node).collect(),
        Node::Difference(a, b)
        | Node::Product(a, b)
        | Node::Divide(a, b)
        | Node::Remainder(a, b)
        | Node::Min(a, b)
        | Node::Max(a, b)
        | Node::And(a, b)
        | Node::Or(a, b) => vec![a, b],
        Node::Abs(a)
        | Node::IsBelow(a, _)
        | Node::IsAbove(a, _)
        | Node::IsZero(a)
        | Node::Not(a) => vec![a],
        Node::Band(Band { query, key, .. }) => vec![query, key],
        Node::Choose(condition, a, b) => vec![condition, a, b],
        Node::Table(_, ref indices) => indices.clone(),
    }
}

impl Writer {
    fn put(&mut self, node: Node) -> usize {
        if let Some(&place) = self.places.get(&node) {
            return place;
        }
        let own = match node {
            Node::Batch => step::on::BATCH,
            Node::Head => step::on::HEAD,
            Node::Query => step::on::QUERY,
            Node::Key => step::on::KEY,
            _ => 0,
        };
        let depends = operands(&node)
            .into_iter()
            .fold(own, |bits, i| bits | self.depends[i]);
        let place = self.nodes.len();
        self.depends.push(depends);
        self.places.insert(node.clone(), place);
        self.nodes.push(node);
        place
    }

    fn step(&mut self, step: &Step, values: &[Value]) -> Value {
        let linear = |i: usize| match &values[i] {
            Value::Number(linear) => linear.clone(),
            Value::Truth(_) => unreachable!("checked formulas have the right types"),
        };
        let truth = |i: usize| match values[i] {
            Value::Truth(node) => node,
            Value::Number(_) => unreachable!("checked formulas have the right types"),
        };
        let node = match *step {
            Step::Number(n) => {
                return Value::Number(Linear {
                    constant: n.into(),
                    ..Linear::default()
                });
            }
            Step::Add(a, b) => return Value::Number(linear(a).add(&linear(b), 1)),
            Step::Subtract(a, b) => return Value::Number(linear(a).add(&linear(b), -1)),
            Step::Multiply(a, b) => {
                let (a, b) = (linear(a), linear(b));
                match (a.terms.is_empty(), b.terms.is_empty()) {
                    (true, _) => return Value::Number(b.scaled(a.constant)),
                    (_, true) => return Value::Number(a.scaled(b.constant)),
                    _ => Node::Product(self.number(a), self.number(b)),
                }
            }
            Step::Batch => Node::Batch,
            Step::Head => Node::Head,
            Step::Query => Node::Query,
            Step::Key => Node::Key,
            Step::Divide(a, b) => Node::Divide(self.number(linear(a)), self.number(linear(b))),
            Step::Remainder(a, b) => {
                Node::Remainder(self.number(linear(a)), self.number(linear(b)))
            }
            Step::Min(a, b) => Node::Min(self.number(linear(a)), self.number(linear(b))),
            Step::Max(a, b) => {
                let sum = linear(a).add(&linear(b), 1);
                if sum.terms.is_empty() && sum.constant == 0 {
                    Node::Abs(self.number(linear(a)))
                } else {
                    Node::Max(self.number(linear(a)), self.number(linear(b)))
                }
            }
            Step::Choose { condition, a, b } => {
                let (a, b) = (self.number(linear(a)), self.number(linear(b)));
                Node::Choose(truth(condition), a, b)
            }
            Step::Table { table, ref indices } => {
                let indices = indices.iter().map(|&i| self.number(linear(i)));
                Node::Table(table, indices.collect())
            }
            Step::Less(a, b) => {
                let difference = linear(a).add(&linear(b), -1);
                return Value::Truth(self.is_negative(difference));
            }
            Step::Equal(a, b) => {
                let difference = linear(a).add(&linear(b), -1);
                let number = self.number(difference);
                return Value::Truth(self.put(Node::IsZero(number)));
            }
            Step::Truth(truth) => {
                return Value::Truth(self.put(Node::Constant(truth.into())));
            }
            Step::And(a, b) => return Value::Truth(self.put(Node::And(truth(a), truth(b)))),
            Step::Or(a, b) => return Value::Truth(self.put(Node::Or(truth(a), truth(b)))),
            Step::Not(a) => {
                return Value::Truth(self.put(match self.nodes[truth(a)] {
                    Node::IsBelow(node, n) => Node::IsAbove(node, n.saturating_sub(1)),
                    Node::IsAbove(node, n) => Node::IsBelow(node, n.saturating_add(1)),
                    _ => Node::Not(truth(a)),
                }));
            }
        };
        let node = self.put(node);
        Value::Number(Linear {
            constant: 0,
            terms: BTreeMap::from([(node, 1)]),
        })
    }

    /// Whether a linear form is less than 0: whether what varies is less than what does not.
    fn is_negative(&mut self, mut form: Linear) -> usize {
        let constant = std::mem::take(&mut form.constant);
        let is_turned = form.terms.len() == 1 && form.terms.values().all(|&factor| factor == -1);
        if is_turned {
            let node = self.number(form.scaled(-1));
            return self.put(Node::IsAbove(node, constant));
        }
        let node = self.number(form);
        self.put(Node::IsBelow(node, constant.saturating_neg()))
    }

    /// The node of a linear form: a sum of what depends on neither axis, on either, and on both.
    fn number(&mut self, linear: Linear) -> usize {
        let axes = step::on::QUERY | step::on::KEY;
        let mut groups: BTreeMap<u8, Vec<(i64, usize)>> = BTreeMap::new();
        for (node, factor) in linear.terms {
            let group = groups.entry(self.depends[node] & axes).or_default();
            group.push((factor, node));
        }
        let mut sums: Vec<(i64, usize)> = Vec::new();
        let several = groups.len() > 1;
        for (on, group) in groups {
            match several && on != axes && group.len() > 1 {
                true => sums.push((1, self.put(Node::Sum(0, group)))),
                false => sums.extend(group),
            }
        }
        match (linear.constant, &sums[..]) {
            (constant, []) => self.put(Node::Constant(constant)),
            (0, &[(1, node)]) => node,
            (0, &[(1, a), (-1, b)]) | (0, &[(-1, b), (1, a)]) => self.put(Node::Difference(a, b)),
            (constant, _) => self.put(Node::Sum(constant, sums)),
        }
    }
}

/// Whether all of a formula's numbers are int32, its divisors not 0 and its indices inside of their
/// tables, wherever it is evaluated; if not, why.
pub(super) fn check(
    expression: &Expression,
    program: &Program<'_>,
    everywhere: &Region,
) -> Result<(), String> {
    let (formula, tables) = (expression.formula(), expression.tables());
    let mut known: Vec<Interval> = Vec::new();
    for step in &formula.steps {
        let of = |i: usize| known[i];
        let range = match *step {
            Step::Batch => everywhere.batch,
            Step::Head => everywhere.head,
            Step::Query => everywhere.query,
            Step::Key => everywhere.key,
            Step::Number(n) => Interval::one(n.into()),
            Step::Add(a, b) => of(a).plus(of(b)),
            Step::Subtract(a, b) => of(a).minus(of(b)),
            Step::Multiply(a, b) => of(a).times(of(b)),
            Step::Divide(a, b) | Step::Remainder(a, b) => {
                if of(b).has(0) {
                    return Err(format!("{} may divide by 0", piece(formula, step)));
                }
                match step {
                    Step::Divide(..) => of(a).divided(of(b)),
                    _ => of(a).remainder(of(b)),
                }
            }
            Step::Min(a, b) => of(a).min(of(b)),
            Step::Max(a, b) if is_negation(formula, a, b) => of(a).abs(),
            Step::Max(a, b) => of(a).max(of(b)),
            Step::Choose { condition, a, b } => of(condition).choose(of(a), of(b)),
            Step::Table { table, ref indices } => {
                for (&index, &extent) in indices.iter().zip(tables[table].extents()) {
                    let range = of(index);
                    if range.low < 0 || range.high >= i64::from(extent) {
                        return Err(format!(
                            "index {} of table t{table} goes from {} to {}, but that dimension \
                             has {extent} entries: clamp it",
                            piece(formula, &formula.steps[index]),
                            range.low,
                            range.high
                        ));
                    }
                }
                program.look_up(table, indices, &known)
            }
            Step::Less(a, b) => of(a).minus(of(b)).is_below(0),
            Step::Equal(a, b) => of(a).minus(of(b)).is_zero(),
            Step::Truth(truth) => Interval::one(truth.into()),
            Step::And(a, b) => of(a).min(of(b)),
            Step::Or(a, b) => of(a).max(of(b)),
            Step::Not(a) => of(a).negated(),
        };
        if range.low < Interval::ANY.low || range.high > Interval::ANY.high {
            return Err(format!(
                "{} goes from {} to {}, which int32 does not hold",
                piece(formula, step),
                range.low,
                range.high
            ));
        }
        known.push(range);
    }
    Ok(())
}

/// Whether one number is the other with its sign changed.
fn is_negation(formula: &Formula, a: usize, b: usize) -> bool {
    match formula.steps[b] {
        Step::Subtract(zero, inner) => inner == a && formula.steps[zero] == Step::Number(0),
        _ => false,
    }
}

/// A step as text.
fn piece(formula: &Formula, step: &Step) -> String {
    let at = formula.steps.iter().position(|other| other == step);
    let (mut piece, tables) = steps::prune(&formula.steps, at.unwrap_or_default());
    for step in &mut piece.steps {
        if let Step::Table { table, .. } = step {
            *table = tables[*table];
        }
    }
    piece.to_string()
}
