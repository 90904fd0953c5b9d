//! The contract in AVX2, FMA and F16C: eight float lanes are one register.
//!
//! Products of a weight and an activation are made in pairs of 16 bits by
//! `maddubs`, which saturates and wants one unsigned side. Unsigned codes
//! (at most 63) take it directly and have the format's offset subtracted
//! through the sums of the activations; signed ones (Q8_0, the tables) as
//! `|w|` times `sign(q, w)`, at most 2 * 128 * 127 = 32512. Both are exact.
//!
//! The functions are safe inside this module's target features. An [`Avx2`]
//! exists only where they were detected, which is what its methods rely on.

mod attention;
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
use half::f16;
use std::arch::x86_64::*;

/// The kernels of this module on a machine that can run them.
pub(crate) struct Avx2(());

impl Avx2 {
    /// `None` where AVX2, FMA or F16C is missing.
    pub fn detect() -> Option<&'static Avx2> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(&Avx2(()))
    }
}

impl Kernels for Avx2 {
    fn isa(&self) -> Isa {
        Isa::Avx2
    }

    fn quantise(&self, x: &[f32], group: usize, _layout: Layout, out: ActivationMut<'_>) {
        // SAFETY: an `Avx2` exists only where its features were detected.
        unsafe {
            elementwise::quantise(x, group, out.q, out.scales);
            elementwise::sum_codes(out.q, out.sums16, out.sums32);
        }
    }

    fn rows(&self, rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.rows);
        // SAFETY: an `Avx2` exists only where its features were detected.
        unsafe {
            match rows.format.activation() {
                ActivationKind::F32 => floats::rows(rows, x.x, out),
                _ => rows::rows(rows, Quantised::new(rows.format, x), out),
            }
        }
    }

    fn batch_from(&self, _format: Format) -> usize {
        4
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
        // SAFETY: an `Avx2` exists only where its features were detected.
        unsafe {
            match rows.format.activation() {
                ActivationKind::F32 => floats::batch(rows, tiles, &mut scratch.floats, out),
                _ => rows::batch(rows, tiles, out),
            }
        }
    }

    fn gate(&self, activation: GatedActivation, gate: &mut [f32], up: &[f32]) {
        // SAFETY: an `Avx2` exists only where its features were detected.
        unsafe { elementwise::gated(activation, gate, up) }
    }

    fn axpy(&self, w: f32, y: &[f32], out: &mut [f32]) {
        // SAFETY: an `Avx2` exists only where its features were detected.
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
            // SAFETY: an `Avx2` exists only where its features were detected.
            unsafe { attention::scores(query, keys, scale, &mut out[..count]) };
        }
    }

    fn softmax_chunk(&self, scores: &mut [f32], first: usize) -> (f32, f32) {
        // SAFETY: an `Avx2` exists only where its features were detected.
        unsafe { attention::softmax_chunk(scores, first) }
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
            // SAFETY: an `Avx2` exists only where its features were detected.
            unsafe { attention::values(weights, start..end, values, acc) };
        }
    }

    fn merge(&self, acc: &mut [f32], a: f32, part: &[f32], b: f32) {
        // SAFETY: an `Avx2` exists only where its features were detected.
        unsafe { elementwise::merge(acc, a, part, b) }
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
#[target_feature(enable = "avx2,fma,f16c")]
fn load(bytes: &[u8]) -> __m256i {
    let bytes: &[u8; 32] = bytes[..32].try_into().expect("32 bytes");
    // SAFETY: the array has the 32 bytes that are read, at any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_half(bytes: &[u8]) -> __m128i {
    let bytes: &[u8; 16] = bytes[..16].try_into().expect("16 bytes");
    // SAFETY: the array has the 16 bytes that are read, at any alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_codes(q: &[i8]) -> __m256i {
    let q: &[i8; 32] = q[..32].try_into().expect("32 codes");
    // SAFETY: the array has the 32 bytes that are read, at any alignment.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_sums(sums: &[i16]) -> __m256i {
    let sums: &[i16; 16] = sums[..16].try_into().expect("16 sums");
    // SAFETY: the array has the 32 bytes that are read, at any alignment.
    unsafe { _mm256_loadu_si256(sums.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_8_sums(sums: &[i16; 8]) -> __m128i {
    // SAFETY: the array has the 16 bytes that are read, at any alignment.
    unsafe { _mm_loadu_si128(sums.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_floats(x: &[f32]) -> __m256 {
    let x: &[f32; 8] = x[..8].try_into().expect("8 floats");
    // SAFETY: the array has the 32 bytes that are read, at any alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_floats(to: &mut [f32], x: __m256) {
    let to: &mut [f32; 8] = (&mut to[..8]).try_into().expect("8 floats");
    // SAFETY: the array has the 32 bytes that are written, at any alignment.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
}

/// Eight f16 cells as f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_f16(cells: &[f16]) -> __m256 {
    let cells: &[f16; 8] = cells[..8].try_into().expect("8 cells");
    // SAFETY: the array has the 16 bytes that are read, at any alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(cells.as_ptr().cast()) })
}

/// The first `x.len()` lanes (at most eight) from `x`, the others zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_up_to_8(x: &[f32]) -> __m256 {
    if x.len() >= 8 {
        return load_floats(x);
    }
    let mut padded = [0.0; 8];
    padded[..x.len()].copy_from_slice(x);
    load_floats(&padded)
}

/// Lane `i` of the answer is the sum of the lanes of `v[i]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums_of_8(v: &[__m256i; 8]) -> __m256i {
    let low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    let high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    _mm256_add_epi32(
        _mm256_permute2x128_si256::<0x20>(low, high),
        _mm256_permute2x128_si256::<0x31>(low, high),
    )
}

/// The contract's tree over eight lanes: steps 4, 2, 1.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tree_of_8(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
