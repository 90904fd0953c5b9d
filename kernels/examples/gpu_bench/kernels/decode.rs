//! One token: norm, products of every format, routers, experts, logits.

use super::{Bench, Cost, Pool, matrix_bytes};
use pregate_kernels::{
    Format, GatedActivation,
    cuda::{
        Arena, Choices, Combine, CudaError, Down, ExpertMatrix, GateUp, Gemv, Input, Norm,
        NormKind, Quantise, QuantisedSpans, Span, combine, down, gate_up, gemv,
        logits::{self, BestLogits, LogitsScratch},
        norm, quantise,
        router::{
            self, Ahead, Chosen, RouterLayer, RouterNorm, RouterNormKind, RouterScratch,
            RouterStep, RouterTable,
        },
    },
    routing::{RoutingRule, Scores},
};

pub fn measure(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    bench.report.heading("one token");
    norms(bench)?;
    for format in Format::ALL {
        let (rows, cols) = bench.pick((4096, 2048), (64, 512));
        product(bench, format, rows, cols)?;
    }
    let (rows, cols) = bench.pick((151_936, 2048), (256, 512));
    product(bench, Format::Q6K, rows, cols)?;
    for model in MODELS {
        step(bench, model)?;
        model.measure(bench)?;
    }
    best_logits(bench)
}

/// Activations of one token as rows of `format` want them.
enum Activations {
    Floats(Span),
    Quantised(QuantisedSpans),
}

impl Activations {
    fn new(
        bench: &Bench<'_>,
        arena: &Arena,
        format: Format,
        cols: usize,
    ) -> Result<Self, CudaError> {
        let x = bench.floats(arena, cols, 2)?;
        if format.block_len() == 1 {
            return Ok(Self::Floats(x));
        }
        let to = QuantisedSpans::take(arena, format.block_len(), 1, cols)?;
        let call = Quantise { rows: 1, cols, x: &x, stride: cols, to: &to };
        quantise(bench.device, bench.device.compute(), call)?;
        Ok(Self::Quantised(to))
    }

    fn input(&self) -> Input<'_> {
        match self {
            Self::Floats(x) => Input::Floats(x),
            Self::Quantised(x) => Input::Quantised(x),
        }
    }
}

fn norms(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    let width = bench.pick(4096, 512);
    let arena = bench.device.arena(16 * width + (1 << 16))?;
    let (x, weight) = (bench.floats(&arena, width, 3)?, bench.floats(&arena, width, 4)?);
    let out = bench.zeros(&arena, 4 * width)?;
    let quantised = QuantisedSpans::take(&arena, 256, 1, width)?;
    let (device, stream) = (bench.device, bench.device.compute());
    let forms = [&quantised];
    let call = || Norm {
        kind: NormKind::Rms,
        rows: 1,
        width,
        x: &x,
        x_stride: width,
        delta: None,
        weight: &weight,
        epsilon: 1e-6,
        out: Some((&out, width)),
        quantised: &forms,
    };
    bench.row(&format!("norm, {width}"), Cost::Bytes(call().bytes()), &mut |_| {
        norm(device, stream, call())
    })
}

fn product(
    bench: &mut Bench<'_>,
    format: Format,
    rows: usize,
    cols: usize,
) -> Result<(), CudaError> {
    let pool = Pool::new(bench, format, matrix_bytes(format, rows, cols), 1)?;
    let arena = bench.device.arena(4 * rows + 16 * cols + (1 << 16))?;
    let x = Activations::new(bench, &arena, format, cols)?;
    let out = bench.zeros(&arena, 4 * rows)?;
    let first = pool.matrix(0, rows, cols)?;
    let bytes = Gemv::one(&first, 1, x.input(), None, &out).bytes();
    let (device, stream) = (bench.device, bench.device.compute());
    bench.row(&format!("gemv {format}, {rows} x {cols}"), Cost::Bytes(bytes), &mut |i| {
        let weight = pool.matrix(i, rows, cols)?;
        gemv(device, stream, Gemv::one(&weight, 1, x.input(), None, &out))
    })
}

/// A model's experts.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    experts: usize,
    top_k: usize,
    hidden: usize,
    inner: usize,
    up: Format,
    down: Format,
    activation: GatedActivation,
}

const SILU: GatedActivation = GatedActivation::Silu;
const CLAMPED: GatedActivation = GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };

const fn model(
    name: &'static str,
    (experts, top_k): (usize, usize),
    (hidden, inner): (usize, usize),
    (up, down): (Format, Format),
    activation: GatedActivation,
) -> Model {
    Model { name, experts, top_k, hidden, inner, up, down, activation }
}

