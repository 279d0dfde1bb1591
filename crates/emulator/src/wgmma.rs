//! The matrix unit: wgmma, its fences, groups and waits, and `mma`, one warp's own.
//!
//! In: wgmmas as warps issue them. Out: products in accumulator registers, when they are issued or
//! at the wait that covers them. Each warp computes its own 16 of the 64 rows; that the four warps
//! of a warpgroup do the same is checked by a log. Products are exact and summed in float32, k by k,
//! each sum rounded to nearest: the hardware sums in another order and truncates, so results agree
//! up to rounding. What a single warp asks for is performed at once.

use std::collections::VecDeque;

use flex_block_attn_ptx::Element;
use flex_block_attn_ptx::ir::{MatrixA, Op, Operand, RegId};

use crate::execute::lanes_of;
use crate::fault::{Done, Kind};
use crate::machine::{Here, Machine};
use crate::matrix::{Matrix, number};
use crate::program::{Decoded, Program, a_registers};
use crate::shadow::Access;
use crate::warp::{FULL, Warp};

/// A wgmma that is issued and not performed: its instruction and what its operands were.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Issued {
    instruction: u32,
    group: u32,
    accumulate: bool,
    a: Option<Matrix>,
    b: Matrix,
}

/// Warpgroup instructions that some warps of a warpgroup have passed and others not.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// Those that all have passed.
    passed: u64,
    /// Instruction, operands, and how many warps have passed it.
    entries: VecDeque<(u32, [u64; 2], usize)>,
}

impl Log {
    /// Whether all warps have passed the same instructions, now that they are at their end.
    pub(crate) fn check_end(&self) -> Done {
        if self.entries.is_empty() {
            return Ok(());
        }
        let problem = format!(
            "{} warpgroup instructions were executed by some of its warps and not by others",
            self.entries.len()
        );
        Err(Kind::Warpgroup { problem }.into())
    }
}

/// Room for one warp's product, as float32.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// 16 rows of up to 32 along k.
    a: [[f32; 32]; 16],
    /// Up to 32 along k of up to 256 columns.
    b: Vec<[f32; 256]>,
    out: Vec<[f32; 256]>,
}

impl Scratch {
    /// Takes 16 rows along k from registers: register r of four holds row + 8 (r & 1), and the second
    /// half along k for r >= 2.
    fn load_a(&mut self, program: &Program, warp: &Warp, element: Element, a: &[RegId]) {
        let depth = (32 / element.bytes()) as usize;
        for (r, register) in a.iter().enumerate() {
            for (lane, word) in warp.row(program, *register).iter().enumerate() {
                let row = lane / 4 + 8 * (r & 1);
                let k = depth / 8 * (lane % 4) + depth / 2 * (r >> 1);
                for (i, value) in numbers(element, &word.to_le_bytes()).enumerate() {
                    self.a[row][k + i] = value;
                }
            }
        }
    }

    /// Starts with zeros.
    fn clear(&mut self, columns: usize) {
        for row in &mut self.out {
            row[..columns].fill(0.0);
        }
    }

    /// Starts with what accumulators hold.
    fn load_sums(&mut self, program: &Program, warp: &Warp, acc: &[RegId]) {
        for (i, register) in acc.iter().enumerate() {
            for (lane, word) in warp.row(program, *register).iter().enumerate() {
                let (row, column) = place(lane, i);
                self.out[row][column] = f32::from_bits(*word);
            }
        }
    }

    /// Adds the product.
    fn multiply(&mut self, columns: usize, depth: usize) {
        for (row, left) in self.out.iter_mut().zip(&self.a) {
            let row = &mut row[..columns];
            for (factor, right) in left[..depth].iter().zip(&self.b) {
                // PERF: products of 8- and 16-bit floats are exact in float32, so this is a fused
                // multiply-add, which most builds would call a library for.
                for (sum, value) in row.iter_mut().zip(&right[..columns]) {
                    *sum += factor * value;
                }
            }
        }
    }

