//! The kernels of `experts.cu` have the bits of `contract::expert` and
//! `contract::combine`: all formats, the shapes of real models, awkward ones,
//! biases, both activations, values that are not finite.

mod lab;

use lab::{Lab, assert_same_bits};
use pregate_kernels::cuda::{
    Choices, Combine, CudaError, Down, ExpertMatrix, GateUp, SharedAnswer, Span, combine, down,
    gate_up,
};
use pregate_kernels::testing::{Inputs, Random, Weights, inputs, weights};
use pregate_kernels::{
    Backend, Cpu, CpuOptions, ExpertWeights, Format, GatedActivation, Isa, Matrix, contract,
};

const GPT_OSS: GatedActivation = GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };

/// The experts of a layer: bytes here, blocks `[gate | up | down]` there.
struct Layer {
    hidden: usize,
    inner: usize,
    /// Of gate and up, and of down.
    formats: [Format; 2],
    /// Gate, up and down of each expert.
    bytes: Vec<[Vec<u8>; 3]>,
    /// `[experts, inner]` twice and `[experts, hidden]`, if there are any.
    biases: Option<[Vec<f32>; 3]>,
    offsets: [usize; 3],
    block_bytes: usize,
    /// On the device; `None`: not resident.
    blocks: Vec<Option<Span>>,
    table: Span,
    bias_spans: Option<[Span; 3]>,
}

struct LayerOptions {
    hidden: usize,
    inner: usize,
    formats: [Format; 2],
    kind: Weights,
    experts: usize,
    /// Experts that are not on the device.
    absent: &'static [usize],
    has_biases: bool,
}

impl Layer {
    fn new(lab: &Lab, options: &LayerOptions, random: &mut Random) -> Self {
        let &LayerOptions { hidden, inner, formats, kind, experts, absent, has_biases } = options;
        let [first, last] = formats;
        let bytes: Vec<[Vec<u8>; 3]> = (0..experts)
            .map(|_| {
                [
                    weights(first, kind, inner, hidden, random),
                    weights(first, kind, inner, hidden, random),
                    weights(last, kind, hidden, inner, random),
                ]
            })
            .collect();
        let [gate, up, down] = bytes[0].each_ref().map(Vec::len);
        let up_at = gate.next_multiple_of(16);
        let down_at = (up_at + up).next_multiple_of(16);
        let (offsets, block_bytes) = ([0, up_at, down_at], down_at + down);
        let blocks: Vec<Option<Span>> = bytes
            .iter()
            .enumerate()
            .map(|(expert, parts)| {
                (!absent.contains(&expert)).then(|| {
                    let mut block = vec![0; block_bytes];
                    for (part, at) in parts.iter().zip(offsets) {
                        block[at..at + part.len()].copy_from_slice(part);
                    }
                    lab.bytes(&block)
                })
            })
            .collect();
        let addresses: Vec<u64> =
            blocks.iter().map(|block| block.as_ref().map_or(0, Span::address)).collect();
        let mut bias = |count| inputs(Inputs::Normal, experts * count, random);
        let biases = has_biases.then(|| [bias(inner), bias(inner), bias(hidden)]);
        let bias_spans = biases.as_ref().map(|all| all.each_ref().map(|bias| lab.floats(bias)));
        let table = lab.addresses(&addresses);
        Self {
            hidden,
            inner,
            formats,
            bytes,
            biases,
            offsets,
            block_bytes,
            blocks,
            table,
            bias_spans,
        }
    }

