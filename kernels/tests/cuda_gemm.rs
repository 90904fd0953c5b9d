//! Products of many tokens on the device against the numerical contract, in
//! bits.

mod cuda_support;

use cuda_support::{Upload, assert_bits, download_f32, upload_f32};
use pregate_kernels::block::Block;
use pregate_kernels::cuda::gemm::{
    ExpertMatrix, Gemm, GemmInput, GroupGemm, Groups, gemm, group_gemm, group_tiles,
};
use pregate_kernels::cuda::{Device, DeviceMatrix, Span, testing};
use pregate_kernels::testing::{Inputs, Random, Weights, inputs, weights};
use pregate_kernels::{ActivationKind, ExpertWeights, Format, GatedActivation, Matrix, contract};

/// What a product of these rows and tokens must be: `[tokens, rows]`.
fn expected(format: Format, bytes: &[u8], cols: usize, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let row_bytes = format.row_bytes(cols).unwrap();
    let rows = bytes.len() / row_bytes;
    let tokens = x.len() / cols;
    let (q, scales) = quantised(format, x);
    let group = format.block_len();
    let mut out = vec![0.0; tokens * rows];
    for (r, row) in bytes.chunks_exact(row_bytes).enumerate() {
        let blocks: Vec<Block> = match format.activation() {
            ActivationKind::F32 => Vec::new(),
            _ => row.chunks_exact(format.block_bytes()).map(|b| Block::unpack(format, b)).collect(),
        };
        for t in 0..tokens {
            let sum = if blocks.is_empty() {
                contract::dot_float(format, row, &x[t * cols..(t + 1) * cols])
            } else {
                let mut lanes = [0.0f32; contract::BLOCK_LANES];
                for (b, block) in blocks.iter().enumerate() {
                    let at = t * blocks.len() + b;
                    let lane = &mut lanes[b % contract::BLOCK_LANES];
                    let q = &q[at * group..(at + 1) * group];
                    *lane = contract::accumulate(block, q, scales[at], *lane);
                }
                contract::tree(lanes)
            };
            out[t * rows + r] = bias.map_or(sum, |bias| sum + bias[r]);
        }
    }
    out
}

fn quantised(format: Format, x: &[f32]) -> (Vec<i8>, Vec<f32>) {
    let group = format.block_len();
    if format.activation() == ActivationKind::F32 {
        return (Vec::new(), Vec::new());
    }
    let (mut q, mut scales) = (vec![0; x.len()], vec![0.0; x.len() / group]);
    contract::quantise(x, group, &mut q, &mut scales);
    (q, scales)
}

/// An input on the device, quantised as the format wants it.
struct Input {
    q: Span,
    scales: Span,
    sums: Span,
    format: Format,
}

impl Input {
    fn new(upload: &Upload, format: Format, x: &[f32]) -> Self {
        if format.activation() == ActivationKind::F32 {
            let q = upload_f32(upload, x);
            return Self { scales: q.clone(), sums: q.clone(), q, format };
        }
        let (q, scales) = quantised(format, x);
        let sums: Vec<u8> = q
            .chunks_exact(16)
            .map(|q| q.iter().map(|q| i16::from(*q)).sum::<i16>())
            .flat_map(i16::to_le_bytes)
            .collect();
        let q: Vec<u8> = q.iter().map(|q| *q as u8).collect();
        let (q, sums) = (upload.bytes(&q), upload.bytes(&sums));
        Self { q, scales: upload_f32(upload, &scales), sums, format }
    }

    fn get(&self) -> GemmInput<'_> {
        let Self { q, scales, sums, format } = self;
        match format.activation() {
            ActivationKind::F32 => GemmInput::F32(q),
            _ => GemmInput::Int8 { q, scales, sums },
        }
    }
}

