//! Every way to call the library wrongly, with the text of its error; and calls at the edge of
//! what is allowed.

use flex_block_attn::expression::{Expression, Table, Truth, b, h, kv, q};
use flex_block_attn::{
    BlockMask, Error, Extents, Gradients, Options, Plan, Saved, Tensor, TensorMut, backward, bf16,
    builders, forward,
};

const VALUES: [f32; 4096] = [0.25; 4096];
const HALVES: [bf16; 4096] = [bf16::ONE; 4096];

/// A call that is fine: batch 2, 4 heads over 2, 32 queries, 16 keys, head_dim 8. Each test spoils
/// one thing.
struct Call<'a> {
    q: Tensor<'a>,
    k: Tensor<'a>,
    v: Tensor<'a>,
    mask: BlockMask,
    options: Options,
    out_shape: [usize; 4],
    lse_shape: [usize; 4],
}

fn tensor(shape: [usize; 4]) -> Tensor<'static> {
    Tensor::new(&VALUES, shape).unwrap()
}

fn extents(q_len: usize, kv_len: usize) -> Extents {
    Extents::new(q_len, kv_len, 16, 16).unwrap()
}

impl Default for Call<'_> {
    fn default() -> Self {
        Self {
            q: tensor([2, 4, 32, 8]),
            k: tensor([2, 2, 16, 8]),
            v: tensor([2, 2, 16, 8]),
            mask: builders::full(extents(32, 16)),
            options: Options::default(),
            out_shape: [2, 4, 32, 8],
            lse_shape: [2, 4, 32, 1],
        }
    }
}

impl Call<'_> {
    fn run(&self) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let (mut out, mut lse) = (vec![7.0; 4096], vec![7.0; 4096]);
        forward(
            self.q,
            self.k,
            self.v,
            Plan::new(&self.mask).view(),
            &self.options,
            TensorMut::new(&mut out, self.out_shape)?,
            TensorMut::new(&mut lse, self.lse_shape)?,
        )?;
        Ok((out, lse))
    }
}

#[test]
fn mistakes_are_named() {
    let fine = Call::default;
    let halves = Tensor::new(&HALVES, [2, 4, 32, 8]).unwrap();
    // Every second value of rows of 16; heads that overlap.
    let gaps = Tensor::strided(&VALUES, [2, 4, 32, 8], [2048, 512, 16, 2]).unwrap();
    let table = [
        (
            Call {
                k: tensor([1, 2, 16, 8]),
                ..fine()
            },
            "k has shape [1, 2, 16, 8], but q needs [2, 2, 16, 8]",
        ),
        (
            Call {
                k: tensor([2, 2, 16, 16]),
                ..fine()
            },
            "k has shape [2, 2, 16, 16], but q needs [2, 2, 16, 8]",
        ),
        (
            Call {
                v: tensor([2, 2, 24, 8]),
                ..fine()
            },
            "v has shape [2, 2, 24, 8], but k needs [2, 2, 16, 8]",
        ),
        (
            Call {
                k: tensor([2, 3, 16, 8]),
                v: tensor([2, 3, 16, 8]),
                ..fine()
            },
            "q has 4 heads, which is no multiple of the 3 heads of k and v",
        ),
        (
            Call {
                k: tensor([2, 0, 16, 8]),
                v: tensor([2, 0, 16, 8]),
                ..fine()
            },
            "q has 4 heads, which is no multiple of the 0 heads of k and v",
        ),
        (
            Call {
                q: halves,
                ..fine()
            },
            "k is float32, but q needs bfloat16",
        ),
        (
            Call { q: gaps, ..fine() },
            "the last dimension of q must be contiguous, but its stride is 2",
        ),
        (
            Call {
                q: tensor([2, 4, 32, 12]),
                ..fine()
            },
            "head_dim must be a multiple of 8 from 8 to 256, got 12",
        ),
        (
            Call {
                q: tensor([1, 1, 1, 264]),
                ..fine()
            },
            "head_dim must be a multiple of 8 from 8 to 256, got 264",
        ),
        (
            Call {
                q: tensor([2, 4, 32, 0]),
                ..fine()
            },
            "head_dim must be a multiple of 8 from 8 to 256, got 0",
        ),
        (
            Call {
                mask: builders::full(extents(48, 16)),
                ..fine()
            },
            "block_mask is made for q_len 48 and kv_len 16, but the tensors have 32 and 16",
        ),
        (
            Call {
                mask: BlockMask::empty(extents(32, 16), 3, 1),
                ..fine()
            },
            "block_mask has 3 batches, but q has 2: allowed are 1 (shared) and 2",
        ),
        (
            // Masks are for query heads; those of keys are too few.
            Call {
                mask: BlockMask::empty(extents(32, 16), 2, 2),
                ..fine()
            },
            "block_mask has 2 heads, but q has 4: allowed are 1 (shared) and 4",
        ),
        (
            Call {
                options: Options {
                    scale: Some(f64::NAN),
                    ..Options::default()
                },
                ..fine()
            },
            "scale must be a finite number, got NaN",
        ),
        (
            Call {
                out_shape: [2, 4, 16, 8],
                ..fine()
            },
            "out has shape [2, 4, 16, 8], but q needs [2, 4, 32, 8]",
        ),
        (
            Call {
                lse_shape: [2, 4, 32, 8],
                ..fine()
            },
            "lse has shape [2, 4, 32, 8], but q needs [2, 4, 32, 1]",
        ),
        (
            Call {
                out_shape: [2, 4, 320, 8],
                ..fine()
            },
            "a tensor of shape [2, 4, 320, 8] and strides [10240, 2560, 8, 1] does not fit its 4096 \
             elements",
        ),
    ];
    for (call, text) in table {
        assert_eq!(call.run().unwrap_err().to_string(), text);
    }
}