    fn weights(&self, expert: usize) -> ExpertWeights<'_> {
        let Self { hidden, inner, formats: [first, last], biases, .. } = self;
        let [gate, up, down] = &self.bytes[expert];
        let bias = |which: usize, count: usize| {
            biases.as_ref().map(|all| &all[which][expert * count..][..count])
        };
        ExpertWeights {
            gate: Matrix::new(*first, *inner, *hidden, gate).unwrap(),
            up: Matrix::new(*first, *inner, *hidden, up).unwrap(),
            down: Matrix::new(*last, *hidden, *inner, down).unwrap(),
            gate_bias: bias(0, *inner),
            up_bias: bias(1, *inner),
            down_bias: bias(2, *hidden),
        }
    }

    fn matrix(&self, which: usize) -> ExpertMatrix {
        ExpertMatrix { format: self.formats[which / 2], offset: self.offsets[which] }
    }

    /// Both halves on the device: answers `[tokens, k, hidden]`, rows that
    /// were not computed 7.
    fn run(
        &self,
        lab: &Lab,
        x: &[f32],
        ids: Option<&[i32]>,
        chosen: Option<&[i32]>,
        activation: GatedActivation,
    ) -> Vec<f32> {
        let Self { hidden, inner, .. } = *self;
        let tokens = x.len() / hidden;
        let k = ids.map_or(1, |ids| ids.len() / tokens);
        let ids = ids.map(|ids| lab.ints(ids));
        let chosen = chosen.map(|chosen| (lab.ints(chosen), chosen.len()));
        let choices = Choices {
            table: &self.table,
            experts: self.bytes.len(),
            block_bytes: self.block_bytes,
            tokens,
            k,
            ids: ids.as_ref(),
            chosen: chosen.as_ref().map(|(chosen, count)| (chosen, *count)),
        };
        let bias = |which: usize| self.bias_spans.as_ref().map(|all| &all[which]);
        let x = lab.activations(self.formats[0], x, hidden);
        // What a skipped choice leaves here must not reach its answer.
        let vectors = lab.floats(&vec![f32::NAN; tokens * k * inner]);
        let answers = lab.floats(&vec![7.0; tokens * k * hidden]);
        let (device, stream) = (&lab.device, lab.device.compute());
        let call = GateUp {
            choices,
            gate: self.matrix(0),
            up: self.matrix(1),
            gate_bias: bias(0),
            up_bias: bias(1),
            activation,
            x: x.input(),
            hidden,
            inner,
            out: &vectors,
        };
        gate_up(device, stream, call).unwrap();
        let call = Down {
            choices,
            down: self.matrix(2),
            bias: bias(2),
            hidden,
            inner,
            vectors: &vectors,
            answers: &answers,
        };
        down(device, stream, call).unwrap();
        lab.read_floats(&answers)
    }
}

/// Sizes in blocks of the gate's and down's formats that are awkward for rows
/// and lanes.
fn awkward(format: Format, random: &mut Random) -> usize {
    match format.block_len() {
        1 => random.pick(&[1, 7, 64, 65, 200]),
        32 => 32 * random.pick(&[1, 3, 8, 9, 24, 31]),
        _ => 256 * random.pick(&[1, 2, 3]),
    }
}

#[test]
fn experts_have_the_bits_of_the_contract() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(21);
    for format in Format::ALL {
        for round in 0..4 {
            let (hidden, inner) = match round {
                // Few rows beside many blocks, and the other way round.
                0 => (awkward(format, &mut random), 9 * format.block_len()),
                _ => (awkward(format, &mut random), awkward(format, &mut random)),
            };
            let kind = if round < 2 { Weights::Usual } else { random.pick(&Weights::ALL) };
            let input = if round < 2 { Inputs::Normal } else { random.pick(&Inputs::ALL) };
            let activation = if round % 2 == 0 { GatedActivation::Silu } else { GPT_OSS };
            let options = LayerOptions {
                hidden,
                inner,
                formats: [format; 2],
                kind,
                experts: 3,
                absent: &[],
                has_biases: round % 2 == 1,
            };
            let layer = Layer::new(&lab, &options, &mut random);
            let x = inputs(input, 2 * hidden, &mut random);
            let ids = [2, 0, 1, 2];
            let found = layer.run(&lab, &x, Some(&ids), None, activation);
            for (choice, expert) in ids.into_iter().enumerate() {
                let x = &x[choice / 2 * hidden..][..hidden];
                let wanted = contract::expert(x, layer.weights(expert as usize), activation);
                let what =
                    || format!("{format} {hidden} to {inner}, {kind:?}, {input:?}, {choice}");
                assert_same_bits(&found[choice * hidden..][..hidden], &wanted, &what());
            }
        }
    }
}

