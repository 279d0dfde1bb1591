//! All that can be wrong with a call, looked at once, before anything is computed.

use flex_block_attn_mask::PlanLayout;
use flex_block_attn_mask::expression::Formula;

use crate::{DType, Error, Gradients, Options, Result, Saved, Tensor, TensorMut, Video};

/// What a check knows of a mask: its plan's layout, and by which pairs are chosen, if they are.
#[derive(Clone, Copy)]
pub(crate) struct Mask<'a> {
    pub layout: &'a PlanLayout,
    pub formula: Option<&'a Formula>,
}

/// Sizes of a call whose arguments go together.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    q: [usize; 4],
    kv: [usize; 4],
    dtype: DType,
}

/// What tensors to read and to write have in common for a check.
struct Outline {
    name: &'static str,
    dtype: DType,
    shape: [usize; 4],
    strides: [isize; 4],
}

impl Outline {
    fn read(name: &'static str, tensor: &Tensor<'_>) -> Self {
        let (dtype, shape, strides) = (tensor.dtype, tensor.shape, tensor.strides);
        Self {
            name,
            dtype,
            shape,
            strides,
        }
    }

    fn write(name: &'static str, tensor: &TensorMut<'_>) -> Self {
        let (dtype, shape, strides) = (tensor.dtype, tensor.shape, tensor.strides);
        Self {
            name,
            dtype,
            shape,
            strides,
        }
    }

    fn dtype(&self, needed: DType, reason: &'static str) -> Result<()> {
        if self.dtype == needed {
            return Ok(());
        }
        Err(Error::DType {
            argument: self.name,
            got: self.dtype,
            needed,
            reason,
        })
    }

    fn shape(&self, needed: [usize; 4], reason: &'static str) -> Result<()> {
        if self.shape == needed {
            return Ok(());
        }
        Err(Error::Shape {
            argument: self.name,
            got: self.shape,
            needed,
            reason,
        })
    }

    fn last_contiguous(&self) -> Result<()> {
        if self.strides[3] == 1 || self.shape[3] <= 1 || self.shape.contains(&0) {
            return Ok(());
        }
        Err(Error::LastStride {
            argument: self.name,
            got: self.strides[3],
        })
    }

    /// Sorted by stride, each dimension must step over all that the smaller ones span. (Stricter
    /// than needed for odd interleavings, which no allocator makes.)
    fn apart(&self) -> Result<()> {
        let mut dims: Vec<(usize, usize)> = self
            .shape
            .into_iter()
            .zip(self.strides)
            .filter(|&(extent, _)| extent > 1)
            .map(|(extent, stride)| (stride.unsigned_abs(), extent))
            .collect();
        dims.sort_unstable();
        let mut span = 1usize;
        for (stride, extent) in dims {
            if stride < span && !self.shape.contains(&0) {
                let (shape, strides) = (self.shape, self.strides);
                return Err(Error::Overlap {
                    argument: self.name,
                    shape,
                    strides,
                });
            }
            span = span.saturating_add((extent - 1).saturating_mul(stride));
        }
        Ok(())
    }
}

fn inputs(
    q: &Tensor<'_>,
    k: &Tensor<'_>,
    v: &Tensor<'_>,
    mask: Mask<'_>,
    options: &Options,
) -> Result<Sizes> {
    let plan = mask.layout;
    let [batch, q_heads, q_len, head_dim] = q.shape;
    if head_dim == 0 || head_dim > 256 || !head_dim.is_multiple_of(8) {
        return Err(Error::HeadDim { got: head_dim });
    }
    let [_, kv_heads, kv_len, _] = k.shape;
    let kv = [batch, kv_heads, kv_len, head_dim];
    Outline::read("k", k).shape(kv, "q")?;
    Outline::read("v", v).shape(kv, "k")?;
    if q_heads != kv_heads && (kv_heads == 0 || !q_heads.is_multiple_of(kv_heads)) {
        return Err(Error::Heads { q_heads, kv_heads });
    }
    for (name, tensor) in [("q", q), ("k", k), ("v", v)] {
        let outline = Outline::read(name, tensor);
        outline.dtype(q.dtype, "q")?;
        outline.last_contiguous()?;
    }

    if let Some(video) = &options.video {
        video.check(plan)?;
        let reason = "the video with its text";
        let needed = [batch, q_heads, video.tokens(), head_dim];
        Outline::read("q", q).shape(needed, reason)?;
        let needed = [batch, kv_heads, video.tokens(), head_dim];
        Outline::read("k", k).shape(needed, reason)?;
    }
    let (mask_q_len, mask_kv_len) = (plan.extents.q_len(), plan.extents.kv_len());
    let (q_len, kv_len) = match &options.video {
        None => (q_len, kv_len),
        Some(video) => (video.places(), video.places()),
    };
    if (mask_q_len, mask_kv_len) != (q_len, kv_len) {
        return Err(Error::MaskLengths {
            mask_q_len,
            mask_kv_len,
            q_len,
            kv_len,
        });
    }
    let depends = |on: fn(&Formula) -> bool| mask.formula.is_some_and(on);
    for (what, got, needed, tells_apart) in [
        (
            "batches",
            plan.batch,
            batch,
            depends(Formula::depends_on_batch),
        ),
        (
            "heads",
            plan.heads,
            q_heads,
            depends(Formula::depends_on_head),
        ),
    ] {
        if got != 1 && got != needed {
            return Err(Error::MaskExtent { what, got, needed });
        }
        if tells_apart && got < needed {
            return Err(Error::MaskTellsApart { what, needed });
        }
    }
    if let Some(got) = options.scale.filter(|scale| !scale.is_finite()) {
        return Err(Error::Scale { got });
    }
    Ok(Sizes {
        q: q.shape,
        kv,
        dtype: q.dtype,
    })
}

