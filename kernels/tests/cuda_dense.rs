//! The kernels of `dense.cu` have the bits of `contract`, `ops` and the CPU
//! backend, for all formats, awkward sizes and values that are not finite.

mod lab;

use lab::{Lab, assert_same_bits, awkward_cols};
use pregate_kernels::cuda::{
    CudaError, Embed, Gemv, Input, Norm, NormKind, Quantise, Strides, add_scaled, embed, gemv,
    norm, quantise, transposed,
};
use pregate_kernels::testing::{Inputs, Random, Weights, inputs, weights};
use pregate_kernels::{
    Backend, Cpu, CpuOptions, Format, Isa, Matrix, contract, dequantize_row, ops,
};

fn scalar() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(1), isa: Some(Isa::Scalar) }).unwrap()
}

/// One of all kinds, the usual one as often as all others together.
fn kinds(random: &mut Random) -> (Weights, Inputs) {
    match random.below(2) {
        0 => (Weights::Usual, Inputs::Normal),
        _ => (random.pick(&Weights::ALL), random.pick(&Inputs::ALL)),
    }
}

/// `[tokens, rows]` by the contract.
fn product(format: Format, bytes: &[u8], rows: usize, x: &[f32], cols: usize) -> Vec<f32> {
    let row_bytes = format.row_bytes(cols).unwrap();
    x.chunks_exact(cols)
        .flat_map(|x| {
            let rows = bytes[..rows * row_bytes].chunks_exact(row_bytes);
            rows.map(move |row| contract::dot(format, row, x))
        })
        .collect()
}

#[test]
fn gemv_has_the_bits_of_the_contract() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(41);
    for format in Format::ALL {
        for (i, cols) in awkward_cols(format).into_iter().enumerate() {
            // One row; fewer than a warp has; several blocks of threads.
            let rows = random.pick(&[1, 3, 11, 33, 70]);
            let tokens = [1, 1, 2, 1, 3, 1, 8, 5, 1, 2][i];
            let (kind, input) = kinds(&mut random);
            let bytes = weights(format, kind, rows, cols, &mut random);
            let x = inputs(input, tokens * cols, &mut random);
            let bias = inputs(Inputs::Normal, rows, &mut random);
            let has_bias = random.below(2) == 0;

            let weight = lab.matrix(format, rows, cols, &bytes);
            let (on_device, out) =
                (lab.activations(format, &x, cols), lab.space(4 * tokens * rows));
            let bias_span = has_bias.then(|| lab.floats(&bias));
            let call = Gemv::one(&weight, tokens, on_device.input(), bias_span.as_ref(), &out);
            gemv(&lab.device, lab.device.compute(), call).unwrap();

            let mut wanted = product(format, &bytes, rows, &x, cols);
            if has_bias {
                for (value, bias) in wanted.iter_mut().zip(bias.iter().cycle()) {
                    *value += bias;
                }
            }
            let what =
                || format!("{format} [{rows}, {cols}], {tokens} tokens, {kind:?}, {input:?}");
            assert_same_bits(&lab.read_floats(&out), &wanted, &what());
        }
    }
}

#[test]
fn every_kind_of_weight_and_input_has_the_bits_of_the_contract() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(5);
    for format in Format::ALL {
        // Ten blocks: lanes with two blocks and with one.
        let (rows, cols) = (4, if format.block_len() == 1 { 130 } else { 10 * format.block_len() });
        for kind in Weights::ALL {
            let bytes = weights(format, kind, rows, cols, &mut random);
            let weight = lab.matrix(format, rows, cols, &bytes);
            for inputs_of in Inputs::ALL.chunks(8) {
                let tokens = inputs_of.len();
                let x: Vec<f32> =
                    inputs_of.iter().flat_map(|input| inputs(*input, cols, &mut random)).collect();
                let (x_on, out) = (lab.activations(format, &x, cols), lab.space(4 * tokens * rows));
                let call = Gemv::one(&weight, tokens, x_on.input(), None, &out);
                gemv(&lab.device, lab.device.compute(), call).unwrap();
                let wanted = product(format, &bytes, rows, &x, cols);
                let what = || format!("{format} {kind:?} times {inputs_of:?}");
                assert_same_bits(&lab.read_floats(&out), &wanted, &what());
            }
        }
    }
}

