//! Training of one layer's network on the log loss of every expert.

use super::adam::Adam;
use super::corpus::Rng;
use super::samples::Samples;
use pregate_predictor::forecast::learned::input::{Input, TOKEN_FIELD};
use pregate_predictor::forecast::learned::network::{Sizes, add_scaled, forward, uses};

/// How a network is trained.
#[derive(Clone, Debug)]
pub struct Settings {
    pub epochs: usize,
    pub batch: usize,
    /// Step at the start; it falls in a straight line to nothing.
    pub rate: f32,
    /// How much weights shrink, per step and rate.
    pub decay: f32,
    /// Share of samples whose token id is hidden.
    pub hide_token: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { epochs: 4, batch: 64, rate: 2e-3, decay: 0.01, hide_token: 0.1 }
    }
}

/// Weights to begin with.
pub fn start(sizes: &Sizes, top_k: usize, rng: &mut Rng) -> Vec<f32> {
    let mut weights = vec![0.0; sizes.count()];
    let [_, dense, straight, out, end] = sizes.parts();
    let base = (top_k as f32 / sizes.experts as f32).clamp(0.001, 0.999);
    for row in weights[..dense].chunks_exact_mut(sizes.width()) {
        let units = row[..sizes.hidden].iter_mut();
        units.for_each(|weight| *weight = 0.2 * (rng.uniform() - 0.5));
    }
    weights[dense..straight].iter_mut().for_each(|weight| *weight = 0.1 * (rng.uniform() - 0.5));
    let scale = 1.0 / (sizes.hidden as f32).sqrt();
    weights[out..end].iter_mut().for_each(|weight| *weight = scale * (rng.uniform() - 0.5));
    let token = straight + TOKEN_FIELD * sizes.experts;
    weights[token..token + sizes.experts].fill(0.5);
    weights[out - sizes.experts..out].fill((base / (1.0 - base)).ln());
    weights
}

/// `[hidden + experts]` buffers of one sample.
pub struct Scratch {
    pub input: Input,
    base: Vec<f32>,
    pub sums: Vec<f32>,
    errors: Vec<f32>,
}

impl Scratch {
    pub fn new(sizes: &Sizes) -> Self {
        let zero = vec![0.0; sizes.sums()];
        let base = vec![0.0; sizes.hidden];
        Self { input: Input::default(), base, sums: zero.clone(), errors: zero }
    }

    /// The answer to `input`, in `sums[hidden..]`.
    pub fn forward(&mut self, sizes: &Sizes, weights: &[f32]) {
        uses(sizes, weights, &self.input.dense, &mut self.base);
        forward(sizes, weights, &self.input, &self.base, &mut self.sums);
    }
}

/// The sum of products, in sixteen lanes.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a16.remainder().iter().zip(b16.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a16.zip(b16) {
        for lane in 0..16 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Adds one sample's gradient; `scratch.sums` holds the answer to
/// `scratch.input`.
pub fn backward(
    sizes: &Sizes,
    weights: &[f32],
    truth: &[u16],
    scratch: &mut Scratch,
    gradient: &mut [f32],
) {
    let [_, dense, straight, out, _] = sizes.parts();
    let (hidden, width, experts) = (sizes.hidden, sizes.width(), sizes.experts);
    let Scratch { input, sums, errors, .. } = scratch;
    let (units, answer) = sums.split_at(hidden);
    let (unit_errors, answer_errors) = errors.split_at_mut(hidden);
    for (error, &odds) in answer_errors.iter_mut().zip(answer) {
        *error = 1.0 / (1.0 + (-odds).exp());
    }
    for &expert in truth {
        answer_errors[usize::from(expert)] -= 1.0;
    }
    let rows = weights[out..].chunks_exact(experts).zip(gradient[out..].chunks_exact_mut(experts));
    for ((error, &unit), (weights, gradient)) in unit_errors.iter_mut().zip(units).zip(rows) {
        *error = 0.0;
        if unit > 0.0 {
            *error = dot(weights, answer_errors);
            add_scaled(gradient, unit, answer_errors);
        }
    }
    let direct = gradient[straight..out].chunks_exact_mut(experts);
    for (gradient, values) in direct.zip(input.dense.chunks_exact(experts)) {
        for ((gradient, value), error) in gradient.iter_mut().zip(values).zip(&*answer_errors) {
            *gradient += value * error;
        }
    }
    add_scaled(&mut gradient[out - experts..out], 1.0, answer_errors);
    for (row, &value) in input.dense.iter().enumerate() {
        if value != 0.0 {
            let start = dense + row * hidden;
            add_scaled(&mut gradient[start..start + hidden], value, unit_errors);
        }
    }
    for &(row, value) in &input.sparse {
        let start = row as usize * width;
        add_scaled(&mut gradient[start..start + width], value, errors);
    }
}

