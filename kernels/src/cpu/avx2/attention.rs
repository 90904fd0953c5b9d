//! The arithmetic of attention, in the order of `docs/architecture.md`.

use super::elementwise::exp;
use super::{load_f16, load_floats, store_floats, tree_of_8};
use crate::contract;
use crate::cpu::kernels::Cells;
use std::arch::x86_64::*;
use std::ops::Range;

/// Eight cells of `position` from `i`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight(cells: Cells<'_>, position: usize, i: usize) -> __m256 {
    match cells {
        Cells::F16(cells, stride) => load_f16(&cells[position * stride + i..]),
        Cells::F32(cells, stride) => load_floats(&cells[position * stride + i..]),
    }
}

/// `out[p] = scale * (query . key p)`: 16 lanes and a tree.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn scores(query: &[f32], keys: Cells<'_>, scale: f32, out: &mut [f32]) {
    let whole = query.len() / 16 * 16;
    for (p, out) in out.iter_mut().enumerate() {
        let mut lanes = [_mm256_setzero_ps(); 2];
        for (i, query) in query[..whole].chunks_exact(16).enumerate() {
            for (half, lane) in lanes.iter_mut().enumerate() {
                let key = eight(keys, p, 16 * i + 8 * half);
                *lane = _mm256_fmadd_ps(load_floats(&query[8 * half..]), key, *lane);
            }
        }
        if whole < query.len() {
            let mut single = [0.0f32; 16];
            store_floats(&mut single[..8], lanes[0]);
            store_floats(&mut single[8..], lanes[1]);
            for (i, (query, lane)) in query[whole..].iter().zip(&mut single).enumerate() {
                *lane = query.mul_add(keys.at(p, whole + i), *lane);
            }
            lanes = [load_floats(&single[..8]), load_floats(&single[8..])];
        }
        *out = tree_of_8(_mm256_add_ps(lanes[0], lanes[1])) * scale;
    }
}

/// `scores[i]` becomes `exp(scores[i] - maximum)`; the maximum and the sum in
/// sixteen lanes by `(first + i) mod 16` and a tree.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn softmax_chunk(scores: &mut [f32], first: usize) -> (f32, f32) {
    let lowest = f32::NEG_INFINITY;
    let (eights, rest) = scores.as_chunks_mut::<8>();
    let mut most = _mm256_set1_ps(lowest);
    for scores in eights.iter() {
        // Gives its second operand where the first is NaN.
        most = _mm256_max_ps(load_floats(scores), most);
    }
    let mut of_8 = [0.0; 8];
    store_floats(&mut of_8, most);
    let max = of_8.iter().chain(&*rest).fold(lowest, |m, s| if *s > m { *s } else { m });
    for scores in eights {
        let shifted = _mm256_sub_ps(load_floats(scores), _mm256_set1_ps(max));
        store_floats(scores, exp(shifted));
    }
    for score in rest {
        *score = contract::exp(*score - max);
    }
    let mut lanes = [0.0f32; 16];
    let head = first.next_multiple_of(16) - first;
    let (head, body) = scores.split_at(head.min(scores.len()));
    for (i, score) in head.iter().enumerate() {
        lanes[(first + i) % 16] += score;
    }
    let (sixteens, rest) = body.as_chunks::<16>();
    for scores in sixteens {
        for (lane, score) in lanes.iter_mut().zip(scores) {
            *lane += score;
        }
    }
    for (lane, score) in lanes.iter_mut().zip(rest) {
        *lane += score;
    }
    (max, contract::tree(lanes))
}

/// `acc[d] = fma(weights[p], value[p][d], acc[d])` for the positions of
/// `range`, in order.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn values(weights: &[f32], range: Range<usize>, values: Cells<'_>, acc: &mut [f32]) {
    let weights = &weights[..range.end];
    let mut start = 0;
    while acc.len() - start >= 64 {
        columns::<8>(weights, range.start, values, start, acc);
        start += 64;
    }
    while acc.len() - start >= 8 {
        columns::<1>(weights, range.start, values, start, acc);
        start += 8;
    }
    for (i, acc) in acc.iter_mut().enumerate().skip(start) {
        for p in range.clone() {
            *acc = weights[p].mul_add(values.at(p, i), *acc);
        }
    }
}

/// `N` registers of columns from `start`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn columns<const N: usize>(
    weights: &[f32],
    first: usize,
    values: Cells<'_>,
    start: usize,
    acc: &mut [f32],
) {
    let acc = &mut acc[start..start + 8 * N];
    let mut sums = [_mm256_setzero_ps(); N];
    for (sum, acc) in sums.iter_mut().zip(acc.chunks_exact(8)) {
        *sum = load_floats(acc);
    }
    for (p, weight) in weights.iter().enumerate().skip(first) {
        let weight = _mm256_set1_ps(*weight);
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = _mm256_fmadd_ps(weight, eight(values, p, start + 8 * i), *sum);
        }
    }
    for (sum, acc) in sums.iter().zip(acc.chunks_exact_mut(8)) {
        store_floats(acc, *sum);
    }
}
