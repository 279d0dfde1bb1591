//! Attention over several parts of the keys, put together: arguments to a launch.

use flex_block_attn_kernels::Launch;
use flex_block_attn_kernels::combine::{Args, Config, MOST, Part};

use super::{Step, Stream, computed, in_memory, put, refused};
use crate::{DType, Result, Tensor, TensorMut};

/// The most parts that [`combine`] takes.
pub const MOST_PARTS: usize = MOST as usize;

/// The launch of [`combine`]; none if there are no rows.
///
/// # Errors
/// Arguments that do not go together, or that the kernel does not take.
pub fn combine_step(
    parts: &[(Tensor<'_>, Tensor<'_>)],
    out: &TensorMut<'_>,
    lse: &TensorMut<'_>,
) -> Result<Option<(Step, Launch)>> {
    let shape = out.shape;
    let [batch, heads, len, head_dim] = shape;
    if !(2..=MOST_PARTS).contains(&parts.len()) {
        return Err(refused("parts", parts.len(), "2 to 8"));
    }
    let (element, head_dim) = computed("out", out.dtype, head_dim)?;
    let rows = [batch, heads, len, 1];
    let alike = |out_: &Tensor<'_>, lse_: &Tensor<'_>| {
        (out_.shape, out_.dtype, lse_.shape, lse_.dtype) == (shape, out.dtype, rows, DType::F32)
    };
    if (lse.shape, lse.dtype) != (rows, DType::F32) || !parts.iter().all(|(o, l)| alike(o, l)) {
        let got = format!("parts that differ from {shape:?} of {}", out.dtype);
        return Err(refused(
            "parts",
            got,
            "of out's shape and dtype, with float32 lses",
        ));
    }
    if shape.contains(&0) {
        return Ok(None);
    }
    if batch > 65_535 || heads > 65_535 || u32::try_from(len).is_err() {
        return Err(refused(
            "out",
            format!("{shape:?}"),
            "of at most 65535 batches and heads",
        ));
    }
    let part = |(out, out_strides), (lse, lse_strides)| {
        Ok(Part {
            out: in_memory("out", out, shape, out_strides)?,
            lse,
            lse_strides: numbers(rows, lse_strides)?,
        })
    };
    let args = Args {
        parts: parts
            .iter()
            .map(|(o, l)| part((o.pointer as u64, o.strides), (l.pointer as u64, l.strides)))
            .collect::<Result<_>>()?,
        whole: part(
            (out.pointer as u64, out.strides),
            (lse.pointer as u64, lse.strides),
        )?,
        batch: batch as u32,
        heads: heads as u32,
        len: len as u32,
    };
    let config = Config {
        element,
        head_dim,
        parts: parts.len() as u32,
    };
    Ok(Some((Step::Combine(config), config.launch(&args))))
}

/// Numbers from one head and batch of an lse to the next; a head's follow each other.
fn numbers([batch, heads, len, _]: [usize; 4], strides: [isize; 4]) -> Result<[u64; 2]> {
    let stride = |extent: usize, stride: isize| match (extent, u64::try_from(stride)) {
        (..=1, _) => Some(0),
        (_, stride) => stride.ok(),
    };
    if (len <= 1 || strides[2] == 1)
        && let (Some(head), Some(batch)) = (stride(heads, strides[1]), stride(batch, strides[0]))
    {
        return Ok([head, batch]);
    }
    Err(refused(
        "lse",
        format!("strides {strides:?}"),
        "numbers of a head that follow each other",
    ))
}

/// Puts attention over 2 to [`MOST_PARTS`] parts of the keys together, on a stream: each part is output
/// and lse, as [`super::forward()`] writes them, of the same queries; a query without any key in a part
/// has an output of 0 and an lse of -inf there. The sum is rounded once. Bitwise repeatable.
///
/// # Errors
/// Arguments that do not go together or that the kernel does not take; no GPU. Nothing has been put on
/// the stream then.
///
/// # Safety
/// All pointers are of the device's memory, as large as shapes and strides say; nobody writes the parts,
/// or uses `out` and `lse`, before the stream has come past this call. The stream is alive.
pub unsafe fn combine(
    parts: &[(Tensor<'_>, Tensor<'_>)],
    out: TensorMut<'_>,
    lse: TensorMut<'_>,
    stream: Stream,
) -> Result<()> {
    if let Some((step, launch)) = combine_step(parts, &out, &lse)? {
        // SAFETY: the caller's word.
        unsafe { put(step, &launch, stream)? };
    }
    Ok(())
}