/// Per-head matrices, inputs and outputs inside of longer rows.
#[test]
fn gemv_of_several_matrices_follows_its_strides() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(6);
    for format in [Format::Q8_0, Format::Q4_0, Format::Q5K, Format::F16] {
        let (matrices, rows, tokens) = (3, 18, 2);
        let cols = 2 * format.block_len().max(32);
        let bytes = weights(format, Weights::Usual, matrices * rows, cols, &mut random);
        let weight = lab.matrix(format, rows, cols, &bytes[..]);
        let x = inputs(Inputs::Outliers, tokens * matrices * cols, &mut random);
        let bias = inputs(Inputs::Normal, matrices * rows, &mut random);
        let bias_span = lab.floats(&bias);
        let pitch = matrices * rows + 5;
        let out = lab.floats(&vec![7.0; tokens * pitch]);
        let on_device = lab.activations(format, &x, matrices * cols);
        let call = Gemv {
            matrices,
            x_strides: Strides { token: matrices * cols, matrix: cols },
            bias: Some(&bias_span),
            out_strides: Strides { token: pitch, matrix: rows },
            ..Gemv::one(&weight, tokens, on_device.input(), None, &out)
        };
        gemv(&lab.device, lab.device.compute(), call).unwrap();
        let mut wanted = vec![7.0; tokens * pitch];
        let each = bytes.len() / matrices;
        for t in 0..tokens {
            for m in 0..matrices {
                let x = &x[(t * matrices + m) * cols..][..cols];
                let values = product(format, &bytes[m * each..], rows, x, cols);
                for (r, value) in values.iter().enumerate() {
                    wanted[t * pitch + m * rows + r] = value + bias[m * rows + r];
                }
            }
        }
        assert_same_bits(&lab.read_floats(&out), &wanted, &format.to_string());
    }
}

/// A product's rows are the same whichever other rows share the launch: long
/// matrices have blocks of threads with eight warps, short ones with one.
#[test]
fn rows_do_not_depend_on_the_grid() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(16);
    for format in [Format::Q4K, Format::Mxfp4, Format::Bf16] {
        let (rows, cols) = (3000, 256);
        let bytes = weights(format, Weights::Usual, rows, cols, &mut random);
        let x = inputs(Inputs::Normal, cols, &mut random);
        let x_on = lab.activations(format, &x, cols);
        let mut answers = Vec::new();
        for rows in [rows, 5] {
            let weight = lab.matrix(format, rows, cols, &bytes);
            let out = lab.space(4 * rows);
            let call = Gemv::one(&weight, 1, x_on.input(), None, &out);
            gemv(&lab.device, lab.device.compute(), call).unwrap();
            answers.push(lab.read_floats(&out));
        }
        assert_same_bits(&answers[1], &answers[0][..5], &format.to_string());
        let wanted = product(format, &bytes, rows, &x, cols);
        assert_same_bits(&answers[0], &wanted, &format.to_string());
    }
}

/// Threads and blocks of a launch run in any order.
#[test]
fn products_do_not_depend_on_the_order_of_threads() {
    let Some(lab) = Lab::open() else { return };
    let Some(standin) = pregate_standin::testing::standin() else { return };
    let mut random = Random::new(17);
    for format in Format::ALL {
        // Several steps of several warps, and a last step that is not full.
        let (rows, blocks) = (40, if format.block_len() == 256 { 19 } else { 75 });
        let cols = blocks * if format.block_len() == 1 { 17 } else { format.block_len() };
        let bytes = weights(format, Weights::Usual, rows, cols, &mut random);
        let weight = lab.matrix(format, rows, cols, &bytes);
        let x = inputs(Inputs::Normal, cols, &mut random);
        let wanted = product(format, &bytes, rows, &x, cols);
        for seed in 1..=3 {
            standin.set_order(seed);
            let (x_on, out) = (lab.activations(format, &x, cols), lab.space(4 * rows));
            let call = Gemv::one(&weight, 1, x_on.input(), None, &out);
            gemv(&lab.device, lab.device.compute(), call).unwrap();
            let what = || format!("{format} in order {seed}");
            assert_same_bits(&lab.read_floats(&out), &wanted, &what());
        }
    }
}

