//! Attention, against its definition in float64: [`Forward`] and [`Backward`].

use flex_block_attn::{BlockMask, Plan, PlanLayout};
use flex_block_attn_emulator::Memory;
use flex_block_attn_kernels::cut::{Cut, InParts};
use flex_block_attn_kernels::exact::Table;
use flex_block_attn_kernels::{backward, forward};
use flex_block_attn_ptx::Element;

use super::tensor::{Layout, Tensor, rounded};
use super::{Close, Expected, Rule, Setup, Step};
use crate::reference::{Problem, Sizes};

/// Attention forward.
#[derive(Debug, Clone)]
pub struct Forward {
    /// The kernel.
    pub config: forward::Config,
    /// Batches.
    pub batch: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// Lengths, blocks, and which of them are seen.
    pub mask: BlockMask,
    /// What counts of these, if not all; the config is for it.
    pub rule: Option<Rule>,
    /// Factor of the scores.
    pub scale: f64,
    /// Thread blocks at most.
    pub blocks: u32,
    /// How many tiles are computed whole, and in how many parts the others; none if all are whole.
    pub in_parts: Option<(u32, u32)>,
    /// Whether all rows of a head have one list, and the launch is told so.
    pub alike: bool,
    /// Whether tensors are (batch, tokens, heads, head_dim) in memory.
    pub tokens_first: bool,
    /// Whether the lse is wanted.
    pub lse: bool,
}

/// Attention backward: all its kernels.
#[derive(Debug, Clone)]
pub struct Backward {
    /// The main kernel.
    pub config: backward::Config,
    /// Batches.
    pub batch: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// Lengths, blocks, and which of them are seen.
    pub mask: BlockMask,
    /// What counts of these, if not all; the config is for it.
    pub rule: Option<Rule>,
    /// Factor of the scores.
    pub scale: f64,
    /// Queries among which thread blocks start that walk all.
    pub window: u32,
    /// Which tiles of keys are computed in parts, if any.
    pub cut: Option<Cut>,
}

/// Who sees whom: batch, head, query and key.
fn seen<'a>(
    mask: &'a BlockMask,
    rule: &'a Option<Rule>,
) -> impl Fn(usize, usize, usize, usize) -> bool + 'a {
    let extents = mask.extents();
    move |batch, head, query, key| {
        let (row, column) = (query / extents.q_block(), key / extents.kv_block());
        // A mask's extent of 1 stands for all.
        mask.contains(batch % mask.batch(), head % mask.heads(), row, column)
            && rule
                .as_ref()
                .is_none_or(|rule| rule.counts(batch, head, query, key))
    }
}

/// A mask's plan and a rule's tables, in memory.
fn planned(mask: &BlockMask, rule: &Option<Rule>, memory: &mut Memory) -> (u64, Vec<Table>) {
    match rule {
        None => (
            memory.alloc_with("plan", Plan::new(mask).words()),
            Vec::new(),
        ),
        Some(rule) => (
            memory.alloc_with("plan", &rule.plan(mask)),
            rule.tables(memory),
        ),
    }
}

pub(super) fn layout(mask: &BlockMask) -> PlanLayout {
    PlanLayout {
        extents: mask.extents(),
        batch: mask.batch(),
        heads: mask.heads(),
    }
}

/// Tensors like q, and like k and v.
fn tensors(element: Element, sizes: Sizes, layout: Layout) -> [Tensor; 2] {
    [sizes.q_shape(), sizes.kv_shape()].map(|shape| Tensor {
        element,
        shape,
        layout,
    })
}

impl Forward {
    /// One head of one batch, on two thread blocks.
    pub fn new(config: forward::Config, mask: BlockMask) -> Self {
        Self {
            config,
            batch: 1,
            heads: 1,
            kv_heads: 1,
            mask,
            rule: None,
            scale: 0.125,
            blocks: 2,
            in_parts: None,
            alike: false,
            tokens_first: false,
            lse: true,
        }
    }

