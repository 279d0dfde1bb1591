//! Problems for kernels, the same for the emulator and for a GPU: tensors in memory, launches, and
//! what must come out, in float64.
//!
//! In: sizes. Out: a [`Setup`], whose kernels and launches a test may change before it runs them.
//! Called by tests and by `lab emulate`. Values are by chance, about normal, the same each time.
//!
//! - `attention`: forward and backward; `product`; `plan`: mask compaction; `rows`: preparation of
//!   the backward pass, parts put together, pooling; `select`: masks of what suits;
//! - `video`: forward and backward over a video in tiles;
//! - `tensor`: how tensors lie in memory.

mod attention;
mod plan;
mod product;
mod rows;
mod rule;
mod select;
mod tensor;
mod video;

use flex_block_attn::{bf16, f16};
use flex_block_attn_cuda::Error;
use flex_block_attn_emulator::{Fault, Memory, Options, emulate};
use flex_block_attn_ptx::{Element, Kernel, Launch};
use thiserror::Error;

use crate::gpu::Gpu;

pub use attention::{Backward, Forward};
pub use plan::{BitCompaction, Compaction, MaskLayout, TileCompaction};
pub use product::Product;
pub use rows::{Bounds, Combine, Pool, Prepare};
pub use rule::Rule;
pub use select::Select;
pub use tensor::Layout;
pub use video::Video;

/// Launches that follow each other on memory of their own, and what they must leave there.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Memory before them.
    pub memory: Memory,
    steps: Vec<Step>,
    /// Which of them the problem is about.
    main: usize,
    expected: Vec<Expected>,
    /// Addresses of allocations that may be left in any state.
    scratch: Vec<u64>,
}

/// A kernel, launched.
#[derive(Debug, Clone)]
struct Step {
    kernel: Kernel,
    launch: Launch,
}

/// Values that must be in memory in the end.
#[derive(Debug, Clone)]
struct Expected {
    name: &'static str,
    address: u64,
    /// How they are stored.
    element: Element,
    values: Vec<f64>,
    close: Close,
    /// Whether the same bits must be left each time, and not only up to the order of sums.
    repeats: bool,
}

/// How close they must be.
#[derive(Debug, Clone, Copy)]
enum Close {
    /// All together: the norm of the differences, relative to that of the values.
    Norm(f64),
    /// Each; infinities exactly.
    Each(f64),
}

/// What came instead of right results.
#[derive(Debug, Error)]
pub enum Failure {
    /// A fault that the emulator found.
    #[error("{0}")]
    Fault(Box<Fault>),
    /// What the driver says.
    #[error("on the GPU: {0}")]
    Gpu(#[from] Error),
    /// Other results.
    #[error("wrong results: {0}")]
    Wrong(String),
}

impl Step {
    fn new(kernel: Kernel, launch: Launch) -> Self {
        Self { kernel, launch }
    }
}

impl Setup {
    fn new(memory: Memory, steps: Vec<Step>, expected: Vec<Expected>) -> Self {
        Self {
            memory,
            steps,
            main: 0,
            expected,
            scratch: Vec::new(),
        }
    }

    /// Says which step the problem is about, if it is not the first.
    fn about(mut self, step: usize) -> Self {
        self.main = step;
        self
    }

    /// Lets the allocation at an address be left in any state.
    fn with_scratch(mut self, address: u64) -> Self {
        self.scratch.push(address);
        self
    }

    /// The kernel that the problem is about.
    pub fn kernel(&self) -> &Kernel {
        &self.steps[self.main].kernel
    }

    /// The kernel, to be changed.
    pub fn kernel_mut(&mut self) -> &mut Kernel {
        &mut self.steps[self.main].kernel
    }

    /// Its launch.
    pub fn launch(&self) -> &Launch {
        &self.steps[self.main].launch
    }

    /// Its launch, to be changed.
    pub fn launch_mut(&mut self) -> &mut Launch {
        &mut self.steps[self.main].launch
    }

    /// Runs everything in the emulator, on a copy of the memory, and compares. What must repeat may
    /// hold no sums in any order.
    ///
    /// # Errors
    /// The first fault, or the first wrong result.
    pub fn run(&self, options: &Options) -> Result<Memory, Failure> {
        let options = Options {
            ordered_sums: self.expected.iter().all(|expected| expected.repeats),
            ..*options
        };
        let mut memory = self.memory.clone();
        for Step { kernel, launch } in &self.steps {
            emulate(kernel, launch, &mut memory, &options).map_err(Failure::Fault)?;
        }
        self.check(&memory).map_err(Failure::Wrong)?;
        Ok(memory)
    }

