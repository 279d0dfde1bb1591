//! Attention backward, against gradients in float64.

use flex_block_attn::{BlockMask, Extents, Plan, bf16, f16};
use flex_block_attn_emulator::{Memory, Options};
use flex_block_attn_kernels::backward::{Args, Config, Workspace, finish, prepare};
use flex_block_attn_kernels::forward::Tensor;
use flex_block_attn_kernels::{Element, Strides};
use flex_block_attn_lab::emulated::{bits, normal};
use flex_block_attn_lab::reference::{Problem, Sizes};

use crate::{Repeats, each_in_all_ways};

struct Case {
    element: Element,
    head_dim: usize,
    piece: u32,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    mask: BlockMask,
    scale: f64,
}

impl Case {
    fn new(head_dim: usize, piece: u32, mask: BlockMask) -> Self {
        Self {
            element: Element::Bf16,
            head_dim,
            piece,
            batch: 1,
            heads: 1,
            kv_heads: 1,
            mask,
            scale: 0.125,
        }
    }

    fn check(&self, ways: &[Options]) {
        let (extents, d) = (self.mask.extents(), self.head_dim);
        let sizes = Sizes {
            batch: self.batch,
            q_heads: self.heads,
            kv_heads: self.kv_heads,
            q_len: extents.q_len(),
            kv_len: extents.kv_len(),
            head_dim: d,
        };
        let (q_lines, kv_lines) = (self.batch * self.heads, self.batch * self.kv_heads);
        let q = normal(1, q_lines * sizes.q_len * d);
        let k = normal(2, kv_lines * sizes.kv_len * d);
        let v = normal(3, kv_lines * sizes.kv_len * d);
        let dout = normal(4, q.len());
        let wide = |x: &[bf16]| -> Vec<f64> { x.iter().map(|x| x.to_f64()).collect() };
        let problem = Problem {
            sizes,
            scale: self.scale,
            q: &wide(&q),
            k: &wide(&k),
            v: &wide(&v),
        };
        let keep = |batch: usize, head: usize, query: usize, key: usize| {
            let (batch, head) = (batch % self.mask.batch(), head % self.mask.heads());
            let (row, column) = (query / extents.q_block(), key / extents.kv_block());
            self.mask.contains(batch, head, row, column)
        };
        let attention = problem.attention(&keep);
        let expected = problem.gradients(&keep, &wide(&dout), &vec![0.0; attention.lse.len()]);

        let out: Vec<bf16> = attention.out.iter().map(|&x| bf16::from_f64(x)).collect();
        let lse: Vec<f32> = attention.lse.iter().map(|&x| x as f32).collect();
        let workspace = Workspace::new(sizes.q_len);
        let plan = Plan::new(&self.mask);
        let element = self.element;
        let head_dim = d as u32;
        let config = Config {
            element,
            head_dim,
            piece: self.piece,
        };
        let prepare = || {
            let mut memory = Memory::new();
            let tensor = |address, heads: usize, tokens: usize| Tensor {
                address,
                strides: Strides {
                    row: d as u64,
                    head: (tokens * d) as u64,
                    batch: (heads * tokens * d) as u64,
                },
            };
            let bits = |x: &[bf16]| bits(x, element);
            let mut of_q = |name: &str, x: &[bf16]| {
                tensor(memory.alloc_with(name, &bits(x)), self.heads, sizes.q_len)
            };
            let (q, dout, out) = (of_q("q", &q), of_q("dout", &dout), of_q("out", &out));
            let mut of_kv = |name: &str, x: &[bf16]| {
                tensor(
                    memory.alloc_with(name, &bits(x)),
                    self.kv_heads,
                    sizes.kv_len,
                )
            };
            let (k, v) = (of_kv("k", &k), of_kv("v", &v));
            let mut written = |name: &str, heads: usize, tokens: usize| {
                let bytes = 2 * self.batch * heads * tokens * d;
                tensor(memory.alloc(name, bytes), heads, tokens)
            };
            let dk = written("dk", self.kv_heads, sizes.kv_len);
            let dv = written("dv", self.kv_heads, sizes.kv_len);
            let dq = written("dq", self.heads, sizes.q_len);
            let numbers = 4 * q_lines * workspace.line;
            let (batch, heads) = (self.batch as u32, self.heads as u32);
            let before = prepare::Args {
                out,
                dout,
                lse: memory.alloc_with("lse", &lse),
                dlse: 0,
                log2: memory.alloc("log2", numbers),
                delta: memory.alloc("delta", numbers),
                batch,
                heads,
                q_len: sizes.q_len as u32,
            };
            let sums = vec![0f32; q_lines * workspace.tiles * 64 * d];
            let args = Args {
                q,
                k,
                v,
                dout,
                dk,
                dv,
                lse: before.log2,
                delta: before.delta,
                dq: memory.alloc_with("sums", &sums),
                plan: memory.alloc_with("plan", plan.words()),
                layout: plan.layout(),
                batch,
                heads,
                kv_heads: self.kv_heads as u32,
                scale: self.scale as f32,
            };
            let after = finish::Args {
                sums: args.dq,
                dq,
                batch,
                heads,
                q_len: sizes.q_len as u32,
                scale: self.scale as f32,
            };
            let first = prepare::Config { element, head_dim };
            let last = finish::Config { element, head_dim };
            let launches = vec![
                (first.kernel(), first.launch(&before)),
                (config.kernel(), config.launch(&args)),
                (last.kernel(), last.launch(&after)),
            ];
            (memory, launches, [dq, dk, dv])
        };
        each_in_all_ways(ways, Repeats::Nearly, prepare, |memory, [dq, dk, dv]| {
            for (name, tensor, expected) in [
                ("dq", dq, &expected.dq),
                ("dk", dk, &expected.dk),
                ("dv", dv, &expected.dv),
            ] {
                let words: Vec<u16> = memory.read(tensor.address, expected.len());
                let got: Vec<f64> = words.iter().map(|&x| from_bits(x, element)).collect();
                close(name, &got, expected);
            }
        });
    }
}

