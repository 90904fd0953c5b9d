//! One token's attention and DeltaNet.

use super::{Bench, Cost};
use pregate_kernels::cuda::{
    At, Attend, CellFormat, CudaError, DeltaDecode, DeltaInputs, DeltaPrefill, DeltaShape,
    DeviceCells, attend, delta_decode, delta_prefill,
};

pub fn measure(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    bench.report.heading("attention and DeltaNet");
    for (name, heads, kv_heads, key, value) in [
        ("OLMoE", 16, 16, 128, 128),
        ("Qwen3-30B-A3B", 32, 4, 128, 128),
        ("gpt-oss-20b", 64, 8, 64, 64),
        ("DeepSeek-V2-Lite", 16, 1, 576, 512),
        ("Qwen3.5-35B-A3B", 16, 2, 256, 256),
    ] {
        for positions in bench.pick(vec![4096, 32768], vec![300]) {
            attention(bench, name, [heads, kv_heads, key, value], positions)?;
        }
    }
    delta(bench, 1)?;
    let tokens = bench.pick(512, 70);
    delta(bench, tokens)
}

fn attention(
    bench: &mut Bench<'_>,
    name: &str,
    [heads, kv_heads, key, value]: [usize; 4],
    positions: usize,
) -> Result<(), CudaError> {
    let (device, stream) = (bench.device, bench.device.compute());
    let row = |width: usize| kv_heads * width;
    let bytes = |width: usize| 2 * positions * row(width);
    // More than the caches hold, in turn.
    let copies = bench.pick(((256 << 20) / (bytes(key) + bytes(value))).clamp(1, 64), 1);
    let scratch_bytes = Attend::scratch_bytes(1, heads, value, positions);
    let all = copies * (bytes(key) + bytes(value)) + scratch_bytes + 8 * heads * (key + value);
    let arena = device.arena(all + 512 * (copies + 8))?;
    let cells = |width: usize| {
        Ok::<_, CudaError>(DeviceCells {
            format: CellFormat::F16,
            span: bench.zeros(&arena, bytes(width))?,
            head_stride: width,
            position_stride: row(width),
            width,
        })
    };
    let caches: Vec<_> = (0..copies)
        .map(|_| Ok::<_, CudaError>((cells(key)?, cells(value)?)))
        .collect::<Result<_, _>>()?;
    let q = bench.floats(&arena, heads * key, 12)?;
    let out = bench.zeros(&arena, 4 * heads * value)?;
    let scratch = bench.zeros(&arena, scratch_bytes)?;
    let counters = bench.zeros(&arena, 4 * heads)?;
    let call = |i: usize| {
        let (keys, values) = &caches[i % caches.len()];
        Attend {
            q: &q,
            tokens: 1,
            heads,
            kv_heads,
            keys,
            values,
            at: At::Host(positions - 1),
            scale: 0.1,
            window: None,
            sinks: None,
            gate: None,
            out: &out,
            scratch: &scratch,
            counters: &counters,
            plan: None,
        }
    };
    let cost = Cost::Bytes(call(0).bytes());
    bench.row(&format!("{name} attention, {positions}"), cost, &mut |i| {
        attend(device, stream, call(i))
    })
}

/// Qwen3.5-35B-A3B's: one token by steps, many in chunks.
fn delta(bench: &mut Bench<'_>, tokens: usize) -> Result<(), CudaError> {
    let heads = bench.pick(16, 2);
    let shape = DeltaShape {
        key_heads: heads,
        value_heads: 2 * heads,
        key_dim: 128,
        value_dim: 128,
        is_tiled: true,
    };
    let (device, stream) = (bench.device, bench.device.compute());
    let (values, scratch_bytes) = (shape.values(), DeltaPrefill::scratch_bytes(&shape, tokens));
    let all = tokens * (shape.channels() + 2 * values + 4 * heads) + shape.memory();
    let arena = device.arena(4 * all + scratch_bytes + (1 << 16))?;
    let floats = |count, seed| bench.floats(&arena, count, seed);
    let mixed = floats(tokens * shape.channels(), 13)?;
    let (alpha, beta) = (floats(tokens * 2 * heads, 14)?, floats(tokens * 2 * heads, 15)?);
    let (decay_bias, norm) = (floats(2 * heads, 16)?, floats(128, 17)?);
    let gate = floats(tokens * values, 18)?;
    // -1 in each.
    let decay = bench.integers(&arena, &vec![(-1.0_f32).to_bits() as i32; 2 * heads])?;
    let memory = bench.zeros(&arena, 4 * shape.memory())?;
    let answers = bench.zeros(&arena, 4 * tokens * values)?;
    let inputs = DeltaInputs {
        shape,
        tokens,
        mixed: &mixed,
        alpha: &alpha,
        beta: &beta,
        decay: &decay,
        decay_bias: &decay_bias,
        norm: &norm,
        norm_epsilon: 1e-6,
        gate: &gate,
        memory: &memory,
        answers: &answers,
    };
    if tokens == 1 {
        let counters = bench.zeros(&arena, 4 * shape.value_heads)?;
        let call = || DeltaDecode { inputs, counters: &counters };
        return bench.row("DeltaNet, one token", Cost::Bytes(call().bytes()), &mut |_| {
            delta_decode(device, stream, call())
        });
    }
    let scratch = bench.zeros(&arena, scratch_bytes)?;
    let call = || DeltaPrefill { inputs, scratch: &scratch };
    let name = format!("DeltaNet, {tokens} tokens");
    bench.row(&name, Cost::Bytes(call().bytes()), &mut |_| delta_prefill(device, stream, call()))
}
