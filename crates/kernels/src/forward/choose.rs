//! Which config computes what. In: what a call asks for. Out: the config, if there is one.

use flex_block_attn_ptx::Element;

use super::{Config, Rows};

impl Config {
    /// The config for a head dimension and blocks of so many queries and keys; none if head_dim is
    /// neither 64 nor 128, or blocks are no multiples of 16.
    pub fn choose(element: Element, head_dim: u32, q_block: u32, kv_block: u32) -> Option<Self> {
        let supported = matches!(head_dim, 64 | 128)
            && [q_block, kv_block]
                .iter()
                .all(|&block| block > 0 && block.is_multiple_of(16));
        // Wide tiles cost the fewest instructions a key, even if put together from pieces; pieces are
        // as large as blocks allow.
        let whole = [(192, 192), (192, 64), (128, 32), (128, 16)];
        let mixed = [(64, 64), (64, 32), (64, 16)];
        // Short heads leave so much of the softmax to hide that two warpgroups are too few.
        let tall = [(128, 128), (128, 64), (128, 32), (128, 16)];
        let (rows, tiles) = match head_dim {
            64 if q_block.is_multiple_of(192) => (Rows::Whole(192), &tall[..]),
            _ if q_block.is_multiple_of(128) => (Rows::Whole(128), &whole[..]),
            _ => (Rows::Mixed, &mixed[..]),
        };
        let fits = |&&(_, piece): &&(u32, u32)| kv_block.is_multiple_of(piece);
        let &(kv_tile, piece) = tiles.iter().find(fits).filter(|_| supported)?;
        Some(Self {
            element,
            head_dim,
            rows,
            kv_tile,
            piece,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_is_a_config_there_is() {
        let all = Config::all();
        for head_dim in [64, 128] {
            for q_block in (16..=400).step_by(16) {
                for kv_block in (16..=800).step_by(16) {
                    let config = Config::choose(Element::F16, head_dim, q_block, kv_block)
                        .unwrap_or_else(|| panic!("{q_block} x {kv_block}"));
                    assert!(all.contains(&config), "{config:?}");
                    assert!(kv_block.is_multiple_of(config.piece), "{config:?}");
                }
            }
        }
        assert_eq!(Config::choose(Element::Bf16, 96, 64, 64), None);
        assert_eq!(Config::choose(Element::Bf16, 64, 24, 64), None);
        assert_eq!(Config::choose(Element::Bf16, 64, 64, 0), None);
    }
}
