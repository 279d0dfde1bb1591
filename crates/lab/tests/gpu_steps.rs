//! What a call puts on a GPU's stream, run by the emulator: plan, forward and backward of random
//! problems, parts of an attention put together, and choices of tiles must be what the CPU backend
//! computes.

use flex_block_attn::expression::Table;
use flex_block_attn::gpu::{
    self, Keys, Mask, Order, Selection, Step, backward_steps, backward_workspace, combine_step,
    forward_slots, forward_steps, plan_steps, select_steps, selection_numbers,
};
use flex_block_attn::select::{Choice, Scoring, tiles_in_place, video_tiles};
use flex_block_attn::{
    BlockMask, BoolMatrix, DType, Extents, Gradients, Options, Padding, Plan, Saved, Tensor,
    TensorMut, Video, backward, bf16, builders, forward,
};
use flex_block_attn_emulator::{Memory, Options as Way, emulate};
use flex_block_attn_kernels::forward::Rows;
use flex_block_attn_lab::problems::normal;
use flex_block_attn_lab::rules::{causal, dilated_window, documents_with_prefix};
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

/// Of at most so many queries and keys, on so many multiprocessors; says whether outputs were
/// computed in parts, and gradients of k and v.
fn check(chance: &mut Chance, longest: [usize; 2], multiprocessors: u32) -> [bool; 2] {
    let dim = chance.of(&[64, 64, 128]);
    let q_block = chance.of(&[16, 48, 64, 128, 256]);
    let kv_block = chance.of(&[16, 32, 64, 128, 192]);
    let [q_len, kv_len] = longest.map(|longest| 1 + chance.below(longest));
    let batch = 1 + chance.below(2);
    let (heads, kv_heads) = chance.of(&[(1, 1), (2, 1), (2, 2), (4, 2)]);
    let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
    let (mask_batch, mask_heads) = (chance.of(&[1, batch]), chance.of(&[1, heads]));
    let (rows, columns) = (extents.q_blocks(), extents.kv_blocks());
    let matrix = rows * columns;
    let blocks: Vec<u8> = (0..mask_batch * mask_heads * matrix)
        .map(|_| u8::from(chance.below(3) > 0))
        .collect();
    let blocks = match (q_len + kv_len) % 4 {
        0 => vec![1; blocks.len()],
        _ => blocks,
    };
    let shape = [mask_batch, mask_heads, rows, columns];
    let strides = [mask_heads * matrix, matrix, columns, 1];
    let mask = BoolMatrix::new(&blocks, shape, strides).unwrap();
    let rule = chance.of(&[None, Some(0), Some(1), Some(2)]);
    let rule = rule.map(|which: usize| match which {
        0 => causal(),
        1 => dilated_window(60),
        _ => documents_with_prefix(longest[0].max(longest[1]), batch as u32, heads as u32),
    });
    let planned = Plan::new(&match &rule {
        None => BlockMask::from_matrix(extents, mask).unwrap(),
        Some(rule) => {
            BlockMask::from_expression(extents, batch, heads, &rule.expression()).unwrap()
        }
    });

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
        deterministic: chance.below(3) == 0,
        video: None,
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
    let words = planned.words();
    let mut plan = gpu::Plan {
        layout: planned.layout(),
        address: 0,
        exact: None,
        alike: rule.is_none() && blocks.iter().all(|&block| block == 1),
    };
    if let Some(expression) = planned.expression() {
        // Such masks are planned on the host.
        let table = |table: &Table| {
            let values = table.values().expect("the host has the table");
            (memory.alloc_with("table", values), table.extents().to_vec())
        };
        let tables = expression.tables().iter().map(table).collect();
        plan.exact = Some(gpu::Exact::new(expression.formula(), tables).unwrap());
        plan.address = memory.alloc_with("plan", words);
    } else {
        plan.address = memory.alloc("plan", 4 * words.len());
        let mask = Mask::Bytes {
            address: memory.alloc_with("mask", &blocks),
            strides: strides.map(|stride| stride as u64),
        };
        run(&mut memory, plan_steps(&mask, &plan, None).unwrap());
        assert_eq!(memory.read::<i32>(plan.address, words.len()), words);
    }

    let dense = |[_, heads, tokens, dim]: [usize; 4]| {
        [heads * tokens * dim, tokens * dim, dim, 1].map(|stride| stride as isize)
    };
    // SAFETY: it is never written: steps only say where it is.
    let written = |address: u64, dtype, shape| unsafe {
        TensorMut::from_raw(address as *mut _, dtype, shape, dense(shape))
    };
    let [q_at, k_at, v_at] =
        [("q", &q), ("k", &k), ("v", &v)].map(|(name, x)| x.at(x.put(&mut memory, name)));
    let out_at = memory.alloc("out", 2 * out.len());
    let lse_at = memory.alloc("lse", 4 * count);
    let slots = match forward_slots(&q_at, &plan, &options, multiprocessors) {
        0 => None,
        bytes => Some(memory.alloc("slots", bytes)),
    };
    let steps = forward_steps(
        q_at,
        k_at,
        v_at,
        &plan,
        &options,
        &written(out_at, DType::BF16, out_shape),
        Some(&written(lse_at, DType::F32, lse_shape)),
        memory.alloc_with("counter", &[0u32]),
        slots,
        multiprocessors,
    );
    run(&mut memory, steps.unwrap());
    close("out", &memory, out_at, &out);
    for (got, &expected) in memory.read::<f32>(lse_at, count).into_iter().zip(&lse) {
        assert!(
            got == expected || (got - expected).abs() < 2e-3,
            "{got} for {expected}"
        );
    }

    let dout = new(4, heads, q_len);
    let dlse: Vec<f32> = (0..count).map(|i| (i % 5) as f32 * 0.1 - 0.2).collect();
    let has_dlse = chance.below(2) == 1;
    let kv_shape = [batch, kv_heads, kv_len, dim];
    let zeros = |shape: [usize; 4]| vec![bf16::ZERO; shape.iter().product()];
    let (mut dq, mut dk, mut dv) = (zeros(out_shape), zeros(kv_shape), zeros(kv_shape));
    backward(
        Saved {
            q: q.on_cpu(),
            k: k.on_cpu(),
            v: v.on_cpu(),
            out: Tensor::new(&out, out_shape).unwrap(),
            lse: Tensor::new(&lse, lse_shape).unwrap(),
        },
        dout.on_cpu(),
        has_dlse.then(|| Tensor::new(&dlse, lse_shape).unwrap()),
        planned.view(),
        &options,
        Gradients {
            dq: Some(TensorMut::new(&mut dq, out_shape).unwrap()),
            dk: Some(TensorMut::new(&mut dk, kv_shape).unwrap()),
            dv: Some(TensorMut::new(&mut dv, kv_shape).unwrap()),
        },
    )
    .unwrap();
    // SAFETY: as above.
    let read = |address: u64, dtype, shape| unsafe {
        Tensor::from_raw(address as *const _, dtype, shape, dense(shape))
    };
    let saved = Saved {
        q: q_at,
        k: k_at,
        v: v_at,
        out: read(out_at, DType::BF16, out_shape),
        lse: read(lse_at, DType::F32, lse_shape),
    };
    let dout_at = dout.at(dout.put(&mut memory, "dout"));
    let dlse_at = memory.alloc_with("dlse", &dlse);
    let places = [("dq", dq.len()), ("dk", dk.len()), ("dv", dv.len())]
        .map(|(name, count)| memory.alloc(name, 2 * count));
    let gradients = Gradients {
        dq: Some(written(places[0], DType::BF16, out_shape)),
        dk: Some(written(places[1], DType::BF16, kv_shape)),
        dv: Some(written(places[2], DType::BF16, kv_shape)),
    };
    let keys = Keys {
        extents,
        heads: kv_heads,
        multiprocessors,
    };
    let numbers = backward_workspace(out_shape, options.deterministic, Some(keys));
    let workspace = memory.alloc("workspace", 4 * numbers);
    let dlse_at = has_dlse.then(|| read(dlse_at, DType::F32, lse_shape));
    let steps = backward_steps(
        &saved,
        dout_at,
        dlse_at,
        &plan,
        &options,
        &gradients,
        workspace,
        multiprocessors,
    );
    let steps = steps.unwrap().expect("there are queries and keys");
    let (zeroed, count) = steps.zeroed;
    if options.deterministic {
        memory.write(zeroed, &vec![0u32; count]);
    } else {
        assert_eq!(count, 0);
    }
    let launches = steps.launches;
    let in_parts = launches
        .iter()
        .any(|(step, _)| matches!(step, Step::JoinGradients(_)));
    run(&mut memory, launches);
    for (name, at, expected) in [
        ("dq", places[0], &dq),
        ("dk", places[1], &dk),
        ("dv", places[2], &dv),
    ] {
        close(name, &memory, at, expected);
    }
    [slots.is_some(), in_parts]
}

