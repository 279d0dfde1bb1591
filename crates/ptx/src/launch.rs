//! [`Launch`]: everything about one kernel launch but the kernel itself, as plain data.
//!
//! In: addresses and sizes, from whoever knows the tensors (`kernels`). Out: what the driver needs
//! (`cuda`) and what the emulator runs; neither asks for more. Addresses are numbers: device
//! addresses for the one, addresses of emulated memory for the other. [`Entry`] is what both must
//! know of the kernel; [`Entry::check`] refuses launches that do not fit it, alike in both.

use thiserror::Error;

use crate::ir::{Block, Kernel, Node, Op, Param, ParamKind};
use crate::{Class, Element};

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

/// What a launch must know of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its entry point's name.
    pub name: String,
    /// Parameters, in order.
    pub params: Vec<Param>,
    /// Threads of a thread block.
    pub threads: u32,
    /// Thread blocks of a cluster along x.
    pub cluster: u32,
    /// Dynamic shared memory, in bytes.
    pub shared_bytes: u32,
    /// Whether it says itself, by `griddepcontrol.wait`, where it waits for the launches before it: it
    /// may start before they are over, then (programmatic dependent launch).
    pub early: bool,
}

/// A launch that does not fit its kernel, or that no device takes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("launch of {kernel}: {problem}")]
pub struct LaunchError {
    /// The kernel's name.
    pub kernel: String,
    /// What is wrong.
    pub problem: String,
}

impl Kernel {
    /// What a launch must know of it.
    pub fn entry(&self) -> Entry {
        Entry {
            name: self.name.clone(),
            params: self.params.clone(),
            threads: self.threads,
            cluster: self.cluster,
            shared_bytes: self.shared_bytes,
            early: waits(&self.body),
        }
    }
}

/// Whether there is a `griddepcontrol.wait` in it.
fn waits(block: &Block) -> bool {
    block.iter().any(|node| match node {
        Node::Inst(inst) => matches!(inst.op, Op::GridWait),
        Node::If {
            then, otherwise, ..
        } => waits(then) || waits(otherwise),
        Node::Loop { body, .. } => waits(body),
        Node::Break { .. } => false,
    })
}

/// Arguments of a launch at most: those who launch have so many places for them.
pub const MAX_ARGS: usize = 64;

/// Thread blocks along x, y, z at most.
const MOST_BLOCKS: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];

impl Entry {
    /// Whether a launch fits: the grid, and number, kinds and tensor maps of the arguments.
    ///
    /// # Errors
    /// The first thing that does not.
    pub fn check(&self, launch: &Launch) -> Result<(), LaunchError> {
        self.problem(launch).map_err(|problem| LaunchError {
            kernel: self.name.clone(),
            problem,
        })
    }

    fn problem(&self, launch: &Launch) -> Result<(), String> {
        let grid = launch.grid;
        if (0..3).any(|axis| grid[axis] == 0 || grid[axis] > MOST_BLOCKS[axis]) {
            return Err(format!("a grid of {grid:?}, not 1 to {MOST_BLOCKS:?}"));
        }
        if !grid[0].is_multiple_of(self.cluster) {
            return Err(format!(
                "{} blocks along x are no multiple of the cluster's {}",
                grid[0], self.cluster
            ));
        }
        if launch.args.len() > MAX_ARGS {
            return Err(format!(
                "{} arguments, {MAX_ARGS} at most",
                launch.args.len()
            ));
        }
        if self.params.len() != launch.args.len() {
            return Err(format!(
                "{} arguments for {} parameters",
                launch.args.len(),
                self.params.len()
            ));
        }
        for (param, arg) in self.params.iter().zip(&launch.args) {
            let fits = match (param.kind, arg) {
                (ParamKind::TensorMap, Arg::TensorMap(_)) => true,
                (ParamKind::Scalar(ty), Arg::U32(_)) => ty.class() == Class::B32,
                (ParamKind::Scalar(ty), Arg::U64(_)) => ty.class() == Class::B64,
                (ParamKind::Scalar(ty), Arg::F32(_)) => ty.class() == Class::F32,
                _ => false,
            };
            if !fits {
                let Param { name, kind } = param;
                return Err(format!("argument {arg:?} for parameter {name} of {kind:?}"));
            }
            if let Arg::TensorMap(map) = arg {
                map.check()
                    .map_err(|why| format!("tensor map {}: {why}", param.name))?;
            }
        }
        Ok(())
    }
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

