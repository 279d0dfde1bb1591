//! Kernels ready for the emulator: a problem's memory and launch, and what must come out, in
//! float64.
//!
//! In: sizes. Out: a [`Setup`], whose kernel and launch a test may change before it runs it. Called
//! by tests and by `lab emulate`. Values are about normal, the same each time.

use flex_block_attn::{BlockMask, Plan, bf16, f16};
use flex_block_attn_emulator::{Fault, Memory, Options, Statistics, emulate};
use flex_block_attn_kernels::{Strides, forward, gemm};
use flex_block_attn_ptx::{Element, Kernel, Launch};
use thiserror::Error;

use crate::reference::{Problem, Sizes};

/// A launch of a kernel on memory of its own, and what it must leave there.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The kernel.
    pub kernel: Kernel,
    /// The launch.
    pub launch: Launch,
    /// Memory before it.
    pub memory: Memory,
    expected: Vec<Expected>,
}

/// Values that must be in memory in the end.
#[derive(Debug, Clone)]
struct Expected {
    name: &'static str,
    address: u64,
    values: Vec<f64>,
    close: Close,
}

/// How close they must be, and how they are stored.
#[derive(Debug, Clone, Copy)]
enum Close {
    /// Of 16-bit elements all together: the norm of the differences, relative to that of the values.
    Norm(Element, f64),
    /// float32, each; infinities exactly.
    Each(f64),
}

/// What came instead of right results.
#[derive(Debug, Error)]
pub enum Failure {
    /// A fault.
    #[error("{0}")]
    Fault(Box<Fault>),
    /// Other results.
    #[error("wrong results: {0}")]
    Wrong(String),
}

impl Setup {
    /// Runs the launch on a copy of the memory, and compares.
    ///
    /// # Errors
    /// The first fault, or the first wrong result.
    pub fn run(&self, options: &Options) -> Result<Statistics, Failure> {
        let mut memory = self.memory.clone();
        let statistics =
            emulate(&self.kernel, &self.launch, &mut memory, options).map_err(Failure::Fault)?;
        self.check(&memory).map_err(Failure::Wrong)?;
        Ok(statistics)
    }

    /// Whether memory is as the launch must leave it.
    ///
    /// # Errors
    /// The first wrong result.
    pub fn check(&self, memory: &Memory) -> Result<(), String> {
        self.expected
            .iter()
            .try_for_each(|expected| expected.check(memory))
    }
}

impl Expected {
    fn check(&self, memory: &Memory) -> Result<(), String> {
        let Self { name, values, .. } = self;
        match self.close {
            Close::Norm(element, most) => {
                let got: Vec<u16> = memory.read(self.address, values.len());
                let (mut wrong, mut all) = (0.0, 0.0);
                for (&got, &value) in got.iter().zip(values) {
                    let got = match element {
                        Element::F16 => f16::from_bits(got).to_f64(),
                        _ => bf16::from_bits(got).to_f64(),
                    };
                    wrong += (got - value).powi(2);
                    all += value.powi(2);
                }
                // All zero, if so it must be; a NaN is not close.
                if wrong.sqrt() <= most * all.sqrt() {
                    Ok(())
                } else {
                    let error = (wrong / all).sqrt();
                    Err(format!("relative error {error:.2e} of {name}"))
                }
            }
            Close::Each(most) => {
                let got: Vec<f32> = memory.read(self.address, values.len());
                let pairs = got.into_iter().map(f64::from).zip(values);
                let close = |got: f64, value: f64| got == value || (got - value).abs() < most;
                match pairs
                    .enumerate()
                    .find(|(_, (got, value))| !close(*got, **value))
                {
                    None => Ok(()),
                    Some((i, (got, value))) => Err(format!("{name} {i} is {got}, not {value}")),
                }
            }
        }
    }
}

/// A matrix product.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Rows.
    pub m: usize,
    /// Columns.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
}

impl Product {
    /// The kernel with operands.
    pub fn setup(self) -> Setup {
        let Self { m, n, k } = self;
        let (a, b) = (normal(1, m * k), normal(2, k * n));
        let (wide_a, wide_b) = (wide(&a), wide(&b));
        let mut values = vec![0.0; m * n];
        for (a, row) in wide_a.chunks_exact(k).zip(values.chunks_exact_mut(n)) {
            for (a, b) in a.iter().zip(wide_b.chunks_exact(n)) {
                row.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
            }
        }
        let mut memory = Memory::new();
        let args = gemm::Args {
            a: memory.alloc_with("a", &bits(&a, Element::Bf16)),
            b: memory.alloc_with("b", &bits(&b, Element::Bf16)),
            c: memory.alloc("c", 2 * m * n),
            m: m as u32,
            n: n as u32,
            k: k as u32,
        };
        let config = gemm::Config {
            element: Element::Bf16,
        };
        Setup {
            kernel: config.kernel(),
            launch: config.launch(&args),
            memory,
            expected: vec![Expected {
                name: "c",
                address: args.c,
                values,
                close: Close::Norm(Element::Bf16, 2.5e-3),
            }],
        }
    }
}