const MODELS: [Model; 6] = [
    model("OLMoE", (64, 8), (2048, 1024), (Format::Q4K, Format::Q6K), SILU),
    model("Qwen3-30B-A3B", (128, 8), (2048, 768), (Format::Q4K, Format::Q6K), SILU),
    model("Mixtral", (8, 2), (4096, 14336), (Format::Q4K, Format::Q6K), SILU),
    model("gpt-oss-20b", (32, 4), (2880, 2880), (Format::Mxfp4, Format::Mxfp4), CLAMPED),
    model("DeepSeek-V2-Lite", (64, 6), (2048, 1408), (Format::Q4K, Format::Q8_0), SILU),
    model("Qwen3.5-35B-A3B", (256, 8), (2048, 512), (Format::Q4K, Format::Q6K), SILU),
];

impl Model {
    /// With few rows of the same kind, where it runs once.
    fn scaled(self, bench: &Bench<'_>) -> Self {
        let cut = |n: usize| if n.is_multiple_of(256) { 512.min(n) } else { 160 };
        if bench.is_full() {
            return self;
        }
        let (hidden, inner) = match self.down.block_len() {
            32 if self.up.block_len() == 256 => (512, 160),
            _ => (cut(self.hidden), cut(self.inner)),
        };
        Self { experts: 8.min(self.experts), top_k: 2, hidden, inner, ..self }
    }

    /// Gate and up, then down, of the chosen experts; then what adds them up.
    fn measure(self, bench: &mut Bench<'_>) -> Result<(), CudaError> {
        let model = self.scaled(bench);
        let Model { name, top_k: k, hidden, inner, up, down: last, activation, .. } = model;
        let half = matrix_bytes(up, inner, hidden).next_multiple_of(16);
        let (device, stream) = (bench.device, bench.device.compute());
        let arena = device.arena(16 * hidden + 8 * k * (inner + hidden) + (4 << 20))?;
        let x = Activations::new(bench, &arena, up, hidden)?;
        let vectors = bench.floats(&arena, k * inner, 5)?;
        let answers = bench.zeros(&arena, 4 * k * hidden)?;
        let label = |what: &str, format| format!("{name} {what}, {k} of {inner} {format}");

        let pool = Pool::new(bench, up, 2 * half, k)?;
        let (table, sets) = tables(bench, &pool, k)?;
        let gate = |i: usize| GateUp {
            choices: choices(&table, &pool, 2 * half, k, &sets[i % sets.len()]),
            gate: ExpertMatrix { format: up, offset: 0 },
            up: ExpertMatrix { format: up, offset: half },
            gate_bias: None,
            up_bias: None,
            activation,
            x: x.input(),
            hidden,
            inner,
            out: &vectors,
        };
        let bytes = gate(0).bytes();
        bench.row(&label("gate, up", up), Cost::Bytes(bytes), &mut |i| {
            gate_up(device, stream, gate(i))
        })?;

        let block = matrix_bytes(last, hidden, inner);
        let pool = Pool::new(bench, last, block, k)?;
        let (table, sets) = tables(bench, &pool, k)?;
        let call = |i: usize| Down {
            choices: choices(&table, &pool, block, k, &sets[i % sets.len()]),
            down: ExpertMatrix { format: last, offset: 0 },
            bias: None,
            hidden,
            inner,
            vectors: &vectors,
            answers: &answers,
        };
        let bytes = call(0).bytes();
        bench.row(&label("down", last), Cost::Bytes(bytes), &mut |i| {
            down(device, stream, call(i))
        })?;

        let weights = bench.floats(&arena, k, 6)?;
        let out = bench.zeros(&arena, 4 * hidden)?;
        let sum = || Combine {
            tokens: 1,
            k,
            hidden,
            answers: &answers,
            weights: &weights,
            shared: None,
            residual: None,
            out: Some(&out),
            host: None,
        };
        bench.row(&format!("{name} combine"), Cost::Bytes(sum().bytes()), &mut |_| {
            combine(device, stream, sum())
        })
    }
}

/// The addresses of all experts of a pool, and lists of `k` of them that name
/// all in turn.
fn tables(bench: &Bench<'_>, pool: &Pool, k: usize) -> Result<(Span, Vec<Span>), CudaError> {
    let bytes: Vec<u8> = (0..pool.count).flat_map(|i| pool.address(i).to_le_bytes()).collect();
    let lists = pool.count / k;
    let arena = bench.device.arena(bytes.len() + 256 * (lists + 2))?;
    let table = arena.take(bytes.len(), 256)?;
    bench.device.compute().upload(&table, &bytes)?;
    let list = |i: usize| {
        let ids: Vec<i32> = (i * k..(i + 1) * k).map(|id| id as i32).collect();
        bench.integers(&arena, &ids)
    };
    Ok((table, (0..lists).map(list).collect::<Result<_, _>>()?))
}

