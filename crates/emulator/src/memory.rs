//! [`Memory`]: emulated device memory, by allocations.
//!
//! In: allocations and their contents, from tests and cases; reads and writes of kernels, from the
//! warps and the bulk engine. Out: bytes, or the fault that an access is. Each byte knows whether
//! anything was written to it. Between allocations lie gaps, so that running over an end is noticed.

use std::ops::Range;

use crate::fault::{Done, Kind, Place};

/// Where the first allocation lies, and bytes between allocations at least.
const START: u64 = 0x7_0000_0000;
const GAP: u64 = 1 << 20;

/// One allocation of [`Memory`].
#[derive(Debug, Clone)]
pub struct Allocation {
    pub(crate) name: String,
    pub(crate) base: u64,
    pub(crate) bytes: Vec<u8>,
    /// 1 for each byte that was written.
    known: Vec<u8>,
}

impl Allocation {
    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.base..self.base + self.bytes.len() as u64
    }

    /// Its bytes; those never written hold some pattern.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Of each byte, whether it was written.
    pub fn written(&self) -> impl Iterator<Item = bool> + '_ {
        self.known.iter().map(|&known| known != 0)
    }
}

/// Emulated device memory. It outlives launches: several kernels may work on it in turn.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// By address.
    allocations: Vec<Allocation>,
}

/// A stretch of one allocation: its index and the offset of the first byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) allocation: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl Memory {
    /// Memory without allocations.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allocates bytes under a name, for reports; returns the address, a multiple of 256. Their
    /// contents are undefined: reading them before writing is a fault.
    pub fn alloc(&mut self, name: &str, bytes: usize) -> u64 {
        let base = self.allocations.last().map_or(START, |last| {
            (last.base + last.bytes.len() as u64 + GAP).next_multiple_of(GAP)
        });
        self.allocations.push(Allocation {
            name: name.to_owned(),
            base,
            bytes: vec![0xcd; bytes],
            known: vec![0; bytes],
        });
        base
    }

    /// Allocates as much as `values` need and writes them.
    pub fn alloc_with<T: Element>(&mut self, name: &str, values: &[T]) -> u64 {
        let address = self.alloc(name, values.len() * T::BYTES);
        self.write(address, values);
        address
    }

    /// Writes values.
    ///
    /// # Panics
    /// If they do not lie in one allocation.
    #[track_caller]
    pub fn write<T: Element>(&mut self, address: u64, values: &[T]) {
        let span = self.host_span(address, values.len() * T::BYTES);
        let bytes = self.span_mut(span);
        for (to, &value) in bytes.chunks_exact_mut(T::BYTES).zip(values) {
            value.put(to);
        }
    }

    /// Reads values; those never written read as some pattern.
    ///
    /// # Panics
    /// If they do not lie in one allocation.
    #[track_caller]
    pub fn read<T: Element>(&self, address: u64, count: usize) -> Vec<T> {
        let span = self.host_span(address, count * T::BYTES);
        let bytes = &self.allocations[span.allocation].bytes[span.start..span.start + span.len];
        bytes.chunks_exact(T::BYTES).map(T::get).collect()
    }

    /// Whether every one of `bytes` bytes was written.
    ///
    /// # Panics
    /// If they do not lie in one allocation.
    #[track_caller]
    pub fn is_written(&self, address: u64, bytes: usize) -> bool {
        let span = self.host_span(address, bytes);
        self.unknown(span).is_none()
    }

    #[track_caller]
    fn host_span(&self, address: u64, len: usize) -> Span {
        match self.find(address, len) {
            Some(span) => span,
            None => panic!("{} does not hold {len} bytes", self.place(address)),
        }
    }

    /// The allocation that holds `len` bytes from `address`.
    pub(crate) fn find(&self, address: u64, len: usize) -> Option<Span> {
        let after = self.allocations.partition_point(|a| a.base <= address);
        let allocation = after.checked_sub(1)?;
        let found = &self.allocations[allocation];
        let start = usize::try_from(address - found.base).ok()?;
        (start + len <= found.bytes.len()).then_some(Span {
            allocation,
            start,
            len,
        })
    }

    /// As [`Memory::find`], for kernels.
    pub(crate) fn span(&self, address: u64, len: usize) -> Done<Span> {
        self.find(address, len).ok_or_else(|| {
            Kind::OutOfBounds {
                place: self.place(address),
                bytes: len as u32,
            }
            .into()
        })
    }

    /// The bytes of a span, all of them written before.
    pub(crate) fn known(&self, span: Span) -> Done<&[u8]> {
        if let Some(at) = self.unknown(span) {
            let base = self.allocations[span.allocation].base;
            let place = self.place(base + (span.start + at) as u64);
            return Err(Kind::UninitialisedMemory { place }.into());
        }
        Ok(&self.allocations[span.allocation].bytes[span.start..span.start + span.len])
    }

    /// The first byte of a span that was never written.
    fn unknown(&self, span: Span) -> Option<usize> {
        let known = &self.allocations[span.allocation].known;
        known[span.start..span.start + span.len]
            .iter()
            .position(|&known| known == 0)
    }

    /// The bytes of a span, to be written, all of them.
    pub(crate) fn span_mut(&mut self, span: Span) -> &mut [u8] {
        let range = span.start..span.start + span.len;
        let allocation = &mut self.allocations[span.allocation];
        allocation.known[range.clone()].fill(1);
        &mut allocation.bytes[range]
    }

    /// All allocations, by address.
    pub fn allocations(&self) -> &[Allocation] {
        &self.allocations
    }

    /// The name of an address: that of the allocation before it, or the first.
    pub(crate) fn place(&self, address: u64) -> Place {
        let after = self.allocations.partition_point(|a| a.base <= address);
        match self.allocations.get(after.saturating_sub(1)) {
            Some(a) => Place {
                region: a.name.clone(),
                offset: address.wrapping_sub(a.base) as i64,
                address,
            },
            None => Place {
                region: "global memory".to_owned(),
                offset: address as i64,
                address,
            },
        }
    }
}

