//! Kernels ready for the emulator: a problem's memory and launch, and what must come out, in
//! float64.
//!
//! In: sizes. Out: a [`Setup`], whose kernel and launch a test may change before it runs it. Called
//! by tests and by `lab emulate`. Values are bfloat16, about normal, the same each time.

use flex_block_attn::bf16;
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
    /// bfloat16, all together: the norm of the differences, relative to that of the values.
    Norm(f64),
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
        for expected in &self.expected {
            expected.check(&memory).map_err(Failure::Wrong)?;
        }
        Ok(statistics)
    }
}

impl Expected {
    fn check(&self, memory: &Memory) -> Result<(), String> {
        let Self { name, values, .. } = self;
        match self.close {
            Close::Norm(most) => {
                let got: Vec<u16> = memory.read(self.address, values.len());
                let (mut wrong, mut all) = (0.0, 0.0);
                for (&got, &value) in got.iter().zip(values) {
                    wrong += (bf16::from_bits(got).to_f64() - value).powi(2);
                    all += value.powi(2);
                }
                let error = (wrong / all).sqrt();
                // A NaN is not close either.
                if error < most {
                    Ok(())
                } else {
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
            a: memory.alloc_with("a", &bits(&a)),
            b: memory.alloc_with("b", &bits(&b)),
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
                close: Close::Norm(2.5e-3),
            }],
        }
    }
}

/// Attention forward; which blocks of keys each block of queries sees is the same for all heads.
#[derive(Debug, Clone)]
pub struct Forward {
    /// Heads of q.
    pub heads: usize,
    /// Of which so many share one of k and v.
    pub group: usize,
    /// Columns.
    pub head_dim: usize,
    /// Keys of the kernel's tile.
    pub kv_tile: usize,
    /// Queries of a block.
    pub q_block: usize,
    /// Keys of a block.
    pub kv_block: usize,
    /// Keys.
    pub kv_len: usize,
    /// The blocks of keys that each block of queries sees.
    pub lists: Vec<Vec<usize>>,
    /// Factor of the scores.
    pub scale: f64,
}

impl Forward {
    /// The kernel with tensors.
    pub fn setup(&self) -> Setup {
        let sizes = Sizes {
            batch: 1,
            q_heads: self.heads,
            kv_heads: self.heads / self.group,
            q_len: self.q_block * self.lists.len(),
            kv_len: self.kv_len,
            head_dim: self.head_dim,
        };
        let kv_count = sizes.kv_heads * sizes.kv_len * sizes.head_dim;
        let q = normal(1, sizes.q_heads * sizes.q_len * sizes.head_dim);
        let (k, v) = (normal(2, kv_count), normal(3, kv_count));
        let problem = Problem {
            sizes,
            scale: self.scale,
            q: &wide(&q),
            k: &wide(&k),
            v: &wide(&v),
        };
        let expected = problem.attention(&|_, _, query, key| {
            self.lists[query / self.q_block].contains(&(key / self.kv_block))
        });

        let mut memory = Memory::new();
        let args = self.args(sizes, &mut memory, [&q, &k, &v]);
        let config = forward::Config {
            element: Element::Bf16,
            head_dim: self.head_dim as u32,
            kv_tile: self.kv_tile as u32,
        };
        Setup {
            kernel: config.kernel(),
            launch: config.launch(&args),
            memory,
            expected: vec![
                Expected {
                    name: "the output",
                    address: args.out.address,
                    values: expected.out,
                    close: Close::Norm(4e-3),
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
        let tensor = |address, tokens: usize| forward::Tensor {
            address,
            strides: Strides {
                row: sizes.head_dim as u64,
                head: (tokens * sizes.head_dim) as u64,
                batch: 16,
            },
        };
        let blocks = self.kv_len / self.kv_block;
        let counts: Vec<i32> = self.lists.iter().map(|list| list.len() as i32).collect();
        let padded = |list: &Vec<usize>| -> Vec<i32> {
            (0..blocks)
                .map(|i| list.get(i).map_or(0, |&block| block as i32))
                .collect()
        };
        let lists: Vec<i32> = self.lists.iter().flat_map(padded).collect();
        forward::Args {
            q: tensor(memory.alloc_with("q", &bits(q)), sizes.q_len),
            k: tensor(memory.alloc_with("k", &bits(k)), sizes.kv_len),
            v: tensor(memory.alloc_with("v", &bits(v)), sizes.kv_len),
            out: tensor(memory.alloc("out", 2 * q.len()), sizes.q_len),
            lse: memory.alloc("lse", 4 * self.heads * sizes.q_len),
            counts: memory.alloc_with("counts", &counts),
            lists: memory.alloc_with("lists", &lists),
            list_stride: blocks as u32,
            record: [0, 0],
            batch: 1,
            heads: self.heads as u32,
            group: self.group as u32,
            q_len: sizes.q_len as u32,
            kv_len: self.kv_len as u32,
            q_block: self.q_block as u32,
            kv_block: self.kv_block as u32,
            scale: self.scale as f32,
        }
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

/// Their bits, as emulated memory holds them.
fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}
