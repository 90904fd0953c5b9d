//! Prefill attention on the device against the CPU's, within the bound that
//! `kernels/cuda/flash.cu` states.

mod lab;

use half::f16;
use lab::Lab;
use pregate_kernels::cuda::{CellFormat, CudaError, DeviceCells, Flash, flash, has_flash};
use pregate_kernels::testing::Random;
use pregate_kernels::{AttentionCall, Backend, Cpu, CpuOptions, KvCells, KvView};
use pregate_standin::testing;

struct Case {
    widths: (usize, usize),
    heads: usize,
    kv_heads: usize,
    tokens: usize,
    first_position: usize,
    window: Option<usize>,
    sinks: bool,
    /// Of queries, before `scale` takes it out again.
    magnitude: f32,
}

const PLAIN: Case = Case {
    widths: (64, 64),
    heads: 4,
    kv_heads: 2,
    tokens: 33,
    first_position: 0,
    window: None,
    sinks: false,
    magnitude: 1.0,
};

/// The cache of a case, with gaps between heads and positions.
struct Cache {
    cells: Vec<f16>,
    head_stride: usize,
    position_stride: usize,
}

impl Cache {
    fn new(heads: usize, positions: usize, width: usize, random: &mut Random) -> Self {
        let position_stride = width + 8;
        let head_stride = positions * position_stride + 16;
        // What no query may see is not a number.
        let mut cells = vec![f16::NAN; heads * head_stride];
        for head in 0..heads {
            for position in 0..positions {
                let at = head * head_stride + position * position_stride;
                cells[at..at + width].fill_with(|| f16::from_f32(random.normal()));
            }
        }
        Self { cells, head_stride, position_stride }
    }

    fn view(&self, width: usize) -> KvView<'_> {
        let Self { cells, head_stride, position_stride, .. } = self;
        let (head_stride, position_stride) = (*head_stride, *position_stride);
        KvView { cells: KvCells::F16(cells), head_stride, position_stride, width }
    }

    fn row(&self, head: usize, position: usize, width: usize) -> &[f16] {
        &self.cells[head * self.head_stride + position * self.position_stride..][..width]
    }
}

/// Answers of the device and of the CPU, and how far they may be apart.
fn run(lab: &Lab, case: &Case) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let Case { widths: (key_width, value_width), heads, kv_heads, tokens, .. } = *case;
    let Case { first_position, window, magnitude, .. } = *case;
    let mut random = Random::new((key_width * 7 + tokens * 3 + first_position) as u64);
    let positions = first_position + tokens;
    let mut queries = vec![0.0; tokens * heads * key_width];
    queries.fill_with(|| random.normal() * magnitude);
    let keys = Cache::new(kv_heads, positions, key_width, &mut random);
    // Latent attention reads the values out of the keys' rows.
    let own_values = key_width == value_width;
    let values = Cache::new(kv_heads, positions, value_width, &mut random);
    let values = if own_values { &values } else { &keys };
    let sinks: Option<Vec<f32>> =
        case.sinks.then(|| (0..heads).map(|_| random.normal() * 2.0).collect());
    let scale = 1.0 / (key_width as f32).sqrt() / magnitude;

    let mut want = vec![0.0; tokens * heads * value_width];
    let options = CpuOptions { threads: Some(1), ..CpuOptions::default() };
    Cpu::new(options).unwrap().attention(AttentionCall {
        q: &queries,
        tokens,
        heads,
        kv_heads,
        keys: keys.view(key_width),
        values: values.view(value_width),
        first_position,
        scale,
        window,
        sinks: sinks.as_deref(),
        out: &mut want,
    });

    let put = |cache: &Cache| {
        lab.bytes(&cache.cells.iter().flat_map(|c| c.to_le_bytes()).collect::<Vec<_>>())
    };
    let cells = |cache: &Cache, width| DeviceCells {
        format: CellFormat::F16,
        span: put(cache),
        head_stride: cache.head_stride,
        position_stride: cache.position_stride,
        width,
    };
    let (q, key_cells, value_cells) =
        (lab.floats(&queries), cells(&keys, key_width), cells(values, value_width));
    let sink_span = sinks.as_ref().map(|sinks| lab.floats(sinks));
    let out = lab.floats(&vec![7.5; want.len()]);
    let call = Flash {
        q: &q,
        tokens,
        heads,
        kv_heads,
        keys: &key_cells,
        values: &value_cells,
        first_position,
        scale,
        window,
        sinks: sink_span.as_ref(),
        out: &out,
    };
    flash(&lab.device, lab.device.compute(), &call).unwrap();
    let got = lab.read_floats(&out);

    let mut bound = Vec::with_capacity(want.len());
    for query in 0..tokens * heads {
        let (token, head) = (query / heads, query % heads);
        let kv_head = head / (heads / kv_heads);
        let end = first_position + token + 1;
        let first = window.map_or(0, |window| end.saturating_sub(window));
        let q = &queries[query * key_width..(query + 1) * key_width];
        let row = |position| keys.row(kv_head, position, key_width);
        let logit = |position| -> (f64, f64) {
            let products = q.iter().zip(row(position)).map(|(q, k)| f64::from(*q) * k.to_f64());
            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
            (sum * f64::from(scale), size * f64::from(scale))
        };
        let logits: Vec<(f64, f64)> = (first..end).map(logit).collect();
        let top = logits.iter().map(|(logit, _)| *logit).fold(f64::NEG_INFINITY, f64::max);
        let sizes = logits.iter().map(|(_, size)| *size).fold(0.0, f64::max);
        // A query's rounding, and the tensor core's sums; then that of the
        // probabilities, twice because the sum is theirs.
        let relative = 2.0 * (sizes * (2f64.powi(-11) + 2f64.powi(-18))) + 2f64.powi(-10);
        let p: Vec<f64> = logits.iter().map(|(logit, _)| (logit - top).exp()).collect();
        let total = p.iter().sum::<f64>()
            + sinks.as_ref().map_or(0.0, |sinks| (f64::from(sinks[head]) - top).exp());
        for d in 0..value_width {
            let value = |i: usize| values.row(kv_head, first + i, value_width)[d].to_f64().abs();
            let weighted: f64 = p.iter().enumerate().map(|(i, p)| p / total * value(i)).sum();
            let largest = (0..p.len()).map(value).fold(0.0, f64::max);
            let underflow = p.len() as f64 * 2f64.powi(-24) * largest;
            bound.push((relative * weighted + underflow + 1e-6) as f32);
        }
    }
    (got, want, bound)
}