/// Types that [`Memory`] reads and writes: plain numbers; bfloat16 and float16 as `u16`.
pub trait Element: Copy {
    /// Bytes of one.
    const BYTES: usize;
    /// Writes it.
    fn put(self, to: &mut [u8]);
    /// Reads it.
    fn get(from: &[u8]) -> Self;
}

macro_rules! elements {
    ($($ty:ty),*) => {$(
        impl Element for $ty {
            const BYTES: usize = size_of::<$ty>();
            fn put(self, to: &mut [u8]) {
                to.copy_from_slice(&self.to_le_bytes());
            }
            fn get(from: &[u8]) -> Self {
                <$ty>::from_le_bytes(from.try_into().expect("as many bytes as the type has"))
            }
        }
    )*};
}

elements!(u8, u16, i32, u32, i64, u64, f32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back() {
        let mut memory = Memory::new();
        let a = memory.alloc_with("a", &[1.5f32, -2.0]);
        let b = memory.alloc("b", 8);
        assert_eq!(a % 256, 0);
        assert_eq!(memory.read::<f32>(a, 2), [1.5, -2.0]);
        assert!(!memory.is_written(b, 8));
        memory.write(b, &[7i32]);
        let [_, second] = memory.allocations() else {
            panic!("two allocations");
        };
        assert_eq!((second.name(), second.range()), ("b", b..b + 8));
        assert!(second.written().eq([0, 1, 2, 3, 4, 5, 6, 7].map(|i| i < 4)));
        memory.write(b + 4, &[8i32]);
        assert_eq!(memory.read::<i32>(b + 4, 1), [8]);
    }

    #[test]
    fn allocations_have_ends() {
        let mut memory = Memory::new();
        let a = memory.alloc("a", 10);
        memory.alloc("b", 10);
        assert!(memory.find(a + 8, 2).is_some());
        assert!(memory.find(a + 8, 4).is_none());
        assert_eq!(
            memory.place(a + 12).to_string(),
            format!("a + 12 (address {:#x})", a + 12)
        );
    }
}
