//! Attention from its definition, in float64, token by token: no blocks, no plan, no online
//! softmax. In: dense (batch, heads, sequence, head_dim) values and a predicate over tokens. Out:
//! the output, the lse, and the gradients by the textbook's chain rule. Slow on purpose; tests
//! compare backends with it.

/// Sizes of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Batches.
    pub batch: usize,
    /// Heads of q.
    pub q_heads: usize,
    /// Heads of k and v; divides `q_heads`.
    pub kv_heads: usize,
    /// Queries.
    pub q_len: usize,
    /// Keys.
    pub kv_len: usize,
    /// Values of a token.
    pub head_dim: usize,
}

impl Sizes {
    /// Shape of q.
    pub fn q_shape(&self) -> [usize; 4] {
        [self.batch, self.q_heads, self.q_len, self.head_dim]
    }

    /// Shape of k and v.
    pub fn kv_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.kv_len, self.head_dim]
    }

    /// Shape of the lse.
    pub fn lse_shape(&self) -> [usize; 4] {
        [self.batch, self.q_heads, self.q_len, 1]
    }
}

/// A problem: values in dense order, and the factor of q k^T.
#[derive(Debug, Clone)]
pub struct Problem<'a> {
    /// Sizes.
    pub sizes: Sizes,
    /// Factor of q k^T.
    pub scale: f64,
    /// Queries.
    pub q: &'a [f64],
    /// Keys.
    pub k: &'a [f64],
    /// Values.
    pub v: &'a [f64],
}

/// What the definition gives.
#[derive(Debug, Clone, Default)]
pub struct Attention {
    /// Output, of q's shape.
    pub out: Vec<f64>,
    /// Natural logarithm of the sum of exp(scale q·k); -inf where a query has no key.
    pub lse: Vec<f64>,
}

/// Gradients, of the shapes of q, k and v.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    /// Gradient of q.
    pub dq: Vec<f64>,
    /// Gradient of k.
    pub dk: Vec<f64>,
    /// Gradient of v.
    pub dv: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

/// One query's place, and the probabilities of the keys it sees.
struct Row {
    query: usize,
    lse: f64,
    /// (key, probability), keys by their place among all heads' keys.
    keys: Vec<(usize, f64)>,
}

