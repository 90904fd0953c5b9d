//! Small operations between the matrix products, on the calling thread.
//!
//! Sums run in 64 lanes and a tree, as the numerical contract has it for
//! float rows, so that results do not depend on the instruction set.

/// Lanes of a float sum.
const LANES: usize = 64;

/// `sum_i term(i)` in the contract's order: element `i` joins lane `i % 64`
/// by one addition; lanes are added by a tree.
fn lane_sum(values: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = term(*lane, value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = term(*lane, value);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `x / sqrt(mean(x^2) + epsilon) * weight`; all `[width]`.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let factor = rms_factor(x, epsilon);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

/// [`rms_norm`] in place.
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
    let factor = rms_factor(x, epsilon);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}

fn rms_factor(x: &[f32], epsilon: f32) -> f32 {
    let squares = lane_sum(x, |lane, value| lane + value * value);
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

/// `(x - mean) / sqrt(variance + epsilon) * weight + bias`; all `[width]`.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, epsilon: f32, out: &mut [f32]) {
    let width = x.len() as f32;
    let mean = lane_sum(x, |lane, value| lane + value) / width;
    let squares = lane_sum(x, |lane, value| lane + (value - mean) * (value - mean));
    let factor = 1.0 / (squares / width + epsilon).sqrt();
    for (i, out) in out.iter_mut().enumerate() {
        *out = (x[i] - mean) * factor * weight[i] + bias.map_or(0.0, |bias| bias[i]);
    }
}

/// `x / sqrt(sum(x^2) + epsilon)`, in place.
pub fn l2_normalise(x: &mut [f32], epsilon: f32) {
    let squares = lane_sum(x, |lane, value| lane + value * value);
    let factor = 1.0 / (squares + epsilon).sqrt();
    x.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_match_their_definitions() {
        let x: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin() * 3.0 + 1.0).collect();
        let weight: Vec<f32> = (0..100).map(|i| 0.5 + i as f32 * 0.01).collect();
        let mut out = vec![0.0; 100];

        rms_norm(&x, &weight, 1e-5, &mut out);
        let mean_square = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 100.0;
        for i in 0..100 {
            let want = f64::from(x[i]) / (mean_square + 1e-5).sqrt() * f64::from(weight[i]);
            assert!((f64::from(out[i]) - want).abs() < 1e-5);
        }

        layer_norm(&x, &weight, Some(&weight), 1e-5, &mut out);
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / 100.0;
        let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / 100.0;
        for i in 0..100 {
            let normal = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt();
            let want = normal * f64::from(weight[i]) + f64::from(weight[i]);
            assert!((f64::from(out[i]) - want).abs() < 1e-5);
        }

        let mut unit = x.clone();
        l2_normalise(&mut unit, 0.0);
        assert!((unit.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-6);
    }
}