    /// Runs everything on a GPU, twice, and compares with what must come out and with each other.
    ///
    /// # Errors
    /// What the driver says, or the first wrong result.
    pub fn run_on(&self, gpu: &Gpu) -> Result<(), Failure> {
        let run = || -> Result<Memory, Failure> {
            let mut memory = self.memory.clone();
            let steps = self.steps.iter().map(|step| (&step.kernel, &step.launch));
            gpu.run(steps, &mut memory)?;
            self.check(&memory).map_err(Failure::Wrong)?;
            Ok(memory)
        };
        let (first, second) = (run()?, run()?);
        let differs = |e: &&Expected| e.repeats && e.bytes(&first) != e.bytes(&second);
        match self.expected.iter().find(differs) {
            None => Ok(()),
            Some(e) => Err(Failure::Wrong(format!(
                "{} differs from run to run",
                e.name
            ))),
        }
    }

    /// Whether memory is as it must be after the last step.
    fn check(&self, memory: &Memory) -> Result<(), String> {
        for expected in &self.expected {
            expected.check(memory)?;
        }
        for (before, after) in self.memory.allocations().iter().zip(memory.allocations()) {
            let results = self.expected.iter().map(|expected| expected.address);
            let mut written = results.chain(self.scratch.iter().copied());
            if written.any(|address| before.range().contains(&address)) {
                continue;
            }
            let pairs = before.bytes().iter().zip(after.bytes());
            let mut inputs = pairs.zip(before.written()).filter(|(_, known)| *known);
            if inputs.any(|((before, after), _)| before != after) {
                return Err(format!("{} was written to", before.name()));
            }
        }
        Ok(())
    }
}

impl Expected {
    fn new(
        name: &'static str,
        address: u64,
        element: Element,
        values: Vec<f64>,
        close: Close,
    ) -> Self {
        Self {
            name,
            address,
            element,
            values,
            close,
            repeats: true,
        }
    }

    fn bytes(&self, memory: &Memory) -> Vec<u8> {
        let bytes = self.values.len() * self.element.bytes() as usize;
        memory.read(self.address, bytes)
    }

    fn read(&self, memory: &Memory) -> Vec<f64> {
        fn all<T: flex_block_attn_emulator::Element>(
            expected: &Expected,
            memory: &Memory,
            wide: impl Fn(T) -> f64,
        ) -> Vec<f64> {
            let values = memory.read(expected.address, expected.values.len());
            values.into_iter().map(wide).collect()
        }
        match self.element {
            Element::Bf16 => all(self, memory, |x| bf16::from_bits(x).to_f64()),
            Element::F16 => all(self, memory, |x| f16::from_bits(x).to_f64()),
            Element::F32 => all(self, memory, |x: f32| x.into()),
            Element::I32 => all(self, memory, |x: i32| x.into()),
            Element::U8 => all(self, memory, |x: u8| x.into()),
            other => unreachable!("no kernel writes {other:?}"),
        }
    }

    fn check(&self, memory: &Memory) -> Result<(), String> {
        let Self { name, values, .. } = self;
        if !memory.is_written(self.address, self.bytes(memory).len()) {
            return Err(format!("{name} is not all written"));
        }
        let got = self.read(memory);
        let mut pairs = got.iter().zip(values);
        match self.close {
            Close::Norm(most) => {
                let (mut wrong, mut all) = (0.0, 0.0);
                for (got, value) in pairs {
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
                let far = |(got, value): (&f64, &f64)| {
                    // A NaN is far, too.
                    let close = got == value || (got - value).abs() < most;
                    !close
                };
                match pairs.position(far) {
                    None => Ok(()),
                    Some(i) => Err(format!("{name} {i} is {}, not {}", got[i], values[i])),
                }
            }
        }
    }
}

/// Numbers by chance, about normal. The same for the same seed.
pub fn normal(seed: u64, count: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    // The sum of 12 uniform numbers has variance 1.
    (0..count)
        .map(|_| (0..12).map(|_| uniform()).sum::<f64>() - 6.0)
        .collect()
}

#[cfg(test)]
mod tests {
    use flex_block_attn::{Extents, builders};
    use flex_block_attn_kernels::{backward, combine, forward, pool};
    use flex_block_attn_ptx::Arg;