fn close(name: &str, memory: &Memory, at: u64, expected: &[bf16]) {
    let got: Vec<u16> = memory.read(at, expected.len());
    let (mut wrong, mut all) = (0.0, 0.0);
    for (&got, expected) in got.iter().zip(expected) {
        wrong += (bf16::from_bits(got).to_f64() - expected.to_f64()).powi(2);
        all += expected.to_f64().powi(2);
    }
    assert!(
        wrong.sqrt() <= 1e-2 * all.sqrt(),
        "{name}: {wrong} of {all}"
    );
}

#[test]
fn calls_put_what_the_cpu_computes() {
    let mut chance = Chance(7);
    for _ in 0..24 {
        check(&mut chance, [200, 400], 3);
    }
}

/// Of few queries and many keys a GPU has too few tiles of queries to be busy: they are computed in parts;
/// of many queries and few keys likewise those of keys.
#[test]
fn small_calls_in_parts_put_what_the_cpu_computes() {
    let mut chance = Chance(11);
    let mut counts = [0; 2];
    for longest in [[4000, 300], [200, 4000]] {
        for _ in 0..10 {
            let in_parts = check(&mut chance, longest, 50);
            for (count, in_parts) in counts.iter_mut().zip(in_parts) {
                *count += u32::from(in_parts);
            }
        }
    }
    assert!(counts.iter().all(|&count| count >= 3), "{counts:?}");
}

