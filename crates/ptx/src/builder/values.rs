//! Arithmetic on registers: operators and methods of [`Reg`]. Called by everybody who writes a
//! kernel; each makes one instruction (a few make two).

use std::ops;

use super::{Pair, Reg, Value};
use crate::ir::{Binary, Cmp, Op, Packed, Ternary, Unary};
use crate::{Scalar, Ty};

/// Integers and floats, which have arithmetic; predicates have none.
pub trait Number: Scalar {}
impl Number for u32 {}
impl Number for i32 {}
impl Number for u64 {}
impl Number for f32 {}

/// Integers: what shifts and bitwise operations take.
pub trait Integer: Number {
    /// The untyped bits of this size.
    const BITS: Ty;
}
impl Integer for u32 {
    const BITS: Ty = Ty::B32;
}
impl Integer for i32 {
    const BITS: Ty = Ty::B32;
}
impl Integer for u64 {
    const BITS: Ty = Ty::B64;
}

macro_rules! operators {
    ($($of:ident: $trait:ident $method:ident, $assign:ident $assign_method:ident, $op:ident, $ty:expr;)*) => {$(
        impl<'k, T: $of, V: Value<T>> ops::$trait<V> for Reg<'k, T> {
            type Output = Reg<'k, T>;
            #[track_caller]
            fn $method(self, b: V) -> Reg<'k, T> {
                self.binary(Binary::$op, $ty, b)
            }
        }

        impl<'k, T: $of, V: Value<T>> ops::$assign<V> for Reg<'k, T> {
            #[track_caller]
            fn $assign_method(&mut self, b: V) {
                let (dst, a, b) = (self.id, self.operand(), b.operand());
                self.builder.emit(Op::Binary { op: Binary::$op, ty: $ty, dst, a, b });
            }
        }
    )*};
}

operators! {
    Number: Add add, AddAssign add_assign, Add, T::TY;
    Number: Sub sub, SubAssign sub_assign, Sub, T::TY;
    Number: Mul mul, MulAssign mul_assign, Mul, T::TY;
    Number: Div div, DivAssign div_assign, Div, T::TY;
    Integer: Rem rem, RemAssign rem_assign, Rem, T::TY;
    Integer: BitAnd bitand, BitAndAssign bitand_assign, And, T::BITS;
    Integer: BitOr bitor, BitOrAssign bitor_assign, Or, T::BITS;
    Integer: BitXor bitxor, BitXorAssign bitxor_assign, Xor, T::BITS;
}

impl<'k, T: Integer, V: Value<u32>> ops::Shl<V> for Reg<'k, T> {
    type Output = Reg<'k, T>;
    #[track_caller]
    fn shl(self, b: V) -> Reg<'k, T> {
        let (a, b) = (self.operand(), b.operand());
        self.builder.write(|dst| Op::Binary {
            op: Binary::Shl,
            ty: T::BITS,
            dst,
            a,
            b,
        })
    }
}

impl<'k, T: Integer, V: Value<u32>> ops::Shr<V> for Reg<'k, T> {
    type Output = Reg<'k, T>;
    #[track_caller]
    fn shr(self, b: V) -> Reg<'k, T> {
        let (a, b) = (self.operand(), b.operand());
        self.builder.write(|dst| Op::Binary {
            op: Binary::Shr,
            ty: T::TY,
            dst,
            a,
            b,
        })
    }
}

impl<'k> ops::Neg for Reg<'k, f32> {
    type Output = Reg<'k, f32>;
    #[track_caller]
    fn neg(self) -> Reg<'k, f32> {
        self.unary(Unary::Neg, Ty::F32)
    }
}

macro_rules! predicates {
    ($($trait:ident $method:ident $op:ident;)*) => {$(
        impl<'k> ops::$trait for Reg<'k, bool> {
            type Output = Reg<'k, bool>;
            #[track_caller]
            fn $method(self, b: Reg<'k, bool>) -> Reg<'k, bool> {
                self.binary(Binary::$op, Ty::Pred, b)
            }
        }
    )*};
}

predicates! {
    BitAnd bitand And;
    BitOr bitor Or;
    BitXor bitxor Xor;
}

impl<'k> ops::Not for Reg<'k, bool> {
    type Output = Reg<'k, bool>;
    #[track_caller]
    fn not(self) -> Reg<'k, bool> {
        self.unary(Unary::Not, Ty::Pred)
    }
}