    /// Whether the driver can encode it.
    ///
    /// # Errors
    /// What it would refuse.
    pub fn check(&self) -> Result<(), String> {
        let rank = self.rank as usize;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(format!("rank {rank}"));
        }
        if !self.address.is_multiple_of(16) {
            return Err(format!("address {:#x} is no multiple of 16", self.address));
        }
        for dim in 0..rank {
            let (len, stride, tile) = (self.dims[dim], self.strides[dim], self.tile[dim]);
            if len == 0 || len > 1 << 32 {
                return Err(format!("dimension {dim} has {len} elements"));
            }
            if !(1..=256).contains(&tile) {
                return Err(format!("a tile of {tile} elements along dimension {dim}"));
            }
            if dim == 0 && stride != u64::from(self.element.bytes()) {
                return Err(format!("a stride of {stride} bytes between neighbours"));
            }
            if dim > 0 && (!stride.is_multiple_of(16) || stride >= 1 << 40) {
                return Err(format!("a stride of {stride} bytes along dimension {dim}"));
            }
        }
        let inner = self.tile[0] * self.element.bytes();
        if !inner.is_multiple_of(16) {
            return Err(format!("rows of {inner} bytes are no multiple of 16"));
        }
        if self.swizzle != Swizzle::None && inner > self.swizzle.row_bytes() {
            return Err(format!(
                "rows of {inner} bytes do not fit swizzle {:?}",
                self.swizzle
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Builder;

    fn map() -> TensorMap {
        TensorMap {
            element: Element::Bf16,
            address: 4096,
            rank: 2,
            dims: [64, 100, 0, 0, 0],
            strides: [2, 128, 0, 0, 0],
            tile: [64, 8, 0, 0, 0],
            swizzle: Swizzle::B128,
        }
    }

    fn refusal(change: impl FnOnce(&mut TensorMap)) -> String {
        let mut map = map();
        change(&mut map);
        map.check().expect_err("a map that no driver takes")
    }

    #[test]
    fn maps_that_no_driver_takes_are_refused() {
        map().check().expect("a good map");
        assert_eq!(refusal(|m| m.rank = 6), "rank 6");
        assert_eq!(
            refusal(|m| m.address = 8),
            "address 0x8 is no multiple of 16"
        );
        assert_eq!(refusal(|m| m.dims[1] = 0), "dimension 1 has 0 elements");
        assert!(refusal(|m| m.tile[1] = 257).starts_with("a tile of 257 elements"));
        assert!(refusal(|m| m.strides[0] = 4).starts_with("a stride of 4 bytes between"));
        assert!(refusal(|m| m.strides[1] = 120).starts_with("a stride of 120 bytes along"));
        assert!(refusal(|m| m.tile[0] = 4).starts_with("rows of 8 bytes are no"));
        assert!(refusal(|m| m.tile[0] = 128).starts_with("rows of 256 bytes do not fit"));
    }

    #[test]
    fn launches_that_do_not_fit_are_refused() {
        let kernel = Builder::kernel("k", 32, |k| {
            k.set_cluster(2);
            k.param::<u32>("count");
            k.tensor_map("map");
        });
        let entry = kernel.entry();
        let good = Launch {
            grid: [4, 1, 1],
            args: vec![Arg::U32(1), Arg::TensorMap(map())],
        };
        entry.check(&good).expect("a good launch");
        let refusal = |change: &dyn Fn(&mut Launch)| {
            let mut launch = good.clone();
            change(&mut launch);
            let error = entry
                .check(&launch)
                .expect_err("a launch that does not fit");
            error.to_string()
        };
        assert!(refusal(&|l| l.grid[1] = 0).starts_with("launch of k: a grid of [4, 0, 1]"));
        assert!(refusal(&|l| l.grid[2] = 65_536).contains("a grid of"));
        assert!(refusal(&|l| l.grid[0] = 3).contains("no multiple of the cluster's 2"));
        assert!(refusal(&|l| l.args.truncate(1)).contains("1 arguments for 2 parameters"));
        let many = |l: &mut Launch| l.args = vec![Arg::U32(0); MAX_ARGS + 1];
        assert!(refusal(&many).contains("65 arguments, 64 at most"));
        assert!(refusal(&|l| l.args[0] = Arg::F32(1.0)).contains("for parameter count"));
        let far = TensorMap {
            address: 1,
            ..map()
        };
        assert!(refusal(&|l| l.args[1] = Arg::TensorMap(far)).contains("tensor map map: address"));
    }
}
