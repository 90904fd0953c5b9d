//! Attention kernels against the CPU backend and the operations of the
//! forward pass, in bits.

mod lab;

use half::f16;
use half::slice::HalfFloatSliceExt;
use lab::{Lab, assert_same_bits, numbers};
use pregate_kernels::cuda::{
    At, Attend, AttendPlan, CellFormat, CudaError, DeviceCells, HeadNorms, OutputGate, Pairs,
    PrepareHeads, PrepareLatent, Rotation, Span, attend, prepare_heads, prepare_latent,
};
use pregate_kernels::testing::Random;
use pregate_kernels::{
    AttentionCall, Backend, Cpu, CpuOptions, Isa, KvCells, KvView, contract, ops,
};

/// That there are kernels for.
fn tiles(format: CellFormat) -> Vec<usize> {
    if format == CellFormat::F16 { vec![1, 4, 8] } else { vec![1, 4] }
}

const FORMATS: [CellFormat; 2] = [CellFormat::F16, CellFormat::F32];

fn scalar() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(2), isa: Some(Isa::Scalar) }).unwrap()
}

/// As the runtime's cache stores them.
fn cell_bytes(format: CellFormat, values: &[f32]) -> Vec<u8> {
    match format {
        CellFormat::F32 => values.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        CellFormat::F16 => {
            let mut cells = vec![f16::ZERO; values.len()];
            cells.convert_from_f32_slice(values);
            cells.iter().flat_map(|x| x.to_ne_bytes()).collect()
        }
    }
}

fn half_cells(bytes: &[u8]) -> Vec<f16> {
    bytes.as_chunks().0.iter().map(|x| f16::from_ne_bytes(*x)).collect()
}

/// Cells as numbers.
fn cell_values(format: CellFormat, bytes: &[u8]) -> Vec<f32> {
    match format {
        CellFormat::F32 => bytes.as_chunks().0.iter().map(|x| f32::from_ne_bytes(*x)).collect(),
        CellFormat::F16 => half_cells(bytes).iter().map(|x| x.to_f32()).collect(),
    }
}

/// Rotation of the forward pass (`runtime/src/model/rope.rs`).
fn rotate(pairs: Pairs, angles: &[f32], head: &mut [f32]) {
    let half = angles.len() / 2;
    for (i, angle) in angles.as_chunks::<2>().0.iter().enumerate() {
        let [cos, sin] = *angle;
        let (at_a, at_b) = match pairs {
            Pairs::Halves => (i, i + half),
            Pairs::Neighbours => (2 * i, 2 * i + 1),
        };
        let (a, b) = (head[at_a], head[at_b]);
        head[at_a] = a * cos - b * sin;
        head[at_b] = b * cos + a * sin;
    }
}

