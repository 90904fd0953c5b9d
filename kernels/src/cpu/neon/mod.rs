//! The contract in NEON (ARMv8.0): eight float lanes are two registers.
//!
//! Two products of signed bytes, at most 2 * 128 * 127 = 32512, fit 16 bits:
//! `smull`, `smlal` and `sadalp` are exact. The dot product instructions of
//! ARMv8.2 are not used: their intrinsics are not in stable Rust.
//!
//! The functions are safe inside this module's target feature. A [`Neon`]
//! exists only where it was detected, which is what its methods rely on.

mod blocks;
mod elementwise;
mod floats;
mod rows;

use super::kernels::{
    Activation, ActivationMut, Activations, Cells, Isa, Kernels, Layout, Rows, Scratch, Tile,
};
use super::pool::Columns;
use crate::backend::GatedActivation;
use crate::format::{ActivationKind, Format};
use std::arch::aarch64::*;

/// The kernels of this module on a machine that can run them.
pub(crate) struct Neon(());

impl Neon {
    /// `None` where NEON is missing.
    pub fn detect() -> Option<&'static Neon> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(&Neon(()))
    }
}

impl Kernels for Neon {
    fn isa(&self) -> Isa {
        Isa::Neon
    }

    fn quantise(&self, x: &[f32], group: usize, layout: Layout, out: ActivationMut<'_>) {
        let _ = layout;
        // SAFETY: a `Neon` exists only where NEON was detected.
        unsafe { elementwise::quantise(x, group, out.q, out.scales) };
        super::scalar::fill_sums(out.q, out.sums16, out.sums32);
    }

    fn rows(&self, rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.rows);
        // SAFETY: a `Neon` exists only where NEON was detected.
        unsafe {
            match rows.format.activation() {
                ActivationKind::F32 => floats::rows(rows, x.x, out),
                _ => rows::rows(rows, Quantised::new(rows.format, x), out),
            }
        }
    }

    fn batch_from(&self, _format: Format) -> usize {
        2
    }

    fn tile_shape(&self, _format: Format) -> (usize, usize) {
        (rows::TILE, 16)
    }

    fn pack(&self, _format: Format, x: &Activations, tokens: &[u32], out: &mut Tile) {
        out.gather(x, tokens);
    }

    fn batch(
        &self,
        rows: Rows<'_>,
        tiles: &[Tile],
        scratch: &mut Scratch,
        out: &mut Columns<'_, f32>,
    ) {
        // SAFETY: a `Neon` exists only where NEON was detected.
        unsafe {
            match rows.format.activation() {
                ActivationKind::F32 => floats::batch(rows, tiles, &mut scratch.floats, out),
                _ => rows::batch(rows, tiles, out),
            }
        }
    }

    fn gate(&self, activation: GatedActivation, gate: &mut [f32], up: &[f32]) {
        // SAFETY: a `Neon` exists only where NEON was detected.
        unsafe { elementwise::gated(activation, gate, up) }
    }

    fn axpy(&self, w: f32, y: &[f32], out: &mut [f32]) {
        // SAFETY: a `Neon` exists only where NEON was detected.
        unsafe { elementwise::axpy(w, y, out) }
    }

    fn scores(
        &self,
        queries: &[f32],
        width: usize,
        keys: Cells<'_>,
        count: usize,
        scale: f32,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let queries = queries.chunks_exact(width).zip(out.chunks_mut(out_stride));
        for (query, out) in queries {
            // SAFETY: a `Neon` exists only where NEON was detected.
            unsafe { floats::scores(query, keys, scale, &mut out[..count]) };
        }
    }

    fn values(
        &self,
        weights: &[f32],
        weight_stride: usize,
        ranges: &[(usize, usize)],
        values: Cells<'_>,
        width: usize,
        acc: &mut [f32],
    ) {
        let queries = weights.chunks(weight_stride).zip(acc.chunks_exact_mut(width));
        for ((weights, acc), &(start, end)) in queries.zip(ranges) {
            // SAFETY: a `Neon` exists only where NEON was detected.
            unsafe { floats::values(weights, start..end, values, acc) };
        }
    }
}

/// One token's quantised activations.
#[derive(Clone, Copy, Debug)]
struct Quantised<'a> {
    /// `[cols]`, each in -127..=127
    q: &'a [i8],
    /// `[cols / group]`
    scales: &'a [f32],
    /// Sums of the codes, for rows with blocks of 32 in groups of 32, for
    /// rows with blocks of 256 in groups of 16.
    sums: &'a [i16],
}

impl<'a> Quantised<'a> {
    fn new(format: Format, x: Activation<'a>) -> Self {
        let per_32 = format.activation() == ActivationKind::Int8Per32;
        Self { q: x.q, scales: x.scales, sums: if per_32 { x.sums32 } else { x.sums16 } }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load(bytes: &[u8]) -> uint8x16_t {
    let bytes: &[u8; 16] = bytes[..16].try_into().expect("16 bytes");
    // SAFETY: the array has the 16 bytes that are read, at any alignment.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_codes(q: &[i8]) -> int8x16_t {
    let q: &[i8; 16] = q[..16].try_into().expect("16 codes");
    // SAFETY: the array has the 16 bytes that are read, at any alignment.
    unsafe { vld1q_s8(q.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_ints(x: &[i32]) -> int32x4_t {
    let x: &[i32; 4] = x[..4].try_into().expect("4 numbers");
    // SAFETY: the array has the 16 bytes that are read.
    unsafe { vld1q_s32(x.as_ptr()) }
}

/// Four f16 as f32, from their bits.
#[inline]
#[target_feature(enable = "neon")]
fn load_f16(bits: &[u16]) -> float32x4_t {
    let bits: &[u16; 4] = bits[..4].try_into().expect("4 numbers");
    // SAFETY: the array has the 8 bytes that are read.
    vcvt_f32_f16(vreinterpret_f16_u16(unsafe { vld1_u16(bits.as_ptr()) }))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_floats(x: &[f32]) -> float32x4_t {
    let x: &[f32; 4] = x[..4].try_into().expect("4 floats");
    // SAFETY: the array has the 16 bytes that are read.
    unsafe { vld1q_f32(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_floats(to: &mut [f32], x: float32x4_t) {
    let to: &mut [f32; 4] = (&mut to[..4]).try_into().expect("4 floats");
    // SAFETY: the array has the 16 bytes that are written.
    unsafe { vst1q_f32(to.as_mut_ptr(), x) }
}

/// The contract's tree over eight lanes: steps 4, 2, 1.
#[inline]
#[target_feature(enable = "neon")]
fn tree_of_8(lanes: [float32x4_t; 2]) -> f32 {
    let four = vaddq_f32(lanes[0], lanes[1]);
    let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
}
