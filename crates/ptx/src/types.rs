//! Types of registers, of instructions and of elements in memory.

use std::fmt;

/// What a register can hold: PTX's register classes. Signed, unsigned and packed values share the
/// class of their size; instructions say how they read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// A predicate.
    Pred,
    /// 16 bits.
    B16,
    /// 32 bits: integers, shared addresses, packed pairs.
    B32,
    /// 64 bits: integers, global addresses, descriptors.
    B64,
    /// A float32.
    F32,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pred => "pred",
            Self::B16 => "b16",
            Self::B32 => "b32",
            Self::B64 => "b64",
            Self::F32 => "f32",
        })
    }
}

/// How an instruction reads its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are PTX's own
pub enum Ty {
    Pred,
    B8,
    U8,
    B16,
    U16,
    S16,
    B32,
    U32,
    S32,
    B64,
    U64,
    S64,
    /// One float16, for conversions.
    F16,
    F32,
    /// Two bfloat16 in 32 bits, the first in the low half.
    Bf16x2,
    /// Two float16 in 32 bits, the first in the low half.
    F16x2,
}

impl Ty {
    /// The class of registers that hold such values.
    pub fn class(self) -> Class {
        match self {
            Self::Pred => Class::Pred,
            // PTX has no 8-bit registers: bytes are loaded into and stored from 16 bits.
            Self::B8 | Self::U8 | Self::B16 | Self::U16 | Self::S16 | Self::F16 => Class::B16,
            Self::B32 | Self::U32 | Self::S32 | Self::Bf16x2 | Self::F16x2 => Class::B32,
            Self::B64 | Self::U64 | Self::S64 => Class::B64,
            Self::F32 => Class::F32,
        }
    }

    /// Bytes in memory. Predicates have none.
    pub fn bytes(self) -> u32 {
        match self {
            Self::Pred => 0,
            Self::B8 | Self::U8 => 1,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 => 2,
            Self::B32 | Self::U32 | Self::S32 | Self::F32 | Self::Bf16x2 | Self::F16x2 => 4,
            Self::B64 | Self::U64 | Self::S64 => 8,
        }
    }
}

impl fmt::Display for Ty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pred => "pred",
            Self::B8 => "b8",
            Self::U8 => "u8",
            Self::B16 => "b16",
            Self::U16 => "u16",
            Self::S16 => "s16",
            Self::B32 => "b32",
            Self::U32 => "u32",
            Self::S32 => "s32",
            Self::B64 => "b64",
            Self::U64 => "u64",
            Self::S64 => "s64",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Bf16x2 => "bf16x2",
            Self::F16x2 => "f16x2",
        })
    }
}

/// Element types of tensors and matrix operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// 8-bit float, 4 exponent bits, 3 of mantissa.
    E4m3,
    /// 8-bit float, 5 exponent bits, 2 of mantissa.
    E5m2,
    /// Bytes.
    U8,
    /// 32-bit signed integers.
    I32,
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> u32 {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::E4m3 | Self::E5m2 | Self::U8 => 1,
        }
    }
}

/// Rust types that stand for register contents: `u32`, `i32`, `u64`, `f32`, `u16` and `bool`.
pub trait Scalar: Copy + 'static {
    /// How instructions read such a register.
    const TY: Ty;
    /// A constant's bits.
    fn bits(self) -> u64;
}

macro_rules! scalar {
    ($($rust:ty, $ty:ident, $value:ident => $bits:expr;)*) => {$(
        impl Scalar for $rust {
            const TY: Ty = Ty::$ty;
            fn bits(self) -> u64 {
                let $value = self;
                $bits
            }
        }
    )*};
}

scalar! {
    bool, Pred, x => u64::from(x);
    u16, U16, x => u64::from(x);
    u32, U32, x => u64::from(x);
    i32, S32, x => u64::from(x as u32);
    u64, U64, x => x;
    f32, F32, x => u64::from(x.to_bits());
}
