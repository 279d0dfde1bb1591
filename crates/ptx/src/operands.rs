//! What instructions read and write: the one table of it.
//!
//! In: an [`Op`]. Out: its [`Use`]s, reads before writes. Called by the verifier and the emulator.

use std::fmt;

use crate::ir::{Address, Binary, MatrixA, Op, Operand, Packed, RegId, Space, Unary};
use crate::{Class, Ty};

/// One operand of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// A register is read.
    Read(RegId, Need),
    /// A register is written, in lanes for which the instruction's guard holds.
    Write(RegId, Need),
    /// A constant of these bits is read.
    Constant(u64, Need),
}

/// What a register must be to serve as an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Of this class.
    Class(Class),
    /// Of 32 bits, integer or float32: what instructions of type `b32` take.
    Word,
}

impl Need {
    /// What an operand of type `ty` must be.
    pub fn of(ty: Ty) -> Self {
        match ty {
            Ty::B32 => Self::Word,
            _ => Self::Class(ty.class()),
        }
    }

    /// Whether a register of this class will do.
    pub fn allows(self, class: Class) -> bool {
        match self {
            Self::Class(needed) => class == needed,
            Self::Word => matches!(class, Class::B32 | Class::F32),
        }
    }

    /// Bits of the operand.
    pub fn bits(self) -> u32 {
        match self {
            Self::Class(Class::Pred) => 1,
            Self::Class(Class::B16) => 16,
            Self::Class(Class::B32 | Class::F32) | Self::Word => 32,
            Self::Class(Class::B64) => 64,
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Class(class) => write!(f, "{class}"),
            Self::Word => f.write_str("b32 or f32"),
        }
    }
}

/// Hands uses on, by type.
struct Visitor<'f, F>(&'f mut F);

impl<F: FnMut(Use)> Visitor<'_, F> {
    fn read(&mut self, ty: Ty, operand: Operand) {
        (self.0)(match operand {
            Operand::Reg(register) => Use::Read(register, Need::of(ty)),
            Operand::Imm(bits) => Use::Constant(bits, Need::of(ty)),
        });
    }

    fn read_all(&mut self, ty: Ty, operands: impl IntoIterator<Item = Operand>) {
        operands
            .into_iter()
            .for_each(|operand| self.read(ty, operand));
    }

    fn read_register(&mut self, ty: Ty, register: RegId) {
        (self.0)(Use::Read(register, Need::of(ty)));
    }

    fn write(&mut self, ty: Ty, register: RegId) {
        (self.0)(Use::Write(register, Need::of(ty)));
    }

    fn write_all(&mut self, ty: Ty, registers: &[RegId]) {
        registers
            .iter()
            .for_each(|&register| self.write(ty, register));
    }

    /// The base of an address is a number, not any word: float32 registers will not do.
    fn address(&mut self, space: Space, address: Address) {
        let ty = match space {
            Space::Global => Ty::U64,
            Space::Shared | Space::Cluster => Ty::U32,
        };
        self.read_register(ty, address.base);
    }
}

/// `b32` as `u32`, so that float32 registers will not do: where ptxas wants operands of one kind.
fn integer(ty: Ty) -> Ty {
    if ty == Ty::B32 { Ty::U32 } else { ty }
}

/// The type of the halves of a `b32` or `b64`, for [`Op::Join`] and [`Op::Split`]. Unsigned: `mov`
/// refuses an integer beside a float32.
fn half(ty: Ty) -> Ty {
    if ty == Ty::B32 { Ty::U16 } else { Ty::U32 }
}

/// Operations whose result has 32 bits whatever they count in.
fn counts(op: Unary) -> bool {
    matches!(op, Unary::PopCount | Unary::LeadingZeros)
}

