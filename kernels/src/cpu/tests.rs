//! Every instruction set of this machine against the contract, in bits.

use super::{Cpu, CpuOptions, Isa};
use crate::backend::{
    AttentionCall, Backend, Choice, ExpertWeights, GatedActivation, KvCells, KvView, Linear, Routes,
};
use crate::contract;
use crate::dequant::dequantize_row;
use crate::format::{ActivationKind, Format};
use crate::matrix::{Matrix, Storage};
use crate::testing::{self, Inputs, Random, Weights, experts_in_parts};
use half::f16;

#[track_caller]
pub(super) fn assert_same_bits(got: &[f32], want: &[f32], what: &dyn Fn() -> String) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let is_same = g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
        assert!(is_same, "{}: element {i} is {g:e}, want {w:e}", what());
    }
}

fn backends() -> Vec<Cpu> {
    let mut all = Vec::new();
    for isa in Isa::available() {
        for threads in [1, 3] {
            all.push(Cpu::new(CpuOptions { threads: Some(threads), isa: Some(isa) }).unwrap());
        }
    }
    all
}

/// Rows of every kind of activation.
fn inputs(tokens: usize, cols: usize, rng: &mut Random) -> Vec<f32> {
    (0..tokens).flat_map(|t| testing::inputs(Inputs::ALL[t % 9], cols, rng)).collect()
}

fn normal(count: usize, rng: &mut Random) -> Vec<f32> {
    testing::inputs(Inputs::Normal, count, rng)
}

fn contract_linear(matrix: &Matrix<'_>, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let mut scratch = Vec::new();
    let mut out = Vec::new();
    for x in x.chunks_exact(matrix.cols()) {
        for r in 0..matrix.rows() {
            let y = contract::dot(matrix.format(), matrix.row(r, &mut scratch), x);
            out.push(bias.map_or(y, |bias| y + bias[r]));
        }
    }
    out
}

fn run_linear(cpu: &Cpu, matrix: Matrix<'_>, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let tokens = x.len() / matrix.cols();
    let mut out = vec![7.0; tokens * matrix.rows()];
    cpu.linear(x, tokens, &mut [Linear { weight: matrix, bias, out: &mut out }]);
    out
}

#[test]
fn linear_has_the_bits_of_the_contract_for_every_format() {
    let backends = backends();
    let mut rng = Random::new(1);
    for format in Format::ALL {
        let block = format.block_len();
        // Whole and partial rounds of lanes, one block, odd counts.
        let widths: &[usize] = match format.activation() {
            ActivationKind::F32 => &[1, 3, 63, 64, 65, 96, 200, 257, 320],
            ActivationKind::Int8Per32 => &[1, 2, 3, 5, 7, 8, 9, 12, 16, 21, 24],
            ActivationKind::Int8Per256 => &[1, 2, 3, 4, 7, 8, 9, 11, 16],
        };
        for (n, blocks) in widths.iter().enumerate() {
            let cols = blocks * block;
            for (k, bytes) in Weights::ALL.into_iter().enumerate() {
                let rows = [1, 5, 16, 17, 33, 35][(n + k) % 6];
                let tokens = [1, 2, 9, 13, 19, 33][(n + 2 * k) % 6];
                let data = testing::weights(format, bytes, rows, cols, &mut rng);
                let matrix = Matrix::new(format, rows, cols, &data).unwrap();
                let x = inputs(tokens, cols, &mut rng);
                let bias = normal(rows, &mut rng);
                let bias = if k == 0 { Some(bias.as_slice()) } else { None };
                let want = contract_linear(&matrix, &x, bias);
                for cpu in &backends {
                    let got = run_linear(cpu, matrix, &x, bias);
                    let what = || {
                        format!(
                            "{}, {format} {bytes:?} [{rows}, {cols}], {tokens} tokens",
                            cpu.describe()
                        )
                    };
                    assert_same_bits(&got, &want, &what);
                }
            }
        }
    }
}

