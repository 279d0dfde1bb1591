//! A block mask as text, for a terminal: each cell's shade is the share of its blocks that are
//! selected.

use crate::BlockMask;

const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];

impl BlockMask {
    /// A picture of one batch's and head's blocks, at most `columns` characters wide and half as
    /// many lines high (a character is about twice as high as wide).
    ///
    /// `·` no block of the cell is selected, `░▒▓` some are, `█` all are.
    ///
    /// # Panics
    /// When batch or head lie outside of the mask.
    pub fn picture(&self, batch: usize, head: usize, columns: usize) -> String {
        let extents = self.extents();
        let (rows, cols) = (extents.q_blocks(), extents.kv_blocks());
        let wide = columns.clamp(1, 400).min(cols);
        let high = columns.div_ceil(2).clamp(1, 200).min(rows);
        // A cell's first block; cells differ by one block where the sizes do not divide.
        let edge = |cell: usize, cells: usize, blocks: usize| cell * blocks / cells;
        let mut text = String::new();
        for y in 0..high {
            let mut counts = vec![0usize; wide];
            let (top, bottom) = (edge(y, high, rows), edge(y + 1, high, rows));
            for row in top..bottom {
                for column in self.row(batch, head, row) {
                    // The inverse of `edge`: the cell whose range holds the column.
                    counts[((column + 1) * wide - 1) / cols] += 1;
                }
            }
            for (x, &count) in counts.iter().enumerate() {
                let all = (bottom - top) * (edge(x + 1, wide, cols) - edge(x, wide, cols));
                let shade = match count {
                    0 => 0,
                    _ if count == all => SHADES.len() - 1,
                    _ => 1 + count * (SHADES.len() - 2) / all,
                };
                text.push(SHADES[shade]);
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use crate::{BlockMask, Extents, builders};

    #[test]
    fn small_masks_show_every_block() {
        let extents = Extents::new(64, 96, 16, 16).unwrap();
        let mask = builders::causal(extents);
        assert_eq!(mask.picture(0, 0, 80), "█·····\n██····\n███···\n████··\n");
    }

    #[test]
    fn large_masks_are_shaded() {
        let extents = Extents::new(16 * 100, 16 * 90, 16, 16).unwrap();
        let picture = builders::sliding_window(extents, 160, 160).picture(0, 0, 10);
        assert_eq!(picture.lines().count(), 5);
        assert!(picture.lines().all(|line| line.chars().count() == 10));
        assert!(picture.contains('▓') && picture.contains('·'));
        // Cells count all of their blocks: a full mask is solid whatever the sizes.
        let full = builders::full(extents).picture(0, 0, 7);
        assert!(full.chars().all(|c| c == '█' || c == '\n'));
    }

    #[test]
    fn no_blocks_no_picture() {
        let extents = Extents::new(0, 64, 16, 16).unwrap();
        assert_eq!(BlockMask::empty(extents, 1, 1).picture(0, 0, 10), "");
    }
}