/// As files have them: down rows are often of a larger format.
#[test]
fn down_may_have_another_format() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(22);
    let pairs = [
        [Format::Q4K, Format::Q6K],
        [Format::Q2K, Format::Q3K],
        [Format::Iq4Xs, Format::Q5K],
        [Format::Q4K, Format::Q5_0],
        [Format::Q4K, Format::Q8_0],
        [Format::Q5_1, Format::Iq4Nl],
        [Format::Mxfp4, Format::F16],
        [Format::Bf16, Format::Q4_0],
    ];
    for formats in pairs {
        let options = LayerOptions {
            hidden: 512,
            inner: 256,
            formats,
            kind: Weights::Usual,
            experts: 1,
            absent: &[],
            has_biases: false,
        };
        let layer = Layer::new(&lab, &options, &mut random);
        let x = inputs(Inputs::Outliers, 512, &mut random);
        let found = layer.run(&lab, &x, None, None, GatedActivation::Silu);
        let wanted = contract::expert(&x, layer.weights(0), GatedActivation::Silu);
        assert_same_bits(&found, &wanted, &format!("{formats:?}"));
    }
}

/// Only what was chosen and is resident is computed; other rows are left to
/// the CPU.
#[test]
fn absent_experts_and_choices_that_are_not_named_are_left() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(23);
    for format in [Format::Q4K, Format::Mxfp4, Format::F16] {
        let options = LayerOptions {
            hidden: 256,
            inner: 256,
            formats: [format; 2],
            kind: Weights::Usual,
            experts: 5,
            absent: &[1, 4],
            has_biases: true,
        };
        let layer = Layer::new(&lab, &options, &mut random);
        let x = inputs(Inputs::Normal, 3 * 256, &mut random);
        // The last two are no experts at all.
        let ids = [0, 1, 2, 3, 4, 2, 3, -1, 5];
        let chosen = [8, 6, 0, 1, 5, 4, 7];
        let found = layer.run(&lab, &x, Some(&ids), Some(&chosen), GPT_OSS);
        for (choice, id) in ids.into_iter().enumerate() {
            let is_computed = chosen.contains(&(choice as i32)) && [0, 2, 3].contains(&id);
            let wanted = match is_computed {
                true => {
                    let x = &x[choice / 3 * 256..][..256];
                    contract::expert(x, layer.weights(id as usize), GPT_OSS)
                }
                false => vec![7.0; 256],
            };
            let what = || format!("{format} choice {choice}");
            assert_same_bits(&found[choice * 256..][..256], &wanted, &what());
        }
        assert!(layer.blocks[1].is_none());
    }
}

/// Every column of the models' experts, and some of their rows.
#[test]
fn shapes_of_real_models_have_the_bits_of_the_contract() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(24);
    let models = [
        ("OLMoE", 2048, 1024),
        ("Qwen3-30B-A3B", 2048, 768),
        ("Mixtral", 4096, 14336),
        ("DeepSeek-V2-Lite", 2048, 1408),
        ("gpt-oss-20b", 2880, 2880),
        ("Qwen3.5-35B-A3B", 2048, 512),
    ];
    const ROWS: usize = 14;
    for (model, hidden, inner) in models {
        for format in Format::ALL {
            let fits = |cols: usize| cols.is_multiple_of(format.block_len());
            let activation = if model == "gpt-oss-20b" { GPT_OSS } else { GatedActivation::Silu };
            if fits(hidden) {
                gate_up_rows(&lab, model, format, hidden, ROWS, activation, &mut random);
            }
            if fits(inner) {
                down_rows(&lab, model, format, inner, ROWS, &mut random);
            }
        }
    }
}

