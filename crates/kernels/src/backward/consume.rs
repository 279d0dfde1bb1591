//! [`Consumer`]: a warpgroup that has 64 of the keys, with their dk and dv in registers.
//!
//! Scores are made transposed, so that they, rounded, are left operands of the products that make dk
//! and dv. The scores' gradients go to shared memory besides: dq's products want those of all keys,
//! which both consumers have a half of. So that neither waits for the other's, dq trails by a tile.
//!
//! The consumers take turns at the tensor cores: while one's products run, the other makes weights and
//! gradients. A turn is all products of a tile, from dv to the gradients of the next one's weights.
//!
//! dk and dv are stored straight from registers: neither consumer waits for the other in the end.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Consumer as Taker, Fragments, Left, Phases, Producer as Giver, RegTile, Right, SharedTile,
    WARPGROUP, Waiter, Warpgroup, four_of_sixteen,
};

use super::kernel::{END, NEXT_PIECE, ROWS, Share, Stores, WANTS};
use super::queries::Problem;
use super::tiles::KeyTile;
use super::{Config, EIGHT_BYTES, KEYS, OWN, UNIT};
use crate::canvas::{self, least_scale};
use crate::exact::{Axis, Where};
use crate::gemm::pair;
use crate::merge::PARTIAL_WANTS;

/// Named barriers: a consumer's own threads at `OWN_SYNC + w`; where consumer `w` waits for its turn,
/// `TURN + w`.
const OWN_SYNC: u32 = 1;
const TURN: u32 = 3;

/// Bytes between what consumers keep of steps: a number for each thread.
pub(super) const KEPT_BYTES: u32 = 4 * WARPGROUP;

/// What a consumer works with.
pub(super) struct Consumer<'a, 'k> {
    pub(super) k: &'k Builder,
    pub(super) config: Config,
    problem: &'a Problem<'k>,
    stores: &'a Stores<'k>,
    /// The first of this thread's keys; the other is the eighth behind it.
    first: Reg<'k, u32>,
    pub(super) wg: Warpgroup<'k>,
    keys_full: Waiter<'k>,
    pub(super) values_full: Waiter<'k>,
    pub(super) queries: Taker<'k>,
    pub(super) douts: Taker<'k>,
    /// Both sides of the exchange of gradients.
    given: Giver<'k>,
    pub(super) taken: Taker<'k>,
    dq_empty: Waiter<'k>,
    own_keys: SharedTile<'k>,
    own_values: SharedTile<'k>,
    /// Of a tile, keys by queries: scores, then weights; the weights' gradients, then the scores'; and
    /// both rounded.
    scores: RegTile<'k>,
    gradients: RegTile<'k>,
    weights: Fragments<'k>,
    pub(super) rounded: Fragments<'k>,
    /// Of a unit, columns by queries.
    dq: RegTile<'k>,
    dk: RegTile<'k>,
    dv: RegTile<'k>,
    hidden: Hidden<'k>,
    /// What scores are multiplied by.
    scale: Reg<'k, f32>,
}