fn check(lab: &Lab, name: &str, case: Case) {
    let (got, want, bound) = run(lab, &case);
    for (i, ((got, want), bound)) in got.iter().zip(&want).zip(&bound).enumerate() {
        let apart = (got - want).abs();
        assert!(apart <= *bound, "{name}: element {i} is {got}, want {want} +- {bound}");
    }
}

#[test]
fn every_width_answers_within_the_stated_bound() {
    let Some(lab) = Lab::open() else { return };
    for width in [64, 80, 96, 112, 128, 192, 256] {
        assert!(has_flash(width, width));
        let name = format!("heads of {width}");
        check(&lab, &name, Case { widths: (width, width), ..PLAIN });
    }
    let latent = Case { widths: (576, 512), heads: 6, kv_heads: 1, tokens: 5, ..PLAIN };
    check(&lab, "latent", Case { first_position: 41, ..latent });
}

#[test]
fn queries_see_what_they_should() {
    let Some(lab) = Lab::open() else { return };
    for (tokens, first_position) in [(1, 0), (7, 0), (16, 31), (33, 300), (130, 5)] {
        for window in [None, Some(1), Some(5), Some(64)] {
            let name = format!("{tokens} tokens from {first_position}, window {window:?}");
            check(&lab, &name, Case { tokens, first_position, window, ..PLAIN });
        }
    }
}

#[test]
fn answers_do_not_depend_on_the_order_of_threads() {
    let Some(lab) = Lab::open() else { return };
    let Some(standin) = testing::standin() else { return };
    let case = || Case { window: Some(40), first_position: 50, tokens: 40, ..PLAIN };
    let (wanted, _, _) = run(&lab, &case());
    for seed in [0, 2, 3, 5, 8, 13] {
        standin.set_order(seed);
        let (got, _, _) = run(&lab, &case());
        assert!(got.iter().zip(&wanted).all(|(a, b)| a.to_bits() == b.to_bits()), "seed {seed}");
    }
}

#[test]
fn heads_that_share_a_cache_head_and_sinks() {
    let Some(lab) = Lab::open() else { return };
    for (heads, kv_heads) in [(3, 3), (8, 1), (10, 2), (16, 4)] {
        let name = format!("{heads} heads over {kv_heads}");
        let case = Case { heads, kv_heads, tokens: 9, first_position: 20, sinks: true, ..PLAIN };
        check(&lab, &name, Case { window: Some(13), ..case });
    }
}

#[test]
fn queries_beyond_the_range_of_f16_are_scaled() {
    let Some(lab) = Lab::open() else { return };
    for magnitude in [1e-12, 1e-5, 1e6, 1e20] {
        check(&lab, &format!("queries of {magnitude}"), Case { magnitude, ..PLAIN });
    }
}

#[test]
fn the_launcher_refuses_what_it_cannot_do() {
    let Some(lab) = Lab::open() else { return };
    let span = lab.bytes(&[0; 1 << 16]);
    let launch_as = |format, width: usize, stride, tokens, heads| {
        let span = span.clone();
        let cells = DeviceCells { format, span, head_stride: 0, position_stride: stride, width };
        let call = Flash {
            q: &cells.span,
            tokens,
            heads,
            kv_heads: 1,
            keys: &cells,
            values: &cells,
            first_position: 0,
            scale: 1.0,
            window: None,
            sinks: None,
            out: &cells.span,
        };
        flash(&lab.device, lab.device.compute(), &call)
    };
    let launch =
        |width, stride, tokens, heads| launch_as(CellFormat::F16, width, stride, tokens, heads);
    assert!(launch(64, 64, 4, 2).is_ok());
    assert!(matches!(launch(72, 72, 4, 2), Err(CudaError::Unsupported { .. })));
    let floats = launch_as(CellFormat::F32, 64, 64, 4, 2);
    assert!(matches!(floats, Err(CudaError::Shape { .. })), "format");
    assert!(matches!(launch(64, 65, 4, 2), Err(CudaError::Shape { .. })), "stride");
    assert!(matches!(launch(64, 64, 400, 2), Err(CudaError::Shape { .. })), "too many");
    assert!(matches!(launch(64, 64, 4, 0), Err(CudaError::Shape { .. })), "no head");
}
