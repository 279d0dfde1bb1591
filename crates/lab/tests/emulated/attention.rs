//! Attention forward, against a softmax in float64.

use flex_block_attn_emulator::{Memory, Options};
use flex_block_attn_kernels::Strides;
use flex_block_attn_kernels::forward::{Args, Config, Tensor};
use flex_block_attn_ptx::Element;
use half::bf16;

use crate::{bits, in_all_ways, normal, read, relative_error};

/// A problem: which blocks of keys each block of queries sees, for all heads.
struct Problem {
    heads: usize,
    group: usize,
    head_dim: usize,
    q_block: usize,
    kv_block: usize,
    kv_len: usize,
    lists: Vec<Vec<i32>>,
    scale: f64,
}

impl Problem {
    fn q_len(&self) -> usize {
        self.q_block * self.lists.len()
    }

    /// Output (heads, q_len, head_dim) and lse (heads, q_len).
    fn reference(&self, q: &[bf16], k: &[bf16], v: &[bf16]) -> (Vec<f64>, Vec<f64>) {
        let d = self.head_dim;
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for head in 0..self.heads {
            let kv_start = head / self.group * self.kv_len * d;
            for row in 0..self.q_len() {
                let q = &q[(head * self.q_len() + row) * d..][..d];
                let keys: Vec<usize> = self.lists[row / self.q_block]
                    .iter()
                    .flat_map(|&block| {
                        let first = block as usize * self.kv_block;
                        first..first + self.kv_block
                    })
                    .map(|key| kv_start + key * d)
                    .collect();
                let dot = |at: &usize| {
                    let products = q.iter().zip(&k[*at..][..d]);
                    self.scale * products.map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>()
                };
                let scores: Vec<f64> = keys.iter().map(dot).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                lse.push(if keys.is_empty() {
                    f64::NEG_INFINITY
                } else {
                    max + sum.ln()
                });
                out.extend((0..d).map(|column| {
                    let parts = weights.iter().zip(&keys);
                    let total: f64 = parts.map(|(w, at)| w * v[at + column].to_f64()).sum();
                    if keys.is_empty() { 0.0 } else { total / sum }
                }));
            }
        }
        (out, lse)
    }

    fn check(&self, kv_tile: u32, ways: &[Options]) {
        let (d, q_len) = (self.head_dim, self.q_len());
        let kv_heads = self.heads / self.group;
        let q = normal(1, self.heads * q_len * d);
        let k = normal(2, kv_heads * self.kv_len * d);
        let v = normal(3, kv_heads * self.kv_len * d);
        let (out, lse) = self.reference(&q, &k, &v);
        let blocks = self.kv_len / self.kv_block;
        let config = Config {
            element: Element::Bf16,
            head_dim: d as u32,
            kv_tile,
        };
        let prepare = || {
            let mut memory = Memory::new();
            let tensor = |address, tokens: usize| Tensor {
                address,
                strides: Strides {
                    row: d as u64,
                    head: (tokens * d) as u64,
                    batch: 16,
                },
            };
            let counts: Vec<i32> = self.lists.iter().map(|list| list.len() as i32).collect();
            let lists: Vec<i32> = self
                .lists
                .iter()
                .flat_map(|list| (0..blocks).map(|i| list.get(i).copied().unwrap_or(0)))
                .collect();
            let args = Args {
                q: tensor(memory.alloc_with("q", &bits(&q)), q_len),
                k: tensor(memory.alloc_with("k", &bits(&k)), self.kv_len),
                v: tensor(memory.alloc_with("v", &bits(&v)), self.kv_len),
                out: tensor(memory.alloc("out", 2 * q.len()), q_len),
                lse: memory.alloc("lse", 4 * lse.len()),
                counts: memory.alloc_with("counts", &counts),
                lists: memory.alloc_with("lists", &lists),
                list_stride: blocks as u32,
                record: [0, 0],
                batch: 1,
                heads: self.heads as u32,
                group: self.group as u32,
                q_len: q_len as u32,
                kv_len: self.kv_len as u32,
                q_block: self.q_block as u32,
                kv_block: self.kv_block as u32,
                scale: self.scale as f32,
            };
            (memory, config.launch(&args), args)
        };
        in_all_ways(&config.kernel(), ways, prepare, |memory, args| {
            let error = relative_error(&read(memory, args.out.address, out.len()), &out);
            assert!(error < 4e-3, "relative error {error} of the output");
            let got: Vec<f32> = memory.read(args.lse, lse.len());
            for (i, (&got, &expected)) in got.iter().zip(&lse).enumerate() {
                let same = f64::from(got) == expected;
                assert!(
                    same || (f64::from(got) - expected).abs() < 1e-4,
                    "lse {i}: {got}"
                );
            }
        });
    }
}

#[test]
fn lists_of_every_length() {
    // None, one, two, three and all blocks: both stages are first and last.
    let problem = Problem {
        heads: 1,
        group: 1,
        head_dim: 128,
        q_block: 128,
        kv_block: 128,
        kv_len: 512,
        lists: vec![vec![], vec![3], vec![0, 2], vec![0, 1, 3], vec![0, 1, 2, 3]],
        scale: 0.125,
    };
    problem.check(128, &Options::all(2));
}

#[test]
fn wide_tiles_blocks_of_several_tiles_and_shared_heads() {
    let problem = Problem {
        heads: 2,
        group: 2,
        head_dim: 128,
        q_block: 256,
        kv_block: 384,
        kv_len: 768,
        lists: vec![vec![1]],
        scale: 0.1,
    };
    problem.check(192, &Options::all(1));
    problem.check(128, &Options::all(0));
}

#[test]
fn short_heads() {
    let problem = Problem {
        heads: 2,
        group: 1,
        head_dim: 64,
        q_block: 128,
        kv_block: 384,
        kv_len: 768,
        lists: vec![vec![0], vec![0, 1]],
        scale: 0.2,
    };
    problem.check(128, &Options::all(1));
    problem.check(192, &Options::all(0));
}
