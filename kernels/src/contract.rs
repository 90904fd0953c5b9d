//! The numerical contract of `docs/architecture.md` in plain Rust: what every
//! kernel must compute, bit for bit, written to be read rather than to be
//! fast. Results that are NaN may differ in sign and payload; everything else
//! is equal in every bit.

use crate::backend::{ExpertWeights, GatedActivation};
use crate::block::{Block, Minimum};
use crate::format::{ActivationKind, Format};
use half::{bf16, f16};

/// Float lanes of a quantised row.
pub const BLOCK_LANES: usize = 8;
/// Float lanes of an F32, F16 or BF16 row.
pub const FLOAT_LANES: usize = 64;

/// Quantises `x` in groups of `group` elements.
///
/// `q` has the length of `x`, `scales` one entry per group.
pub fn quantise(x: &[f32], group: usize, q: &mut [i8], scales: &mut [f32]) {
    assert_eq!(x.len(), q.len());
    assert_eq!(x.len(), scales.len() * group);
    for ((x, q), scale) in
        x.chunks_exact(group).zip(q.chunks_exact_mut(group)).zip(scales.iter_mut())
    {
        let magnitude = x.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let largest = f32::from_bits(magnitude);
        q.fill(0);
        if magnitude >= 0x7f80_0000 {
            *scale = f32::NAN;
        } else if largest < TINY {
            *scale = 0.0;
        } else {
            *scale = largest / 127.0;
            let inverse = 127.0 / largest;
            for (q, x) in q.iter_mut().zip(x) {
                *q = (x * inverse).round_ties_even() as i8;
            }
        }
    }
}

/// A group whose largest magnitude is below this quantises to zero: 2^-100.
pub const TINY: f32 = f32::from_bits((127 - 100) << 23);

/// `(s_b, t_b)` of a block against its quantised activations.
pub fn block_sums(block: &Block, q: &[i8]) -> (i32, i32) {
    let (mut s, mut t) = (0i32, 0i32);
    for (j, q) in q.chunks_exact(block.sub_len).enumerate() {
        let weights = &block.weights[j * block.sub_len..(j + 1) * block.sub_len];
        let dot: i32 = weights.iter().zip(q).map(|(w, q)| *w as i32 * *q as i32).sum();
        s += block.scales[j] as i32 * dot;
        t += block.mins[j] as i32 * q.iter().map(|q| *q as i32).sum::<i32>();
    }
    (s, t)
}

/// Adds a block to its lane.
pub fn accumulate(block: &Block, q: &[i8], scale: f32, lane: f32) -> f32 {
    let (s, t) = block_sums(block, q);
    let lane = (block.d * scale).mul_add(s as f32, lane);
    match block.minimum {
        Minimum::None => lane,
        Minimum::Added => (block.min * scale).mul_add(t as f32, lane),
        Minimum::Subtracted => (-(block.min * scale)).mul_add(t as f32, lane),
    }
}

/// Adds lanes by the tree `lane[i] += lane[i + s]`, `s` halving.
pub fn tree<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut s = N / 2;
    while s > 0 {
        for i in 0..s {
            lanes[i] += lanes[i + s];
        }
        s /= 2;
    }
    lanes[0]
}

/// Dot product of a quantised row with quantised activations.
pub fn dot_int8(format: Format, row: &[u8], q: &[i8], scales: &[f32]) -> f32 {
    let mut lanes = [0.0f32; BLOCK_LANES];
    let blocks = row.chunks_exact(format.block_bytes());
    for (b, (block, q)) in blocks.zip(q.chunks_exact(format.block_len())).enumerate() {
        let lane = &mut lanes[b % BLOCK_LANES];
        *lane = accumulate(&Block::unpack(format, block), q, scales[b], *lane);
    }
    tree(lanes)
}

/// Element `i` of an F32, F16 or BF16 row.
pub fn float_at(format: Format, row: &[u8], i: usize) -> f32 {
    match format {
        Format::F32 => {
            f32::from_le_bytes([row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]])
        }
        Format::F16 => f16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32(),
        Format::Bf16 => bf16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32(),
        _ => panic!("{format} is not a float format"),
    }
}

