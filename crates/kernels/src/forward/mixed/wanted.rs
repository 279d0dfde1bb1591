//! [`Wanted`]: the tiles of keys and values that a warpgroup wants, found one after the other.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Consumer, Phases, SharedTile, Warpgroup};

use super::{END, OWN_WARPS, Stores};
use crate::forward::Config;

/// What a warpgroup has of the tiles, and where it is.
pub(super) struct Wanted<'k> {
    k: &'k Builder,
    config: Config,
    keys: Consumer<'k>,
    values: Consumer<'k>,
    /// The wants of the first stage.
    notes: Address<'k, u32>,
    /// Bits of a want that are this warpgroup's, and this warp's.
    own: Reg<'k, u32>,
    mine: Reg<'k, u32>,
    /// The stage of k at hand, its wants, and what is to be known of its values.
    stage: Reg<'k, u32>,
    wants: Vec<Reg<'k, u32>>,
    at: Values<'k>,
    /// The values that are held, and those before, which may be held still.
    held: Values<'k>,
    before: Values<'k>,
}

/// A tile's values: their stage, the parity by which to wait for them, and how many tiles there were
/// before, for the same queries.
struct Values<'k> {
    stage: Reg<'k, u32>,
    parity: Reg<'k, u32>,
    number: Reg<'k, u32>,
}

impl<'k> Values<'k> {
    fn uninit(k: &'k Builder) -> Self {
        Self {
            stage: k.uninit(),
            parity: k.uninit(),
            number: k.uninit(),
        }
    }

    fn set(&self, from: &Self) {
        self.stage.set(from.stage);
        self.parity.set(from.parity);
        self.number.set(from.number);
    }
}

impl<'k> Wanted<'k> {
    pub(super) fn new(
        config: Config,
        stores: &Stores<'k>,
        wg: Warpgroup<'k>,
        phases: &Phases<'k>,
    ) -> Self {
        let k = wg.index.builder();
        let first_warp = wg.index * OWN_WARPS;
        let all = (1 << OWN_WARPS) - 1;
        let [at, held, before] = [(); 3].map(|()| Values::uninit(k));
        Self {
            k,
            config,
            keys: stores.keys.consumer(wg.leader, phases),
            values: stores.values.consumer(wg.leader, phases),
            notes: stores.wants,
            own: k.var(all) << first_warp,
            mine: k.var(1u32) << (first_warp + wg.warp),
            stage: k.uninit(),
            wants: (0..config.pieces()).map(|_| k.uninit()).collect(),
            at,
            held,
            before,
        }
    }

    /// Starts with the tiles for the next queries.
    pub(super) fn start(&self) {
        self.stage.set(0u32);
        self.at.stage.set(0u32);
        self.at.number.set(0u32);
    }

    /// Goes on to the next tile that a warp of this warpgroup wants, or to the end. None is held.
    pub(super) fn seek_first(&self) {
        self.k.loop_(|leave| {
            self.look();
            leave.when(self.is_for_us());
            self.pass();
        });
    }

    /// The same, but only as far as keys come for sure while values are held. Another warpgroup may wait for
    /// values whose place ours have: those come as many tiles behind ours as there are places. Keys come
    /// as many tiles ahead of where that one stands as they have places.
    pub(super) fn seek_next(&self) {
        let reach = self.config.stages().iter().sum::<u32>();
        for want in &self.wants {
            want.set(0u32);
        }
        self.k.loop_(|leave| {
            leave.when((self.at.number - self.before.number).ge(reach));
            self.look();
            leave.when(self.is_for_us());
            self.pass();
        });
    }

    /// Whether there are no more tiles for these queries.
    pub(super) fn is_end(&self) -> Reg<'k, bool> {
        self.wants[0].equals(END)
    }

    /// Whether what was sought last was not found.
    pub(super) fn is_none(&self) -> Reg<'k, bool> {
        self.is_end() | !self.is_for_us()
    }

    /// The wants of the tile found.
    pub(super) fn wants(&self) -> &[Reg<'k, u32>] {
        &self.wants
    }

    /// Bits of a want that are this warp's.
    pub(super) fn mine(&self) -> Reg<'k, u32> {
        self.mine
    }

    /// Its keys.
    pub(super) fn keys(&self) -> SharedTile<'k> {
        self.keys.tile_at(self.stage)
    }

    /// First key of one of its pieces, where blocks may be partial.
    pub(super) fn first_key(&self, piece: u32) -> Reg<'k, u32> {
        let behind = self.config.want_bytes();
        self.k
            .load_shared_uniform(self.note().at(behind + 4 * piece))
    }

    /// Gives its keys and its wants back, or the end.
    pub(super) fn release_keys(&self) {
        self.keys.release_at(self.stage);
    }

    /// Holds its values, and no others, to go on.
    pub(super) fn hold_first(&self) {
        self.before.set(&self.at);
        self.held.set(&self.at);
        self.advance();
    }

    /// Holds its values besides those that are held, to go on.
    pub(super) fn hold(&self) {
        self.before.set(&self.held);
        self.held.set(&self.at);
        self.advance();
    }

    /// The values that were held last, when they are there.
    pub(super) fn values(&self) -> SharedTile<'k> {
        self.values.wait_for_at(self.held.stage, self.held.parity);
        self.values.tile_at(self.held.stage)
    }

    /// Gives them back.
    pub(super) fn release_held(&self) {
        self.values.release_at(self.held.stage);
    }

    /// Gives back those that were held before.
    pub(super) fn release_before(&self) {
        self.values.release_at(self.before.stage);
    }

    /// Waits for the stage at hand, and reads who wants it.
    fn look(&self) {
        self.keys.wait_at(self.stage);
        self.at.parity.set(self.values.pass_at(self.at.stage));
        let note = self.note();
        for (i, want) in (0..).zip(&self.wants) {
            want.set(self.k.load_shared_uniform(note.at(4 * i)));
        }
    }

    /// Whether it is the end, or has a piece that a warp of this warpgroup wants.
    fn is_for_us(&self) -> Reg<'k, bool> {
        let (&first, others) = self.wants.split_first().expect("a tile has pieces");
        let any = others.iter().fold(first, |any, &want| any | want);
        (any & self.own).differs(0)
    }

    /// Gives it back and goes on.
    fn pass(&self) {
        self.release_keys();
        self.advance();
    }

    fn advance(&self) {
        let [of_keys, of_values] = self.config.stages();
        for (stage, stages) in [(self.stage, of_keys), (self.at.stage, of_values)] {
            let next = stage + 1;
            stage.set(next.equals(stages).select(0u32, next));
        }
        self.at.number.set(self.at.number + 1);
    }

    fn note(&self) -> Address<'k, u32> {
        self.notes.plus(self.stage * self.config.stage_bytes())
    }
}
