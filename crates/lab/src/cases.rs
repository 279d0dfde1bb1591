//! Problems for tests: sizes, a mask, a scale and random values of a dtype; run by the public API
//! and by the reference, and compared.

use std::num::NonZeroUsize;

use flex_block_attn::{
    BlockMask, DType, Element, Gradients, Options, Plan, Saved, Tensor, TensorMut, backward, bf16,
    f16, forward,
};

use crate::problems::Rule;
use crate::reference::{self, Attention, Problem, Sizes};

/// Element types with conversions to and from float64.
pub trait Number: Element + Default + PartialEq + std::fmt::Debug {
    /// Type of the lse.
    type Lse: Number;
    /// Rounds.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Largest allowed relative error (by norm) of outputs and gradients against float64.
    const TOLERANCE: f64;
}

macro_rules! numbers {
    ($($type:ty, $lse:ty, $tolerance:literal, |$x:ident| $from:expr;)*) => {$(
        impl Number for $type {
            type Lse = $lse;
            fn from_f64($x: f64) -> Self {
                $from
            }
            fn to_f64(self) -> f64 {
                self.into()
            }
            const TOLERANCE: f64 = $tolerance;
        }
    )*};
}

numbers! {
    f64, f64, 1e-13, |x| x;
    f32, f32, 1e-5, |x| x as f32;
    bf16, f32, 5e-3, |x| bf16::from_f64(x);
    f16, f32, 5e-4, |x| f16::from_f64(x);
}

/// A problem without its values, which a seed gives.
#[derive(Debug, Clone)]
pub struct Case {
    /// Sizes.
    pub sizes: Sizes,
    /// Which blocks.
    pub mask: BlockMask,
    /// Factor of q k^T.
    pub scale: f64,
    /// Seed of all values.
    pub seed: u64,
    /// Threads of the backend.
    pub threads: usize,
}

/// Results of a backend, as float64.
#[derive(Debug, Clone, PartialEq)]
pub struct Results {
    /// Output.
    pub out: Vec<f64>,
    /// lse.
    pub lse: Vec<f64>,
    /// Gradients of q, k and v.
    pub gradients: [Vec<f64>; 3],
}

