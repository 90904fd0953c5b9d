//! Many tokens: products of matrices, of experts, and attention.

use super::{Bench, Cost, Pool, matrix_bytes};
use pregate_kernels::{
    Format, GatedActivation,
    cuda::{
        Arena, CellFormat, CudaError, DeviceCells, ExpertMatrix, Flash, Gemm, GroupGemm, Groups,
        Input, Quantise, QuantisedSpans, Span, Up, flash, gemm, group_gemm, group_tiles, quantise,
    },
};

pub fn measure(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    bench.report.heading("many tokens");
    for format in Format::ALL {
        product(bench, format)?;
    }
    for format in [Format::Q4K, Format::Q6K, Format::Mxfp4] {
        experts(bench, format)?;
    }
    for (heads, kv_heads, width) in [(64, 8, 64), (32, 4, 128)] {
        attention(bench, heads, kv_heads, width)?;
    }
    Ok(())
}

/// Rows of activations as `format` wants them.
enum Rows {
    Floats(Span),
    Int8(QuantisedSpans),
}

impl Rows {
    fn new(
        bench: &Bench<'_>,
        arena: &Arena,
        format: Format,
        (rows, cols): (usize, usize),
    ) -> Result<Self, CudaError> {
        let x = bench.floats(arena, rows * cols, 10)?;
        if format.block_len() == 1 {
            return Ok(Self::Floats(x));
        }
        let to = QuantisedSpans::take(arena, format.block_len(), rows, cols)?;
        let call = Quantise { rows, cols, x: &x, stride: cols, to: &to };
        quantise(bench.device, bench.device.compute(), call)?;
        Ok(Self::Int8(to))
    }

    fn input(&self) -> Input<'_> {
        match self {
            Self::Floats(x) => Input::Floats(x),
            Self::Int8(x) => Input::Quantised(x),
        }
    }

    /// Bytes of an arena for it.
    fn bytes(rows: usize, cols: usize) -> usize {
        6 * rows * cols + rows * cols / 4 + (1 << 16)
    }
}

/// Float formats compute in f32: beside int8 they say what that costs.
fn product(bench: &mut Bench<'_>, format: Format) -> Result<(), CudaError> {
    let (tokens, rows, cols) = bench.pick((512, 4096, 2048), (65, 96, 512));
    let pool = Pool::new(bench, format, matrix_bytes(format, rows, cols), 1)?;
    let (device, stream) = (bench.device, bench.device.compute());
    let arena = device.arena(Rows::bytes(tokens, cols) + 4 * tokens * rows)?;
    let x = Rows::new(bench, &arena, format, (tokens, cols))?;
    let out = bench.zeros(&arena, 4 * tokens * rows)?;
    let operations = 2.0 * tokens as f64 * rows as f64 * cols as f64;
    let name = format!("gemm {format}, {tokens} x {rows} x {cols}");
    bench.row(&name, Cost::Int8(operations), &mut |i| {
        let weight = pool.matrix(i, rows, cols)?;
        let call = Gemm { weight: &weight, bias: None, x: x.input(), tokens, out: &out };
        gemm(device, stream, &call)
    })
}

/// Gate and up of a layer's experts, tokens spread evenly.
fn experts(bench: &mut Bench<'_>, format: Format) -> Result<(), CudaError> {
    let (tokens, experts, k) = bench.pick((512, 64, 8), (40, 4, 2));
    let (hidden, inner) = bench.pick((2048, 1024), (512, 64));
    let (choices, half) = (tokens * k, matrix_bytes(format, inner, hidden).next_multiple_of(16));
    let pool = Pool::new(bench, format, 2 * half, experts)?;
    let (device, stream) = (bench.device, bench.device.compute());
    let tiles_bytes = Groups::tiles_bytes(experts, choices);
    let small = tiles_bytes + 16 * experts + 8 * choices + (1 << 16);
    let arena = device.arena(Rows::bytes(tokens, hidden) + 4 * choices * inner + small)?;
    let x = Rows::new(bench, &arena, format, (tokens, hidden))?;
    let out = bench.zeros(&arena, 4 * choices * inner)?;
    let starts: Vec<i32> =
        (0..=experts).map(|expert| (expert * choices / experts) as i32).collect();
    let starts = bench.integers(&arena, &starts)?;
    let order_of_x: Vec<i32> = (0..choices).map(|choice| (choice % tokens) as i32).collect();
    let order_of_x = bench.integers(&arena, &order_of_x)?;
    let addresses: Vec<u8> = (0..experts).flat_map(|i| pool.address(i).to_le_bytes()).collect();
    let table = arena.take(addresses.len(), 256)?;
    stream.upload(&table, &addresses)?;
    let tiles = bench.zeros(&arena, tiles_bytes)?;
    let groups = Groups {
        experts,
        block_bytes: 2 * half,
        choices,
        starts: &starts,
        table: &table,
        tiles: &tiles,
    };
    group_tiles(device, stream, &groups)?;
    let up = Up {
        matrix: ExpertMatrix { format, offset: half },
        bias: None,
        activation: GatedActivation::Silu,
        scratch: None,
    };
    let call = GroupGemm {
        groups,
        matrix: ExpertMatrix { format, offset: 0 },
        rows: inner,
        cols: hidden,
        bias: None,
        up: Some(up),
        x: x.input(),
        x_rows: tokens,
        x_order: Some(&order_of_x),
        out_order: None,
        out: &out,
    };
    let operations = 4.0 * choices as f64 * inner as f64 * hidden as f64;
    let name = format!("experts' gate, up {format}, {choices} rows");
    bench.row(&name, Cost::Int8(operations), &mut |_| group_gemm(device, stream, &call))
}

fn attention(
    bench: &mut Bench<'_>,
    heads: usize,
    kv_heads: usize,
    width: usize,
) -> Result<(), CudaError> {
    let (tokens, before) = bench.pick((512, 3584), (40, 24));
    let positions = tokens + before;
    let (device, stream) = (bench.device, bench.device.compute());
    let cells = 2 * positions * kv_heads * width;
    let arena = device.arena(2 * cells + 8 * tokens * heads * width + (1 << 16))?;
    let q = bench.floats(&arena, tokens * heads * width, 11)?;
    let (keys, values) = (bench.zeros(&arena, cells)?, bench.zeros(&arena, cells)?);
    let out = bench.zeros(&arena, 4 * tokens * heads * width)?;
    let of = |span| DeviceCells {
        format: CellFormat::F16,
        span,
        head_stride: width,
        position_stride: kv_heads * width,
        width,
    };
    let (keys, values) = (of(keys), of(values));
    let call = Flash {
        q: &q,
        tokens,
        heads,
        kv_heads,
        keys: &keys,
        values: &values,
        first_position: before,
        scale: 0.1,
        window: None,
        sinks: None,
        out: &out,
    };
    // Two products with what each query sees.
    let seen = (before * tokens + tokens * (tokens + 1) / 2) as f64;
    let operations = 4.0 * seen * (heads * width) as f64;
    let name = format!("flash {width}, {heads}/{kv_heads}, {tokens} at {before}");
    bench.row(&name, Cost::F16(operations), &mut |_| flash(device, stream, &call))
}