    /// Writes the sums to accumulators.
    fn store_sums(&self, program: &Program, warp: &mut Warp, acc: &[RegId]) {
        for (i, register) in acc.iter().enumerate() {
            let words = warp.row_mut(program, *register);
            for lane in lanes_of(FULL) {
                let (row, column) = place(lane, i);
                words[lane] = self.out[row][column].to_bits();
            }
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            a: [[0.0; 32]; 16],
            b: vec![[0.0; 256]; 32],
            out: vec![[0.0; 256]; 16],
        }
    }
}

/// Row (of 16) and column of a lane's accumulator `i`.
fn place(lane: usize, i: usize) -> (usize, usize) {
    (
        lane / 4 + 8 * (i >> 1 & 1),
        8 * (i >> 2) + 2 * (lane % 4) + (i & 1),
    )
}

/// The elements of a word.
fn numbers(element: Element, bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes
        .chunks_exact(element.bytes() as usize)
        .map(move |bytes| number(element, bytes))
}

/// The value that all lanes hold, if they do.
fn uniform(values: &[u64; 32], what: &str) -> Done<u64> {
    if values.iter().any(|value| *value != values[0]) {
        let problem = format!("lanes hold different {what}");
        return Err(Kind::Warpgroup { problem }.into());
    }
    Ok(values[0])
}

