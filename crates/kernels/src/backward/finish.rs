//! Rounds dq: from the main kernel's sums, float32 or integers, which lie as its products leave them, to
//! a tensor.
//!
//! A warp has 16 rows at a time, which are together in the sums; a lane makes 8 columns of one row: a
//! store of 16 bytes of four loads of 8. What a load leaves of its lines, the next ones take.

use flex_block_attn_ptx::builder::Pair;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use super::{ROW_BYTES, UNIT, UNIT_BYTES, Workspace};
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
    /// Whether the sums are of integers.
    pub deterministic: bool,
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
    /// Queries, at least 1.
    pub q_len: u32,
    /// What the sums are multiplied by: the factor of the scores.
    pub scale: f32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for element in [Element::Bf16, Element::F16] {
            for head_dim in [64, 128] {
                all.extend([false, true].map(|deterministic| Self {
                    element,
                    head_dim,
                    deterministic,
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
            element, head_dim, ..
        } = self;
        let mut name = format!("finish_{element:?}_d{head_dim}").to_lowercase();
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
        let mut scale = k.param::<f32>("scale");
        let steps = self.deterministic.then(|| k.param::<u64>("steps"));

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
        k.if_(query.lt(q_len), || {
            if let Some(steps) = steps {
                let own = line.times_wide((units + 1) * UNIT) + query.to_u64();
                scale *= k.load_constant::<f32>(steps + (own << 2)).reciprocal();
            }
            // Two lanes of a row take turns at its eights of columns.
            for i in 0..self.head_dim / EIGHT / 2 {
                let eight = odd + 2 * i;
                let at = (eight & 7) * (4 * GROUP * EIGHT);
                let at = first + panel_bytes * u64::from(2 * i / (UNIT / EIGHT)) + at.to_u64();
                let words = [0, 1, 2, 3].map(|two| {
                    let at = at.at(16 * two);
                    let [a, b]: [Reg<'_, f32>; 2] = match self.deterministic {
                        false => k.load_constants(at),
                        true => k.load_constants(at).map(Reg::<'_, i32>::to_f32),
                    };
                    (a * scale).pack(b * scale, self.pair())
                });
                k.store_globals(dq.chunk(query, eight), words);
            }
        });
    }

    fn pair(self) -> Pair {
        pair(self.element)
    }
}
