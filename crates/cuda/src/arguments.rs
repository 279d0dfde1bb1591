//! A launch's arguments as the driver takes them: an array of addresses of values.
//!
//! In: the arguments, which fit the kernel. Out: an [`Arguments`] on the caller's stack; a launch
//! allocates nothing.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::ptr;

use flex_block_attn_ptx::{Arg, Element, MAX_ARGS, MAX_RANK, Swizzle, TensorMap};

use crate::Error;
use crate::driver::{Driver, EncodedMap};

/// Values and their addresses. It must not move once it was filled.
pub(crate) struct Arguments {
    values: [EncodedMap; MAX_ARGS],
    addresses: [*const c_void; MAX_ARGS],
}

impl Arguments {
    pub(crate) fn empty() -> Self {
        Self {
            values: [EncodedMap([0; 16]); MAX_ARGS],
            addresses: [ptr::null(); MAX_ARGS],
        }
    }

    /// Puts in the arguments of a launch, at most [`MAX_ARGS`], whose tensor maps have been checked.
    /// What it gives is valid as long as this stays where it is.
    pub(crate) fn fill(
        &mut self,
        driver: &Driver,
        args: &[Arg],
    ) -> Result<*const *const c_void, Error> {
        for ((value, address), arg) in self.values.iter_mut().zip(&mut self.addresses).zip(args) {
            match arg {
                // The device is little-endian, as is every host that has one.
                Arg::U32(x) => value.0[0] = u64::from(*x),
                Arg::F32(x) => value.0[0] = u64::from(x.to_bits()),
                Arg::U64(x) => value.0[0] = *x,
                Arg::TensorMap(map) => *value = encoded(driver, map)?,
            }
            *address = ptr::from_ref(value).cast();
        }
        Ok(self.addresses.as_ptr())
    }
}

/// Tensor maps that a thread keeps.
const KEPT: usize = 64;

/// A tensor map as the driver encodes it. To encode takes it a microsecond, and a program that runs in
/// steps gets the same memory for the same tensors again: the last ones are kept.
fn encoded(driver: &Driver, map: &TensorMap) -> Result<EncodedMap, Error> {
    type Kept = [Option<(TensorMap, EncodedMap)>; KEPT];
    thread_local! {
        static MAPS: RefCell<Kept> = const { RefCell::new([const { None }; KEPT]) };
    }
    MAPS.with_borrow_mut(|maps| {
        let kept = &mut maps[place(map)];
        if let Some((of, encoded)) = kept
            && of == map
        {
            return Ok(*encoded);
        }
        let mut encoded = EncodedMap([0; 16]);
        encode(driver, map, &mut encoded)?;
        *kept = Some((*map, encoded));
        Ok(encoded)
    })
}

/// Where a map is kept: by where its tensor lies, and what it cuts it into, as one tensor may have several.
fn place(map: &TensorMap) -> usize {
    // Tensors begin at multiples of 512 bytes; heads of a tensor of tensors, nearer to each other.
    let address = map.address / 512 + map.address / 128;
    let tile: u32 = map.tile.iter().sum();
    (address as usize + tile as usize) % KEPT
}

fn encode(driver: &Driver, map: &TensorMap, to: &mut EncodedMap) -> Result<(), Error> {
    const STEPS: [u32; MAX_RANK] = [1; MAX_RANK];
    const NOT_INTERLEAVED: c_int = 0;
    const WHOLE_LINES: c_int = 3;
    const ZEROS: c_int = 0;
    // SAFETY: the arrays have MAX_RANK entries (strides one less, from the second dimension on);
    // the driver checks the rest.
    unsafe {
        driver.tensor_map(
            ptr::from_mut(to),
            element_code(map.element),
            map.rank,
            map.address,
            map.dims.as_ptr(),
            map.strides[1..].as_ptr(),
            map.tile.as_ptr(),
            STEPS.as_ptr(),
            NOT_INTERLEAVED,
            swizzle_code(map.swizzle),
            WHOLE_LINES,
            ZEROS,
        )
    }
}

/// `CUtensorMapDataType`.
fn element_code(element: Element) -> c_int {
    match element {
        Element::U8 | Element::E4m3 | Element::E5m2 => 0,
        Element::I32 => 3,
        Element::F16 => 6,
        Element::F32 => 7,
        Element::Bf16 => 9,
    }
}

/// `CUtensorMapSwizzle`.
fn swizzle_code(swizzle: Swizzle) -> c_int {
    match swizzle {
        Swizzle::None => 0,
        Swizzle::B32 => 1,
        Swizzle::B64 => 2,
        Swizzle::B128 => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_of_one_tensor_are_kept_side_by_side() {
        let map = |tile| TensorMap {
            element: Element::Bf16,
            address: 4096,
            rank: 5,
            dims: [128, 80, 45, 31, 16],
            strides: [2, 256, 20_480, 921_600, 28_569_600],
            tile,
            swizzle: Swizzle::B128,
        };
        // A box of a video, three of them, and as many tokens of text.
        let maps = [[64, 8, 1, 2, 1], [64, 8, 1, 6, 1], [64, 16, 1, 1, 1]].map(map);
        let places = maps.map(|map| place(&map));
        assert!(places[0] != places[1] && places[0] != places[2] && places[1] != places[2]);
        assert_eq!(place(&maps[0]), places[0]);
    }
}
