//! [`Steps`]: steps put down one by one. In: a step whose operands are there. Out: its place, which
//! equal steps share; what is known beforehand is computed at once. Called by `build`, by `text`, and
//! by who traces functions.

use std::collections::HashMap;

use super::{Formula, Step};

/// Steps of a formula that is being written.
#[derive(Debug, Clone, Default)]
pub struct Steps {
    steps: Vec<Step>,
    places: HashMap<Step, usize>,
}

impl Steps {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The step at a place.
    ///
    /// # Panics
    /// If there is none.
    pub fn get(&self, place: usize) -> &Step {
        &self.steps[place]
    }

    /// Steps so far.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// A number.
    pub fn number(&mut self, n: i32) -> usize {
        self.keep(Step::Number(n))
    }

    /// True or false.
    pub fn truth(&mut self, truth: bool) -> usize {
        self.keep(Step::Truth(truth))
    }

    /// The place of a step, or of what it is known to be equal to.
    ///
    /// # Panics
    /// If it names steps that are not there, or of the wrong type.
    pub fn put(&mut self, step: Step) -> usize {
        for (i, operand) in step.operands().into_iter().enumerate() {
            let is_truth = self.steps[operand].is_truth();
            assert!(is_truth == step.wants_truth(i), "{step:?} of {self:?}");
        }
        match self.simpler(&step) {
            Simpler::Place(place) => place,
            Simpler::Step(simpler) => self.keep(simpler),
            Simpler::Not => self.keep(step),
        }
    }

    fn keep(&mut self, step: Step) -> usize {
        if let Some(&place) = self.places.get(&step) {
            return place;
        }
        let place = self.steps.len();
        self.places.insert(step.clone(), place);
        self.steps.push(step);
        place
    }

    fn simpler(&self, step: &Step) -> Simpler {
        let number = |i: usize| match self.steps[i] {
            Step::Number(n) => Some(n),
            _ => None,
        };
        let truth = |i: usize| match self.steps[i] {
            Step::Truth(truth) => Some(truth),
            _ => None,
        };
        let computed = |n: Option<i32>| n.map_or(Simpler::Not, |n| Simpler::Step(Step::Number(n)));
        let decided = |truth| Simpler::Step(Step::Truth(truth));
        match *step {
            Step::Add(a, b) => match (number(a), number(b)) {
                (Some(x), Some(y)) => computed(x.checked_add(y)),
                (Some(0), _) => Simpler::Place(b),
                (_, Some(0)) => Simpler::Place(a),
                _ => Simpler::Not,
            },
            Step::Subtract(a, b) => match (number(a), number(b)) {
                _ if a == b => computed(Some(0)),
                (Some(x), Some(y)) => computed(x.checked_sub(y)),
                (_, Some(0)) => Simpler::Place(a),
                _ => Simpler::Not,
            },
            Step::Multiply(a, b) => match (number(a), number(b)) {
                (Some(x), Some(y)) => computed(x.checked_mul(y)),
                (Some(0), _) | (_, Some(0)) => computed(Some(0)),
                (Some(1), _) => Simpler::Place(b),
                (_, Some(1)) => Simpler::Place(a),
                _ => Simpler::Not,
            },
            Step::Divide(a, b) => match (number(a), number(b)) {
                (_, Some(1)) => Simpler::Place(a),
                (Some(x), Some(y)) => computed(divide(x, y).map(|(quotient, _)| quotient)),
                _ => Simpler::Not,
            },
            Step::Remainder(a, b) => match (number(a), number(b)) {
                (_, Some(1)) => computed(Some(0)),
                (Some(x), Some(y)) => computed(divide(x, y).map(|(_, rest)| rest)),
                _ => Simpler::Not,
            },
            Step::Min(a, b) | Step::Max(a, b) if a == b => Simpler::Place(a),
            Step::Min(a, b) => computed(number(a).zip(number(b)).map(|(x, y)| x.min(y))),
            Step::Max(a, b) => computed(number(a).zip(number(b)).map(|(x, y)| x.max(y))),
            Step::Choose { condition, a, b } => match truth(condition) {
                _ if a == b => Simpler::Place(a),
                Some(true) => Simpler::Place(a),
                Some(false) => Simpler::Place(b),
                None => Simpler::Not,
            },
            Step::Less(a, b) => match (number(a), number(b)) {
                _ if a == b => decided(false),
                (Some(x), Some(y)) => decided(x < y),
                _ => Simpler::Not,
            },
            Step::Equal(a, b) => match (number(a), number(b)) {
                _ if a == b => decided(true),
                (Some(x), Some(y)) => decided(x == y),
                _ => Simpler::Not,
            },
            Step::And(a, b) => match (truth(a), truth(b)) {
                (Some(false), _) | (_, Some(false)) => decided(false),
                (Some(true), _) => Simpler::Place(b),
                (_, Some(true)) => Simpler::Place(a),
                _ if a == b => Simpler::Place(a),
                _ => Simpler::Not,
            },
            Step::Or(a, b) => match (truth(a), truth(b)) {
                (Some(true), _) | (_, Some(true)) => decided(true),
                (Some(false), _) => Simpler::Place(b),
                (_, Some(false)) => Simpler::Place(a),
                _ if a == b => Simpler::Place(a),
                _ => Simpler::Not,
            },
            Step::Not(a) => match self.steps[a] {
                Step::Truth(truth) => decided(!truth),
                Step::Not(inner) => Simpler::Place(inner),
                _ => Simpler::Not,
            },
            _ => Simpler::Not,
        }
    }