fn from_bits(bits: u16, element: Element) -> f64 {
    match element {
        Element::F16 => f16::from_bits(bits).to_f64(),
        _ => bf16::from_bits(bits).to_f64(),
    }
}

fn close(name: &str, got: &[f64], expected: &[f64]) {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let wrong = norm(&mut got.iter().zip(expected).map(|(a, b)| a - b));
    let all = norm(&mut expected.iter().copied());
    assert!(
        wrong <= 5e-3 * all,
        "relative error {} of {name}",
        wrong / all
    );
}

fn mask(lengths: [usize; 2], blocks: [usize; 2], rows: &[&str]) -> BlockMask {
    let extents = Extents::new(lengths[0], lengths[1], blocks[0], blocks[1]).unwrap();
    BlockMask::from_fn(extents, |row, column| rows[row].as_bytes()[column] == b'1')
}

#[test]
fn columns_of_every_length() {
    // None, one, two, three tiles of queries, and all.
    let rows = ["01010", "00110", "00011", "00001"];
    for head_dim in [64, 128] {
        let case = Case::new(head_dim, 64, mask([256, 640], [64, 128], &rows));
        case.check(&Options::all(1));
    }
}

#[test]
fn heads_that_share_keys() {
    let case = Case {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        scale: 0.08,
        ..Case::new(128, 64, mask([192, 256], [192, 256], &["1"]))
    };
    case.check(&Options::all(0));
}

#[test]
fn pieces_and_sequences_that_end_anywhere() {
    for (head_dim, piece, q_block, kv_block, q_len, kv_len) in [
        (128, 64, 64, 128, 200, 300),
        (128, 32, 96, 256, 250, 500),
        (128, 16, 48, 128, 130, 129),
        (64, 16, 16, 128, 40, 10),
        (64, 64, 128, 128, 129, 257),
        (64, 32, 32, 384, 200, 400),
    ] {
        let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
        let seen = |row: usize, column: usize| (row * 7 + column * 3) % 4 != 1;
        let case = Case::new(head_dim, piece, BlockMask::from_fn(extents, seen));
        case.check(&Options::all(0));
    }
}

#[test]
fn keys_of_several_blocks() {
    for (head_dim, piece, q_block, kv_block, q_len, kv_len) in [
        (64, 64, 64, 64, 200, 300),
        (128, 64, 192, 48, 250, 250),
        (64, 16, 48, 16, 130, 100),
        (64, 32, 96, 192, 150, 390),
    ] {
        let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
        let seen = |row: usize, column: usize| (row * 5 + column * 3) % 4 < 2 && column != 2;
        for element in [Element::Bf16, Element::F16] {
            let case = Case {
                element,
                heads: 2,
                ..Case::new(head_dim, piece, BlockMask::from_fn(extents, seen))
            };
            case.check(&Options::all(1)[1..3]);
        }
    }
}