/// Which kernel computes what, on 132 multiprocessors: pairs of tiles blocks of as many queries, and all
/// that is known to be dense, unless there are few.
#[test]
fn pairs_compute_what_has_one_list() {
    let rows_of = |[heads, tokens, dim]: [usize; 3], block, alike| {
        let shape = [1, heads, tokens, dim];
        let strides = [heads * tokens * dim, tokens * dim, dim, 1].map(|stride| stride as isize);
        // SAFETY: nobody reads or writes it.
        let at = || unsafe { Tensor::from_raw(4096 as *const _, DType::BF16, shape, strides) };
        // SAFETY: likewise.
        let out = unsafe { TensorMut::from_raw(4096 as *mut _, DType::BF16, shape, strides) };
        let extents = Extents::new(tokens, tokens, block, block).unwrap();
        let plan = gpu::Plan {
            layout: Plan::new(&BlockMask::from_fn(extents, |_, _| true)).layout(),
            address: 4096,
            exact: None,
            alike,
        };
        let options = Options::default();
        let slots = forward_slots(&at(), &plan, &options, 132);
        let slots = (slots > 0).then_some(4096);
        let steps = forward_steps(
            at(),
            at(),
            at(),
            &plan,
            &options,
            &out,
            None,
            4096,
            slots,
            132,
        );
        let (step, launch) = &steps.unwrap()[0];
        let Step::Forward(config) = step else {
            panic!("{step:?}");
        };
        (config.rows, launch.grid[0])
    };
    let small = |heads, dim| [heads, 1920, dim];
    assert_eq!(rows_of(small(24, 128), 64, true), (Rows::Pairs(192), 132));
    assert_eq!(rows_of(small(5, 128), 64, true), (Rows::Pairs(128), 80));
    assert_eq!(rows_of(small(24, 128), 64, false), (Rows::Mixed, 132));
    assert_eq!(rows_of(small(24, 64), 64, true), (Rows::Mixed, 132));
    let large = [24, 30720, 128];
    assert_eq!(rows_of(large, 128, true), (Rows::Pairs(192), 132));
    assert_eq!(rows_of(large, 128, false), (Rows::Whole(128), 132));
    assert_eq!(rows_of(large, 256, false), (Rows::Pairs(128), 132));
    assert_eq!(rows_of(large, 384, false), (Rows::Pairs(192), 132));
    assert_eq!(rows_of(large, 512, false), (Rows::Pairs(128), 132));
    assert_eq!(rows_of(large, 640, false), (Rows::Whole(128), 132));
    assert_eq!(rows_of(large, 768, false), (Rows::Pairs(192), 132));
    // Of few heads as many rounds count as there are.
    assert_eq!(
        rows_of([4, 30720, 128], 384, false),
        (Rows::Pairs(192), 132)
    );
    assert_eq!(
        rows_of([1, 84480, 128], 384, false),
        (Rows::Whole(128), 132)
    );
    // 90 tiles.
    assert_eq!(rows_of([1, 11520, 128], 384, false), (Rows::Whole(128), 90));
}

