//! Masks and plans: builders as class methods, plans written into the caller's memory.

use flex_block_attn::builders::{self, StaCanvas};
use flex_block_attn::expression::Evaluator;
use flex_block_attn::{self as fba, BoolMatrix, Extents, Plan, PlanLayout};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::python_mask;
use crate::expression::RawExact;

/// (q_len, kv_len, q_block, kv_block)
pub type RawExtents = (usize, usize, usize, usize);

pub fn extents((q_len, kv_len, q_block, kv_block): RawExtents) -> PyResult<Extents> {
    Extents::new(q_len, kv_len, q_block, kv_block).map_err(python_mask)
}

/// Tokens of a block where nobody says.
#[pyfunction]
pub fn default_block(q_len: usize, kv_len: usize) -> usize {
    Extents::default_block(q_len, kv_len)
}

/// Words of the plan of one (batch, head) matrix.
#[pyfunction]
pub fn plan_words(sizes: RawExtents) -> PyResult<usize> {
    let layout = PlanLayout {
        extents: extents(sizes)?,
        batch: 1,
        heads: 1,
    };
    Ok(layout.record_words())
}

/// Plans a bool matrix, `(address, shape, strides)` in (batch, head, row, column) order, into the
/// int32 memory `(address, words)`.
#[pyfunction]
pub fn write_plan(
    py: Python<'_>,
    blocks: (usize, [usize; 4], [usize; 4]),
    sizes: RawExtents,
    to: (usize, usize),
) -> PyResult<()> {
    let extents = extents(sizes)?;
    let (address, shape, strides) = blocks;
    py.detach(|| {
        let len = if shape.contains(&0) {
            0
        } else {
            1 + shape
                .iter()
                .zip(strides)
                .map(|(n, stride)| (n - 1) * stride)
                .sum::<usize>()
        };
        // SAFETY: `ops.py` holds the mask, a bool tensor (bytes of 0 and 1) of this shape and
        // these strides, for the length of this call.
        let bytes = unsafe { slice(address, len) };
        let matrix = BoolMatrix::new(bytes, shape, strides).map_err(python_mask)?;
        let mask = fba::BlockMask::from_matrix(extents, matrix).map_err(python_mask)?;
        let plan = Plan::new(&mask);
        let words = plan.words();
        if words.len() != to.1 {
            let text = format!("the plan has {} words, its tensor {}", words.len(), to.1);
            return Err(PyValueError::new_err(text));
        }
        if !words.is_empty() {
            // SAFETY: `ops.py` has allocated that many int32 numbers there for this call alone.
            let to = unsafe { std::slice::from_raw_parts_mut(to.0 as *mut i32, to.1) };
            to.copy_from_slice(words);
        }
        Ok(())
    })
}

/// # Safety
/// `len` bytes there are readable during `'a`.
unsafe fn slice<'a>(address: usize, len: usize) -> &'a [u8] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(address as *const u8, len) }
}

/// Which pairs count. The mask's tables are on the host.
fn tokens(mask: &fba::BlockMask, batch: usize, head: usize) -> Vec<u8> {
    let extents = mask.extents();
    let kv_len = extents.kv_len();
    let mut tokens = vec![0; extents.q_len() * kv_len];
    let mut evaluator = mask.expression().and_then(Evaluator::new);
    for row in 0..extents.q_blocks() {
        for column in mask.row(batch, head, row) {
            let keys = extents.kv_tokens(column);
            let is_partial = mask.is_partial(batch, head, row, column);
            let Some(evaluator) = evaluator.as_mut().filter(|_| is_partial) else {
                for query in extents.q_tokens(row) {
                    tokens[query * kv_len..][keys.clone()].fill(1);
                }
                continue;
            };
            for start in keys.clone().step_by(Evaluator::MOST_KEYS) {
                let part = start..(start + Evaluator::MOST_KEYS).min(keys.end);
                evaluator.tile(batch, head, part.clone());
                for query in extents.q_tokens(row) {
                    let to = &mut tokens[query * kv_len..][part.clone()];
                    for (to, &counts) in to.iter_mut().zip(evaluator.row(query)) {
                        *to = (counts & 1) as u8;
                    }
                }
            }
        }
    }
    tokens
}

/// A mask of the library, for `masks.py` to build one and to look at it.
#[pyclass(frozen)]
pub struct BlockMask(fba::BlockMask);

impl BlockMask {
    /// The library's own.
    pub fn library(&self) -> &fba::BlockMask {
        &self.0
    }
}

#[pymethods]
impl BlockMask {
    /// Whether all blocks are computed, and whole.
    #[getter]
    fn is_full(&self) -> bool {
        self.0.is_full()
    }

    #[staticmethod]
    fn full(sizes: RawExtents) -> PyResult<Self> {
        Ok(Self(builders::full(extents(sizes)?)))
    }

    #[staticmethod]
    fn causal(sizes: RawExtents) -> PyResult<Self> {
        Ok(Self(builders::causal(extents(sizes)?)))
    }

    #[staticmethod]
    fn sliding_window(sizes: RawExtents, left: usize, right: usize) -> PyResult<Self> {
        Ok(Self(builders::sliding_window(extents(sizes)?, left, right)))
    }

    #[staticmethod]
    fn random(
        sizes: RawExtents,
        batch: usize,
        heads: usize,
        density: f64,
        seed: u64,
    ) -> PyResult<Self> {
        let mask = builders::random(extents(sizes)?, batch, heads, density, seed);
        Ok(Self(mask.map_err(python_mask)?))
    }

