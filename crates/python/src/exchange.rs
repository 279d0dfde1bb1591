//! A tensor's outline from torch itself, by a call from C to C: the table of functions by which DLPack
//! lets libraries read each other's tensors (`DLPackExchangeAPI`), which newer versions of torch have.
//!
//! In: a tensor. Out: an [`Outline`], in a fraction of the time that its attributes take. Called by
//! `tensor`, which reads attributes where this gives nothing. The records are those of DLPack 1.3; a
//! field that is not read here has a name that begins with `_`.

use std::ffi::{c_int, c_void};
use std::ptr;

use pyo3::ffi::PyObject;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyType};

/// The major version of DLPack whose records these are: others may have other fields.
const MAJOR: u32 = 1;

/// `kDLCUDA`, a device's type.
pub const CUDA: c_int = 2;

/// `DLTensor`.
#[repr(C)]
struct Lent {
    data: *mut c_void,
    device_type: c_int,
    device: i32,
    dimensions: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLPackDLTensorFromPyObjectNoSync`: fills the record of a tensor; 0, or an error is set.
type Lend = unsafe extern "C" fn(*mut PyObject, *mut Lent) -> c_int;

/// `DLPackExchangeAPI`, its header's fields first.
#[repr(C)]
struct Table {
    major: u32,
    _minor: u32,
    _older: *const c_void,
    _allocate: *const c_void,
    _lend_for_long: *const c_void,
    _wrap: *const c_void,
    lend: Option<Lend>,
    _stream: *const c_void,
}

/// What a tensor says of itself. Strides are in elements.
pub struct Outline<'a> {
    pub address: usize,
    /// By its type and number.
    pub device: (c_int, i32),
    /// Code, bits, and lanes.
    pub element: (u8, u8, u16),
    pub shape: &'a [i64],
    pub strides: &'a [i64],
}

/// torch's type of tensors, and its function that lends one.
struct Torch {
    tensor: Py<PyType>,
    lend: Option<Lend>,
}

fn torch(py: Python<'_>) -> PyResult<&Torch> {
    static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
    TORCH.get_or_try_init(py, || {
        let tensor = py
            .import("torch")?
            .getattr("Tensor")?
            .cast_into::<PyType>()?;
        // Versions of torch without it have no such attribute.
        let lend = lend(&tensor).ok().flatten();
        Ok(Torch {
            tensor: tensor.unbind(),
            lend,
        })
    })
}

fn lend(tensor: &Bound<'_, PyType>) -> PyResult<Option<Lend>> {
    let capsule = tensor.getattr("__dlpack_c_exchange_api__")?;
    let table = capsule
        .cast::<PyCapsule>()?
        .pointer_checked(Some(c"dlpack_exchange_api"))?
        .cast::<Table>()
        .as_ptr();
    // SAFETY: a capsule of this name holds such a table, for as long as the process lives. All versions
    // begin with their number; the rest is read of our version only.
    unsafe {
        let ours = (*table).major == MAJOR;
        Ok(if ours { (*table).lend } else { None })
    }
}

/// Whether it is a tensor and of no subclass: what those mean, only they know.
pub fn is_plain(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    let torch = torch(tensor.py())?;
    Ok(tensor.get_type_ptr() == torch.tensor.as_ptr().cast())
}

/// Looks at a tensor's outline; none of a subclass, of what DLPack has no words for, or where torch has
/// no table.
pub fn outline<T>(
    tensor: &Bound<'_, PyAny>,
    look: impl FnOnce(Outline<'_>) -> T,
) -> PyResult<Option<T>> {
    let Some(lend) = torch(tensor.py())?.lend else {
        return Ok(None);
    };
    if !is_plain(tensor)? {
        return Ok(None);
    }
    let mut lent = Lent {
        data: ptr::null_mut(),
        device_type: 0,
        device: 0,
        dimensions: 0,
        code: 0,
        bits: 0,
        lanes: 0,
        shape: ptr::null(),
        strides: ptr::null(),
        byte_offset: 0,
    };
    // SAFETY: the object is of the type that the table is of, as it asks, the GIL is held, and the record
    // is that of the table's version.
    if unsafe { lend(tensor.as_ptr(), &raw mut lent) } != 0 {
        // The error is torch's, and whoever reads attributes gets it.
        drop(PyErr::take(tensor.py()));
        return Ok(None);
    }
    let numbers = |first: *const i64| match lent.dimensions {
        1.. if !first.is_null() => {
            // SAFETY: each of the two arrays has a number for each dimension. They are the tensor's, which
            // `tensor` keeps alive and which nobody changes before `look` returns: the GIL is held.
            unsafe { std::slice::from_raw_parts(first, lent.dimensions as usize) }
        }
        _ => &[],
    };
    Ok(Some(look(Outline {
        address: lent.data as usize + lent.byte_offset as usize,
        device: (lent.device_type, lent.device),
        element: (lent.code, lent.bits, lent.lanes),
        shape: numbers(lent.shape),
        strides: numbers(lent.strides),
    })))
}
