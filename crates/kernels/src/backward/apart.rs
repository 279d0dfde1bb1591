//! How consumers walk tiles of queries that only one of them may want: their keys are of different
//! blocks, and the tiles are those of both lists.
//!
//! A consumer whose keys do not see a tile leaves out all products but dq's, for which it has no
//! gradients to give: zeros. Branches and products in flight do not go together (ptxas would have each
//! product waited for), so unlike where tiles are wanted by both, every tile's products end with it.

use flex_block_attn_ptx::Reg;

use super::consume::Consumer;

impl<'k> Consumer<'_, 'k> {
    /// Walks the tiles of queries.
    pub(super) fn each_apart(&self) {
        let k = self.k;
        self.values_full.wait();
        k.if_(self.seek(0), || {
            self.wait_for_turn();
            self.tile_apart(0, None);
            k.loop_(|leave| {
                for (stage, other) in [(1, 0), (0, 1)] {
                    k.if_not(self.seek(stage), || {
                        // There may have been but one.
                        if other == 0 {
                            self.sync_steps();
                        }
                        self.finish_dq(other);
                        leave.now();
                    });
                    self.tile_apart(stage, Some(other));
                }
            });
        });
    }

    /// Does a tile's products, and dq's of the tile before, with a turn at both ends.
    fn tile_apart(&self, stage: usize, before: Option<usize>) {
        let Self { k, wg, .. } = *self;
        let wanted = || {
            self.issue_scores(stage);
            self.weigh(stage);
            self.issue_dv(stage);
            before.inspect(|&before| self.issue_dq(before));
            self.issue_dk(stage);
            wg.wait(1);
            self.douts.release(stage);
            if let Some(before) = before {
                self.taken.release(before);
                self.give_dq(before);
            }
            wg.wait(0);
        };
        let unwanted = || {
            self.pass_turn();
            self.douts.wait(stage);
            self.rounded.fill(0);
            self.give_gradients(stage);
            self.wait_for_turn();
            self.keep_steps(stage);
            if let Some(before) = before {
                self.issue_dq(before);
                wg.wait(0);
                self.taken.release(before);
                self.give_dq(before);
            }
            self.douts.release(stage);
        };
        k.if_else(self.sees(stage), wanted, unwanted);
        self.queries.release(stage);
    }

    /// Whether this consumer's keys see any of a tile's queries.
    fn sees(&self, stage: usize) -> Reg<'k, bool> {
        let wants = self.wants(stage);
        let any = wants[1..].iter().fold(wants[0], |any, &want| any | want);
        let own = self.k.var(0xfu32) << (self.wg.index * 4);
        (any & own).differs(0)
    }
}
