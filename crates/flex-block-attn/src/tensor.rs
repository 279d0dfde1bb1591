//! [`Tensor`] and [`TensorMut`]: what callers hand over. 4-D, by strides, of a dtype known at run
//! time. Made from slices (checked) or from addresses (the caller promises); taken apart by
//! `attention` after `check` has looked at them.

use std::ffi::c_void;
use std::marker::PhantomData;

use half::{bf16, f16};

use crate::{Error, Result};

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision, computed in double precision.
    F64,
}

impl DType {
    /// The dtype of the lse: float64 for float64 tensors, float32 for all others.
    pub fn lse(self) -> Self {
        match self {
            Self::F64 => Self::F64,
            Self::F16 | Self::BF16 | Self::F32 => Self::F32,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
        })
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Rust types that tensors can hold.
pub trait Element: sealed::Sealed + Copy {
    /// Their dtype.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($type:ty => $dtype:ident),*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}

elements!(f16 => F16, bf16 => BF16, f32 => F32, f64 => F64);

/// A tensor to be read: (batch, heads, sequence, head_dim), strides in elements.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub(crate) pointer: *const c_void,
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 4],
    pub(crate) strides: [isize; 4],
    data: PhantomData<&'a [u8]>,
}

/// A tensor to be written: (batch, heads, sequence, head_dim), strides in elements.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(crate) pointer: *mut c_void,
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 4],
    pub(crate) strides: [isize; 4],
    data: PhantomData<&'a mut [u8]>,
}

/// Strides of a dense tensor.
fn dense(shape: [usize; 4]) -> [isize; 4] {
    // Shapes that overflow do not fit any slice: saturated, they are refused as such.
    let [_, heads, tokens, dim] = shape.map(|extent| isize::try_from(extent).unwrap_or(isize::MAX));
    let head = tokens.saturating_mul(dim);
    [heads.saturating_mul(head), head, dim, 1]
}

/// Whether every index of the shape lies inside of `len` elements.
fn fits(len: usize, shape: [usize; 4], strides: [isize; 4]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let (mut low, mut high) = (0i128, 0i128);
    for (extent, stride) in shape.into_iter().zip(strides) {
        let reach = (extent as i128 - 1) * stride as i128;
        low += reach.min(0);
        high += reach.max(0);
    }
    low >= 0 && high < len as i128
}

impl<'a> Tensor<'a> {
    /// A dense tensor over a slice.
    ///
    /// # Errors
    /// When the slice is shorter than the shape asks.
    pub fn new<T: Element>(data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, shape, dense(shape))
    }

    /// A tensor over a slice by strides (in elements), its first element being the slice's.
    ///
    /// # Errors
    /// When some index of the shape lies outside of the slice.
    pub fn strided<T: Element>(
        data: &'a [T],
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        if !fits(data.len(), shape, strides) {
            let len = data.len();
            return Err(Error::OutOfBounds {
                shape,
                strides,
                len,
            });
        }
        // SAFETY: all elements lie inside of a slice that is borrowed for `'a`.
        Ok(unsafe { Self::from_raw(data.as_ptr().cast(), T::DTYPE, shape, strides) })
    }

    /// A tensor by address.
    ///
    /// # Safety
    /// For `'a`, every element inside of the shape must be a readable value of `dtype`, properly
    /// aligned, that nobody writes.
    pub unsafe fn from_raw(
        pointer: *const c_void,
        dtype: DType,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Self {
        Self {
            pointer,
            dtype,
            shape,
            strides,
            data: PhantomData,
        }
    }

    /// (batch, heads, sequence, head_dim).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The elements' type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

impl<'a> TensorMut<'a> {
    /// A dense tensor over a slice.
    ///
    /// # Errors
    /// When the slice is shorter than the shape asks.
    pub fn new<T: Element>(data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, shape, dense(shape))
    }

    /// A tensor over a slice by strides (in elements), its first element being the slice's.
    ///
    /// # Errors
    /// When some index of the shape lies outside of the slice.
    pub fn strided<T: Element>(
        data: &'a mut [T],
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        if !fits(data.len(), shape, strides) {
            let len = data.len();
            return Err(Error::OutOfBounds {
                shape,
                strides,
                len,
            });
        }
        // SAFETY: all elements lie inside of a slice that is borrowed, alone, for `'a`.
        Ok(unsafe { Self::from_raw(data.as_mut_ptr().cast(), T::DTYPE, shape, strides) })
    }

    /// A tensor by address.
    ///
    /// # Safety
    /// For `'a`, every element inside of the shape must be a value of `dtype`, properly aligned,
    /// that nobody else reads or writes.
    pub unsafe fn from_raw(
        pointer: *mut c_void,
        dtype: DType,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Self {
        Self {
            pointer,
            dtype,
            shape,
            strides,
            data: PhantomData,
        }
    }

    /// (batch, heads, sequence, head_dim).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The elements' type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}
