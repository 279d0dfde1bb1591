//! [`Buffer`]: zeroed memory whose first element starts a cache line, so that vector loads do not
//! straddle two. What is packed and accumulated lies in such.

use std::ops::{Deref, DerefMut};

const LINE_BYTES: usize = 64;

/// A slice of its own that starts at a cache line.
pub(crate) struct Buffer<T> {
    /// `start` unused elements, then the buffer. Not an aligned allocation: those are zeroed by
    /// writing, while a vector's zeros come from the system, page by page as they are touched.
    elements: Vec<T>,
    start: usize,
}

impl<T: Copy + Default> Buffer<T> {
    /// `len` zeros.
    pub fn new(len: usize) -> Self {
        let slack = LINE_BYTES / size_of::<T>();
        let mut elements = vec![T::default(); len + slack];
        let start = elements.as_ptr().align_offset(LINE_BYTES).min(slack);
        elements.truncate(start + len);
        Self { elements, start }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.elements[self.start..]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.elements[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_cache_lines() {
        for len in [0, 1, 100, 1 << 20] {
            let buffer = Buffer::<f32>::new(len);
            assert_eq!(buffer.len(), len);
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(LINE_BYTES));
            assert!(buffer.iter().all(|&value| value == 0.0));
        }
    }
}
