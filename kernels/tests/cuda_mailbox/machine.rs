//! A small model of two MoE layers without mixers, and what computes a token
//! of it. Ids and weights come with the inputs, in a router's place.

use crate::lab::Lab;
use pregate_kernels::cuda::{
    AheadLogits, BeginStep, Choices, Combine, CudaError, Down, ENTRY_BYTES, ExpertArena,
    ExpertMatrix, GateUp, Graph, HostRows, Input, MailboxLayout, Mapped, Post, Settle, Span,
    StepLayout, begin_step, combine, down, gate_up, post, settle,
};
use pregate_kernels::testing::Random;
use pregate_kernels::{ExpertWeights, Format, GatedActivation, Matrix, contract};
use pregate_standin::{Exclusive, testing};
use std::time::Duration;

pub use pregate_standin::Drain;

pub const LAYERS: usize = 2;
pub const EXPERTS: usize = 6;
pub const K: usize = 3;
pub const HIDDEN: usize = 48;
const INNER: usize = 40;
/// Rows of logits ahead, their length, and how far apart they are.
pub const AHEAD: usize = 2;
pub const PITCH: usize = 9;
/// Updates of entries that a step has room for.
pub const UPDATES: usize = 16;

pub const DRAINS: [Drain; 5] =
    [Drain::Lazy, Drain::Eager, Drain::Random(1), Drain::Random(2), Drain::Random(3)];

/// The stand-in for one test, with nothing in it, and a device on it; or a
/// GPU, for which `drain` is nothing.
pub fn open(drain: Drain) -> Option<(Option<Exclusive<'static>>, Lab)> {
    let machine = testing::standin().map(|standin| standin.exclusive());
    if let Some(machine) = &machine {
        machine.reset();
        machine.set_drain(drain);
    }
    Some((machine, Lab::open()?))
}

/// What a token brings.
#[derive(Clone, Debug)]
pub struct Token {
    pub x: Vec<f32>,
    /// `[LAYERS][K]`
    pub ids: [[i32; K]; LAYERS],
    pub weights: [[f32; K]; LAYERS],
    /// `[LAYERS][AHEAD, PITCH]`
    pub logits: [Vec<f32>; LAYERS],
}

impl Token {
    pub fn random(random: &mut Random) -> Self {
        let mut floats = |count: usize| (0..count).map(|_| random.normal()).collect::<Vec<_>>();
        let x = floats(HIDDEN);
        let logits = [floats(AHEAD * PITCH), floats(AHEAD * PITCH)];
        let weights = [0; LAYERS].map(|_| floats(K).try_into().unwrap());
        let ids = [0; LAYERS].map(|_| {
            let mut all: Vec<i32> = (0..EXPERTS as i32).collect();
            [0; K].map(|_| all.swap_remove(random.below(all.len())))
        });
        Self { x, ids, weights, logits }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut floats =
            |values: &[f32]| bytes.extend(values.iter().flat_map(|value| value.to_ne_bytes()));
        floats(&self.x);
        for layer in 0..LAYERS {
            floats(&self.ids[layer].map(|id| f32::from_bits(id.cast_unsigned())));
            floats(&self.weights[layer]);
            floats(&self.logits[layer]);
        }
        bytes
    }
}

/// Bytes of a layer's part of the inputs: ids, weights, logits.
const LAYER_INPUTS: usize = 4 * (2 * K + AHEAD * PITCH);

/// Where a step's token is.
pub fn position(step: u32) -> usize {
    (step % 1000) as usize * 7 + 3
}

pub struct Machine {
    pub lab: Lab,
    /// Gate, up and down of each layer's experts.
    weights: Vec<[Vec<u8>; 3]>,
    offsets: [usize; 3],
    pub block_bytes: usize,
    /// A block for each expert of each layer, in no order.
    pub arena: Span,
    entries: Vec<u32>,
    pub step: StepLayout,
    pub mailbox: MailboxLayout,
    pub block: Mapped,
    pub mailboxes: Mapped,
    /// u64 `[LAYERS, K]`
    pub decisions: Mapped,
    /// f32 `[LAYERS, K, HIDDEN]`
    pub rows: Mapped,
    pub error: Mapped,
    pub patience: Duration,
    pub slot_of: Span,
    words: Span,
    inputs: Span,
    /// One for all layers, as `late`.
    table: Span,
    late: Span,
    missing: Span,
    from_host: Span,
    vectors: Span,
    answers: Span,
}