/// Attention forward.
#[derive(Debug, Clone)]
pub struct Forward {
    /// The kernel.
    pub config: forward::Config,
    /// Batches.
    pub batch: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// Lengths, blocks, and which of them are seen.
    pub mask: BlockMask,
    /// Factor of the scores.
    pub scale: f64,
    /// Thread blocks at most.
    pub blocks: u32,
    /// Whether tensors are (batch, tokens, heads, head_dim) in memory.
    pub tokens_first: bool,
}

impl Forward {
    /// One head of one batch, on two thread blocks.
    pub fn new(config: forward::Config, mask: BlockMask) -> Self {
        Self {
            config,
            batch: 1,
            heads: 1,
            kv_heads: 1,
            mask,
            scale: 0.125,
            blocks: 2,
            tokens_first: false,
        }
    }

    /// The kernel with tensors.
    pub fn setup(&self) -> Setup {
        let extents = self.mask.extents();
        let sizes = Sizes {
            batch: self.batch,
            q_heads: self.heads,
            kv_heads: self.kv_heads,
            q_len: extents.q_len(),
            kv_len: extents.kv_len(),
            head_dim: self.config.head_dim as usize,
        };
        let kv_count = self.batch * self.kv_heads * sizes.kv_len * sizes.head_dim;
        let q_count = self.batch * self.heads * sizes.q_len * sizes.head_dim;
        let (q, k, v) = (normal(1, q_count), normal(2, kv_count), normal(3, kv_count));
        let problem = Problem {
            sizes,
            scale: self.scale,
            q: &wide(&q),
            k: &wide(&k),
            v: &wide(&v),
        };
        let expected = problem.attention(&|batch, head, query, key| {
            let (row, column) = (query / extents.q_block(), key / extents.kv_block());
            // A mask's extent of 1 stands for all.
            let batch = batch % self.mask.batch();
            self.mask
                .contains(batch, head % self.mask.heads(), row, column)
        });

        let mut memory = Memory::new();
        let args = self.args(sizes, &mut memory, [&q, &k, &v]);
        Setup {
            kernel: self.config.kernel(),
            launch: self.config.launch(&args),
            memory,
            expected: vec![
                Expected {
                    name: "the output",
                    address: args.out.address,
                    values: self.stored(&expected.out, self.heads, sizes.head_dim),
                    close: Close::Norm(self.config.element, 4e-3),
                },
                Expected {
                    name: "lse",
                    address: args.lse,
                    values: expected.lse,
                    close: Close::Each(1e-4),
                },
            ],
        }
    }

    fn args(&self, sizes: Sizes, memory: &mut Memory, [q, k, v]: [&[bf16]; 3]) -> forward::Args {
        let plan = Plan::new(&self.mask);
        let tensor = |address, heads: usize, tokens: usize| {
            let d = sizes.head_dim;
            let (row, head) = match self.tokens_first {
                false => (d, tokens * d),
                true => (heads * d, d),
            };
            forward::Tensor {
                address,
                strides: Strides {
                    row: row as u64,
                    head: head as u64,
                    batch: (heads * tokens * d) as u64,
                },
            }
        };
        let mut put = |name: &str, x: &[bf16], heads: usize, tokens: usize| {
            let stored = self.stored(x, heads, sizes.head_dim);
            tensor(
                memory.alloc_with(name, &bits(&stored, self.config.element)),
                heads,
                tokens,
            )
        };
        forward::Args {
            q: put("q", q, sizes.q_heads, sizes.q_len),
            k: put("k", k, sizes.kv_heads, sizes.kv_len),
            v: put("v", v, sizes.kv_heads, sizes.kv_len),
            out: tensor(memory.alloc("out", 2 * q.len()), sizes.q_heads, sizes.q_len),
            lse: memory.alloc("lse", 4 * self.batch * self.heads * sizes.q_len),
            plan: memory.alloc_with("plan", plan.words()),
            layout: plan.layout(),
            batch: self.batch as u32,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            scale: self.scale as f32,
            counter: memory.alloc_with("counter", &[0i32]),
            blocks: self.blocks,
        }
    }

    /// A (batch, heads, tokens, head_dim) tensor's values as they lie in memory.
    fn stored<T: Copy>(&self, values: &[T], heads: usize, head_dim: usize) -> Vec<T> {
        if !self.tokens_first {
            return values.to_vec();
        }
        let tokens = values.len() / (self.batch * heads * head_dim);
        let row = |at: usize| {
            let (batch, token, head) = (at / heads / tokens, at / heads % tokens, at % heads);
            &values[((batch * heads + head) * tokens + token) * head_dim..][..head_dim]
        };
        (0..self.batch * tokens * heads)
            .flat_map(|at| row(at).iter().copied())
            .collect()
    }
}

/// Numbers by chance, about normal. The same for the same seed.
pub fn normal(seed: u64, count: usize) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    // The sum of 12 uniform numbers has variance 1.
    (0..count)
        .map(|_| bf16::from_f64((0..12).map(|_| uniform()).sum::<f64>() - 6.0))
        .collect()
}

/// Their bits as an element type has them. Numbers by chance are of few bits: float16 holds most of
/// them, the others it rounds.
pub fn bits(values: &[bf16], element: Element) -> Vec<u16> {
    let bits = |x: &bf16| match element {
        Element::F16 => f16::from_f32(x.to_f32()).to_bits(),
        _ => x.to_bits(),
    };
    values.iter().map(bits).collect()
}

fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}