/// Output and lse on the CPU; blocks of 16 queries and 32 keys, kept by their numbers.
fn attention(
    [q, k, v]: [&Stored; 3],
    keep: impl Fn(usize, usize) -> bool,
) -> (Vec<bf16>, Vec<f32>) {
    let [batch, heads, q_len, dim] = q.shape;
    let extents = Extents::new(q_len, k.shape[2], 16, 32).unwrap();
    let plan = Plan::new(&BlockMask::from_fn(extents, keep));
    let count = batch * heads * q_len;
    let (mut out, mut lse) = (vec![bf16::ZERO; count * dim], vec![0f32; count]);
    forward(
        q.on_cpu(),
        k.on_cpu(),
        v.on_cpu(),
        plan.view(),
        &Options::default(),
        TensorMut::new(&mut out, q.shape).unwrap(),
        TensorMut::new(&mut lse, [batch, heads, q_len, 1]).unwrap(),
    )
    .unwrap();
    (out, lse)
}

#[test]
fn attention_over_parts_of_the_keys_is_put_together() {
    const SHAPE: [usize; 4] = [2, 2, 70, 64];
    const BATCH: usize = SHAPE[0];
    const HEADS: usize = SHAPE[1];
    const LEN: usize = SHAPE[2];
    const DIM: usize = SHAPE[3];
    const LINES: usize = BATCH * HEADS;
    // Of these queries, as if others belonged to somebody else.
    const FIRST: usize = 16;
    const SOME: usize = LEN - FIRST;
    let lengths = [64, 96, 32];
    // One row of blocks has no keys at all, one has keys of the first part only.
    let keep = |row: usize, column: usize| match row {
        2 => false,
        3 => column == 1,
        _ => !(row + 2 * column).is_multiple_of(3),
    };
    let q = Stored::new(1, SHAPE, false, 0);
    let parts = |seed| {
        let of = move |(i, len)| Stored::new(seed + i, [BATCH, HEADS, len, DIM], false, 0);
        (0u64..).zip(lengths).map(of).collect::<Vec<_>>()
    };
    let (k, v) = (parts(2), parts(7));
    let joined = |parts: &[Stored]| {
        let mut whole = Stored::new(0, [BATCH, HEADS, lengths.iter().sum(), DIM], false, 0);
        whole.values.clear();
        for line in 0..LINES {
            for part in parts {
                let size = part.shape[2] * DIM;
                let rows = &part.values[line * size..(line + 1) * size];
                whole.values.extend_from_slice(rows);
            }
        }
        whole
    };

    let mut memory = Memory::new();
    let (mut first, mut given) = (0, Vec::new());
    // SAFETY: they are never read: steps only say where they are.
    let at = |address: u64, dtype, width: usize| unsafe {
        let strides = [HEADS * LEN * width, LEN * width, width, 1].map(|stride| stride as isize);
        Tensor::from_raw(
            address as *const _,
            dtype,
            [BATCH, HEADS, SOME, width],
            strides,
        )
    };
    for (k, v) in k.iter().zip(&v) {
        let (out, lse) = attention([&q, k, v], |row, column| keep(row, first + column));
        first += k.shape[2] / 32;
        let bits: Vec<u16> = out.iter().map(|x| x.to_bits()).collect();
        let out = memory.alloc_with("part", &bits) + (2 * FIRST * DIM) as u64;
        let lse = memory.alloc_with("lse of part", &lse) + 4 * FIRST as u64;
        given.push((at(out, DType::BF16, DIM), at(lse, DType::F32, 1)));
    }
    let (out, lse) = attention([&q, &joined(&k), &joined(&v)], keep);
    let of_some = |width: usize| {
        let line = move |line: usize| (line * LEN + FIRST) * width..(line + 1) * LEN * width;
        (0..LINES).flat_map(line)
    };
    let out: Vec<bf16> = of_some(DIM).map(|i| out[i]).collect();
    let lse: Vec<f32> = of_some(1).map(|i| lse[i]).collect();

    let whole = memory.alloc("whole", 2 * out.len());
    let numbers = memory.alloc("lse", 4 * lse.len());
    // SAFETY: as above, not written either.
    let to = |address: u64, dtype, width: usize| unsafe {
        let strides = [HEADS * SOME * width, SOME * width, width, 1].map(|stride| stride as isize);
        TensorMut::from_raw(
            address as *mut _,
            dtype,
            [BATCH, HEADS, SOME, width],
            strides,
        )
    };
    let (to_out, to_lse) = (to(whole, DType::BF16, DIM), to(numbers, DType::F32, 1));
    let step = combine_step(&given, &to_out, &to_lse).unwrap();
    assert!(step.is_some());
    run(&mut memory, step);
    close("the whole", &memory, whole, &out);
    let got: Vec<f32> = memory.read(numbers, lse.len());
    for (got, expected) in got.into_iter().zip(lse) {
        assert!(
            got == expected || (got - expected).abs() < 1e-4,
            "{got} and {expected}"
        );
    }

    let refusal = |given: &[_]| {
        combine_step(given, &to_out, &to_lse)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refusal(&given[..1]),
        "on a GPU, parts must be 2 to 8, got 1"
    );
    let mut odd = given.clone();
    odd[1].1 = at(0, DType::F64, 1);
    assert!(refusal(&odd).contains("with float32 lses"));
}

