//! [`Term`]: a value of a function that is traced, with the operators that most functions consist of. In:
//! operands. Out: the value of the next step. `trace.py` derives its proxies from it.
//!
//! What is none of numbers alone, or of conditions alone, goes to `trace.py`, as does all that is wrong.

use flex_block_attn::expression::{self, Step};
use pyo3::basic::CompareOp;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyInt};

use crate::expression::Steps;

/// A number or a condition: a place of the steps that are being written.
#[pyclass(subclass, frozen)]
pub struct Term {
    /// Who writes, and the steps so far.
    #[pyo3(get)]
    writer: Py<PyAny>,
    steps: Py<Steps>,
    #[pyo3(get)]
    step: usize,
    #[pyo3(get)]
    is_truth: bool,
}

/// What an operator is called with: itself first.
type Operands<'a, 'py> = (&'a Bound<'py, Term>, &'a Bound<'py, PyAny>);

/// A step of two others.
type Of = fn(usize, usize) -> Step;

#[pymethods]
impl Term {
    #[new]
    fn new(writer: Bound<'_, PyAny>, step: usize, is_truth: bool) -> PyResult<Self> {
        let steps = writer.getattr(intern!(writer.py(), "steps"))?;
        Ok(Self {
            steps: steps.cast_into::<Steps>()?.unbind(),
            writer: writer.unbind(),
            step,
            is_truth,
        })
    }

    fn __add__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("add", Step::Add, (slf, other), false)
    }

    fn __radd__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("add", Step::Add, (slf, other), true)
    }

    fn __sub__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("sub", Step::Subtract, (slf, other), false)
    }

    fn __rsub__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("sub", Step::Subtract, (slf, other), true)
    }

    fn __mul__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("mul", Step::Multiply, (slf, other), false)
    }

    fn __rmul__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("mul", Step::Multiply, (slf, other), true)
    }

    fn __floordiv__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("floor_divide", Step::Divide, (slf, other), false)
    }

    fn __rfloordiv__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("floor_divide", Step::Divide, (slf, other), true)
    }

    fn __mod__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("remainder", Step::Remainder, (slf, other), false)
    }

    fn __rmod__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        number("remainder", Step::Remainder, (slf, other), true)
    }

    fn __and__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        truth("and", Step::And, (slf, other), false)
    }

    fn __rand__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        truth("and", Step::And, (slf, other), true)
    }

    fn __or__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        truth("or", Step::Or, (slf, other), false)
    }

    fn __ror__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> Result<'py> {
        truth("or", Step::Or, (slf, other), true)
    }

    fn __richcmp__<'py>(
        slf: &Bound<'py, Self>,
        other: &Bound<'py, PyAny>,
        operator: CompareOp,
    ) -> Result<'py> {
        let (name, of, is_negated): (_, Of, _) = match operator {
            CompareOp::Lt => ("lt", Step::Less, false),
            CompareOp::Gt => ("gt", |a, b| Step::Less(b, a), false),
            CompareOp::Le => ("le", |a, b| Step::Less(b, a), true),
            CompareOp::Ge => ("ge", Step::Less, true),
            CompareOp::Eq => ("eq", Step::Equal, false),
            CompareOp::Ne => ("ne", Step::Equal, true),
        };
        let Some((mut steps, a, b)) = numbers(slf, other)? else {
            return traced(name, (slf, other), false);
        };
        let mut step = steps.0.put(of(a, b));
        if is_negated {
            step = steps.0.put(Step::Not(step));
        }
        drop(steps);
        next(slf, step, true)
    }

    fn __abs__<'py>(slf: &Bound<'py, Self>) -> Result<'py> {
        let term = slf.get();
        if term.is_truth {
            return call(slf, "abs", (slf,));
        }
        let mut steps = term.steps.bind(slf.py()).borrow_mut();
        let zero = steps.0.number(0);
        let negated = steps.0.put(Step::Subtract(zero, term.step));
        let step = steps.0.put(Step::Max(term.step, negated));
        drop(steps);
        next(slf, step, false)
    }

    /// As tensors have it.
    fn abs<'py>(slf: &Bound<'py, Self>) -> Result<'py> {
        Self::__abs__(slf)
    }
}

type Result<'py> = PyResult<Bound<'py, PyAny>>;

/// A number of two others, by the operator of a name.
fn number<'py>(name: &str, of: Of, operands: Operands<'_, 'py>, is_swapped: bool) -> Result<'py> {
    let (slf, other) = operands;
    let Some((mut steps, a, b)) = numbers(slf, other)? else {
        return traced(name, operands, is_swapped);
    };
    let step = steps.0.put(if is_swapped { of(b, a) } else { of(a, b) });
    drop(steps);
    next(slf, step, false)
}

/// A condition of two others.
fn truth<'py>(name: &str, of: Of, operands: Operands<'_, 'py>, is_swapped: bool) -> Result<'py> {
    let (slf, other) = operands;
    let (a, b) = (slf.get(), other.cast::<Term>());
    match b.map(Bound::get) {
        Ok(b) if a.is_truth && b.is_truth && a.steps.is(&b.steps) => {
            let step = of(a.step, b.step);
            let step = a.steps.bind(slf.py()).borrow_mut().0.put(step);
            next(slf, step, true)
        }
        _ => traced(name, operands, is_swapped),
    }
}

/// The places of two numbers, of which the second may be a whole number of int32; none for all else.
fn numbers<'py>(
    slf: &Bound<'py, Term>,
    other: &Bound<'py, PyAny>,
) -> PyResult<Option<(PyRefMut<'py, Steps>, usize, usize)>> {
    let a = slf.get();
    if a.is_truth {
        return Ok(None);
    }
    let mut steps = a.steps.bind(slf.py()).borrow_mut();
    let b = match other.cast::<Term>().map(Bound::get) {
        Ok(b) if b.is_truth || !b.steps.is(&a.steps) => return Ok(None),
        Ok(b) => b.step,
        // A bool is not exactly one.
        Err(_) if other.is_exact_instance_of::<PyInt>() => match other.extract() {
            Ok(n) => expression::Steps::number(&mut steps.0, n),
            Err(_) => return Ok(None),
        },
        Err(_) => return Ok(None),
    };
    Ok(Some((steps, a.step, b)))
}

/// The value of a step, of the type of another.
fn next<'py>(slf: &Bound<'py, Term>, step: usize, is_truth: bool) -> Result<'py> {
    slf.get_type().call1((&slf.get().writer, step, is_truth))
}

fn traced<'py>(name: &str, (slf, other): Operands<'_, 'py>, is_swapped: bool) -> Result<'py> {
    match is_swapped {
        true => call(slf, name, (other, slf)),
        false => call(slf, name, (slf, other)),
    }
}

/// An operator as `trace.py` has it.
fn call<'py>(slf: &Bound<'py, Term>, name: &str, operands: impl IntoPyObject<'py>) -> Result<'py> {
    static CALL: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = slf.py();
    let call = CALL.import(py, "flex_block_attn.trace", "_call")?;
    call.call1((&slf.get().writer, name, operands, PyDict::new(py)))
}