/// One product on the device, compared with the contract's.
fn check(
    device: &Device,
    format: Format,
    kinds: (Weights, Inputs),
    (rows, cols, tokens): (usize, usize, usize),
    with_bias: bool,
) {
    let mut random = Random::new((rows * 1009 + cols * 31 + tokens) as u64);
    let bytes = weights(format, kinds.0, rows, cols, &mut random);
    let x = inputs(kinds.1, tokens * cols, &mut random);
    let bias: Option<Vec<f32>> = with_bias.then(|| inputs(Inputs::Normal, rows, &mut random));
    let want = expected(format, &bytes, cols, &x, bias.as_deref());

    let upload = Upload::new(device, 8 << 20);
    let weight = DeviceMatrix::new(format, rows, cols, upload.bytes(&bytes), 0).unwrap();
    let input = Input::new(&upload, format, &x);
    let bias = bias.map(|bias| upload_f32(&upload, &bias));
    // A row more than is written, to see that nobody writes behind the end.
    let out = upload_f32(&upload, &vec![7.5; tokens * rows + 64]);
    let call =
        Gemm { weight: &weight, bias: bias.as_ref(), input: input.get(), tokens, out: &out };
    gemm(device, device.compute(), &call).unwrap();
    let got = download_f32(device, &out);
    let name = format!("{format} {kinds:?} [{rows}, {cols}] x {tokens}");
    assert_bits(&name, &got[..want.len()], &want);
    assert!(got[want.len()..].iter().all(|v| *v == 7.5), "{name}: wrote behind the answers");
}

fn shapes(format: Format) -> Vec<(usize, usize, usize)> {
    let len = match format.block_len() {
        1 => 1,
        len => len,
    };
    let shapes: &[(usize, usize, usize)] = match len {
        1 => &[(1, 1, 1), (33, 40, 7), (70, 64, 16), (5, 200, 33), (32, 65, 130)],
        // Rows above and below a tile of 128, columns of fewer and of more
        // blocks than there are lanes.
        256 => &[(1, 1, 1), (130, 3, 7), (33, 8, 16), (70, 9, 33), (20, 2, 130), (17, 17, 64)],
        _ => &[(1, 1, 1), (70, 3, 7), (33, 8, 16), (65, 9, 33), (20, 12, 130), (64, 31, 65)],
    };
    shapes.iter().map(|(rows, blocks, tokens)| (*rows, blocks * len, *tokens)).collect()
}

#[test]
fn products_are_the_contracts_in_every_format_and_shape() {
    let Some(device) = testing::device() else { return };
    for format in Format::ALL {
        for (i, shape) in shapes(format).into_iter().enumerate() {
            check(&device, format, (Weights::Usual, Inputs::Outliers), shape, i % 2 == 0);
        }
    }
}

#[test]
fn products_of_adversarial_values_are_the_contracts() {
    let Some(device) = testing::device() else { return };
    for format in Format::ALL {
        let cols = 9 * format.block_len().max(8);
        for kind in Weights::ALL {
            check(&device, format, (kind, Inputs::Extremes), (18, cols, 9), false);
        }
        for kind in [Inputs::NotFinite, Inputs::Huge, Inputs::Tiny, Inputs::Ties] {
            check(&device, format, (Weights::Largest, kind), (18, cols, 9), true);
        }
    }
}

/// A layer of experts in one allocation each, as slots hold them.
struct Layer {
    /// Gate, up and down bytes of each expert.
    experts: Vec<[Vec<u8>; 3]>,
    formats: [Format; 3],
    hidden: usize,
    inner: usize,
    biases: Option<[Vec<f32>; 3]>,
}

impl Layer {
    fn new(formats: [Format; 3], hidden: usize, inner: usize, count: usize, biased: bool) -> Self {
        let mut random = Random::new(hidden as u64 + 17);
        let sizes = [(inner, hidden), (inner, hidden), (hidden, inner)];
        let one = |random: &mut Random| {
            [0, 1, 2].map(|i| weights(formats[i], Weights::Usual, sizes[i].0, sizes[i].1, random))
        };
        let experts = (0..count).map(|_| one(&mut random)).collect();
        let biases = biased
            .then(|| sizes.map(|(rows, _)| inputs(Inputs::Normal, count * rows, &mut random)));
        Self { experts, formats, hidden, inner, biases }
    }

    /// Offsets of the three matrices in a block, and its length.
    fn offsets(&self) -> ([usize; 3], usize) {
        let mut at = 0;
        let offsets = [0, 1, 2].map(|i| {
            let offset = at;
            at = (at + self.experts[0][i].len()).next_multiple_of(16);
            offset
        });
        (offsets, at)
    }