impl Machine<'_> {
    /// Checks that the warps of a warpgroup pass the same warpgroup instructions.
    pub(crate) fn log_warpgroup(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        operands: [u64; 2],
    ) -> Done {
        let block = &mut self.clusters[here.cluster].blocks[here.rank];
        let warps = (block.warps.len() - here.warp / 4 * 4).min(4);
        if warps < 4 {
            let problem = "it has fewer than four warps".to_owned();
            return Err(Kind::Warpgroup { problem }.into());
        }
        let log = &mut block.logs[here.warp / 4];
        let index = (warp.warpgroup_steps - log.passed) as usize;
        warp.warpgroup_steps += 1;
        match log.entries.get_mut(index) {
            None => log.entries.push_back((inst.index, operands, 1)),
            Some((other, _, _)) if *other != inst.index => {
                let other = *other;
                let problem = format!(
                    "another warp of it executes, as its instruction {} of the warpgroup, the one \
                     at {}: {}",
                    warp.warpgroup_steps,
                    self.program.place(other),
                    self.program.text(other)
                );
                return Err(Kind::Warpgroup { problem }.into());
            }
            Some((_, expected, _)) if *expected != operands => {
                let problem = format!(
                    "operands (descriptors, counts) are {operands:x?} here and {expected:x?} in \
                     another warp"
                );
                return Err(Kind::Warpgroup { problem }.into());
            }
            Some((_, _, count)) => *count += 1,
        }
        while log
            .entries
            .pop_front_if(|(_, _, count)| *count == warps)
            .is_some()
        {
            log.passed += 1;
        }
        Ok(())
    }

    /// `wgmma.fence`
    pub(crate) fn wgmma_fence(&mut self, here: Here, warp: &mut Warp, inst: &Decoded) -> Done {
        warp.fences += 1;
        self.log_warpgroup(here, warp, inst, [0; 2])
    }

    /// `wgmma.commit_group`
    pub(crate) fn wgmma_commit(&mut self, here: Here, warp: &mut Warp, inst: &Decoded) -> Done {
        warp.committed += 1;
        warp.open = false;
        self.log_warpgroup(here, warp, inst, [0; 2])
    }

    /// `wgmma.wait_group`
    pub(crate) fn wgmma_wait(
        &mut self,
        here: Here,
        warp: &mut Warp,
        inst: &Decoded,
        pending: u32,
    ) -> Done {
        self.log_warpgroup(here, warp, inst, [0; 2])?;
        let until = warp.committed.saturating_sub(pending);
        while let Some(issued) = warp.issued.pop_front_if(|issued| issued.group <= until) {
            self.perform_wgmma(here, warp, issued)?;
        }
        warp.completed = warp.completed.max(until);
        let component = self.clusters[here.cluster].wgmma_component(here.rank, here.warp);
        for clock in &mut warp.clocks {
            clock.learn(component, warp.completed);
        }
        Ok(())
    }

    /// `wgmma.mma_async`
    pub(crate) fn wgmma(&mut self, here: Here, warp: &mut Warp, inst: &Decoded) -> Done {
        let p = self.program;
        let Op::Wgmma {
            element,
            n,
            acc,
            a,
            b,
            b_transposed,
            accumulate,
        } = &inst.inst.op
        else {
            unreachable!("only wgmmas are issued here");
        };
        if !matches!(
            element,
            Element::Bf16 | Element::F16 | Element::E4m3 | Element::E5m2
        ) {
            let what = format!("wgmma of {element:?}");
            return Err(Kind::Unsupported { what }.into());
        }
        if !(8..=256).contains(n) || !n.is_multiple_of(8) || acc.len() != *n as usize / 2 {
            let problem = format!("{} accumulators for {n} columns", acc.len());
            return Err(Kind::Warpgroup { problem }.into());
        }
        // The descriptors' and the predicate's registers are ordinary reads.
        warp.check(p, inst, FULL)?;
        let wide = |operand: &Operand| uniform(&warp.wides(p, *operand), "descriptors");
        let accumulate = match warp.mask(p, *accumulate) {
            0 => false,
            FULL => true,
            _ => {
                let problem = "lanes hold different predicates".to_owned();
                return Err(Kind::Warpgroup { problem }.into());
            }
        };
        let b_bits = wide(b)?;
        let (a_bits, a_matrix) = match a {
            MatrixA::Shared {
                descriptor,
                transposed,
            } => {
                let bits = wide(descriptor)?;
                (bits, Some(Matrix::new(bits, *transposed, *element)?))
            }
            MatrixA::Registers(_) => (0, None),
        };
        let b_matrix = Matrix::new(b_bits, *b_transposed, *element)?;
        self.log_warpgroup(
            here,
            warp,
            inst,
            [a_bits, b_bits ^ u64::from(accumulate) << 48],
        )?;
        check_registers(p, warp, acc, a_registers(a), *n, accumulate)?;

        // What is read, at the latest until the group is waited for. PTX does not say which warp
        // reads which rows of A, so each is taken to read all of them.
        let known = warp.knowledge(FULL);
        let cluster = &mut self.clusters[here.cluster];
        let access = Access {
            component: cluster.wgmma_component(here.rank, here.warp),
            epoch: warp.committed + 1,
            instruction: inst.index,
            clock: &known,
            asynchronous: true,
            atomic: false,
            threads: cluster.ordinary(),
        };
        let shared = &mut cluster.blocks[here.rank].shared;
        let mut conflict = None;
        for (matrix, count) in a_matrix
            .map(|a| (a, 64))
            .into_iter()
            .chain([(b_matrix, *n)])
        {
            matrix.chunks(0, count, |chunk| {
                let range = shared.data(shared.described(chunk.address), 16, 16)?;
                let cells = shared.cells(&range);
                if conflict.is_none() {
                    conflict = shared.shadow.read(&access, cells).err();
                }
                if conflict.is_none() {
                    shared.known(range)?;
                }
                Ok(())
            })?;
        }
        if let Some(conflict) = conflict {
            return Err(self.race(here, here.rank, conflict, false));
        }

        let group = warp.committed + 1;
        warp.open = true;
        for register in acc {
            warp.row_mut(p, *register);
            let track = &mut warp.tracks[register.0 as usize];
            track.accumulated = group;
            track.shape = *n;
            track.multiplied = warp.fences;
        }
        for register in a_registers(a) {
            warp.tracks[register.0 as usize].read_as_a = group;
        }
        let depth = 32 / element.bytes();
        self.statistics.wgmma_flops += 2 * 16 * u64::from(*n) * u64::from(depth);
        let issued = Issued {
            instruction: inst.index,
            group,
            accumulate,
            a: a_matrix,
            b: b_matrix,
        };
        if self.is_eager() {
            return self.perform_wgmma(here, warp, issued);
        }
        warp.issued.push_back(issued);
        Ok(())
    }

    /// Computes a warp's part of a product.
    fn perform_wgmma(&mut self, here: Here, warp: &mut Warp, issued: Issued) -> Done {
        let p = self.program;
        let Op::Wgmma {
            element, n, acc, a, ..
        } = &p.instructions[issued.instruction as usize].inst.op
        else {
            unreachable!("only wgmmas are issued");
        };
        let columns = *n as usize;
        let depth = (32 / element.bytes()) as usize;
        let shared = &self.clusters[here.cluster].blocks[here.rank].shared;
        let scratch = &mut self.scratch;

        let first = 16 * (here.warp as u32 % 4);
        if let Some(matrix) = issued.a {
            matrix.chunks(first, 16, |chunk| {
                let range = shared.range(shared.described(chunk.address), 16)?;
                let bytes = &shared.bytes[range];
                matrix.elements(chunk, bytes, |row, k, value| {
                    scratch.a[(row - first) as usize][k as usize] = value;
                });
                Ok(())
            })?;
        }
        scratch.load_a(p, warp, *element, a_registers(a));
        issued.b.chunks(0, *n, |chunk| {
            let range = shared.range(shared.described(chunk.address), 16)?;
            let bytes = &shared.bytes[range];
            issued.b.elements(chunk, bytes, |column, k, value| {
                scratch.b[k as usize][column as usize] = value;
            });
            Ok(())
        })?;

        if issued.accumulate {
            scratch.load_sums(p, warp, acc);
        } else {
            scratch.clear(columns);
        }
        scratch.multiply(columns, depth);
        scratch.store_sums(p, warp, acc);
        Ok(())
    }

    /// `mma`: its registers were checked as those of any instruction.
    pub(crate) fn mma(
        &mut self,
        warp: &mut Warp,
        element: Element,
        (acc, a, b): (&[RegId], &[RegId], &[RegId]),
    ) {
        let (p, scratch) = (self.program, &mut self.scratch);
        scratch.load_a(p, warp, element, a);
        for (half, register) in b.iter().enumerate() {
            for (lane, word) in warp.row(p, *register).iter().enumerate() {
                let k = 8 * half + 2 * (lane % 4);
                for (i, value) in numbers(element, &word.to_le_bytes()).enumerate() {
                    scratch.b[k + i][lane / 4] = value;
                }
            }
        }
        scratch.load_sums(p, warp, acc);
        scratch.multiply(8, 16);
        scratch.store_sums(p, warp, acc);
    }
}

