//! DeltaNet kernels against the steps of the forward pass
//! (`runtime/src/forward/delta_net.rs`): convolution and decoding in bits,
//! prompts in chunks with the tolerance that `cuda/delta_net.rs` states.

mod lab;

use lab::{Lab, assert_same_bits, numbers};
use pregate_kernels::contract::{self, sigmoid, softplus};
use pregate_kernels::cuda::{
    CudaError, DeltaConv, DeltaDecode, DeltaInputs, DeltaPrefill, DeltaShape, Span, delta_conv,
    delta_decode, delta_prefill,
};
use pregate_kernels::ops;
use pregate_kernels::testing::Random;

const EPSILON: f32 = 1e-6;

const fn shape(
    key_heads: usize,
    value_heads: usize,
    key_dim: usize,
    value_dim: usize,
    is_tiled: bool,
) -> DeltaShape {
    DeltaShape { key_heads, value_heads, key_dim, value_dim, is_tiled }
}

/// Convolution, SiLU and norms of the forward pass; `past` is replaced.
fn convolve(
    s: &DeltaShape,
    kernel: usize,
    raw: &[f32],
    taps: &[f32],
    past: &mut Vec<f32>,
    scale: f32,
) -> Vec<f32> {
    let (channels, keys) = (s.channels(), s.key_heads * s.key_dim);
    let inputs: Vec<f32> = past.iter().chain(raw).copied().collect();
    let mut out = vec![0.0; raw.len()];
    for (token, row) in out.chunks_exact_mut(channels).enumerate() {
        for (channel, value) in row.iter_mut().enumerate() {
            for tap in 0..kernel {
                *value += taps[channel * kernel + tap] * inputs[(token + tap) * channels + channel];
            }
            *value *= sigmoid(*value);
        }
        let (q, k) = row[..2 * keys].split_at_mut(keys);
        for head in q.chunks_exact_mut(s.key_dim) {
            ops::l2_normalise(head, EPSILON);
            head.iter_mut().for_each(|value| *value *= scale);
        }
        k.chunks_exact_mut(s.key_dim).for_each(|head| ops::l2_normalise(head, EPSILON));
    }
    *past = inputs[inputs.len() - past.len()..].to_vec();
    out
}

#[test]
fn convolution_has_the_bits_of_the_forward_pass() {
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(31);
    let cases = [
        // Qwen3.5: four taps, heads of 128.
        (shape(2, 4, 128, 128, false), 4, [1, 1, 2, 8]),
        (shape(2, 2, 16, 16, false), 4, [3, 1, 17, 40]),
        // Fewer tokens than the history, lanes that stay empty, no history.
        (shape(1, 3, 20, 36, false), 7, [2, 3, 1, 33]),
        (shape(3, 3, 68, 4, false), 1, [1, 2, 20, 1]),
    ];
    for (shape, kernel, chunks) in cases {
        let channels = shape.channels();
        let taps = numbers(channels * kernel, &mut rng);
        let mut past = numbers((kernel - 1) * channels, &mut rng);
        let device_taps = lab.floats(&taps);
        let device_past = lab.floats(&past);
        let scale = (shape.key_dim as f32).powf(-0.5);
        for tokens in chunks {
            let raw = numbers(tokens * channels, &mut rng);
            let want = convolve(&shape, kernel, &raw, &taps, &mut past, scale);
            let mixed = lab.space(4 * tokens * channels);
            let call = DeltaConv {
                shape,
                kernel,
                raw: &lab.floats(&raw),
                taps: &device_taps,
                past: &device_past,
                mixed: &mixed,
                tokens,
                epsilon: EPSILON,
                query_scale: scale,
            };
            delta_conv(&lab.device, lab.device.compute(), call).unwrap();
            let what = format!("{shape:?}, {kernel} taps, {tokens} tokens");
            assert_same_bits(&lab.read_floats(&mixed), &want, &what);
            assert_same_bits(&lab.read_floats(&device_past), &past, &format!("{what}: past"));
        }
    }
}

/// A layer's inputs, after the convolution.
struct Layer {
    shape: DeltaShape,
    decay: Vec<f32>,
    decay_bias: Vec<f32>,
    norm: Vec<f32>,
    memory: Vec<f32>,
}

struct Chunk {
    tokens: usize,
    mixed: Vec<f32>,
    alpha: Vec<f32>,
    beta: Vec<f32>,
    gate: Vec<f32>,
}