/// Trains on `samples`. After each epoch the loss on `checked` is measured,
/// and the best weights are kept; two epochs without a better one end it.
/// `told` hears what share of the work is done, in percent.
pub fn train(
    sizes: &Sizes,
    samples: &Samples,
    checked: &Samples,
    settings: &Settings,
    seed: u64,
    told: &mut dyn FnMut(usize),
) -> Vec<f32> {
    let mut rng = Rng(seed);
    let top_k = if samples.len() > 0 { samples.truth(0).len() } else { 1 };
    let mut weights = start(sizes, top_k, &mut rng);
    let mut gradient = vec![0.0; weights.len()];
    let mut adam = Adam::new(weights.len());
    let mut scratch = Scratch::new(sizes);
    let mut order: Vec<u32> = (0..samples.len() as u32).collect();
    let total = settings.epochs * samples.len();
    let (mut done, mut percent) = (0, 0);
    let (mut best, mut best_loss, mut worse) = (weights.clone(), f64::INFINITY, 0);
    for _ in 0..settings.epochs {
        rng.shuffle(&mut order);
        for batch in order.chunks(settings.batch) {
            for &sample in batch {
                samples.get(sample as usize, &mut scratch.input);
                if rng.uniform() < settings.hide_token {
                    scratch.input.dense[TOKEN_FIELD * sizes.experts..].fill(0.0);
                }
                scratch.forward(sizes, &weights);
                let truth = samples.truth(sample as usize);
                backward(sizes, &weights, truth, &mut scratch, &mut gradient);
            }
            let rate = settings.rate * (1.0 - done as f32 / total as f32).max(0.02);
            adam.step(&mut weights, &mut gradient, batch.len(), rate, settings.decay);
            done += batch.len();
            let now = 100 * done / total.max(1);
            told(now - percent);
            percent = now;
        }
        let loss = loss(sizes, &weights, checked, &mut scratch);
        (worse, best_loss) = if loss < best_loss { (0, loss) } else { (worse + 1, best_loss) };
        if worse == 0 || checked.len() == 0 {
            best.copy_from_slice(&weights);
        }
        if worse == 2 {
            break;
        }
    }
    told(100 - percent);
    best
}

/// The mean log loss over samples; infinite without any.
fn loss(sizes: &Sizes, weights: &[f32], samples: &Samples, scratch: &mut Scratch) -> f64 {
    let mut sum = 0.0;
    for sample in 0..samples.len() {
        samples.get(sample, &mut scratch.input);
        scratch.forward(sizes, weights);
        let answer = &scratch.sums[sizes.hidden..];
        // ln(1 + e^z) for every expert, less z where it was used.
        sum +=
            answer.iter().map(|&z| f64::from(z.max(0.0) + (-z.abs()).exp().ln_1p())).sum::<f64>();
        sum -=
            samples.truth(sample).iter().map(|&e| f64::from(answer[usize::from(e)])).sum::<f64>();
    }
    sum / samples.len() as f64
}
