//! A KV cache's cells, and contexts on both sides.

use crate::lab::Lab;
use half::f16;
use half::slice::HalfFloatSliceExt;
use pregate_kernels::cuda::{
    At, Attend, AttendPlan, CellFormat, DeviceCells, OutputGate, STEP_WORDS, Span, attend,
};
use pregate_kernels::testing::Random;
use pregate_kernels::{AttentionCall, Backend, Cpu, CpuOptions, Isa, KvCells, KvView};

/// That there are kernels for.
pub fn tiles(format: CellFormat) -> Vec<usize> {
    if format == CellFormat::F16 { vec![1, 4, 8] } else { vec![1, 4] }
}

pub const FORMATS: [CellFormat; 2] = [CellFormat::F16, CellFormat::F32];

pub fn scalar() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(2), isa: Some(Isa::Scalar) }).unwrap()
}

/// As the runtime's cache stores them.
pub fn cell_bytes(format: CellFormat, values: &[f32]) -> Vec<u8> {
    match format {
        CellFormat::F32 => values.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        CellFormat::F16 => {
            let mut cells = vec![f16::ZERO; values.len()];
            cells.convert_from_f32_slice(values);
            cells.iter().flat_map(|x| x.to_ne_bytes()).collect()
        }
    }
}

pub fn half_cells(bytes: &[u8]) -> Vec<f16> {
    bytes.as_chunks().0.iter().map(|x| f16::from_ne_bytes(*x)).collect()
}

/// Cells as numbers.
pub fn cell_values(format: CellFormat, bytes: &[u8]) -> Vec<f32> {
    match format {
        CellFormat::F32 => bytes.as_chunks().0.iter().map(|x| f32::from_ne_bytes(*x)).collect(),
        CellFormat::F16 => half_cells(bytes).iter().map(|x| x.to_f32()).collect(),
    }
}

pub fn angles(tokens: usize, half: usize, rng: &mut Random) -> Vec<f32> {
    (0..tokens * half)
        .flat_map(|_| {
            let (sin, cos) = (rng.unit() * 7.0).sin_cos();
            [cos * 1.1, sin * 1.1]
        })
        .collect()
}

/// What `begin_step` leaves.
pub fn begin(lab: &Lab, words: &Span, position: i32) {
    let step: [i32; STEP_WORDS] = [1, position, 0, 0];
    let bytes: Vec<u8> = step.iter().flat_map(|word| word.to_ne_bytes()).collect();
    lab.device.compute().upload(words, &bytes).unwrap();
}

/// A context on both sides.
pub struct Context {
    pub q: Vec<f32>,
    /// Cells of both caches, `[positions, kv_heads, key + 8]`.
    pub cells: Vec<u8>,
    pub sinks: Vec<f32>,
    pub shape: Shape,
}

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub format: CellFormat,
    pub heads: usize,
    pub kv_heads: usize,
    pub key: usize,
    pub value: usize,
    pub first: usize,
    pub tokens: usize,
    pub window: Option<usize>,
    pub has_sinks: bool,
}

impl Context {
    pub fn new(shape: Shape, rng: &mut Random) -> Self {
        let Shape { format, heads, kv_heads, key, first, tokens, .. } = shape;
        let q: Vec<f32> = (0..tokens * heads * key).map(|_| rng.normal() * 4.0).collect();
        let count = (first + tokens) * kv_heads * (key + 8);
        let cells: Vec<f32> = (0..count).map(|_| rng.normal()).collect();
        let sinks = (0..heads).map(|_| rng.normal() * 3.0).collect();
        Self { q, cells: cell_bytes(format, &cells), sinks, shape }
    }

    fn position_stride(&self) -> usize {
        self.shape.kv_heads * (self.shape.key + 8)
    }

    /// Every cell of a position's row of a head becomes `bits`.
    pub fn overwrite(&mut self, position: usize, head: usize, value: f32) {
        let Shape { format, key, .. } = self.shape;
        let at = position * self.position_stride() + head * (key + 8);
        let bytes = cell_bytes(format, &vec![value; key + 8]);
        self.cells[at * format.bytes()..][..bytes.len()].copy_from_slice(&bytes);
    }

