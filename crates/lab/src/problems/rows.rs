//! The kernels that read whole tensors once, against sums in float64: [`Prepare`] of the backward pass,
//! [`Combine`], and [`Pool`].

use flex_block_attn_emulator::Memory;
use flex_block_attn_kernels::backward::{Workspace, bounds, prepare};
use flex_block_attn_kernels::{combine, pool};
use flex_block_attn_ptx::Element;

use super::tensor::{Layout, Tensor, rounded};
use super::{Close, Expected, Setup, Step};

/// Deltas and lses of queries, before the backward pass.
#[derive(Debug, Clone, Copy)]
pub struct Prepare {
    /// The kernel.
    pub config: prepare::Config,
    /// Batches.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Queries.
    pub q_len: usize,
    /// How the output lies in memory.
    pub out: Layout,
    /// How its gradient does.
    pub dout: Layout,
    /// Whether the lse has a gradient.
    pub has_dlse: bool,
}

impl Prepare {
    /// The kernel with tensors.
    pub fn setup(&self) -> Setup {
        let Self {
            config,
            batch,
            heads,
            q_len,
            ..
        } = *self;
        let head_dim = config.head_dim as usize;
        let tensor = |layout| Tensor {
            element: config.element,
            shape: [batch, heads, q_len, head_dim],
            layout,
        };
        let (out, dout) = (tensor(self.out), tensor(self.dout));
        let (out_values, dout_values) = (out.normal(1), dout.normal(2));
        // One query in seven has no keys.
        let number = |i: usize| (i % 11) as f32 - 5.0;
        let lse = |i: usize| match i % 7 {
            3 => f32::NEG_INFINITY,
            _ => number(i),
        };
        let dlse = |i: usize| number(i + 4);
        let queries = batch * heads * q_len;

        let line = Workspace::new(q_len).line;
        let places = batch * heads * line;
        // What fills up a line is as queries without keys are.
        let (mut deltas, mut log2s) = (vec![0.0; places], vec![f64::INFINITY; places]);
        let mut steps = vec![1.0; places];
        // Heads in pairs share keys, of which these are the largest magnitude and the largest norm of
        // a value, squared.
        let group = if heads.is_multiple_of(2) { 2 } else { 1 };
        let bounds: Vec<[f32; 2]> = (0..batch * heads / group)
            .map(|i| [0.3 + i as f32, 50.0 * i as f32])
            .collect();
        let rows = out_values
            .chunks_exact(head_dim)
            .zip(dout_values.chunks_exact(head_dim));
        for (i, (out, dout)) in rows.enumerate().filter(|(i, _)| lse(*i).is_finite()) {
            let at = i / q_len * line + place(i % q_len);
            let sum: f64 = out.iter().zip(dout).map(|(a, b)| a * b).sum();
            let less = if self.has_dlse { dlse(i) } else { 0.0 };
            deltas[at] = sum - f64::from(less);
            log2s[at] = f64::from(lse(i)) * std::f64::consts::LOG2_E;
            let [keys, values] = bounds[i / q_len / group].map(f64::from);
            let norm = dout.iter().map(|x| x * x).sum::<f64>().sqrt();
            let bound = (norm * values.sqrt() + deltas[at].abs()) * keys;
            steps[at] = (30.0 - bound.log2()).min(100.0).floor().exp2();
        }

        let sums = batch * heads * Workspace::new(q_len).units * 64 * head_dim;
        let mut memory = Memory::new();
        let mut numbers = |name: &str, of: &dyn Fn(usize) -> f32| {
            let values: Vec<f32> = (0..queries).map(of).collect();
            memory.alloc_with(name, &values)
        };
        let lse = numbers("lse", &lse);
        let dlse = if self.has_dlse {
            numbers("dlse", &dlse)
        } else {
            0
        };
        let args = prepare::Args {
            out: out.put(&mut memory, "out", &out_values),
            dout: dout.put(&mut memory, "dout", &dout_values),
            lse,
            dlse,
            log2: memory.alloc("log2", 4 * places),
            delta: memory.alloc("delta", 4 * places),
            steps: match config.deterministic {
                true => memory.alloc("steps", 4 * places),
                false => 0,
            },
            bounds: match config.deterministic {
                true => memory.alloc_with("bounds", bounds.as_flattened()),
                false => 0,
            },
            sums: memory.alloc("sums", 4 * sums),
            batch: batch as u32,
            heads: heads as u32,
            kv_heads: (heads / group) as u32,
            q_len: q_len as u32,
            canvas: None,
        };
        let close = Close::Each(1e-6 * head_dim as f64);
        let mut expected = vec![
            Expected::new("delta", args.delta, Element::F32, deltas, close),
            Expected::new("log2", args.log2, Element::F32, log2s, Close::Each(1e-5)),
        ];
        let exactly = Close::Each(0.0);
        let zeros = vec![0.0; sums];
        expected.push(Expected::new(
            "sums",
            args.sums,
            Element::F32,
            zeros,
            exactly,
        ));
        if config.deterministic {
            expected.push(Expected::new(
                "steps",
                args.steps,
                Element::F32,
                steps,
                exactly,
            ));
        }
        let steps = vec![Step::new(config.kernel(), config.launch(&args))];
        Setup::new(memory, steps, expected)
    }
}

