//! Attention over a video in tiles, against its definition: [`Video`].
//!
//! The definition pads: it knows every place of every tile, which token is there, and zeros or a copy
//! where there is none. What kernels do instead, they must show to be the same.

use flex_block_attn::{BlockMask, Plan};
use flex_block_attn_emulator::Memory;
use flex_block_attn_kernels::canvas::{Canvas, Padding};
use flex_block_attn_kernels::{backward, forward};
use flex_block_attn_ptx::Element;

use super::attention::{Workspace, layout};
use super::tensor::{Layout, Tensor};
use super::{Close, Expected, Setup, Step};
use crate::reference::{Problem, Sizes};

/// Attention over a video, forward, or forward and backward.
#[derive(Debug, Clone)]
pub struct Video {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns.
    pub head_dim: u32,
    /// Batches.
    pub batch: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// Sizes, tiles and padding.
    pub canvas: Canvas,
    /// Which tiles, and blocks of text, are seen.
    pub mask: BlockMask,
    /// Factor of the scores.
    pub scale: f64,
    /// Thread blocks at most, forward.
    pub blocks: u32,
    /// How tensors lie in memory.
    pub layout: Layout,
    /// Whether the gradient of q is the same to the last bit each time.
    pub deterministic: bool,
}

/// A place of a tile or of a block of text.
#[derive(Clone, Copy)]
struct Place {
    block: usize,
    /// The token that is there, or that a copy is of.
    token: Option<usize>,
    is_copy: bool,
}

/// All places, in any order.
fn places(canvas: Canvas) -> Vec<Place> {
    let mut places = Vec::new();
    let [time, height, width] = canvas.thw.map(|n| n as usize);
    let [a, b, c] = canvas.tile.map(|n| n as usize);
    let [_, n_h, n_w] = canvas.tiles().map(|n| n as usize);
    let [t_end, h_end, w_end] =
        [(time, a), (height, b), (width, c)].map(|(extent, side)| extent.next_multiple_of(side));
    for t in 0..t_end {
        for h in 0..h_end {
            for w in 0..w_end {
                let inside = t < time && h < height && w < width;
                places.push(Place {
                    block: (t / a * n_h + h / b) * n_w + w / c,
                    token: inside.then_some((t * height + h) * width + w),
                    is_copy: false,
                });
            }
        }
    }
    let (video, text) = (time * height * width, canvas.text_len as usize);
    let (tiles, block) = (canvas.tiles().iter().product::<u32>(), canvas.block());
    for row in 0..text.next_multiple_of(block as usize) {
        places.push(Place {
            block: tiles as usize + row / block as usize,
            token: Some(video + row.min(text - 1)),
            is_copy: row >= text,
        });
    }
    places
}

/// What the definition gives, by tokens.
struct Right {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Video {
    /// One head of one batch, on two thread blocks.
    pub fn new(head_dim: u32, canvas: Canvas, mask: BlockMask) -> Self {
        Self {
            element: Element::Bf16,
            head_dim,
            batch: 1,
            heads: 1,
            kv_heads: 1,
            canvas,
            mask,
            scale: 0.125,
            blocks: 2,
            layout: Layout::default(),
            deterministic: false,
        }
    }

    fn tokens(&self) -> usize {
        (self.canvas.video_len() + self.canvas.text_len) as usize
    }

    fn tensor(&self, heads: usize) -> Tensor {
        Tensor {
            element: self.element,
            shape: [self.batch, heads, self.tokens(), self.head_dim as usize],
            layout: self.layout,
        }
    }

    /// The same, to be written: all of it is looked at.
    fn result(&self, heads: usize) -> Tensor {
        let mut tensor = self.tensor(heads);
        tensor.layout.gap = 0;
        tensor
    }

