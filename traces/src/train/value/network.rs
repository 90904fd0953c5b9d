//! Adam on cross-entropy, one sample after the other: the same bits each time.

use super::samples::{Random, Samples};
use pregate_predictor::policy::learned::{FEATURES, HIDDEN, HORIZONS, Network, PARAMETERS};

/// How [`train`] works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub epochs: usize,
    /// Samples per step.
    pub batch: usize,
    /// At the start; it falls in a line to a hundredth.
    pub rate: f32,
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { epochs: 6, batch: 128, rate: 3e-3, seed: 1 }
    }
}

/// Trains a network. `progress` hears of each epoch and its mean squared
/// error.
pub fn train(samples: &Samples, options: Options, progress: &mut dyn FnMut(usize, f64)) -> Network {
    let count = samples.features.len();
    let batch = options.batch.max(1);
    let mut random = Random(options.seed);
    let mut adam = Adam::new(start(&mut random));
    let mut order: Vec<u32> = (0..count as u32).collect();
    let steps = (options.epochs * count.div_ceil(batch)).max(1) as f32;
    for epoch in 0..options.epochs {
        for at in (1..count).rev() {
            order.swap(at, random.below(at + 1));
        }
        let mut error = 0.0;
        for batch in order.chunks(batch) {
            let network = Network::from_parameters(&adam.parameters);
            let mut gradient = Gradient::default();
            for &sample in batch {
                let sample = sample as usize;
                error +=
                    gradient.add(&network, &samples.features[sample], &samples.targets[sample]);
            }
            let left = 1.0 - adam.steps as f32 / steps;
            adam.step(&gradient.flat(), options.rate * left.max(0.01), batch.len() as f32);
        }
        progress(epoch, error / (count * HORIZONS.len()).max(1) as f64);
    }
    Network::from_parameters(&adam.parameters)
}

/// Inputs around zero, of a size that keeps the units' variance; the rest 0.
fn start(random: &mut Random) -> Vec<f32> {
    let mut numbers = vec![0.0; PARAMETERS];
    let mut fill = |numbers: &mut [f32], inputs: usize| {
        for number in numbers {
            let sum: f64 = (0..3).map(|_| random.uniform()).sum();
            *number = ((sum - 1.5) * 2.0 * (2.0 / inputs as f64).sqrt()) as f32;
        }
    };
    fill(&mut numbers[..FEATURES * HIDDEN], FEATURES);
    let output = (FEATURES + 1) * HIDDEN;
    fill(&mut numbers[output..output + HORIZONS.len() * HIDDEN], HIDDEN);
    numbers
}

/// The sum over a batch, as the fields of a [`Network`].
#[derive(Default)]
struct Gradient {
    input: [[f32; HIDDEN]; FEATURES],
    bias: [f32; HIDDEN],
    output: [[f32; HIDDEN]; HORIZONS.len()],
    output_bias: [f32; HORIZONS.len()],
}

impl Gradient {
    /// Answers the sum of squared errors.
    fn add(
        &mut self,
        network: &Network,
        features: &[f32; FEATURES],
        targets: &[f32; HORIZONS.len()],
    ) -> f64 {
        let hidden = network.hidden(features);
        let mut back = [0.0; HIDDEN];
        let mut error = 0.0;
        for (horizon, &target) in targets.iter().enumerate() {
            // Of cross-entropy behind a logistic output.
            let slope = network.answer(&hidden, horizon, 0.0) - target;
            error += f64::from(slope * slope);
            self.output_bias[horizon] += slope;
            for unit in 0..HIDDEN {
                self.output[horizon][unit] += slope * hidden[unit];
                back[unit] += slope * network.output[horizon][unit];
            }
        }
        for (back, &unit) in back.iter_mut().zip(&hidden) {
            *back = if unit > 0.0 { *back } else { 0.0 };
        }
        for (sum, back) in self.bias.iter_mut().zip(&back) {
            *sum += back;
        }
        for (row, &feature) in self.input.iter_mut().zip(features) {
            row.iter_mut().zip(&back).for_each(|(sum, back)| *sum += feature * back);
        }
        error
    }

    fn flat(&self) -> Vec<f32> {
        let input = self.input.as_flattened().iter().chain(&self.bias);
        let output = self.output.as_flattened().iter().chain(&self.output_bias);
        input.chain(output).copied().collect()
    }
}

/// Kingma and Ba, arXiv 1412.6980, algorithm 1, with its default decays.
struct Adam {
    parameters: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    steps: i32,
}

impl Adam {
    fn new(parameters: Vec<f32>) -> Self {
        let zeros = vec![0.0; parameters.len()];
        Self { parameters, first: zeros.clone(), second: zeros, steps: 0 }
    }

    fn step(&mut self, gradient: &[f32], rate: f32, batch: f32) {
        self.steps += 1;
        let correct = |decay: f32| 1.0 / (1.0 - decay.powi(self.steps));
        let (first_scale, second_scale) = (correct(0.9), correct(0.999));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((parameter, (first, second)), sum) in
            self.parameters.iter_mut().zip(moments).zip(gradient)
        {
            let slope = sum / batch;
            *first = 0.9 * *first + 0.1 * slope;
            *second = 0.999 * *second + 0.001 * slope * slope;
            *parameter -= rate * *first * first_scale / ((*second * second_scale).sqrt() + 1e-8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target that is a function of two features, and noise in the others.
    fn samples(count: usize) -> Samples {
        let mut random = Random(3);
        let mut samples = Samples::default();
        for _ in 0..count {
            let features: [f32; FEATURES] =
                std::array::from_fn(|_| (2.0 * random.uniform() - 1.0) as f32);
            let near = f32::from(u8::from(features[2] > 0.0));
            samples.features.push(features);
            samples.targets.push([near, 0.5 * near + 0.25 * (features[5] + 1.0), 0.5]);
        }
        samples
    }

    #[test]
    fn it_learns_what_there_is_to_learn_and_the_same_each_time() {
        let samples = samples(4000);
        let options = Options { epochs: 8, rate: 1e-2, ..Options::default() };
        let mut errors = Vec::new();
        let network = train(&samples, options, &mut |_, error| errors.push(error));
        assert_eq!(errors.len(), 8);
        assert!(errors[7] < 0.02 && errors[7] < 0.5 * errors[0], "{errors:?}");
        assert_eq!(network, train(&samples, options, &mut |_, _| ()));
        assert_ne!(network, train(&samples, Options { seed: 2, ..options }, &mut |_, _| ()));
        let mut features = [0.0; FEATURES];
        (features[2], features[5]) = (0.8, -0.6);
        let hidden = network.hidden(&features);
        let answers = [0, 1, 2].map(|horizon| network.answer(&hidden, horizon, 0.0));
        let wanted = [1.0, 0.6, 0.5];
        for (found, wanted) in answers.iter().zip(wanted) {
            assert!((found - wanted).abs() < 0.12, "{answers:?}");
        }
    }
}