#[test]
fn quantisation_has_the_bits_of_the_contract() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(7);
    for group in [32, 256] {
        for input in Inputs::ALL {
            let (rows, cols) = (2, if group == 32 { 32 * 21 } else { 256 * 5 });
            let stride = cols + 8;
            let x = inputs(input, rows * stride, &mut random);
            let (from, to) = (lab.floats(&x), lab.quantised_space(group, rows, cols));
            let call = Quantise { rows, cols, x: &from, stride, to: &to };
            quantise(&lab.device, lab.device.compute(), call).unwrap();
            let dense: Vec<f32> =
                x.chunks_exact(stride).flat_map(|x| &x[..cols]).copied().collect();
            check_quantised(&lab, &to, &dense, group, &|| {
                format!("{input:?} in groups of {group}")
            });
        }
    }
}

fn check_quantised(
    lab: &Lab,
    found: &pregate_kernels::cuda::QuantisedSpans,
    x: &[f32],
    group: usize,
    what: &dyn Fn() -> String,
) {
    let mut q = vec![0i8; x.len()];
    let mut scales = vec![0.0; x.len() / group];
    contract::quantise(x, group, &mut q, &mut scales);
    let codes: Vec<i8> = lab.read(&found.q).iter().map(|byte| *byte as i8).collect();
    assert!(codes == q, "codes of {}", what());
    assert_same_bits(&lab.read_floats(&found.scales), &scales, &what());
    let sums: Vec<i16> =
        q.chunks_exact(16).map(|q| q.iter().map(|q| i16::from(*q)).sum()).collect();
    assert_eq!(lab.read_shorts(&found.sums), sums, "sums of {}", what());
}

#[test]
fn norms_have_the_bits_of_ops() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(8);
    for width in [1, 31, 64, 100, 128, 768, 2048, 2880] {
        for input in [Inputs::Normal, Inputs::Outliers, Inputs::NotFinite, Inputs::Tiny] {
            for is_layer in [false, true] {
                let (rows, stride) = (2, width + 3);
                let mut x = inputs(input, rows * stride, &mut random);
                let delta = inputs(Inputs::Normal, rows * width, &mut random);
                let weight = inputs(Inputs::Normal, width, &mut random);
                let bias = inputs(Inputs::Normal, width, &mut random);
                let x_span = lab.floats(&x);
                let (weight_span, bias_span) = (lab.floats(&weight), lab.floats(&bias));
                let delta_span = lab.floats(&delta);
                let out = lab.space(4 * rows * width);
                let has_delta = random.below(2) == 0;
                let forms: Vec<_> = [32, 256]
                    .into_iter()
                    .filter(|group| width % group == 0)
                    .map(|group| lab.quantised_space(group, rows, width))
                    .collect();
                let call = Norm {
                    kind: match is_layer {
                        false => NormKind::Rms,
                        true => NormKind::Layer { bias: Some(&bias_span) },
                    },
                    rows,
                    width,
                    x: &x_span,
                    x_stride: stride,
                    delta: has_delta.then_some((&delta_span, 0.75)),
                    weight: &weight_span,
                    epsilon: 1e-5,
                    out: Some((&out, width)),
                    quantised: &forms.iter().collect::<Vec<_>>(),
                };
                norm(&lab.device, lab.device.compute(), call).unwrap();

                let mut wanted = vec![0.0; rows * width];
                for r in 0..rows {
                    let x = &mut x[r * stride..][..width];
                    if has_delta {
                        for (x, delta) in x.iter_mut().zip(&delta[r * width..]) {
                            *x += 0.75 * delta;
                        }
                    }
                    let out = &mut wanted[r * width..][..width];
                    match is_layer {
                        false => ops::rms_norm(x, &weight, 1e-5, out),
                        true => ops::layer_norm(x, &weight, Some(&bias), 1e-5, out),
                    }
                }
                let what = || format!("{width} {input:?}, layer {is_layer}, delta {has_delta}");
                assert_same_bits(&lab.read_floats(&x_span), &x, &what());
                assert_same_bits(&lab.read_floats(&out), &wanted, &what());
                for form in &forms {
                    check_quantised(&lab, form, &wanted, form.group, &what);
                }
            }
        }
    }
}

