//! Quantising activations, exp and the gated activations.

use super::{load_floats, load_up_to_8, store_floats};
use crate::backend::GatedActivation;
use crate::contract;
use std::arch::x86_64::*;

const INFINITY_BITS: u32 = 0x7f80_0000;

/// Quantises `x` in groups of `group` (32 or 256).
///
/// `q` is `[cols]`, `scales` `[cols / group]`; panics on other lengths.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn quantise(x: &[f32], group: usize, q: &mut [i8], scales: &mut [f32]) {
    assert!(group.is_multiple_of(16) && x.len().is_multiple_of(group));
    assert_eq!((q.len(), scales.len()), (x.len(), x.len() / group));
    let groups = x.chunks_exact(group).zip(q.chunks_exact_mut(group));
    for ((x, q), scale) in groups.zip(scales) {
        let bits = largest_magnitude(x);
        let largest = f32::from_bits(bits);
        if bits >= INFINITY_BITS || largest < contract::TINY {
            *scale = if bits >= INFINITY_BITS { f32::NAN } else { 0.0 };
            q.fill(0);
            continue;
        }
        *scale = largest / 127.0;
        let inverse = _mm256_set1_ps(127.0 / largest);
        for (x, q) in x.chunks_exact(16).zip(q.chunks_exact_mut(16)) {
            // Conversion rounds to nearest even.
            let low = _mm256_cvtps_epi32(_mm256_mul_ps(load_floats(x), inverse));
            let high = _mm256_cvtps_epi32(_mm256_mul_ps(load_floats(&x[8..]), inverse));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            let codes = _mm_packs_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            let q: &mut [i8; 16] = q.try_into().expect("16 codes");
            // SAFETY: the array has the 16 bytes that are written.
            unsafe { _mm_storeu_si128(q.as_mut_ptr().cast(), codes) };
        }
    }
}

/// Fills those of `sums16` and `sums32` that are not empty.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn sum_codes(q: &[i8], sums16: &mut [i16], sums32: &mut [i16]) {
    for (sum, q) in sums16.iter_mut().zip(q.chunks_exact(16)) {
        *sum = q.iter().map(|&q| i16::from(q)).sum();
    }
    for (sum, q) in sums32.iter_mut().zip(q.chunks_exact(32)) {
        *sum = q.iter().map(|&q| i16::from(q)).sum();
    }
}

/// `out[i] = fma(w, y[i], out[i])`
#[target_feature(enable = "avx2,fma,f16c")]
pub fn axpy(w: f32, y: &[f32], out: &mut [f32]) {
    let (y, y_rest) = y[..out.len()].as_chunks::<8>();
    let (out, out_rest) = out.as_chunks_mut::<8>();
    for (y, out) in y.iter().zip(out) {
        let sum = _mm256_fmadd_ps(_mm256_set1_ps(w), load_floats(y), load_floats(out));
        store_floats(out, sum);
    }
    for (y, out) in y_rest.iter().zip(out_rest) {
        *out = w.mul_add(*y, *out);
    }
}

/// `acc[i] = fma(acc[i], a, part[i] * b)`
#[target_feature(enable = "avx2,fma,f16c")]
pub fn merge(acc: &mut [f32], a: f32, part: &[f32], b: f32) {
    let (part, part_rest) = part[..acc.len()].as_chunks::<8>();
    let (acc, acc_rest) = acc.as_chunks_mut::<8>();
    for (part, acc) in part.iter().zip(acc) {
        let part = _mm256_mul_ps(load_floats(part), _mm256_set1_ps(b));
        let sum = _mm256_fmadd_ps(load_floats(acc), _mm256_set1_ps(a), part);
        store_floats(acc, sum);
    }
    for (part, acc) in part_rest.iter().zip(acc_rest) {
        *acc = acc.mul_add(a, part * b);
    }
}

/// The largest of the floats' bits without their signs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn largest_magnitude(x: &[f32]) -> u32 {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let mut largest = _mm256_setzero_si256();
    for x in x.chunks_exact(8) {
        let bits = _mm256_and_si256(_mm256_castps_si256(load_floats(x)), magnitude);
        largest = _mm256_max_epu32(largest, bits);
    }
    let four =
        _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
    let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b00_00_11_10>(four));
    let one = _mm_max_epu32(two, _mm_shuffle_epi32::<0b00_00_00_01>(two));
    _mm_cvtsi128_si32(one) as u32
}

/// The contract's exp.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub fn exp(x: __m256) -> __m256 {
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(contract::EXP_LOG2_E),
    ));
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(contract::EXP_LN2_HIGH), x);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(contract::EXP_LN2_LOW), r);
    let mut p = _mm256_set1_ps(contract::EXP_POLYNOMIAL[0]);
    for coefficient in &contract::EXP_POLYNOMIAL[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*coefficient));
    }
    let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
    let value = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    let below = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-87.0));
    let above = _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_set1_ps(88.0));
    let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
    let value = _mm256_andnot_ps(below, value);
    let value = _mm256_blendv_ps(value, _mm256_set1_ps(f32::INFINITY), above);
    _mm256_blendv_ps(value, x, nan)
}

/// `1 + exp(-x)`
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn one_plus_exp_of_minus(x: __m256) -> __m256 {
    let minus = _mm256_xor_ps(x, _mm256_set1_ps(-0.0));
    _mm256_add_ps(_mm256_set1_ps(1.0), exp(minus))
}

/// `gate[i]` becomes the activation of `gate[i]` and `up[i]`.
///
/// Panics if the lengths differ.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn gated(activation: GatedActivation, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    for (gate, up) in gate.chunks_mut(8).zip(up.chunks(8)) {
        let value = gated_8(activation, load_up_to_8(gate), load_up_to_8(up));
        let mut whole = [0.0; 8];
        store_floats(&mut whole, value);
        gate.copy_from_slice(&whole[..gate.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn gated_8(activation: GatedActivation, gate: __m256, up: __m256) -> __m256 {
    match activation {
        GatedActivation::Silu => {
            _mm256_mul_ps(_mm256_div_ps(gate, one_plus_exp_of_minus(gate)), up)
        }
        GatedActivation::ClampedSwiglu { alpha, limit } => {
            let limit = _mm256_set1_ps(limit);
            let minus_limit = _mm256_xor_ps(limit, _mm256_set1_ps(-0.0));
            // min and max give their second operand if one is NaN.
            let gate = _mm256_min_ps(limit, gate);
            let up = _mm256_max_ps(minus_limit, _mm256_min_ps(limit, up));
            let one = _mm256_set1_ps(1.0);
            let scaled = _mm256_mul_ps(_mm256_set1_ps(alpha), gate);
            let sigmoid = _mm256_div_ps(one, one_plus_exp_of_minus(scaled));
            _mm256_mul_ps(_mm256_add_ps(up, one), _mm256_mul_ps(gate, sigmoid))
        }
    }
}