/// Dot product of an F32, F16 or BF16 row with f32 activations.
pub fn dot_float(format: Format, row: &[u8], x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; FLOAT_LANES];
    for (i, x) in x.iter().enumerate() {
        let lane = &mut lanes[i % FLOAT_LANES];
        *lane = float_at(format, row, i).mul_add(*x, *lane);
    }
    tree(lanes)
}

/// Dot product of a row of any format with f32 activations, which are
/// quantised first where the format wants it.
pub fn dot(format: Format, row: &[u8], x: &[f32]) -> f32 {
    if format.activation() == ActivationKind::F32 {
        return dot_float(format, row, x);
    }
    let group = format.block_len();
    let mut q = vec![0i8; x.len()];
    let mut scales = vec![0.0; x.len() / group];
    quantise(x, group, &mut q, &mut scales);
    dot_int8(format, row, &q, &scales)
}

/// Coefficients of [`exp`]'s polynomial, highest power first.
pub const EXP_POLYNOMIAL: [f32; 7] =
    [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0];
pub const EXP_LOG2_E: f32 = std::f32::consts::LOG2_E;
#[allow(clippy::excessive_precision)] // exact in binary
pub const EXP_LN2_HIGH: f32 = -0.693_359_375;
#[allow(clippy::excessive_precision)] // as `docs/architecture.md` writes it
pub const EXP_LN2_LOW: f32 = 2.121_944_40e-4;

/// The shared exponential function.
pub fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return f32::NAN;
    }
    if x < -87.0 {
        return 0.0;
    }
    if x > 88.0 {
        return f32::INFINITY;
    }
    let n = (x * EXP_LOG2_E).round_ties_even();
    let r = n.mul_add(EXP_LN2_HIGH, x);
    let r = n.mul_add(EXP_LN2_LOW, r);
    let p = EXP_POLYNOMIAL[1..].iter().fold(EXP_POLYNOMIAL[0], |p, c| p.mul_add(r, *c));
    f32::from_bits(p.to_bits().wrapping_add(((n as i32) << 23) as u32))
}

pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `ln(1 + e^x)`, within 2 ulp: `x` itself above 20, where `e^-x` is less than
/// half an ulp of it.
///
/// `u = 1 + e^x = 2^k m` with `m` in 2/3..4/3, and `ln m` by the odd series of
/// `2 artanh((m - 1) / (m + 1))`; what the sum `1 + e^x` lost comes back as
/// `(e^x - (u - 1)) / u`.
pub fn softplus(x: f32) -> f32 {
    if x.is_nan() || x > 20.0 {
        return x;
    }
    let e = exp(x);
    let u = 1.0 + e;
    let k = u.to_bits().wrapping_sub(SOFTPLUS_TWO_THIRDS) as i32 >> 23;
    let f = f32::from_bits(u.to_bits().wrapping_sub((k as u32) << 23)) - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let p = [1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0].iter().fold(1.0f32 / 9.0, |p, c| p.mul_add(z, *c));
    let twice = s + s;
    let log_m = (twice * z).mul_add(p, twice);
    let lost = (e - (u - 1.0)) / u;
    (k as f32).mul_add(std::f32::consts::LN_2, log_m + lost)
}

/// The bits of 2/3.
const SOFTPLUS_TWO_THIRDS: u32 = 0x3f2a_aaab;

/// What stands between gate/up and down, for one element.
pub fn gated(activation: GatedActivation, gate: f32, up: f32) -> f32 {
    match activation {
        GatedActivation::Silu => silu(gate) * up,
        GatedActivation::ClampedSwiglu { alpha, limit } => {
            let g = at_most(gate, limit);
            let u = at_least(at_most(up, limit), -limit);
            (u + 1.0) * (g * sigmoid(alpha * g))
        }
    }
}

/// `x` unless it is above `limit`; a NaN stays.
fn at_most(x: f32, limit: f32) -> f32 {
    if x > limit { limit } else { x }
}

/// `x` unless it is below `limit`; a NaN stays.
fn at_least(x: f32, limit: f32) -> f32 {
    if x < limit { limit } else { x }
}

