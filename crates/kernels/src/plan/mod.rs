//! Mask compaction: the words of a [`flex_block_attn_mask::Plan`] from a mask that lies on the device: a
//! bool matrix, which the host need not ever see, or the bits of a mask that the host has made, which
//! are a fiftieth of its plan.
//!
//! Two launches, on one stream: [`Config::Lists`] writes counts and lists of both sides,
//! [`Config::Order`] then ranks the lists by what they cost. Between them they write every word of
//! the plan. Called by `flex-block-attn`.

mod lists;
mod order;

use flex_block_attn_mask::{PlanLayout, Side};
use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Arg, Builder, Kernel, Launch, Reg};

use crate::canvas::{self, Canvas, PIECE};

/// Threads of a thread block, of both kernels.
const THREADS: u32 = 256;
/// Rows or columns at most: what [`Config::Order`]'s keys have room for.
const MOST_LINES: usize = 65535;

/// Which of the two kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Config {
    /// Counts and lists; the first launch.
    Lists(Form),
    /// Orders, from the counts; the second launch.
    Order {
        /// Whether blocks are a video's tiles, and lists ranked by their boxes.
        canvas: bool,
    },
}

/// What a mask is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// A byte for each block.
    Bytes,
    /// A bit for each, and one for partial blocks.
    Bits,
}

/// A mask in memory: (batch, heads, rows, columns) by the extents of the plan's layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Bytes, not 0 where a block is kept.
    Bytes {
        /// Of the first.
        address: u64,
        /// Bytes from one index to the next, of each dimension; 0 repeats.
        strides: [u64; 4],
    },
    /// As [`flex_block_attn_mask::BlockMask::write_bits`] writes them, at a multiple of 8.
    Bits {
        /// Of the first word.
        address: u64,
    },
}

impl Mask {
    fn form(&self) -> Form {
        match self {
            Self::Bytes { .. } => Form::Bytes,
            Self::Bits { .. } => Form::Bits,
        }
    }
}

/// What both launches are given.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// [`Config::Order`] does not read it.
    pub mask: Mask,
    /// What the plan is for, and where its arrays lie. Its `batch` and `heads` are those of the
    /// plan's records: 1 where one record stands for all.
    pub layout: PlanLayout,
    /// Address of the plan, int32, [`PlanLayout::words`] of them; a multiple of 4.
    pub plan: u64,
    /// The video whose tiles the blocks are, on both sides.
    pub canvas: Option<Canvas>,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        vec![
            Self::Lists(Form::Bytes),
            Self::Lists(Form::Bits),
            Self::Order { canvas: false },
            Self::Order { canvas: true },
        ]
    }

    /// Both, in order, for a mask.
    pub fn of(args: &Args) -> [Self; 2] {
        let canvas = args.canvas.is_some();
        [Self::Lists(args.mask.form()), Self::Order { canvas }]
    }

    /// The launch for some mask.
    ///
    /// # Panics
    /// If the mask has no entries, or more than 65535 rows, columns, heads or batches; if the plan is not
    /// for the video's tiles.
    pub fn launch(self, args: &Args) -> Launch {
        let layout = args.layout;
        let extents = [layout.batch, layout.heads, layout.rows(), layout.columns()];
        let [batch, heads, rows, columns] = extents.map(|extent| {
            assert!((1..=MOST_LINES).contains(&extent), "{args:?}");
            extent as u32
        });
        let address = |words: usize| Arg::U64(args.plan + 4 * words as u64);
        let mut list = Vec::new();
        match (self, args.mask) {
            (Self::Order { .. }, _) => {}
            (Self::Lists(_), Mask::Bytes { address, strides }) => {
                list.push(Arg::U64(address));
                list.extend(strides.map(Arg::U64));
            }
            (Self::Lists(_), Mask::Bits { address }) => {
                let row_bytes = 8 * layout.columns().div_ceil(64);
                let matrix_bytes = (row_bytes * layout.rows()) as u64;
                let partial = address + matrix_bytes * (layout.batch * layout.heads) as u64;
                list.extend([address, partial, matrix_bytes].map(Arg::U64));
                list.push(Arg::U32(row_bytes as u32));
            }
        }
        list.extend([
            Arg::U32(rows),
            Arg::U32(columns),
            Arg::U64(4 * layout.record_words() as u64),
        ]);
        for side in [Side::Rows, Side::Columns].map(|side| layout.side(side)) {
            list.push(address(side.count(0)));
            match self {
                Self::Lists(_) => list.push(address(side.list(0))),
                Self::Order { canvas } => {
                    list.push(address(side.order()));
                    list.extend(canvas.then(|| address(side.list(0))));
                }
            }
        }
        let blocks = match self {
            Self::Lists(_) => lists::blocks(rows, columns),
            Self::Order { canvas } => {
                args.canvas.iter().for_each(|canvas| canvas.check(layout));
                list.extend(canvas::args(canvas.then_some(PIECE), args.canvas));
                order::blocks(rows, columns)
            }
        };
        Launch {
            grid: [blocks, heads, batch],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        match self {
            Self::Lists(form) => {
                let name = match form {
                    Form::Bytes => "plan_lists",
                    Form::Bits => "plan_lists_of_bits",
                };
                Builder::kernel(name, THREADS, |k| lists::body(k, form))
            }
            Self::Order { canvas } => {
                let name = match canvas {
                    false => "plan_order",
                    true => "plan_order_canvas",
                };
                Builder::kernel(name, THREADS, |k| order::body(k, canvas))
            }
        }
    }
}

/// This thread block's record: bytes from the plan's start to it.
#[derive(Clone, Copy)]
struct Record<'k>(Reg<'k, u64>);

impl<'k> Record<'k> {
    fn new(k: &'k Builder) -> Self {
        Self(Self::number(k).to_u64() * k.param::<u64>("record_bytes"))
    }

    fn number(k: &'k Builder) -> Reg<'k, u32> {
        k.cta_z() * k.special(Special::GridY) + k.cta_y()
    }

    /// An array of it, given that of the first record as a parameter.
    fn array(self, k: &'k Builder, name: &str) -> Reg<'k, u64> {
        k.param::<u64>(name) + self.0
    }
}
