//! Matrix products, of warpgroups and of single warps. Descriptors come from `tile`.

use super::{Builder, Reg, Value};
use crate::Element;
use crate::ir::{MatrixA, Op};

/// The left operand of a product, 64 rows.
#[derive(Debug, Clone, Copy)]
pub enum A<'k> {
    /// In shared memory: a descriptor, and whether m is contiguous rather than k.
    Shared {
        /// The descriptor.
        descriptor: Reg<'k, u64>,
        /// Whether m is contiguous.
        transposed: bool,
    },
    /// In registers: four of each thread.
    Registers([Reg<'k, u32>; 4]),
}

impl Builder {
    /// `acc (+)= a b`: 64 rows, `2 * acc.len()` columns, one step of k (32 bytes of each operand).
    /// With `accumulate` false, `acc` is overwritten.
    #[track_caller]
    pub fn wgmma(
        &self,
        element: Element,
        acc: &[Reg<'_, f32>],
        a: A<'_>,
        b: Reg<'_, u64>,
        b_transposed: bool,
        accumulate: impl Value<bool>,
    ) {
        self.emit(Op::Wgmma {
            element,
            n: 2 * acc.len() as u32,
            acc: acc.iter().map(|register| register.id).collect(),
            a: match a {
                A::Shared {
                    descriptor,
                    transposed,
                } => MatrixA::Shared {
                    descriptor: descriptor.operand(),
                    transposed,
                },
                A::Registers(registers) => MatrixA::Registers(registers.map(Reg::id)),
            },
            b: b.operand(),
            b_transposed,
            accumulate: accumulate.operand(),
        });
    }

    /// Before the first product, and again after other instructions wrote registers of one.
    #[track_caller]
    pub fn wgmma_fence(&self) {
        self.emit(Op::WgmmaFence);
    }

    /// Closes the group of products issued since the last.
    #[track_caller]
    pub fn wgmma_commit(&self) {
        self.emit(Op::WgmmaCommit);
    }

    /// Waits until at most `pending` groups are unfinished.
    #[track_caller]
    pub fn wgmma_wait(&self, pending: u32) {
        self.emit(Op::WgmmaWait { pending });
    }

    /// `acc += a b`, by a warp alone and at once: 16 rows, 8 columns, 16 of the inner dimension, of
    /// which `a` has the rows and `b` the columns, as [`Builder::load_matrices`] loads them: the
    /// matrices of `a` are its first 8 rows, its last 8, and those of the second half of the inner
    /// dimension; those of `b` its two halves.
    #[track_caller]
    pub fn mma(
        &self,
        element: Element,
        acc: [Reg<'_, f32>; 4],
        a: [Reg<'_, u32>; 4],
        b: [Reg<'_, u32>; 2],
    ) {
        self.emit(Op::Mma {
            element,
            acc: acc.map(Reg::id),
            a: a.map(Reg::id),
            b: b.map(Reg::id),
        });
    }

    /// Gives up or asks for registers, for the whole warpgroup.
    #[track_caller]
    pub fn set_max_registers(&self, increase: bool, count: u32) {
        self.emit(Op::SetMaxRegisters { increase, count });
    }
}
