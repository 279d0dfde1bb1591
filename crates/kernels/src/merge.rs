//! [`Merge`]: several lists of blocks walked as one. Warps that multiply have 16 tokens each, and so one
//! list of a plan each, but a tile is of eight or twelve warps: lane `w` of a warp that loads stands in
//! the list of warp `w`, the smallest block comes next, and a bit for each lane that has it says who wants
//! it. To some it may be a partial block, to others not.

use flex_block_attn_ptx::{Builder, Reg};

use crate::lists::PARTIAL;

/// Tokens of a warp that multiplies.
pub(crate) const WARP_TOKENS: u32 = 16;
/// In a want, from here on how many of its tokens there are, where it says so.
pub(crate) const TOKENS: u32 = 12;
/// In the place of a block, from here on: there are no more.
pub(crate) const NO_BLOCK: u32 = !PARTIAL;
/// In a want, which has a bit for each warp, from here on those to which the block is partial.
pub(crate) const PARTIAL_WANTS: u32 = 20;

/// In the place of an entry: there are no more.
const NO_ENTRY: u32 = u32::MAX;

/// Ascending lists, being merged by a whole warp.
pub(crate) struct Merge<'k> {
    k: &'k Builder,
    /// Warps that multiply, and lists.
    warps: u32,
    plan: Reg<'k, u64>,
    /// Whether blocks may be partial.
    partial: bool,
    /// The lane's entry, and the one after it, asked for ahead: the answer takes long.
    entry: Reg<'k, u32>,
    after: Reg<'k, u32>,
    /// The word of the plan behind that one, and where the lane's list ends.
    next: Reg<'k, u32>,
    end: Reg<'k, u32>,
}

impl<'k> Merge<'k> {
    /// No lists yet; words are counted from `plan` on. Unless they may be partial, no entry is.
    pub(crate) fn new(k: &'k Builder, warps: u32, plan: Reg<'k, u64>, partial: bool) -> Self {
        Self {
            k,
            warps,
            plan,
            partial,
            entry: k.var(NO_ENTRY),
            after: k.var(NO_ENTRY),
            next: k.var(0u32),
            end: k.var(0u32),
        }
    }

    /// Starts anew with the lists of the warps whose first tokens are from `first` on, `WARP_TOKENS`
    /// each, and below `len`: `list` gives, for a token, its list's first word and its entries.
    pub(crate) fn start(
        &self,
        first: Reg<'k, u32>,
        len: Reg<'k, u32>,
        list: impl FnOnce(Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>),
    ) {
        let k = self.k;
        let token = first + k.lane() * WARP_TOKENS;
        self.next.set(0u32);
        self.end.set(0u32);
        k.if_(k.lane().lt(self.warps) & token.lt(len), || {
            let (start, count) = list(token);
            self.next.set(start);
            self.end.set(start + count);
        });
        self.ask();
        self.advance();
    }

    /// Whether there is an entry left.
    pub(crate) fn some(&self) -> Reg<'k, bool> {
        self.entry.differs(NO_ENTRY).any()
    }

    /// Takes the first block, or [`NO_BLOCK`] if there is none, and who wants it.
    pub(crate) fn take(&self) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let own = match self.partial {
            true => self.entry & !PARTIAL,
            false => self.entry,
        };
        let first = own.warp_min();
        let has_it = own.equals(first);
        let mut wants = has_it.ballot();
        if self.partial {
            let partial = has_it & self.entry.ge(PARTIAL);
            wants |= partial.ballot() << PARTIAL_WANTS;
        }
        self.k.if_(has_it, || self.advance());
        (first, wants)
    }

    fn advance(&self) {
        self.entry.set(self.after);
        self.ask();
    }

    fn ask(&self) {
        let mut next = self.next;
        self.after.set(NO_ENTRY);
        self.k.if_(next.lt(self.end), || {
            let at = self.plan + next.times_wide(4);
            self.after.set(self.k.load_constant::<u32>(at));
            next += 1;
        });
    }
}
