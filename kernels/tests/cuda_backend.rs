//! `Cuda` as a backend of the forward pass has the bits of the CPU, and after
//! an error answers with NaN and calls the driver no more.

use half::f16;
use pregate_kernels::cuda::{Cuda, Device};
use pregate_kernels::testing::{Inputs, Random, Weights, experts_in_parts, inputs, weights};
use pregate_kernels::{
    AttentionCall, Backend, Choice, Cpu, CpuOptions, ExpertWeights, Format, GatedActivation, Isa,
    KvCells, KvView, Linear, Matrix, Routes,
};
use pregate_standin::{Fault, testing};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One test at a time: one of them makes the driver fail.
static TURN: Mutex<()> = Mutex::new(());

/// The device of a test, and its turn.
fn device() -> Option<(MutexGuard<'static, ()>, Device)> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    testing::device().map(|device| (turn, device))
}

fn scalar() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(1), isa: Some(Isa::Scalar) }).unwrap()
}

fn cuda(device: Device) -> Cuda {
    Cuda::new(device, scalar())
}

/// Bits, where every NaN is one.
fn bits(values: &[f32]) -> Vec<u32> {
    let one = |value: &f32| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() };
    values.iter().map(one).collect()
}

fn normal(count: usize, random: &mut Random) -> Vec<f32> {
    inputs(Inputs::Normal, count, random)
}

#[test]
fn products_have_the_bits_of_the_cpu_for_every_format_and_count_of_tokens() {
    let Some((_turn, device)) = device() else { return };
    let (gpu, cpu) = (cuda(device), scalar());
    let mut random = Random::new(1);
    for (n, format) in Format::ALL.into_iter().enumerate() {
        let (rows, cols) = (33, 512);
        let data = weights(format, Weights::Usual, rows, cols, &mut random);
        let other = weights(Format::Q8_0, Weights::Usual, 5, cols, &mut random);
        let matrix = Matrix::new(format, rows, cols, &data).unwrap();
        let other = Matrix::new(Format::Q8_0, 5, cols, &other).unwrap();
        let tokens = [1, 3, 9, 17][n % 4];
        let x = normal(tokens * cols, &mut random);
        let bias = normal(rows, &mut random);
        let run = |backend: &dyn Backend| {
            let (mut a, mut b) = (vec![7.0; tokens * rows], vec![7.0; tokens * 5]);
            let mut jobs = [
                Linear { weight: matrix, bias: Some(&bias), out: &mut a },
                Linear { weight: other, bias: None, out: &mut b },
            ];
            backend.linear(&x, tokens, &mut jobs);
            let y = normal(tokens * rows, &mut Random::new(3));
            let mut c = vec![7.0; tokens * cols];
            backend.linear_transposed(&y, tokens, matrix, &mut c);
            [a, b, c].map(|out| bits(&out))
        };
        assert!(run(&gpu) == run(&cpu), "{format}, {tokens} tokens");
    }
    assert_eq!((gpu.on_host(), gpu.failure()), (0, None));
}

/// `[inner, hidden]`, `[inner, hidden]` and `[hidden, inner]` of some experts.
struct Layer {
    format: Format,
    hidden: usize,
    inner: usize,
    data: Vec<[Vec<u8>; 3]>,
    biases: Vec<[Vec<f32>; 3]>,
    is_biased: bool,
}

impl Layer {
    fn new(format: Format, hidden: usize, inner: usize, random: &mut Random) -> Self {
        let shapes = [(inner, hidden), (inner, hidden), (hidden, inner)];
        let mut make =
            |(rows, cols): (usize, usize)| weights(format, Weights::Usual, rows, cols, random);
        let data = (0..5).map(|_| shapes.map(&mut make)).collect();
        let biases = (0..5).map(|_| shapes.map(|(rows, _)| normal(rows, random))).collect();
        Self { format, hidden, inner, data, biases, is_biased: format == Format::Mxfp4 }
    }

    fn expert(&self, expert: u32) -> ExpertWeights<'_> {
        let [gate, up, down] = &self.data[expert as usize];
        let matrix = |bytes, rows, cols| Matrix::new(self.format, rows, cols, bytes).unwrap();
        let bias = |i: usize| self.is_biased.then(|| self.biases[expert as usize][i].as_slice());
        ExpertWeights {
            gate: matrix(gate, self.inner, self.hidden),
            up: matrix(up, self.inner, self.hidden),
            down: matrix(down, self.hidden, self.inner),
            gate_bias: bias(0),
            up_bias: bias(1),
            down_bias: bias(2),
        }
    }
}

