//! Mask compaction: the words of a [`flex_block_attn_mask::Plan`] from a bool mask that lies on the
//! device, without the host ever seeing it.
//!
//! Two launches, on one stream: [`Config::Lists`] writes counts and lists of both sides,
//! [`Config::Order`] then ranks the lists by their length. Between them they write every word of
//! the plan. Called by `flex-block-attn`.

mod lists;
mod order;

use flex_block_attn_mask::{PlanLayout, Side};
use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Arg, Builder, Kernel, Launch, Reg};

/// Threads of a thread block, of both kernels.
const THREADS: u32 = 256;
/// Rows or columns at most: what [`Config::Order`]'s keys have room for.
const MOST_LINES: usize = 65535;

/// Which of the two kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Config {
    /// Counts and lists; the first launch.
    Lists,
    /// Orders, from the counts; the second launch.
    Order,
}

/// What both launches are given.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Address of the mask, (batch, heads, rows, columns) by the extents of `layout`: a byte an
    /// entry, not 0 where a block is kept. [`Config::Order`] does not read it.
    pub mask: u64,
    /// Bytes from one index of the mask to the next, of each dimension; 0 repeats.
    pub strides: [u64; 4],
    /// What the plan is for, and where its arrays lie. Its `batch` and `heads` are those of the
    /// plan's records: 1 where one record stands for all.
    pub layout: PlanLayout,
    /// Address of the plan, int32, [`PlanLayout::words`] of them; a multiple of 4.
    pub plan: u64,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        vec![Self::Lists, Self::Order]
    }

    /// The launch for some mask.
    ///
    /// # Panics
    /// If the mask has no entries, or more than 65535 rows, columns, heads or batches.
    pub fn launch(self, args: &Args) -> Launch {
        let layout = args.layout;
        let extents = [layout.batch, layout.heads, layout.rows(), layout.columns()];
        let [batch, heads, rows, columns] = extents.map(|extent| {
            assert!((1..=MOST_LINES).contains(&extent), "{args:?}");
            extent as u32
        });
        let address = |words: usize| Arg::U64(args.plan + 4 * words as u64);
        let mut list = Vec::new();
        if self == Self::Lists {
            list.push(Arg::U64(args.mask));
            list.extend(args.strides.map(Arg::U64));
        }
        list.extend([
            Arg::U32(rows),
            Arg::U32(columns),
            Arg::U64(4 * layout.record_words() as u64),
        ]);
        for side in [Side::Rows, Side::Columns].map(|side| layout.side(side)) {
            list.push(address(side.count(0)));
            list.push(match self {
                Self::Lists => address(side.list(0)),
                Self::Order => address(side.order()),
            });
        }
        let blocks = match self {
            Self::Lists => lists::blocks(rows, columns),
            Self::Order => order::blocks(rows, columns),
        };
        Launch {
            grid: [blocks, heads, batch],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        match self {
            Self::Lists => Builder::kernel("plan_lists", THREADS, lists::body),
            Self::Order => Builder::kernel("plan_order", THREADS, order::body),
        }
    }
}

/// This thread block's record: bytes from the plan's start to it.
#[derive(Clone, Copy)]
struct Record<'k>(Reg<'k, u64>);

impl<'k> Record<'k> {
    fn new(k: &'k Builder) -> Self {
        let number = k.cta_z() * k.special(Special::GridY) + k.cta_y();
        Self(number.to_u64() * k.param::<u64>("record_bytes"))
    }

    /// An array of it, given that of the first record as a parameter.
    fn array(self, k: &'k Builder, name: &str) -> Reg<'k, u64> {
        k.param::<u64>(name) + self.0
    }
}
