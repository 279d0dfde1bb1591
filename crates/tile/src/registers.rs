//! Tiles in the registers of a warpgroup: [`RegTile`], 64 rows of float32, what products
//! accumulate in; [`Fragments`], the same rounded to 16 bits, a left operand; [`RowPair`], a value
//! for each row.
//!
//! Thread `t` of a warpgroup holds two rows: `16 (t / 32) + t % 32 / 4`, and the eighth after it.
//! Of every group of 8 columns it holds the two from `2 (t % 4)` on, so a row lies in the four
//! threads of a quad. Register `i` is in row `i / 2 % 2` of the two.

use flex_block_attn_ptx::builder::Pair;
use flex_block_attn_ptx::{Builder, Reg};

/// 64 rows of float32, `columns` columns.
#[derive(Debug, Clone)]
pub struct RegTile<'k> {
    registers: Vec<Reg<'k, f32>>,
}

/// A value for each of a thread's two rows. The threads of a quad hold the same rows.
pub type RowPair<'k> = [Reg<'k, f32>; 2];

/// A left operand of 16-bit elements: for each 16 columns four registers.
#[derive(Debug, Clone)]
pub struct Fragments<'k> {
    registers: Vec<[Reg<'k, u32>; 4]>,
}

impl<'k> RegTile<'k> {
    /// Registers with nothing in them.
    pub fn uninit(k: &'k Builder, columns: u32) -> Self {
        Self {
            registers: (0..columns / 2).map(|_| k.uninit()).collect(),
        }
    }

    /// Puts `value` everywhere.
    #[track_caller]
    pub fn fill(&self, value: f32) {
        for register in &self.registers {
            register.set(value);
        }
    }

    /// Columns.
    pub fn columns(&self) -> u32 {
        2 * self.registers.len() as u32
    }

    /// The registers, in order.
    pub fn registers(&self) -> &[Reg<'k, f32>] {
        &self.registers
    }

    /// Some of its columns.
    ///
    /// # Panics
    /// If they are not whole groups of 8.
    pub fn part(&self, columns: std::ops::Range<u32>) -> Self {
        assert!(
            columns.start.is_multiple_of(8) && columns.end.is_multiple_of(8),
            "columns {columns:?}"
        );
        let registers = columns.start as usize / 2..columns.end as usize / 2;
        Self {
            registers: self.registers[registers].to_vec(),
        }
    }

    /// Each register with which of the two rows it is in.
    pub fn elements(&self) -> impl Iterator<Item = (Reg<'k, f32>, usize)> + '_ {
        self.registers
            .iter()
            .enumerate()
            .map(|(i, &register)| (register, i / 2 % 2))
    }

    /// Puts `value` in all of some columns.
    ///
    /// # Panics
    /// If they are not whole groups of 8.
    #[track_caller]
    pub fn set_columns(&self, columns: std::ops::Range<u32>, value: f32) {
        for register in self.part(columns).registers {
            register.set(value);
        }
    }

    /// Puts `value` in those of `columns` that are not among the first `kept`; `lane` holds its part
    /// of them.
    ///
    /// # Panics
    /// If they are not whole groups of 8.
    #[track_caller]
    pub fn set_columns_from(
        &self,
        columns: std::ops::Range<u32>,
        kept: Reg<'k, u32>,
        lane: Reg<'k, u32>,
        value: f32,
    ) {
        assert!(
            columns.start.is_multiple_of(8) && columns.end.is_multiple_of(8),
            "columns {columns:?}"
        );
        // The thread's columns are 8 i and 8 i + 1, after the two of each lane before it in the
        // quad.
        let own = (kept - (lane & 3) * 2).as_i32();
        for i in columns.start / 2..columns.end / 2 {
            let register = self.registers[i as usize];
            let column = i / 4 * 8 + i % 2 - columns.start;
            register.set(own.gt(column as i32).select(register, value));
        }
    }

    /// Puts `value` in the columns whose bits are 0, of a word for each 32 columns; `lane` holds its
    /// part of them.
    ///
    /// # Panics
    /// If there are not as many words.
    #[track_caller]
    pub fn set_columns_without(&self, bits: &[Reg<'k, u32>], lane: Reg<'k, u32>, value: f32) {
        assert_eq!(self.columns().div_ceil(32) as usize, bits.len(), "words");
        let own = |&word: &Reg<'k, u32>| word >> ((lane & 3) * 2);
        let own: Vec<_> = bits.iter().map(own).collect();
        for (eight, four) in (0u32..).zip(self.registers.chunks_exact(4)) {
            for x in 0..2 {
                let bit = own[eight as usize / 4] & (1 << (eight % 4 * 8 + x));
                let kept = bit.differs(0);
                for register in [four[x as usize], four[2 + x as usize]] {
                    register.set(kept.select(register, value));
                }
            }
        }
    }

    /// Adds to the numbers of one column; `lane` holds its part of it.
    #[track_caller]
    pub fn add_to_column(&self, column: Reg<'k, u32>, lane: Reg<'k, u32>, value: Reg<'k, f32>) {
        let own = column - (lane & 3) * 2;
        for (eight, four) in (0u32..).zip(self.registers.chunks_exact(4)) {
            for x in 0..2 {
                let is_it = own.equals(8 * eight + x);
                for register in [four[x as usize], four[2 + x as usize]] {
                    register.set(is_it.select(register + value, register));
                }
            }
        }
    }

    /// Multiplies each row by its factor, in place.
    #[track_caller]
    pub fn scale_rows(&self, factors: RowPair<'k>) {
        for (mut register, row) in self.elements() {
            register *= factors[row];
        }
    }

    /// The largest element of each row. All threads of a quad get the same.
    #[track_caller]
    pub fn row_max(&self) -> RowPair<'k> {
        let own = self.fold(|a, b| a.max(b));
        // Both rows a step at a time: two shuffles are then under way together.
        let pairs = own.map(|x| x.butterfly(1));
        let own = [own[0].max(pairs[0]), own[1].max(pairs[1])];
        let pairs = own.map(|x| x.butterfly(2));
        [own[0].max(pairs[0]), own[1].max(pairs[1])]
    }

    /// The sum of those elements of each row that this thread holds; [`quad_sum`] makes it the
    /// row's.
    #[track_caller]
    pub fn row_sum_own(&self) -> RowPair<'k> {
        self.fold(|a, b| a + b)
    }

