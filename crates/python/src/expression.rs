//! Expressions as they cross: [`Steps`], which `trace.py` writes a mask's function down with, and
//! [`RawExact`], a formula as text with its tables as tensors.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use flex_block_attn::expression::{self, Expression, Formula, Step, Table};
use flex_block_attn::gpu;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::{python, python_mask};
use crate::tensor::{Kind, Raw};

/// A formula's text, and its tables: contiguous int32 tensors.
#[derive(FromPyObject)]
pub struct RawExact(String, Vec<Raw>);

impl RawExact {
    /// With a copy of the tables, which are on the host.
    pub fn expression(&self) -> PyResult<Expression> {
        let Self(text, tables) = self;
        let table = |raw: &Raw| {
            let (extents, values) = on_host(raw)?;
            Table::new(&extents, values.to_vec()).map_err(python_mask)
        };
        let tables = tables.iter().map(table).collect::<PyResult<_>>()?;
        Expression::from_formula(formula(text)?.clone(), tables).map_err(python_mask)
    }

    /// Whether the tables, which are on the host, have the numbers of these.
    pub fn looks_up(&self, others: &[Table]) -> PyResult<bool> {
        let Self(_, tables) = self;
        if tables.len() != others.len() {
            return Ok(false);
        }
        for (raw, other) in tables.iter().zip(others) {
            let (extents, values) = on_host(raw)?;
            if extents != other.extents() || Some(values) != other.values() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// With its tables where they are: on a device.
    pub fn on_device(&self) -> PyResult<gpu::Exact> {
        let Self(text, tables) = self;
        let table = |raw: &Raw| Ok((raw.address as u64, extents(raw)?));
        let tables = tables.iter().map(table).collect::<PyResult<_>>()?;
        gpu::Exact::new(formula(text)?, tables).map_err(python)
    }
}

/// Extents and numbers of a table, for the length of a call.
fn on_host(raw: &Raw) -> PyResult<(Vec<u32>, &[i32])> {
    let extents = extents(raw)?;
    let values = match extents.iter().map(|&extent| extent as usize).product() {
        0 => &[][..],
        // SAFETY: Python holds the tensor for the length of a call, which the borrow of `raw` does not
        // outlive; it is contiguous and int32, which torch aligns.
        len => unsafe { std::slice::from_raw_parts(raw.address as *const i32, len) },
    };
    Ok((extents, values))
}

fn extents(raw: &Raw) -> PyResult<Vec<u32>> {
    let shape = &raw.shape[..raw.dimensions.min(raw.shape.len())];
    if raw.kind != Kind::Int32 || raw.dimensions > raw.shape.len() || !raw.is_contiguous() {
        let text = "a table must be a contiguous int32 tensor of 1 to 4 dimensions";
        return Err(PyValueError::new_err(text));
    }
    let extents = shape.iter().map(|&extent| u32::try_from(extent));
    extents
        .collect::<Result<_, _>>()
        .map_err(|_| PyValueError::new_err("a table must have less than 2^31 numbers"))
}

/// The formula of a text, which is read once.
fn formula(text: &str) -> PyResult<&'static Formula> {
    static KNOWN: Mutex<Option<HashMap<String, &'static Formula>>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let known = known.get_or_insert_default();
    if let Some(formula) = known.get(text) {
        return Ok(formula);
    }
    let formula: Formula = text.parse().map_err(python_mask)?;
    let formula: &'static Formula = Box::leak(Box::new(formula));
    known.insert(text.to_owned(), formula);
    Ok(formula)
}

/// A formula's text with `factor * x + offset` in the place of its batch, head, query and key.
#[pyfunction]
pub fn moved(text: &str, places: [(i32, i32); 4]) -> PyResult<String> {
    let old = formula(text)?;
    let mut steps = expression::Steps::new();
    let mut new: Vec<usize> = Vec::new();
    for step in &old.steps {
        let (factor, offset) = match step {
            Step::Batch => places[0],
            Step::Head => places[1],
            Step::Query => places[2],
            Step::Key => places[3],
            _ => (1, 0),
        };
        let place = steps.put(step.map(|i| new[i]));
        new.push(match (factor, offset) {
            (1, 0) => place,
            _ => {
                let (factor, offset) = (steps.number(factor), steps.number(offset));
                let product = steps.put(Step::Multiply(place, factor));
                steps.put(Step::Add(product, offset))
            }
        });
    }
    let root = new.last().copied().unwrap_or_default();
    let (mut formula, used) = steps.finish(root);
    // Tables keep their numbers.
    formula.tables = old.tables.clone();
    for step in &mut formula.steps {
        if let Step::Table { table, .. } = step {
            *table = used[*table];
        }
    }
    Ok(formula.to_string())
}

/// Steps of a formula that is being written; see the library's own.
#[pyclass]
#[derive(Default)]
pub struct Steps(pub expression::Steps);

#[pymethods]
impl Steps {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn number(&mut self, n: i32) -> usize {
        self.0.number(n)
    }

    fn truth(&mut self, truth: bool) -> usize {
        self.0.truth(truth)
    }

    /// A step by its name.
    #[pyo3(signature = (name, *operands))]
    fn put(&mut self, name: &str, operands: Vec<usize>) -> PyResult<usize> {
        let step = match (name, &operands[..]) {
            ("b", []) => Step::Batch,
            ("h", []) => Step::Head,
            ("q", []) => Step::Query,
            ("kv", []) => Step::Key,
            ("add", &[a, b]) => Step::Add(a, b),
            ("subtract", &[a, b]) => Step::Subtract(a, b),
            ("multiply", &[a, b]) => Step::Multiply(a, b),
            ("divide", &[a, b]) => Step::Divide(a, b),
            ("remainder", &[a, b]) => Step::Remainder(a, b),
            ("min", &[a, b]) => Step::Min(a, b),
            ("max", &[a, b]) => Step::Max(a, b),
            ("less", &[a, b]) => Step::Less(a, b),
            ("equal", &[a, b]) => Step::Equal(a, b),
            ("and", &[a, b]) => Step::And(a, b),
            ("or", &[a, b]) => Step::Or(a, b),
            ("not", &[a]) => Step::Not(a),
            ("choose", &[condition, a, b]) => Step::Choose { condition, a, b },
            _ => {
                let text = format!("there is no step {name} of {} operands", operands.len());
                return Err(PyValueError::new_err(text));
            }
        };
        Ok(self.0.put(step))
    }

    /// A table's number at some indices.
    fn look_up(&mut self, table: usize, indices: Vec<usize>) -> usize {
        self.0.put(Step::Table { table, indices })
    }

    /// The formula of a step, the tables it uses, in its order, and whether it depends on the batch, and
    /// on the head.
    fn finish(&self, root: usize) -> (String, Vec<usize>, (bool, bool)) {
        let (formula, tables) = self.0.finish(root);
        let tells_apart = (formula.depends_on_batch(), formula.depends_on_head());
        (formula.to_string(), tables, tells_apart)
    }
}