/// Where a query's numbers are among those of its head: of 16, first those of the first pair of each
/// eight, then of the second, and so on.
fn place(query: usize) -> usize {
    let (eight, pair) = (query % 16 / 8, query % 8 / 2);
    query / 16 * 16 + pair * 4 + eight * 2 + query % 2
}

/// What bounds the gradient of q.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The kernel.
    pub config: bounds::Config,
    /// Batches.
    pub batch: usize,
    /// Heads of k and v.
    pub heads: usize,
    /// Keys.
    pub len: usize,
    /// How k lies in memory.
    pub layout: Layout,
}

impl Bounds {
    /// The kernel with tensors.
    pub fn setup(&self) -> Setup {
        let Self {
            config,
            batch,
            heads,
            len,
            layout,
        } = *self;
        let head_dim = config.head_dim as usize;
        let like = |layout| Tensor {
            element: config.element,
            shape: [batch, heads, len, head_dim],
            layout,
        };
        let (k, v) = (like(layout), like(Layout::default()));
        let (k_values, v_values) = (k.normal(5), v.normal(6));
        let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let by_head = |values: &[f64], of: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
            values.chunks_exact(len * head_dim).map(of).collect()
        };
        let magnitudes = by_head(&k_values, &|head| {
            largest(&mut head.iter().map(|x| x.abs()))
        });
        let norms = by_head(&v_values, &|head| {
            let rows = head.chunks_exact(head_dim);
            largest(&mut rows.map(|row| row.iter().map(|x| x * x).sum()))
        });
        let expected = magnitudes.into_iter().zip(norms);

        let mut memory = Memory::new();
        let words = batch * heads * bounds::WORDS;
        let args = bounds::Args {
            k: k.put(&mut memory, "k", &k_values),
            v: v.put(&mut memory, "v", &v_values),
            bounds: memory.alloc_with("bounds", &vec![0u32; words]),
            batch: batch as u32,
            heads: heads as u32,
            len: len as u32,
        };
        Setup::new(
            memory,
            vec![Step::new(config.kernel(), config.launch(&args))],
            vec![Expected::new(
                "bounds",
                args.bounds,
                Element::F32,
                expected.flat_map(|(key, value)| [key, value]).collect(),
                Close::Each(1e-6 * head_dim as f64),
            )],
        )
        .with_scratch(args.bounds)
    }
}

/// Attention over parts of the keys.
#[derive(Debug, Clone, Copy)]
pub struct Combine {
    /// The kernel.
    pub config: combine::Config,
    /// Batches.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Rows.
    pub len: usize,
    /// How all parts but the first lie in memory.
    pub layout: Layout,
}

impl Combine {
    /// The kernel with tensors.
    pub fn setup(&self) -> Setup {
        let Self {
            config,
            batch,
            heads,
            len,
            layout,
        } = *self;
        let head_dim = config.head_dim as usize;
        let tensor = |layout| Tensor {
            element: config.element,
            shape: [batch, heads, len, head_dim],
            layout,
        };
        // Of row i in part p: one row in seven has no keys in any part, others none in one of them.
        let lse = |part: usize, i: usize| match (i % 7, (i + part) % 5) {
            (3, _) | (_, 2) => f32::NEG_INFINITY,
            _ => ((i * 5 + part * 3) % 11) as f32 - 5.0,
        };
        let (mut memory, rows) = (Memory::new(), batch * heads * len);
        let (mut parts, mut values) = (Vec::new(), Vec::new());
        for part in 0..config.parts as usize {
            let lies = tensor(if part == 0 { Layout::default() } else { layout });
            let mut out = lies.normal(part as u64 + 8);
            for (i, row) in out.chunks_exact_mut(head_dim).enumerate() {
                if lse(part, i) == f32::NEG_INFINITY {
                    row.fill(0.0);
                }
            }
            // Heads of an lse are apart, as where it is that of some of the rows.
            let apart = len + 3 * part;
            let mut lses = vec![f32::NAN; batch * heads * apart];
            for i in 0..rows {
                lses[i / len * apart + i % len] = lse(part, i);
            }
            parts.push(combine::Part {
                out: lies.put(&mut memory, &format!("part {part}"), &out),
                lse: memory.alloc_with(&format!("lse {part}"), &lses),
                lse_strides: [apart, heads * apart].map(|stride| stride as u64),
            });
            values.push(out);
        }

        let mut whole = vec![0.0; rows * head_dim];
        let mut lses = vec![f64::NEG_INFINITY; rows];
        for (i, total_lse) in lses.iter_mut().enumerate() {
            let weights: Vec<f64> = (0..values.len())
                .map(|part| f64::from(lse(part, i)).exp())
                .collect();
            let sum: f64 = weights.iter().sum();
            if sum == 0.0 {
                continue;
            }
            *total_lse = sum.ln();
            for (out, weight) in values.iter().zip(weights) {
                let row = i * head_dim..(i + 1) * head_dim;
                for (total, x) in whole[row.clone()].iter_mut().zip(&out[row]) {
                    *total += x * weight / sum;
                }
            }
        }
        let written = tensor(Layout::default());
        let args = combine::Args {
            parts,
            whole: combine::Part {
                out: written.alloc(&mut memory, "whole"),
                lse: memory.alloc("lse", 4 * rows),
                lse_strides: [len, heads * len].map(|stride| stride as u64),
            },
            batch: batch as u32,
            heads: heads as u32,
            len: len as u32,
        };
        let (out, lse) = (args.whole.out.address, args.whole.lse);
        Setup::new(
            memory,
            vec![Step::new(config.kernel(), config.launch(&args))],
            vec![
                // Rounded once.
                Expected::new("the whole", out, config.element, whole, Close::Norm(3e-3)),
                Expected::new("its lse", lse, Element::F32, lses, Close::Each(1e-5)),
            ],
        )
    }
}