    /// Values are other cells of the rows than keys where there is room.
    fn value_offset(&self) -> usize {
        if self.shape.value == self.shape.key { 8 } else { 0 }
    }

    pub fn cpu(&self, cpu: &Cpu) -> Vec<f32> {
        let Shape { format, heads, kv_heads, key, value, first, tokens, window, has_sinks } =
            self.shape;
        let halves = half_cells(&self.cells);
        let floats = cell_values(CellFormat::F32, &self.cells);
        let view = |offset: usize, width: usize| KvView {
            cells: match format {
                CellFormat::F16 => KvCells::F16(&halves[offset..]),
                CellFormat::F32 => KvCells::F32(&floats[offset..]),
            },
            head_stride: key + 8,
            position_stride: self.position_stride(),
            width,
        };
        let mut out = vec![7.0; tokens * heads * value];
        cpu.attention(AttentionCall {
            q: &self.q,
            tokens,
            heads,
            kv_heads,
            keys: view(0, key),
            values: view(self.value_offset(), value),
            first_position: first,
            scale: 0.125,
            window,
            sinks: has_sinks.then_some(&self.sinks),
            out: &mut out,
        });
        out
    }

    pub fn on_device(&self, lab: &Lab, plan: Option<AttendPlan>) -> Vec<f32> {
        let buffers = self.upload(lab);
        let out = buffers.run(lab, &self.shape, plan, None);
        let counters = lab.read(&buffers.counters);
        assert!(counters.iter().all(|byte| *byte == 0), "{:?}: counters", self.shape);
        out
    }

    pub fn upload(&self, lab: &Lab) -> Buffers {
        let Shape { format, heads, kv_heads: _, key, value, first, tokens, .. } = self.shape;
        let span = lab.bytes(&self.cells);
        let cells = |offset: usize, width: usize| DeviceCells {
            format,
            span: span.part(offset * format.bytes()..span.bytes()),
            head_stride: key + 8,
            position_stride: self.position_stride(),
            width,
        };
        Buffers {
            q: lab.floats(&self.q),
            keys: cells(0, key),
            values: cells(self.value_offset(), value),
            sinks: lab.floats(&self.sinks),
            out: lab.space(4 * tokens * heads * value),
            scratch: lab.space(Attend::scratch_bytes(tokens, heads, value, first + tokens)),
            counters: lab.zeros(4 * tokens * heads),
        }
    }
}

pub struct Buffers {
    pub q: Span,
    pub keys: DeviceCells,
    pub values: DeviceCells,
    pub sinks: Span,
    pub out: Span,
    pub scratch: Span,
    pub counters: Span,
}

impl Buffers {
    pub fn call(&self, shape: &Shape) -> Attend<'_> {
        Attend {
            q: &self.q,
            tokens: shape.tokens,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            keys: &self.keys,
            values: &self.values,
            at: At::Host(shape.first),
            scale: 0.125,
            window: shape.window,
            sinks: shape.has_sinks.then_some(&self.sinks),
            gate: None,
            out: &self.out,
            scratch: &self.scratch,
            counters: &self.counters,
            plan: None,
        }
    }

    pub fn run(
        &self,
        lab: &Lab,
        shape: &Shape,
        plan: Option<AttendPlan>,
        gate: Option<OutputGate<'_>>,
    ) -> Vec<f32> {
        let call = Attend { plan, gate, ..self.call(shape) };
        attend(&lab.device, lab.device.compute(), call).unwrap();
        lab.read_floats(&self.out)
    }
}

pub const fn shape(heads: usize, kv_heads: usize, key: usize, value: usize, first: usize) -> Shape {
    Shape {
        format: CellFormat::F16,
        heads,
        kv_heads,
        key,
        value,
        first,
        tokens: 1,
        window: None,
        has_sinks: false,
    }
}
