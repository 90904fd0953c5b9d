//! F32, F16 and BF16 rows: 64 lanes in eight registers.

use super::{load, load_floats, load_half, store_floats, tree_of_8};
use crate::cpu::kernels::{Rows, Tile};
use crate::cpu::pool::Columns;
use crate::format::Format;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// `out[r]` is row `r` times one token.
///
/// Panics if the format is quantised or `x` is not as long as the rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn rows(rows: Rows<'_>, x: &[f32], out: &mut [f32]) {
    assert_eq!(rows.cols, x.len());
    for (r, out) in out.iter_mut().enumerate() {
        *out = match rows.format {
            Format::F32 => dot::<{ Format::F32 as usize }>(rows.row(r), x),
            Format::F16 => dot::<{ Format::F16 as usize }>(rows.row(r), x),
            Format::Bf16 => dot::<{ Format::Bf16 as usize }>(rows.row(r), x),
            format => panic!("{format} is quantised"),
        };
    }
}

/// `out.row(t)[r]` is row `r` times token `t`, counted over all tiles.
///
/// Panics on tiles that were not packed for these rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn batch(rows: Rows<'_>, tiles: &[Tile], weights: &mut Vec<f32>, out: &mut Columns<'_, f32>) {
    weights.resize(rows.cols, 0.0);
    for r in 0..rows.rows {
        convert(rows.format, rows.row(r), weights);
        let tokens = tiles.iter().flat_map(|tile| tile.x.chunks_exact(rows.cols));
        for (t, x) in tokens.enumerate() {
            out.row(t)[r] = dot_f32(weights, x);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn convert(format: Format, row: &[u8], out: &mut [f32]) {
    match format {
        Format::F32 => convert_as::<{ Format::F32 as usize }>(row, out),
        Format::F16 => convert_as::<{ Format::F16 as usize }>(row, out),
        _ => convert_as::<{ Format::Bf16 as usize }>(row, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn convert_as<const F: usize>(row: &[u8], out: &mut [f32]) {
    let bytes = const { Format::ALL[F].block_bytes() };
    for (weights, out) in row.chunks(8 * bytes).zip(out.chunks_mut(8)) {
        if out.len() == 8 {
            store_floats(out, eight::<F>(weights));
        } else {
            for (weight, out) in weights.chunks_exact(bytes).zip(out) {
                *out = one::<F>(weight);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight<const F: usize>(weights: &[u8]) -> __m256 {
    match const { Format::ALL[F] } {
        Format::F32 => _mm256_castsi256_ps(load(weights)),
        Format::F16 => _mm256_cvtph_ps(load_half(weights)),
        _ => {
            let bits = _mm256_cvtepu16_epi32(load_half(weights));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
}

fn one<const F: usize>(weight: &[u8]) -> f32 {
    match const { Format::ALL[F] } {
        Format::F32 => f32::from_le_bytes([weight[0], weight[1], weight[2], weight[3]]),
        Format::F16 => f16::from_le_bytes([weight[0], weight[1]]).to_f32(),
        _ => bf16::from_le_bytes([weight[0], weight[1]]).to_f32(),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot<const F: usize>(row: &[u8], x: &[f32]) -> f32 {
    let bytes = const { Format::ALL[F].block_bytes() };
    let (weights, rest) = row.split_at(row.len() / (64 * bytes) * 64 * bytes);
    let mut lanes = [_mm256_setzero_ps(); 8];
    for (weights, x) in weights.chunks_exact(64 * bytes).zip(x.chunks_exact(64)) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            let weights = &weights[8 * i * bytes..];
            let weights = eight::<F>(weights);
            *lane = _mm256_fmadd_ps(weights, load_floats(&x[8 * i..]), *lane);
        }
    }
    let rest = rest.chunks_exact(bytes).map(one::<F>);
    add_rest_and_tree(lanes, rest, &x[x.len() / 64 * 64..])
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_f32(weights: &[f32], x: &[f32]) -> f32 {
    let mut lanes = [_mm256_setzero_ps(); 8];
    for (weights, x) in weights.chunks_exact(64).zip(x.chunks_exact(64)) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane =
                _mm256_fmadd_ps(load_floats(&weights[8 * i..]), load_floats(&x[8 * i..]), *lane);
        }
    }
    let whole = x.len() / 64 * 64;
    add_rest_and_tree(lanes, weights[whole..].iter().copied(), &x[whole..])
}

/// Adds the last elements, fewer than 64, and sums the lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_rest_and_tree(mut lanes: [__m256; 8], rest: impl Iterator<Item = f32>, x: &[f32]) -> f32 {
    if !x.is_empty() {
        let mut single = [0.0f32; 64];
        for (lanes, single) in lanes.iter().zip(single.chunks_exact_mut(8)) {
            store_floats(single, *lanes);
        }
        for ((weight, x), lane) in rest.zip(x).zip(&mut single) {
            *lane = weight.mul_add(*x, *lane);
        }
        for (lanes, single) in lanes.iter_mut().zip(single.chunks_exact(8)) {
            *lanes = load_floats(single);
        }
    }
    for step in [4, 2, 1] {
        for i in 0..step {
            lanes[i] = _mm256_add_ps(lanes[i], lanes[i + step]);
        }
    }
    tree_of_8(lanes[0])
}
