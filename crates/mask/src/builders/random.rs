//! Random masks: what dynamic sparse attention looks like to a kernel. For tests and benchmarks.

use crate::{BlockMask, Extents, MaskError, PlanLayout};

/// 16 GB of plan: whoever asks for more has made a mistake, and would learn of it by an abort.
const MOST_WORDS: usize = 1 << 32;

/// For each row its own random choice of `round(density * kv_blocks)` key blocks, but one at
/// least; for each batch and head another choice. The same seed gives the same mask, on every
/// machine and in every version.
///
/// # Errors
/// A density outside of 0 to 1; a batch and heads whose plan would exceed 2^32 words.
pub fn random(
    extents: Extents,
    batch: usize,
    heads: usize,
    density: f64,
    seed: u64,
) -> Result<BlockMask, MaskError> {
    if !(0.0..=1.0).contains(&density) {
        return Err(MaskError::Parameter {
            argument: "density",
            got: density.to_string(),
            allowed: "from 0 to 1",
        });
    }
    let record_words = PlanLayout {
        extents,
        batch: 1,
        heads: 1,
    }
    .record_words();
    let words = batch
        .checked_mul(heads)
        .and_then(|matrices| matrices.checked_mul(record_words));
    if words.is_none_or(|words| words > MOST_WORDS) {
        return Err(MaskError::Parameter {
            argument: "batch * heads",
            got: format!("{batch} * {heads}"),
            allowed: "small enough for a plan of 2^32 words",
        });
    }
    let columns = extents.kv_blocks();
    let keep = ((density * columns as f64).round() as usize).clamp(1.min(columns), columns);
    let mut generator = SplitMix64(seed);
    let mut deck: Vec<usize> = (0..columns).collect();
    let mut mask = BlockMask::empty(extents, batch, heads);
    for b in 0..batch {
        for h in 0..heads {
            for row in 0..extents.q_blocks() {
                // The first steps of a Fisher-Yates shuffle: any order of the deck will do as
                // a start, so it is not dealt anew.
                for taken in 0..keep {
                    deck.swap(taken, taken + generator.below(columns - taken));
                    mask.insert(b, h, row, deck[taken]);
                }
            }
        }
    }
    Ok(mask)
}

/// Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (2014). Ten lines of our
/// own rather than a crate, since a seed must give the same mask in every version.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `bound`; its bias, under `bound / 2^64`, does not show.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_what_the_density_says() {
        let extents = Extents::new(320, 640, 32, 16).unwrap();
        for (density, count) in [(0.0, 1), (0.2, 8), (0.6, 24), (1.0, 40)] {
            let mask = random(extents, 2, 3, density, 7).unwrap();
            for b in 0..2 {
                for h in 0..3 {
                    for row in 0..10 {
                        assert_eq!(mask.row(b, h, row).count(), count);
                    }
                }
            }
        }
    }

    #[test]
    fn a_seed_is_a_mask_for_ever() {
        let extents = Extents::new(64, 160, 16, 16).unwrap();
        let mask = random(extents, 1, 1, 0.3, 42).unwrap();
        let rows: Vec<Vec<usize>> = (0..4).map(|row| mask.row(0, 0, row).collect()).collect();
        assert_eq!(rows, SEED_42);
        assert_ne!(mask, random(extents, 1, 1, 0.3, 43).unwrap());
    }

    const SEED_42: [[usize; 3]; 4] = [[2, 4, 7], [2, 3, 8], [1, 4, 8], [1, 5, 6]];

    #[test]
    fn every_column_is_as_likely() {
        let extents = Extents::new(16 * 4000, 16 * 10, 16, 16).unwrap();
        let mask = random(extents, 1, 1, 0.3, 1).unwrap();
        for column in 0..10 {
            let kept = (0..4000)
                .filter(|&row| mask.contains(0, 0, row, column))
                .count();
            // Mean 1200, deviation 29.
            assert!(
                (1050..1350).contains(&kept),
                "column {column} is kept {kept} times"
            );
        }
    }

    #[test]
    fn no_keys_no_blocks_and_bad_densities() {
        let extents = Extents::new(64, 0, 16, 16).unwrap();
        assert_eq!(random(extents, 1, 1, 0.5, 0).unwrap().count(), 0);
        assert_eq!(
            random(extents, 1, 1, 1.5, 0).unwrap_err().to_string(),
            "density must be from 0 to 1, got 1.5"
        );
        let extents = Extents::new(64, 64, 16, 16).unwrap();
        assert_eq!(
            random(extents, 1, 1 << 60, 0.5, 0).unwrap_err().to_string(),
            "batch * heads must be small enough for a plan of 2^32 words, got 1 * 1152921504606846976"
        );
    }
}
