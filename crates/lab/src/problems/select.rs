//! [`Select`]: masks of the tiles whose means suit each other, against scores in float64.

use flex_block_attn::bf16;
use flex_block_attn_emulator::Memory;
use flex_block_attn_kernels::select::{Args, Config, Mask, Pooled};
use flex_block_attn_ptx::Element;

use super::{Close, Expected, Setup, Step, normal};

/// Scores this close in float64 are meant to be equal: sums in another order.
const EQUAL: f64 = 1e-10;
/// Others are at least so far apart where one is kept and one is not, lest float32 tell them otherwise.
const APART: f64 = 1e-6;

/// All kernels of a choice of tiles, of means by chance; among them are zeros, and keys that are alike.
#[derive(Debug, Clone, Copy)]
pub struct Select {
    /// Batches.
    pub batch: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys.
    pub kv_heads: usize,
    /// Tiles.
    pub tiles: usize,
    /// Blocks, tiles first.
    pub blocks: usize,
    /// Features of a mean: 64 or 128.
    pub features: usize,
    /// Weight of relevance in importance; by products alone without.
    pub lambda: Option<f32>,
    /// Whether heads share a mask.
    pub shared: bool,
    /// Tiles that a row keeps.
    pub top: usize,
    /// Tokens of text that count, in turn for one batch and another, in blocks of 16.
    pub text_lengths: Option<[u64; 2]>,
    /// For how many tiles the kernel has room, if not the least that do.
    pub room: Option<u32>,
    /// Other numbers by chance.
    pub seed: u64,
}

impl Select {
    /// Of one head, by products.
    pub fn new(tiles: usize, blocks: usize) -> Self {
        Self {
            batch: 1,
            heads: 1,
            kv_heads: 1,
            tiles,
            blocks,
            features: 64,
            lambda: None,
            shared: false,
            top: 5,
            text_lengths: None,
            room: None,
            seed: 1,
        }
    }

    /// The kernels with means.
    ///
    /// # Panics
    /// If scores are so close that float32 may tell them otherwise.
    pub fn setup(&self) -> Setup {
        let (q, k) = (
            self.means(self.seed, self.heads),
            self.means(self.seed + 1, self.kv_heads),
        );
        let base: Vec<u8> = (0..self.blocks * self.blocks)
            .map(|i| match (i / self.blocks, i % self.blocks) {
                (row, column) if row.max(column) >= self.tiles => 255,
                (row, column) => u8::from((row * 7 + column * 3) % 11 == 0),
            })
            .collect();
        let mask = self.mask(&q, &k, &base);

        let mut memory = Memory::new();
        let head_bytes = 4 * self.tiles * self.features;
        let mut pooled = |name: &str, means: &[f64], heads| Pooled {
            means: {
                let means: Vec<f32> = means.iter().map(|&x| x as f32).collect();
                memory.alloc_with(name, &means)
            },
            heads: heads as u32,
            average: match self.shared {
                true => memory.alloc(&format!("average of {name}"), self.batch * head_bytes),
                false => 0,
            },
        };
        let pooled = [pooled("q", &q, self.heads), pooled("k", &k, self.kv_heads)];
        let weight_bytes = 8 * self.batch * self.kv_heads * self.tiles;
        let args = Args {
            pooled,
            shared: self.shared,
            lambda: self.lambda.unwrap_or(f32::NAN),
            weights: match self.lambda {
                Some(_) => memory.alloc("weights", weight_bytes),
                None => 0,
            },
            batch: self.batch as u32,
            tiles: self.tiles as u32,
            features: self.features as u32,
            top: self.top as u32,
            mask: Mask {
                mask: memory.alloc("mask", mask.len()),
                base: memory.alloc_with("base", &base),
                blocks: self.blocks as u32,
                text_lengths: match self.text_lengths {
                    Some(lengths) => {
                        let of_batch: Vec<u64> = (0..self.batch).map(|b| lengths[b % 2]).collect();
                        memory.alloc_with("text lengths", &of_batch)
                    }
                    None => 0,
                },
                block: 16,
            },
        };
        let mut configs = Config::of(&args, self.lambda.is_some());
        if let (Some(most), Some(Config::Keep { room, .. })) = (self.room, configs.last_mut()) {
            *room = most;
        }
        let step = |config: Config| Step::new(config.kernel(), config.launch(&args));
        let steps: Vec<_> = configs.into_iter().map(step).collect();
        let last = steps.len() - 1;
        let exactly = Close::Each(0.0);
        let expected = Expected::new("the mask", args.mask.mask, Element::U8, mask, exactly);
        Setup::new(memory, steps, vec![expected]).about(last)
    }