fn gate_up_rows(
    lab: &Lab,
    model: &str,
    format: Format,
    hidden: usize,
    rows: usize,
    activation: GatedActivation,
    random: &mut Random,
) {
    let gate = weights(format, Weights::Usual, rows, hidden, random);
    let up = weights(format, Weights::Usual, rows, hidden, random);
    let up_at = gate.len().next_multiple_of(16);
    let mut block = gate.clone();
    block.resize(up_at, 0);
    block.extend_from_slice(&up);
    let x = inputs(Inputs::Outliers, hidden, random);
    let (block_span, out) = (lab.bytes(&block), lab.space(4 * rows));
    let table = lab.addresses(&[block_span.address()]);
    let x_on = lab.activations(format, &x, hidden);
    let call = GateUp {
        choices: one_expert(&table, block.len()),
        gate: ExpertMatrix { format, offset: 0 },
        up: ExpertMatrix { format, offset: up_at },
        gate_bias: None,
        up_bias: None,
        activation,
        x: x_on.input(),
        hidden,
        inner: rows,
        out: &out,
    };
    gate_up(&lab.device, lab.device.compute(), call).unwrap();
    let row_bytes = gate.len() / rows;
    let wanted: Vec<f32> = gate
        .chunks_exact(row_bytes)
        .zip(up.chunks_exact(row_bytes))
        .map(|(gate, up)| {
            let [gate, up] = [gate, up].map(|row| contract::dot(format, row, &x));
            contract::gated(activation, gate, up)
        })
        .collect();
    assert_same_bits(&lab.read_floats(&out), &wanted, &format!("{model} gate-up {format}"));
}

fn down_rows(
    lab: &Lab,
    model: &str,
    format: Format,
    inner: usize,
    rows: usize,
    random: &mut Random,
) {
    let bytes = weights(format, Weights::Usual, rows, inner, random);
    let vector = inputs(Inputs::Outliers, inner, random);
    let (block, answers) = (lab.bytes(&bytes), lab.space(4 * rows));
    let table = lab.addresses(&[block.address()]);
    let vectors = lab.floats(&vector);
    let call = Down {
        choices: one_expert(&table, bytes.len()),
        down: ExpertMatrix { format, offset: 0 },
        bias: None,
        hidden: rows,
        inner,
        vectors: &vectors,
        answers: &answers,
    };
    down(&lab.device, lab.device.compute(), call).unwrap();
    let wanted: Vec<f32> = bytes
        .chunks_exact(bytes.len() / rows)
        .map(|row| contract::dot(format, row, &vector))
        .collect();
    assert_same_bits(&lab.read_floats(&answers), &wanted, &format!("{model} down {format}"));
}

fn one_expert(table: &Span, block_bytes: usize) -> Choices<'_> {
    Choices { table, experts: 1, block_bytes, tokens: 1, k: 1, ids: None, chosen: None }
}

/// A shared expert or a dense block is a table of one, for every token.
#[test]
fn a_dense_block_has_the_bits_of_the_cpu() {
    let Some(lab) = Lab::open() else { return };
    let cpu = Cpu::new(CpuOptions { threads: Some(1), isa: Some(Isa::Scalar) }).unwrap();
    let mut random = Random::new(25);
    for format in [Format::Q4K, Format::Q5_0, Format::F32] {
        let options = LayerOptions {
            hidden: 512,
            inner: 768,
            formats: [format; 2],
            kind: Weights::Usual,
            experts: 1,
            absent: &[],
            has_biases: false,
        };
        let layer = Layer::new(&lab, &options, &mut random);
        let x = inputs(Inputs::Normal, 3 * 512, &mut random);
        let found = layer.run(&lab, &x, None, None, GatedActivation::Silu);
        let mut wanted = vec![0.0; x.len()];
        cpu.feed_forward(&x, 3, layer.weights(0), GatedActivation::Silu, &mut wanted);
        assert_same_bits(&found, &wanted, &format.to_string());
    }
}