/// Which of a tile's scores are hidden from a thread.
struct Hidden<'k> {
    /// The bit of this thread's warp in a note.
    warp: Reg<'k, u32>,
    /// Whether each of the thread's keys lies in the sequence, and whether all keys of the thread
    /// block do not.
    inside: [Reg<'k, bool>; 2],
    cut: Reg<'k, bool>,
    /// Of a video: what is added to the scores of each of the thread's keys.
    weights: Option<[Reg<'k, f32>; 2]>,
}

impl<'k> Hidden<'k> {
    /// For a thread of a consumer whose first key is `own`.
    fn new(problem: &Problem<'k>, keys: KeyTile<'k>, wg: Warpgroup<'k>, own: Reg<'k, u32>) -> Self {
        let k = problem.k;
        let warp = k.var(1u32) << (wg.index * 4 + wg.warp);
        let Some(grid) = &problem.grid else {
            return Self {
                warp,
                inside: [0, 8].map(|row| (own + row).lt(problem.kv_len)),
                cut: (keys.first + KEYS).gt(problem.kv_len),
                weights: None,
            };
        };
        let spots = [0, 8].map(|row| grid.spot(own + row));
        let inside = spots.map(|spot| grid.is_inside(spot));
        let weights = spots.map(|spot| grid.weight(spot));
        let unlike = weights.map(|weight| weight.gt(0.0));
        let cut = (!(inside[0] & inside[1]) | unlike[0] | unlike[1]).any();
        Self {
            warp,
            inside,
            cut,
            weights: Some(weights),
        }
    }
}

impl<'a, 'k> Consumer<'a, 'k> {
    pub(super) fn new(config: Config, problem: &'a Problem<'k>, stores: &'a Stores<'k>) -> Self {
        let k = problem.k;
        let keys = stores.job.keys(k);
        let wg = Warpgroup::new(k, 1);
        let phases = Phases::new(k);
        let first = keys.first + wg.index * OWN + wg.row();
        let [dk, dv] = [(); 2].map(|()| RegTile::uninit(k, config.head_dim));
        let [scores, gradients] = [(); 2].map(|()| RegTile::uninit(k, config.queries()));
        let [weights, rounded] = [(); 2].map(|()| Fragments::uninit(k, config.queries() / 16));
        Self {
            k,
            config,
            problem,
            stores,
            first,
            wg,
            keys_full: phases.waiter(stores.keys_full),
            values_full: phases.waiter(stores.values_full),
            queries: stores.queries.consumer(wg.leader, &phases),
            douts: stores.douts.consumer(wg.leader, &phases),
            given: stores.gradients.producer(&phases),
            taken: stores.gradients.consumer(wg.leader, &phases),
            dq_empty: phases.waiter_ahead(stores.dq.empty.at(wg.index)),
            own_keys: stores.keys.part(wg.index, OWN),
            own_values: stores.values.part(wg.index, OWN),
            scores,
            gradients,
            weights,
            rounded,
            dq: RegTile::uninit(k, config.unit_rows()),
            dk,
            dv,
            hidden: Hidden::new(problem, keys, wg, first),
            // Masked scores are -inf, of which 0 times would be NaN.
            scale: problem.scale.max(least_scale(config.canvas)) * std::f32::consts::LOG2_E,
        }
    }

    /// Walks the tiles of queries, then stores dk and dv.
    pub(super) fn run(&self) {
        let Self { k, wg, .. } = *self;
        self.dk.fill(0.0);
        self.dv.fill(0.0);
        self.keys_full.wait();
        // The first consumer goes first.
        k.if_(wg.index.equals(0), || k.barrier_arrive(TURN, 2 * WARPGROUP));
        match self.config.apart {
            true => self.each_apart(),
            false => self.each(),
        }
        self.store();
    }

    /// Walks tiles that are wanted by both consumers.
    fn each(&self) {
        let Self { k, wg, .. } = *self;
        let some = || {
            self.wait_for_turn();
            self.issue_scores(0);
            self.values_full.wait();
            self.weigh(0);
            self.issue_dv(0);
            self.issue_dk(0);
            wg.wait(1);
            self.douts.release(0);
            let rest = || {
                self.next_scores(0, 1);
                self.each_after_first();
            };
            k.if_else(self.seek(1), rest, || {
                self.sync_steps();
                self.finish_dq(0);
            });
        };
        // Copies that nobody needs are waited for, too: they write to this thread block's memory.
        k.if_else(self.seek(0), some, || self.values_full.wait());
    }

    /// Does all tiles but the first; dq's of the last, too.
    fn each_after_first(&self) {
        let Self { k, wg, .. } = *self;
        k.loop_(|leave| {
            for (stage, other) in [(1, 0), (0, 1)] {
                self.weigh(stage);
                self.issue_dv(stage);
                self.issue_dq(other);
                self.issue_dk(stage);
                wg.wait(1);
                self.douts.release(stage);
                self.taken.release(other);
                self.give_dq(other);
                k.if_not(self.seek(other), || {
                    self.finish_dq(stage);
                    leave.now();
                });
                self.next_scores(stage, other);
            }
        });
    }

    /// Waits for the next tile, which goes into a stage; says whether there is one.
    pub(super) fn seek(&self, stage: usize) -> Reg<'k, bool> {
        self.queries.wait(stage);
        let line = self.k.load_shared::<u32>(self.stores.notes[stage]);
        line.uniform().differs(END)
    }

    /// Scores of the next tile, while dk of the one before is under way.
    fn next_scores(&self, before: usize, stage: usize) {
        self.issue_scores(stage);
        self.wg.wait(1);
        self.queries.release(before);
    }

    pub(super) fn issue_scores(&self, stage: usize) {
        let q = self.queries.tile(stage);
        self.wg.fence();
        self.wg.product(
            &self.scores,
            Left::Tile(self.own_keys),
            Right::Transposed(q),
        );
    }

    /// Makes weights, their gradients and the scores' gradients of the tile whose scores are under
    /// way, and gives the last to both consumers. The turn at the tensor cores is the other's
    /// meanwhile.
    pub(super) fn weigh(&self, stage: usize) {
        let Self { k, wg, .. } = *self;
        let pair = pair(self.config.element);
        let dout = self.douts.wait(stage);
        wg.fence();
        wg.product(
            &self.gradients,
            Left::Tile(self.own_values),
            Right::Transposed(dout),
        );
        self.pass_turn();
        let wants = self.wants(stage);
        wg.wait(1);
        self.hide(stage, &wants);
        let lse = self.stores.lse[stage];
        each_column(k, wg, lse, &self.scores, |_, score, lse| {
            score.set(score.fma(self.scale, -lse).exp2());
        });
        wg.wait(0);
        // A step of 16 queries at a time: registers of its weights and gradients are free after it.
        let deltas = self.stores.deltas[stage];
        for step in 0..self.weights.steps() {
            let columns = 16 * step as u32..16 * (step as u32 + 1);
            let [weights, gradients] =
                [&self.scores, &self.gradients].map(|tile| tile.part(columns.clone()));
            weights.round_to(&self.weights.part(step), pair);
            each_column(
                k,
                wg,
                deltas.at(4 * columns.start),
                &gradients,
                |i, gradient, delta| {
                    gradient.set((gradient - delta) * weights.registers()[i]);
                },
            );
            gradients.round_to(&self.rounded.part(step), pair);
        }
        self.give_gradients(stage);
        self.wait_for_turn();
        self.keep_steps(stage);
    }

    /// Gives the scores' gradients to both consumers.
    pub(super) fn give_gradients(&self, stage: usize) {
        let Self { k, wg, .. } = *self;
        let (tile, full) = self.given.wait(stage);
        wg.store_transposed(&self.rounded, tile.panel_at(wg.index));
        k.warp_sync();
        k.where_(wg.leader, || full.arrive());
    }

    /// Copies how many steps make 1, of a tile whose dq is made when its stage holds the next one's.
    /// Other threads read them: a turn's wait lies before and behind.
    pub(super) fn keep_steps(&self, stage: usize) {
        let (k, stores) = (self.k, self.stores);
        let (Some(&steps), Some(&kept)) = (stores.steps.get(stage), stores.kept_steps.get(stage))
        else {
            return;
        };
        let thread = k.tid() - WARPGROUP;
        let own = (thread & (WARPGROUP - 1)) * 4;
        k.if_(own.lt(4 * self.config.queries()), || {
            let number = k.load_shared::<u32>(steps.plus(own));
            k.store_shared(kept.plus(thread * 4), number);
        });
        // One lane gives the stage back for all.
        k.warp_sync();
    }

    /// Waits for what the consumer's threads keep of the first tile. Of a later one the dq before has
    /// been taken by the reducer meanwhile, which all of them have waited for.
    pub(super) fn sync_steps(&self) {
        if !self.stores.kept_steps.is_empty() {
            self.wg.sync(self.wg.index + OWN_SYNC);
        }
    }

    /// Where those of this consumer's unit lie, if there are any.
    fn kept_steps(&self, stage: usize) -> Option<Address<'k, u32>> {
        let kept = self.stores.kept_steps.get(stage)?;
        // The second consumer's unit may be of the second half of the queries.
        let next = match self.config.share() {
            Share::Columns => KEPT_BYTES,
            Share::Rows => KEPT_BYTES + 4 * UNIT,
        };
        Some(kept.plus(self.wg.index * next))
    }

    pub(super) fn wait_for_turn(&self) {
        self.k.barrier_sync(self.wg.index + TURN, 2 * WARPGROUP);
    }

    pub(super) fn pass_turn(&self) {
        let other = self.wg.index ^ 1;
        self.k.barrier_arrive(other + TURN, 2 * WARPGROUP);
    }

    /// Which warps' keys see each of a tile's pieces.
    pub(super) fn wants(&self, stage: usize) -> Vec<Reg<'k, u32>> {
        let note = self.stores.notes[stage];
        let want = |i| {
            let place = note.at(WANTS + NEXT_PIECE * i);
            self.k.load_shared::<u32>(place).uniform()
        };
        (0..self.config.pieces()).map(want).collect()
    }

    /// Makes scores -inf that do not count: in pieces not wanted, where the mask's expression hides
    /// them in partial blocks, and of keys behind the last.
    fn hide(&self, stage: usize, wants: &[Reg<'k, u32>]) {
        let Self { k, ref hidden, .. } = *self;
        let columns = |i: u32| i * self.config.piece..(i + 1) * self.config.piece;
        // Mostly all pieces are wanted by all.
        let every = wants[1..]
            .iter()
            .fold(wants[0], |every, &want| every & want);
        k.if_((every & hidden.warp).equals(0), || {
            for (i, &want) in (0..).zip(wants) {
                k.if_((want & hidden.warp).equals(0), || {
                    self.scores.set_columns(columns(i), f32::NEG_INFINITY);
                });
            }
        });
        let Some(exact) = &self.problem.exact else {
            return self.hide_behind_the_last();
        };
        for (i, &want) in (0..).zip(wants) {
            let partial = (want >> PARTIAL_WANTS) & hidden.warp;
            k.if_(partial.differs(0), || {
                let Self { wg, first, .. } = *self;
                let note = self.stores.notes[stage];
                let line = k.load_shared::<u32>(note);
                exact.hide(
                    &self.scores.part(columns(i)),
                    &Where {
                        batch: self.stores.job.keys(k).batch,
                        head: line % self.problem.heads,
                        rows: Axis::Keys(first),
                        first_column: k.load_shared(note.at(ROWS + NEXT_PIECE * i)),
                        lane: wg.lane,
                    },
                );
            });
        }
        self.hide_behind_the_last();
    }

    /// Hides keys behind the last.
    fn hide_behind_the_last(&self) {
        let hidden = &self.hidden;
        self.k.if_(hidden.cut, || {
            for (score, row) in self.scores.elements() {
                if let Some(weights) = hidden.weights {
                    score.set(score + weights[row]);
                }
                score.set(hidden.inside[row].select(score, f32::NEG_INFINITY));
            }
        });
    }

    pub(super) fn issue_dv(&self, stage: usize) {
        let dout = self.douts.tile(stage);
        let weights = Left::Fragments(&self.weights);
        self.wg.fence();
        self.wg.add_product(&self.dv, weights, Right::Tile(dout));
    }

    pub(super) fn issue_dk(&self, stage: usize) {
        let q = self.queries.tile(stage);
        let gradients = Left::Fragments(&self.rounded);
        self.wg.fence();
        self.wg.add_product(&self.dk, gradients, Right::Tile(q));
    }

    /// This consumer's part of a tile's dq, from both consumers' gradients.
    pub(super) fn issue_dq(&self, stage: usize) {
        let wg = self.wg;
        let (gradients, keys) = (self.taken.wait(stage), self.stores.keys);
        let (keys, gradients) = match self.config.share() {
            Share::Columns => (keys.panel_at(wg.index), gradients),
            Share::Rows => (keys, gradients.part(wg.index, UNIT)),
        };
        wg.fence();
        wg.product(
            &self.dq,
            Left::TileTransposed(keys),
            Right::Transposed(gradients),
        );
    }

    /// Gives it to the reducer.
    pub(super) fn give_dq(&self, stage: usize) {
        let Self { k, wg, .. } = *self;
        let out = &self.stores.dq;
        let to = out.units.plus(wg.index * self.config.unit_bytes());
        let to = to.plus(wg.warp * (4 * 128) + wg.lane * 16);
        self.dq_empty.wait();
        // Of eight queries a thread has two, in two columns.
        let place = |eight| to.at(EIGHT_BYTES * eight);
        match self.kept_steps(stage) {
            None => {
                for (eight, four) in (0..).zip(self.dq.registers().chunks_exact(4)) {
                    k.store_shareds(place(eight), std::array::from_fn::<_, 4, _>(|i| four[i]));
                }
            }
            Some(steps) => {
                let mut four = Vec::with_capacity(4);
                each_column(k, wg, steps, &self.dq, |i, number, steps| {
                    four.push((number * steps).to_i32());
                    // Stored as soon as made: there are no registers for more of them.
                    if let &[a, b, c, d] = &four[..] {
                        k.store_shareds(place(i as u32 / 4), [a, b, c, d]);
                        four.clear();
                    }
                });
            }
        }
        // Computed under the guard, ptxas would keep old places for the lanes that are left out.
        let full = out.full.at(wg.index);
        k.warp_sync();
        k.where_(wg.leader, || full.arrive());
    }

    /// dq of the last tile, when its other products are under way. The other consumer's turn has no
    /// end that this one waits for.
    pub(super) fn finish_dq(&self, stage: usize) {
        self.pass_turn();
        self.issue_dq(stage);
        self.wg.wait(0);
        self.give_dq(stage);
    }

    /// Stores dk and dv, as far as there are such keys; in the thread block's slot, if it has one. (K's
    /// and V's places are not free for them: the other consumer may still multiply by these.)
    fn store(&self) {
        let Self {
            k,
            wg,
            first,
            problem,
            stores,
            ..
        } = *self;
        for mut register in self.dk.registers().iter().copied() {
            register *= problem.scale;
        }
        let (keys, (slot, in_slot)) = (stores.job.keys(k), stores.job.slot(k));
        let tokens = [0, 8].map(|row| canvas::token(&problem.grid, first + row, problem.kv_len));
        let own = (four_of_sixteen(wg.lane) * 2).to_u64();
        for (which, gradient, heads) in [(1, &self.dv, problem.dv), (0, &self.dk, problem.dk)] {
            let rows = heads.rows(keys.head, keys.batch);
            let rows = match &problem.tiles.cut {
                None => rows,
                Some(cut) => rows.or(in_slot, cut.slots.rows(slot, k.var(which))),
            };
            let fours = gradient.fours(wg.lane, pair(self.config.element));
            for (row, (token, inside)) in tokens.into_iter().enumerate() {
                let token = match problem.tiles.cut {
                    None => token,
                    Some(_) => in_slot.select(token - keys.first, token),
                };
                let address = rows.row(token) + own;
                k.where_(inside, || {
                    for (i, four) in (0..).zip(&fours) {
                        k.store_globals(address.at(2 * 16 * i), four[row]);
                    }
                });
            }
        }
    }
}

/// Does `body(i, element, number)` for each element, the `i`-th, of a tile whose columns are queries:
/// `numbers` has one for each query, as [`prepare::place`](super::prepare::place) has it.
fn each_column<'k>(
    k: &'k Builder,
    wg: Warpgroup<'k>,
    numbers: Address<'k, u32>,
    tile: &RegTile<'k>,
    mut body: impl FnMut(usize, Reg<'k, f32>, Reg<'k, f32>),
) {
    // Of every 16 columns a thread has four, two in each eight, in both of its rows.
    let own = numbers.plus((wg.lane & 3) * 16);
    for (sixteen, eight) in tile.registers().chunks_exact(8).enumerate() {
        let four: [Reg<'k, f32>; 4] = k.load_shareds(own.at(64 * sixteen as u32));
        for (i, &element) in eight.iter().enumerate() {
            body(8 * sixteen + i, element, four[i / 4 * 2 + i % 2]);
        }
    }
}
