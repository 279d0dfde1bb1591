//! Sliding Tile Attention: Zhang et al., "Fast Video Generation with Sliding Tile Attention"
//! (arXiv 2502.04507). A video's tokens are grouped into tiles of (frames, rows, columns), a tile
//! is a block, and a tile sees the tiles of a window around it. The window's centre is clamped so
//! that tiles at the border keep as many neighbours as those inside.

use crate::extents::check_block_size;
use crate::{BlockMask, Extents, MaskError};

/// What a sliding-tile mask is made from. Triples are (time, height, width).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StaCanvas {
    /// Tiles along each axis.
    pub tiles: [usize; 3],
    /// Window along each axis, in tiles. An even width `w` acts as `w + 1`.
    pub window: [usize; 3],
    /// Tokens of a tile: the block size of queries and keys.
    pub tile_tokens: usize,
    /// Text tokens behind the video's: they see everything, and everything sees them.
    pub text_tokens: usize,
}

impl StaCanvas {
    /// The tokens' extents: all tiles, then the text, padded by nothing.
    ///
    /// # Errors
    /// A tile that is no multiple of 16 tokens; a canvas without tiles; a window of 0.
    pub fn extents(&self) -> Result<Extents, MaskError> {
        check_block_size("tile_tokens", self.tile_tokens)?;
        for (argument, triple) in [("tiles", self.tiles), ("window", self.window)] {
            if triple.contains(&0) {
                return Err(MaskError::Parameter {
                    argument,
                    got: format!("{triple:?}"),
                    allowed: "three positive numbers (time, height, width)",
                });
            }
        }
        let tokens = self
            .tiles
            .iter()
            .try_fold(self.tile_tokens, |tokens, &axis| tokens.checked_mul(axis))
            .and_then(|tokens| tokens.checked_add(self.text_tokens))
            .unwrap_or(usize::MAX);
        Extents::new(tokens, tokens, self.tile_tokens, self.tile_tokens)
    }
}

/// The sliding-tile mask of a canvas. Tiles are numbered in (time, height, width) order, as are
/// the tokens they hold.
///
/// Per axis with `n` tiles and window `w`, tile `i` sees tile `j` when `|c - j| <= w / 2`, its
/// centre `c` being `i` clamped to `w / 2 ..= n - 1 - w / 2`; where that range is empty, the
/// upper end wins and, as the window then covers the axis, all tiles are seen.
///
/// # Errors
/// Those of [`StaCanvas::extents`].
pub fn sta(canvas: &StaCanvas) -> Result<BlockMask, MaskError> {
    let extents = canvas.extents()?;
    let [_, height, width] = canvas.tiles;
    let video: usize = canvas.tiles.iter().product();
    let place = |tile: usize| [tile / (height * width), tile / width % height, tile % width];
    Ok(BlockMask::from_fn(extents, |row, column| {
        if row >= video || column >= video {
            return true;
        }
        let (q, kv) = (place(row), place(column));
        (0..3).all(|axis| sees(q[axis], kv[axis], canvas.tiles[axis], canvas.window[axis]))
    }))
}

fn sees(q: usize, kv: usize, tiles: usize, window: usize) -> bool {
    let half = (window / 2) as isize;
    let last_centre = tiles as isize - 1 - half;
    let centre = (q as isize).max(half).min(last_centre);
    (centre - kv as isize).abs() <= half
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(tiles: usize, window: usize) -> Vec<Vec<usize>> {
        (0..tiles)
            .map(|q| {
                (0..tiles)
                    .filter(|&kv| sees(q, kv, tiles, window))
                    .collect()
            })
            .collect()
    }

    #[test]
    fn the_centre_is_clamped_at_both_ends() {
        assert_eq!(
            axis(5, 3),
            [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
        );
    }

    #[test]
    fn even_windows_act_as_the_next_odd_one() {
        assert_eq!(axis(6, 2), axis(6, 3));
        assert!(axis(6, 2).iter().all(|row| row.len() == 3));
    }

    #[test]
    fn windows_wider_than_the_axis_see_all_of_it() {
        for tiles in 1..6 {
            for window in tiles..3 * tiles + 2 {
                assert!(axis(tiles, window).iter().all(|row| row.len() == tiles));
            }
        }
    }

    #[test]
    fn the_video_models_mask() {
        // 31 x 45 x 80 tokens in tiles of 6 x 8 x 8, window 3 x 3 x 3, 1985 text tokens: figures
        // worked out by hand in blocks.
        let canvas = StaCanvas {
            tiles: [6, 6, 10],
            window: [3, 3, 3],
            tile_tokens: 384,
            text_tokens: 1985,
        };
        let mask = sta(&canvas).unwrap();
        assert_eq!(mask.extents().q_blocks(), 366);
        assert!((0..360).all(|row| mask.row(0, 0, row).count() == 27 + 6));
        assert!((360..366).all(|row| mask.row(0, 0, row).count() == 366));
    }

    #[test]
    fn mistakes_are_named() {
        let canvas = StaCanvas {
            tiles: [2, 0, 2],
            window: [1, 1, 1],
            tile_tokens: 64,
            text_tokens: 0,
        };
        assert_eq!(
            sta(&canvas).unwrap_err().to_string(),
            "tiles must be three positive numbers (time, height, width), got [2, 0, 2]"
        );
        let odd = StaCanvas {
            tiles: [2, 2, 2],
            tile_tokens: 24,
            ..canvas
        };
        assert_eq!(
            sta(&odd).unwrap_err().to_string(),
            "tile_tokens must be a positive multiple of 16, got 24"
        );
        let huge = StaCanvas {
            tiles: [usize::MAX, 2, 2],
            ..canvas
        };
        assert!(sta(&huge).is_err());
    }
}
