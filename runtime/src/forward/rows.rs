//! Working on the rows of a buffer from all of a backend's threads.

use pregate_kernels::Backend;
use std::sync::{Mutex, PoisonError};

/// The first `len` elements of a buffer that only grows.
pub fn buffer(store: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if store.len() < len {
        store.resize(len, 0.0);
    }
    &mut store[..len]
}

/// `x += scale * delta`, both `[tokens, width]`
pub fn add_scaled(backend: &dyn Backend, x: &mut [f32], delta: &[f32], width: usize, scale: f32) {
    for_each_row(backend, x, width, |row, x| {
        for (x, delta) in x.iter_mut().zip(&delta[row * width..]) {
            *x += scale * delta;
        }
    });
}

/// Calls `task(row, values)` for every row of `width` values. One row runs
/// on the calling thread at once; many are shared out.
pub fn for_each_row(
    backend: &dyn Backend,
    values: &mut [f32],
    width: usize,
    task: impl Fn(usize, &mut [f32]) + Sync,
) {
    if values.len() <= width {
        return task(0, values);
    }
    // A group of rows is one unit of work: a lock for every row would cost
    // more than a small row's work.
    const GROUP: usize = 16;
    let mut groups: Vec<&mut [f32]> = values.chunks_mut(GROUP * width).collect();
    for_each_mut(backend, &mut groups, |group, rows| {
        for (row, values) in rows.chunks_mut(width).enumerate() {
            task(group * GROUP + row, values);
        }
    });
}

/// Calls `task(i, item)` for every item, from all threads.
pub fn for_each_mut<T: Send>(
    backend: &dyn Backend,
    items: &mut [T],
    task: impl Fn(usize, &mut T) + Sync,
) {
    let items: Vec<Mutex<&mut T>> = items.iter_mut().map(Mutex::new).collect();
    backend.for_each(items.len(), &|i| {
        // Each index is visited once, so the lock is free; a poisoned one
        // means that another task panicked, which the backend re-raises.
        let mut item = items[i].lock().unwrap_or_else(PoisonError::into_inner);
        task(i, &mut item);
    });
}