    /// The kernel with tensors.
    pub fn setup(&self) -> Setup {
        let extents = self.mask.extents();
        let element = self.config.element;
        let sizes = Sizes {
            batch: self.batch,
            q_heads: self.heads,
            kv_heads: self.kv_heads,
            q_len: extents.q_len(),
            kv_len: extents.kv_len(),
            head_dim: self.config.head_dim as usize,
        };
        let layout = Layout {
            tokens_first: self.tokens_first,
            gap: 0,
        };
        let [like_q, like_kv] = tensors(element, sizes, layout);
        let (q, k, v) = (like_q.normal(1), like_kv.normal(2), like_kv.normal(3));
        let problem = Problem {
            sizes,
            scale: self.scale,
            q: &q,
            k: &k,
            v: &v,
        };
        let expected = problem.attention(&seen(&self.mask, &self.rule));

        let mut memory = Memory::new();
        let (plan, tables) = planned(&self.mask, &self.rule, &mut memory);
        let args = forward::Args {
            plan,
            tables: &tables,
            canvas: None,
            ..self.args(&problem, &mut memory, [like_q, like_kv])
        };
        // What rounding weights and output costs.
        let most = match element {
            Element::F16 => 1e-3,
            _ => 4e-3,
        };
        let out = like_q.stored(&expected.out);
        let mut results = vec![Expected::new(
            "the output",
            args.out.address,
            element,
            out,
            Close::Norm(most),
        )];
        // Large scores are rounded by as much.
        let most = 1e-4f64.max(4e-5 * self.scale);
        results.extend(
            args.lse.map(|lse| {
                Expected::new("lse", lse, Element::F32, expected.lse, Close::Each(most))
            }),
        );
        let mut steps = vec![Step::new(self.config.kernel(), self.config.launch(&args))];
        if let Some((config, launch)) = self.config.join(&args) {
            steps.push(Step::new(config.kernel(), launch));
        }
        let setup = Setup::new(memory, steps, results);
        match args.in_parts {
            Some(in_parts) => setup.with_scratch(in_parts.slots),
            None => setup,
        }
    }

    fn args(
        &self,
        problem: &Problem<'_>,
        memory: &mut Memory,
        [like_q, like_kv]: [Tensor; 2],
    ) -> forward::Args<'static> {
        let numbers: usize = problem.sizes.lse_shape().iter().product();
        let layout = layout(&self.mask);
        let lines = (self.batch * self.heads) as u32;
        let in_parts = self.in_parts.map(|(whole, parts)| {
            let tiles = self.config.cut(layout, lines, 0).whole - whole;
            let cut = Cut {
                whole,
                tiles,
                parts,
            };
            let slots = memory.alloc("slots", self.config.slot_bytes(cut));
            InParts { cut, slots }
        });
        forward::Args {
            q: like_q.put(memory, "q", problem.q),
            k: like_kv.put(memory, "k", problem.k),
            v: like_kv.put(memory, "v", problem.v),
            out: like_q.alloc(memory, "out"),
            lse: self.lse.then(|| memory.alloc("lse", 4 * numbers)),
            plan: 0,
            layout,
            alike: self.alike,
            batch: self.batch as u32,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            scale: self.scale as f32,
            counter: memory.alloc_with("counter", &[0i32]),
            blocks: self.blocks,
            in_parts,
            tables: &[],
            canvas: None,
        }
    }
}

impl Backward {
    /// One head of one batch.
    pub fn new(config: backward::Config, mask: BlockMask) -> Self {
        Self {
            config,
            batch: 1,
            heads: 1,
            kv_heads: 1,
            mask,
            rule: None,
            scale: 0.125,
            window: backward::WINDOW,
            cut: None,
        }
    }

    /// The same as [`Backward::setup`], about the kernel that puts parts together.
    ///
    /// # Panics
    /// If nothing is computed in parts.
    pub fn joined(&self) -> Setup {
        assert!(self.cut.is_some_and(|cut| cut.tiles > 0), "{self:?}");
        let setup = self.setup();
        let behind = setup.main + 1;
        setup.about(behind)
    }