#[test]
fn extreme_integers_do_not_wrap() {
    // The largest block sums of each format, both signs.
    let backends = backends();
    for format in Format::ALL.into_iter().filter(|f| f.block_len() > 1) {
        let cols = 8 * format.block_len();
        let factors: &[usize] = match format {
            Format::Mxfp4 => &[],
            Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
            Format::Q2K => &[80, 82],
            Format::Q3K => &[108],
            Format::Q6K => &[208],
            _ => &[0],
        };
        for fill in [0x00, 0x7f, 0x80, 0xff, 0x88, 0x77, 0xf0, 0x0f] {
            let mut data = vec![fill; format.row_bytes(cols).unwrap()];
            for block in data.chunks_exact_mut(format.block_bytes()) {
                // d and, where they are, m or dmin.
                for at in factors {
                    block[*at..at + 2].copy_from_slice(&f16::from_f32(1.5).to_le_bytes());
                }
            }
            let matrix = Matrix::new(format, 1, cols, &data).unwrap();
            for sign in [1.0f32, -1.0] {
                // One token and a batch.
                let x = vec![sign; cols * 16];
                let want = contract_linear(&matrix, &x, None);
                for cpu in &backends {
                    for tokens in [1, 16] {
                        let got = run_linear(cpu, matrix, &x[..tokens * cols], None);
                        let what = || format!("{}, {format} {fill:#x}", cpu.describe());
                        assert_same_bits(&got, &want[..tokens], &what);
                    }
                }
            }
        }
    }
}

#[test]
fn jobs_of_different_formats_share_an_input() {
    let mut rng = Random::new(2);
    let formats =
        [Format::Q4K, Format::Q6K, Format::Q8_0, Format::F32, Format::Iq4Xs, Format::Q4_0];
    let data: Vec<Vec<u8>> =
        formats.iter().map(|f| testing::weights(*f, Weights::Usual, 21, 512, &mut rng)).collect();
    let matrices: Vec<Matrix<'_>> =
        formats.iter().zip(&data).map(|(f, d)| Matrix::new(*f, 21, 512, d).unwrap()).collect();
    for cpu in backends() {
        for tokens in [1, 20] {
            let x = inputs(tokens, 512, &mut rng);
            let mut outs = vec![vec![0.0; tokens * 21]; formats.len()];
            let mut jobs: Vec<Linear<'_>> = matrices
                .iter()
                .zip(&mut outs)
                .map(|(weight, out)| Linear { weight: *weight, bias: None, out })
                .collect();
            cpu.linear(&x, tokens, &mut jobs);
            for (matrix, out) in matrices.iter().zip(&outs) {
                let what = || format!("{}, {}", cpu.describe(), matrix.format());
                assert_same_bits(out, &contract_linear(matrix, &x, None), &what);
            }
        }
    }
}

#[test]
fn matrices_that_are_not_stored_by_rows() {
    let mut rng = Random::new(3);
    let (rows, cols) = (70, 96);
    let blocks: Vec<u8> = (0..2 * rows * cols / 2).map(|_| rng.bits() as u8).collect();
    let scales: Vec<u8> = (0..2 * rows * cols / 32).map(|_| 120 + rng.below(10) as u8).collect();
    let pairs = Storage::Mxfp4Pairs { blocks: &blocks, scales: &scales, step: 2 };
    let pairs = Matrix::with_storage(Format::Mxfp4, rows, cols, pairs).unwrap();
    let bytes = testing::weights(Format::Bf16, Weights::Usual, rows, cols, &mut rng);
    let columns = Storage::Columns { bytes: &bytes, pitch: rows, step: 1 };
    let columns = Matrix::with_storage(Format::Bf16, rows, cols, columns).unwrap();
    for cpu in backends() {
        for matrix in [pairs, columns] {
            for tokens in [1, 17] {
                let x = inputs(tokens, cols, &mut rng);
                let bias = normal(rows, &mut rng);
                let want = contract_linear(&matrix, &x, Some(&bias));
                let what = || format!("{}, {}", cpu.describe(), matrix.format());
                assert_same_bits(&run_linear(&cpu, matrix, &x, Some(&bias)), &want, &what);
            }
        }
    }
}