impl Problem<'_> {
    fn rows<'a>(
        &'a self,
        keep: &'a dyn Fn(usize, usize, usize, usize) -> bool,
    ) -> impl Iterator<Item = Row> + 'a {
        let s = self.sizes;
        let group = s.q_heads / s.kv_heads.max(1);
        (0..s.batch * s.q_heads * s.q_len).map(move |query| {
            let (token, head) = (query % s.q_len, query / s.q_len % s.q_heads);
            let batch = query / s.q_len / s.q_heads;
            let first_key = (batch * s.kv_heads + head / group) * s.kv_len;
            let scores: Vec<(usize, f64)> = (0..s.kv_len)
                .filter(|&key| keep(batch, head, token, key))
                .map(|key| {
                    let key = first_key + key;
                    (
                        key,
                        self.scale * dot(self.token(self.q, query), self.token(self.k, key)),
                    )
                })
                .collect();
            let max = scores
                .iter()
                .fold(f64::NEG_INFINITY, |max, &(_, score)| max.max(score));
            let sum: f64 = scores.iter().map(|&(_, score)| (score - max).exp()).sum();
            let lse = if scores.is_empty() {
                f64::NEG_INFINITY
            } else {
                max + sum.ln()
            };
            let keys = scores
                .iter()
                .map(|&(key, score)| (key, (score - lse).exp()))
                .collect();
            Row { query, lse, keys }
        })
    }

    fn token<'a>(&self, values: &'a [f64], index: usize) -> &'a [f64] {
        &values[index * self.sizes.head_dim..][..self.sizes.head_dim]
    }

    /// The output and the lse; `keep(batch, query head, query, key)` says who sees whom.
    pub fn attention(&self, keep: &dyn Fn(usize, usize, usize, usize) -> bool) -> Attention {
        let mut attention = Attention {
            out: vec![0.0; self.q.len()],
            lse: Vec::new(),
        };
        let dim = self.sizes.head_dim;
        for row in self.rows(keep) {
            attention.lse.push(row.lse);
            for (key, p) in row.keys {
                add(
                    &mut attention.out[row.query * dim..][..dim],
                    p,
                    self.token(self.v, key),
                );
            }
        }
        attention
    }

    /// Gradients for the output's gradient `dout` and the lse's, `dlse`.
    pub fn gradients(
        &self,
        keep: &dyn Fn(usize, usize, usize, usize) -> bool,
        dout: &[f64],
        dlse: &[f64],
    ) -> Gradients {
        let mut gradients = Gradients {
            dq: vec![0.0; self.q.len()],
            dk: vec![0.0; self.k.len()],
            dv: vec![0.0; self.v.len()],
        };
        let dim = self.sizes.head_dim;
        for row in self.rows(keep) {
            let dout = self.token(dout, row.query);
            // out = sum p v, and the gradient of a softmax: ds = p (dp - sum p dp).
            let dp: Vec<f64> = row
                .keys
                .iter()
                .map(|&(key, _)| dot(dout, self.token(self.v, key)))
                .collect();
            let mean: f64 = row.keys.iter().zip(&dp).map(|(&(_, p), dp)| p * dp).sum();
            for (&(key, p), dp) in row.keys.iter().zip(&dp) {
                let ds = self.scale * p * (dp - mean + dlse[row.query]);
                add(&mut gradients.dv[key * dim..][..dim], p, dout);
                add(
                    &mut gradients.dq[row.query * dim..][..dim],
                    ds,
                    self.token(self.k, key),
                );
                add(
                    &mut gradients.dk[key * dim..][..dim],
                    ds,
                    self.token(self.q, row.query),
                );
            }
        }
        gradients
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        batch: 2,
        q_heads: 4,
        kv_heads: 2,
        q_len: 3,
        kv_len: 5,
        head_dim: 2,
    };

    fn values(len: usize, seed: usize) -> Vec<f64> {
        (0..len)
            .map(|i| ((i * 7919 + seed * 104_729) % 1000) as f64 / 500.0 - 1.0)
            .collect()
    }

    /// The gradients against differences of the function itself.
    #[test]
    fn gradients_are_those_of_the_output_and_the_lse() {
        let (q_len, kv_len) = (
            SIZES.q_shape().iter().product(),
            SIZES.kv_shape().iter().product(),
        );
        let inputs = [values(q_len, 1), values(kv_len, 2), values(kv_len, 3)];
        let (dout, dlse) = (
            values(q_len, 4),
            values(SIZES.lse_shape().iter().product(), 5),
        );
        let keep =
            |b: usize, h: usize, q: usize, k: usize| !(b + h + q + k).is_multiple_of(3) || k == 1;
        let problem = |inputs: &[Vec<f64>; 3]| {
            let [q, k, v] = inputs;
            let attention = Problem {
                sizes: SIZES,
                scale: 0.7,
                q,
                k,
                v,
            }
            .attention(&keep);
            dot(&attention.out, &dout) + dot(&attention.lse, &dlse)
        };
        let [q, k, v] = &inputs;
        let gradients = Problem {
            sizes: SIZES,
            scale: 0.7,
            q,
            k,
            v,
        }
        .gradients(&keep, &dout, &dlse);
        for (which, gradient) in [gradients.dq, gradients.dk, gradients.dv]
            .iter()
            .enumerate()
        {
            for (i, &gradient) in gradient.iter().enumerate() {
                let at = |step: f64| {
                    let mut moved = inputs.clone();
                    moved[which][i] += step;
                    problem(&moved)
                };
                let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (difference - gradient).abs() < 1e-8,
                    "{which} {i}: {difference} {gradient}"
                );
            }
        }
    }

    #[test]
    fn a_query_without_keys_is_zero() {
        let (q, kv) = (values(48, 1), values(40, 2));
        let problem = Problem {
            sizes: SIZES,
            scale: 1.0,
            q: &q,
            k: &kv,
            v: &kv,
        };
        let attention = problem.attention(&|_, _, query, _| query != 1);
        assert!(
            attention
                .lse
                .iter()
                .skip(1)
                .step_by(3)
                .all(|&lse| lse == f64::NEG_INFINITY)
        );
        assert!(
            attention
                .out
                .chunks(2)
                .skip(1)
                .step_by(3)
                .all(|row| row == [0.0, 0.0])
        );
        let gradients = problem.gradients(&|_, _, query, _| query != 1, &q, &[0.0; 24]);
        assert!(
            gradients
                .dq
                .chunks(2)
                .skip(1)
                .step_by(3)
                .all(|row| row == [0.0, 0.0])
        );
    }
}
