//! Mask compaction, word for word against the host's.

use flex_block_attn::{BlockMask, BoolMatrix, Extents, Plan};
use flex_block_attn_emulator::{Memory, Options};
use flex_block_attn_kernels::plan::{Args, Config};

use crate::{Repeats, each_in_all_ways};

/// Which layout a mask has in memory.
#[derive(Debug, Clone, Copy)]
enum Layout {
    Dense,
    /// Columns before rows.
    Transposed,
    /// One matrix, repeated for each head and batch, its entries three bytes apart.
    Repeated,
}

struct Problem {
    shape: [usize; 4],
    /// Kept entries, of 256.
    density: u8,
    layout: Layout,
}

impl Problem {
    fn strides(&self) -> [usize; 4] {
        let [_, heads, rows, columns] = self.shape;
        let matrix = rows * columns;
        match self.layout {
            Layout::Dense => [heads * matrix, matrix, columns, 1],
            Layout::Transposed => [heads * matrix, matrix, 1, rows],
            Layout::Repeated => [0, 0, 3 * columns, 3],
        }
    }

    /// Bytes of every value that counts as true, and zeros.
    fn bytes(&self) -> Vec<u8> {
        let last: usize = self
            .shape
            .iter()
            .zip(self.strides())
            .map(|(extent, stride)| (extent - 1) * stride)
            .sum();
        let mut state = 77u64;
        (0..=last)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005) + 1;
                let [kept, value, ..] = (state >> 32).to_le_bytes();
                u8::from(kept < self.density) * value.max(1)
            })
            .collect()
    }

    fn check(&self, ways: &[Options]) {
        let [_, _, rows, columns] = self.shape;
        let bytes = self.bytes();
        let extents = Extents::new(16 * rows, 16 * columns, 16, 16).unwrap();
        let matrix = BoolMatrix::new(&bytes, self.shape, self.strides()).unwrap();
        let plan = Plan::new(&BlockMask::from_matrix(extents, matrix).unwrap());
        let words = plan.words().len();
        let prepare = || {
            let mut memory = Memory::new();
            let args = Args {
                mask: memory.alloc_with("mask", &bytes),
                strides: self.strides().map(|stride| stride as u64),
                layout: plan.layout(),
                plan: memory.alloc("plan", 4 * words),
            };
            let launch = |config: Config| (config.kernel(), config.launch(&args));
            let launches = [Config::Lists, Config::Order].map(launch);
            (memory, launches.to_vec(), args.plan)
        };
        each_in_all_ways(ways, Repeats::Exactly, prepare, |memory, &at| {
            assert!(memory.is_written(at, 4 * words));
            let got: Vec<i32> = memory.read(at, words);
            let differs = got.iter().zip(plan.words()).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{:?}, {:?}", self.shape, self.layout);
        });
    }
}

#[test]
fn masks_of_all_layouts() {
    let shapes = [
        [1, 1, 1, 1],
        [2, 3, 5, 7],
        [1, 2, 33, 31],
        [1, 1, 9, 70],
        [2, 1, 70, 9],
    ];
    for layout in [Layout::Dense, Layout::Transposed, Layout::Repeated] {
        for shape in shapes {
            let problem = Problem {
                shape,
                density: 100,
                layout,
            };
            problem.check(&Options::all(1));
        }
    }
}

#[test]
fn long_rows_and_columns() {
    // Longer than what is loaded, gathered, or ranked at a time.
    for (shape, layout) in [
        ([1, 1, 4, 1100], Layout::Dense),
        ([1, 1, 1100, 4], Layout::Transposed),
        ([1, 1, 385, 400], Layout::Dense),
    ] {
        let problem = Problem {
            shape,
            density: 60,
            layout,
        };
        problem.check(&Options::all(1));
    }
}

#[test]
fn empty_and_full() {
    for density in [0, 255] {
        let problem = Problem {
            shape: [1, 1, 40, 36],
            density,
            layout: Layout::Dense,
        };
        problem.check(&Options::all(1));
    }
}
