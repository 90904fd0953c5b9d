//! Products of many tokens on the device against the numerical contract, in
//! bits.

mod lab;

use lab::{Activations, Lab, assert_same_bits};
use pregate_kernels::block::Block;
use pregate_kernels::cuda::{
    ExpertMatrix, Gemm, GroupGemm, Groups, Input, QuantisedSpans, Span, Up, gemm, group_gemm,
    group_tiles,
};
use pregate_kernels::testing::{Inputs, Random, Weights, inputs, weights};
use pregate_kernels::{ActivationKind, ExpertWeights, Format, GatedActivation, Matrix, contract};
use pregate_standin::testing;

/// What a product of these rows and tokens must be: `[tokens, rows]`.
fn expected(
    format: Format,
    bytes: &[u8],
    cols: usize,
    x: &[f32],
    bias: Option<&[f32]>,
) -> Vec<f32> {
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

/// An input on the device, quantised here as the format wants it.
fn on_device(lab: &Lab, format: Format, x: &[f32]) -> Activations {
    if format.activation() == ActivationKind::F32 {
        return Activations::Floats(lab.floats(x));
    }
    let (q, scales) = quantised(format, x);
    let sums: Vec<u8> = q
        .chunks_exact(16)
        .map(|q| q.iter().map(|q| i16::from(*q)).sum::<i16>())
        .flat_map(i16::to_le_bytes)
        .collect();
    let q: Vec<u8> = q.iter().map(|q| *q as u8).collect();
    let (q, scales, sums) = (lab.bytes(&q), lab.floats(&scales), lab.bytes(&sums));
    Activations::Quantised(QuantisedSpans { group: format.block_len(), q, scales, sums })
}

/// One product on the device, compared with the contract's.
fn check(
    lab: &Lab,
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

    let weight = lab.matrix(format, rows, cols, &bytes);
    let input = on_device(lab, format, &x);
    let bias = bias.map(|bias| lab.floats(&bias));
    // More than is written, to see that nobody writes behind the end.
    let out = lab.floats(&vec![7.5; tokens * rows + 64]);
    let (weight, bias, x, out) = (&weight, bias.as_ref(), input.input(), &out);
    let call = Gemm { weight, bias, x, tokens, out };
    gemm(&lab.device, lab.device.compute(), &call).unwrap();
    let got = lab.read_floats(out);
    let name = || format!("{format} {kinds:?} [{rows}, {cols}] x {tokens}");
    assert_same_bits(&got[..want.len()], &want, &name());
    assert!(got[want.len()..].iter().all(|v| *v == 7.5), "{}: wrote behind the answers", name());
}

fn shapes(format: Format) -> Vec<(usize, usize, usize)> {
    let len = format.block_len();
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
    let Some(lab) = Lab::open() else { return };
    for format in Format::ALL {
        for (i, shape) in shapes(format).into_iter().enumerate() {
            check(&lab, format, (Weights::Usual, Inputs::Outliers), shape, i % 2 == 0);
        }
    }
}

#[test]
fn products_do_not_depend_on_the_order_of_threads() {
    let Some(lab) = Lab::open() else { return };
    let Some(standin) = testing::standin() else { return };
    for seed in [0, 2, 3, 5, 8, 13] {
        standin.set_order(seed);
        for format in [Format::Q5K, Format::Q6K, Format::Q4_1, Format::Mxfp4] {
            let kinds = (Weights::Usual, Inputs::Normal);
            check(&lab, format, kinds, (40, 10 * format.block_len(), 35), false);
        }
    }
}

#[test]
fn products_of_adversarial_values_are_the_contracts() {
    let Some(lab) = Lab::open() else { return };
    for format in Format::ALL {
        let cols = 9 * format.block_len().max(8);
        for kind in Weights::ALL {
            check(&lab, format, (kind, Inputs::Extremes), (18, cols, 9), false);
        }
        for kind in [Inputs::NotFinite, Inputs::Huge, Inputs::Tiny, Inputs::Ties] {
            check(&lab, format, (Weights::Largest, kind), (18, cols, 9), true);
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

/// A layer's experts in blocks of their own, and the table that names them.
fn resident(lab: &Lab, layer: &Layer, absent: &[usize]) -> (Vec<Span>, Span) {
    let (offsets, length) = layer.offsets();
    let mut blocks = Vec::new();
    let mut addresses = Vec::new();
    for (expert, matrices) in layer.experts.iter().enumerate() {
        if absent.contains(&expert) {
            addresses.push(0);
            continue;
        }
        let mut block = vec![0xa5; length];
        for (offset, bytes) in offsets.into_iter().zip(matrices) {
            block[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        blocks.push(lab.bytes(&block));
        addresses.push(blocks[blocks.len() - 1].address());
    }
    let table = lab.addresses(&addresses);
    (blocks, table)
}

/// A layer's experts on the tokens of `lists`, through tiles, gate-up and
/// down, against [`contract::expert`]; experts of `absent` are not resident.
fn check_experts(
    lab: &Lab,
    layer: &Layer,
    lists: &[Vec<u32>],
    absent: &[usize],
    tokens: usize,
    activation: GatedActivation,
) {
    let Layer { hidden, inner, formats, .. } = *layer;
    let (device, stream) = (&lab.device, lab.device.compute());
    let experts = lists.len();
    let (starts, token_of) = sorted(lists);
    let choices = token_of.len();
    let x = inputs(Inputs::Outliers, tokens * hidden, &mut Random::new(5));
    let ([gate, up, down], block_bytes) = layer.offsets();

    let (_blocks, table) = resident(lab, layer, absent);
    let starts = lab.ints(&starts);
    let tiles = lab.bytes(&vec![0xee; Groups::tiles_bytes(experts, choices)]);
    let (starts, table, tiles) = (&starts, &table, &tiles);
    let groups = Groups { experts, block_bytes, choices, starts, table, tiles };
    group_tiles(device, stream, &groups).unwrap();

    let biases = layer.biases.as_ref().map(|all| all.each_ref().map(|b| lab.floats(b)));
    let bias = |i: usize| biases.as_ref().map(|biases| &biases[i]);
    let input = on_device(lab, formats[0], &x);
    let token_rows = lab.ints(&token_of);
    let middle = lab.floats(&vec![0.25; choices * inner]);
    let scratch = lab.floats(&vec![f32::NAN; choices * inner]);
    let up = Up {
        matrix: ExpertMatrix { format: formats[1], offset: up },
        bias: bias(1),
        activation,
        scratch: Some(&scratch),
    };
    let call = GroupGemm {
        groups,
        matrix: ExpertMatrix { format: formats[0], offset: gate },
        rows: inner,
        cols: hidden,
        bias: bias(0),
        up: Some(up),
        x: input.input(),
        x_rows: tokens,
        x_order: Some(&token_rows),
        out_order: None,
        out: &middle,
    };
    group_gemm(device, stream, &call).unwrap();

    // Answers in another order than sorted: reversed.
    let out_rows = lab.ints(&(0..choices as i32).rev().collect::<Vec<_>>());
    let middle = lab.read_floats(&middle);
    let input = on_device(lab, formats[2], &middle);
    let out = lab.floats(&vec![7.5; choices * hidden]);
    let call = GroupGemm {
        groups,
        matrix: ExpertMatrix { format: formats[2], offset: down },
        rows: hidden,
        cols: inner,
        bias: bias(2),
        up: None,
        x: input.input(),
        x_rows: choices,
        x_order: None,
        out_order: Some(&out_rows),
        out: &out,
    };
    group_gemm(device, stream, &call).unwrap();
    let got = lab.read_floats(&out);

    let mut position = 0;
    for (expert, list) in lists.iter().enumerate() {
        for token in list {
            let row = choices - 1 - position;
            let got = &got[row * hidden..(row + 1) * hidden];
            let name = || format!("{formats:?} expert {expert}, token {token}");
            if absent.contains(&expert) {
                let middle = &middle[position * inner..(position + 1) * inner];
                assert!(middle.iter().all(|v| *v == 0.25), "{} is not resident", name());
                assert!(got.iter().all(|v| *v == 7.5), "{} is not resident", name());
            } else {
                let x = &x[*token as usize * hidden..(*token as usize + 1) * hidden];
                assert_same_bits(got, &layer.answer(expert, x, activation), &name());
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
    let Some(lab) = Lab::open() else { return };
    let clamped = GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
    let (lists, tokens) = lists();
    for (formats, hidden, inner, biased, activation) in [
        ([Format::Q4K, Format::Q4K, Format::Q6K], 256, 512, false, GatedActivation::Silu),
        ([Format::Mxfp4, Format::Mxfp4, Format::Mxfp4], 96, 64, true, clamped),
        ([Format::Q4_1, Format::Q8_0, Format::Q5_0], 64, 96, true, GatedActivation::Silu),
        ([Format::Bf16, Format::Bf16, Format::F16], 72, 40, true, clamped),
    ] {
        let layer = Layer::new(formats, hidden, inner, lists.len(), biased);
        check_experts(&lab, &layer, &lists, &[3, 6], tokens, activation);
    }
}

#[test]
fn many_experts_with_few_tokens_have_a_tile_each() {
    let Some(lab) = Lab::open() else { return };
    let lists: Vec<Vec<u32>> =
        (0..300).map(|expert| if expert % 3 == 0 { vec![expert % 5] } else { vec![] }).collect();
    let layer = Layer::new([Format::Q8_0; 3], 32, 32, lists.len(), false);
    let absent: Vec<usize> = (0..300).filter(|expert| expert % 7 == 0).collect();
    check_experts(&lab, &layer, &lists, &absent, 5, GatedActivation::Silu);
}

#[test]
fn launchers_refuse_sizes_that_do_not_fit() {
    let Some(lab) = Lab::open() else { return };
    let bytes = weights(Format::Q4K, Weights::Usual, 4, 256, &mut Random::new(1));
    let weight = lab.matrix(Format::Q4K, 4, 256, &bytes);
    let input = on_device(&lab, Format::Q4K, &[1.0; 3 * 256]);
    let out = lab.floats(&[0.0; 12]);
    let launch = |tokens, x: Input<'_>, out: &Span| {
        let call = Gemm { weight: &weight, bias: None, x, tokens, out };
        gemm(&lab.device, lab.device.compute(), &call)
    };
    assert!(launch(3, input.input(), &out).is_ok());
    assert!(launch(4, input.input(), &out).is_err(), "input and answers too short");
    assert!(launch(3, input.input(), &out.part(0..44)).is_err(), "answers too short");
    assert!(launch(3, Input::Floats(&out), &out).is_err(), "floats for a quantised format");
}
