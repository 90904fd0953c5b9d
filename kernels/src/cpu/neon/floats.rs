//! F32, F16 and BF16 rows (64 lanes in sixteen registers) and the products of
//! attention.

use super::{load, load_f16, load_floats, store_floats, tree_of_8};
use crate::contract;
use crate::cpu::kernels::{Cells, Rows, Tile};
use crate::cpu::pool::Columns;
use crate::dequant::dequantize_row;
use crate::format::Format;
use half::f16;
use std::arch::aarch64::*;
use std::ops::Range;

/// `out[r]` is row `r` times one token.
///
/// Panics if the format is quantised or `x` is not as long as the rows.
#[target_feature(enable = "neon")]
pub fn rows(rows: Rows<'_>, x: &[f32], out: &mut [f32]) {
    assert_eq!(rows.cols, x.len());
    for (r, out) in out.iter_mut().enumerate() {
        let row = rows.row(r);
        let four = |i: usize| match rows.format {
            Format::F32 => vreinterpretq_f32_u8(load(&row[4 * i..])),
            Format::F16 => {
                let four: [u16; 4] = std::array::from_fn(|n| bits_at(row, i + n));
                load_f16(&four)
            }
            Format::Bf16 => {
                let four: [f32; 4] =
                    std::array::from_fn(|n| f32::from_bits(u32::from(bits_at(row, i + n)) << 16));
                load_floats(&four)
            }
            format => panic!("{format} is quantised"),
        };
        *out = dot(x, four, |i| contract::float_at(rows.format, row, i));
    }
}

fn bits_at(row: &[u8], i: usize) -> u16 {
    u16::from_le_bytes([row[2 * i], row[2 * i + 1]])
}

/// `out.row(t)[r]` is row `r` times token `t`, counted over all tiles.
///
/// Panics on tiles that were not packed for these rows.
#[target_feature(enable = "neon")]
pub fn batch(rows: Rows<'_>, tiles: &[Tile], weights: &mut Vec<f32>, out: &mut Columns<'_, f32>) {
    weights.resize(rows.cols, 0.0);
    for r in 0..rows.rows {
        dequantize_row(rows.format, rows.row(r), weights);
        let tokens = tiles.iter().flat_map(|tile| tile.x.chunks_exact(rows.cols));
        for (t, x) in tokens.enumerate() {
            out.row(t)[r] = dot(x, |i| load_floats(&weights[i..]), |i| weights[i]);
        }
    }
}

/// `four(i)` are the weights `i..i + 4`, `one(i)` is the weight `i`.
#[inline]
#[target_feature(enable = "neon")]
fn dot(x: &[f32], four: impl Fn(usize) -> float32x4_t, one: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [vdupq_n_f32(0.0); 16];
    let whole = x.len() / 64 * 64;
    for i in (0..whole).step_by(64) {
        for (n, lane) in lanes.iter_mut().enumerate() {
            let i = i + 4 * n;
            *lane = vfmaq_f32(*lane, four(i), load_floats(&x[i..]));
        }
    }
    let mut single = [0.0f32; 64];
    for (lane, single) in lanes.iter().zip(single.chunks_exact_mut(4)) {
        store_floats(single, *lane);
    }
    for (i, x) in x.iter().enumerate().skip(whole) {
        single[i - whole] = one(i).mul_add(*x, single[i - whole]);
    }
    contract::tree(single)
}

/// `out[p] = scale * (query . key p)`: 16 lanes and a tree.
#[target_feature(enable = "neon")]
pub fn scores(query: &[f32], keys: Cells<'_>, scale: f32, out: &mut [f32]) {
    let whole = query.len() / 16 * 16;
    for (p, out) in out.iter_mut().enumerate() {
        let mut lanes = [vdupq_n_f32(0.0); 4];
        for i in (0..whole).step_by(16) {
            for (n, lane) in lanes.iter_mut().enumerate() {
                let i = i + 4 * n;
                *lane = vfmaq_f32(*lane, load_floats(&query[i..]), cells(keys, p, i));
            }
        }
        if whole < query.len() {
            let mut single = [0.0f32; 16];
            for (lane, single) in lanes.iter().zip(single.chunks_exact_mut(4)) {
                store_floats(single, *lane);
            }
            for (i, query) in query.iter().enumerate().skip(whole) {
                single[i - whole] = query.mul_add(keys.at(p, i), single[i - whole]);
            }
            lanes = std::array::from_fn(|n| load_floats(&single[4 * n..]));
        }
        let eight = [vaddq_f32(lanes[0], lanes[2]), vaddq_f32(lanes[1], lanes[3])];
        *out = tree_of_8(eight) * scale;
    }
}

/// Four cells of `position` from `i`.
#[inline]
#[target_feature(enable = "neon")]
fn cells(cells: Cells<'_>, position: usize, i: usize) -> float32x4_t {
    match cells {
        Cells::F16(cells, stride) => {
            let at = position * stride + i;
            let four: [u16; 4] = std::array::from_fn(|n| f16::to_bits(cells[at + n]));
            load_f16(&four)
        }
        Cells::F32(cells, stride) => load_floats(&cells[position * stride + i..]),
    }
}

/// `acc[d] = fma(weights[p], value[p][d], acc[d])` for the positions of
/// `range`, in order.
#[target_feature(enable = "neon")]
pub fn values(weights: &[f32], range: Range<usize>, values: Cells<'_>, acc: &mut [f32]) {
    let whole = acc.len() / 16 * 16;
    for start in (0..whole).step_by(16) {
        let mut sums: [float32x4_t; 4] =
            std::array::from_fn(|n| load_floats(&acc[start + 4 * n..]));
        for p in range.clone() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = vfmaq_n_f32(*sum, cells(values, p, start + 4 * n), weights[p]);
            }
        }
        for (n, sum) in sums.iter().enumerate() {
            store_floats(&mut acc[start + 4 * n..], *sum);
        }
    }
    for (i, acc) in acc.iter_mut().enumerate().skip(whole) {
        for p in range.clone() {
            *acc = weights[p].mul_add(values.at(p, i), *acc);
        }
    }
}
