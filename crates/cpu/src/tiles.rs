//! How the work is cut: tiles of queries ([`row_tiles`]) and, for each, stretches of the keys that
//! its row of the plan keeps ([`KeyTiles`]). Pure functions of lengths and lists; called by the
//! drivers.

use std::ops::Range;

use flex_block_attn_mask::{Extents, block_of, is_partial};

use crate::simd::PANEL;

/// Cuts tokens into ranges of about equal length, `largest` at most.
pub(crate) fn cut(tokens: Range<usize>, largest: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = tokens.len().div_ceil(largest).max(1);
    let length = tokens.len().div_ceil(parts).next_multiple_of(PANEL).max(1);
    let end = tokens.end;
    tokens
        .step_by(length)
        .map(move |start| start..(start + length).min(end))
}

/// Keys that are computed at once: whole panels, perhaps of several blocks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct KeyTile {
    /// Ranges of panels, ascending.
    pub panels: Vec<Range<usize>>,
    /// Keys, those included that only fill up the last panel of the sequence.
    pub columns: usize,
    /// How many keys only fill up; they are the last.
    pub pad: usize,
    /// Columns that belong to partial blocks, and the first's key.
    pub partial: Vec<(Range<usize>, usize)>,
}

/// Cuts a list of key blocks into tiles of `largest` keys at most, adjacent blocks joined.
pub(crate) struct KeyTiles<'a> {
    list: &'a [i32],
    extents: Extents,
    /// Of the list's first block, the panels already taken.
    taken: usize,
    largest: usize,
}

impl<'a> KeyTiles<'a> {
    pub fn new(list: &'a [i32], extents: Extents, largest: usize) -> Self {
        Self {
            list,
            extents,
            taken: 0,
            largest: largest / PANEL,
        }
    }

    /// Writes the next tile over `tile`, whose memory is used again; false at the end.
    pub fn next_into(&mut self, tile: &mut KeyTile) -> bool {
        tile.panels.clear();
        tile.columns = 0;
        tile.pad = 0;
        tile.partial.clear();
        let mut room = self.largest;
        while room > 0 && !self.list.is_empty() {
            let keys = self.extents.kv_tokens(block_of(self.list[0]));
            let start = keys.start / PANEL + self.taken;
            let block_end = keys.end.div_ceil(PANEL);
            let end = block_end.min(start + room);
            match tile.panels.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => tile.panels.push(start..end),
            }
            let columns = tile.columns..tile.columns + (end - start) * PANEL;
            tile.columns = columns.end;
            if is_partial(self.list[0]) {
                tile.partial.push((columns, start * PANEL));
            }
            room -= end - start;
            if end == block_end {
                self.list = &self.list[1..];
                self.taken = 0;
                // Not 0 only at the sequence's end, which is the last that an ascending list has.
                tile.pad = end * PANEL - keys.end;
            } else {
                self.taken += end - start;
            }
        }
        tile.columns > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiles(list: &[i32], extents: Extents, largest: usize) -> Vec<KeyTile> {
        let mut tiles = KeyTiles::new(list, extents, largest);
        let mut all = Vec::new();
        let mut tile = KeyTile::default();
        while tiles.next_into(&mut tile) {
            all.push(std::mem::take(&mut tile));
        }
        all
    }

    #[test]
    fn small_blocks_are_gathered() {
        let extents = Extents::new(16, 200, 16, 16).unwrap();
        let got = tiles(&[0, 1, 5, 7, 12], extents, 48);
        assert_eq!(
            got,
            [
                KeyTile {
                    panels: vec![0..2, 5..6],
                    columns: 48,
                    pad: 0,
                    partial: vec![]
                },
                // Token 200 ends in the middle of panel 12.
                KeyTile {
                    panels: vec![7..8, 12..13],
                    columns: 32,
                    pad: 8,
                    partial: vec![]
                },
            ]
        );
    }

    #[test]
    fn partial_blocks_are_known_by_their_columns() {
        let extents = Extents::new(16, 400, 16, 32).unwrap();
        let partial = |block: i32| block | flex_block_attn_mask::PARTIAL;
        let got = tiles(&[0, partial(1), 3, partial(5)], extents, 80);
        let columns: Vec<_> = got.iter().map(|tile| tile.partial.clone()).collect();
        assert_eq!(columns, [vec![(32..64, 32)], vec![(16..48, 160)]]);
    }

    #[test]
    fn large_blocks_are_cut() {
        let extents = Extents::new(16, 400, 16, 160).unwrap();
        let got = tiles(&[1, 2], extents, 128);
        let panels: Vec<_> = got.iter().flat_map(|tile| tile.panels.clone()).collect();
        assert_eq!(panels, [10..18, 18..25]);
        assert_eq!(got[1].columns, 112);
    }

    #[test]
    fn an_empty_list_has_no_tile() {
        assert!(tiles(&[], Extents::new(16, 16, 16, 16).unwrap(), 128).is_empty());
    }

    #[test]
    fn tokens_are_cut_evenly() {
        assert_eq!(
            cut(0..384, 128).collect::<Vec<_>>(),
            [0..128, 128..256, 256..384]
        );
        assert_eq!(cut(384..530, 128).collect::<Vec<_>>(), [384..464, 464..530]);
        assert_eq!(cut(5..5, 128).count(), 0);
    }
}
