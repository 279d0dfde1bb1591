//! The kernels that read whole tensors once, against sums in float64: the preparation of the backward
//! pass, and pooling.

use flex_block_attn_emulator::{Memory, Options};
use flex_block_attn_kernels::backward::{Workspace, prepare};
use flex_block_attn_kernels::forward::Tensor;
use flex_block_attn_kernels::{Strides, pool};
use flex_block_attn_lab::emulated::normal;
use flex_block_attn_ptx::Element;
use half::{bf16, f16};

use crate::in_all_ways;

/// A (batch, heads, tokens, head_dim) tensor in emulated memory, with whatever between its rows.
struct Values {
    shape: [usize; 4],
    strides: [usize; 3],
    values: Vec<bf16>,
}

impl Values {
    /// Tokens before heads if `tokens_first`; `gap` elements behind each row.
    fn new(seed: u64, shape: [usize; 4], tokens_first: bool, gap: usize) -> Self {
        let [batch, heads, tokens, head_dim] = shape;
        let row = head_dim + gap;
        let strides = if tokens_first {
            [heads * row, row, tokens * heads * row]
        } else {
            [row, tokens * row, heads * tokens * row]
        };
        let values = normal(seed, batch * heads * tokens * row);
        Self {
            shape,
            strides,
            values,
        }
    }

    fn row(&self, batch: usize, head: usize, token: usize) -> Vec<f64> {
        let [row, of_head, of_batch] = self.strides;
        let start = token * row + head * of_head + batch * of_batch;
        let values = &self.values[start..][..self.shape[3]];
        values.iter().map(|x| x.to_f64()).collect()
    }

    /// The rows of each (batch, head), in order.
    fn heads(&self) -> impl Iterator<Item = Vec<Vec<f64>>> + '_ {
        let [batch, heads, tokens, _] = self.shape;
        (0..batch * heads).map(move |i| {
            (0..tokens)
                .map(|t| self.row(i / heads, i % heads, t))
                .collect()
        })
    }

    fn put(&self, memory: &mut Memory, name: &str, element: Element) -> Tensor {
        // Numbers by chance are of few bits: float16 holds most of them, the others it rounds.
        let bits: Vec<u16> = match element {
            Element::F16 => self
                .values
                .iter()
                .map(|x| f16::from_f32(x.to_f32()).to_bits())
                .collect(),
            _ => self.values.iter().map(|x| x.to_bits()).collect(),
        };
        let [row, head, batch] = self.strides.map(|stride| stride as u64);
        Tensor {
            address: memory.alloc_with(name, &bits),
            strides: Strides { row, head, batch },
        }
    }
}

#[track_caller]
fn close(got: &[f32], expected: &[f64], scale: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        assert!(error < 1e-6 * scale, "{i}: {got}, not {expected}");
    }
}

#[test]
fn deltas_and_lses_of_queries() {
    for (index, config) in prepare::Config::all().into_iter().enumerate() {
        let head_dim = config.head_dim as usize;
        // Some of a thread block's rows, all of them, and a few more.
        let q_len = [1, 64, 130][index % 3];
        let line = Workspace::new(q_len).line;
        let shape = [2, 2, q_len, head_dim];
        let out = Values::new(1, shape, true, 8);
        let dout = Values::new(2, shape, false, 0);
        let has_dlse = index % 2 == 1;
        let number = |i: usize| (i % 11) as f32 - 5.0;
        let lse: Vec<f32> = (0..4 * q_len)
            .map(|i| {
                if i % 7 == 3 {
                    f32::NEG_INFINITY
                } else {
                    number(i)
                }
            })
            .collect();
        let dlse: Vec<f32> = (0..4 * q_len).map(|i| number(i + 4)).collect();
        let deltas: Vec<f64> = out
            .heads()
            .flatten()
            .zip(dout.heads().flatten())
            .map(|(a, b)| a.iter().zip(&b).map(|(a, b)| a * b).sum())
            .collect();
        // Of (delta, lse in units of log2), by their place in the workspace.
        let expected: Vec<(f64, f64)> = (0..4 * line)
            .map(|at| {
                let (head, row) = (at / line, at % line);
                let i = head * q_len + row;
                if row >= q_len || lse[i] == f32::NEG_INFINITY {
                    return (0.0, f64::INFINITY);
                }
                let less = if has_dlse { f64::from(dlse[i]) } else { 0.0 };
                (
                    deltas[i] - less,
                    f64::from(lse[i]) * std::f64::consts::LOG2_E,
                )
            })
            .collect();
        let prepare = || {
            let mut memory = Memory::new();
            let args = prepare::Args {
                out: out.put(&mut memory, "out", config.element),
                dout: dout.put(&mut memory, "dout", config.element),
                lse: memory.alloc_with("lse", &lse),
                dlse: if has_dlse {
                    memory.alloc_with("dlse", &dlse)
                } else {
                    0
                },
                log2: memory.alloc("log2", 16 * line),
                delta: memory.alloc("delta", 16 * line),
                batch: 2,
                heads: 2,
                q_len: q_len as u32,
            };
            (memory, config.launch(&args), (args.delta, args.log2))
        };
        let check = |memory: &Memory, &(delta, log2): &(u64, u64)| {
            let deltas: Vec<f64> = expected.iter().map(|x| x.0).collect();
            close(&memory.read(delta, 4 * line), &deltas, head_dim as f64);
            let got: Vec<f32> = memory.read(log2, 4 * line);
            for (got, (_, expected)) in got.into_iter().zip(&expected) {
                let got = f64::from(got);
                assert!(got == *expected || (got - expected).abs() < 1e-5, "{got}");
            }
        };
        in_all_ways(&config.kernel(), &Options::all(1), prepare, check);
    }
}

#[test]
fn means_of_blocks() {
    // One token, fewer than a block, blocks that share a thread block, blocks that go round often.
    let sizes = [
        (1, 1),
        (10, 64),
        (37, 1),
        (50, 16),
        (100, 48),
        (300, 128),
        (500, 499),
    ];
    for config in pool::Config::all() {
        for (len, block) in sizes {
            let tensor = Values::new(3, [1, 2, len, config.head_dim as usize], len % 2 == 0, 16);
            let expected: Vec<f64> = tensor
                .heads()
                .flat_map(|head| {
                    let mean = |rows: &[Vec<f64>]| -> Vec<f64> {
                        let sum = |i| rows.iter().map(|row| row[i]).sum::<f64>();
                        (0..rows[0].len())
                            .map(|i| sum(i) / rows.len() as f64)
                            .collect()
                    };
                    head.chunks(block).flat_map(mean).collect::<Vec<_>>()
                })
                .collect();
            let prepare = || {
                let mut memory = Memory::new();
                let args = pool::Args {
                    tensor: tensor.put(&mut memory, "tensor", config.element),
                    means: memory.alloc("means", 4 * expected.len()),
                    batch: 1,
                    heads: 2,
                    len: len as u32,
                    block: block as u32,
                };
                (memory, config.launch(&args), args.means)
            };
            in_all_ways(
                &config.kernel(),
                &Options::all(1),
                prepare,
                |memory, &at| {
                    close(&memory.read(at, expected.len()), &expected, 4.0);
                },
            );
        }
    }
}
