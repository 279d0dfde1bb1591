//! What launches and kernels of both passes share: [`Call`], the sizes of a call and the tensor maps of
//! its tensors; [`Lists`], one side of a plan as a kernel finds it in memory.

use flex_block_attn_mask::{PlanLayout, Side};
use flex_block_attn_ptx::{Arg, Builder, Reg};
use flex_block_attn_tile::Shape;

use crate::forward::Tensor;

/// In an entry of a list: the block is partial.
pub(crate) const PARTIAL: u32 = 1 << 31;

/// Sizes of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) batch: u32,
    pub(crate) heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) q_len: u32,
    pub(crate) kv_len: u32,
    pub(crate) q_block: u32,
    pub(crate) kv_block: u32,
}

impl Call {
    /// # Panics
    /// If batch and heads do not fit 16 bits, key heads do not divide heads, there are no queries or
    /// no keys, or the plan has more words than 32 bits count.
    pub(crate) fn new(layout: PlanLayout, [batch, heads, kv_heads, head_dim]: [u32; 4]) -> Self {
        let extents = layout.extents;
        let fits = |length: usize| u32::try_from(length).expect("lengths below 2^31");
        let call = Self {
            batch,
            heads,
            kv_heads,
            head_dim,
            q_len: fits(extents.q_len()),
            kv_len: fits(extents.kv_len()),
            q_block: fits(extents.q_block()),
            kv_block: fits(extents.kv_block()),
        };
        let short = |extent| (1..=0xffff).contains(&extent);
        assert!(short(batch) && short(heads), "batch and heads of {call:?}");
        assert!(heads.is_multiple_of(kv_heads), "key heads of {call:?}");
        assert!(call.q_len > 0 && call.kv_len > 0, "lengths of {call:?}");
        assert!(u32::try_from(layout.words()).is_ok(), "a plan of {call:?}");
        call
    }

    /// Shape of q and what has its shape.
    pub(crate) fn of_q(self) -> [u64; 4] {
        [self.batch, self.heads, self.q_len, self.head_dim].map(u64::from)
    }

    /// Shape of k and what has its shape.
    pub(crate) fn of_kv(self) -> [u64; 4] {
        [self.batch, self.kv_heads, self.kv_len, self.head_dim].map(u64::from)
    }
}

/// The map for copies of whole tiles.
pub(crate) fn whole(shape: Shape, tensor: Tensor, extents: [u64; 4]) -> Arg {
    Arg::TensorMap(shape.tensor_map(tensor.address, extents, tensor.strides))
}

/// The map for copies of a tile's panels.
pub(crate) fn panels(shape: Shape, tensor: Tensor, extents: [u64; 4]) -> Arg {
    Arg::TensorMap(shape.panel_map(tensor.address, extents, tensor.strides))
}

/// One side of a plan. Words are counted by 32 bits from its start: addresses would take more
/// registers, of which the warps that load have few.
pub(crate) struct Lists<'k> {
    k: &'k Builder,
    pub(crate) plan: Reg<'k, u64>,
    /// Where a record has the counts, the order and the first of its lists, and words from one list
    /// to the next.
    counts: Reg<'k, u32>,
    order: Reg<'k, u32>,
    first_list: Reg<'k, u32>,
    list_stride: Reg<'k, u32>,
    /// Words from one record to the next.
    head_record: Reg<'k, u32>,
    batch_record: Reg<'k, u32>,
}

/// The arguments for [`Lists::new`].
pub(crate) fn args(plan: u64, layout: PlanLayout, side: Side) -> [Arg; 7] {
    // A mask's extent of 1 stands for all.
    let record = |own: usize, words: usize| if own == 1 { 0 } else { words };
    let records = [
        record(layout.heads, layout.record_words()),
        record(layout.batch, layout.heads * layout.record_words()),
    ];
    let side = layout.side(side);
    let places = [side.count(0), side.order(), side.list(0), side.stride];
    let [a, b, c, d] = places.map(|word| Arg::U32(word as u32));
    let [e, f] = records.map(|words| Arg::U32(words as u32));
    [Arg::U64(plan), a, b, c, d, e, f]
}

impl<'k> Lists<'k> {
    /// Declares its parameters.
    pub(crate) fn new(k: &'k Builder) -> Self {
        Self {
            k,
            plan: k.param("plan"),
            counts: k.param("counts"),
            order: k.param("order"),
            first_list: k.param("first_list"),
            list_stride: k.param("list_stride"),
            head_record: k.param("head_record"),
            batch_record: k.param("batch_record"),
        }
    }

    /// A word of the plan.
    pub(crate) fn word(&self, at: Reg<'k, u32>) -> Reg<'k, u32> {
        self.k.load_constant(self.plan + at.times_wide(4))
    }

    /// First word of the record for a head of q.
    pub(crate) fn record(&self, head: Reg<'k, u32>, batch: Reg<'k, u32>) -> Reg<'k, u32> {
        head * self.head_record + batch * self.batch_record
    }

    /// Which list of a record is the `rank`-th longest.
    pub(crate) fn of_rank(&self, record: Reg<'k, u32>, rank: Reg<'k, u32>) -> Reg<'k, u32> {
        self.word(record + self.order + rank)
    }

    /// How many entries a list has.
    pub(crate) fn count(&self, record: Reg<'k, u32>, list: Reg<'k, u32>) -> Reg<'k, u32> {
        self.word(record + self.counts + list)
    }

    /// Where a list starts.
    pub(crate) fn list(&self, record: Reg<'k, u32>, list: Reg<'k, u32>) -> Reg<'k, u32> {
        record + self.first_list + list * self.list_stride
    }
}