impl Op {
    /// Calls `f` for each operand: first all that are read, then all that are written. A register
    /// may come up more than once.
    ///
    /// The accumulators of a [`Op::Wgmma`] are read unless `accumulate` is the constant false.
    pub fn visit(&self, f: &mut impl FnMut(Use)) {
        let mut v = Visitor(f);
        match *self {
            // ---- values
            Self::Mov { ty, dst, src } => {
                v.read(ty, src);
                v.write(ty, dst);
            }
            Self::Special { dst, .. } | Self::SharedBase { dst } => v.write(Ty::U32, dst),
            Self::Param { ty, dst, .. } => v.write(ty, dst),
            Self::ParamAddress { dst, .. } => v.write(Ty::U64, dst),
            Self::Unary { op, ty, dst, a } => {
                v.read(ty, a);
                v.write(if counts(op) { Ty::U32 } else { ty }, dst);
            }
            Self::Binary { op, ty, dst, a, b } => {
                v.read(ty, a);
                v.read(
                    if matches!(op, Binary::Shl | Binary::Shr) {
                        Ty::U32
                    } else {
                        ty
                    },
                    b,
                );
                v.write(ty, dst);
            }
            Self::Ternary {
                ty, dst, a, b, c, ..
            } => {
                v.read_all(ty, [a, b, c]);
                v.write(ty, dst);
            }
            Self::MulWide { ty, dst, a, b, c } => {
                v.read_all(ty, [a, b]);
                v.read_all(Ty::U64, c);
                v.write(Ty::U64, dst);
            }
            Self::Lop3 { dst, a, b, c, .. } => {
                v.read_all(Ty::B32, [a, b, c]);
                v.write(Ty::B32, dst);
            }
            Self::Permute {
                dst,
                a,
                b,
                selector,
            } => {
                v.read_all(Ty::B32, [a, b, selector]);
                v.write(Ty::B32, dst);
            }
            Self::Convert { to, from, dst, src } => {
                v.read(from, src);
                v.write(to, dst);
            }
            Self::Pack {
                format,
                dst,
                low,
                high,
            } => {
                v.read_all(Ty::F32, [low, high]);
                let pair = match format {
                    Packed::Bf16 | Packed::F16 => Ty::U32,
                    Packed::E4m3 | Packed::E5m2 => Ty::U16,
                };
                v.write(pair, dst);
            }
            Self::Join { ty, dst, low, high } => {
                v.read_all(half(ty), [low, high]);
                v.write(ty, dst);
            }
            Self::Split { ty, low, high, src } => {
                v.read(ty, src);
                v.write_all(half(ty), &[low, high]);
            }
            Self::Compare { ty, dst, a, b, .. } => {
                v.read_all(ty, [a, b]);
                v.write(Ty::Pred, dst);
            }
            Self::Select {
                ty,
                dst,
                a,
                b,
                cond,
            } => {
                v.read_all(ty, [a, b]);
                v.read_register(Ty::Pred, cond);
                v.write(ty, dst);
            }

            // ---- memory
            Self::Load {
                space,
                ty,
                ref dst,
                address,
                ..
            } => {
                v.address(space, address);
                v.write_all(integer(ty), dst);
            }
            Self::Store {
                space,
                ty,
                ref src,
                address,
            } => {
                v.address(space, address);
                v.read_all(integer(ty), src.iter().copied());
            }
            Self::Atomic {
                space,
                ty,
                dst,
                address,
                src,
                swap,
                ..
            } => {
                v.address(space, address);
                v.read(ty, src);
                v.read_all(ty, swap);
                v.write(ty, dst);
            }
            Self::Reduce {
                space,
                ty,
                address,
                ref src,
                ..
            } => {
                v.address(space, address);
                v.read_all(integer(ty), src.iter().copied());
            }
            Self::LoadAcquire {
                ty, dst, address, ..
            } => {
                v.address(Space::Global, address);
                v.write(ty, dst);
            }
            Self::StoreRelease {
                ty, src, address, ..
            } => {
                v.address(Space::Global, address);
                v.read(ty, src);
            }
            Self::LoadMatrix {
                ref dst, address, ..
            } => {
                v.address(Space::Shared, address);
                v.write_all(Ty::U32, dst);
            }
            Self::StoreMatrix {
                ref src, address, ..
            } => {
                v.address(Space::Shared, address);
                src.iter()
                    .for_each(|&register| v.read_register(Ty::U32, register));
            }

            // ---- warps and barriers
            Self::Shuffle { dst, src, lane, .. } => {
                v.read(Ty::B32, src);
                v.read(Ty::U32, lane);
                v.write(Ty::B32, dst);
            }
            Self::Vote { dst, src, .. } => {
                v.read_register(Ty::Pred, src);
                v.write(Ty::Pred, dst);
            }
            Self::Ballot { dst, src } => {
                v.read_register(Ty::Pred, src);
                v.write(Ty::U32, dst);
            }
            Self::WarpReduce { ty, dst, src, .. } => {
                v.read(integer(ty), src);
                v.write(integer(ty), dst);
            }
            Self::Elect { dst } => v.write(Ty::Pred, dst),
            Self::Mma { acc, a, b, .. } => {
                v.read_all(Ty::U32, a.map(Operand::Reg));
                v.read_all(Ty::U32, b.map(Operand::Reg));
                v.read_all(Ty::F32, acc.map(Operand::Reg));
                v.write_all(Ty::F32, &acc);
            }
            Self::BarrierSync { id, threads } | Self::BarrierArrive { id, threads } => {
                v.read_all(Ty::U32, [id, threads]);
            }
            Self::MapShared { dst, address, rank } => {
                v.read_all(Ty::U32, [address, rank]);
                v.write(Ty::U32, dst);
            }
            Self::MbarrierInvalidate { address } | Self::MbarrierArrive { address, .. } => {
                v.address(Space::Shared, address);
            }
            Self::MbarrierInit {
                address,
                count: operand,
            }
            | Self::MbarrierArriveExpect {
                address,
                bytes: operand,
            }
            | Self::MbarrierWait {
                address,
                parity: operand,
                ..
            } => {
                v.address(Space::Shared, address);
                v.read(Ty::U32, operand);
            }
            Self::MbarrierTest {
                dst,
                address,
                parity,
            } => {
                v.address(Space::Shared, address);
                v.read(Ty::U32, parity);
                v.write(Ty::Pred, dst);
            }

            // ---- bulk copies
            Self::TmaLoad {
                dst,
                map,
                ref coordinates,
                barrier,
                multicast,
                hint,
            } => {
                v.address(Space::Shared, dst);
                v.read_register(Ty::U64, map);
                v.read_all(Ty::S32, coordinates.iter().copied());
                v.address(Space::Shared, barrier);
                v.read_all(Ty::U16, multicast);
                v.read_all(Ty::U64, hint.map(Operand::Reg));
            }
            Self::TmaStore {
                map,
                ref coordinates,
                src,
                hint,
            } => {
                v.read_register(Ty::U64, map);
                v.read_all(Ty::S32, coordinates.iter().copied());
                v.address(Space::Shared, src);
                v.read_all(Ty::U64, hint.map(Operand::Reg));
            }
            Self::TmaReduceAdd {
                map,
                ref coordinates,
                src,
            } => {
                v.read_register(Ty::U64, map);
                v.read_all(Ty::S32, coordinates.iter().copied());
                v.address(Space::Shared, src);
            }
            Self::PrefetchMap { map } => v.read_register(Ty::U64, map),
            Self::BulkLoad {
                dst,
                src,
                bytes,
                barrier,
                hint,
            } => {
                v.address(Space::Shared, dst);
                v.address(Space::Global, src);
                v.read(Ty::U32, bytes);
                v.address(Space::Shared, barrier);
                v.read_all(Ty::U64, hint.map(Operand::Reg));
            }
            Self::BulkStore { dst, src, bytes }
            | Self::BulkReduceAdd {
                dst, src, bytes, ..
            } => {
                v.address(Space::Global, dst);
                v.address(Space::Shared, src);
                v.read(Ty::U32, bytes);
            }
            Self::CachePolicy { dst, .. } => v.write(Ty::U64, dst),

            // ---- warpgroups, the rest
            Self::Wgmma {
                ref acc,
                ref a,
                b,
                accumulate,
                ..
            } => {
                match a {
                    MatrixA::Shared { descriptor, .. } => v.read(Ty::U64, *descriptor),
                    MatrixA::Registers(a) => {
                        a.iter()
                            .for_each(|&register| v.read_register(Ty::U32, register));
                    }
                }
                v.read(Ty::U64, b);
                v.read(Ty::Pred, accumulate);
                if accumulate != Operand::Imm(0) {
                    acc.iter()
                        .for_each(|&register| v.read_register(Ty::F32, register));
                }
                v.write_all(Ty::F32, acc);
            }
            Self::Sleep { nanoseconds } => v.read(Ty::U32, nanoseconds),

            Self::Fence(_)
            | Self::WarpSync
            | Self::ClusterArrive
            | Self::ClusterWait
            | Self::BulkCommit
            | Self::BulkWait { .. }
            | Self::WgmmaFence
            | Self::WgmmaCommit
            | Self::WgmmaWait { .. }
            | Self::SetMaxRegisters { .. }
            | Self::GridWait
            | Self::GridLaunch
            | Self::Trap => {}
        }
    }
}