#[test]
fn a_norm_may_be_in_place() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(9);
    let (rows, width, stride) = (3, 512, 576);
    let mut x = inputs(Inputs::Normal, rows * stride, &mut random);
    let weight = inputs(Inputs::Normal, width, &mut random);
    let (x_span, weight_span) = (lab.floats(&x), lab.floats(&weight));
    let call = Norm {
        kind: NormKind::Rms,
        rows,
        width,
        x: &x_span,
        x_stride: stride,
        delta: None,
        weight: &weight_span,
        epsilon: 1e-6,
        out: Some((&x_span, stride)),
        quantised: &[],
    };
    norm(&lab.device, lab.device.compute(), call).unwrap();
    for row in x.chunks_exact_mut(stride) {
        ops::rms_norm_in_place(&mut row[..width], &weight, 1e-6);
    }
    assert_same_bits(&lab.read_floats(&x_span), &x, &"latent rows".to_string());
}

#[test]
fn transposed_products_have_the_bits_of_the_cpu() {
    let Some(lab) = Lab::open() else { return };
    let (cpu, mut random) = (scalar(), Random::new(10));
    for format in Format::ALL {
        for (rows, blocks) in [(1, 1), (63, 3), (64, 2), (130, 5)] {
            let (matrices, tokens) = (2, random.pick(&[1, 2, 8]));
            let cols = blocks * if format.block_len() == 1 { 37 } else { format.block_len() };
            let kind = random.pick(&Weights::ALL);
            let bytes = weights(format, kind, matrices * rows, cols, &mut random);
            let weight = lab.matrix(format, rows, cols, &bytes);
            let pitch = rows + 4;
            let x = inputs(Inputs::Outliers, tokens * matrices * pitch, &mut random);
            let (x_span, out) = (lab.floats(&x), lab.space(4 * tokens * matrices * cols));
            let call = Gemv {
                matrices,
                x_strides: Strides { token: matrices * pitch, matrix: pitch },
                out_strides: Strides { token: matrices * cols, matrix: cols },
                ..Gemv::one(&weight, tokens, Input::Floats(&x_span), None, &out)
            };
            transposed(&lab.device, lab.device.compute(), call).unwrap();
            let found = lab.read_floats(&out);
            for m in 0..matrices {
                let matrix = &bytes[m * bytes.len() / matrices..];
                let matrix = Matrix::new(format, rows, cols, matrix).unwrap();
                for t in 0..tokens {
                    let x = &x[(t * matrices + m) * pitch..][..rows];
                    let mut wanted = vec![0.0; cols];
                    cpu.linear_transposed(x, 1, matrix, &mut wanted);
                    let found = &found[(t * matrices + m) * cols..][..cols];
                    let what =
                        || format!("{format} [{rows}, {cols}] {kind:?}, token {t} of {tokens}");
                    assert_same_bits(found, &wanted, &what());
                }
            }
        }
    }
}