fn lse_shape([batch, heads, tokens, _]: [usize; 4], options: &Options) -> [usize; 4] {
    let places = options.video.as_ref().map_or(tokens, Video::places);
    [batch, heads, places, 1]
}

pub(crate) fn forward(
    [q, k, v]: [&Tensor<'_>; 3],
    mask: Mask<'_>,
    options: &Options,
    out: &TensorMut<'_>,
    lse: Option<&TensorMut<'_>>,
) -> Result<()> {
    let sizes = inputs(q, k, v, mask, options)?;
    let out = Outline::write("out", out);
    out.shape(sizes.q, "q")?;
    out.dtype(sizes.dtype, "q")?;
    out.last_contiguous()?;
    out.apart()?;
    let Some(lse) = lse else { return Ok(()) };
    let lse = Outline::write("lse", lse);
    lse.shape(lse_shape(sizes.q, options), "q")?;
    lse.dtype(sizes.dtype.lse(), "q's dtype")?;
    lse.apart()
}

/// A tensor whose tokens are read one by one.
pub(crate) fn pooled(x: &Tensor<'_>) -> Result<()> {
    Outline::read("x", x).last_contiguous()
}

/// Queries and keys whose tokens are pooled.
pub(crate) fn pooled_pair(q: &Tensor<'_>, k: &Tensor<'_>) -> Result<()> {
    let [of_q, of_k] = [Outline::read("q", q), Outline::read("k", k)];
    let [batch, q_heads, _, head_dim] = q.shape;
    let [_, kv_heads, tokens, _] = k.shape;
    of_k.dtype(q.dtype, "q")?;
    of_k.shape([batch, kv_heads, tokens, head_dim], "q")?;
    if kv_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
        return Err(Error::Heads { q_heads, kv_heads });
    }
    of_q.last_contiguous()?;
    of_k.last_contiguous()
}

pub(crate) fn backward(
    saved: &Saved<'_>,
    dout: &Tensor<'_>,
    dlse: Option<&Tensor<'_>>,
    mask: Mask<'_>,
    options: &Options,
    gradients: &Gradients<'_>,
) -> Result<()> {
    let sizes = inputs(&saved.q, &saved.k, &saved.v, mask, options)?;
    if options.video.is_some() && dlse.is_some() {
        return Err(Error::Video {
            argument: "dlse",
            got: "one".to_owned(),
            allowed: "none",
        });
    }
    for (name, tensor) in [("out", &saved.out), ("dout", dout)] {
        let outline = Outline::read(name, tensor);
        outline.shape(sizes.q, "q")?;
        outline.dtype(sizes.dtype, "q")?;
        outline.last_contiguous()?;
    }
    for (name, tensor) in [("lse", Some(&saved.lse)), ("dlse", dlse)] {
        if let Some(tensor) = tensor {
            let outline = Outline::read(name, tensor);
            outline.shape(lse_shape(sizes.q, options), "q")?;
            outline.dtype(sizes.dtype.lse(), "q's dtype")?;
        }
    }
    let written = [
        ("dq", &gradients.dq, sizes.q, "q"),
        ("dk", &gradients.dk, sizes.kv, "k"),
        ("dv", &gradients.dv, sizes.kv, "v"),
    ];
    for (name, tensor, shape, of) in written {
        if let Some(tensor) = tensor {
            let outline = Outline::write(name, tensor);
            outline.shape(shape, of)?;
            outline.dtype(sizes.dtype, of)?;
            outline.last_contiguous()?;
            outline.apart()?;
        }
    }
    Ok(())
}
