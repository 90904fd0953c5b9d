//! The path for machines without a known instruction set, and what the others
//! fall back on: the contract's functions, called row by row.

use super::kernels::{Activation, ActivationMut, Cells, Isa, Kernels, Layout, Rows};
use crate::contract;
use crate::format::ActivationKind;

pub(crate) struct Scalar;

impl Kernels for Scalar {
    fn isa(&self) -> Isa {
        Isa::Scalar
    }
}

/// Natural order only.
pub(crate) fn quantise(x: &[f32], group: usize, _layout: Layout, out: ActivationMut<'_>) {
    contract::quantise(x, group, out.q, out.scales);
    fill_sums(out.q, out.sums16, out.sums32);
}

/// Sums of int8 groups; a sum of 32 is at most 32 * 127.
pub(crate) fn fill_sums(q: &[i8], sums16: &mut [i16], sums32: &mut [i16]) {
    let sum = |q: &[i8]| q.iter().map(|q| *q as i16).sum();
    for (out, q) in sums16.iter_mut().zip(q.chunks_exact(16)) {
        *out = sum(q);
    }
    for (out, q) in sums32.iter_mut().zip(q.chunks_exact(32)) {
        *out = sum(q);
    }
}

pub(crate) fn rows(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    assert_eq!(out.len(), rows.rows);
    for (r, out) in out.iter_mut().enumerate() {
        *out = match rows.format.activation() {
            ActivationKind::F32 => contract::dot_float(rows.format, rows.row(r), x.x),
            _ => contract::dot_int8(rows.format, rows.row(r), x.q, x.scales),
        };
    }
}

pub(crate) fn scores(
    queries: &[f32],
    width: usize,
    keys: Cells<'_>,
    count: usize,
    scale: f32,
    out: &mut [f32],
    out_stride: usize,
) {
    for (q, out) in queries.chunks_exact(width).zip(out.chunks_mut(out_stride)) {
        for (p, out) in out[..count].iter_mut().enumerate() {
            let mut lanes = [0.0f32; 16];
            for (i, q) in q.iter().enumerate() {
                lanes[i % 16] = q.mul_add(keys.at(p, i), lanes[i % 16]);
            }
            *out = contract::tree(lanes) * scale;
        }
    }
}

pub(crate) fn softmax_chunk(scores: &mut [f32], first: usize) -> (f32, f32) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |m, s| if *s > m { *s } else { m });
    let mut lanes = [0.0f32; 16];
    for (i, s) in scores.iter_mut().enumerate() {
        *s = contract::exp(*s - max);
        lanes[(first + i) % 16] += *s;
    }
    (max, contract::tree(lanes))
}

pub(crate) fn values(
    weights: &[f32],
    weight_stride: usize,
    ranges: &[(usize, usize)],
    values: Cells<'_>,
    width: usize,
    acc: &mut [f32],
) {
    let queries = weights.chunks(weight_stride).zip(acc.chunks_exact_mut(width));
    for ((weights, acc), &(start, end)) in queries.zip(ranges) {
        for (p, weight) in weights.iter().enumerate().take(end).skip(start) {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = weight.mul_add(values.at(p, i), *acc);
            }
        }
    }
}