#[test]
fn transposed_products_follow_row_order() {
    let mut rng = Random::new(4);
    for format in [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4K] {
        let (rows, cols) = (37, 512);
        let data = testing::weights(format, Weights::Usual, rows, cols, &mut rng);
        let matrix = Matrix::new(format, rows, cols, &data).unwrap();
        let x = normal(3 * rows, &mut rng);
        let mut want = vec![0.0f32; 3 * cols];
        let mut row = vec![0.0; cols];
        for r in 0..rows {
            dequantize_row(format, matrix.row(r, &mut Vec::new()), &mut row);
            for t in 0..3 {
                for (c, w) in row.iter().enumerate() {
                    want[t * cols + c] = x[t * rows + r].mul_add(*w, want[t * cols + c]);
                }
            }
        }
        for cpu in backends() {
            let mut got = vec![1.0; 3 * cols];
            cpu.linear_transposed(&x, 3, matrix, &mut got);
            assert_same_bits(&got, &want, &|| format!("{}, {format}", cpu.describe()));
        }
    }
}

/// Matrices of a layer's experts.
struct Layer {
    formats: [Format; 3],
    hidden: usize,
    inner: usize,
    data: Vec<[Vec<u8>; 3]>,
    biases: Option<Vec<[Vec<f32>; 3]>>,
}

impl Layer {
    fn new(
        formats: [Format; 3],
        hidden: usize,
        inner: usize,
        biased: bool,
        rng: &mut Random,
    ) -> Self {
        let shapes = [(inner, hidden), (inner, hidden), (hidden, inner)];
        let mut one =
            |i: usize| testing::weights(formats[i], Weights::Usual, shapes[i].0, shapes[i].1, rng);
        let data = (0..6).map(|_| [one(0), one(1), one(2)]).collect();
        let biases =
            biased.then(|| (0..6).map(|_| shapes.map(|(rows, _)| normal(rows, rng))).collect());
        Self { formats, hidden, inner, data, biases }
    }

    fn expert(&self, e: u32) -> ExpertWeights<'_> {
        let data = &self.data[e as usize];
        let matrix =
            |i: usize, rows, cols| Matrix::new(self.formats[i], rows, cols, &data[i]).unwrap();
        let bias = |i: usize| self.biases.as_ref().map(|biases| biases[e as usize][i].as_slice());
        ExpertWeights {
            gate: matrix(0, self.inner, self.hidden),
            up: matrix(1, self.inner, self.hidden),
            down: matrix(2, self.hidden, self.inner),
            gate_bias: bias(0),
            up_bias: bias(1),
            down_bias: bias(2),
        }
    }
}

#[test]
fn experts_have_the_bits_of_the_contract() {
    let mut rng = Random::new(5);
    let silu = GatedActivation::Silu;
    let clamped = GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
    let cases = [
        ([Format::Q4K, Format::Q4K, Format::Q6K], 512, 768, false, silu),
        ([Format::Q8_0, Format::Q4_0, Format::Q5_1], 96, 160, false, silu),
        ([Format::Mxfp4; 3], 96, 64, true, clamped),
        ([Format::F32, Format::F32, Format::Bf16], 70, 33, true, silu),
        ([Format::Q6K, Format::Q6K, Format::Q4K], 256, 256, false, clamped),
    ];
    let backends = backends();
    for (formats, hidden, inner, biased, activation) in cases {
        let layer = Layer::new(formats, hidden, inner, biased, &mut rng);
        for tokens in [1, 2, 7, 40] {
            let x = normal(tokens * hidden, &mut rng);
            let mut routes = Routes::new();
            for t in 0..tokens {
                // Lists of any length, also empty; popular and rare experts.
                let choices: Vec<Choice> = (0..t % 4)
                    .map(|n| Choice { expert: [0, 3, 1 + (t % 5) as u32][n], weight: rng.unit() })
                    .collect();
                routes.push(&choices);
            }
            if tokens == 1 {
                routes.clear();
                routes
                    .push(&[Choice { expert: 5, weight: 0.3 }, Choice { expert: 2, weight: 0.7 }]);
            }
            let mut want = vec![0.0; tokens * hidden];
            for (t, want) in want.chunks_exact_mut(hidden).enumerate() {
                let x = &x[t * hidden..(t + 1) * hidden];
                let parts: Vec<(f32, Vec<f32>)> = routes
                    .of(t)
                    .iter()
                    .map(|c| (c.weight, contract::expert(x, layer.expert(c.expert), activation)))
                    .collect();
                contract::combine(&parts, want);
            }
            for cpu in &backends {
                let weights = |e: u32| layer.expert(e);
                let what = || format!("{}, {formats:?}, {tokens} tokens", cpu.describe());
                for parts in [1, 2, 3] {
                    let got = experts_in_parts(cpu, &x, &routes, &weights, activation, parts);
                    assert_same_bits(&got, &want, &what);
                }
                let mut dense = vec![9.0; tokens * hidden];
                cpu.feed_forward(&x, tokens, layer.expert(4), activation, &mut dense);
                for (x, got) in x.chunks_exact(hidden).zip(dense.chunks_exact(hidden)) {
                    let want = contract::expert(x, layer.expert(4), activation);
                    assert_same_bits(got, &want, &what);
                }
            }
        }
    }
}