    /// The formula whose value is that of a step, and which tables it looks up: the formula numbers
    /// them by their place in this list.
    ///
    /// # Panics
    /// If the step is not there, or is a number.
    pub fn finish(&self, root: usize) -> (Formula, Vec<usize>) {
        assert!(self.steps[root].is_truth(), "{root} of {self:?}");
        prune(&self.steps, root)
    }
}

/// The steps that one of them needs, in an order of their own, and which tables these look up: they are
/// numbered by their place in this list.
pub(crate) fn prune(all: &[Step], root: usize) -> (Formula, Vec<usize>) {
    let mut places = vec![None; root + 1];
    let (mut steps, mut tables, mut dimensions) = (Vec::new(), Vec::new(), Vec::new());
    // Depth first, operands in their order: equal formulas get equal steps, however they arose.
    let mut open = vec![(root, false)];
    while let Some((at, is_ready)) = open.pop() {
        if places[at].is_some() {
            continue;
        }
        if !is_ready {
            open.push((at, true));
            let operands = all[at].operands();
            open.extend(operands.into_iter().rev().map(|i| (i, false)));
            continue;
        }
        let mut step = all[at].map(|i| places[i].unwrap_or_default());
        if let Step::Table { table, indices } = &mut step {
            let known = tables.iter().position(|known| known == table);
            *table = known.unwrap_or_else(|| {
                tables.push(*table);
                dimensions.push(indices.len());
                tables.len() - 1
            });
        }
        places[at] = Some(steps.len());
        steps.push(step);
    }
    let formula = Formula {
        steps,
        tables: dimensions,
    };
    (formula, tables)
}

/// What a step is, said in less.
enum Simpler {
    Place(usize),
    Step(Step),
    /// It is as simple as it gets.
    Not,
}

/// Quotient rounded down, and remainder; none by 0, or beyond int32.
fn divide(a: i32, b: i32) -> Option<(i32, i32)> {
    let (quotient, rest) = (a.checked_div(b)?, a.checked_rem(b)?);
    match rest != 0 && (rest < 0) != (b < 0) {
        true => Some((quotient - 1, rest + b)),
        false => Some((quotient, rest)),
    }
}