    fn bias(&self, i: usize, expert: usize, rows: usize) -> Option<&[f32]> {
        self.biases.as_ref().map(|biases| &biases[i][expert * rows..(expert + 1) * rows])
    }

    /// The contract's answer of an expert to a token.
    fn answer(&self, expert: usize, x: &[f32], activation: GatedActivation) -> Vec<f32> {
        let matrix = |i: usize, rows, cols| {
            Matrix::new(self.formats[i], rows, cols, &self.experts[expert][i]).unwrap()
        };
        let weights = ExpertWeights {
            gate: matrix(0, self.inner, self.hidden),
            up: matrix(1, self.inner, self.hidden),
            down: matrix(2, self.hidden, self.inner),
            gate_bias: self.bias(0, expert, self.inner),
            up_bias: self.bias(1, expert, self.inner),
            down_bias: self.bias(2, expert, self.hidden),
        };
        contract::expert(x, weights, activation)
    }
}

/// Routing of a chunk by hand: each expert's tokens.
fn sorted(lists: &[Vec<u32>]) -> (Vec<i32>, Vec<i32>) {
    let mut starts = vec![0i32];
    let mut token_of = Vec::new();
    for list in lists {
        token_of.extend(list.iter().map(|token| *token as i32));
        starts.push(token_of.len() as i32);
    }
    (starts, token_of)
}

