//! Which config computes what. In: what a call asks for. Out: the config, if there is one.

use flex_block_attn_mask::PlanLayout;
use flex_block_attn_ptx::Element;

use super::{Config, Rows};
use crate::canvas::PIECE;
use crate::cut::{Cut, Pass};
use crate::exact::Mask;

/// How fast queries are computed by pairs of tiles of so many where tiles of 128 alone have 1, and all
/// multiprocessors are busy (decision 15).
const PAIRS_OF_128: f64 = 1.035;
const PAIRS_OF_192: f64 = 1.07;
/// And by tiles of several blocks: where rows are alike a little faster than the 0.7 of blocks of 64 at
/// densities of 0.2 (by `benchmark.gpu`; an estimate).
const OF_SEVERAL: f64 = 0.8;
/// By how many whole tiles, one after the other, a launch with tiles in parts is shorter than expected:
/// tiles are divided with care, lest it be for nothing (heads of 19,200, 46,080 and 69,120 tokens, beside
/// pairs: 0.2 to 0.3).
const CARE: f64 = 0.25;

/// Keys of a tile and of a piece.
type Tiles = &'static [(u32, u32)];

impl Config {
    /// The config for a head dimension, blocks of so many queries and keys, and a mask's expression, if
    /// it has one; none if head_dim is neither 64 nor 128, or blocks are no multiples of 16.
    pub fn choose(
        element: Element,
        head_dim: u32,
        q_block: u32,
        kv_block: u32,
        mask: Option<Mask>,
    ) -> Option<Self> {
        // As measured by `benchmark.tune`. Wide tiles cost the fewest instructions a key, even if put
        // together from pieces; pieces are as large as blocks allow. Short heads leave so much of the
        // softmax to hide that two warpgroups are too few.
        const NARROW: Tiles = &[(128, 128), (128, 64), (128, 32), (128, 16)];
        const WIDE: Tiles = &[(192, 192), (192, 64), (128, 32), (128, 16)];
        const MIXED: (Rows, Tiles) = (Rows::Mixed, &[(64, 64), (64, 32), (64, 16)]);
        let order: &[(Rows, Tiles)] = match head_dim {
            128 => &[(Rows::Whole(128), WIDE), MIXED],
            64 => &[(Rows::Whole(192), NARROW), (Rows::Whole(128), WIDE), MIXED],
            _ => return None,
        };
        let configs = order.iter().flat_map(|&(rows, tiles)| {
            tiles.iter().map(move |&(kv_tile, piece)| Self {
                element,
                head_dim,
                rows,
                kv_tile,
                piece,
                mask,
                canvas: false,
            })
        });
        let mut configs = configs.filter(|config| config.takes(q_block, kv_block));
        configs.next()
    }

    /// The config that does the same by pairs of thread blocks, if that is likely to be faster than by this
    /// one with such a cut: for a plan, whose rows are known to be `alike` or not, for so many heads of all
    /// batches, on so many multiprocessors.
    pub fn in_pairs(
        self,
        cut: Cut,
        layout: PlanLayout,
        alike: bool,
        lines: u32,
        blocks: u32,
    ) -> Option<Self> {
        // Of a tile's two panels each thread block copies one. Pieces are those that kernels are made for.
        let fits = self.head_dim == 128 && matches!(self.piece, 64 | 192);
        if !fits || self.mask.is_some() || self.canvas || blocks < 2 {
            return None;
        }
        let [q_block, kv_block] =
            [layout.extents.q_block(), layout.extents.kv_block()].map(|block| block as u32);
        let time = |pairs: Self| {
            let jobs = lines * pairs.jobs_of_head(layout, alike);
            pairs.time(Cut::none(jobs), layout, pairs.takers(blocks))
        };
        let pairs = [(128, 192, self.piece), (192, 64, 64)].map(|(queries, kv_tile, piece)| Self {
            rows: Rows::Pairs(queries),
            kv_tile,
            piece,
            ..self
        });
        let (least, best) = pairs
            .into_iter()
            .filter(|pairs| alike || pairs.takes(q_block, kv_block))
            .map(|pairs| (time(pairs), pairs))
            .min_by(|a, b| a.0.total_cmp(&b.0))?;
        let care = if cut.tiles > 0 { CARE } else { 0.0 };
        let alone = self.time(cut, layout, blocks) - care * f64::from(self.queries());
        (least < alone).then_some(best)
    }