fn choices<'a>(
    table: &'a Span,
    pool: &Pool,
    block_bytes: usize,
    k: usize,
    ids: &'a Span,
) -> Choices<'a> {
    Choices { table, experts: pool.count, block_bytes, tokens: 1, k, ids: Some(ids), chosen: None }
}

/// One layer's choice, and forecasts for two more from the same state.
fn step(bench: &mut Bench<'_>, model: Model) -> Result<(), CudaError> {
    const LAYERS: usize = 3;
    let Model { name, experts, top_k, hidden, .. } = model;
    let pool = Pool::new(bench, Format::F32, matrix_bytes(Format::F32, experts, hidden), LAYERS)?;
    let (device, stream) = (bench.device, bench.device.compute());
    let count = pool.count / LAYERS * LAYERS;
    let records = count * RouterTable::LAYER_BYTES + RouterScratch::BYTES;
    let arena = device.arena(records + 8 * hidden + (1 << 16))?;
    let (state, weight) = (bench.floats(&arena, hidden, 7)?, bench.floats(&arena, hidden, 8)?);
    let layer = |i| {
        let norm = RouterNorm {
            kind: RouterNormKind::Rms,
            epsilon: 1e-6,
            weight: weight.clone(),
            bias: None,
        };
        let rule = RoutingRule::Scored {
            top_k,
            scores: Scores::Softmax,
            groups: 1,
            groups_used: 1,
            renormalise: true,
            scale: 1.0,
        };
        let weight = pool.matrix(i, experts, hidden)?;
        Ok::<_, CudaError>(RouterLayer { norm, weight, bias: None, selection_bias: None, rule })
    };
    let layers = (0..count).map(layer).collect::<Result<_, _>>()?;
    let table = RouterTable::new(&arena, stream, hidden, layers)?;
    let scratch = RouterScratch::new(&arena, stream)?;
    let (ids, weights) = (bench.zeros(&arena, 4 * top_k)?, bench.zeros(&arena, 4 * top_k)?);
    let ahead_ids = bench.zeros(&arena, 8 * top_k)?;
    let ahead_scores = bench.zeros(&arena, 8 * top_k)?;
    let next: Vec<[usize; 2]> = (0..count).step_by(LAYERS).map(|i| [i + 1, i + 2]).collect();
    let call = |i: usize| {
        let ahead = &next[i % next.len()];
        RouterStep {
            table: &table,
            scratch: &scratch,
            state: &state,
            chosen: Some(Chosen { layer: ahead[0] - 1, ids: &ids, weights: &weights }),
            ahead: Some(Ahead {
                layers: ahead,
                experts: top_k,
                ids: &ahead_ids,
                scores: &ahead_scores,
            }),
        }
    };
    let bytes = call(0).bytes();
    bench.row(&format!("{name} router, 2 ahead"), Cost::Bytes(bytes), &mut |i| {
        router::router_step(device, stream, call(i))
    })
}

fn best_logits(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    const WANTED: usize = 64;
    let vocabulary = bench.pick(151_936, 4000);
    let (device, stream) = (bench.device, bench.device.compute());
    let arena = device.arena(4 * vocabulary + LogitsScratch::bytes(1) + (1 << 16))?;
    let all = bench.floats(&arena, vocabulary, 9)?;
    let scratch = LogitsScratch::new(&arena, stream, 1)?;
    let has_nan = bench.zeros(&arena, 4)?;
    for wanted in [1, WANTED] {
        let (ids, best) = (bench.zeros(&arena, 4 * wanted)?, bench.zeros(&arena, 4 * wanted)?);
        let call = || BestLogits {
            scratch: &scratch,
            rows: 1,
            vocabulary,
            logits: &all,
            ids: &ids,
            best: &best,
            has_nan: &has_nan,
        };
        let name = if wanted == 1 { "argmax".to_string() } else { format!("top {wanted}") };
        let name = format!("{name} of {vocabulary} logits");
        bench.row(&name, Cost::Bytes(call().bytes()), &mut |_| match wanted {
            1 => logits::argmax(device, stream, call()),
            _ => logits::top_k(device, stream, call(), wanted),
        })?;
    }
    Ok(())
}