/// The rules of a wgmma's own registers.
fn check_registers(
    program: &Program,
    warp: &Warp,
    acc: &[RegId],
    a: &[RegId],
    columns: u32,
    accumulate: bool,
) -> Done {
    let missing = |register: &RegId| {
        Kind::MissingWgmmaFence {
            register: program.name(*register),
        }
        .into()
    };
    let unknown = |register: &RegId| {
        Kind::UninitialisedRegister {
            register: program.name(*register),
        }
        .into()
    };
    for register in a {
        let track = &warp.tracks[register.0 as usize];
        if track.accumulated > warp.completed {
            return Err(Kind::AccumulatorInFlight {
                register: program.name(*register),
            }
            .into());
        }
        if !warp.is_known(*register, FULL) {
            return Err(unknown(register));
        }
        if track.used > warp.fences {
            return Err(missing(register));
        }
    }
    for register in acc {
        let track = &warp.tracks[register.0 as usize];
        if accumulate && !warp.is_known(*register, FULL) {
            return Err(unknown(register));
        }
        let reshaped =
            track.accumulated != 0 && track.shape != columns && track.multiplied == warp.fences;
        if track.used > warp.fences || reshaped || warp.fences == 0 {
            return Err(missing(register));
        }
    }
    Ok(())
}
