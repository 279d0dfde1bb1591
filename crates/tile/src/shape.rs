//! [`Shape`]: what a tile is, wherever it lies. In: rows, columns, element type. Out: byte counts,
//! panels, and the tensor map by which the TMA unit finds such tiles in a tensor: kernels and
//! launches derive them from one value, so that they agree.

use flex_block_attn_ptx::builder::Value;
use flex_block_attn_ptx::ir::Operand;
use flex_block_attn_ptx::{Element, MAX_RANK, Reg, Swizzle, TensorMap};

/// Bytes of a row of a panel: what the 128-byte swizzle permutes.
pub(crate) const PANEL_ROW: u32 = 128;

/// A tile's extent and element type.
///
/// In shared memory a tile is stored in panels, side by side: a panel holds 128 bytes of each row,
/// row after row, its 16-byte chunks permuted by the 128-byte swizzle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rows: tokens, as a rule.
    pub rows: u32,
    /// Columns: contiguous in global memory.
    pub columns: u32,
    /// Type of the elements.
    pub element: Element,
}

/// Elements from one index to the next, in global memory. Columns are contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Strides {
    /// From a row to the next.
    pub row: u64,
    /// From a head to the next.
    pub head: u64,
    /// From a batch to the next.
    pub batch: u64,
}

/// Coordinates of a (batch, head, row) for [`Shape::tensor_map`]'s maps.
pub const MATRIX_AXES: usize = 5;

/// Where a tile lies in a tensor: its first row and panel, and the head and batch.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// First row.
    pub row: Operand,
    /// First panel: 0 for tiles as wide as the tensor.
    pub panel: Operand,
    /// Head.
    pub head: Operand,
    /// Batch.
    pub batch: Operand,
}

impl Place {
    /// Whole rows from `row` on.
    pub fn rows(row: Reg<'_, u32>, head: Reg<'_, u32>, batch: Reg<'_, u32>) -> Self {
        Self {
            row: row.operand(),
            panel: Operand::Imm(0),
            head: head.operand(),
            batch: batch.operand(),
        }
    }

    /// The same rows from panel `panel` on.
    pub fn panel(self, panel: u32) -> Self {
        Self {
            panel: Operand::Imm(panel.into()),
            ..self
        }
    }

    /// The same, from a panel on that is known at run time.
    pub fn panel_at(self, panel: Reg<'_, u32>) -> Self {
        Self {
            panel: panel.operand(),
            ..self
        }
    }

    /// As a copy's coordinates.
    pub(crate) fn coordinates(self) -> [Operand; MATRIX_AXES] {
        [Operand::Imm(0), self.row, self.panel, self.head, self.batch]
    }
}

impl Shape {
    /// A tile of `rows` x `columns`.
    ///
    /// # Panics
    /// If rows are not whole 8-row groups of the swizzle or exceed a copy's 256, or columns do not
    /// fill panels.
    pub fn new(rows: u32, columns: u32, element: Element) -> Self {
        assert!(
            rows.is_multiple_of(8) && (8..=256).contains(&rows),
            "{rows} rows"
        );
        let row_bytes = columns * element.bytes();
        assert!(
            row_bytes > 0 && row_bytes.is_multiple_of(PANEL_ROW),
            "{columns} columns of {element:?} do not fill panels of {PANEL_ROW} bytes"
        );
        Self {
            rows,
            columns,
            element,
        }
    }

    /// Columns of a panel.
    pub fn panel_columns(self) -> u32 {
        PANEL_ROW / self.element.bytes()
    }

    /// Panels side by side.
    pub fn panels(self) -> u32 {
        self.columns / self.panel_columns()
    }

    /// Bytes of a panel.
    pub fn panel_bytes(self) -> u32 {
        self.rows * PANEL_ROW
    }

    /// Bytes of the tile.
    pub fn bytes(self) -> u32 {
        self.panels() * self.panel_bytes()
    }

    /// The map by which tiles of this shape are copied from and to a (batch, heads, rows, columns)
    /// tensor at `address`. Rows beyond `rows` read as zeros and are not written.
    ///
    /// The panels are a dimension of their own, so one copy moves the whole tile: (column in the
    /// panel, row, panel, head, batch).
    pub fn tensor_map(
        self,
        address: u64,
        [batch, heads, rows, columns]: [u64; 4],
        strides: Strides,
    ) -> TensorMap {
        let bytes = u64::from(self.element.bytes());
        let panel = u64::from(self.panel_columns());
        TensorMap {
            element: self.element,
            address,
            rank: MATRIX_AXES as u32,
            dims: [panel, rows, columns.div_ceil(panel), heads, batch],
            strides: [
                bytes,
                strides.row * bytes,
                PANEL_ROW.into(),
                strides.head * bytes,
                strides.batch * bytes,
            ],
            tile: [self.panel_columns(), self.rows, self.panels(), 1, 1],
            swizzle: Swizzle::B128,
        }
    }

    /// As [`Shape::tensor_map`], for copies of one panel only.
    pub fn panel_map(self, address: u64, extents: [u64; 4], strides: Strides) -> TensorMap {
        let mut map = self.tensor_map(address, extents, strides);
        map.tile[2] = 1;
        map
    }
}

const _: () = assert!(MATRIX_AXES <= MAX_RANK);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_panels_side_by_side() {
        let shape = Shape::new(192, 128, Element::Bf16);
        assert_eq!((shape.panels(), shape.panel_columns()), (2, 64));
        assert_eq!((shape.panel_bytes(), shape.bytes()), (192 * 128, 192 * 256));
        assert_eq!(Shape::new(64, 64, Element::F32).panels(), 2);
        assert_eq!(Shape::new(64, 128, Element::E4m3).panels(), 1);
    }

    #[test]
    fn maps_move_whole_tiles() {
        let shape = Shape::new(128, 128, Element::Bf16);
        let strides = Strides {
            row: 128,
            head: 128 * 1000,
            batch: 128 * 24000,
        };
        let map = shape.tensor_map(4096, [2, 24, 1000, 128], strides);
        assert_eq!(map.tile_bytes(), shape.bytes());
        assert_eq!(map.dims, [64, 1000, 2, 24, 2]);
        assert_eq!(map.strides, [2, 256, 128, 256_000, 6_144_000]);
    }

    #[test]
    #[should_panic(expected = "96 columns of Bf16 do not fill panels")]
    fn part_panels_are_refused() {
        Shape::new(128, 96, Element::Bf16);
    }
}
