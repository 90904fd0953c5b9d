//! Attention over a cache, against the CPU backend.

use crate::lab::{Lab, assert_same_bits};
use crate::support::{Context, FORMATS, Shape, scalar, shape, tiles};
use pregate_kernels::contract;
use pregate_kernels::cuda::{
    At, Attend, AttendPlan, CellFormat, CudaError, DeviceCells, OutputGate, attend,
};
use pregate_kernels::testing::Random;

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