    /// About how long so many takers are busy, in the time that a tile of 128 alone takes for a query.
    fn time(self, cut: Cut, layout: PlanLayout, takers: u32) -> f64 {
        let speed = match self.rows {
            Rows::Whole(_) => 1.0,
            Rows::Mixed => OF_SEVERAL,
            Rows::Pairs(128) => PAIRS_OF_128,
            Rows::Pairs(_) => PAIRS_OF_192,
        };
        let entries = layout.columns() as u32;
        let jobs = cut.time(Pass::FORWARD, takers, entries, self.steps(layout));
        jobs * f64::from(self.queries()) / speed
    }

    /// The config for a head dimension and a video in tiles of so many tokens; none if head_dim is
    /// neither 64 nor 128, or tiles are no multiples of 16.
    pub fn choose_for_canvas(element: Element, head_dim: u32, block: u32) -> Option<Self> {
        let mut configs = Self::all_of_canvases(element, head_dim);
        configs.find(|config| config.takes(block, block))
    }

    /// All configs for videos.
    pub(super) fn all_of_canvases(element: Element, head_dim: u32) -> impl Iterator<Item = Self> {
        // Small boxes have fewer tokens beside the video. To hide scores takes registers, which three
        // warpgroups do not leave.
        let order: &[(Rows, u32, u32)] = match head_dim {
            64 | 128 => &[(Rows::Whole(128), 192, PIECE)],
            _ => &[],
        };
        order.iter().map(move |&(rows, kv_tile, piece)| Self {
            element,
            head_dim,
            rows,
            kv_tile,
            piece,
            mask: None,
            canvas: true,
        })
    }

    /// Whether it can compute masks of blocks of so many queries and keys.
    pub fn takes(self, q_block: u32, kv_block: u32) -> bool {
        let queries = match self.rows {
            Rows::Whole(queries) => queries,
            Rows::Pairs(_) => self.queries_of_job(),
            Rows::Mixed => 16,
        };
        [(q_block, queries), (kv_block, self.piece)]
            .iter()
            .all(|&(block, part)| block > 0 && block.is_multiple_of(part))
    }
}

#[cfg(test)]
mod tests {
    use flex_block_attn_mask::{BlockMask, Extents, Plan};

    use super::*;

    #[test]
    fn few_tiles_are_divided_before_they_come_in_pairs() {
        let chosen = |heads: u32, tokens: usize, alike: bool| {
            let config = Config::choose(Element::Bf16, 128, 384, 384, None).expect("128 columns");
            let extents = Extents::new(tokens, tokens, 384, 384).expect("whole blocks");
            let layout = Plan::new(&BlockMask::from_fn(extents, |_, _| true)).layout();
            let cut = config.cut(layout, heads, 132);
            let pairs = config.in_pairs(cut, layout, alike, heads, 132);
            pairs.map_or(config.rows, |pairs| pairs.rows)
        };
        for alike in [false, true] {
            for tokens in [19_200, 46_080, 69_120] {
                assert_eq!(chosen(1, tokens, alike), Rows::Whole(128), "{tokens}");
            }
            for tokens in [15_360, 30_720, 61_440] {
                assert_eq!(chosen(24, tokens, alike), Rows::Pairs(192), "{tokens}");
            }
        }
    }

    #[test]
    fn every_choice_is_a_config_there_is() {
        let all = Config::all();
        for head_dim in [64, 128] {
            for q_block in (16..=400).step_by(16) {
                for kv_block in (16..=800).step_by(16) {
                    let config = Config::choose(Element::F16, head_dim, q_block, kv_block, None)
                        .unwrap_or_else(|| panic!("{q_block} x {kv_block}"));
                    assert!(all.contains(&config), "{config:?}");
                    assert!(kv_block.is_multiple_of(config.piece), "{config:?}");
                    let [q, kv] = [q_block, kv_block].map(|block| block as usize);
                    let extents = Extents::new(8 * q, 8 * kv, q, kv).unwrap();
                    let layout = Plan::new(&BlockMask::from_fn(extents, |_, _| true)).layout();
                    let cut = config.cut(layout, 96, 132);
                    if let Some(pairs) = config.in_pairs(cut, layout, true, 96, 132) {
                        assert!(all.contains(&pairs), "{pairs:?}");
                    }
                    if let Some(pairs) = config.in_pairs(cut, layout, false, 96, 132) {
                        assert!(all.contains(&pairs), "{pairs:?}");
                        assert!(pairs.takes(q_block, kv_block), "{pairs:?}");
                    }
                }
            }
        }
        assert_eq!(Config::choose(Element::Bf16, 96, 64, 64, None), None);
        assert_eq!(Config::choose(Element::Bf16, 64, 24, 64, None), None);
        assert_eq!(Config::choose(Element::Bf16, 64, 64, 0, None), None);
    }
}
