//! Activation quantisation, the exponential and other vector maps.

use super::simd::*;
use crate::backend::GatedActivation;
use crate::contract::{self, EXP_LN2_HIGH, EXP_LN2_LOW, EXP_LOG2_E, EXP_POLYNOMIAL};
use crate::cpu::kernels::{ActivationMut, Layout, Order};
use crate::format::Format;
use std::arch::x86_64::*;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

simd! {
    pub fn quantise(x: &[f32], group: usize, layout: Layout, out: ActivationMut<'_>) {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let groups = x.chunks_exact(group).zip(out.q.chunks_exact_mut(group)).zip(out.scales);
        for ((x, q), scale) in groups {
            let (x, _) = x.as_chunks::<16>();
            let mut largest = _mm512_setzero_si512();
            for x in x {
                let bits = _mm512_and_si512(_mm512_castps_si512(load_f32x16(x)), magnitude);
                largest = _mm512_max_epu32(largest, bits);
            }
            let largest = _mm512_reduce_max_epu32(largest);
            let a = f32::from_bits(largest);
            if largest >= 0x7f80_0000 || a < contract::TINY {
                *scale = if a < contract::TINY { 0.0 } else { f32::NAN };
                q.fill(0);
                continue;
            }
            *scale = a / 127.0;
            let inverse = _mm512_set1_ps(127.0 / a);
            for (x, q) in x.iter().zip(q.chunks_exact_mut(16)) {
                let scaled = _mm512_mul_ps(load_f32x16(x), inverse);
                let rounded =
                    _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(scaled);
                store_q(q, _mm512_cvtepi32_epi8(rounded));
            }
        }
        group_sums(out.q, out.sums16, out.sums32);
        if let Order::Own(format) = layout.order {
            reorder(format, out.q, out.own);
        }
    }

    /// Sums of 16 (where wanted) and 32 int8 values.
    fn group_sums(q: &[i8], sums16: &mut [i16], sums32: &mut [i16]) {
        let ones = _mm256_set1_epi8(1);
        let pairs = _mm256_set1_epi16(1);
        for (g, sum32) in sums32.iter_mut().enumerate() {
            let sums = _mm256_maddubs_epi16(ones, load_q32(q, 32 * g));
            let sums = _mm256_madd_epi16(sums, pairs);
            let sums = _mm256_hadd_epi32(sums, sums);
            let sums = _mm256_hadd_epi32(sums, sums);
            let low = _mm_cvtsi128_si32(_mm256_castsi256_si128(sums));
            let high = _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(sums));
            *sum32 = (low + high) as i16;
            if let Some(sums16) = sums16.get_mut(2 * g..2 * g + 2) {
                sums16[0] = low as i16;
                sums16[1] = high as i16;
            }
        }
    }

    /// `e^x` as the contract has it.
    pub fn exp(x: __m512) -> __m512 {
        let n = _mm512_roundscale_ps::<NEAREST>(_mm512_mul_ps(x, _mm512_set1_ps(EXP_LOG2_E)));
        let r = _mm512_fmadd_ps(n, _mm512_set1_ps(EXP_LN2_HIGH), x);
        let r = _mm512_fmadd_ps(n, _mm512_set1_ps(EXP_LN2_LOW), r);
        let mut p = _mm512_set1_ps(EXP_POLYNOMIAL[0]);
        for c in &EXP_POLYNOMIAL[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        let exponent = _mm512_slli_epi32::<23>(_mm512_cvtps_epi32(n));
        let y = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
        let low = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(-87.0));
        let high = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(88.0));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let y = _mm512_mask_mov_ps(y, low, _mm512_setzero_ps());
        let y = _mm512_mask_mov_ps(y, high, _mm512_set1_ps(f32::INFINITY));
        _mm512_mask_mov_ps(y, nan, x)
    }

    /// `1 + e^-x`
    fn one_plus_exp_minus(x: __m512) -> __m512 {
        let minus = _mm512_xor_ps(x, _mm512_set1_ps(-0.0));
        _mm512_add_ps(_mm512_set1_ps(1.0), exp(minus))
    }

    pub fn gate(activation: GatedActivation, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        let one = _mm512_set1_ps(1.0);
        for (gate, up) in gate.chunks_mut(16).zip(up.chunks(16)) {
            let (g, u) = (load_f32(gate), load_f32(up));
            let y = match activation {
                GatedActivation::Silu => {
                    _mm512_mul_ps(_mm512_div_ps(g, one_plus_exp_minus(g)), u)
                }
                GatedActivation::ClampedSwiglu { alpha, limit } => {
                    // The second operand is the answer when one is NaN.
                    let g = _mm512_min_ps(_mm512_set1_ps(limit), g);
                    let u = _mm512_min_ps(_mm512_set1_ps(limit), u);
                    let u = _mm512_max_ps(_mm512_set1_ps(-limit), u);
                    let scaled = _mm512_mul_ps(_mm512_set1_ps(alpha), g);
                    let sigmoid = _mm512_div_ps(one, one_plus_exp_minus(scaled));
                    _mm512_mul_ps(_mm512_add_ps(u, one), _mm512_mul_ps(g, sigmoid))
                }
            };
            store_f32(gate, y);
        }
    }

    pub fn axpy(w: f32, y: &[f32], out: &mut [f32]) {
        assert_eq!(y.len(), out.len());
        let w = _mm512_set1_ps(w);
        for (out, y) in out.chunks_mut(16).zip(y.chunks(16)) {
            let sum = _mm512_fmadd_ps(w, load_f32(y), load_f32(out));
            store_f32(out, sum);
        }
    }

    pub fn merge(acc: &mut [f32], a: f32, part: &[f32], b: f32) {
        assert_eq!(acc.len(), part.len());
        let (a, b) = (_mm512_set1_ps(a), _mm512_set1_ps(b));
        for (acc, part) in acc.chunks_mut(16).zip(part.chunks(16)) {
            let part = _mm512_mul_ps(load_f32(part), b);
            let sum = _mm512_fmadd_ps(load_f32(acc), a, part);
            store_f32(acc, sum);
        }
    }
}

/// Copies `q` in the order in which rows of `format` meet it: so that the low
/// and the high nibbles (or the crumbs) of 64 packed bytes each face 64
/// consecutive values.
fn reorder(format: Format, q: &[i8], own: &mut [i8]) {
    let by_32 = |order: [usize; 8], own: &mut [i8]| {
        for (q, own) in q.chunks_exact(256).zip(own.chunks_exact_mut(256)) {
            for (own, from) in own.chunks_exact_mut(32).zip(order) {
                own.copy_from_slice(&q[32 * from..32 * from + 32]);
            }
        }
    };
    match format {
        Format::Q8_0 => own[..q.len()].copy_from_slice(q),
        Format::Q4K => by_32([0, 2, 1, 3, 4, 6, 5, 7], own),
        Format::Q2K => by_32([0, 4, 1, 5, 2, 6, 3, 7], own),
        _ => {
            // Four blocks: their first halves, then their second halves.
            for (q, own) in q.chunks(128).zip(own.chunks_exact_mut(128)) {
                for (b, q) in q.chunks_exact(32).enumerate() {
                    own[16 * b..16 * b + 16].copy_from_slice(&q[..16]);
                    own[64 + 16 * b..64 + 16 * b + 16].copy_from_slice(&q[16..]);
                }
            }
        }
    }
}