#[test]
fn expressions_go_with_tensors() {
    let refusal = |heads, condition: &Truth| {
        let expression = Expression::new(condition).unwrap();
        let mask = BlockMask::from_expression(extents(32, 16), 1, heads, &expression).unwrap();
        let call = Call {
            mask,
            ..Call::default()
        };
        call.run().unwrap_err().to_string()
    };
    let by_head = kv().less_than(h() + 3);
    assert_eq!(
        refusal(1, &by_head),
        "the mask's expression tells heads apart, but is made for 1, and q has 4"
    );
    assert_eq!(
        refusal(3, &by_head),
        "block_mask has 3 heads, but q has 4: allowed are 1 (shared) and 4"
    );
    assert_eq!(
        refusal(1, &(kv() + b()).less_than(3)),
        "the mask's expression tells batches apart, but is made for 1, and q has 2"
    );
    let elsewhere = Table::elsewhere(&[32]).unwrap();
    assert_eq!(
        refusal(1, &elsewhere.at([q()]).less_than(3)),
        "table t0 of the mask's expression must be in the host's memory, as the tensors are"
    );
    let expression = Expression::new(&by_head).unwrap();
    let mask = BlockMask::from_expression(extents(32, 16), 2, 4, &expression).unwrap();
    let call = Call {
        mask,
        ..Call::default()
    };
    let (_, lse) = call.run().unwrap();
    // All scores are equal: head 1 has one key more than head 0.
    let more = f64::from(lse[32] - lse[0]).exp();
    assert!((more - 4.0 / 3.0).abs() < 1e-5, "{more}");
}

#[test]
fn outputs_that_overlap_are_refused() {
    let call = Call::default();
    let (mut out, mut lse) = (vec![0f32; 4096], vec![0f32; 4096]);
    let strides = [1024, 256, 4, 1];
    let result = forward(
        call.q,
        call.k,
        call.v,
        Plan::new(&call.mask).view(),
        &call.options,
        TensorMut::strided(&mut out, call.out_shape, strides).unwrap(),
        TensorMut::new(&mut lse, call.lse_shape).unwrap(),
    );
    assert_eq!(
        result.unwrap_err().to_string(),
        "out has shape [2, 4, 32, 8] and strides [1024, 256, 4, 1]: its elements overlap"
    );
}

