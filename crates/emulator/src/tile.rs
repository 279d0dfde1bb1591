//! Tiles of tensor maps: which bytes of global memory a copy moves, and where in shared memory they
//! lie.
//!
//! In: a tensor map and coordinates, from the bulk engine. Out: rows, some of them partly or wholly
//! outside of the tensor.

use flex_block_attn_ptx::{Element, MAX_RANK, Swizzle, TensorMap};

use crate::fault::Done;

/// What `Op::ParamAddress` gives for a parameter: no address, but a number that arithmetic does not
/// turn into another parameter's.
pub(crate) fn map_token(param: u32) -> u64 {
    0x7a90_0000_0000_0000 | u64::from((param + 1).wrapping_mul(0x9e37_79b1)) << 8
}

/// A row of a tile: what dimension 0 runs over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    /// Bytes from the tile's start to the row's.
    pub(crate) offset: u32,
    /// Bytes from the row's start to the first byte within the tensor.
    pub(crate) skipped: u32,
    /// Bytes within the tensor; 0 if none.
    pub(crate) len: u32,
    /// Where the first of them lies in global memory.
    pub(crate) address: u64,
}

/// The coordinates of a tile's first element.
pub(crate) type Coordinates = [i32; MAX_RANK];

/// Whether the emulator knows a map's layout; if not, why.
pub(crate) fn check(map: &TensorMap) -> Result<(), String> {
    let inner = map.tile[0] * map.element.bytes();
    if map.swizzle != Swizzle::None && inner < map.swizzle.row_bytes() {
        // The hardware takes them; how it lays them out we have not measured.
        return Err(format!(
            "rows of {inner} bytes, shorter than those of swizzle {:?}, are not supported by the \
             emulator",
            map.swizzle
        ));
    }
    Ok(())
}

/// Calls `f` for each row of the tile at some coordinates.
pub(crate) fn rows(
    map: &TensorMap,
    coordinates: &Coordinates,
    mut f: impl FnMut(Row) -> Done,
) -> Done {
    let rank = map.rank as usize;
    let size = map.element.bytes();
    let inner = map.tile[0];
    let count: u32 = map.tile[1..rank].iter().product();
    // The part of dimension 0 that lies within the tensor: the same for all rows.
    let start = i64::from(coordinates[0]);
    let from = start.max(0);
    let to = (start + i64::from(inner)).min(map.dims[0] as i64);
    for row in 0..count {
        let (mut rest, mut address, mut inside) = (row, map.address, from < to);
        for (dim, &first) in coordinates.iter().enumerate().take(rank).skip(1) {
            let at = i64::from(first) + i64::from(rest % map.tile[dim]);
            rest /= map.tile[dim];
            inside &= (0..map.dims[dim] as i64).contains(&at);
            address = address.wrapping_add_signed(at.wrapping_mul(map.strides[dim] as i64));
        }
        f(Row {
            offset: row * inner * size,
            skipped: if inside {
                (from - start) as u32 * size
            } else {
                0
            },
            len: if inside { (to - from) as u32 * size } else { 0 },
            address: address.wrapping_add_signed(from * i64::from(size)),
        })?;
    }
    Ok(())
}

/// The type by which elements of a tensor are added, if they can be.
pub(crate) fn sum_type(element: Element) -> Option<flex_block_attn_ptx::Ty> {
    use flex_block_attn_ptx::Ty;
    match element {
        // One half of a pair: the other is zero.
        Element::Bf16 => Some(Ty::Bf16x2),
        Element::F16 => Some(Ty::F16x2),
        Element::F32 => Some(Ty::F32),
        Element::I32 => Some(Ty::S32),
        Element::E4m3 | Element::E5m2 | Element::U8 => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> TensorMap {
        TensorMap {
            element: Element::Bf16,
            address: 0x1000,
            rank: 2,
            dims: [72, 10, 0, 0, 0],
            strides: [2, 160, 0, 0, 0],
            tile: [64, 4, 0, 0, 0],
            swizzle: Swizzle::B128,
        }
    }

    #[test]
    fn rows_end_where_the_tensor_ends() {
        let mut seen = Vec::new();
        let mut collect = |row: Row| {
            seen.push((row.offset, row.skipped, row.len, row.address));
            Ok(())
        };
        rows(&map(), &[64, 8, 0, 0, 0], &mut collect).unwrap();
        rows(&map(), &[-8, -3, 0, 0, 0], &mut collect).unwrap();
        assert_eq!(seen[0], (0, 0, 16, 0x1000 + 8 * 160 + 128));
        assert_eq!(seen[1].2, 16);
        assert_eq!(seen[2].2, 0);
        assert_eq!(seen[4].2, 0);
        assert_eq!(seen[7], (3 * 128, 16, 112, 0x1000));
    }

    #[test]
    fn unknown_layouts_are_refused() {
        assert!(check(&map()).is_ok());
        let short = TensorMap {
            tile: [8, 4, 0, 0, 0],
            ..map()
        };
        assert!(check(&short).is_err());
    }
}