    use super::*;
    use crate::gpu::relocated;

    const PRODUCT: Product = Product {
        element: Element::Bf16,
        m: 128,
        n: 256,
        k: 64,
    };

    /// One of each kind.
    fn setups() -> Vec<Setup> {
        let mask = builders::full(Extents::new(128, 128, 128, 128).unwrap());
        let forward = forward::Config::choose(Element::Bf16, 64, 128, 128, None).unwrap();
        let (layout, mask_layout) = (Layout::default(), MaskLayout::Transposed);
        vec![
            PRODUCT.setup(),
            Forward::new(forward, mask.clone()).setup(),
            Backward::new(backward::Config::all()[0], mask.clone()).setup(),
            Backward::new(
                backward::Config {
                    deterministic: true,
                    ..backward::Config::all()[0]
                },
                mask,
            )
            .setup(),
            Compaction {
                shape: [1, 2, 3, 4],
                density: 128,
                layout: mask_layout,
            }
            .setup(),
            Prepare {
                config: backward::prepare::Config::all()[0],
                batch: 1,
                heads: 1,
                q_len: 10,
                out: layout,
                dout: layout,
                has_dlse: false,
            }
            .setup(),
            Combine {
                config: combine::Config::all()[0],
                batch: 1,
                heads: 1,
                len: 10,
                layout,
            }
            .setup(),
            Pool {
                config: pool::Config::all()[0],
                batch: 1,
                heads: [1, 2],
                tiles: pool::Tiles::blocks(10, 4),
                more: 0,
                layout,
            }
            .setup(),
            Select {
                shared: true,
                lambda: Some(0.7),
                text_lengths: Some([10, 40]),
                ..Select::new(20, 22)
            }
            .setup(),
        ]
    }

    /// Made-up places: the n-th allocation at n << 44.
    #[test]
    fn addresses_are_relocated_and_nothing_else() {
        for Setup { memory, steps, .. } in setups() {
            let allocations = memory.allocations();
            let places: Vec<u64> = (1..=allocations.len() as u64).map(|n| n << 44).collect();
            let first = allocations[0].range().start;
            let mut used = vec![false; allocations.len()];
            let mut check = |before: u64, after: u64| {
                if before < first {
                    // A stride, or the address of what is left out.
                    assert_eq!(after, before);
                    return;
                }
                let n = (after >> 44) as usize - 1;
                assert!(allocations[n].range().contains(&before), "{before:#x}");
                assert_eq!(after % (1 << 44), before - allocations[n].range().start);
                used[n] = true;
            };
            for Step { kernel, launch } in &steps {
                let moved = relocated(launch, &memory, &places);
                assert_eq!(moved.grid, launch.grid);
                for (before, after) in launch.args.iter().zip(&moved.args) {
                    match (before, after) {
                        (Arg::U64(before), Arg::U64(after)) => check(*before, *after),
                        (Arg::TensorMap(before), Arg::TensorMap(after)) => {
                            check(before.address, after.address);
                            let mut after = *after;
                            after.address = before.address;
                            assert_eq!(after, *before);
                        }
                        _ => assert_eq!(before, after, "{}", kernel.name),
                    }
                }
            }
            for (used, allocation) in used.iter().zip(allocations) {
                assert!(used, "{} is not used", allocation.name());
            }
        }
    }

    #[test]
    fn what_is_wrong_is_found() {
        let setup = PRODUCT.setup();
        let [
            Expected {
                address, values, ..
            },
        ] = &setup.expected[..]
        else {
            panic!("a product has one result");
        };
        let mut memory = setup.memory.clone();
        let wrong = |memory: &Memory| setup.check(memory).expect_err("it is wrong");
        assert_eq!(wrong(&memory), "c is not all written");
        // As a GPU leaves what it does not write.
        memory.write(*address, &vec![0xffffu16; values.len()]);
        assert_eq!(wrong(&memory), "relative error NaN of c");
        let bits = |x: &f64| bf16::from_f64(*x).to_bits();
        let right: Vec<u16> = values.iter().map(bits).collect();
        memory.write(*address, &right);
        setup.check(&memory).expect("all is right");
        let b = memory.allocations()[1].range().start;
        memory.write(b + 6, &[bits(&99.0)]);
        assert_eq!(wrong(&memory), "b was written to");
    }
}