impl Machine {
    pub fn new(lab: Lab, random: &mut Random) -> Self {
        let count = LAYERS * EXPERTS;
        let mut part = || (0..HIDDEN * INNER).flat_map(|_| random.normal().to_ne_bytes()).collect();
        let weights: Vec<[Vec<u8>; 3]> = (0..count).map(|_| [part(), part(), part()]).collect();
        let bytes = 4 * HIDDEN * INNER;
        let (offsets, block_bytes) = ([0, bytes, 2 * bytes], 3 * bytes);
        let pitch = block_bytes.next_multiple_of(ENTRY_BYTES);
        let mut places: Vec<usize> = (0..count).collect();
        let mut entries = Vec::new();
        let mut image = vec![0xff; count * pitch];
        for parts in &weights {
            let at = places.swap_remove(random.below(places.len())) * pitch;
            for (part, offset) in parts.iter().zip(offsets) {
                image[at + offset..][..bytes].copy_from_slice(part);
            }
            entries.push(ExpertArena::entry(at).unwrap());
        }
        let arena = lab.bytes(&image);
        let step = StepLayout { updates: UPDATES, input_bytes: 4 * HIDDEN + LAYERS * LAYER_INPUTS };
        let mailbox = MailboxLayout { k: K, hidden: HIDDEN, ahead: AHEAD, experts: EXPERTS };
        let mapped = |bytes: usize| lab.device.mapped(bytes).unwrap();
        let machine = Self {
            weights,
            offsets,
            block_bytes,
            arena,
            entries,
            step,
            mailbox,
            block: mapped(step.bytes()),
            mailboxes: mapped(LAYERS * mailbox.bytes()),
            decisions: mapped(8 * LAYERS * K),
            rows: mapped(4 * LAYERS * K * HIDDEN),
            error: mapped(8),
            // On the stand-in, how often a launch goes on: it does not hang where
            // a test fails.
            patience: match testing::standin() {
                Some(_) => Duration::from_nanos(100_000),
                None => Duration::from_secs(10),
            },
            slot_of: lab.zeros(4 * count),
            words: lab.cells(4),
            inputs: lab.space(step.input_bytes),
            table: lab.filled(8 * EXPERTS, 0xa5),
            late: lab.filled(8 * EXPERTS, 0xa5),
            missing: lab.cells(1),
            from_host: lab.cells(1),
            vectors: lab.space(4 * K * INNER),
            answers: lab.space(4 * K * HIDDEN),
            lab,
        };
        // Nothing is loaded while the device waits for the host.
        machine.lab.device.compute().rehearse(|| machine.launch()).unwrap();
        machine
    }

    /// The entry of an expert's block.
    pub fn entry(&self, layer: usize, expert: usize) -> u32 {
        self.entries[layer * EXPERTS + expert]
    }

    /// Where an expert's block is in the arena.
    pub fn place(&self, layer: usize, expert: usize) -> std::ops::Range<usize> {
        let start = (self.entry(layer, expert) as usize - 1) * ENTRY_BYTES;
        start..start + self.block_bytes
    }

    pub fn contents(&self, layer: usize, expert: usize) -> Vec<u8> {
        self.weights[layer * EXPERTS + expert].concat()
    }

    /// What an expert makes of `x`, as the CPU has it.
    pub fn answer(&self, layer: usize, expert: usize, x: &[f32]) -> Vec<f32> {
        let [gate, up, down] = &self.weights[layer * EXPERTS + expert];
        let weights = ExpertWeights {
            gate: Matrix::new(Format::F32, INNER, HIDDEN, gate).unwrap(),
            up: Matrix::new(Format::F32, INNER, HIDDEN, up).unwrap(),
            down: Matrix::new(Format::F32, HIDDEN, INNER, down).unwrap(),
            gate_bias: None,
            up_bias: None,
            down_bias: None,
        };
        contract::expert(x, weights, GatedActivation::Silu)
    }

    pub fn x(&self) -> Span {
        self.inputs.part(0..4 * HIDDEN)
    }

    /// Of a layer: ids, weights, logits.
    fn layer_inputs(&self, layer: usize) -> [Span; 3] {
        let at = 4 * HIDDEN + layer * LAYER_INPUTS;
        let [a, b, c, d] = [0, 4 * K, 8 * K, LAYER_INPUTS].map(|offset| at + offset);
        [a..b, b..c, c..d].map(|range| self.inputs.part(range))
    }

    pub fn slots(&self, layer: usize) -> Span {
        self.slot_of.part(4 * layer * EXPERTS..4 * (layer + 1) * EXPERTS)
    }

