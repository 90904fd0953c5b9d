//! Quantising activations, exp and the gated activations.

use super::{load_floats, store_floats};
use crate::backend::GatedActivation;
use crate::contract;
use std::arch::aarch64::*;

const INFINITY_BITS: u32 = 0x7f80_0000;

/// Quantises `x` in groups of `group` (32 or 256).
///
/// `q` is `[cols]`, `scales` `[cols / group]`; panics on other lengths.
#[target_feature(enable = "neon")]
pub fn quantise(x: &[f32], group: usize, q: &mut [i8], scales: &mut [f32]) {
    assert!(group.is_multiple_of(8) && x.len().is_multiple_of(group));
    assert_eq!((q.len(), scales.len()), (x.len(), x.len() / group));
    let groups = x.chunks_exact(group).zip(q.chunks_exact_mut(group));
    for ((x, q), scale) in groups.zip(scales) {
        let mut most = vdupq_n_u32(0);
        for x in x.chunks_exact(4) {
            let magnitude = vreinterpretq_u32_f32(vabsq_f32(load_floats(x)));
            most = vmaxq_u32(most, magnitude);
        }
        let bits = vmaxvq_u32(most);
        let largest = f32::from_bits(bits);
        if bits >= INFINITY_BITS || largest < contract::TINY {
            *scale = if bits >= INFINITY_BITS { f32::NAN } else { 0.0 };
            q.fill(0);
            continue;
        }
        *scale = largest / 127.0;
        let inverse = vdupq_n_f32(127.0 / largest);
        for (x, q) in x.chunks_exact(8).zip(q.chunks_exact_mut(8)) {
            // Converts to the nearest, ties to even.
            let low = vcvtnq_s32_f32(vmulq_f32(load_floats(x), inverse));
            let high = vcvtnq_s32_f32(vmulq_f32(load_floats(&x[4..]), inverse));
            let codes = vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)));
            let q: &mut [i8; 8] = q.try_into().expect("8 codes");
            // SAFETY: the array has the 8 bytes that are written.
            unsafe { vst1_s8(q.as_mut_ptr(), codes) };
        }
    }
}

/// `out[i] = fma(w, y[i], out[i])`
#[target_feature(enable = "neon")]
pub fn axpy(w: f32, y: &[f32], out: &mut [f32]) {
    let (y, y_rest) = y[..out.len()].as_chunks::<4>();
    let (out, out_rest) = out.as_chunks_mut::<4>();
    for (y, out) in y.iter().zip(out) {
        let sum = vfmaq_n_f32(load_floats(out), load_floats(y), w);
        store_floats(out, sum);
    }
    for (y, out) in y_rest.iter().zip(out_rest) {
        *out = w.mul_add(*y, *out);
    }
}

/// The contract's exp.
#[inline]
#[target_feature(enable = "neon")]
fn exp(x: float32x4_t) -> float32x4_t {
    let n = vrndnq_f32(vmulq_n_f32(x, contract::EXP_LOG2_E));
    let r = vfmaq_n_f32(x, n, contract::EXP_LN2_HIGH);
    let r = vfmaq_n_f32(r, n, contract::EXP_LN2_LOW);
    let mut p = vdupq_n_f32(contract::EXP_POLYNOMIAL[0]);
    for coefficient in &contract::EXP_POLYNOMIAL[1..] {
        p = vfmaq_f32(vdupq_n_f32(*coefficient), p, r);
    }
    let exponent = vshlq_n_s32::<23>(vcvtnq_s32_f32(n));
    let value = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), exponent));
    let below = vcltq_f32(x, vdupq_n_f32(-87.0));
    let above = vcgtq_f32(x, vdupq_n_f32(88.0));
    let value = vbslq_f32(below, vdupq_n_f32(0.0), value);
    let value = vbslq_f32(above, vdupq_n_f32(f32::INFINITY), value);
    // Equal to itself unless NaN.
    vbslq_f32(vceqq_f32(x, x), value, x)
}

/// `gate[i]` becomes the activation of `gate[i]` and `up[i]`.
///
/// Panics if the lengths differ.
#[target_feature(enable = "neon")]
pub fn gated(activation: GatedActivation, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    let (gate, gate_rest) = gate.as_chunks_mut::<4>();
    let (up, up_rest) = up.as_chunks::<4>();
    for (gate, up) in gate.iter_mut().zip(up) {
        let value = gated_4(activation, load_floats(gate), load_floats(up));
        store_floats(gate, value);
    }
    for (gate, up) in gate_rest.iter_mut().zip(up_rest) {
        *gate = contract::gated(activation, *gate, *up);
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn gated_4(activation: GatedActivation, gate: float32x4_t, up: float32x4_t) -> float32x4_t {
    let one = vdupq_n_f32(1.0);
    match activation {
        GatedActivation::Silu => {
            vmulq_f32(vdivq_f32(gate, vaddq_f32(one, exp(vnegq_f32(gate)))), up)
        }
        GatedActivation::ClampedSwiglu { alpha, limit } => {
            // Comparisons are false for NaN, which stays.
            let (most, least) = (vdupq_n_f32(limit), vdupq_n_f32(-limit));
            let gate = vbslq_f32(vcgtq_f32(gate, most), most, gate);
            let up = vbslq_f32(vcgtq_f32(up, most), most, up);
            let up = vbslq_f32(vcltq_f32(up, least), least, up);
            let minus = vnegq_f32(vmulq_n_f32(gate, alpha));
            let sigmoid = vdivq_f32(one, vaddq_f32(one, exp(minus)));
            vmulq_f32(vaddq_f32(up, one), vmulq_f32(gate, sigmoid))
        }
    }
}
