//! Choices of tiles on CUDA tensors: addresses and a stream to the library. [`select_numbers`] says
//! beforehand whether the library takes tensors and a choice, and what a call needs. Called by `direct.py`
//! and `launch.py`, who allocates what is written.

use flex_block_attn::Video;
use flex_block_attn::gpu::{self, Order, Selection};
use flex_block_attn::select::{Choice, Scoring};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::attention::Unbound;
use crate::direct::taken;
use crate::error::python;
use crate::gpu::stream;
use crate::tensor::{Kind, Raw};

/// A video as it crosses: thw, tile, text_len, and whether padding counts as zeros; without that, tokens
/// are in tile order.
type RawOrder = ([usize; 3], [usize; 3], usize, Option<bool>);

/// A choice as it crosses: tiles that a row keeps, the weight of relevance if it is by importance, and
/// whether heads share a mask.
type RawChoice = (usize, Option<f64>, bool);

/// A video, and whether its tokens lie as they come.
struct Tokens {
    video: Video,
    in_place: bool,
}

impl Tokens {
    fn new((thw, tile, text_len, zeros_count): RawOrder) -> PyResult<Self> {
        let raw = (thw, tile, text_len, zeros_count.unwrap_or(true));
        let video = crate::attention::video(Some(raw))?;
        Ok(Self {
            video: video.expect("there is one"),
            in_place: zeros_count.is_some(),
        })
    }

    fn tiles(&self) -> usize {
        self.video.tiles().iter().product()
    }

    fn blocks(&self) -> usize {
        self.tiles() + self.video.text_len.div_ceil(self.video.block())
    }

    fn order(&self) -> Order<'_> {
        match self.in_place {
            true => Order::Video(&self.video),
            false => Order::Tiles {
                tiles: self.tiles(),
                block: self.video.block(),
            },
        }
    }
}

fn choice((top, lambda, share_heads): RawChoice) -> Choice {
    let scoring = match lambda {
        None => Scoring::Similarity,
        Some(lambda) => Scoring::Importance { lambda },
    };
    Choice {
        share_heads,
        ..Choice::new(top, scoring)
    }
}

/// The numbers, in float32, of [`select_cuda`]'s workspace; none for what the library does not take as it
/// is.
#[pyfunction]
pub fn select_numbers(
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    order: RawOrder,
    choice: RawChoice,
) -> PyResult<Option<usize>> {
    let Some([q, k, _]) = taken([q, k, k])? else {
        return Ok(None);
    };
    let Ok(tokens) = Tokens::new(order) else {
        return Ok(None);
    };
    // SAFETY: nothing is read but layouts.
    let (q, k) = unsafe { (q.read("q")?, k.read("k")?) };
    Ok(gpu::selection_numbers(&q, &k, tokens.order(), &self::choice(choice)).ok())
}

/// Chooses tiles on a GPU: writes `mask`, bool (batch, heads or 1, blocks, blocks), united with `base`,
/// bool (..., blocks, blocks). `text_lengths`, int64 (batch), are the tokens of text that count; all do
/// without. `workspace` is of as many numbers as [`select_numbers`] says.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn select_cuda(
    py: Python<'_>,
    inputs: (Raw, Raw),
    order: RawOrder,
    choice: RawChoice,
    base: Raw,
    text_lengths: Option<Raw>,
    mask: Raw,
    workspace: Raw,
) -> PyResult<()> {
    let (q, k) = inputs;
    let (tokens, choice) = (Tokens::new(order)?, self::choice(choice));
    let blocks = tokens.blocks();
    let all = [
        Some(&k),
        Some(&base),
        text_lengths.as_ref(),
        Some(&mask),
        Some(&workspace),
    ];
    if all.into_iter().flatten().any(|tensor| tensor.gpu != q.gpu) {
        return Err(PyValueError::new_err("all tensors must be on q's GPU"));
    }
    let heads = if choice.share_heads { 1 } else { q.shape[1] };
    check("base", &base, Kind::Bool, blocks * blocks)?;
    check(
        "mask",
        &mask,
        Kind::Bool,
        q.shape[0] * heads * blocks * blocks,
    )?;
    if let Some(lengths) = &text_lengths {
        check("text_lengths", lengths, Kind::Int64, q.shape[0])?;
    }
    let selection = Selection {
        mask: mask.address as u64,
        base: base.address as u64,
        blocks,
        text_lengths: text_lengths.map(|lengths| lengths.address as u64),
        workspace: workspace.address as u64,
    };
    let on = stream(py, &q)?;
    // SAFETY: all layouts were read from tensors, now seen to be on the stream's device and as large as
    // they must be; torch's allocator keeps them until the stream has come past this call.
    unsafe {
        let (q, k) = (q.read("q")?, k.read("k")?);
        let needed = gpu::selection_numbers(&q, &k, tokens.order(), &choice).map_err(python)?;
        if workspace.shape.iter().product::<usize>() < needed {
            let text = "workspace must have as many numbers as select_numbers says";
            return Err(PyValueError::new_err(text));
        }
        let call = Unbound((q, k));
        py.detach(move || {
            let Unbound((q, k)) = call.whole();
            gpu::select(&q, &k, tokens.order(), &choice, &selection, on)
        })
    }
    .map_err(python)
}

/// Refuses a tensor of another kind, of another number of elements, or with gaps.
fn check(argument: &str, tensor: &Raw, kind: Kind, count: usize) -> PyResult<()> {
    let elements: usize = tensor.shape.iter().product();
    if tensor.kind == kind && elements == count && tensor.is_contiguous() {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "{argument} must be contiguous, of {count} elements"
    )))
}