    /// The kernels with tensors; output and lse are those of the definition, rounded.
    pub fn setup(&self) -> Setup {
        let extents = self.mask.extents();
        let (element, head_dim) = (self.config.element, self.config.head_dim);
        let sizes = Sizes {
            batch: self.batch,
            q_heads: self.heads,
            kv_heads: self.kv_heads,
            q_len: extents.q_len(),
            kv_len: extents.kv_len(),
            head_dim: head_dim as usize,
        };
        let [like_q, like_kv] = tensors(element, sizes, Layout::default());
        let (q, k, v) = (like_q.normal(1), like_kv.normal(2), like_kv.normal(3));
        let dout = like_q.normal(4);
        let problem = Problem {
            sizes,
            scale: self.scale,
            q: &q,
            k: &k,
            v: &v,
        };
        let keep = seen(&self.mask, &self.rule);
        let attention = problem.attention(&keep);
        let expected = problem.gradients(&keep, &dout, &vec![0.0; attention.lse.len()]);
        let out: Vec<f64> = attention.out.iter().map(|&x| rounded(element, x)).collect();
        let lse: Vec<f32> = attention.lse.iter().map(|&x| x as f32).collect();

        let mut memory = Memory::new();
        let (plan, tables) = planned(&self.mask, &self.rule, &mut memory);
        let deterministic = self.config.deterministic;
        let workspace = Workspace::of(sizes);
        let (batch, heads, q_len) = (self.batch as u32, self.heads as u32, sizes.q_len as u32);
        let bounding = backward::bounds::Args {
            k: like_kv.put(&mut memory, "k", &k),
            v: like_kv.put(&mut memory, "v", &v),
            bounds: match deterministic {
                true => memory.alloc_with("bounds", &vec![0u32; workspace.bounds]),
                false => 0,
            },
            batch,
            heads: self.kv_heads as u32,
            len: sizes.kv_len as u32,
        };
        let before = backward::prepare::Args {
            out: like_q.put(&mut memory, "out", &out),
            dout: like_q.put(&mut memory, "dout", &dout),
            lse: memory.alloc_with("lse", &lse),
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
            kv_heads: self.kv_heads as u32,
            q_len,
            canvas: None,
        };
        let in_parts = self.cut.map(|cut| InParts {
            cut,
            slots: memory.alloc("slots", 4 * backward::slot_numbers(cut, sizes.head_dim)),
        });
        let args = backward::Args {
            q: like_q.put(&mut memory, "q", &q),
            k: bounding.k,
            v: bounding.v,
            dout: before.dout,
            dk: like_kv.alloc(&mut memory, "dk"),
            dv: like_kv.alloc(&mut memory, "dv"),
            lse: before.log2,
            delta: before.delta,
            dq: before.sums,
            steps: before.steps,
            window: self.window,
            plan,
            layout: layout(&self.mask),
            batch,
            heads,
            kv_heads: self.kv_heads as u32,
            scale: self.scale as f32,
            tables: &tables,
            in_parts,
            canvas: None,
        };
        let after = backward::finish::Args {
            sums: args.dq,
            steps: before.steps,
            dq: like_q.alloc(&mut memory, "dq"),
            batch,
            heads,
            q_len,
            scale: self.scale as f32,
            canvas: None,
        };
        let bounds = backward::bounds::Config { element, head_dim };
        let first = backward::prepare::Config {
            element,
            head_dim,
            deterministic,
            boxes: None,
        };
        let last = backward::finish::Config {
            element,
            head_dim,
            deterministic,
            boxes: None,
        };
        let mut steps = vec![
            Step::new(first.kernel(), first.launch(&before)),
            Step::new(self.config.kernel(), self.config.launch(&args)),
            Step::new(last.kernel(), last.launch(&after)),
        ];
        let mut main = 1;
        if let Some((join, launch)) = self.config.join(&args) {
            steps.insert(2, Step::new(join.kernel(), launch));
        }
        if deterministic {
            steps.insert(0, Step::new(bounds.kernel(), bounds.launch(&bounding)));
            main += 1;
        }
        let near = |name, tensor: forward::Tensor, values| {
            Expected::new(name, tensor.address, element, values, Close::Norm(5e-3))
        };
        let mut of_q = near("dq", after.dq, expected.dq);
        of_q.repeats = self.config.deterministic;
        Setup::new(
            memory,
            steps,
            vec![
                of_q,
                near("dk", args.dk, expected.dk),
                near("dv", args.dv, expected.dv),
            ],
        )
        .about(main)
        .with_scratch(args.dq)
        .with_scratch(bounding.bounds)
    }
}

/// Numbers of the arrays between the kernels of the backward pass.
pub(super) struct Workspace {
    /// Of each of those that have one for a query.
    pub(super) numbers: usize,
    /// Of dq's sums.
    pub(super) sums: usize,
    /// Of the bounds.
    pub(super) bounds: usize,
}

impl Workspace {
    pub(super) fn of(sizes: Sizes) -> Self {
        let lines = sizes.batch * sizes.q_heads;
        let workspace = backward::Workspace::new(sizes.q_len);
        Self {
            numbers: lines * workspace.line,
            sums: lines * workspace.units * 64 * sizes.head_dim,
            bounds: sizes.batch * sizes.kv_heads * backward::bounds::WORDS,
        }
    }
}
