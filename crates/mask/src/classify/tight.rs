//! [`tight`]: which nodes of one axis really have both ends of their range. In: a program's nodes. Out:
//! that of each. Called by `program` for bands, whose ends then are pairs that exist.

use super::program::Node;
use crate::expression::step::on;

/// What is known of a node's numbers over tokens that follow each other, all of them on one axis.
#[derive(Debug, Clone, Copy, Default)]
struct Numbers {
    /// The ends of its range are among them.
    are_tight: bool,
    /// So are all numbers between: from token to token they change by 1 at most.
    are_dense: bool,
}

impl Numbers {
    const ALL: Self = Self {
        are_tight: true,
        are_dense: true,
    };
    const TIGHT: Self = Self {
        are_tight: true,
        are_dense: false,
    };

    fn if_tight(self, is_dense: bool) -> Self {
        Self {
            are_tight: self.are_tight,
            are_dense: self.are_tight && is_dense,
        }
    }
}

/// Whether both ends of each node's range are numbers that it has.
pub(super) fn tight(nodes: &[Node], depends: &[u8]) -> Vec<bool> {
    let mut known: Vec<Numbers> = Vec::with_capacity(nodes.len());
    for node in nodes {
        let numbers = numbers(node, nodes, depends, &known);
        known.push(numbers);
    }
    known.into_iter().map(|numbers| numbers.are_tight).collect()
}

fn numbers(node: &Node, nodes: &[Node], depends: &[u8], known: &[Numbers]) -> Numbers {
    let of = |i: usize| known[i];
    let is_one = |i: usize| depends[i] & (on::QUERY | on::KEY) == 0 && of(i).are_tight;
    let is_positive = |i: usize| matches!(nodes[i], Node::Constant(n) if n > 0);
    match *node {
        Node::Batch | Node::Head | Node::Query | Node::Key | Node::Constant(_) => Numbers::ALL,
        Node::Sum(_, ref terms) => {
            let mut varying = terms.iter().filter(|&&(_, node)| !is_one(node));
            match (varying.next(), varying.next()) {
                (None, _) => Numbers::ALL,
                (Some(&(factor, a)), None) => of(a).if_tight(of(a).are_dense && factor.abs() == 1),
                _ => Numbers::default(),
            }
        }
        Node::Divide(a, by) if is_positive(by) => of(a),
        Node::Remainder(a, by) if is_positive(by) && of(a).are_dense => Numbers::TIGHT,
        Node::Min(a, b) | Node::Max(a, b) if is_one(b) => of(a),
        Node::Min(a, b) | Node::Max(a, b) if is_one(a) => of(b),
        Node::Abs(a) if of(a).are_dense => of(a),
        Node::Table(_, ref indices) => match indices.split_last() {
            Some((&last, others)) if of(last).are_dense && others.iter().all(|&i| is_one(i)) => {
                Numbers::TIGHT
            }
            _ => Numbers::default(),
        },
        _ => Numbers::default(),
    }
}