#[test]
fn experts_have_the_bits_of_the_cpu_however_they_are_grouped() {
    let Some((_turn, device)) = device() else { return };
    let (gpu, cpu) = (cuda(device), scalar());
    let mut random = Random::new(2);
    let clamped = GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
    let cases = [
        (Format::Q4K, 256, 512, GatedActivation::Silu),
        (Format::Mxfp4, 96, 64, clamped),
        (Format::Bf16, 72, 40, GatedActivation::Silu),
    ];
    for (format, hidden, inner, activation) in cases {
        let layer = Layer::new(format, hidden, inner, &mut random);
        for tokens in [1, 6] {
            let x = normal(tokens * hidden, &mut random);
            let mut routes = Routes::new();
            for token in 0..tokens {
                // Lists of any length, also empty.
                let experts = [4, 1, 3].into_iter().take((token + 2) % 4);
                let weight = || 0.2 + token as f32;
                routes.push(
                    &experts.map(|expert| Choice { expert, weight: weight() }).collect::<Vec<_>>(),
                );
            }
            let run = |backend: &dyn Backend, parts| {
                let weights = |expert| layer.expert(expert);
                let routed = experts_in_parts(backend, &x, &routes, &weights, activation, parts);
                let mut dense = vec![9.0; x.len()];
                backend.feed_forward(&x, tokens, layer.expert(2), activation, &mut dense);
                [bits(&routed), bits(&dense)]
            };
            let expected = run(&cpu, 1);
            for parts in [1, 2] {
                assert!(run(&gpu, parts) == expected, "{format}, {tokens} tokens, {parts} parts");
            }
        }
    }
    assert_eq!((gpu.on_host(), gpu.failure()), (0, None));
}

#[test]
fn attention_has_the_bits_of_the_cpu_and_odd_widths_go_to_the_host() {
    let Some((_turn, device)) = device() else { return };
    let (gpu, cpu) = (cuda(device), scalar());
    let mut random = Random::new(3);
    let cases = [(16, 8, 0, 3, true), (64, 64, 250, 11, false), (24, 16, 30, 1, true)];
    for (n, (key_width, value_width, first_position, tokens, halves)) in
        cases.into_iter().chain([(12, 12, 5, 2, true)]).enumerate()
    {
        let (heads, kv_heads) = (4, 2);
        let positions = first_position + tokens;
        let keys = normal(kv_heads * positions * key_width, &mut random);
        let values = normal(kv_heads * positions * value_width, &mut random);
        let halved = |v: &[f32]| v.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>();
        let (half_keys, half_values) = (halved(&keys), halved(&values));
        let q = normal(tokens * heads * key_width, &mut random);
        let sinks = normal(heads, &mut random);
        let run = |backend: &dyn Backend| {
            let mut out = vec![5.0; tokens * heads * value_width];
            let view = |floats, half, width| KvView {
                cells: if halves { KvCells::F16(half) } else { KvCells::F32(floats) },
                head_stride: positions * width,
                position_stride: width,
                width,
            };
            backend.attention(AttentionCall {
                q: &q,
                tokens,
                heads,
                kv_heads,
                keys: view(keys.as_slice(), half_keys.as_slice(), key_width),
                values: view(values.as_slice(), half_values.as_slice(), value_width),
                first_position,
                scale: 0.3,
                window: (n == 1).then_some(100),
                sinks: (n != 1).then_some(&sinks),
                out: &mut out,
            });
            bits(&out)
        };
        assert!(run(&gpu) == run(&cpu), "{key_width}, {value_width}, {tokens} tokens");
        // Rows of 12 cells are not made of words of 16 bytes.
        assert_eq!(gpu.on_host(), u64::from(n == cases.len()));
    }
    assert_eq!(gpu.failure(), None);
}

#[test]
fn after_an_error_results_are_nan_and_the_driver_rests() {
    let Some((_turn, device)) = device() else { return };
    let Some(standin) = testing::standin() else {
        println!("not run: needs the stand-in driver");
        return;
    };
    let gpu = cuda(device);
    let data = weights(Format::Q8_0, Weights::Usual, 4, 64, &mut Random::new(1));
    let weight = Matrix::new(Format::Q8_0, 4, 64, &data).unwrap();
    let x = normal(64, &mut Random::new(2));
    let mut out = [0.0; 4];
    let mut run = || {
        gpu.linear(&x, 1, &mut [Linear { weight, bias: None, out: &mut out }]);
        out
    };
    assert!(run().iter().all(|value| value.is_finite()));
    standin.fail_call("cuLaunchKernel", 1, Fault::Once, 701);
    assert!(run().iter().all(|value| value.is_nan()));
    let error = gpu.failure().unwrap();
    assert!(error.to_string().contains("701"), "{error}");
    let calls = gpu.device().driver_calls();
    assert!(run().iter().all(|value| value.is_nan()));
    assert_eq!((gpu.device().driver_calls(), gpu.failure()), (calls, Some(error)));
}