/// Numbers whose sums are exact, so that means are rounded alike.
fn coarse(seed: u64, shape: [usize; 4], tokens_first: bool, gap: usize) -> Stored {
    let mut stored = Stored::new(seed, shape, tokens_first, gap);
    for value in &mut stored.values {
        *value = bf16::from_f64((value.to_f64() * 16.0).round() / 16.0);
    }
    stored
}

/// A choice by chance, of a video as it lies or in tile order.
fn check_choice(chance: &mut Chance) {
    let tile = chance.of(&[[1, 4, 4], [2, 3, 8], [3, 4, 4]]);
    let tiles = [
        1 + chance.below(3),
        1 + chance.below(3),
        1 + chance.below(4),
    ];
    let video = Video {
        thw: std::array::from_fn(|axis| tiles[axis] * tile[axis] - chance.below(tile[axis])),
        tile,
        text_len: chance.of(&[0, 5, 60]),
        padding: chance.of(&[Padding::Zero, Padding::Exact]),
    };
    let in_place = chance.below(2) == 1;
    let (tiles, block) = (video.tiles(), video.block());
    let count: usize = tiles.iter().product();
    let canvas = builders::StaCanvas {
        tiles,
        window: [1, 1, 3],
        tile_tokens: block,
        text_tokens: video.text_len,
    };
    let (order, tokens) = match in_place {
        true => (Order::Video(&video), video.tokens()),
        false => (
            Order::Tiles {
                tiles: count,
                block,
            },
            video.places(),
        ),
    };
    let batch = 1 + chance.below(2);
    let (heads, kv_heads) = chance.of(&[(1, 1), (3, 3), (4, 2)]);
    let dim = chance.of(&[64, 128]);
    let tokens_first = chance.below(2) == 1;
    let new = |seed, heads| coarse(seed, [batch, heads, tokens, dim], tokens_first, 8);
    let (q, k) = (new(chance.0, heads), new(chance.0 + 1, kv_heads));
    let lambda = chance.of(&[0.7, 0.2]);
    let scoring = chance.of(&[Scoring::Similarity, Scoring::Importance { lambda }]);
    let choice = Choice {
        share_heads: chance.below(2) == 1,
        ..Choice::new(1 + chance.below(6), scoring)
    };
    let chosen = match in_place {
        true => tiles_in_place(q.on_cpu(), k.on_cpu(), &video, &choice),
        false => video_tiles(q.on_cpu(), k.on_cpu(), &canvas, &choice),
    };
    let sliding = builders::sta(&canvas).unwrap();
    let expected = chosen.unwrap().union(&sliding).unwrap();

    let blocks = expected.extents().q_blocks();
    let pairs = (0..blocks * blocks).map(|i| (i / blocks, i % blocks));
    let base: Vec<u8> = pairs
        .clone()
        .map(|(row, column)| u8::from(sliding.contains(0, 0, row, column)))
        .collect();
    let mut memory = Memory::new();
    let (q, k) = (q.at(q.put(&mut memory, "q")), k.at(k.put(&mut memory, "k")));
    let numbers = selection_numbers(&q, &k, order, &choice).unwrap();
    let lines = expected.batch() * expected.heads();
    let selection = Selection {
        mask: memory.alloc("mask", lines * base.len()),
        base: memory.alloc_with("base", &base),
        blocks,
        text_lengths: None,
        workspace: memory.alloc("workspace", 4 * numbers),
    };
    let steps = select_steps(&q, &k, order, &choice, &selection).unwrap();
    let launches =
        2 + usize::from(choice.share_heads) + usize::from(scoring != Scoring::Similarity);
    assert_eq!(steps.len(), launches);
    run(&mut memory, steps);
    let got: Vec<u8> = memory.read(selection.mask, lines * base.len());
    let wanted: Vec<u8> = (0..lines)
        .flat_map(|line| {
            let (batch, head) = (line / expected.heads(), line % expected.heads());
            let expected = &expected;
            pairs
                .clone()
                .map(move |(row, column)| u8::from(expected.contains(batch, head, row, column)))
        })
        .collect();
    assert!(got == wanted, "{video:?}, {choice:?}, in place: {in_place}");
}