    #[staticmethod]
    fn sta(
        tiles: [usize; 3],
        window: [usize; 3],
        tile_tokens: usize,
        text_tokens: usize,
    ) -> PyResult<Self> {
        let canvas = StaCanvas {
            tiles,
            window,
            tile_tokens,
            text_tokens,
        };
        Ok(Self(builders::sta(&canvas).map_err(python_mask)?))
    }

    #[staticmethod]
    fn from_blocks(sizes: RawExtents, blocks: Vec<(usize, usize)>) -> PyResult<Self> {
        let mask = fba::BlockMask::from_blocks(extents(sizes)?, blocks);
        Ok(Self(mask.map_err(python_mask)?))
    }

    /// From dense bytes in (batch, head, row, column) order.
    #[staticmethod]
    fn from_bytes(sizes: RawExtents, batch: usize, heads: usize, bytes: &[u8]) -> PyResult<Self> {
        let extents = extents(sizes)?;
        let (rows, columns) = (extents.q_blocks(), extents.kv_blocks());
        let shape = [batch, heads, rows, columns];
        let strides = [heads * rows * columns, rows * columns, columns, 1];
        let matrix = BoolMatrix::new(bytes, shape, strides).map_err(python_mask)?;
        Ok(Self(
            fba::BlockMask::from_matrix(extents, matrix).map_err(python_mask)?,
        ))
    }

    /// The blocks that an expression wants.
    #[staticmethod]
    fn from_expression(
        py: Python<'_>,
        sizes: RawExtents,
        batch: usize,
        heads: usize,
        exact: RawExact,
    ) -> PyResult<Self> {
        let extents = extents(sizes)?;
        let expression = exact.expression()?;
        let mask =
            py.detach(|| fba::BlockMask::from_expression(extents, batch, heads, &expression));
        Ok(Self(mask.map_err(python_mask)?))
    }

    /// From dense bytes in (batch, head, row, column) order: which blocks are computed, and of which
    /// only those pairs that an expression lets through.
    #[staticmethod]
    fn from_parts(
        sizes: RawExtents,
        batch: usize,
        heads: usize,
        wanted: &[u8],
        partial: &[u8],
        exact: RawExact,
    ) -> PyResult<Self> {
        let extents = extents(sizes)?;
        let (rows, columns) = (extents.q_blocks(), extents.kv_blocks());
        let shape = [batch, heads, rows, columns];
        let strides = [heads * rows * columns, rows * columns, columns, 1];
        let matrix = |bytes| BoolMatrix::new(bytes, shape, strides).map_err(python_mask);
        let (wanted, partial) = (matrix(wanted)?, matrix(partial)?);
        let expression = exact.expression()?;
        Ok(Self(
            fba::BlockMask::from_matrices(extents, wanted, partial, expression)
                .map_err(python_mask)?,
        ))
    }

    /// Whether its expression looks up the numbers of this one.
    fn looks_up_as(&self, exact: RawExact) -> PyResult<bool> {
        let tables = self.0.expression().map_or(&[][..], |known| known.tables());
        exact.looks_up(tables)
    }

    /// Writes its plan into the int32 memory `(address, words)`.
    fn write_plan(&self, py: Python<'_>, to: (usize, usize)) -> PyResult<()> {
        py.detach(|| {
            let words: &mut [i32] = match to.1 {
                0 => &mut [],
                // SAFETY: `masks.py` has allocated that many int32 numbers there for this call alone.
                words => unsafe { std::slice::from_raw_parts_mut(to.0 as *mut i32, words) },
            };
            Plan::write(&self.0, words).map_err(python_mask)
        })
    }

    /// How many int64 numbers hold its bits, of which a GPU makes its plan.
    fn bit_words(&self) -> usize {
        self.0.bit_words()
    }

    /// Computed blocks, and those of them that are partial.
    fn counts(&self) -> (usize, usize) {
        (self.0.count(), self.0.count_partial())
    }

    /// Partial blocks as dense bytes of 0 and 1 in (batch, head, row, column) order.
    fn partial_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.partial_to_dense())
    }

    /// All pairs of a batch and a head as bytes of 0 and 1, in (query, key) order.
    fn tokens<'py>(&self, py: Python<'py>, batch: usize, head: usize) -> Bound<'py, PyBytes> {
        let tokens = py.detach(|| tokens(&self.0, batch, head));
        PyBytes::new(py, &tokens)
    }

    /// (batch, heads, rows, columns)
    #[getter]
    fn shape(&self) -> (usize, usize, usize, usize) {
        let extents = self.0.extents();
        (
            self.0.batch(),
            self.0.heads(),
            extents.q_blocks(),
            extents.kv_blocks(),
        )
    }

    /// (q_len, kv_len, q_block, kv_block)
    #[getter]
    fn extents(&self) -> RawExtents {
        let e = self.0.extents();
        (e.q_len(), e.kv_len(), e.q_block(), e.kv_block())
    }

    fn density(&self) -> f64 {
        self.0.density()
    }

    /// Dense bytes of 0 and 1 in (batch, head, row, column) order.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_dense())
    }

    fn picture(&self, batch: usize, head: usize, columns: usize) -> PyResult<String> {
        if batch >= self.0.batch() || head >= self.0.heads() {
            return Err(PyValueError::new_err(format!(
                "batch {batch} and head {head} must be below {} and {}",
                self.0.batch(),
                self.0.heads()
            )));
        }
        Ok(self.0.picture(batch, head, columns))
    }
}
