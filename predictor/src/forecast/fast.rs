//! Logarithm and exponential for forecasts: a few operations that compilers
//! turn into vector code, the same bits on every machine. Not for tensors.

use std::f32::consts::{LN_2, LOG2_E};

/// The natural logarithm of a positive, normal `x`, within 1e-4.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    let bits = x.to_bits() as i32;
    // Mantissa in [2/3, 4/3), so that the series has little to do.
    let exponent = (bits - 0x3f2a_aaab) >> 23;
    let mantissa = f32::from_bits((bits - (exponent << 23)) as u32);
    let f = mantissa - 1.0;
    // atanh series in s = f / (2 + f).
    let s = f / (2.0 + f);
    let s2 = s * s;
    let tail = s2 * (2.0 / 3.0 + s2 * (0.4 + s2 * (2.0 / 7.0)));
    exponent as f32 * LN_2 + s * (2.0 + tail)
}

/// `e^z` for any finite `z`, within a share of 1e-4; beyond `e^-30` and
/// `e^30` it grows no more.
#[inline(always)]
pub fn exp(z: f32) -> f32 {
    let x = z.clamp(-30.0, 30.0) * LOG2_E;
    // Rounds to nearest by adding and taking away 1.5 * 2^23.
    let whole = (x + 12_582_912.0) - 12_582_912.0;
    let r = (x - whole) * LN_2;
    let p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0)))));
    p * f32::from_bits(((whole as i32 + 127) << 23) as u32)
}

/// `1 / (1 + e^-z)` for any finite `z`, within 1e-4, in 0..=1.
#[inline(always)]
pub fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}

/// Sums go to so many lanes, element `i` to lane `i % LANES`, which a tree adds
/// up: the same order on every machine, and no chain of additions.
const LANES: usize = 8;

#[inline(always)]
fn lanes(pairs: (&[f32], &[f32]), of: impl Fn(f32, f32) -> f32) -> f32 {
    let (a, b) = pairs;
    let mut sums = [0.0; LANES];
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += of(a[lane], b[lane]);
        }
    }
    for ((sum, &a), &b) in sums.iter_mut().zip(rest_a).zip(rest_b) {
        *sum += of(a, b);
    }
    for half in [4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0]
}

pub fn sum(values: &[f32]) -> f32 {
    lanes((values, values), |value, _| value)
}

/// The sum of squared distances from `mean`.
pub fn squares(values: &[f32], mean: f32) -> f32 {
    lanes((values, values), |value, _| (value - mean) * (value - mean))
}

/// Of as many elements each.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    lanes((a, b), |a, b| a * b)
}

/// The largest, at least `least`; no element may be NaN.
pub fn largest(values: &[f32], least: f32) -> f32 {
    let mut most = [least; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            most[lane] = if chunk[lane] > most[lane] { chunk[lane] } else { most[lane] };
        }
    }
    most.iter().chain(rest).fold(least, |most, &value| if value > most { value } else { most })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_the_exact_functions() {
        let mut x = 1e-30f32;
        while x < 1e30 {
            assert!((f64::from(ln(x)) - f64::from(x).ln()).abs() < 1e-4, "ln {x}");
            x *= 1.037;
        }
        for step in -4000..4000 {
            let z = step as f32 * 0.01;
            let exact = 1.0 / (1.0 + (-f64::from(z)).exp());
            assert!((f64::from(sigmoid(z)) - exact).abs() < 1e-4, "sigmoid {z}");
        }
        assert!(sigmoid(f32::MAX) <= 1.0 && sigmoid(f32::MIN) >= 0.0);
    }

    #[test]
    fn lanes_lose_no_element() {
        for length in 0..40 {
            // Whole numbers, so that every order gives the same sum.
            let a: Vec<f32> = (0..length).map(|i| ((i * 37 + 5) % 23) as f32 - 11.0).collect();
            let b: Vec<f32> = (0..length).map(|i| ((i * 29 + 3) % 17) as f32 - 8.0).collect();
            assert_eq!(sum(&a), a.iter().sum::<f32>());
            assert_eq!(dot(&a, &b), a.iter().zip(&b).map(|(a, b)| a * b).sum::<f32>());
            assert_eq!(squares(&a, 2.0), a.iter().map(|a| (a - 2.0) * (a - 2.0)).sum::<f32>());
            assert_eq!(largest(&a, -3.0), a.iter().copied().fold(-3.0, f32::max));
        }
    }
}