#[test]
fn embedding_rows_are_dequantised_exactly() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(11);
    for format in Format::ALL {
        for kind in [Weights::Usual, Weights::RandomBits, Weights::Subnormal, Weights::Largest] {
            let (rows, cols) =
                (5, if format.block_len() == 1 { 99 } else { 3 * format.block_len() });
            let bytes = weights(format, kind, rows, cols, &mut random);
            let table = lab.matrix(format, rows, cols, &bytes);
            let ids = [3, 0, 4, -1, 5, 3];
            let (ids_span, out) = (lab.ints(&ids), lab.space(4 * ids.len() * cols));
            let (tokens, scale) = (ids.len(), 1.5);
            let call = Embed { table: &table, ids: &ids_span, tokens, scale, out: &out };
            embed(&lab.device, lab.device.compute(), call).unwrap();
            let mut wanted = vec![f32::NAN; tokens * cols];
            for (id, out) in ids.iter().zip(wanted.chunks_exact_mut(cols)) {
                let row = bytes.chunks_exact(bytes.len() / rows).nth(*id as usize);
                if let Some(row) = row {
                    dequantize_row(format, row, out);
                    out.iter_mut().for_each(|value| *value *= scale);
                }
            }
            assert_same_bits(&lab.read_floats(&out), &wanted, &format!("{format} {kind:?}"));
        }
    }
}

#[test]
fn adding_rounds_product_and_sum() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(12);
    for count in [1, 7, 2048, 5000] {
        let mut x = inputs(Inputs::Outliers, count, &mut random);
        let delta = inputs(Inputs::Normal, count, &mut random);
        let (x_span, delta_span) = (lab.floats(&x), lab.floats(&delta));
        let (device, stream) = (&lab.device, lab.device.compute());
        add_scaled(device, stream, &x_span, &delta_span, 0.3, count).unwrap();
        for (x, delta) in x.iter_mut().zip(&delta) {
            *x += 0.3 * delta;
        }
        assert_same_bits(&lab.read_floats(&x_span), &x, &format!("{count} elements"));
    }
}

#[test]
fn sizes_that_do_not_fit_are_errors() {
    let Some(lab) = Lab::open() else { return };
    let (device, stream) = (&lab.device, lab.device.compute());
    let (rows, cols) = (4, 256);
    let bytes = weights(Format::Q4K, Weights::Usual, rows, cols, &mut Random::new(1));
    let weight = lab.matrix(Format::Q4K, rows, cols, &bytes);
    let x = lab.quantised_space(256, 8, cols);
    let out = lab.space(4 * 8 * rows);
    let call = |tokens| Gemv::one(&weight, tokens, Input::Quantised(&x), None, &out);
    let refused = |result: Result<(), CudaError>, what: &str| {
        assert!(matches!(result, Err(CudaError::Shape { .. })), "{what}: {result:?}");
    };
    stream.fill(&x.q, 1).unwrap();
    stream.fill(&x.scales, 0).unwrap();
    stream.fill(&x.sums, 0).unwrap();
    gemv(device, stream, call(8)).unwrap();
    refused(gemv(device, stream, call(0)), "no tokens");
    refused(gemv(device, stream, call(9)), "nine tokens");
    refused(gemv(device, stream, Gemv { matrices: 2, ..call(1) }), "two matrices in one's span");
    let short = lab.space(4 * rows - 1);
    refused(gemv(device, stream, Gemv { out: &short, ..call(1) }), "short output");
    refused(gemv(device, stream, Gemv { bias: Some(&short), ..call(1) }), "short bias");
    let strides = Strides { token: 16, matrix: 0 };
    refused(gemv(device, stream, Gemv { x_strides: strides, ..call(2) }), "overlapping groups");
    let floats = Input::Floats(&out);
    refused(gemv(device, stream, Gemv { x: floats, ..call(1) }), "floats for Q4_K");
    let by_32 = lab.quantised_space(32, 1, cols);
    let by_32 = Input::Quantised(&by_32);
    refused(gemv(device, stream, Gemv { x: by_32, ..call(1) }), "groups of 32 for Q4_K");
    refused(transposed(device, stream, call(1)), "codes for a transposed product");
    let mut moved = weight.clone();
    (moved.rows, moved.offset) = (rows - 1, 8);
    let call = Gemv { weight: &moved, ..call(1) };
    refused(gemv(device, stream, call), "a matrix at a multiple of 8");
}