impl Case {
    /// Pseudo-random values, about normal, rounded to `T`; `which` tells tensors apart.
    pub fn values<T: Number>(&self, which: u64, len: usize) -> Vec<T> {
        let mut state = self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ which << 32 | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        };
        (0..len)
            .map(|_| T::from_f64((0..4).map(|_| uniform()).sum::<f64>() * 1.7))
            .collect()
    }

    fn tensors<T: Number>(&self) -> [Vec<T>; 4] {
        let (q, kv) = (self.sizes.q_shape(), self.sizes.kv_shape());
        let mut which = 0;
        [q, kv, kv, q].map(|shape| {
            which += 1;
            self.values(which, shape.iter().product())
        })
    }

    /// Forward and backward through the public API.
    pub fn run<T: Number>(&self) -> Results {
        let [q, k, v, dout] = self.tensors::<T>();
        let (q_shape, kv_shape) = (self.sizes.q_shape(), self.sizes.kv_shape());
        let lse_shape = self.sizes.lse_shape();
        let lse_len = lse_shape.iter().product();
        let dlse: Vec<T::Lse> = self.values(5, lse_len);
        let plan = Plan::new(&self.mask);
        let options = Options {
            scale: Some(self.scale),
            threads: NonZeroUsize::new(self.threads),
            deterministic: false,
            video: None,
        };
        // Garbage to start with: what is not written shows.
        let garbage = |len| vec![T::from_f64(777.0); len];
        let (mut out, mut lse) = (garbage(q.len()), vec![T::Lse::from_f64(777.0); lse_len]);
        forward(
            Tensor::new(&q, q_shape).unwrap(),
            Tensor::new(&k, kv_shape).unwrap(),
            Tensor::new(&v, kv_shape).unwrap(),
            plan.view(),
            &options,
            TensorMut::new(&mut out, q_shape).unwrap(),
            TensorMut::new(&mut lse, lse_shape).unwrap(),
        )
        .unwrap();
        let (mut dq, mut dk, mut dv) = (garbage(q.len()), garbage(k.len()), garbage(v.len()));
        backward(
            Saved {
                q: Tensor::new(&q, q_shape).unwrap(),
                k: Tensor::new(&k, kv_shape).unwrap(),
                v: Tensor::new(&v, kv_shape).unwrap(),
                out: Tensor::new(&out, q_shape).unwrap(),
                lse: Tensor::new(&lse, lse_shape).unwrap(),
            },
            Tensor::new(&dout, q_shape).unwrap(),
            Some(Tensor::new(&dlse, lse_shape).unwrap()),
            plan.view(),
            &options,
            Gradients {
                dq: Some(TensorMut::new(&mut dq, q_shape).unwrap()),
                dk: Some(TensorMut::new(&mut dk, kv_shape).unwrap()),
                dv: Some(TensorMut::new(&mut dv, kv_shape).unwrap()),
            },
        )
        .unwrap();
        Results {
            out: to_f64(&out),
            lse: to_f64(&lse),
            gradients: [to_f64(&dq), to_f64(&dk), to_f64(&dv)],
        }
    }

    /// The same by the reference, over the same rounded values. Gradients are those of a backward pass that is
    /// given `saved` as the output; without it, the exact ones.
    ///
    /// A backward pass computes delta = dout · out of the output as it was saved, rounded to `T` (FlashAttention-2,
    /// arXiv 2307.08691, algorithm 2). Where scores are large, dq and dk are small differences, which that rounding
    /// alone moves by more than all else does: it is a change of dlse.
    pub fn expected<T: Number>(&self, saved: Option<&[f64]>) -> Results {
        let [q, k, v, dout] = self.tensors::<T>().map(|values| to_f64(&values));
        let lse_len = self.sizes.lse_shape().iter().product();
        let mut dlse = to_f64(&self.values::<T::Lse>(5, lse_len));
        let problem = Problem {
            sizes: self.sizes,
            scale: self.scale,
            q: &q,
            k: &k,
            v: &v,
        };
        let extents = self.mask.extents();
        let rule = Rule::of(&self.mask);
        let keep = |batch: usize, head: usize, query: usize, key: usize| {
            let (b, h) = (
                batch.min(self.mask.batch() - 1),
                head.min(self.mask.heads() - 1),
            );
            let (row, column) = (query / extents.q_block(), key / extents.kv_block());
            self.mask.contains(b, h, row, column)
                && (!self.mask.is_partial(b, h, row, column)
                    || rule
                        .as_ref()
                        .is_some_and(|rule| rule.counts(batch, head, query, key)))
        };
        let Attention { out, lse } = problem.attention(&keep);
        if let Some(saved) = saved {
            let moved: Vec<f64> = (0..out.len())
                .map(|i| (saved[i] - out[i]) * dout[i])
                .collect();
            for (dlse, moved) in dlse.iter_mut().zip(moved.chunks(self.sizes.head_dim)) {
                *dlse -= moved.iter().sum::<f64>();
            }
        }
        let reference::Gradients { dq, dk, dv } = problem.gradients(&keep, &dout, &dlse);
        Results {
            out,
            lse,
            gradients: [dq, dk, dv],
        }
    }

    /// What differs by more than `T` allows from the reference, if anything; gradients from those of the output
    /// that was saved.
    pub fn difference<T: Number>(&self) -> Option<String> {
        let got = self.run::<T>();
        Self::compare::<T>(&got, &self.expected::<T>(Some(&got.out)))
    }

    /// The same, gradients from the exact ones: for scores of moderate size.
    pub fn difference_from_exact<T: Number>(&self) -> Option<String> {
        Self::compare::<T>(&self.run::<T>(), &self.expected::<T>(None))
    }

    fn compare<T: Number>(got: &Results, want: &Results) -> Option<String> {
        let named = [
            ("out", &got.out, &want.out),
            ("dq", &got.gradients[0], &want.gradients[0]),
            ("dk", &got.gradients[1], &want.gradients[1]),
            ("dv", &got.gradients[2], &want.gradients[2]),
        ];
        for (name, got, want) in named {
            let error = relative_error(got, want);
            if error.is_nan() || error > T::TOLERANCE {
                return Some(format!("{} {name}: relative error {error:e}", T::DTYPE));
            }
        }
        // The lse is float32 whatever the tensors are, but sums what they were rounded to.
        let tolerance = if T::DTYPE == DType::F64 { 1e-12 } else { 2e-5 };
        let far = |(got, want): (&f64, &f64)| {
            got != want && (got - want).abs() > tolerance * want.abs().max(1.0) || got.is_nan()
        };
        if let Some(at) = got.lse.iter().zip(&want.lse).position(far) {
            let (got, want) = (got.lse[at], want.lse[at]);
            return Some(format!("{} lse[{at}]: {got} for {want}", T::DTYPE));
        }
        None
    }
}

fn to_f64<T: Number>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| value.to_f64()).collect()
}

/// |got - want| / |want|, by the Euclidean norm; 0 if both are nothing, infinite if only `want` is.
pub fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
    if error == 0.0 {
        0.0
    } else {
        error / norm(&mut want.iter().copied())
    }
}