impl Layer {
    fn new(shape: DeltaShape, rng: &mut Random) -> Self {
        Self {
            shape,
            // A_log of trained models lies in 0..=2.8.
            decay: (0..shape.value_heads).map(|_| -(rng.unit() * 2.8).exp()).collect(),
            decay_bias: (0..shape.value_heads).map(|_| rng.normal() * 2.0 - 3.0).collect(),
            norm: numbers(shape.value_dim, rng),
            memory: (0..shape.memory()).map(|_| rng.normal()).collect(),
        }
    }

    fn chunk(&self, tokens: usize, rng: &mut Random) -> Chunk {
        let s = &self.shape;
        let raw = numbers(tokens * s.channels(), rng);
        // Neighbouring keys resemble each other, as a convolution's do.
        let taps: Vec<f32> = (0..s.channels()).flat_map(|_| [0.3, 0.5, 0.7, 1.0]).collect();
        let scale = (s.key_dim as f32).powf(-0.5);
        let mixed = convolve(s, 4, &raw, &taps, &mut vec![0.0; 3 * s.channels()], scale);
        let mut wide = |spread: f32| -> Vec<f32> {
            (0..tokens * s.value_heads).map(|_| rng.normal() * spread).collect()
        };
        let (mut alpha, beta) = (wide(3.0), wide(2.0));
        // Forgets everything, once; an identity of softplus.
        let at = alpha.len() / 2;
        alpha[at] = 30.0;
        Chunk { tokens, mixed, alpha, beta, gate: numbers(tokens * s.values(), rng) }
    }

    /// The forward pass; `memory` is replaced.
    fn steps(&mut self, chunk: &Chunk) -> Vec<f32> {
        let s = self.shape;
        let (channels, keys) = (s.channels(), s.key_heads * s.key_dim);
        let mut out = vec![0.0; chunk.tokens * s.values()];
        for token in 0..chunk.tokens {
            let row = &chunk.mixed[token * channels..(token + 1) * channels];
            for head in 0..s.value_heads {
                let key_head = match s.is_tiled {
                    true => head % s.key_heads,
                    false => head / (s.value_heads / s.key_heads),
                };
                let q = &row[key_head * s.key_dim..(key_head + 1) * s.key_dim];
                let k = &row[keys + key_head * s.key_dim..keys + (key_head + 1) * s.key_dim];
                let v = &row[2 * keys + head * s.value_dim..2 * keys + (head + 1) * s.value_dim];
                let at = token * s.value_heads + head;
                let log_decay =
                    self.decay[head] * softplus(chunk.alpha[at] + self.decay_bias[head]);
                let size = s.key_dim * s.value_dim;
                let memory = &mut self.memory[head * size..(head + 1) * size];
                let answer = &mut out[at * s.value_dim..(at + 1) * s.value_dim];
                let strength = sigmoid(chunk.beta[at]);
                step(memory, (q, k, v), contract::exp(log_decay), strength, answer);
                ops::rms_norm_in_place(answer, &self.norm, EPSILON);
                let gate = &chunk.gate[at * s.value_dim..(at + 1) * s.value_dim];
                for (value, z) in answer.iter_mut().zip(gate) {
                    *value *= z * sigmoid(*z);
                }
            }
        }
        out
    }
}

fn step(
    memory: &mut [f32],
    (q, k, v): (&[f32], &[f32], &[f32]),
    decay: f32,
    strength: f32,
    answer: &mut [f32],
) {
    let width = v.len();
    let mut delta = vec![0.0f32; width];
    for (row, k) in memory.chunks_exact_mut(width).zip(k) {
        for (cell, recalled) in row.iter_mut().zip(&mut delta) {
            *cell *= decay;
            *recalled += *cell * k;
        }
    }
    for (delta, v) in delta.iter_mut().zip(v) {
        *delta = (v - *delta) * strength;
    }
    answer.fill(0.0);
    for ((row, k), q) in memory.chunks_exact_mut(width).zip(k).zip(q) {
        for ((cell, delta), answer) in row.iter_mut().zip(&delta).zip(&mut *answer) {
            *cell += k * delta;
            *answer += *cell * q;
        }
    }
}

