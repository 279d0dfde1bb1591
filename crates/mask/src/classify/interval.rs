//! [`Interval`]: all numbers that a step may have, at least. In: those of its operands. Out: its own.
//! Conditions are intervals too, of 0 (false) and 1.

/// From `low` to `high`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interval {
    pub low: i64,
    pub high: i64,
}

impl Interval {
    pub const FALSE: Self = Self::one(0);
    pub const TRUE: Self = Self::one(1);
    pub const EITHER: Self = Self::new(0, 1);
    /// Of int32, of which nothing else is known.
    pub const ANY: Self = Self::new(i32::MIN as i64, i32::MAX as i64);

    pub const fn new(low: i64, high: i64) -> Self {
        Self { low, high }
    }

    pub const fn one(n: i64) -> Self {
        Self::new(n, n)
    }

    pub fn is_one(self) -> bool {
        self.low == self.high
    }

    pub fn has(self, n: i64) -> bool {
        self.low <= n && n <= self.high
    }

    /// The smallest that has both.
    pub fn hull(self, other: Self) -> Self {
        Self::new(self.low.min(other.low), self.high.max(other.high))
    }

    pub fn plus(self, other: Self) -> Self {
        Self::new(
            self.low.saturating_add(other.low),
            self.high.saturating_add(other.high),
        )
    }

    pub fn scaled(self, factor: i64) -> Self {
        let (a, b) = (
            self.low.saturating_mul(factor),
            self.high.saturating_mul(factor),
        );
        Self::new(a.min(b), a.max(b))
    }

    pub fn minus(self, other: Self) -> Self {
        self.plus(other.scaled(-1))
    }

    /// What one operation makes of the four pairs of ends, which for it are its extremes.
    fn corners(self, other: Self, f: impl Fn(i64, i64) -> i64) -> Self {
        let all = [
            f(self.low, other.low),
            f(self.low, other.high),
            f(self.high, other.low),
            f(self.high, other.high),
        ];
        let extreme = |pick: fn(i64, i64) -> i64| all[1..].iter().fold(all[0], |x, &y| pick(x, y));
        Self::new(extreme(Ord::min), extreme(Ord::max))
    }

    pub fn times(self, other: Self) -> Self {
        self.corners(other, i64::saturating_mul)
    }

    pub fn divided(self, by: Self) -> Self {
        if by.is_one() && by.low > 0 {
            let n = by.low;
            return Self::new(divide(self.low, n), divide(self.high, n));
        }
        if by.has(0) {
            let most = self.low.abs().max(self.high.abs());
            return Self::new(-most, most);
        }
        self.corners(by, floor_divide)
    }

    pub fn remainder(self, by: Self) -> Self {
        if by.is_one() && by.low > 0 {
            let n = by.low;
            let (first, last) = (divide(self.low, n), divide(self.high, n));
            return match first == last {
                true => Self::new(self.low - first * n, self.high - last * n),
                false => Self::new(0, n - 1),
            };
        }
        // Between 0 and the divisor, whose sign it has.
        Self::new((by.low + 1).min(0), (by.high - 1).max(0))
    }

    pub fn min(self, other: Self) -> Self {
        Self::new(self.low.min(other.low), self.high.min(other.high))
    }

    pub fn max(self, other: Self) -> Self {
        Self::new(self.low.max(other.low), self.high.max(other.high))
    }

    pub fn abs(self) -> Self {
        match (self.low >= 0, self.high <= 0) {
            (true, _) => self,
            (_, true) => self.scaled(-1),
            _ => Self::new(0, self.high.max(-self.low)),
        }
    }

    /// Whether it is less than a number.
    pub fn is_below(self, n: i64) -> Self {
        Self::new(i64::from(self.high < n), i64::from(self.low < n))
    }

    /// Whether it is 0.
    pub fn is_zero(self) -> Self {
        match self.has(0) {
            false => Self::FALSE,
            true if self.is_one() => Self::TRUE,
            true => Self::EITHER,
        }
    }

    pub fn negated(self) -> Self {
        Self::new(1 - self.high, 1 - self.low)
    }

    /// Of a condition: one number or the other.
    pub fn choose(self, a: Self, b: Self) -> Self {
        match self {
            Self::TRUE => a,
            Self::FALSE => b,
            _ => a.hull(b),
        }
    }
}

/// Rounded down, by a positive number.
#[inline]
fn divide(a: i64, n: i64) -> i64 {
    match (u32::try_from(a), u32::try_from(n)) {
        // By far the faster instruction.
        (Ok(a), Ok(n)) => (a / n).into(),
        _ => a.div_euclid(n),
    }
}

fn floor_divide(a: i64, b: i64) -> i64 {
    let quotient = a / b;
    quotient - i64::from(a % b != 0 && (a < 0) != (b < 0))
}
