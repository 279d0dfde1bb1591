//! [`Cut`]: which tiles of a launch are computed in parts; [`InParts`]: and where these leave what they
//! make. A launch of few tiles leaves multiprocessors idle, at its end or all along; the last tiles' lists
//! are divided then, so that all have work. What the parts make is put together by a launch that follows.
//!
//! Called by launches of both passes; the same arithmetic is in their kernels.

use crate::combine;

/// Jobs of a launch: tiles computed whole, then the parts of the others. Job `whole + slot` is part
/// `slot / tiles` of tile `whole + slot % tiles`; it has the slot for what it makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Tiles that are computed whole.
    pub whole: u32,
    /// Tiles behind those, which are computed in parts.
    pub tiles: u32,
    /// Parts of each of them: from 2 to [`combine::MOST`]; without any such tile 1.
    pub parts: u32,
}

/// A cut with tiles in parts, and memory for what the parts make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InParts {
    /// Which.
    pub cut: Cut,
    /// Address of a slot for each part, a multiple of 16: as large as the pass says. What is there before
    /// does not matter.
    pub slots: u64,
}

/// What [`Cut::choose`] takes a pass to be like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pass {
    /// What it costs to begin with a part, in steps of a list's walk.
    begin: f64,
    /// The longest list, of the mean.
    longest: f64,
}

impl Pass {
    /// Rows of most masks have as many keys each.
    pub const FORWARD: Self = Self {
        begin: 0.5,
        longest: 1.0,
    };
    /// Columns have not: of random rows of 30 blocks, 18 or 6 of them chosen, the longest is 1.3 or 1.5
    /// times the mean.
    pub const BACKWARD: Self = Self {
        begin: 3.0,
        longest: 1.3,
    };
}

/// What it costs to put parts together, in steps of a list's walk (some 2 us).
const JOIN: f64 = 4.0;
/// Lists are not known to who launches: taken to be so much of what they can be.
const DENSITY: f64 = 0.5;
/// A round that leaves so many multiprocessors idle, or more, takes so much of a round's time: power that
/// those do not take is the others' (dense rows, 90 of 132 busy: 6.1 TFLOP/s each, all busy: 5.3).
const IDLE: f64 = 0.15;
const ALONE: f64 = 0.87;
/// What must be gained of the whole.
const LEAST_GAIN: f64 = 0.02;

impl Cut {
    /// No tile is.
    pub fn none(tiles: u32) -> Self {
        Self {
            whole: tiles,
            tiles: 0,
            parts: 1,
        }
    }

    /// For so many tiles of a pass on so many multiprocessors, lists of at most so many entries, and at
    /// most so many steps of the walk through one.
    pub fn choose(pass: Pass, tiles: u32, blocks: u32, entries: u32, steps: u32) -> Self {
        let none = Self::none(tiles);
        if blocks == 0 || entries < 2 {
            return none;
        }
        let rounds = tiles / blocks;
        let candidates = [Some(rounds), rounds.checked_sub(1)].into_iter().flatten();
        let cuts = candidates.flat_map(|rounds| {
            let whole = rounds * blocks;
            (2..=combine::MOST.min(entries)).map(move |parts| Self {
                whole,
                tiles: tiles - whole,
                parts,
            })
        });
        let best = cuts
            .filter(|cut| cut.tiles > 0)
            .map(|cut| (cut.time(pass, blocks, entries, steps), cut))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        match best {
            Some((time, cut))
                if time < none.time(pass, blocks, entries, steps) * (1.0 - LEAST_GAIN) =>
            {
                cut
            }
            _ => none,
        }
    }