/// One expert (or dense feed-forward block) on one token: `[hidden]` to
/// `[hidden]`.
pub fn expert(x: &[f32], weights: ExpertWeights<'_>, activation: GatedActivation) -> Vec<f32> {
    let product = |matrix: crate::Matrix<'_>, x: &[f32], bias: Option<&[f32]>| -> Vec<f32> {
        let mut scratch = Vec::new();
        (0..matrix.rows())
            .map(|r| {
                let y = dot(matrix.format(), matrix.row(r, &mut scratch), x);
                bias.map_or(y, |bias| y + bias[r])
            })
            .collect()
    };
    let gate = product(weights.gate, x, weights.gate_bias);
    let up = product(weights.up, x, weights.up_bias);
    let inner: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| gated(activation, *g, *u)).collect();
    product(weights.down, &inner, weights.down_bias)
}

/// `out = fma(w_n, y_n, ... fma(w_1, y_1, +0))` per element.
pub fn combine(parts: &[(f32, Vec<f32>)], out: &mut [f32]) {
    out.fill(0.0);
    for (w, y) in parts {
        for (out, y) in out.iter_mut().zip(y) {
            *out = w.mul_add(*y, *out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_and_total() {
        for i in -880..=880 {
            let x = i as f32 * 0.1;
            let want = (x as f64).exp();
            let got = exp(x) as f64;
            if x < -87.0 {
                assert_eq!(got, 0.0);
            } else {
                assert!((got - want).abs() <= 4e-7 * want, "exp({x}) = {got}, want {want}");
            }
        }
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(-87.0) >= f32::MIN_POSITIVE);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn softplus_is_close_and_total() {
        for i in -1000..=1000 {
            let x = i as f32 * 0.03;
            let want = f64::from(x).exp().ln_1p();
            let got = f64::from(softplus(x));
            assert!((got - want).abs() <= 4e-7 * want, "softplus({x}) = {got}, want {want}");
        }
        assert!(softplus(f32::NAN).is_nan());
        assert_eq!(softplus(f32::NEG_INFINITY), 0.0);
        assert_eq!(softplus(f32::INFINITY), f32::INFINITY);
        assert_eq!(softplus(-100.0), 0.0);
        // The largest arguments of both branches meet.
        assert_eq!(softplus(20.0f32.next_up()), 20.0f32.next_up());
        assert_eq!(softplus(20.0), 20.0);
    }

    #[test]
    fn quantise_states_every_special_case() {
        let mut q = [1i8; 32];
        let mut scale = [1.0f32];
        let mut x = [0.0f32; 32];
        quantise(&x, 32, &mut q, &mut scale);
        assert_eq!((q, scale), ([0; 32], [0.0]));
        x[3] = 2.0f32.powi(-101);
        quantise(&x, 32, &mut q, &mut scale);
        assert_eq!(scale, [0.0]);
        x[4] = -254.0;
        x[5] = 3.0; // 1.5 steps rounds to even
        x[6] = 1.0; // 0.5 steps rounds to even
        quantise(&x, 32, &mut q, &mut scale);
        assert_eq!(scale, [2.0]);
        assert_eq!((q[4], q[5], q[6]), (-127, 2, 0));
        x[7] = f32::NAN;
        quantise(&x, 32, &mut q, &mut scale);
        assert!(scale[0].is_nan() && q == [0; 32]);
    }

    #[test]
    fn tree_order_is_by_halves() {
        // (1e8 + -1e8) + (1 + 1) only if lane 0 meets lane 2 first.
        assert_eq!(tree([1e8, 1.0, -1e8, 1.0]), 2.0);
    }

    #[test]
    fn offsets_and_sub_scales_reach_the_block_sum() {
        // Q6_K, all bits zero but scales 2: every weight is -32.
        let mut block = [0u8; 210];
        block[192..208].fill(2);
        let (s, _) = block_sums(&Block::unpack(Format::Q6K, &block), &[1; 256]);
        assert_eq!(s, 2 * -32 * 256);
        // Q4_K with scale 1 and minimum 1 in sub-block 0, weights 15.
        let mut block = [0xffu8; 144];
        block[4..16].fill(0);
        block[4] = 1;
        block[8] = 1;
        let (s, t) = block_sums(&Block::unpack(Format::Q4K, &block), &[1; 256]);
        assert_eq!((s, t), (15 * 32, 32));
    }
}