    /// The same, but about the kernel that weighs keys; of heads that do not share a mask.
    ///
    /// # Panics
    /// As [`Select::setup`].
    pub fn weighing(&self) -> Setup {
        self.setup().about(0)
    }

    /// Numbers that bfloat16 holds. A tile in the middle is 0 in all heads, and every seventh is as one
    /// before.
    fn means(&self, seed: u64, heads: usize) -> Vec<f64> {
        let of_head = self.tiles * self.features;
        let mut means = normal(seed, self.batch * heads * of_head);
        means
            .iter_mut()
            .for_each(|x| *x = bf16::from_f64(*x).to_f64());
        for head in means.chunks_exact_mut(of_head) {
            let row = |tile: usize| tile * self.features..(tile + 1) * self.features;
            head[row(self.tiles / 2)].fill(0.0);
            for tile in (6..self.tiles).step_by(7) {
                head.copy_within(row(tile - 3), tile * self.features);
            }
        }
        means
    }

    /// A head's means, or those of all heads, as rows.
    fn rows(&self, means: &[f64], batch: usize, head: usize, heads: usize) -> Vec<Vec<f64>> {
        let of_head = self.tiles * self.features;
        let of_batch = &means[batch * heads * of_head..][..heads * of_head];
        let head = match self.shared {
            false => of_batch[head * of_head..][..of_head].to_vec(),
            true => (0..of_head)
                .map(|i| of_batch.iter().skip(i).step_by(of_head).sum::<f64>() / heads as f64)
                .collect(),
        };
        head.chunks_exact(self.features)
            .map(<[f64]>::to_vec)
            .collect()
    }

    /// The mask, as float64 has it.
    fn mask(&self, q: &[f64], k: &[f64], base: &[u8]) -> Vec<f64> {
        let heads = if self.shared { 1 } else { self.heads };
        let mut mask = Vec::new();
        for batch in 0..self.batch {
            let length = self.text_lengths.map(|lengths| lengths[batch % 2] as usize);
            let seen = length.map_or(self.blocks, |n| self.tiles + n.div_ceil(16).max(1));
            for head in 0..heads {
                let q = self.rows(q, batch, head, self.heads);
                let kv_head = head * self.kv_heads / self.heads;
                let k = self.rows(k, batch, kv_head, self.kv_heads);
                let redundancy = redundancy(&k);
                for row in 0..self.blocks {
                    let best = match q.get(row) {
                        Some(q) => self.best(&self.scores(q, &k, &redundancy)),
                        None => Vec::new(),
                    };
                    mask.extend((0..self.blocks).map(|column| {
                        let kept = base[row * self.blocks + column] != 0 || best.contains(&column);
                        let counts = row.max(column) < seen;
                        f64::from(u8::from(if counts { kept } else { row == column }))
                    }));
                }
            }
        }
        mask
    }

    fn scores(&self, q: &[f64], k: &[Vec<f64>], redundancy: &[f64]) -> Vec<f64> {
        let Some(lambda) = self.lambda.map(f64::from) else {
            return k.iter().map(|k| dot(q, k)).collect();
        };
        k.iter()
            .zip(redundancy)
            .map(|(k, redundancy)| lambda * cosine(q, k) - (1.0 - lambda) * redundancy)
            .collect()
    }

    /// The places of the highest scores, of equal ones the first.
    fn best(&self, scores: &[f64]) -> Vec<usize> {
        let steps = |column: &usize| (scores[*column] / EQUAL).round() as i64;
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by_key(|column| (-steps(column), *column));
        if let Some(next) = order.get(self.top) {
            let apart = scores[order[self.top - 1]] - scores[*next];
            assert!(
                !(2.0 * EQUAL..APART).contains(&apart),
                "{self:?}: scores {apart} apart"
            );
        }
        order.truncate(self.top);
        order
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    match dot(a, a) * dot(b, b) {
        0.0 => 0.0,
        squares => dot(a, b) / squares.sqrt(),
    }
}

/// For each key its mean cosine with all others.
fn redundancy(k: &[Vec<f64>]) -> Vec<f64> {
    let others = (k.len() - 1).max(1) as f64;
    let with_others = |(i, own): (usize, &Vec<f64>)| {
        let others = k.iter().enumerate().filter(|(j, _)| *j != i);
        others.map(|(_, other)| cosine(own, other)).sum::<f64>()
    };
    k.iter()
        .enumerate()
        .map(|of| with_others(of) / others)
        .collect()
}