impl<'k> ops::Not for Reg<'k, u32> {
    type Output = Reg<'k, u32>;
    #[track_caller]
    fn not(self) -> Reg<'k, u32> {
        self.unary(Unary::Not, Ty::B32)
    }
}

impl<'k, T: Scalar> Reg<'k, T> {
    /// Puts `value` in.
    #[track_caller]
    pub fn set(self, value: impl Value<T>) {
        let (dst, src) = (self.id, value.operand());
        self.builder.emit(Op::Mov {
            ty: T::TY,
            dst,
            src,
        });
    }

    /// A new register with what is in this one now.
    #[track_caller]
    pub fn copied(self) -> Self {
        self.builder.var(self)
    }

    #[track_caller]
    fn unary(self, op: Unary, ty: Ty) -> Self {
        let a = self.operand();
        self.builder.write(|dst| Op::Unary { op, ty, dst, a })
    }

    #[track_caller]
    fn binary(self, op: Binary, ty: Ty, b: impl Value<T>) -> Self {
        let (a, b) = (self.operand(), b.operand());
        self.builder.write(|dst| Op::Binary { op, ty, dst, a, b })
    }

    #[track_caller]
    fn compare(self, cmp: Cmp, b: impl Value<T>) -> Reg<'k, bool> {
        let (a, b) = (self.operand(), b.operand());
        self.builder.write(|dst| Op::Compare {
            cmp,
            ty: T::TY,
            dst,
            a,
            b,
        })
    }

    #[track_caller]
    fn convert<U: Scalar>(self) -> Reg<'k, U> {
        let src = self.operand();
        self.builder.write(|dst| Op::Convert {
            to: U::TY,
            from: T::TY,
            dst,
            src,
        })
    }
}

impl<'k, T: Number> Reg<'k, T> {
    /// Whether it is less than `b`; false if one is NaN.
    #[track_caller]
    pub fn lt(self, b: impl Value<T>) -> Reg<'k, bool> {
        self.compare(Cmp::Lt, b)
    }

    /// Whether it is at most `b`; false if one is NaN.
    #[track_caller]
    pub fn le(self, b: impl Value<T>) -> Reg<'k, bool> {
        self.compare(Cmp::Le, b)
    }

    /// Whether it is greater than `b`; false if one is NaN.
    #[track_caller]
    pub fn gt(self, b: impl Value<T>) -> Reg<'k, bool> {
        self.compare(Cmp::Gt, b)
    }

    /// Whether it is at least `b`; false if one is NaN.
    #[track_caller]
    pub fn ge(self, b: impl Value<T>) -> Reg<'k, bool> {
        self.compare(Cmp::Ge, b)
    }

    /// Whether it equals `b`; false if one is NaN.
    #[track_caller]
    pub fn equals(self, b: impl Value<T>) -> Reg<'k, bool> {
        self.compare(Cmp::Eq, b)
    }

    /// Whether it differs from `b`; true if one is NaN.
    #[track_caller]
    pub fn differs(self, b: impl Value<T>) -> Reg<'k, bool> {
        self.compare(Cmp::Ne, b)
    }

    /// The smaller; of a NaN and a number, the number.
    #[track_caller]
    pub fn min(self, b: impl Value<T>) -> Self {
        self.binary(Binary::Min, T::TY, b)
    }

    /// The larger; of a NaN and a number, the number.
    #[track_caller]
    pub fn max(self, b: impl Value<T>) -> Self {
        self.binary(Binary::Max, T::TY, b)
    }

    /// `self * b + c` in one instruction; of floats rounded once.
    #[track_caller]
    pub fn fma(self, b: impl Value<T>, c: impl Value<T>) -> Self {
        let op = if T::TY == Ty::F32 {
            Ternary::Fma
        } else {
            Ternary::Mad
        };
        let (a, b, c) = (self.operand(), b.operand(), c.operand());
        self.builder.write(|dst| Op::Ternary {
            op,
            ty: T::TY,
            dst,
            a,
            b,
            c,
        })
    }
}

