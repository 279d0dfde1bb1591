//! [`Scores`]: how well each block of keys suits each block of queries, and the best of them.

use flex_block_attn_mask::BlockMask;

use super::{LEAST_BLOCKS, Pooled, TEMPERATURE, parameter};
use crate::{Error, Result};

/// Scores, float32 (batch, heads of q, blocks of q, blocks of k), dense.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    shape: [usize; 4],
    values: Vec<f32>,
}

impl Scores {
    /// Products of pooled queries and keys, neither scaled nor normalised.
    ///
    /// # Errors
    /// Other batches or features for k than for q; heads of q that are no multiple of k's.
    pub fn similarity(q: &Pooled, k: &Pooled) -> Result<Self> {
        Self::from_fn(q, k, |q, k, _| dot(q, k))
    }

    /// `lambda * relevance - (1 - lambda) * redundancy`: relevance is the cosine of query and key,
    /// redundancy the mean cosine of a key and all other keys, by the sum of all normalised keys
    /// rather than by each pair. (The method's own scores map cosines to 0..1, which ranks alike.)
    /// A block whose mean is 0 has cosine 0 with everything.
    ///
    /// # Errors
    /// Those of [`Scores::similarity`]; a lambda outside of 0 to 1.
    pub fn importance(q: &Pooled, k: &Pooled, lambda: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&lambda) {
            return Err(parameter("lambda", lambda.to_string(), "from 0 to 1"));
        }
        let (q, k) = (q.normalised(), k.normalised());
        let redundancy = redundancy(&k);
        let lambda = lambda as f32;
        Self::from_fn(&q, &k, |q, k, key| {
            lambda * dot(q, k) - (1.0 - lambda) * redundancy[key]
        })
    }

    /// `score(q, k, number of k's row)` for each pair of blocks of heads that belong together.
    fn from_fn(
        q: &Pooled,
        k: &Pooled,
        score: impl Fn(&[f32], &[f32], usize) -> f32,
    ) -> Result<Self> {
        let ([batch, heads, rows, features], [_, kv_heads, columns, _]) = (q.shape, k.shape);
        let needed = [batch, kv_heads, columns, features];
        if k.shape != needed {
            return Err(Error::Shape {
                argument: "k",
                got: k.shape,
                needed,
                reason: "q",
            });
        }
        if heads != kv_heads && (kv_heads == 0 || !heads.is_multiple_of(kv_heads)) {
            return Err(Error::Heads {
                q_heads: heads,
                kv_heads,
            });
        }
        let mut values = Vec::with_capacity(batch * heads * rows * columns);
        for b in 0..batch {
            for h in 0..heads {
                let kv_head = h / (heads / kv_heads);
                for row in 0..rows {
                    let query = q.row(b, h, row);
                    values.extend((0..columns).map(|column| {
                        let number = (b * kv_heads + kv_head) * columns + column;
                        score(query, k.row(b, kv_head, column), number)
                    }));
                }
            }
        }
        let shape = [batch, heads, rows, columns];
        Ok(Self { shape, values })
    }

    /// (batch, heads, blocks of q, blocks of k).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The values, dense.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Adds to a mask, in each row, the `count` blocks of the highest scores; of equal ones, the
    /// first. Rows and columns of the mask behind those of the scores stay as they are.
    ///
    /// # Errors
    /// A count of 0; a mask of other batches or heads, or of fewer blocks.
    pub fn keep_top(&self, count: usize, into: &mut BlockMask) -> Result<()> {
        self.keep(count, into, |_, best| best.len())
    }

    /// Adds to a mask, in each row, the fewest best blocks whose softmax, of scores divided by
    /// [`TEMPERATURE`], adds up to `mass`: [`LEAST_BLOCKS`] at least, `most` at most.
    ///
    /// # Errors
    /// Those of [`Scores::keep_top`]; a mass outside of 0 to 1.
    pub fn keep_mass(&self, mass: f64, most: usize, into: &mut BlockMask) -> Result<()> {
        if !(0.0..=1.0).contains(&mass) {
            return Err(parameter("mass", mass.to_string(), "from 0 to 1"));
        }
        self.keep(most, into, |scores, best| {
            let weight = |score: f32| (f64::from(score - scores[best[0]]) / TEMPERATURE).exp();
            let total: f64 = scores.iter().map(|&score| weight(score)).sum();
            let mut reached = 0.0;
            let enough = best.iter().position(|&column| {
                reached += weight(scores[column]) / total;
                reached >= mass
            });
            enough.map_or(best.len(), |last| (last + 1).max(LEAST_BLOCKS))
        })
    }

    /// Adds the first of the `most` best blocks of each row, best first, as many as `number` says.
    fn keep(
        &self,
        most: usize,
        into: &mut BlockMask,
        number: impl Fn(&[f32], &[usize]) -> usize,
    ) -> Result<()> {
        let [batch, heads, rows, columns] = self.shape;
        if most == 0 {
            return Err(parameter("top", "0".into(), "at least 1"));
        }
        let extents = into.extents();
        if (into.batch(), into.heads()) != (batch, heads)
            || extents.q_blocks() < rows
            || extents.kv_blocks() < columns
        {
            let got = format!("{into:?} for scores of shape {:?}", self.shape);
            return Err(parameter("into", got, "a mask of the scores' shape"));
        }
        if columns == 0 {
            return Ok(());
        }
        for (line, scores) in self.values.chunks_exact(columns).enumerate() {
            let mut best: Vec<usize> = (0..columns).collect();
            best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            best.truncate(most);
            let (matrix, row) = (line / rows, line % rows);
            for &column in best.iter().take(number(scores, &best)) {
                into.insert(matrix / heads, matrix % heads, row, column);
            }
        }
        Ok(())
    }
}

/// For each normalised key its mean cosine with all other keys of its head.
fn redundancy(k: &Pooled) -> Vec<f32> {
    let [batch, heads, blocks, features] = k.shape;
    let mut result = Vec::with_capacity(batch * heads * blocks);
    for b in 0..batch {
        for h in 0..heads {
            let mut total = vec![0.0f32; features];
            for block in 0..blocks {
                for (sum, value) in total.iter_mut().zip(k.row(b, h, block)) {
                    *sum += value;
                }
            }
            for block in 0..blocks {
                let own = k.row(b, h, block);
                let others = dot(own, &total) - dot(own, own);
                result.push(others / (blocks - 1).max(1) as f32);
            }
        }
    }
    result
}

/// Eight sums at once, which the compiler makes vectors of.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a
        .remainder()
        .iter()
        .zip(b.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a.zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    rest + sums.iter().sum::<f32>()
}
