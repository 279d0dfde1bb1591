//! What a call puts on a GPU's stream, run by the emulator: plan and forward of random problems must
//! be what the CPU backend computes.

use flex_block_attn::gpu::{self, Mask, Step, forward_step, plan_steps};
use flex_block_attn::{
    BlockMask, BoolMatrix, DType, Extents, Options, Plan, Tensor, TensorMut, bf16, forward,
};
use flex_block_attn_emulator::{Memory, Options as Way, emulate};
use flex_block_attn_lab::problems::normal;
use flex_block_attn_ptx::Launch;

/// A generator of numbers by chance.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005) + 1;
        (self.0 >> 33) as usize % bound
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

/// A tensor's values by strides, as they lie in memory.
struct Stored {
    values: Vec<bf16>,
    shape: [usize; 4],
    strides: [isize; 4],
}

impl Stored {
    /// Tokens before heads if `tokens_first`; `gap` elements behind each row.
    fn new(seed: u64, shape: [usize; 4], tokens_first: bool, gap: usize) -> Self {
        let [batch, heads, tokens, dim] = shape;
        let row = dim + gap;
        let strides = if tokens_first {
            [tokens * heads * row, row, heads * row, 1]
        } else {
            [heads * tokens * row, tokens * row, row, 1]
        };
        Self {
            values: normal(seed, batch * heads * tokens * row)
                .into_iter()
                .map(bf16::from_f64)
                .collect(),
            shape,
            strides: strides.map(|stride| stride as isize),
        }
    }

    fn on_cpu(&self) -> Tensor<'_> {
        Tensor::strided(&self.values, self.shape, self.strides).unwrap()
    }

    fn put(&self, memory: &mut Memory, name: &str) -> u64 {
        let bits: Vec<u16> = self.values.iter().map(|x| x.to_bits()).collect();
        memory.alloc_with(name, &bits)
    }

    fn at(&self, address: u64) -> Tensor<'static> {
        // SAFETY: it is never read: steps only say where it is.
        unsafe { Tensor::from_raw(address as *const _, DType::BF16, self.shape, self.strides) }
    }
}

fn run(memory: &mut Memory, steps: impl IntoIterator<Item = (Step, Launch)>) {
    for (step, launch) in steps {
        if let Err(fault) = emulate(&step.kernel(), &launch, memory, &Way::default()) {
            panic!("{fault}");
        }
    }
}