#[test]
fn tiles_are_chosen_as_on_the_cpu() {
    let mut chance = Chance(3);
    for _ in 0..24 {
        check_choice(&mut chance);
    }
}

#[test]
fn choices_that_kernels_do_not_take_are_named() {
    let refusal = |order, choice: &Choice, change: &dyn Fn(&mut Stored, &mut Selection)| {
        let mut q = Stored::new(1, [1, 2, 64, 64], false, 0);
        let mut selection = Selection {
            mask: 4096,
            base: 4096,
            blocks: 4,
            text_lengths: None,
            workspace: 4096,
        };
        change(&mut q, &mut selection);
        let k = Stored::new(1, [1, 1, 64, 64], false, 0);
        let steps = select_steps(&q.at(4096), &k.at(4096), order, choice, &selection);
        steps.expect_err("refused").to_string()
    };
    let order = Order::Tiles {
        tiles: 4,
        block: 16,
    };
    let similar = Choice::new(2, Scoring::Similarity);
    let mass = Choice::new(2, Scoring::Mass { mass: 0.5 });
    assert_eq!(
        refusal(order, &mass, &|_, _| ()),
        "on a GPU, scoring must be similarity, or importance of a lambda from 0 to 1, got Mass { \
         mass: 0.5 }"
    );
    let cells = Choice {
        cells: Some([[1, 4, 4], [1, 2, 2]]),
        ..similar
    };
    assert!(refusal(order, &cells, &|_, _| ()).contains("cells must be a single one"));
    let many = Order::Tiles {
        tiles: 6145,
        block: 16,
    };
    assert_eq!(
        refusal(many, &similar, &|q, _| q.shape[2] = 6145 * 16),
        "on a GPU, k must be at least as long as all tiles, got 64 tokens"
    );
    assert_eq!(
        refusal(order, &similar, &|_, selection| selection.blocks = 3),
        "on a GPU, blocks must be all tiles and blocks of text, at most 65535, got 3"
    );
}

#[test]
fn tables_are_those_of_the_formula() {
    let formula = "t0[q] == t1[b, kv]".parse().unwrap();
    let refusal = |tables| gpu::Exact::new(&formula, tables).unwrap_err().to_string();
    assert_eq!(
        refusal(vec![(0, vec![3])]),
        "on a GPU, a mask's expression must be given all its tables, got 1 tables"
    );
    let wanted = "table t1 of the mask's expression must be of as many dimensions as it has indices, \
                  at a multiple of 4 bytes";
    assert_eq!(refusal(vec![(0, vec![3]), (64, vec![3])]), wanted);
    assert_eq!(refusal(vec![(0, vec![3]), (66, vec![3, 3])]), wanted);
}

#[test]
fn what_kernels_do_not_take_is_named() {
    let refusal = |change: &dyn Fn(&mut Stored, &mut Options)| {
        let extents = Extents::new(32, 32, 16, 16).unwrap();
        let layout = Plan::new(&BlockMask::from_fn(extents, |_, _| true)).layout();
        let plan = gpu::Plan {
            layout,
            address: 0,
            exact: None,
            alike: false,
        };
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
        let lse = Some(&lse);
        let steps = forward_steps(q.at(4096), kv, kv, &plan, &options, &out, lse, 0, None, 1);
        steps.expect_err("refused").to_string()
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