impl<'k> Reg<'k, f32> {
    /// 2 to this power, approximated to 2 ulp; subnormals are 0.
    #[track_caller]
    pub fn exp2(self) -> Self {
        self.unary(Unary::Exp2, Ty::F32)
    }

    /// The logarithm to base 2, approximated; of 0 -inf, of negative numbers NaN.
    #[track_caller]
    pub fn log2(self) -> Self {
        self.unary(Unary::Log2, Ty::F32)
    }

    /// 1 over this, approximated to 1 ulp; of 0 inf.
    #[track_caller]
    pub fn reciprocal(self) -> Self {
        self.unary(Unary::Reciprocal, Ty::F32)
    }

    /// 1 over the square root, approximated.
    #[track_caller]
    pub fn reciprocal_sqrt(self) -> Self {
        self.unary(Unary::ReciprocalSqrt, Ty::F32)
    }

    /// The nearest integer, at most those at the ends of the range; 0 for NaN.
    #[track_caller]
    pub fn to_i32(self) -> Reg<'k, i32> {
        self.convert()
    }

    /// The square root, approximated.
    #[track_caller]
    pub fn sqrt(self) -> Self {
        self.unary(Unary::Sqrt, Ty::F32)
    }

    /// Without its sign.
    #[track_caller]
    pub fn abs(self) -> Self {
        self.unary(Unary::Abs, Ty::F32)
    }

    /// This (in the low half) and `high` rounded to a pair of 16-bit floats.
    #[track_caller]
    pub fn pack(self, high: impl Value<f32>, pair: Pair) -> Reg<'k, u32> {
        let format = match pair {
            Pair::Bf16 => Packed::Bf16,
            Pair::F16 => Packed::F16,
        };
        let (low, high) = (self.operand(), high.operand());
        self.builder.write(|dst| Op::Pack {
            format,
            dst,
            low,
            high,
        })
    }

    /// Its bits.
    #[track_caller]
    pub fn to_bits(self) -> Reg<'k, u32> {
        let src = self.operand();
        self.builder.write(|dst| Op::Mov {
            ty: Ty::B32,
            dst,
            src,
        })
    }
}