#[test]
fn quantise_and_activations_have_the_bits_of_the_contract() {
    let mut rng = Random::new(6);
    for isa in Isa::available() {
        let kernels = isa.kernels();
        let mut gate: Vec<f32> = (0..1003).map(|i| (i as f32 - 500.0) * 0.3).collect();
        gate.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-40, 7.0, -7.0]);
        let mut up = normal(gate.len(), &mut rng);
        up[3] = f32::NAN;
        up[4] = 1e9;
        for activation in
            [GatedActivation::Silu, GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 }]
        {
            let want: Vec<f32> =
                gate.iter().zip(&up).map(|(g, u)| contract::gated(activation, *g, *u)).collect();
            let mut got = gate.clone();
            kernels.gate(activation, &mut got, &up);
            assert_same_bits(&got, &want, &|| format!("{isa:?} {activation:?}"));
        }
        let mut out = normal(up.len(), &mut rng);
        let want: Vec<f32> = out.iter().zip(&up).map(|(o, y)| 0.37f32.mul_add(*y, *o)).collect();
        kernels.axpy(0.37, &up, &mut out);
        assert_same_bits(&out, &want, &|| format!("{isa:?} axpy"));
    }
}

/// `1 + exp` hides both ends of the range; the softmax does not.
#[test]
fn exp_ends_where_the_contract_says() {
    let mut scores = vec![0.0];
    scores.extend((0..64).map(|i| -85.0 - i as f32 / 16.0));
    scores.extend([f32::NEG_INFINITY, f32::NAN]);
    let want: Vec<f32> = scores.iter().map(|s| contract::exp(*s)).collect();
    for isa in Isa::available() {
        let mut got = scores.clone();
        let (max, _) = isa.kernels().softmax_chunk(&mut got, 3);
        assert_eq!(max, 0.0);
        assert_same_bits(&got, &want, &|| format!("{isa:?}"));
    }
}

