//! Full, causal and sliding-window masks.

use crate::{BlockMask, Extents};

/// Every block.
pub fn full(extents: Extents) -> BlockMask {
    BlockMask::from_fn(extents, |_, _| true)
}

/// Every block that holds a pair with `kv <= q`, token positions counted from the start of each
/// sequence. Blocks on the diagonal are computed whole.
pub fn causal(extents: Extents) -> BlockMask {
    BlockMask::from_fn(extents, |row, column| {
        extents.kv_tokens(column).start < extents.q_tokens(row).end
    })
}

/// For each query block, the key blocks that overlap its own tokens widened by `left` tokens
/// before and `right` tokens after. With equal blocks and both widths `n` blocks long, a row
/// keeps `2 n + 1` blocks, fewer at the ends.
pub fn sliding_window(extents: Extents, left: usize, right: usize) -> BlockMask {
    BlockMask::from_fn(extents, |row, column| {
        let (q, kv) = (extents.q_tokens(row), extents.kv_tokens(column));
        kv.end > q.start.saturating_sub(left) && kv.start < q.end.saturating_add(right)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Each mask against its definition over tokens.
        #[test]
        fn equal_their_token_definitions(
            q_len in 0usize..150, kv_len in 0usize..150,
            q_block in 1usize..4, kv_block in 1usize..4,
            left in 0usize..100, right in 0usize..100,
        ) {
            let extents = Extents::new(q_len, kv_len, 16 * q_block, 16 * kv_block).unwrap();
            let causal = causal(extents);
            let window = sliding_window(extents, left, right);
            let full = full(extents);
            for row in 0..extents.q_blocks() {
                for column in 0..extents.kv_blocks() {
                    let (q, kv) = (extents.q_tokens(row), extents.kv_tokens(column));
                    let causal_pair = q.clone().any(|q| kv.clone().any(|kv| kv <= q));
                    prop_assert_eq!(causal.contains(0, 0, row, column), causal_pair);
                    let near = kv.clone().any(|kv| kv + left >= q.start && kv < q.end + right);
                    prop_assert_eq!(window.contains(0, 0, row, column), near);
                    prop_assert!(full.contains(0, 0, row, column));
                }
            }
        }
    }

    #[test]
    fn window_of_whole_blocks() {
        let extents = Extents::new(640, 640, 128, 128).unwrap();
        let mask = sliding_window(extents, 128, 128);
        assert_eq!(mask.row(0, 0, 0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(mask.row(0, 0, 2).collect::<Vec<_>>(), [1, 2, 3]);
        let own = sliding_window(extents, 0, 0);
        assert_eq!(own.row(0, 0, 4).collect::<Vec<_>>(), [4]);
    }
}