/// A layer on the device, and what a chunk needs there.
struct DeviceLayer {
    shape: DeltaShape,
    decay: Span,
    decay_bias: Span,
    norm: Span,
    memory: Span,
    counters: Span,
}

impl DeviceLayer {
    fn new(lab: &Lab, layer: &Layer) -> Self {
        Self {
            shape: layer.shape,
            decay: lab.floats(&layer.decay),
            decay_bias: lab.floats(&layer.decay_bias),
            norm: lab.floats(&layer.norm),
            memory: lab.floats(&layer.memory),
            counters: lab.zeros(4 * layer.shape.value_heads),
        }
    }

    fn run(&self, lab: &Lab, chunk: &Chunk, is_prefill: bool) -> Vec<f32> {
        let answers = lab.space(4 * chunk.tokens * self.shape.values());
        let inputs = DeltaInputs {
            shape: self.shape,
            tokens: chunk.tokens,
            mixed: &lab.floats(&chunk.mixed),
            alpha: &lab.floats(&chunk.alpha),
            beta: &lab.floats(&chunk.beta),
            decay: &self.decay,
            decay_bias: &self.decay_bias,
            norm: &self.norm,
            norm_epsilon: EPSILON,
            gate: &lab.floats(&chunk.gate),
            memory: &self.memory,
            answers: &answers,
        };
        let stream = lab.device.compute();
        if is_prefill {
            let scratch = lab.space(DeltaPrefill::scratch_bytes(&self.shape, chunk.tokens));
            delta_prefill(&lab.device, stream, DeltaPrefill { inputs, scratch: &scratch }).unwrap();
        } else {
            let call = DeltaDecode { inputs, counters: &self.counters };
            delta_decode(&lab.device, stream, call).unwrap();
            assert!(lab.read(&self.counters).iter().all(|byte| *byte == 0), "counters");
        }
        lab.read_floats(&answers)
    }
}

#[test]
fn decoding_has_the_bits_of_the_forward_pass() {
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(32);
    let shapes = [
        shape(2, 4, 128, 128, false),
        shape(2, 4, 128, 128, true),
        shape(2, 4, 16, 16, true),
        shape(1, 2, 64, 36, false),
        shape(3, 3, 20, 132, false),
    ];
    for shape in shapes {
        let mut layer = Layer::new(shape, &mut rng);
        let device = DeviceLayer::new(&lab, &layer);
        // State goes on from call to call.
        for tokens in [1, 3, 1, 8] {
            let mut chunk = layer.chunk(tokens, &mut rng);
            if tokens == 8 {
                // A gate of a head that is no number stays there.
                chunk.alpha[2 * shape.value_heads] = f32::NAN;
            }
            let want = layer.steps(&chunk);
            let what = format!("{shape:?}, {tokens} tokens");
            assert_same_bits(&device.run(&lab, &chunk, false), &want, &what);
            assert_same_bits(
                &lab.read_floats(&device.memory),
                &layer.memory,
                &format!("{what}: memory"),
            );
            assert!(want.iter().any(|x| x.is_finite()), "{what}");
        }
    }
}

/// The largest difference in units of the largest number of `want`.
fn difference(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    assert!(largest.is_finite() && largest > 0.0);
    let pairs = got.iter().zip(want);
    pairs.map(|(g, w)| f64::from((g - w).abs() / largest)).fold(0.0, |m: f64, d| {
        assert!(!d.is_nan(), "NaN");
        m.max(d)
    })
}

#[test]
fn prompts_in_chunks_are_close_to_steps() {
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(33);
    let cases = [
        (shape(1, 2, 128, 128, false), [130, 64]),
        (shape(2, 4, 16, 16, true), [65, 1]),
        (shape(1, 1, 64, 36, false), [63, 200]),
        (shape(2, 2, 20, 132, false), [128, 70]),
    ];
    let mut worst: f64 = 0.0;
    for (shape, chunks) in cases {
        let mut layer = Layer::new(shape, &mut rng);
        let device = DeviceLayer::new(&lab, &layer);
        for tokens in chunks {
            let chunk = layer.chunk(tokens, &mut rng);
            let want = layer.steps(&chunk);
            let got = device.run(&lab, &chunk, true);
            let bound = 4.0 * ((shape.key_dim + 64) as f64).sqrt() / f64::from(1 << 24);
            let answers = difference(&got, &want);
            let memory = difference(&lab.read_floats(&device.memory), &layer.memory);
            assert!(answers <= bound, "{shape:?}, {tokens} tokens: {answers:e} > {bound:e}");
            assert!(memory <= bound, "{shape:?}, {tokens} tokens: {memory:e} > {bound:e}");
            worst = worst.max(answers.max(memory) / bound);
            // Errors of one call are not the next one's.
            layer.memory = lab.read_floats(&device.memory);
        }
    }
    println!("largest difference: {worst:.3} of the bound");
}