/// The contract's attention, one query and head at a time.
fn contract_attention(call: &AttentionCall<'_>) -> Vec<f32> {
    let cell = |view: &KvView<'_>, head: usize, p: usize, i: usize| {
        let at = head * view.head_stride + p * view.position_stride + i;
        match view.cells {
            KvCells::F16(cells) => cells[at].to_f32(),
            KvCells::F32(cells) => cells[at],
        }
    };
    let mut out = Vec::new();
    for t in 0..call.tokens {
        for head in 0..call.heads {
            let kv = head / (call.heads / call.kv_heads);
            let at = (t * call.heads + head) * call.keys.width;
            let q = &call.q[at..at + call.keys.width];
            let position = call.first_position + t;
            let start = call.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let mut acc = vec![0.0f32; call.values.width];
            let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
            for chunk in start / 256..=position / 256 {
                let range = start.max(chunk * 256)..(position + 1).min(chunk * 256 + 256);
                let scores: Vec<f32> = range
                    .clone()
                    .map(|p| {
                        let mut lanes = [0.0f32; 16];
                        for (i, q) in q.iter().enumerate() {
                            let k = cell(&call.keys, kv, p, i);
                            lanes[i % 16] = q.mul_add(k, lanes[i % 16]);
                        }
                        contract::tree(lanes) * call.scale
                    })
                    .collect();
                let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut lanes = [0.0f32; 16];
                let mut part = vec![0.0f32; call.values.width];
                for (p, s) in range.zip(&scores) {
                    let weight = contract::exp(s - top);
                    lanes[p % 16] += weight;
                    for (d, part) in part.iter_mut().enumerate() {
                        *part = weight.mul_add(cell(&call.values, kv, p, d), *part);
                    }
                }
                let joint = max.max(top);
                let (a, b) = (contract::exp(max - joint), contract::exp(top - joint));
                sum = sum.mul_add(a, contract::tree(lanes) * b);
                for (acc, part) in acc.iter_mut().zip(&part) {
                    *acc = acc.mul_add(a, part * b);
                }
                max = joint;
            }
            if let Some(sinks) = call.sinks {
                let joint = max.max(sinks[head]);
                let (a, b) = (contract::exp(max - joint), contract::exp(sinks[head] - joint));
                sum = sum.mul_add(a, b);
                acc.iter_mut().for_each(|acc| *acc = acc.mul_add(a, 0.0));
            }
            out.extend(acc.iter().map(|acc| acc / sum));
        }
    }
    out
}

#[test]
fn attention_has_the_bits_of_the_contract() {
    let mut rng = Random::new(7);
    let backends = backends();
    // heads, kv heads, key width, value width, first position, tokens, window, sinks
    let cases = [
        (4, 2, 64, 64, 0, 1, None, false),
        (4, 2, 64, 64, 0, 21, None, false),
        (4, 4, 40, 24, 300, 5, None, true),
        (8, 2, 64, 64, 700, 1, None, true),
        (6, 2, 32, 32, 250, 30, Some(20), true),
        (3, 1, 33, 17, 1000, 1, Some(500), false),
        (20, 1, 96, 64, 530, 1, None, false),
        (20, 1, 96, 64, 510, 4, None, false),
    ];
    for (heads, kv_heads, key, value, first, tokens, window, has_sinks) in cases {
        let positions = first + tokens;
        let q: Vec<f32> = normal(tokens * heads * key, &mut rng).iter().map(|q| q * 4.0).collect();
        let wide: Vec<f32> = normal(kv_heads * positions * (key + 3), &mut rng);
        let narrow: Vec<f16> = wide.iter().map(|x| f16::from_f32(*x)).collect();
        let sinks = normal(heads, &mut rng);
        let latent = kv_heads == 1;
        for cells in [KvCells::F32(&wide), KvCells::F16(&narrow)] {
            let view = |width: usize, by_position: bool| KvView {
                cells,
                // Both orders of heads and positions.
                head_stride: if by_position { key + 3 } else { positions * (key + 3) },
                position_stride: if by_position { kv_heads * (key + 3) } else { key + 3 },
                width,
            };
            let call = || AttentionCall {
                q: &q,
                tokens,
                heads,
                kv_heads,
                keys: view(key, true),
                // Latent attention reads values from the same rows.
                values: view(value, latent),
                first_position: first,
                scale: 0.125,
                window,
                sinks: has_sinks.then_some(&sinks),
                out: &mut [],
            };
            let want = contract_attention(&call());
            for cpu in &backends {
                let mut got = vec![5.0; tokens * heads * value];
                cpu.attention(AttentionCall { out: &mut got, ..call() });
                let what = || format!("{}, heads {heads}, first {first}", cpu.describe());
                assert_same_bits(&got, &want, &what);
                // The same tokens one by one.
                let (q_each, out_each) = (heads * key, heads * value);
                for t in 0..tokens {
                    let mut one = vec![5.0; out_each];
                    cpu.attention(AttentionCall {
                        q: &q[t * q_each..(t + 1) * q_each],
                        tokens: 1,
                        first_position: first + t,
                        out: &mut one,
                        ..call()
                    });
                    assert_same_bits(&one, &want[t * out_each..(t + 1) * out_each], &what);
                }
            }
        }
    }
}