#[test]
fn gradients_are_checked_like_outputs() {
    let call = Call::default();
    let plan = Plan::new(&call.mask);
    let (out, lse) = call.run().unwrap();
    let saved = Saved {
        q: call.q,
        k: call.k,
        v: call.v,
        out: Tensor::new(&out, call.out_shape).unwrap(),
        lse: Tensor::new(&lse, call.lse_shape).unwrap(),
    };
    let run = |dout: [usize; 4], dk: [usize; 4]| {
        let mut buffer = vec![0f32; 4096];
        let dk = Some(TensorMut::new(&mut buffer, dk).unwrap());
        let gradients = Gradients {
            dk,
            ..Gradients::default()
        };
        backward(
            saved,
            tensor(dout),
            None,
            plan.view(),
            &call.options,
            gradients,
        )
        .map_err(|error| error.to_string())
    };
    assert_eq!(run([2, 4, 32, 8], [2, 2, 16, 8]), Ok(()));
    assert_eq!(
        run([2, 4, 16, 8], [2, 2, 16, 8]),
        Err("dout has shape [2, 4, 16, 8], but q needs [2, 4, 32, 8]".into())
    );
    assert_eq!(
        run([2, 4, 32, 8], [2, 4, 16, 8]),
        Err("dk has shape [2, 4, 16, 8], but k needs [2, 2, 16, 8]".into())
    );
}

#[test]
fn what_is_empty_is_allowed() {
    let no_batch = Call {
        q: tensor([0, 4, 32, 8]),
        k: tensor([0, 2, 16, 8]),
        v: tensor([0, 2, 16, 8]),
        out_shape: [0, 4, 32, 8],
        lse_shape: [0, 4, 32, 1],
        ..Call::default()
    };
    assert!(no_batch.run().is_ok());

    let no_queries = Call {
        q: tensor([2, 4, 0, 8]),
        mask: builders::full(extents(0, 16)),
        out_shape: [2, 4, 0, 8],
        lse_shape: [2, 4, 0, 1],
        ..Call::default()
    };
    assert!(no_queries.run().is_ok());

    let no_keys = Call {
        k: tensor([2, 2, 0, 8]),
        v: tensor([2, 2, 0, 8]),
        mask: builders::full(extents(32, 0)),
        ..Call::default()
    };
    let (out, lse) = no_keys.run().unwrap();
    assert!(out[..2 * 4 * 32 * 8].iter().all(|&value| value == 0.0));
    assert!(
        lse[..2 * 4 * 32]
            .iter()
            .all(|&value| value == f32::NEG_INFINITY)
    );
}

/// A (batch, sequence, heads, head_dim) tensor goes in and out by strides; what lies between its
/// rows is not touched.
#[test]
fn strides_need_no_copy() {
    let (tokens, heads, dim, row) = (48, 2, 16, 20);
    let shape = [1, heads, tokens, dim];
    let strides = [0, row as isize, (heads * row) as isize, 1];
    let padded: Vec<f32> = (0..tokens * heads * row)
        .map(|i| (i as f32 * 0.7).sin())
        .collect();
    let dense: Vec<f32> = (0..heads * tokens * dim)
        .map(|i| {
            let (head, token, d) = (i / dim / tokens, i / dim % tokens, i % dim);
            padded[(token * heads + head) * row + d]
        })
        .collect();
    let plan = Plan::new(&builders::causal(extents(tokens, tokens)));
    let options = Options::default();
    let (mut lse, mut strided_lse) = (vec![0f32; heads * tokens], vec![0f32; heads * tokens]);
    let lse_shape = [1, heads, tokens, 1];

    let mut out = vec![0f32; dense.len()];
    let input = Tensor::new(&dense, shape).unwrap();
    let to = TensorMut::new(&mut out, shape).unwrap();
    let to_lse = TensorMut::new(&mut lse, lse_shape).unwrap();
    forward(input, input, input, plan.view(), &options, to, to_lse).unwrap();

    let mut strided_out = vec![777f32; padded.len()];
    let input = Tensor::strided(&padded, shape, strides).unwrap();
    let to = TensorMut::strided(&mut strided_out, shape, strides).unwrap();
    let to_lse = TensorMut::new(&mut strided_lse, lse_shape).unwrap();
    forward(input, input, input, plan.view(), &options, to, to_lse).unwrap();

    assert_eq!(lse, strided_lse);
    for (i, &value) in strided_out.iter().enumerate() {
        let (token, head, d) = (i / row / heads, i / row % heads, i % row);
        let expected = if d < dim {
            out[(head * tokens + token) * dim + d]
        } else {
            777.0
        };
        assert_eq!(value, expected);
    }
}