impl<'k> Reg<'k, u32> {
    /// The 64-bit product with `b`.
    #[track_caller]
    pub fn times_wide(self, b: impl Value<u32>) -> Reg<'k, u64> {
        let (a, b) = (self.operand(), b.operand());
        self.builder.write(|dst| Op::MulWide {
            ty: Ty::U32,
            dst,
            a,
            b,
            c: None,
        })
    }

    /// With 32 zero bits above.
    #[track_caller]
    pub fn to_u64(self) -> Reg<'k, u64> {
        self.convert()
    }

    /// The low 16 bits.
    #[track_caller]
    pub fn to_u16(self) -> Reg<'k, u16> {
        self.convert()
    }

    /// The nearest float32.
    #[track_caller]
    pub fn to_f32(self) -> Reg<'k, f32> {
        self.convert()
    }

    /// The float32 with these bits.
    #[track_caller]
    pub fn as_f32(self) -> Reg<'k, f32> {
        let src = self.operand();
        self.builder.write(|dst| Op::Mov {
            ty: Ty::B32,
            dst,
            src,
        })
    }

    /// The same bits, read as a signed number.
    #[track_caller]
    pub fn as_i32(self) -> Reg<'k, i32> {
        let src = self.operand();
        self.builder.write(|dst| Op::Mov {
            ty: Ty::B32,
            dst,
            src,
        })
    }

    /// The 64-bit word with this as its low half.
    #[track_caller]
    pub fn join(self, high: impl Value<u32>) -> Reg<'k, u64> {
        let (low, high) = (self.operand(), high.operand());
        self.builder.write(|dst| Op::Join {
            ty: Ty::B64,
            dst,
            low,
            high,
        })
    }

    /// Number of bits that are set.
    #[track_caller]
    pub fn count_ones(self) -> Self {
        self.unary(Unary::PopCount, Ty::B32)
    }

    /// Zeros above the highest bit that is set; 32 of 0.
    #[track_caller]
    pub fn leading_zeros(self) -> Self {
        self.unary(Unary::LeadingZeros, Ty::B32)
    }

    /// The pair's low bfloat16 as a float32: exact.
    #[track_caller]
    pub fn low_bf16(self) -> Reg<'k, f32> {
        (self << 16).as_f32()
    }

    /// The pair's high bfloat16 as a float32: exact.
    #[track_caller]
    pub fn high_bf16(self) -> Reg<'k, f32> {
        (self & 0xffff_0000).as_f32()
    }

    /// The pair's two float16 as float32: exact.
    #[track_caller]
    pub fn f16_pair(self) -> [Reg<'k, f32>; 2] {
        let (low, high) = (self.builder.uninit::<u16>(), self.builder.uninit::<u16>());
        let src = self.operand();
        self.builder.emit(Op::Split {
            ty: Ty::B32,
            low: low.id,
            high: high.id,
            src,
        });
        [low, high].map(|half| {
            let src = half.operand();
            self.builder.write(|dst| Op::Convert {
                to: Ty::F32,
                from: Ty::F16,
                dst,
                src,
            })
        })
    }

    /// Pair by pair `self * b + c`.
    #[track_caller]
    pub fn packed_fma(self, b: Self, c: Self, pair: Pair) -> Self {
        let (a, b, c) = (self.operand(), b.operand(), c.operand());
        let (op, ty) = (Ternary::Fma, pair.ty());
        self.builder.write(|dst| Op::Ternary {
            op,
            ty,
            dst,
            a,
            b,
            c,
        })
    }

    /// Pair by pair the product.
    #[track_caller]
    pub fn packed_mul(self, b: Self, pair: Pair) -> Self {
        self.binary(Binary::Mul, pair.ty(), b)
    }

    /// Any bitwise function of three words: bit `4a + 2b + c` of `table` is its value.
    #[track_caller]
    pub fn lop3(self, b: impl Value<u32>, c: impl Value<u32>, table: u8) -> Self {
        let (a, b, c) = (self.operand(), b.operand(), c.operand());
        self.builder.write(|dst| Op::Lop3 {
            dst,
            a,
            b,
            c,
            table,
        })
    }

    /// Four bytes of this word (0-3) and `b` (4-7), picked by the selector's digits.
    #[track_caller]
    pub fn permute(self, b: impl Value<u32>, selector: u32) -> Self {
        let (a, b, selector) = (self.operand(), b.operand(), selector.operand());
        self.builder.write(|dst| Op::Permute {
            dst,
            a,
            b,
            selector,
        })
    }
}

impl<'k> Reg<'k, i32> {
    /// The same bits, read as an unsigned number.
    #[track_caller]
    pub fn as_u32(self) -> Reg<'k, u32> {
        let src = self.operand();
        self.builder.write(|dst| Op::Mov {
            ty: Ty::B32,
            dst,
            src,
        })
    }

    /// The nearest float32.
    #[track_caller]
    pub fn to_f32(self) -> Reg<'k, f32> {
        self.convert()
    }

    /// The same number in 64 bits: signs above.
    #[track_caller]
    pub fn extended(self) -> Reg<'k, u64> {
        let src = self.operand();
        self.builder.write(|dst| Op::Convert {
            to: Ty::S64,
            from: Ty::S32,
            dst,
            src,
        })
    }
}

impl<'k> Reg<'k, u16> {
    /// With zeros above.
    #[track_caller]
    pub fn to_u32(self) -> Reg<'k, u32> {
        self.convert()
    }
}

impl<'k> Reg<'k, u64> {
    /// The low 32 bits.
    #[track_caller]
    pub fn to_u32(self) -> Reg<'k, u32> {
        self.convert()
    }
}

impl<'k> Reg<'k, bool> {
    /// `a` where this holds, else `b`.
    #[track_caller]
    pub fn select<T: Number>(self, a: impl Value<T>, b: impl Value<T>) -> Reg<'k, T> {
        let (a, b, cond) = (a.operand(), b.operand(), self.id);
        self.builder.write(|dst| Op::Select {
            ty: T::TY,
            dst,
            a,
            b,
            cond,
        })
    }
}
