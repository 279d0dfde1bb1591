//! Matrices in shared memory as wgmma sees them: descriptors and layouts.
//!
//! In: a descriptor's 64 bits, and whether the matrix is transposed. Out: the 16-byte chunks that
//! hold its elements, and their values as float32. The layouts are those of the PTX ISA's chapter
//! "Asynchronous warpgroup level matrix shared memory layout": rows of 32, 64 or 128 bytes, eight of
//! which make a pattern of swizzled chunks, or blocks of eight 16-byte chunks without swizzling.
//! Patterns that do not start at a multiple of their size (base offsets) are not supported.

use flex_block_attn_ptx::{Element, Swizzle};

use crate::fault::{Done, Kind};
use crate::numbers::{E4M3, E5M2, from_bf16, from_f16};

/// A matrix in shared memory: a descriptor, taken apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    start: u32,
    leading: u32,
    stride: u32,
    swizzle: Swizzle,
    /// Whether m or n is contiguous rather than k.
    transposed: bool,
    element: Element,
}

/// A chunk: its address, and the indices (m or n, k) of its first element.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    pub(crate) address: u32,
    pub(crate) outer: u32,
    pub(crate) k: u32,
}

/// Bits of a descriptor that mean nothing and must be zero.
const RESERVED: u64 = 0x3ff1_c000_c000_c000;

impl Matrix {
    /// Takes a descriptor apart.
    pub(crate) fn new(bits: u64, transposed: bool, element: Element) -> Done<Self> {
        let field = |shift: u32| ((bits >> shift) as u32 & 0x3fff) << 4;
        if bits & RESERVED != 0 {
            let problem = format!("{bits:#018x} has bits set that must be zero");
            return Err(Kind::Descriptor { problem }.into());
        }
        if bits >> 49 & 7 != 0 {
            let what = format!("a matrix descriptor with a base offset, {bits:#018x}");
            return Err(Kind::Unsupported { what }.into());
        }
        if transposed && element.bytes() != 2 {
            let problem = format!("{element:?} matrices must have k contiguous");
            return Err(Kind::Descriptor { problem }.into());
        }
        let swizzle = match bits >> 62 {
            0 => Swizzle::None,
            1 => Swizzle::B128,
            2 => Swizzle::B64,
            _ => Swizzle::B32,
        };
        let (start, leading, stride) = (field(0), field(16), field(32));
        Ok(Self {
            start,
            leading,
            stride,
            swizzle,
            transposed,
            element,
        })
    }

    /// The address of a chunk; `outer` or `k` is the multiple of a chunk's elements.
    fn address(&self, outer: u32, k: u32) -> u32 {
        let width = self.swizzle.row_bytes();
        let offset = if self.transposed {
            let per_row = width / 2;
            let (group, k_group) = (outer / per_row, k / 8);
            let inside = outer % per_row * 2 + k % 8 * width;
            match self.swizzle {
                Swizzle::None => inside + group * self.stride + k_group * self.leading,
                _ => inside + group * self.leading + k_group * self.stride,
            }
        } else {
            let byte = k * self.element.bytes();
            let inside = outer % 8 * width + outer / 8 * self.stride;
            match self.swizzle {
                Swizzle::None => inside + byte / 16 * self.leading,
                _ => inside + byte,
            }
        };
        self.swizzle.apply(self.start + offset)
    }

    /// Calls `f` for each chunk of `count` rows (of a) or columns (of b) from `first` on.
    pub(crate) fn chunks(&self, first: u32, count: u32, mut f: impl FnMut(Chunk) -> Done) -> Done {
        let per_chunk = 16 / self.element.bytes();
        if self.transposed {
            for k in 0..2 * per_chunk {
                for outer in (first..first + count).step_by(8) {
                    f(Chunk {
                        address: self.address(outer, k),
                        outer,
                        k,
                    })?;
                }
            }
        } else {
            for outer in first..first + count {
                for k in [0, per_chunk] {
                    f(Chunk {
                        address: self.address(outer, k),
                        outer,
                        k,
                    })?;
                }
            }
        }
        Ok(())
    }

    /// A chunk's elements, with their indices.
    #[inline]
    pub(crate) fn elements(&self, chunk: Chunk, bytes: &[u8], mut f: impl FnMut(u32, u32, f32)) {
        for (i, bytes) in bytes
            .chunks_exact(self.element.bytes() as usize)
            .enumerate()
        {
            let value = number(self.element, bytes);
            let i = i as u32;
            if self.transposed {
                f(chunk.outer + i, chunk.k, value);
            } else {
                f(chunk.outer, chunk.k + i, value);
            }
        }
    }
}

/// An element's value; types that wgmma does not take here read as zero, and are refused before.
pub(crate) fn number(element: Element, bytes: &[u8]) -> f32 {
    match (element, bytes) {
        (Element::Bf16, &[a, b]) => from_bf16(u16::from_le_bytes([a, b])),
        (Element::F16, &[a, b]) => from_f16(u16::from_le_bytes([a, b])),
        (Element::E4m3, &[a]) => E4M3.value(a),
        (Element::E5m2, &[a]) => E5M2.value(a),
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(start: u64, leading: u64, stride: u64, swizzle: u64) -> u64 {
        start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62
    }

    #[test]
    fn rows_of_128_bytes_are_swizzled() {
        let matrix = Matrix::new(descriptor(2048, 16, 1024, 1), false, Element::Bf16).unwrap();
        assert_eq!(matrix.address(0, 0), 2048);
        assert_eq!(matrix.address(3, 0), 2048 + 3 * 128 + 3 * 16);
        assert_eq!(matrix.address(9, 8), 2048 + 1024 + 128);
        // The second slice of 16 along k starts 32 bytes on.
        let next = Matrix::new(descriptor(2080, 16, 1024, 1), false, Element::Bf16).unwrap();
        assert_eq!(next.address(1, 0), 2048 + 128 + 3 * 16);
    }

    #[test]
    fn transposed_panels_are_a_leading_offset_apart() {
        let matrix = Matrix::new(descriptor(1024, 8192, 1024, 1), true, Element::Bf16).unwrap();
        assert_eq!(matrix.address(64, 0), 1024 + 8192);
        assert_eq!(matrix.address(8, 0), 1024 + 16);
        assert_eq!(matrix.address(0, 9), 1024 + 1024 + 128 + 16);
    }

    #[test]
    fn reserved_bits_and_base_offsets_are_refused() {
        assert!(Matrix::new(1 << 14, false, Element::Bf16).is_err());
        assert!(Matrix::new(1 << 49, false, Element::Bf16).is_err());
        assert!(Matrix::new(0, true, Element::E4m3).is_err());
    }
}
