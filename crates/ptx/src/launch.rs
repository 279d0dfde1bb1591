//! [`Launch`]: everything about one kernel launch but the kernel itself, as plain data.
//!
//! In: addresses and sizes, from whoever knows the tensors (`kernels`). Out: what the driver needs
//! (`cuda`) and what the emulator runs; neither asks for more. Addresses are numbers: device
//! addresses for the one, addresses of emulated memory for the other.

use crate::Element;

/// One launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Thread blocks along x, y, z.
    pub grid: [u32; 3],
    /// Arguments, one for each of the kernel's parameters, in order and of its kind.
    pub args: Vec<Arg>,
}

/// An argument of a launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// A 32-bit integer, signed or not.
    U32(u32),
    /// A 64-bit integer or an address.
    U64(u64),
    /// A number.
    F32(f32),
    /// A tensor map: encoded by the driver, 128 bytes, passed by value (`__grid_constant__`).
    TensorMap(TensorMap),
}

/// Dimensions of a tensor map at most.
pub const MAX_RANK: usize = 5;

/// A tensor in global memory as the TMA unit sees it, tiled. Dimension 0 is the contiguous one.
///
/// The fields are those of the driver's `cuTensorMapEncodeTiled`; element strides are all 1, and
/// elements outside of the tensor read as zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorMap {
    /// What is stored.
    pub element: Element,
    /// Where element (0, 0, ...) lies; a multiple of 16.
    pub address: u64,
    /// Number of dimensions, 1 to 5. Entries of the arrays behind it are ignored.
    pub rank: u32,
    /// Elements along each dimension.
    pub dims: [u64; MAX_RANK],
    /// Bytes from one index to the next along each dimension; multiples of 16, except `[0]`,
    /// which is the element's size.
    pub strides: [u64; MAX_RANK],
    /// Elements along each dimension that one copy moves, 1 to 256 each.
    pub tile: [u32; MAX_RANK],
    /// How 16-byte chunks are permuted in shared memory.
    pub swizzle: Swizzle,
}

/// How the TMA unit and wgmma permute the 16-byte chunks of shared memory so that reading a column
/// meets no bank conflict: bits of an address are XORed with higher bits of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// None.
    None,
    /// Rows of 32 bytes: bit 4 ^= bit 7.
    B32,
    /// Rows of 64 bytes: bits 4-5 ^= bits 7-8.
    B64,
    /// Rows of 128 bytes: bits 4-6 ^= bits 7-9.
    B128,
}

impl Swizzle {
    /// Bytes of a row of the pattern; a tile's inner dimension may not exceed it.
    pub fn row_bytes(self) -> u32 {
        match self {
            Self::None => 16,
            Self::B32 => 32,
            Self::B64 => 64,
            Self::B128 => 128,
        }
    }

    /// Where the byte lies that, without swizzling, would lie at `address`.
    pub fn apply(self, address: u32) -> u32 {
        let mask = match self {
            Self::None => 0,
            Self::B32 => 0b001,
            Self::B64 => 0b011,
            Self::B128 => 0b111,
        };
        address ^ (((address >> 7) & mask) << 4)
    }
}

impl TensorMap {
    /// Bytes that one copy writes to shared memory, those outside of the tensor (zeros) included:
    /// what the barrier's transaction count falls by.
    pub fn tile_bytes(&self) -> u32 {
        let elements: u32 = self.tile[..self.rank as usize].iter().product();
        elements * self.element.bytes()
    }
}