    /// About how long it takes, in whole tiles of mean lists one after the other. Tiles that others follow
    /// level out, as the longest lists come first, and so do parts; of a single round the longest decides.
    pub(crate) fn time(self, pass: Pass, blocks: u32, entries: u32, steps: u32) -> f64 {
        let (rounds, rest) = (self.whole / blocks, self.whole % blocks);
        let last = match rest {
            0 => 0.0,
            _ if f64::from(blocks - rest) >= IDLE * f64::from(blocks) => ALONE,
            _ => 1.0,
        };
        let whole = f64::from(rounds) + last;
        if self.tiles == 0 {
            let single = self.whole <= blocks;
            return whole * if single { pass.longest } else { 1.0 };
        }
        let of_parts = f64::from(self.slots().div_ceil(blocks));
        let share = f64::from(entries.div_ceil(self.parts)) / f64::from(entries);
        let cost = (JOIN + pass.begin * of_parts) / (DENSITY * f64::from(steps));
        whole + of_parts * share + cost
    }

    /// That of a launch of so many tiles.
    ///
    /// # Panics
    /// If it is of another number of tiles.
    pub(crate) fn of(in_parts: Option<InParts>, tiles: u32) -> Self {
        let cut = in_parts.map_or(Self::none(tiles), |of| of.cut);
        assert_eq!(cut.whole + cut.tiles, tiles, "tiles of {cut:?}");
        cut
    }

    /// Parts of all tiles.
    pub fn slots(self) -> u32 {
        self.tiles * self.parts
    }

    /// Tiles and parts.
    pub fn jobs(self) -> u32 {
        self.whole + self.slots()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_of_few_tiles_is_cut_and_one_of_many_is_not() {
        // 132 multiprocessors, lists of blocks of 128 keys, tiles of 192.
        let of = |tiles: u32, tokens: u32| {
            Cut::choose(Pass::FORWARD, tiles, 132, tokens / 128, tokens / 192)
        };
        let cut = |whole, tiles, parts| Cut {
            whole,
            tiles,
            parts,
        };
        assert_eq!(of(30, 3840), cut(0, 30, 4));
        assert_eq!(of(150, 19200), cut(132, 18, 7));
        assert_eq!(of(300, 38400), cut(264, 36, 7));
        assert_eq!(of(480, 61440), cut(396, 84, 3));
        // What is gained costs as much.
        assert_eq!(of(90, 11520), Cut::none(90));
        assert_eq!(of(240, 30720), Cut::none(240));
        // As many as multiprocessors, or whole rounds: nothing is gained.
        assert_eq!(of(132, 16896), Cut::none(132));
        assert_eq!(of(660, 84480), Cut::none(660));
        // 2880 tiles of 24 heads: 0.7%.
        assert_eq!(of(2880, 15360), Cut::none(2880));
        // Lists so short that the second launch is longer.
        assert_eq!(of(4, 512), Cut::none(4));
    }

    #[test]
    fn where_lists_differ_a_single_round_is_cut() {
        // Blocks of 384 queries, tiles of 64.
        let of = |tokens: u32| {
            let (tiles, steps) = (tokens / 128, tokens / 64);
            let cut = Cut::choose(Pass::BACKWARD, tiles, 132, tokens / 384, steps);
            (cut.whole, cut.parts)
        };
        assert_eq!(of(11520), (0, 4));
        assert_eq!(of(15360), (0, 2));
        assert_eq!(of(16896), (0, 2));
        // More than a round: others come behind the longest.
        assert_eq!(of(19200), (132, 7));
        assert_eq!(of(30720), (240, 1));
    }

    #[test]
    fn entries_are_not_cut() {
        assert_eq!(Cut::choose(Pass::FORWARD, 4, 132, 1, 100), Cut::none(4));
        assert!(Cut::choose(Pass::FORWARD, 4, 132, 3, 100).parts <= 3);
        assert_eq!(Cut::choose(Pass::FORWARD, 0, 132, 3, 100), Cut::none(0));
    }

    #[test]
    fn every_tile_is_computed() {
        for tiles in 1..700 {
            for entries in [2, 3, 7, 30, 240] {
                for pass in [Pass::FORWARD, Pass::BACKWARD] {
                    let cut = Cut::choose(pass, tiles, 132, entries, 2 * entries);
                    assert_eq!(cut.whole + cut.tiles, tiles);
                    assert!((1..=combine::MOST).contains(&cut.parts), "{cut:?}");
                    assert_eq!(cut.jobs(), cut.whole + cut.tiles * cut.parts);
                }
            }
        }
    }
}
