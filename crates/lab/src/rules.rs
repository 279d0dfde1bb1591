//! Rules to try expressions on: [`Rule`]s as users have them, for tests and for the tables of kernels.

use flex_block_attn_kernels::exact::{Formula, Step};
use flex_block_attn_kernels::{Element, Kernel, backward, forward};

use crate::problems::Rule;

/// Kernels of both passes for some of the rules, with the largest pieces and the smallest.
pub fn kernels() -> Vec<Kernel> {
    let rules = [
        causal(),
        documents_with_prefix(260, 2, 4),
        neighbourhood(6, 11),
    ];
    let element = Element::Bf16;
    let mut kernels = Vec::new();
    for mask in rules.iter().map(|rule| Some(rule.mask())) {
        for head_dim in [64, 128] {
            for (q_block, kv_block) in [(128, 128), (128, 16), (16, 16), (192, 128)] {
                let config = forward::Config::choose(element, head_dim, q_block, kv_block, mask);
                kernels.extend(config.map(forward::Config::kernel));
            }
            for q_block in [64, 16] {
                let config = backward::Config::choose(element, head_dim, q_block, 128, mask, false);
                kernels.extend(config.map(backward::Config::kernel));
            }
        }
    }
    kernels
}

/// Steps of a formula, put down one by one.
#[derive(Debug, Default)]
struct Steps {
    steps: Vec<Step>,
    tables: Vec<(Vec<u32>, Vec<i32>)>,
}

impl Steps {
    fn put(&mut self, step: Step) -> usize {
        self.steps.push(step);
        self.steps.len() - 1
    }

    fn number(&mut self, n: i32) -> usize {
        self.put(Step::Number(n))
    }

    fn table(&mut self, extents: &[u32], numbers: Vec<i32>) -> usize {
        self.tables.push((extents.to_vec(), numbers));
        self.tables.len() - 1
    }

    fn rule(self) -> Rule {
        let tables = self.tables.iter().map(|(extents, _)| extents.len());
        Rule {
            formula: Formula {
                steps: self.steps,
                tables: tables.collect(),
            },
            tables: self.tables,
        }
    }
}

/// `key <= query`.
pub fn causal() -> Rule {
    let mut s = Steps::default();
    let (query, key) = (s.put(Step::Query), s.put(Step::Key));
    let behind = s.put(Step::Less(query, key));
    s.put(Step::Not(behind));
    s.rule()
}

/// Keys less than `width + head` away, in steps of two where that is far.
pub fn dilated_window(width: i32) -> Rule {
    let mut s = Steps::default();
    let (query, key, head) = (s.put(Step::Query), s.put(Step::Key), s.put(Step::Head));
    let distance = s.put(Step::Subtract(query, key));
    let zero = s.number(0);
    let negated = s.put(Step::Subtract(zero, distance));
    let away = s.put(Step::Max(distance, negated));
    let width = s.number(width);
    let width = s.put(Step::Add(width, head));
    let near = s.put(Step::Less(away, width));
    let two = s.number(2);
    let odd = s.put(Step::Remainder(distance, two));
    let half = s.put(Step::Divide(width, two));
    let close = s.put(Step::Less(away, half));
    let even = s.put(Step::Equal(odd, zero));
    let wanted = s.put(Step::Or(close, even));
    s.put(Step::And(near, wanted));
    s.rule()
}

/// Documents by a table, and a prefix for each batch and head, by another, that all see.
pub fn documents_with_prefix(tokens: usize, batch: u32, heads: u32) -> Rule {
    let mut s = Steps::default();
    let documents = (0..tokens).map(|token| (token / 37 + token / 90) as i32);
    let document = s.table(&[tokens as u32], documents.collect());
    let prefix = s.table(
        &[batch, heads],
        (0..batch * heads).map(|i| 7 + 20 * i as i32).collect(),
    );
    let (query, key) = (s.put(Step::Query), s.put(Step::Key));
    let (b, h) = (s.put(Step::Batch), s.put(Step::Head));
    let look = |s: &mut Steps, table, indices: &[usize]| {
        s.put(Step::Table {
            table,
            indices: indices.to_vec(),
        })
    };
    let of_query = look(&mut s, document, &[query]);
    let of_key = look(&mut s, document, &[key]);
    let same = s.put(Step::Equal(of_query, of_key));
    let prefix = look(&mut s, prefix, &[b, h]);
    let in_prefix = s.put(Step::Less(key, prefix));
    s.put(Step::Or(same, in_prefix));
    s.rule()
}

/// Tokens of a (time, height, width) canvas that are at most one away along each axis.
pub fn neighbourhood(height: i32, width: i32) -> Rule {
    let mut s = Steps::default();
    let (query, key) = (s.put(Step::Query), s.put(Step::Key));
    let (zero, two) = (s.number(0), s.number(2));
    let (h, w) = (s.number(height), s.number(width));
    let plane = s.number(height * width);
    let mut all = s.put(Step::Truth(true));
    for axis in 0..3 {
        let place = |s: &mut Steps, token| match axis {
            0 => s.put(Step::Divide(token, plane)),
            1 => {
                let row = s.put(Step::Divide(token, w));
                s.put(Step::Remainder(row, h))
            }
            _ => s.put(Step::Remainder(token, w)),
        };
        let (a, b) = (place(&mut s, query), place(&mut s, key));
        let distance = s.put(Step::Subtract(a, b));
        let negated = s.put(Step::Subtract(zero, distance));
        let away = s.put(Step::Max(distance, negated));
        let near = s.put(Step::Less(away, two));
        all = s.put(Step::And(all, near));
    }
    s.rule()
}