#[test]
fn combining_has_the_bits_of_the_contract() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(26);
    for (k, hidden) in [(1, 33), (2, 128), (8, 300), (6, 1), (4, 129)] {
        for (has_shared, has_gate) in [(false, false), (true, false), (true, true)] {
            let tokens = 3;
            let answers = inputs(Inputs::Outliers, tokens * k * hidden, &mut random);
            let of_router = inputs(Inputs::Normal, tokens * k, &mut random);
            let shared = inputs(Inputs::Normal, tokens * hidden, &mut random);
            let logits = inputs(Inputs::Normal, tokens, &mut random);
            let residual = inputs(Inputs::Outliers, tokens * hidden, &mut random);
            let (answers_span, weights_span) = (lab.floats(&answers), lab.floats(&of_router));
            let (shared_span, logits_span) = (lab.floats(&shared), lab.floats(&logits));
            let (residual_span, out) = (lab.floats(&residual), lab.space(4 * tokens * hidden));
            let factor = 0.22;
            let call = Combine {
                tokens,
                k,
                hidden,
                answers: &answers_span,
                weights: &weights_span,
                shared: has_shared.then_some(SharedAnswer {
                    answers: &shared_span,
                    gate_logits: has_gate.then_some(&logits_span),
                }),
                residual: Some((&residual_span, factor)),
                out: Some(&out),
                host: None,
            };
            combine(&lab.device, lab.device.compute(), call).unwrap();

            let (mut sums, mut stream) = (vec![0.0; tokens * hidden], residual);
            for t in 0..tokens {
                let parts: Vec<(f32, Vec<f32>)> = (t * k..(t + 1) * k)
                    .map(|c| (of_router[c], answers[c * hidden..][..hidden].to_vec()))
                    .collect();
                let sums = &mut sums[t * hidden..][..hidden];
                contract::combine(&parts, sums);
                let gate = if has_gate { contract::sigmoid(logits[t]) } else { 1.0 };
                for (i, sum) in sums.iter_mut().enumerate() {
                    if has_shared {
                        *sum += gate * shared[t * hidden + i];
                    }
                    stream[t * hidden + i] += factor * *sum;
                }
            }
            let what = || format!("{k} of {hidden}, shared {has_shared}, gate {has_gate}");
            assert_same_bits(&lab.read_floats(&out), &sums, &what());
            assert_same_bits(&lab.read_floats(&residual_span), &stream, &what());
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(lab) = Lab::open() else { return };
    let (device, stream) = (&lab.device, lab.device.compute());
    let options = LayerOptions {
        hidden: 256,
        inner: 256,
        formats: [Format::Q4K; 2],
        kind: Weights::Zeros,
        experts: 2,
        absent: &[],
        has_biases: false,
    };
    let layer = Layer::new(&lab, &options, &mut Random::new(1));
    let x = lab.activations(Format::Q4K, &[0.5; 256], 256);
    let (vectors, ids) = (lab.space(4 * 2 * 256), lab.ints(&[0, 1]));
    let choices = Choices {
        table: &layer.table,
        experts: 2,
        block_bytes: layer.block_bytes,
        tokens: 1,
        k: 2,
        ids: Some(&ids),
        chosen: None,
    };
    let call = |choices, up| GateUp {
        choices,
        gate: layer.matrix(0),
        up,
        gate_bias: None,
        up_bias: None,
        activation: GatedActivation::Silu,
        x: x.input(),
        hidden: 256,
        inner: 256,
        out: &vectors,
    };
    let up = layer.matrix(1);
    gate_up(device, stream, call(choices, up)).unwrap();
    let mixed = ExpertMatrix { format: Format::Q5K, ..up };
    let result = gate_up(device, stream, call(choices, mixed));
    assert!(matches!(result, Err(CudaError::Unsupported { .. })), "{result:?}");
    let refused = |result: Result<(), CudaError>, what: &str| {
        assert!(matches!(result, Err(CudaError::Shape { .. })), "{what}: {result:?}");
    };
    let behind = ExpertMatrix { offset: layer.block_bytes, ..up };
    refused(gate_up(device, stream, call(choices, behind)), "up behind the block");
    let uneven = ExpertMatrix { offset: up.offset - 8, ..up };
    refused(gate_up(device, stream, call(choices, uneven)), "up at a multiple of 8");
    refused(gate_up(device, stream, call(Choices { experts: 3, ..choices }, up)), "short table");
    refused(gate_up(device, stream, call(Choices { k: 3, ..choices }, up)), "short ids");
    refused(gate_up(device, stream, call(Choices { tokens: 2, k: 1, ..choices }, up)), "short x");
    refused(gate_up(device, stream, call(Choices { k: 0, ..choices }, up)), "no choices");
    let none = Some((&ids, 0));
    refused(gate_up(device, stream, call(Choices { chosen: none, ..choices }, up)), "none chosen");
}
