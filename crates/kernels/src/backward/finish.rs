//! Rounds dq: from the main kernel's float32 sums, which lie as its products leave them, to a tensor.
//!
//! A warp has 16 rows at a time, which are together in the sums; a lane makes 8 columns of one row: a
//! store of 16 bytes of four loads of 8. What a load leaves of its lines, the next ones take.

use flex_block_attn_ptx::builder::Pair;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use super::{ROW_BYTES, UNIT, UNIT_BYTES, Workspace};
use crate::canvas::{self, Canvas, Grid};
use crate::chunk::{self, Rows};
use crate::forward::Tensor;
use crate::gemm::pair;

const THREADS: u32 = 256;
/// Rows that lie together in the sums.
const GROUP: u32 = 16;
/// Columns of a lane's store.
const EIGHT: u32 = 8;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of dq: 64 or 128.
    pub head_dim: u32,
    /// Tokens of the main kernel's pieces, if tokens are a video's.
    pub boxes: Option<u32>,
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Address of the sums, for each head [`Workspace::units`] of 64 rows.
    pub sums: u64,
    /// Gradient of q, to be written.
    pub dq: Tensor,
    /// Batches.
    pub batch: u32,
    /// Heads of q.
    pub heads: u32,
    /// Queries, at least 1; of a video with all padding of tiles.
    pub q_len: u32,
    /// What the sums are multiplied by: the factor of the scores.
    pub scale: f32,
    /// The video: sums are in the order of tiles, dq is not.
    pub canvas: Option<Canvas>,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        [Element::Bf16, Element::F16]
            .iter()
            .flat_map(|&element| {
                let rows = [64, 128].map(|head_dim| (head_dim, None));
                let boxes = super::BOXES.map(|(head_dim, piece)| (head_dim, Some(piece)));
                let config = move |(head_dim, boxes)| Self {
                    element,
                    head_dim,
                    boxes,
                };
                rows.into_iter().chain(boxes).map(config)
            })
            .collect()
    }

    /// The launch for some tensors.
    ///
    /// # Panics
    /// If there are no queries, or dq's address or strides are not multiples of 16 bytes.
    pub fn launch(self, args: &Args) -> Launch {
        assert!(args.q_len > 0, "{args:?}");
        let units = Workspace::new(args.q_len as usize).units as u32;
        let mut list = Vec::from(chunk::args(args.dq));
        list.extend([
            Arg::U64(args.sums),
            Arg::U32(args.q_len),
            Arg::U32(units),
            Arg::U32(args.heads),
            Arg::F32(args.scale),
        ]);
        list.extend(canvas::args(self.boxes, args.canvas));
        Launch {
            grid: [
                args.q_len.div_ceil(GROUP * (THREADS / 32)),
                args.heads,
                args.batch,
            ],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            boxes,
        } = self;
        let tag = canvas::tag(boxes);
        let name = format!("finish_{element:?}_d{head_dim}{tag}").to_lowercase();
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let dq = Rows::new(k, "dq");
        let sums = k.param::<u64>("sums");
        let (q_len, units) = (k.param::<u32>("q_len"), k.param::<u32>("units"));
        let heads = k.param::<u32>("heads");
        let scale = k.param::<f32>("scale");
        let grid = self.boxes.map(|piece| Grid::new(k, piece));

        let group = k.cta_x() * (THREADS / 32) + (k.tid() >> 5);
        let (row, odd) = (k.lane() % GROUP, k.lane() / GROUP);
        let line = k.cta_z() * heads + k.cta_y();
        // The first panel's numbers: those of this lane's row in the group's first 8 columns.
        let panels = self.head_dim / UNIT;
        let row_of_panel = (line * panels).times_wide(units * UNIT) + (group * GROUP).to_u64();
        let own = (row & 7) * 16 + (row >> 3) * 2;
        let first = sums + row_of_panel * u64::from(ROW_BYTES) + own.times_wide(4);
        let panel_bytes = (units * UNIT_BYTES).to_u64();
        let query = group * GROUP + row;
        let (token, inside) = canvas::token(&grid, query, q_len);
        k.if_(inside, || {
            // Two lanes of a row take turns at its eights of columns.
            for i in 0..self.head_dim / EIGHT / 2 {
                let eight = odd + 2 * i;
                let at = (eight & 7) * (4 * GROUP * EIGHT);
                let at = first + panel_bytes * u64::from(2 * i / (UNIT / EIGHT)) + at.to_u64();
                let words = [0, 1, 2, 3].map(|two| {
                    let [a, b]: [Reg<'_, f32>; 2] = k.load_constants(at.at(16 * two));
                    (a * scale).pack(b * scale, self.pair())
                });
                k.store_globals(dq.chunk(token, eight), words);
            }
        });
    }

    fn pair(self) -> Pair {
        pair(self.element)
    }
}