    fn experts(&self) -> ExpertArena<'_> {
        ExpertArena { span: &self.arena, block_bytes: self.block_bytes }
    }

    pub fn begin(&self) -> Result<(), CudaError> {
        let call = BeginStep {
            layout: self.step,
            block: &self.block.span(),
            slot_of: &self.slot_of,
            words: &self.words,
            inputs: &self.inputs,
        };
        begin_step(&self.lab.device, self.lab.device.compute(), call)
    }

    pub fn post(&self, layer: usize) -> Result<(), CudaError> {
        let [ids, weights, logits] = &self.layer_inputs(layer);
        let bytes = self.mailbox.bytes();
        let call = Post {
            layout: self.mailbox,
            mailbox: &self.mailboxes.span().part(layer * bytes..(layer + 1) * bytes),
            words: &self.words,
            ids,
            weights,
            slot_of: &self.slots(layer),
            arena: self.experts(),
            table: &self.table,
            missing: &self.missing,
            ahead: Some(AheadLogits { logits, pitch: PITCH }),
            x: &self.x(),
        };
        post(&self.lab.device, self.lab.device.compute(), call)
    }

    pub fn settle(&self, layer: usize) -> Result<(), CudaError> {
        self.settle_of(layer, &self.missing)
    }

    /// [`Machine::settle`] of the choices of another mask.
    pub fn settle_of(&self, layer: usize, missing: &Span) -> Result<(), CudaError> {
        let [ids, ..] = &self.layer_inputs(layer);
        let call = Settle {
            words: &self.words,
            missing,
            ids,
            k: K,
            decisions: &self.decisions.span().part(8 * layer * K..8 * (layer + 1) * K),
            arena: self.experts(),
            patience: self.patience,
            error: &self.error.span(),
            late: &self.late,
            from_host: &self.from_host,
        };
        settle(&self.lab.device, self.lab.device.compute(), call)
    }

    fn run_experts(&self, layer: usize, table: &Span) -> Result<(), CudaError> {
        let [ids, ..] = &self.layer_inputs(layer);
        let (device, stream) = (&self.lab.device, self.lab.device.compute());
        let choices = Choices {
            table,
            experts: EXPERTS,
            block_bytes: self.block_bytes,
            tokens: 1,
            k: K,
            ids: Some(ids),
            chosen: None,
        };
        let matrix =
            |which: usize| ExpertMatrix { format: Format::F32, offset: self.offsets[which] };
        let call = GateUp {
            choices,
            gate: matrix(0),
            up: matrix(1),
            gate_bias: None,
            up_bias: None,
            activation: GatedActivation::Silu,
            x: Input::Floats(&self.x()),
            hidden: HIDDEN,
            inner: INNER,
            out: &self.vectors,
        };
        gate_up(device, stream, call)?;
        let call = Down {
            choices,
            down: matrix(2),
            bias: None,
            hidden: HIDDEN,
            inner: INNER,
            vectors: &self.vectors,
            answers: &self.answers,
        };
        down(device, stream, call)
    }

    /// Every launch of a token.
    pub fn launch(&self) -> Result<(), CudaError> {
        self.begin()?;
        for layer in 0..LAYERS {
            self.post(layer)?;
            self.run_experts(layer, &self.table)?;
            self.settle(layer)?;
            self.run_experts(layer, &self.late)?;
            let [_, weights, _] = &self.layer_inputs(layer);
            let rows = &self.rows.span().part(self.rows_of(layer));
            let call = Combine {
                tokens: 1,
                k: K,
                hidden: HIDDEN,
                answers: &self.answers,
                weights,
                shared: None,
                residual: Some((&self.x(), 1.0)),
                out: None,
                host: Some(HostRows { rows, from_host: &self.from_host }),
            };
            combine(&self.lab.device, self.lab.device.compute(), call)?;
        }
        Ok(())
    }

    pub fn capture(&self) -> Graph {
        Graph::capture(self.lab.device.compute(), || self.launch()).unwrap()
    }

    fn rows_of(&self, layer: usize) -> std::ops::Range<usize> {
        4 * layer * K * HIDDEN..4 * (layer + 1) * K * HIDDEN
    }

    /// Bytes from the start of the rows to that of a choice's.
    pub fn row_at(&self, layer: usize, choice: usize) -> usize {
        4 * (layer * K + choice) * HIDDEN
    }

    /// What the host does before a step, and what no kernel may use.
    pub fn prepare(&self, step: u32, token: &Token, updates: &[(u32, u32)]) {
        self.step.write(&self.block, step, position(step), updates).unwrap();
        self.block.write(self.step.inputs_at(), &token.bytes());
        let stream = self.lab.device.compute();
        stream.fill(&self.vectors, 0xff).unwrap();
        stream.fill(&self.answers, 0xff).unwrap();
    }

    pub fn read_words(&self) -> Vec<i32> {
        self.lab.read_ints(&self.words)
    }

    pub fn read_masks(&self) -> [u32; 2] {
        [&self.missing, &self.from_host].map(|span| self.lab.read_ints(span)[0].cast_unsigned())
    }

    /// `table` and `late`, u64 `[EXPERTS]`.
    pub fn read_tables(&self) -> [Vec<u64>; 2] {
        [&self.table, &self.late].map(|span| {
            let bytes = self.lab.read(span);
            bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
        })
    }
}