/// Means over tiles of tokens, of two tensors.
#[derive(Debug, Clone, Copy)]
pub struct Pool {
    /// The kernel.
    pub config: pool::Config,
    /// Batches.
    pub batch: usize,
    /// Heads of each.
    pub heads: [usize; 2],
    /// Which tokens make a tile.
    pub tiles: pool::Tiles,
    /// Tokens behind, which are in no tile.
    pub more: usize,
    /// How the first lies in memory.
    pub layout: Layout,
}

impl Pool {
    /// The kernel with tensors, of numbers whose sums are exact.
    pub fn setup(&self) -> Setup {
        let tokens = self.tiles.thw.iter().product::<u32>() as usize + self.more;
        let head_dim = self.config.head_dim as usize;
        let (mut memory, mut expected) = (Memory::new(), Vec::new());
        let mut pooled = |name, heads: usize, layout, seed| {
            let tensor = Tensor {
                element: self.config.element,
                shape: [self.batch, heads, tokens, head_dim],
                layout,
            };
            let mut values = tensor.normal(seed);
            values
                .iter_mut()
                .for_each(|x| *x = (*x * 16.0).round() / 16.0);
            let heads_of = values.chunks_exact(tokens * head_dim);
            let means: Vec<f64> = heads_of.flat_map(|head| self.means(head)).collect();
            let address = memory.alloc(name, 4 * means.len());
            if heads > 0 {
                let exactly = Close::Each(0.0);
                expected.push(Expected::new(name, address, Element::F32, means, exactly));
            }
            pool::Pooled {
                tensor: tensor.put(&mut memory, &format!("tokens of {name}"), &values),
                heads: heads as u32,
                means: address,
            }
        };
        let tensors = [
            pooled("the means", self.heads[0], self.layout, 3),
            pooled("the other means", self.heads[1], Layout::default(), 4),
        ];
        let args = pool::Args {
            tensors,
            batch: self.batch as u32,
            tiles: self.tiles,
        };
        let step = Step::new(self.config.kernel(), self.config.launch(&args));
        Setup::new(memory, vec![step], expected)
    }

    /// Of a head's tiles, one after the other.
    fn means(&self, head: &[f64]) -> Vec<f64> {
        let head_dim = self.config.head_dim as usize;
        let pool::Tiles {
            thw,
            tile,
            zeros_count,
        } = self.tiles;
        let [[time, height, width], [a, b, c]] = [thw, tile].map(|of| of.map(|n| n as usize));
        let (n_h, n_w) = (height.div_ceil(b), width.div_ceil(c));
        let count = time.div_ceil(a) * n_h * n_w;
        let (mut sums, mut tokens) = (vec![0.0; count * head_dim], vec![0; count]);
        for (token, row) in head
            .chunks_exact(head_dim)
            .take(time * height * width)
            .enumerate()
        {
            let (t, h, w) = (
                token / width / height,
                token / width % height,
                token % width,
            );
            let number = (t / a * n_h + h / b) * n_w + w / c;
            tokens[number] += 1;
            for (sum, x) in sums[number * head_dim..].iter_mut().zip(row) {
                *sum += x;
            }
        }
        let mean = |(i, sum): (usize, &f64)| {
            let count = if zeros_count {
                a * b * c
            } else {
                tokens[i / head_dim]
            };
            // As float32 first: so is what is rounded.
            rounded(self.config.element, f64::from((sum / count as f64) as f32))
        };
        sums.iter().enumerate().map(mean).collect()
    }
}
