//! Forward and backward: tuples to views, then the library.

use std::num::NonZeroUsize;

use flex_block_attn::expression::Expression;
use flex_block_attn::{Gradients, Options, Padding, PlanLayout, PlanView, Saved, Video};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::{python, python_mask};
use crate::expression::RawExact;
use crate::mask::extents;
use crate::tensor::{Kind, Raw};

/// A plan as it crosses: an int32 tensor (batch, heads, words), and tokens of the blocks of queries and
/// of keys.
#[derive(FromPyObject)]
pub struct RawPlan(pub Raw, pub usize, pub usize);

impl RawPlan {
    /// Its address and its layout for these queries and keys, or for the places of a video, by which it
    /// has as many words as it has.
    pub fn layout(&self, q: &Raw, k: &Raw, video: Option<&Video>) -> PyResult<(usize, PlanLayout)> {
        let &Self(ref plan, q_block, kv_block) = self;
        let [batch, heads, words, _] = plan.shape;
        if plan.kind != Kind::Int32 || plan.dimensions != 3 || !plan.is_contiguous() {
            let text = "plan must come from flex_block_attn::plan";
            return Err(PyValueError::new_err(text));
        }
        let (q_len, kv_len) = match video {
            None => (q.shape[2], k.shape[2]),
            Some(video) => (video.places(), video.places()),
        };
        let layout = PlanLayout {
            extents: extents((q_len, kv_len, q_block, kv_block))?,
            batch,
            heads,
        };
        layout
            .check_words(batch * heads * words)
            .map_err(python_mask)?;
        Ok((plan.address, layout))
    }

    /// # Safety
    /// The tensor is alive and not written during `'a`.
    unsafe fn view<'a>(
        &self,
        q: &Raw,
        k: &Raw,
        video: Option<&Video>,
        expression: Option<&'a Expression>,
    ) -> PyResult<PlanView<'a>> {
        let (address, layout) = self.layout(q, k, video)?;
        let words: &[i32] = match layout.words() {
            0 => &[],
            // SAFETY: the caller's promise; torch aligns int32 tensors to their elements.
            words => unsafe { std::slice::from_raw_parts(address as *const i32, words) },
        };
        match expression {
            Some(expression) => PlanView::with_expression(layout, words, expression),
            None => PlanView::new(layout, words),
        }
        .map_err(python_mask)
    }
}

/// A video as it crosses: thw, tile, text_len, and whether padding is attended.
pub type RawVideo = ([usize; 3], [usize; 3], usize, bool);

/// The video, whose sizes are such that its places can be counted.
pub fn video(raw: Option<RawVideo>) -> PyResult<Option<Video>> {
    let Some((thw, tile, text_len, attended)) = raw else {
        return Ok(None);
    };
    let video = Video {
        thw,
        tile,
        text_len,
        padding: match attended {
            true => Padding::Zero,
            false => Padding::Exact,
        },
    };
    video.check_sizes().map_err(python)?;
    Ok(Some(video))
}

fn options((scale, threads): (f64, usize), video: Option<Video>) -> Options {
    Options {
        scale: Some(scale),
        threads: NonZeroUsize::new(threads),
        deterministic: false,
        video,
    }
}

/// Writes `out` and `lse`. `settings` are scale and threads; a `video` is one whose tokens these are.
#[pyfunction]
#[pyo3(signature = (inputs, plan, settings, outputs, exact=None, video=None))]
pub fn forward(
    py: Python<'_>,
    inputs: (Raw, Raw, Raw),
    plan: RawPlan,
    settings: (f64, usize),
    outputs: (Raw, Raw),
    exact: Option<RawExact>,
    video: Option<RawVideo>,
) -> PyResult<()> {
    let video = self::video(video)?;
    // SAFETY: `ops.py` holds all tensors for the length of this call, has just read their layouts,
    // and has allocated the outputs itself.
    unsafe {
        let (q, k, v) = (
            inputs.0.read("q")?,
            inputs.1.read("k")?,
            inputs.2.read("v")?,
        );
        let (out, lse) = (outputs.0.write("out")?, outputs.1.write("lse")?);
        let expression = exact.map(|exact| exact.expression()).transpose()?;
        let plan = plan.view(&inputs.0, &inputs.1, video.as_ref(), expression.as_ref())?;
        let options = options(settings, video);
        let call = Unbound((q, k, v, plan, options, out, lse));
        py.detach(move || {
            let Unbound((q, k, v, plan, options, out, lse)) = call.whole();
            flex_block_attn::forward(q, k, v, plan, &options, out, lse)
        })
    }
    .map_err(python)
}

/// Writes the gradients that are not `None`. `saved` are q, k, v, out and lse; `gradients` those
/// of out and, perhaps, of lse; `outputs` those of q, k and v; `video` as for `forward`.
#[pyfunction]
#[pyo3(signature = (saved, gradients, plan, settings, outputs, exact=None, video=None))]
#[allow(clippy::too_many_arguments)]
pub fn backward(
    py: Python<'_>,
    saved: (Raw, Raw, Raw, Raw, Raw),
    gradients: (Raw, Option<Raw>),
    plan: RawPlan,
    settings: (f64, usize),
    outputs: (Option<Raw>, Option<Raw>, Option<Raw>),
    exact: Option<RawExact>,
    video: Option<RawVideo>,
) -> PyResult<()> {
    let video = self::video(video)?;
    // SAFETY: as for `forward`.
    unsafe {
        let expression = exact.map(|exact| exact.expression()).transpose()?;
        let plan = plan.view(&saved.0, &saved.1, video.as_ref(), expression.as_ref())?;
        let saved = Saved {
            q: saved.0.read("q")?,
            k: saved.1.read("k")?,
            v: saved.2.read("v")?,
            out: saved.3.read("out")?,
            lse: saved.4.read("lse")?,
        };
        let dout = gradients.0.read("dout")?;
        let dlse = gradients.1.map(|dlse| dlse.read("dlse")).transpose()?;
        let write = |raw: Option<Raw>, name: &str| raw.map(|raw| raw.write(name)).transpose();
        let gradients = Gradients {
            dq: write(outputs.0, "dq")?,
            dk: write(outputs.1, "dk")?,
            dv: write(outputs.2, "dv")?,
        };
        let options = options(settings, video);
        let call = Unbound((saved, dout, dlse, plan, options, gradients));
        py.detach(move || {
            let Unbound((saved, dout, dlse, plan, options, gradients)) = call.whole();
            flex_block_attn::backward(saved, dout, dlse, plan, &options, gradients)
        })
    }
    .map_err(python)
}

/// Views that leave the GIL behind.
pub struct Unbound<T>(pub T);

// SAFETY: the views are addresses and sizes; their tensors are held by the Python caller until the
// call returns, whichever thread works.
unsafe impl<T> Send for Unbound<T> {}

impl<T> Unbound<T> {
    /// Itself: a closure that calls this captures the whole, not the fields that are not `Send`.
    pub fn whole(self) -> Self {
        self
    }
}
