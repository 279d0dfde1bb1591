//! [`View`] and [`ViewMut`]: 4-D tensors in (batch, heads, sequence, head_dim) order, by strides.
//!
//! Made by the public crate from its checked tensors; read by packing and written by the drivers.
//! Rows (the last dimension) are contiguous, all else may have any stride, a stride of 0 included
//! where nothing is written.

use std::marker::PhantomData;

/// A read-only 4-D tensor.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    pointer: *const T,
    shape: [usize; 4],
    strides: [isize; 3],
    data: PhantomData<&'a [T]>,
}

/// A 4-D tensor whose rows threads may write, each row by one thread.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    pointer: *mut T,
    shape: [usize; 4],
    strides: [isize; 3],
    data: PhantomData<&'a mut [T]>,
}

// SAFETY: a `View` is a `&[T]` with a shape.
unsafe impl<T: Sync> Send for View<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for View<'_, T> {}
// SAFETY: a `ViewMut` is a `&mut [T]` with a shape.
unsafe impl<T: Send> Send for ViewMut<'_, T> {}
// SAFETY: through `&ViewMut` only `row_mut` reaches the data, whose contract forbids two threads
// in one row.
unsafe impl<T: Send> Sync for ViewMut<'_, T> {}

fn offset(index: [usize; 3], shape: &[usize; 4], strides: &[isize; 3]) -> isize {
    assert!(
        (0..3).all(|d| index[d] < shape[d]),
        "row {index:?} of a tensor of shape {shape:?}"
    );
    (0..3).map(|d| index[d] as isize * strides[d]).sum()
}

impl<'a, T> View<'a, T> {
    /// A view by address; strides in elements, that of the last dimension being 1.
    ///
    /// # Safety
    /// Every row inside of the shape must be readable as `shape[3]` values of `T` for `'a`, and
    /// not be written meanwhile.
    pub unsafe fn new(pointer: *const T, shape: [usize; 4], strides: [isize; 3]) -> Self {
        Self {
            pointer,
            shape,
            strides,
            data: PhantomData,
        }
    }

    /// (batch, heads, sequence, head_dim).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The values of one token.
    pub(crate) fn row(&self, batch: usize, head: usize, token: usize) -> &'a [T] {
        let offset = offset([batch, head, token], &self.shape, &self.strides);
        // SAFETY: `new` promises that rows inside of the shape are readable; `offset` has checked
        // that this one is.
        unsafe { std::slice::from_raw_parts(self.pointer.offset(offset), self.shape[3]) }
    }
}

impl<'a, T> ViewMut<'a, T> {
    /// A view by address; strides in elements, that of the last dimension being 1.
    ///
    /// # Safety
    /// Every row inside of the shape must be `shape[3]` values of `T`, for `'a` readable and
    /// writable through this view alone; no two rows may overlap.
    pub unsafe fn new(pointer: *mut T, shape: [usize; 4], strides: [isize; 3]) -> Self {
        Self {
            pointer,
            shape,
            strides,
            data: PhantomData,
        }
    }

    /// (batch, heads, sequence, head_dim).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The values of one token, to be written.
    ///
    /// # Safety
    /// While the slice lives, no other slice of the same row may.
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller keeps rows apart, as the contract says"
    )]
    pub(crate) unsafe fn row_mut(&self, batch: usize, head: usize, token: usize) -> &mut [T] {
        let offset = offset([batch, head, token], &self.shape, &self.strides);
        // SAFETY: `new` promises that rows inside of the shape are writable and apart; `offset`
        // has checked that this one is inside; the caller has no other slice of it.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.offset(offset), self.shape[3]) }
    }
}
