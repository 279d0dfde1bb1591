//! Rounds dq: from the main kernel's sums, float32 or integers, which lie as its products leave them, to
//! a tensor.
//!
//! A unit's product is columns by queries, and so are its numbers: of every eight queries, for each of four
//! warps, a lane has two neighbouring queries (by its low two bits) in two columns, 8 apart (by the
//! others). A warp here has 16 queries: in each panel a lane loads what eight lanes there had, which is 16
//! columns of two queries.

use flex_block_attn_ptx::builder::Pair;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use super::{EIGHT_BYTES, ROW_BYTES, UNIT, Workspace, prepare};
use crate::canvas::{self, Canvas, Grid};
use crate::chunk::{self, Rows};
use crate::forward::Tensor;
use crate::gemm::pair;

const THREADS: u32 = 256;
/// Rows that lie together in the sums.
const GROUP: u32 = 16;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of dq: 64 or 128.
    pub head_dim: u32,
    /// Whether the sums are of integers.
    pub deterministic: bool,
    /// Tokens of the main kernel's pieces, if tokens are a video's.
    pub boxes: Option<u32>,
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Address of the sums, for each head [`Workspace::units`] of 64 rows.
    pub sums: u64,
    /// Address of how many steps of integers make 1, [`Workspace::line`] for each head; not read if the
    /// sums are float32.
    pub steps: u64,
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
        let mut all = Vec::new();
        for element in [Element::Bf16, Element::F16] {
            let rows = [64, 128].map(|head_dim| (head_dim, None));
            let boxes = super::BOXES.map(|(head_dim, piece)| (head_dim, Some(piece)));
            for (head_dim, boxes) in rows.into_iter().chain(boxes) {
                all.extend([false, true].map(|deterministic| Self {
                    element,
                    head_dim,
                    deterministic,
                    boxes,
                }));
            }
        }
        all
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
        if self.deterministic {
            list.push(Arg::U64(args.steps));
        }
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
            ..
        } = self;
        let mut name = format!("finish_{element:?}_d{head_dim}").to_lowercase();
        name += &canvas::tag(boxes);
        if self.deterministic {
            name += "_deterministic";
        }
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let dq = Rows::new(k, "dq");
        let sums = k.param::<u64>("sums");
        let (q_len, units) = (k.param::<u32>("q_len"), k.param::<u32>("units"));
        let heads = k.param::<u32>("heads");
        let scale = k.param::<f32>("scale");
        let grid = self.boxes.map(|piece| Grid::new(k, piece));
        let steps = self.deterministic.then(|| k.param::<u64>("steps"));

        // Started early, to wait here for the sums.
        k.grid_wait();
        let group = k.cta_x() * (THREADS / 32) + (k.tid() >> 5);
        let line = k.cta_z() * heads + k.cta_y();
        // The lane's columns, sixteen of a panel's 64, and its queries: which eight, and which two.
        let (sixteen, eight, two) = (k.lane() & 3, k.lane() >> 4, (k.lane() >> 2) & 3);
        let first_query = group * GROUP + eight * 8 + two * 2;
        let panels = self.head_dim / UNIT;
        let row_of_panel = (line * panels).times_wide(units * UNIT) + (group * GROUP).to_u64();
        let own = eight * EIGHT_BYTES + sixteen * (4 * 128) + two * 16;
        let first = sums + row_of_panel * u64::from(ROW_BYTES) + own.to_u64();
        let panel_bytes = (units * UNIT).times_wide(ROW_BYTES);
        k.if_(first_query.lt(q_len), || {
            let scales = match steps {
                None => [scale, scale],
                Some(steps) => {
                    let own = line.times_wide((units + 1) * UNIT);
                    let own = own + prepare::place(first_query).to_u64();
                    let steps: [Reg<'_, f32>; 2] = k.load_constants(steps + (own << 2));
                    steps.map(|steps| scale * steps.reciprocal())
                }
            };
            for panel in 0..panels {
                let at = first + panel_bytes * u64::from(panel);
                let fours: [[Reg<'_, f32>; 4]; 8] = std::array::from_fn(|column| {
                    let at = at.at(64 * column as u32);
                    match self.deterministic {
                        false => k.load_constants(at),
                        true => k.load_constants(at).map(Reg::<'_, i32>::to_f32),
                    }
                });
                for (i, scale) in scales.into_iter().enumerate() {
                    let (token, inside) = canvas::token(&grid, first_query + i as u32, q_len);
                    k.if_(inside, || {
                        for half in [0, 1] {
                            let number = |column: usize| fours[column][2 * half + i] * scale;
                            let words = [0, 2, 4, 6]
                                .map(|column| number(column).pack(number(column + 1), self.pair()));
                            let chunk = sixteen * 2 + (8 * panel + half as u32);
                            k.store_globals(dq.chunk(token, chunk), words);
                        }
                    });
                }
            }
        });
    }

    fn pair(self) -> Pair {
        pair(self.element)
    }
}
