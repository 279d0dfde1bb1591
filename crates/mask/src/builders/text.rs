//! Text that is shorter than what it is padded to: its blocks of nothing but padding are taken out
//! of a mask.

use crate::{BlockMask, MaskError};

/// The mask without blocks of padded text, behind `video_blocks` blocks of video: whatever comes
/// after the last block with text is seen by nobody, and sees itself alone, so that no row is empty.
///
/// `text_tokens` are the tokens of text in each batch, those that count being the first; one block
/// of text is kept at least. Blocks are as long for queries as for keys.
///
/// # Errors
/// A mask of one batch for several, or of several for another number; blocks that differ.
pub fn without_padded_text(
    mask: &BlockMask,
    video_blocks: usize,
    text_tokens: &[usize],
) -> Result<BlockMask, MaskError> {
    let extents = mask.extents();
    if mask.batch() != 1 && mask.batch() != text_tokens.len() {
        return Err(MaskError::Parameter {
            argument: "text_tokens",
            got: format!("{} numbers", text_tokens.len()),
            allowed: "one number for each batch",
        });
    }
    if extents.q_block() != extents.kv_block() || extents.q_len() != extents.kv_len() {
        return Err(MaskError::Parameter {
            argument: "mask",
            got: format!("{mask:?}"),
            allowed: "of as many queries as keys, in equal blocks",
        });
    }
    let mut kept = BlockMask::empty(extents, text_tokens.len(), mask.heads());
    for (batch, tokens) in text_tokens.iter().enumerate() {
        let text_blocks = tokens.div_ceil(extents.kv_block()).max(1);
        let end = (video_blocks + text_blocks).min(extents.kv_blocks());
        for head in 0..mask.heads() {
            for row in 0..end {
                let columns = mask.row(batch.min(mask.batch() - 1), head, row);
                for column in columns.take_while(|&column| column < end) {
                    kept.insert(batch, head, row, column);
                }
            }
            for padded in end..extents.kv_blocks() {
                kept.insert(batch, head, padded, padded);
            }
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Extents;
    use crate::builders::full;

    #[test]
    fn padded_text_sees_itself_alone() {
        // 2 blocks of video, 3 of text, of which a batch each has 0, 1 and 2 in use.
        let mask = full(Extents::new(80, 80, 16, 16).unwrap());
        let cut = without_padded_text(&mask, 2, &[0, 16, 17]).unwrap();
        let rows = |batch: usize| -> Vec<Vec<usize>> {
            (0..5).map(|row| cut.row(batch, 0, row).collect()).collect()
        };
        let one = vec![0, 1, 2];
        assert_eq!(rows(0), [&one[..], &one, &one, &[3], &[4]]);
        assert_eq!(rows(1), rows(0));
        let two = vec![0, 1, 2, 3];
        assert_eq!(rows(2), [&two[..], &two, &two, &two, &[4]]);
    }

    #[test]
    fn each_batch_has_its_text() {
        let mask = BlockMask::empty(Extents::new(80, 80, 16, 16).unwrap(), 2, 1);
        assert_eq!(
            without_padded_text(&mask, 2, &[1]).unwrap_err().to_string(),
            "text_tokens must be one number for each batch, got 1 numbers"
        );
        let uneven = full(Extents::new(80, 80, 32, 16).unwrap());
        assert!(without_padded_text(&uneven, 2, &[1]).is_err());
    }
}