#[test]
fn a_prompt_in_two_pieces_is_a_prompt() {
    // Chunks start where a call starts, so pieces of whole chunks are the
    // same chunks, in bits.
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(34);
    let layer = Layer::new(shape(1, 2, 32, 32, false), &mut rng);
    let whole = layer.chunk(150, &mut rng);
    let piece = |from: usize, to: usize| {
        let part = |values: &[f32]| {
            let each = values.len() / 150;
            values[from * each..to * each].to_vec()
        };
        Chunk {
            tokens: to - from,
            mixed: part(&whole.mixed),
            alpha: part(&whole.alpha),
            beta: part(&whole.beta),
            gate: part(&whole.gate),
        }
    };
    let (one, two) = (DeviceLayer::new(&lab, &layer), DeviceLayer::new(&lab, &layer));
    let want = one.run(&lab, &whole, true);
    let mut got = two.run(&lab, &piece(0, 64), true);
    got.extend(two.run(&lab, &piece(64, 150), true));
    assert_same_bits(&got, &want, &"answers");
    assert_same_bits(&lab.read_floats(&two.memory), &lab.read_floats(&one.memory), &"memory");
}

#[test]
fn calls_whose_sizes_do_not_fit_are_errors() {
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(35);
    let layer = Layer::new(shape(1, 2, 16, 16, false), &mut rng);
    let chunk = layer.chunk(2, &mut rng);
    let device = DeviceLayer::new(&lab, &layer);
    let (mixed, alpha) = (lab.floats(&chunk.mixed), lab.floats(&chunk.alpha));
    let (beta, gate) = (lab.floats(&chunk.beta), lab.floats(&chunk.gate));
    let answers = lab.space(4 * 2 * 32);
    let inputs = DeltaInputs {
        shape: layer.shape,
        tokens: 2,
        mixed: &mixed,
        alpha: &alpha,
        beta: &beta,
        decay: &device.decay,
        decay_bias: &device.decay_bias,
        norm: &device.norm,
        norm_epsilon: EPSILON,
        gate: &gate,
        memory: &device.memory,
        answers: &answers,
    };
    let stream = lab.device.compute();
    let decode = |inputs: DeltaInputs<'_>| {
        delta_decode(&lab.device, stream, DeltaDecode { inputs, counters: &device.counters })
    };
    let is_shape = |result| matches!(result, Err(CudaError::Shape { .. }));
    decode(inputs).unwrap();
    let small = lab.space(4);
    assert!(is_shape(decode(DeltaInputs { tokens: 3, ..inputs })));
    for shape in [
        shape(0, 2, 16, 16, false),
        shape(2, 3, 16, 16, false),
        shape(1, 2, 18, 16, false),
        shape(1, 2, 16, 0, false),
        shape(1, 2, 16, 1 << 40, false),
    ] {
        assert!(is_shape(decode(DeltaInputs { shape, ..inputs })), "{shape:?}");
    }
    assert!(is_shape(decode(DeltaInputs { memory: &small, ..inputs })));
    assert!(is_shape(decode(DeltaInputs { decay: &small, ..inputs })));
    let prefill = DeltaPrefill { inputs, scratch: &small };
    assert!(is_shape(delta_prefill(&lab.device, stream, prefill)));
    let conv = |kernel: usize, taps: &Span| {
        let call = DeltaConv {
            shape: layer.shape,
            kernel,
            raw: &mixed,
            taps,
            past: &small,
            mixed: &answers,
            tokens: 1,
            epsilon: EPSILON,
            query_scale: 0.25,
        };
        delta_conv(&lab.device, stream, call)
    };
    let taps = lab.zeros(4 * 64);
    conv(1, &taps).unwrap();
    assert!(is_shape(conv(0, &taps)));
    assert!(is_shape(conv(17, &taps)));
    assert!(is_shape(conv(4, &taps)));
    assert!(is_shape(conv(1, &small)));
}