fn i32s(upload: &Upload, values: &[i32]) -> Span {
    upload.bytes(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

/// A layer's experts on the tokens of `lists`, through tiles, gate-up and
/// down, against [`contract::expert`]; experts of `absent` are not resident.
fn check_experts(
    device: &Device,
    layer: &Layer,
    lists: &[Vec<u32>],
    absent: &[usize],
    tokens: usize,
    activation: GatedActivation,
) {
    let Layer { hidden, inner, formats, .. } = *layer;
    let (hidden_rows, stream) = (hidden, device.compute());
    let experts = lists.len();
    let (starts, token_of) = sorted(lists);
    let choices = token_of.len();
    let x = inputs(Inputs::Outliers, tokens * hidden, &mut Random::new(5));
    let upload = Upload::new(device, 16 << 20);
    let ([gate, up, down], length) = layer.offsets();

    let table: Vec<u8> = (0..experts)
        .flat_map(|expert| {
            if absent.contains(&expert) {
                return 0u64.to_le_bytes();
            }
            let mut block = vec![0xa5; length];
            for (offset, bytes) in [gate, up, down].into_iter().zip(&layer.experts[expert]) {
                block[offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            upload.bytes(&block).address().to_le_bytes()
        })
        .collect();
    let (table, starts) = (upload.bytes(&table), i32s(&upload, &starts));
    let tiles = upload.bytes(&vec![0xee; Groups::tiles_bytes(experts, choices)]);
    let groups =
        Groups { experts, choices, starts: &starts, table: &table, tiles: &tiles };
    group_tiles(device, stream, &groups).unwrap();

    let biases = layer.biases.as_ref().map(|all| all.each_ref().map(|b| upload_f32(&upload, b)));
    let bias = |i: usize| biases.as_ref().map(|biases| &biases[i]);
    let matrix = |i: usize, rows, cols, offset| ExpertMatrix {
        format: formats[i],
        rows,
        cols,
        offset,
        bias: bias(i),
    };
    let input = Input::new(&upload, formats[0], &x);
    let token_rows = i32s(&upload, &token_of);
    let middle = upload_f32(&upload, &vec![0.25; choices * inner]);
    let scratch = upload_f32(&upload, &vec![f32::NAN; choices * inner]);
    let call = GroupGemm {
        groups,
        matrix: matrix(0, inner, hidden, gate),
        up: Some((matrix(1, inner, hidden, up), activation)),
        input: input.get(),
        input_rows: tokens,
        in_order: Some(&token_rows),
        out_order: None,
        out: &middle,
        scratch: Some(&scratch),
    };
    group_gemm(device, stream, &call).unwrap();

    // Answers in another order than sorted: reversed.
    let reversed: Vec<i32> = (0..choices as i32).rev().collect();
    let out_rows = i32s(&upload, &reversed);
    let middle = Input::new(&upload, formats[2], &download_f32(device, &middle));
    let out = upload_f32(&upload, &vec![7.5; choices * hidden]);
    let call = GroupGemm {
        groups,
        matrix: matrix(2, hidden, inner, down),
        up: None,
        input: middle.get(),
        input_rows: choices,
        in_order: None,
        out_order: Some(&out_rows),
        out: &out,
        scratch: None,
    };
    group_gemm(device, stream, &call).unwrap();
    let got = download_f32(device, &out);

    let mut position = 0;
    for (expert, list) in lists.iter().enumerate() {
        for token in list {
            let row = choices - 1 - position;
            let got = &got[row * hidden_rows..(row + 1) * hidden_rows];
            let name = format!("{formats:?} expert {expert}, token {token}");
            if absent.contains(&expert) {
                assert!(got.iter().all(|v| *v == 7.5), "{name} is not resident");
            } else {
                let x = &x[*token as usize * hidden..(*token as usize + 1) * hidden];
                assert_bits(&name, got, &layer.answer(expert, x, activation));
            }
            position += 1;
        }
    }
}

/// Experts with no token, one, a whole tile, one more than a tile, and a few.
fn lists() -> (Vec<Vec<u32>>, usize) {
    let tokens = 70;
    let every = |step: usize| (0..tokens as u32).step_by(step).collect::<Vec<_>>();
    let mut lists = vec![vec![], vec![3], every(9), (0..65).collect(), vec![], (2..66).collect()];
    lists.push(vec![69]);
    lists.push(every(23));
    (lists, tokens)
}

#[test]
fn grouped_experts_are_the_contracts_and_missing_ones_are_left() {
    let Some(device) = testing::device() else { return };
    let clamped = GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
    let (lists, tokens) = lists();
    for (formats, hidden, inner, biased, activation) in [
        ([Format::Q4K, Format::Q4K, Format::Q6K], 256, 512, false, GatedActivation::Silu),
        ([Format::Mxfp4, Format::Mxfp4, Format::Mxfp4], 96, 64, true, clamped),
        ([Format::Q4_1, Format::Q8_0, Format::Q5_0], 64, 96, true, GatedActivation::Silu),
        ([Format::Bf16, Format::Bf16, Format::F16], 72, 40, true, clamped),
    ] {
        let layer = Layer::new(formats, hidden, inner, lists.len(), biased);
        check_experts(&device, &layer, &lists, &[3, 6], tokens, activation);
    }
}

#[test]
fn many_experts_with_few_tokens_have_a_tile_each() {
    let Some(device) = testing::device() else { return };
    let lists: Vec<Vec<u32>> =
        (0..300).map(|expert| if expert % 3 == 0 { vec![expert % 5] } else { vec![] }).collect();
    let layer = Layer::new([Format::Q8_0; 3], 32, 32, lists.len(), false);
    let absent: Vec<usize> = (0..300).filter(|expert| expert % 7 == 0).collect();
    check_experts(&device, &layer, &lists, &absent, 5, GatedActivation::Silu);
}

#[test]
fn launchers_refuse_sizes_that_do_not_fit() {
    let Some(device) = testing::device() else { return };
    let upload = Upload::new(&device, 1 << 20);
    let bytes = weights(Format::Q4K, Weights::Usual, 4, 256, &mut Random::new(1));
    let span = upload.bytes(&bytes);
    let weight = DeviceMatrix::new(Format::Q4K, 4, 256, span.clone(), 0).unwrap();
    let input = Input::new(&upload, Format::Q4K, &vec![1.0; 3 * 256]);
    let out = upload_f32(&upload, &[0.0; 12]);
    let launch = |tokens, input: GemmInput<'_>, out: &Span| {
        gemm(&device, device.compute(), &Gemm { weight: &weight, bias: None, input, tokens, out })
    };
    assert!(launch(3, input.get(), &out).is_ok());
    assert!(launch(4, input.get(), &out).is_err(), "input and answers too short");
    assert!(launch(3, input.get(), &out.part(0..44)).is_err(), "answers too short");
    assert!(launch(3, GemmInput::F32(&out), &out).is_err(), "floats for a quantised format");
    assert!(DeviceMatrix::new(Format::Q4K, 5, 256, span, 0).is_err());
}