fn angles(tokens: usize, half: usize, rng: &mut Random) -> Vec<f32> {
    (0..tokens * half)
        .flat_map(|_| {
            let (sin, cos) = (rng.unit() * 7.0).sin_cos();
            [cos * 1.1, sin * 1.1]
        })
        .collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Norm {
    None,
    Head,
    Whole,
}

#[derive(Clone, Copy, Debug)]
struct Heads {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    half: usize,
    pairs: Pairs,
    norm: Norm,
    is_gated: bool,
    limit: Option<f32>,
}

#[test]
fn heads_are_prepared_with_the_bits_of_the_forward_pass() {
    let Some(lab) = Lab::open() else { return };
    use Norm::{Head, Whole};
    use Pairs::{Halves, Neighbours};
    let case = |tokens, heads, kv_heads, width, half, pairs, norm| Heads {
        tokens,
        heads,
        kv_heads,
        width,
        half,
        pairs,
        norm,
        is_gated: false,
        limit: None,
    };
    let cases = [
        case(1, 8, 2, 128, 64, Halves, Head),
        case(3, 4, 4, 64, 32, Halves, Whole),
        Heads { limit: Some(1.25), ..case(2, 16, 16, 128, 64, Halves, Whole) },
        case(2, 6, 2, 64, 32, Neighbours, Norm::None),
        Heads { is_gated: true, ..case(3, 4, 1, 256, 32, Halves, Head) },
        // Odd shapes: half a round of lanes, nothing turned, an odd share.
        case(5, 3, 1, 40, 12, Neighbours, Head),
        Heads { limit: Some(0.5), ..case(1, 1, 1, 80, 0, Halves, Norm::None) },
        case(1, 2, 1, 33, 16, Halves, Whole),
    ];
    let mut rng = Random::new(11);
    for (n, case) in cases.into_iter().enumerate() {
        for format in FORMATS {
            prepare_case(&lab, case, format, n * 7, &mut rng);
        }
    }
}

fn prepare_case(lab: &Lab, case: Heads, format: CellFormat, first: usize, rng: &mut Random) {
    let Heads { tokens, heads, kv_heads, width, half, pairs, norm, is_gated, limit } = case;
    let q_each = if is_gated { 2 * width } else { width };
    let mut q_raw = numbers(tokens * heads * q_each, rng);
    let mut k_raw = numbers(tokens * kv_heads * width, rng);
    let mut v_raw = numbers(tokens * kv_heads * width, rng);
    for raw in [&mut q_raw, &mut k_raw, &mut v_raw] {
        let at = rng.below(raw.len());
        raw[at] = rng.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    }
    let norm_widths = match norm {
        Norm::Whole => (heads * width, kv_heads * width),
        _ => (width, width),
    };
    let weights = (numbers(norm_widths.0, rng), numbers(norm_widths.1, rng));
    let table = angles(tokens, half, rng);
    let epsilon = 1e-6;

    // Reference.
    let mut q: Vec<f32> =
        q_raw.chunks_exact(q_each).flat_map(|head| &head[..width]).copied().collect();
    let (mut k, mut v) = (k_raw.clone(), v_raw.clone());
    if let Some(limit) = limit {
        for values in [&mut q, &mut k, &mut v] {
            values.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
        }
    }
    if norm != Norm::None {
        q.chunks_exact_mut(norm_widths.0)
            .for_each(|x| ops::rms_norm_in_place(x, &weights.0, epsilon));
        k.chunks_exact_mut(norm_widths.1)
            .for_each(|x| ops::rms_norm_in_place(x, &weights.1, epsilon));
    }
    for (values, count) in [(&mut q, heads), (&mut k, kv_heads)] {
        for (token, row) in values.chunks_exact_mut(count * width).enumerate() {
            let angles = &table[token * 2 * half..(token + 1) * 2 * half];
            row.chunks_exact_mut(width).for_each(|head| rotate(pairs, angles, head));
        }
    }

    // Keys lie head by head, values position by position, both with gaps.
    let capacity = first + tokens + 2;
    let cells = |is_key: bool| DeviceCells {
        format,
        span: lab.space(kv_heads * capacity * (width + 3) * format.bytes()),
        head_stride: if is_key { capacity * (width + 3) } else { width + 3 },
        position_stride: if is_key { width + 3 } else { kv_heads * (width + 3) },
        width,
    };
    let (keys, values) = (cells(true), cells(false));
    let q_out = lab.space(4 * tokens * heads * width);
    let (q_norm, k_norm) = (lab.floats(&weights.0), lab.floats(&weights.1));
    let call = PrepareHeads {
        q_raw: &lab.floats(&q_raw),
        is_gated,
        k_raw: &lab.floats(&k_raw),
        v_raw: &lab.floats(&v_raw),
        norms: (norm != Norm::None).then_some(HeadNorms {
            q: &q_norm,
            k: &k_norm,
            is_whole: norm == Norm::Whole,
            epsilon,
        }),
        limit,
        rotation: Rotation { table: &lab.floats(&table), half, pairs },
        q: &q_out,
        keys: &keys,
        values: &values,
        tokens,
        heads,
        kv_heads,
        width,
        at: At::Host(first),
    };
    let heads_bytes = 4 * tokens * width * 2 * (heads + kv_heads) + 8 * tokens * half;
    let cell_count = 2 * tokens * kv_heads * width;
    assert_eq!(call.bytes(), (heads_bytes + cell_count * format.bytes()) as u64);
    prepare_heads(&lab.device, lab.device.compute(), call).unwrap();

    let what = format!("{case:?}, {format:?}");
    assert_same_bits(&lab.read_floats(&q_out), &q, &what);
    for (cells, rows) in [(&keys, &k), (&values, &v)] {
        // The whole cache: what lies between is left alone.
        let mut want = vec![0xffu8; cells.span.bytes()];
        for (i, row) in rows.chunks_exact(width).enumerate() {
            let (token, head) = (i / kv_heads, i % kv_heads);
            let at = head * cells.head_stride + (first + token) * cells.position_stride;
            let bytes = cell_bytes(format, row);
            want[at * format.bytes()..][..bytes.len()].copy_from_slice(&bytes);
        }
        let got = lab.read(&cells.span);
        assert_same_bits(&cell_values(format, &got), &cell_values(format, &want), &what);
    }
}

#[test]
fn rounding_to_half_cells_is_to_nearest_even() {
    let Some(lab) = Lab::open() else { return };
    // Ties, overflow to infinity, subnormal halves, zeros of both signs.
    let mut values: Vec<f32> = vec![
        1.0 + 1.0 / 2048.0,
        1.0 + 3.0 / 2048.0,
        -(1.0 + 1.0 / 2048.0),
        65519.0,
        65520.0,
        -65520.0,
        6e-8,
        2.98e-8,
        2.99e-8,
        f32::MIN_POSITIVE,
        -0.0,
        f32::INFINITY,
    ];
    let mut rng = Random::new(3);
    values.resize_with(128, || f32::from_bits(rng.bits() as u32 & 0x7fff_ffff));
    let width = values.len();
    let cells = || DeviceCells {
        format: CellFormat::F16,
        span: lab.space(2 * width),
        head_stride: 0,
        position_stride: width,
        width,
    };
    let (keys, cells) = (cells(), cells());
    let raw = lab.floats(&values);
    prepare_heads(
        &lab.device,
        lab.device.compute(),
        PrepareHeads {
            q_raw: &raw,
            is_gated: false,
            k_raw: &raw,
            v_raw: &raw,
            norms: None,
            limit: None,
            rotation: Rotation { table: &lab.zeros(16), half: 0, pairs: Pairs::Halves },
            q: &lab.space(4 * width),
            keys: &keys,
            values: &cells,
            tokens: 1,
            heads: 1,
            kv_heads: 1,
            width,
            at: At::Host(0),
        },
    )
    .unwrap();
    let want: Vec<f32> = values.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
    assert_eq!(want[..3], [1.0, 1.0 + 1.0 / 512.0, -1.0]);
    for span in [&keys.span, &cells.span] {
        let got = cell_values(CellFormat::F16, &lab.read(span));
        assert_same_bits(&got, &want, &"rounding");
    }
}

#[test]
fn latent_rows_are_prepared_with_the_bits_of_the_forward_pass() {
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(12);
    // tokens, heads, nope, rope, rank, half, pairs
    let cases = [
        (1, 16, 128, 64, 512, 32, Pairs::Neighbours),
        (3, 4, 16, 8, 32, 4, Pairs::Neighbours),
        (2, 5, 24, 40, 96, 16, Pairs::Halves),
    ];
    for (tokens, heads, nope, rope, rank, half, pairs) in cases {
        for format in FORMATS {
            let (q_head, row) = (nope + rope, rank + rope);
            let q_raw = numbers(tokens * heads * q_head, &mut rng);
            let mut kv_raw = numbers(tokens * row, &mut rng);
            kv_raw[rng.below(row)] = f32::NAN;
            let weight = numbers(rank, &mut rng);
            let table = angles(tokens, half, &mut rng);
            let (epsilon, first) = (1e-5, 9);

            let turn = |token: usize, part: &mut [f32]| {
                rotate(pairs, &table[token * 2 * half..(token + 1) * 2 * half], part);
            };
            let mut want_q = vec![f32::NAN; tokens * heads * row];
            for (i, want) in want_q.chunks_exact_mut(row).enumerate() {
                want[rank..].copy_from_slice(&q_raw[i * q_head + nope..(i + 1) * q_head]);
                turn(i / heads, &mut want[rank..]);
            }
            let mut want_rows = kv_raw.clone();
            for (token, row) in want_rows.chunks_exact_mut(row).enumerate() {
                ops::rms_norm_in_place(&mut row[..rank], &weight, epsilon);
                turn(token, &mut row[rank..]);
            }

            let absorbed = lab.space(4 * tokens * heads * row);
            let cells = DeviceCells {
                format,
                span: lab.space((first + tokens) * row * format.bytes()),
                head_stride: 0,
                position_stride: row,
                width: row,
            };
            let call = PrepareLatent {
                q_raw: &lab.floats(&q_raw),
                kv_raw: &lab.floats(&kv_raw),
                kv_norm: &lab.floats(&weight),
                epsilon,
                rotation: Rotation { table: &lab.floats(&table), half, pairs },
                absorbed: &absorbed,
                cells: &cells,
                tokens,
                heads,
                nope,
                rope,
                rank,
                at: At::Host(first),
            };
            prepare_latent(&lab.device, lab.device.compute(), call).unwrap();
            let what = format!("{heads} heads of {nope} + {rope}, rank {rank}, {format:?}");
            let got = lab.read_floats(&absorbed);
            assert_same_bits(&got, &want_q, &what);
            let got = cell_values(format, &lab.read(&cells.span));
            let want = cell_values(format, &cell_bytes(format, &want_rows));
            assert_same_bits(&got[first * row..], &want, &what);
            assert!(got[..first * row].iter().all(|x| x.is_nan()), "{what}: earlier rows");
        }
    }
}

/// A context on both sides.
struct Context {
    q: Vec<f32>,
    /// Cells of both caches, `[positions, kv_heads, key + 8]`.
    cells: Vec<u8>,
    sinks: Vec<f32>,
    shape: Shape,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    format: CellFormat,
    heads: usize,
    kv_heads: usize,
    key: usize,
    value: usize,
    first: usize,
    tokens: usize,
    window: Option<usize>,
    has_sinks: bool,
}

impl Context {
    fn new(shape: Shape, rng: &mut Random) -> Self {
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
    fn overwrite(&mut self, position: usize, head: usize, value: f32) {
        let Shape { format, key, .. } = self.shape;
        let at = position * self.position_stride() + head * (key + 8);
        let bytes = cell_bytes(format, &vec![value; key + 8]);
        self.cells[at * format.bytes()..][..bytes.len()].copy_from_slice(&bytes);
    }

    /// Values are other cells of the rows than keys where there is room.
    fn value_offset(&self) -> usize {
        if self.shape.value == self.shape.key { 8 } else { 0 }
    }

    fn cpu(&self, cpu: &Cpu) -> Vec<f32> {
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

    fn on_device(&self, lab: &Lab, plan: Option<AttendPlan>) -> Vec<f32> {
        let buffers = self.upload(lab);
        let out = buffers.run(lab, &self.shape, plan, None);
        let counters = lab.read(&buffers.counters);
        assert!(counters.iter().all(|byte| *byte == 0), "{:?}: counters", self.shape);
        out
    }

    fn upload(&self, lab: &Lab) -> Buffers {
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

struct Buffers {
    q: Span,
    keys: DeviceCells,
    values: DeviceCells,
    sinks: Span,
    out: Span,
    scratch: Span,
    counters: Span,
}

impl Buffers {
    fn call(&self, shape: &Shape) -> Attend<'_> {
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

    fn run(
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

const fn shape(heads: usize, kv_heads: usize, key: usize, value: usize, first: usize) -> Shape {
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

/// Every head shape of the supported models; contexts around the borders of
/// chunks and stages; groups of 1, 2, 4, 8 and 16 queries.
#[test]
fn attention_has_the_bits_of_the_cpu() {
    let Some(lab) = Lab::open() else { return };
    let sinks = |shape| Shape { has_sinks: true, ..shape };
    let tokens = |tokens, shape| Shape { tokens, ..shape };
    let window = |window, shape| Shape { window: Some(window), ..shape };
    let cases = [
        shape(2, 2, 64, 64, 0),
        shape(4, 1, 128, 128, 14),
        sinks(shape(8, 1, 64, 64, 254)),
        shape(8, 1, 128, 128, 255),
        shape(2, 1, 128, 128, 256),
        window(128, sinks(shape(8, 1, 64, 64, 999))),
        window(1, shape(2, 2, 64, 64, 300)),
        shape(4, 1, 192, 128, 70),
        shape(8, 1, 256, 256, 300),
        shape(16, 1, 576, 512, 20),
        shape(4, 1, 576, 512, 260),
        tokens(3, shape(8, 2, 64, 64, 254)),
        tokens(8, window(70, sinks(shape(4, 2, 64, 64, 510)))),
        tokens(5, shape(3, 1, 40, 24, 63)),
        tokens(2, shape(16, 1, 64, 64, 63)),
        tokens(8, shape(1, 1, 80, 80, 0)),
    ];
    let cpu = scalar();
    let mut rng = Random::new(21);
    for case in cases {
        for format in FORMATS {
            let context = Context::new(Shape { format, ..case }, &mut rng);
            let what = format!("{:?}", context.shape);
            assert_same_bits(&context.on_device(&lab, None), &context.cpu(&cpu), &what);
        }
    }
}

#[test]
fn a_long_context_is_merged_in_index_order() {
    let Some(lab) = Lab::open() else { return };
    let context = Context::new(shape(2, 1, 64, 64, 4999), &mut Random::new(22));
    let want = context.cpu(&scalar());
    for merges_apart in [false, true] {
        let plan = AttendPlan { tile: 4, merges_apart };
        assert_same_bits(&context.on_device(&lab, Some(plan)), &want, &format!("{plan:?}"));
    }
}

#[test]
fn tiles_and_merges_do_not_reach_the_bits() {
    let Some(lab) = Lab::open() else { return };
    let case = Shape { tokens: 3, window: Some(200), has_sinks: true, ..shape(5, 1, 64, 72, 255) };
    for format in FORMATS {
        let context = Context::new(Shape { format, ..case }, &mut Random::new(23));
        let want = context.cpu(&scalar());
        let buffers = context.upload(&lab);
        for tile in tiles(format) {
            for merges_apart in [false, true] {
                let plan = AttendPlan { tile, merges_apart };
                // The same scratch memory and counters, over and over.
                let got = buffers.run(&lab, &context.shape, Some(plan), None);
                assert_same_bits(&got, &want, &format!("{format:?}, {plan:?}"));
            }
        }
    }
}

#[test]
fn cells_out_of_sight_do_not_matter_and_seen_nans_do() {
    let Some(lab) = Lab::open() else { return };
    let cpu = scalar();
    // Three queries to a cache head: a warp's pairs are of different tokens.
    let case = Shape { tokens: 4, window: Some(60), ..shape(6, 2, 64, 64, 290) };
    for format in FORMATS {
        let clean = Context::new(Shape { format, ..case }, &mut Random::new(24));
        let want = clean.cpu(&cpu);
        assert!(want.iter().all(|x| x.is_finite()));
        // The first query sees 231..=290, the last 234..=293.
        let mut context = Context::new(Shape { format, ..case }, &mut Random::new(24));
        for position in 0..231 {
            context.overwrite(position, 0, f32::NAN);
            context.overwrite(position, 1, f32::INFINITY);
        }
        assert_same_bits(&context.on_device(&lab, None), &want, &"before the window");
        // Seen by some of the tokens only: by 0, by 0 to 2, by 3.
        for (position, value) in [(231, f32::NAN), (233, f32::INFINITY), (293, f32::NAN)] {
            let mut context = Context::new(Shape { format, ..case }, &mut Random::new(24));
            context.overwrite(position, 1, value);
            let want = context.cpu(&cpu);
            let bad = want.iter().filter(|x| x.is_nan()).count();
            assert!(bad > 0 && bad < want.len(), "{position}: {bad}");
            let what = format!("{format:?}, {value} at {position}");
            for tile in tiles(format) {
                let plan = AttendPlan { tile, merges_apart: false };
                assert_same_bits(&context.on_device(&lab, Some(plan)), &want, &what);
            }
        }
    }
}

#[test]
fn logits_that_are_all_minus_infinity_give_what_the_cpu_gives() {
    let Some(lab) = Lab::open() else { return };
    let cpu = scalar();
    for has_sinks in [false, true] {
        let case = Shape { format: CellFormat::F32, has_sinks, ..shape(2, 1, 64, 64, 300) };
        let mut context = Context::new(case, &mut Random::new(25));
        context.q.fill(1.0);
        for position in 0..=300 {
            context.overwrite(position, 0, if position < 256 { f32::NEG_INFINITY } else { 0.5 });
        }
        assert_same_bits(&context.on_device(&lab, None), &context.cpu(&cpu), &"minus infinity");
    }
}

#[test]
fn output_gates_are_sigmoids_of_the_second_half_of_the_projection() {
    let Some(lab) = Lab::open() else { return };
    let context =
        Context::new(Shape { tokens: 2, ..shape(4, 2, 64, 64, 258) }, &mut Random::new(26));
    let mut rng = Random::new(27);
    let raw: Vec<f32> = (0..2 * 4 * 128).map(|_| rng.normal() * 9.0).collect();
    let mut want = context.cpu(&scalar());
    for (i, value) in want.iter_mut().enumerate() {
        *value *= contract::sigmoid(raw[i / 64 * 128 + 64 + i % 64]);
    }
    let buffers = context.upload(&lab);
    let raw = lab.floats(&raw);
    let gates = raw.part(4 * 64..raw.bytes());
    for merges_apart in [false, true] {
        let plan = Some(AttendPlan { tile: 4, merges_apart });
        let gate = Some(OutputGate { span: &gates, stride: 128 });
        let got = buffers.run(&lab, &context.shape, plan, gate);
        assert_same_bits(&got, &want, &"gated");
    }
}

#[test]
fn plans_fill_the_device_and_fit_shared_memory() {
    let Some(lab) = Lab::open() else { return };
    let plan = |shape: Shape, multiprocessors: usize| {
        let context = Context::new(Shape { tokens: 1, first: 0, ..shape }, &mut Random::new(1));
        let buffers = context.upload(&lab);
        let call = buffers.call(&context.shape);
        let call = Attend { tokens: shape.tokens, at: At::Host(shape.first), ..call };
        call.choose_plan(multiprocessors).unwrap()
    };
    // Qwen3-30B-A3B: 32 heads over 4 of the cache.
    let qwen = shape(32, 4, 128, 128, 8191);
    assert_eq!(plan(qwen, 128), AttendPlan { tile: 8, merges_apart: false });
    assert_eq!(plan(Shape { first: 4095, ..qwen }, 128).tile, 4);
    assert_eq!(plan(Shape { format: CellFormat::F32, ..qwen }, 128).tile, 4);
    assert!(plan(Shape { first: 8192, ..qwen }, 128).merges_apart);
    // A head of its own each.
    assert_eq!(plan(shape(16, 16, 128, 128, 4000), 128).tile, 1);
    // Latent rows: eight queries of 576 numbers do not fit.
    assert_eq!(plan(Shape { tokens: 8, ..shape(16, 1, 576, 512, 30000) }, 128).tile, 4);
}

#[test]
fn calls_whose_sizes_do_not_fit_are_errors() {
    let Some(lab) = Lab::open() else { return };
    let context = Context::new(shape(4, 2, 64, 64, 300), &mut Random::new(28));
    let buffers = context.upload(&lab);
    let call = || buffers.call(&context.shape);
    let run = |call: Attend<'_>| attend(&lab.device, lab.device.compute(), call);
    let is_shape = |result| matches!(result, Err(CudaError::Shape { .. }));
    run(call()).unwrap();
    let small = lab.space(64);
    assert!(is_shape(run(Attend { kv_heads: 3, ..call() })));
    assert!(is_shape(run(Attend { kv_heads: 0, ..call() })));
    assert!(is_shape(run(Attend { q: &small, ..call() })));
    assert!(is_shape(run(Attend { out: &small, ..call() })));
    assert!(is_shape(run(Attend { scratch: &small, ..call() })));
    assert!(is_shape(run(Attend { counters: &lab.space(8), ..call() })));
    assert!(is_shape(run(Attend { sinks: Some(&lab.space(8)), ..call() })));
    // One position more than there are cells.
    assert!(is_shape(run(Attend { at: At::Host(301), ..call() })));
    assert!(is_shape(run(Attend { at: At::Host(usize::MAX), ..call() })));
    let gate = OutputGate { span: &small, stride: 64 };
    assert!(is_shape(run(Attend { gate: Some(gate), ..call() })));
    for tile in [0, 2, 3, 16] {
        let plan = AttendPlan { tile, merges_apart: false };
        assert!(is_shape(run(Attend { plan: Some(plan), ..call() })));
    }
    let narrow = DeviceCells { width: 60, ..buffers.keys.clone() };
    let result = run(Attend { keys: &narrow, ..call() });
    assert!(matches!(result, Err(CudaError::Unsupported { .. })));
    // No tokens: nothing is launched.
    run(Attend { tokens: 0, ..call() }).unwrap();
}

#[test]
fn bytes_count_what_a_window_shows() {
    let Some(lab) = Lab::open() else { return };
    let context = Context::new(shape(4, 2, 64, 64, 300), &mut Random::new(29));
    let buffers = context.upload(&lab);
    let all = buffers.call(&context.shape).bytes();
    // 301 positions of two heads; queries and answers; two chunks' parts.
    assert_eq!(all, 2 * 301 * 2 * 64 * 2 + 4 * 4 * (128 + 2 * 2 * 66));
    let window = Shape { window: Some(40), ..context.shape };
    let seen = buffers.call(&window).bytes();
    assert_eq!(seen, 2 * 40 * 2 * 64 * 2 + 4 * 4 * (128 + 2 * 66));
}