    #[track_caller]
    fn fold(&self, f: impl Fn(Reg<'k, f32>, Reg<'k, f32>) -> Reg<'k, f32>) -> RowPair<'k> {
        // One chain for each row: two for each were slower, by the registers they take.
        [0, 1].map(|row| {
            let mut elements = self.elements().filter(|&(_, r)| r == row).map(|(x, _)| x);
            let first = elements.next().expect("a tile has columns");
            elements.fold(first, &f)
        })
    }

    /// `2^(scale x - offset)` of each element, in place, `offset` being the row's, no result above 1.
    #[track_caller]
    pub fn exp2_scaled(&self, scale: Reg<'k, f32>, offset: RowPair<'k>) {
        let negated = offset.map(|x| -x);
        for (register, row) in self.elements() {
            register.set(register.fma(scale, negated[row]).exp2());
        }
    }

    /// Rounds to 16 bits, into a left operand: column groups become steps without a shuffle.
    ///
    /// # Panics
    /// If it has other columns.
    #[track_caller]
    pub fn round_to(&self, fragments: &Fragments<'k>, pair: Pair) {
        assert_eq!(self.columns() as usize, 16 * fragments.steps(), "columns");
        for (eight, four) in self.registers.chunks_exact(8).zip(&fragments.registers) {
            for (two, register) in eight.chunks_exact(2).zip(four) {
                register.set(two[0].pack(two[1], pair));
            }
        }
    }

    /// Rounds to 16 bits and lets the threads of a quad exchange, so that each has four columns side by
    /// side of every 16, from [`four_of_sixteen`] on, in two words, of each of its two rows.
    ///
    /// # Panics
    /// If columns are not whole groups of 16.
    #[track_caller]
    pub fn fours(&self, lane: Reg<'k, u32>, pair: Pair) -> Vec<[[Reg<'k, u32>; 2]; 2]> {
        assert!(
            self.columns().is_multiple_of(16),
            "{} columns",
            self.columns()
        );
        let odd = (lane & 1).differs(0);
        let sixteens = self.registers.chunks_exact(8);
        let fours = sixteens.map(|sixteen| {
            [0, 2].map(|row| {
                // Two neighbouring columns of the first eight, and of the second. Of each pair of
                // threads the even one gets both first, the odd one both second.
                let [first, second] =
                    [0, 4].map(|eight| sixteen[eight + row].pack(sixteen[eight + row + 1], pair));
                let given = odd.select(first, second).butterfly(1);
                [odd.select(given, first), odd.select(second, given)]
            })
        });
        fours.collect()
    }
}

/// Which four columns of every 16 a lane has of [`RegTile::fours`]: the first of them.
#[track_caller]
pub fn four_of_sixteen(lane: Reg<'_, u32>) -> Reg<'_, u32> {
    (lane & 1) * 8 + (lane & 2) * 2
}

/// The sum over a quad, in all its threads.
#[track_caller]
pub fn quad_sum(own: RowPair<'_>) -> RowPair<'_> {
    let pairs = own.map(|x| x.butterfly(1));
    let own = [own[0] + pairs[0], own[1] + pairs[1]];
    let pairs = own.map(|x| x.butterfly(2));
    [own[0] + pairs[0], own[1] + pairs[1]]
}

impl<'k> Fragments<'k> {
    /// Registers with nothing in them, for `steps` steps of 16 columns.
    pub fn uninit(k: &'k Builder, steps: u32) -> Self {
        let registers = (0..steps)
            .map(|_| std::array::from_fn(|_| k.uninit()))
            .collect();
        Self { registers }
    }

    /// Puts `word`, a pair of elements, in all of them.
    pub fn fill(&self, word: u32) {
        for register in self.registers.as_flattened() {
            register.set(word);
        }
    }

    /// Steps of 16 columns.
    pub fn steps(&self) -> usize {
        self.registers.len()
    }

    /// The four registers of a step.
    pub fn step(&self, step: usize) -> [Reg<'k, u32>; 4] {
        self.registers[step]
    }

    /// One step.
    pub fn part(&self, step: usize) -> Self {
        Self::from_steps(vec![self.step(step)])
    }

    /// Fragments of registers that are there already.
    pub fn from_steps(registers: Vec<[Reg<'k, u32>; 4]>) -> Self {
        Self { registers }
    }
}