fn check(chance: &mut Chance) {
    let dim = chance.of(&[64, 64, 128]);
    let q_block = chance.of(&[16, 48, 64, 128, 256]);
    let kv_block = chance.of(&[16, 32, 64, 128, 192]);
    let (q_len, kv_len) = (1 + chance.below(200), 1 + chance.below(400));
    let batch = 1 + chance.below(2);
    let (heads, kv_heads) = chance.of(&[(1, 1), (2, 1), (2, 2), (4, 2)]);
    let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
    let (mask_batch, mask_heads) = (chance.of(&[1, batch]), chance.of(&[1, heads]));
    let (rows, columns) = (extents.q_blocks(), extents.kv_blocks());
    let matrix = rows * columns;
    let blocks: Vec<u8> = (0..mask_batch * mask_heads * matrix)
        .map(|_| u8::from(chance.below(3) > 0))
        .collect();
    let shape = [mask_batch, mask_heads, rows, columns];
    let strides = [mask_heads * matrix, matrix, columns, 1];
    let mask = BoolMatrix::new(&blocks, shape, strides).unwrap();
    let planned = Plan::new(&BlockMask::from_matrix(extents, mask).unwrap());

    let tokens_first = chance.below(2) == 1;
    let gap = chance.of(&[0, 8]);
    let new =
        |seed, heads, tokens| Stored::new(seed, [batch, heads, tokens, dim], tokens_first, gap);
    let (q, k, v) = (
        new(1, heads, q_len),
        new(2, kv_heads, kv_len),
        new(3, kv_heads, kv_len),
    );
    let options = Options {
        scale: chance.of(&[None, Some(0.3), Some(0.0)]),
        threads: None,
    };
    let out_shape = [batch, heads, q_len, dim];
    let lse_shape = [batch, heads, q_len, 1];
    let count = batch * heads * q_len;
    let mut out = vec![bf16::ZERO; count * dim];
    let mut lse = vec![0f32; count];
    forward(
        q.on_cpu(),
        k.on_cpu(),
        v.on_cpu(),
        planned.view(),
        &options,
        TensorMut::new(&mut out, out_shape).unwrap(),
        TensorMut::new(&mut lse, lse_shape).unwrap(),
    )
    .unwrap();

    let mut memory = Memory::new();
    let mask = Mask {
        address: memory.alloc_with("mask", &blocks),
        strides: strides.map(|stride| stride as u64),
    };
    let plan = gpu::Plan {
        layout: planned.layout(),
        address: memory.alloc("plan", 4 * planned.words().len()),
    };
    run(&mut memory, plan_steps(&mask, &plan).unwrap());
    assert_eq!(
        memory.read::<i32>(plan.address, planned.words().len()),
        planned.words()
    );

    let at = [("q", &q), ("k", &k), ("v", &v)].map(|(name, x)| x.at(x.put(&mut memory, name)));
    let (out_at, lse_at) = (
        memory.alloc("out", 2 * out.len()),
        memory.alloc("lse", 4 * count),
    );
    let workspace = memory.alloc_with("workspace", &[0u32]);
    let d = dim as isize;
    let strides = [(heads * q_len) as isize * d, q_len as isize * d, d, 1];
    let lines = [(heads * q_len) as isize, q_len as isize, 1, 1];
    // SAFETY: neither is ever read or written: steps only say where they are.
    let (out_there, lse_there) = unsafe {
        (
            TensorMut::from_raw(out_at as *mut _, DType::BF16, out_shape, strides),
            TensorMut::from_raw(lse_at as *mut _, DType::F32, lse_shape, lines),
        )
    };
    let [q_at, k_at, v_at] = at;
    let step = forward_step(
        q_at, k_at, v_at, &plan, &options, &out_there, &lse_there, workspace, 3,
    );
    run(&mut memory, step.unwrap());

    let got: Vec<u16> = memory.read(out_at, out.len());
    let (mut wrong, mut all) = (0.0, 0.0);
    for (&got, expected) in got.iter().zip(&out) {
        wrong += (bf16::from_bits(got).to_f64() - expected.to_f64()).powi(2);
        all += expected.to_f64().powi(2);
    }
    assert!(
        wrong.sqrt() <= 6e-3 * all.sqrt(),
        "{wrong} of {all}: {extents:?}"
    );
    for (got, &expected) in memory.read::<f32>(lse_at, count).into_iter().zip(&lse) {
        assert!(
            got == expected || (got - expected).abs() < 2e-3,
            "{got} for {expected}"
        );
    }
}

#[test]
fn calls_put_what_the_cpu_computes() {
    let mut chance = Chance(7);
    for _ in 0..24 {
        check(&mut chance);
    }
}

#[test]
fn what_kernels_do_not_take_is_named() {
    let refusal = |change: &dyn Fn(&mut Stored, &mut Options)| {
        let extents = Extents::new(32, 32, 16, 16).unwrap();
        let layout = Plan::new(&BlockMask::from_fn(extents, |_, _| true)).layout();
        let plan = gpu::Plan { layout, address: 0 };
        let mut q = Stored::new(1, [1, 1, 32, 64], false, 0);
        let mut options = Options::default();
        change(&mut q, &mut options);
        let (kv, out_strides) = (q.at(4096), q.strides);
        // SAFETY: neither is ever read or written.
        let (out, lse) = unsafe {
            (
                TensorMut::from_raw(4096 as *mut _, DType::BF16, q.shape, out_strides),
                TensorMut::from_raw(4096 as *mut _, DType::F32, [1, 1, 32, 1], [32, 32, 1, 1]),
            )
        };
        let step = forward_step(q.at(4096), kv, kv, &plan, &options, &out, &lse, 0, 1);
        step.expect_err("refused").to_string()
    };
    assert_eq!(
        refusal(&|q, _| {
            q.shape[3] = 96;
            q.strides = [32 * 96, 32 * 96, 96, 1];
        }),
        "on a GPU, head_dim must be 64 or 128, got 96"
    );
    assert_eq!(
        refusal(&|q, _| q.strides[2] = 68),
        "on a GPU, q must be at an address and of strides that are positive multiples of 16 bytes, \
         got [2048, 2048, 68, 1] (in elements) at address 0x1000"
    );
    assert_eq!(
        refusal(&|_, options| options.scale = Some(-1.0)),
        "on a GPU, scale must be 0 or more, got -1"
    );
}