    fn right(&self, [q, k, v, dout]: [&[f64]; 4]) -> Right {
        let all = places(self.canvas);
        let (tokens, dim) = (self.tokens(), self.head_dim as usize);
        let sizes = Sizes {
            batch: self.batch,
            q_heads: self.heads,
            kv_heads: self.kv_heads,
            q_len: tokens,
            kv_len: all.len(),
            head_dim: dim,
        };
        let lines = self.batch * self.kv_heads;
        let padded = |values: &[f64]| -> Vec<f64> {
            let row = |line: usize, place: &Place| match place.token {
                Some(token) => values[(line * tokens + token) * dim..][..dim].to_vec(),
                None => vec![0.0; dim],
            };
            let rows = (0..lines).flat_map(|line| all.iter().map(move |place| (line, place)));
            rows.flat_map(|(line, place)| row(line, place)).collect()
        };
        let (k, v) = (padded(k), padded(v));
        let mut blocks = vec![0; tokens];
        for place in all.iter().filter(|place| !place.is_copy) {
            if let Some(token) = place.token {
                blocks[token] = place.block;
            }
        }
        let exact = self.canvas.padding == Padding::Exact;
        let mask = &self.mask;
        let keep = |batch: usize, head: usize, query: usize, key: usize| {
            let place = all[key];
            let (batch, head) = (batch % mask.batch(), head % mask.heads());
            let counts = !exact || (place.token.is_some() && !place.is_copy);
            counts && mask.contains(batch, head, blocks[query], place.block)
        };
        let problem = Problem {
            sizes,
            scale: self.scale,
            q,
            k: &k,
            v: &v,
        };
        let attention = problem.attention(&keep);
        let none = vec![0.0; attention.lse.len()];
        let gradients = problem.gradients(&keep, dout, &none);
        let unpadded = |values: &[f64]| {
            let mut sums = vec![0.0; lines * tokens * dim];
            for (at, row) in values.chunks_exact(dim).enumerate() {
                if let Some(token) = all[at % all.len()].token {
                    let line = at / all.len();
                    let sum = &mut sums[(line * tokens + token) * dim..][..dim];
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
            }
            sums
        };
        Right {
            out: attention.out,
            lse: attention.lse,
            dk: unpadded(&gradients.dk),
            dv: unpadded(&gradients.dv),
            dq: gradients.dq,
        }
    }

    /// The forward kernel.
    pub fn forward(&self) -> Setup {
        self.setup(false)
    }

    /// All kernels of both passes: about the backward pass's main one.
    pub fn backward(&self) -> Setup {
        self.setup(true)
    }

    fn setup(&self, both: bool) -> Setup {
        let (element, head_dim, canvas) = (self.element, self.head_dim, self.canvas);
        let config = forward::Config::choose_for_canvas(element, head_dim, canvas.block());
        let config = config.expect("a config for such tiles");
        let (like_q, like_kv) = (self.tensor(self.heads), self.tensor(self.kv_heads));
        let (q, k, v) = (like_q.normal(1), like_kv.normal(2), like_kv.normal(3));
        let dout = like_q.normal(4);
        let (out_q, out_kv) = (self.result(self.heads), self.result(self.kv_heads));
        let right = self.right([&q, &k, &v, &dout]);

        let mut memory = Memory::new();
        let places = canvas.padded_len() as usize;
        let lines = self.batch * self.heads;
        let lse = memory.alloc("lse", 4 * lines * places);
        let args = forward::Args {
            q: like_q.put(&mut memory, "q", &q),
            k: like_kv.put(&mut memory, "k", &k),
            v: like_kv.put(&mut memory, "v", &v),
            out: out_q.alloc(&mut memory, "out"),
            lse: Some(lse),
            plan: memory.alloc_with("plan", Plan::new(&self.mask).words()),
            layout: layout(&self.mask),
            alike: false,
            batch: self.batch as u32,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            scale: self.scale as f32,
            counter: memory.alloc_with("counter", &[0i32]),
            blocks: self.blocks,
            in_parts: None,
            tables: &[],
            canvas: Some(canvas),
        };
        let most = match element {
            Element::F16 => 1e-3,
            _ => 4e-3,
        };
        let mut expected = vec![Expected::new(
            "the output",
            args.out.address,
            element,
            out_q.stored(&right.out),
            Close::Norm(most),
        )];
        // Behind a line's tokens there is room for padding: each token's lse is looked at alone.
        let of_token = |(at, &log_sum): (usize, &f64)| {
            let (line, token) = (at / self.tokens(), at % self.tokens());
            let address = lse + 4 * (line * places + token) as u64;
            Expected::new(
                "lse",
                address,
                Element::F32,
                vec![log_sum],
                Close::Each(1e-4),
            )
        };
        expected.extend(right.lse.iter().enumerate().map(of_token));
        let mut steps = vec![Step::new(config.kernel(), config.launch(&args))];
        if !both {
            return Setup::new(memory, steps, expected).with_scratch(lse);
        }

        let sizes = Sizes {
            batch: self.batch,
            q_heads: self.heads,
            kv_heads: self.kv_heads,
            q_len: places,
            kv_len: places,
            head_dim: head_dim as usize,
        };
        let workspace = Workspace::of(sizes);
        let (batch, heads) = (args.batch, args.heads);
        let deterministic = self.deterministic;
        let bounding = backward::bounds::Args {
            k: args.k,
            v: args.v,
            bounds: match deterministic {
                true => memory.alloc_with("bounds", &vec![0u32; workspace.bounds]),
                false => 0,
            },
            batch,
            heads: args.kv_heads,
            len: self.tokens() as u32,
        };
        let before = backward::prepare::Args {
            out: args.out,
            dout: like_q.put(&mut memory, "dout", &dout),
            lse,
            dlse: 0,
            log2: memory.alloc("log2", 4 * workspace.numbers),
            delta: memory.alloc("delta", 4 * workspace.numbers),
            steps: match deterministic {
                true => memory.alloc("steps", 4 * workspace.numbers),
                false => 0,
            },
            bounds: bounding.bounds,
            sums: memory.alloc("sums", 4 * workspace.sums),
            batch,
            heads,
            kv_heads: args.kv_heads,
            q_len: places as u32,
            canvas: Some(canvas),
        };
        let block = canvas.block();
        let main_config =
            backward::Config::choose_for_canvas(element, head_dim, block, deterministic)
                .expect("a config for such tiles");
        let main = backward::Args {
            q: args.q,
            k: args.k,
            v: args.v,
            dout: before.dout,
            dk: out_kv.alloc(&mut memory, "dk"),
            dv: out_kv.alloc(&mut memory, "dv"),
            lse: before.log2,
            delta: before.delta,
            dq: before.sums,
            steps: before.steps,
            window: backward::WINDOW,
            plan: args.plan,
            layout: args.layout,
            batch,
            heads,
            kv_heads: args.kv_heads,
            scale: args.scale,
            tables: &[],
            in_parts: None,
            canvas: Some(canvas),
        };
        let after = backward::finish::Args {
            sums: main.dq,
            steps: before.steps,
            dq: out_q.alloc(&mut memory, "dq"),
            batch,
            heads,
            q_len: places as u32,
            scale: args.scale,
            canvas: Some(canvas),
        };
        let boxes = Some(main_config.piece);
        let first = backward::prepare::Config {
            element,
            head_dim,
            deterministic,
            boxes,
        };
        let last = backward::finish::Config {
            element,
            head_dim,
            deterministic,
            boxes,
        };
        if deterministic {
            let bounds = backward::bounds::Config { element, head_dim };
            steps.push(Step::new(bounds.kernel(), bounds.launch(&bounding)));
        }
        let about = steps.len() + 1;
        steps.extend([
            Step::new(first.kernel(), first.launch(&before)),
            Step::new(main_config.kernel(), main_config.launch(&main)),
            Step::new(last.kernel(), last.launch(&after)),
        ]);
        let near = |name, like: Tensor, tensor: forward::Tensor, values: &[f64]| {
            let values = like.stored(values);
            Expected::new(name, tensor.address, element, values, Close::Norm(1e-2))
        };
        let mut of_q = near("dq", out_q, after.dq, &right.dq);
        of_q.repeats = self.deterministic;
        expected.extend([
            of_q,
            near("dk", out_kv, main.dk, &right.dk),
            near("dv", out_kv, main.dv, &right.dv),
        ]);
        Setup::new(memory, steps, expected)
            .about(about)
            .with_scratch(lse)
            .with_scratch(main.dq)
            .with_scratch(bounding.bounds)
    }
}
