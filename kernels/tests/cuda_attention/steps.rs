//! Positions from device memory: the launches of one graph, of which nothing
//! changes from token to token, against those that are told the position.

use crate::lab::{Lab, assert_same_bits, numbers, set_order};
use crate::support::{Buffers, Context, FORMATS, Shape, angles, begin, cell_values, shape};
use pregate_kernels::cuda::{
    At, Attend, AttendPlan, CellFormat, CudaError, DeviceCells, HeadNorms, OutputGate, Pairs,
    PrepareHeads, PrepareLatent, Rotation, STEP_WORDS, Span, attend, prepare_heads, prepare_latent,
};
use pregate_kernels::testing::Random;

/// Around the borders of chunks and windows.
const BORDERS: [usize; 13] = [0, 1, 69, 127, 255, 256, 257, 511, 512, 513, 514, 767, 768];

/// [`BORDERS`] that a call can start at and the last start of all, late and
/// early ones in turn.
fn starts(most: usize, tokens: usize) -> Vec<usize> {
    let last = most - tokens;
    let mut starts: Vec<usize> = BORDERS.into_iter().filter(|start| *start < last).collect();
    starts.push(last);
    let count = starts.len();
    (0..count).map(|i| starts[if i % 2 == 0 { i / 2 } else { count - 1 - i / 2 }]).collect()
}

/// A context, and launches at [`At::Step`] that share all of their memory.
struct Steps<'a> {
    lab: &'a Lab,
    context: &'a Context,
    most: usize,
    words: Span,
    buffers: Buffers,
    /// For launches that are told the position.
    told: Buffers,
}

impl<'a> Steps<'a> {
    fn new(lab: &'a Lab, context: &'a Context) -> Self {
        Self {
            lab,
            context,
            most: context.shape.first + context.shape.tokens,
            words: lab.zeros(4 * STEP_WORDS),
            buffers: context.upload(lab),
            told: context.upload(lab),
        }
    }

    /// Compares a call at `position`, which is the word's, with one that is
    /// told `start`.
    #[track_caller]
    fn compare(
        &self,
        position: i32,
        start: usize,
        plan: Option<AttendPlan>,
        gate: Option<OutputGate<'_>>,
    ) {
        let Self { lab, context, most, .. } = *self;
        let what = format!("{:?}, {plan:?}, {position} of {most}", context.shape);
        let want = self.told.run(lab, &Shape { first: start, ..context.shape }, plan, gate);
        begin(lab, &self.words, position);
        lab.device.compute().fill(&self.buffers.out, 0xff).unwrap();
        let at = At::Step { words: &self.words, most };
        let call = Attend { at, plan, gate, ..self.buffers.call(&context.shape) };
        attend(&lab.device, lab.device.compute(), call).unwrap();
        assert_same_bits(&lab.read_floats(&self.buffers.out), &want, &what);
        let counters = lab.read(&self.buffers.counters);
        assert!(counters.iter().all(|byte| *byte == 0), "{what}: counters");
    }
}

#[test]
fn one_launch_serves_every_position() {
    let Some(lab) = Lab::open() else { return };
    let sinks = |shape| Shape { has_sinks: true, ..shape };
    let tokens = |tokens, shape: Shape| Shape { tokens, first: shape.first + 1 - tokens, ..shape };
    let window = |window, shape| Shape { window: Some(window), ..shape };
    // The last position that there is room for.
    let cases = [
        shape(1, 1, 64, 64, 1030),
        sinks(shape(4, 2, 64, 64, 513)),
        shape(2, 1, 64, 64, 255),
        shape(2, 1, 64, 64, 0),
        window(1, shape(2, 1, 64, 64, 600)),
        window(128, sinks(shape(2, 1, 64, 64, 1030))),
        // One chunk's last position, a chunk, and the first of a third.
        window(258, shape(1, 1, 64, 64, 1030)),
        window(2000, sinks(shape(1, 1, 64, 64, 520))),
        shape(2, 1, 192, 128, 257),
        shape(2, 1, 576, 512, 257),
        tokens(3, window(70, sinks(shape(2, 1, 64, 64, 1030)))),
        tokens(8, shape(1, 1, 80, 80, 260)),
    ];
    let mut rng = Random::new(41);
    for (n, case) in cases.into_iter().enumerate() {
        for format in FORMATS {
            let context = Context::new(Shape { format, ..case }, &mut rng);
            let steps = Steps::new(&lab, &context);
            for (i, start) in starts(steps.most, case.tokens).into_iter().enumerate() {
                set_order((n * 100 + i) as u64);
                steps.compare(start as i32, start, None, None);
            }
        }
    }
}

#[test]
fn plans_and_gates_take_the_position_from_the_step_too() {
    let Some(lab) = Lab::open() else { return };
    for window in [None, Some(200)] {
        let case = Shape { window, has_sinks: true, ..shape(5, 1, 64, 72, 520) };
        let context = Context::new(case, &mut Random::new(42));
        let steps = Steps::new(&lab, &context);
        let mut rng = Random::new(43);
        let gates: Vec<f32> = (0..5 * 76).map(|_| rng.normal() * 9.0).collect();
        let gates = lab.floats(&gates);
        for (i, start) in starts(steps.most, 1).into_iter().enumerate() {
            for tile in [1, 4, 8] {
                let plan = Some(AttendPlan { tile, merges_apart: (i + tile) % 2 == 0 });
                let gate = (i % 3 == 0).then_some(OutputGate { span: &gates, stride: 76 });
                steps.compare(start as i32, start, plan, gate);
            }
        }
    }
}

/// No launcher can know what the word will be.
#[test]
fn a_position_that_there_is_no_room_for_is_the_last_one() {
    let Some(lab) = Lab::open() else { return };
    for (tokens, window) in [(1, None), (3, None), (1, Some(40)), (2, Some(40))] {
        let case = Shape { tokens, window, ..shape(4, 2, 64, 64, 300 - tokens) };
        let context = Context::new(case, &mut Random::new(44));
        let steps = Steps::new(&lab, &context);
        for merges_apart in [false, true] {
            let plan = Some(AttendPlan { tile: 4, merges_apart });
            for position in [301 - tokens as i32, 300, 512, i32::MAX] {
                steps.compare(position, 300 - tokens, plan, None);
            }
            for position in [-1, i32::MIN] {
                steps.compare(position, 0, plan, None);
            }
        }
    }
}

#[test]
fn plans_are_for_the_longest_context_of_a_launch() {
    let Some(lab) = Lab::open() else { return };
    let context = Context::new(shape(32, 4, 128, 128, 0), &mut Random::new(45));
    let buffers = context.upload(&lab);
    let words = lab.zeros(4 * STEP_WORDS);
    let call = |at, window| Attend { at, window, ..buffers.call(&context.shape) };
    for most in [256, 4096, 8192, 8448] {
        let step = call(At::Step { words: &words, most }, None);
        let last = call(At::Host(most - 1), None);
        assert_eq!(step.choose_plan(128).unwrap(), last.choose_plan(128).unwrap(), "{most}");
        assert_eq!(step.bytes(), last.bytes(), "{most}");
    }
    // A window's chunks are two, however long the context is.
    let step = call(At::Step { words: &words, most: 100_000 }, Some(128));
    assert_eq!(step.choose_plan(128).unwrap(), AttendPlan { tile: 4, merges_apart: false });
    assert_eq!(step.bytes(), call(At::Host(300), Some(128)).bytes());
}

#[test]
fn steps_without_room_are_errors() {
    let Some(lab) = Lab::open() else { return };
    let context = Context::new(shape(4, 2, 64, 64, 299), &mut Random::new(46));
    let buffers = context.upload(&lab);
    let words = lab.zeros(4 * STEP_WORDS);
    let run = |words: &Span, most: usize, tokens: usize| {
        let at = At::Step { words, most };
        let call = Attend { at, tokens, ..buffers.call(&context.shape) };
        attend(&lab.device, lab.device.compute(), call)
    };
    run(&words, 300, 1).unwrap();
    run(&words, 1, 1).unwrap();
    let is_shape = |result| matches!(result, Err(CudaError::Shape { .. }));
    // One position more than there are cells, and none for the token.
    assert!(is_shape(run(&words, 301, 1)));
    assert!(is_shape(run(&words, usize::MAX, 1)));
    assert!(is_shape(run(&words, 0, 1)));
    assert!(is_shape(run(&lab.zeros(12), 300, 1)));
    // Parts of two chunks do not fit where those of one do.
    let at = At::Step { words: &words, most: 257 };
    let scratch = lab.space(Attend::scratch_bytes(1, 4, 64, 256));
    let call = Attend { at, scratch: &scratch, ..buffers.call(&context.shape) };
    assert!(is_shape(attend(&lab.device, lab.device.compute(), call)));
}

/// Caches of 20 positions of two heads of 32 cells.
fn caches(lab: &Lab, format: CellFormat) -> [DeviceCells; 2] {
    [(32, 640), (64, 32)].map(|(position_stride, head_stride)| DeviceCells {
        format,
        span: lab.space(20 * 64 * format.bytes()),
        head_stride,
        position_stride,
        width: 32,
    })
}

/// Cells that a token joins at each of some positions, and what the word of
/// the step is then.
const JOINED: [(i32, usize); 7] =
    [(0, 0), (19, 19), (7, 7), (20, 19), (i32::MAX, 19), (-1, 0), (18, 18)];

#[test]
fn heads_join_the_cache_where_the_step_says() {
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(47);
    let words = lab.zeros(4 * STEP_WORDS);
    for format in FORMATS {
        for (position, start) in JOINED {
            let raw = lab.floats(&numbers(4 * 32, &mut rng));
            let norm = lab.floats(&numbers(32, &mut rng));
            let table = lab.floats(&angles(1, 8, &mut rng));
            begin(&lab, &words, position);
            let run = |at| {
                let [keys, values] = caches(&lab, format);
                let q = lab.space(4 * 4 * 32);
                let call = PrepareHeads {
                    q_raw: &raw,
                    is_gated: false,
                    k_raw: &raw,
                    v_raw: &raw,
                    norms: Some(HeadNorms { q: &norm, k: &norm, is_whole: false, epsilon: 1e-6 }),
                    limit: None,
                    rotation: Rotation { table: &table, half: 8, pairs: Pairs::Halves },
                    q: &q,
                    keys: &keys,
                    values: &values,
                    tokens: 1,
                    heads: 4,
                    kv_heads: 2,
                    width: 32,
                    at,
                };
                prepare_heads(&lab.device, lab.device.compute(), call).unwrap();
                let cells = |cells: &DeviceCells| cell_values(format, &lab.read(&cells.span));
                [lab.read_floats(&q), cells(&keys), cells(&values)].concat()
            };
            let found = run(At::Step { words: &words, most: 20 });
            assert_same_bits(&found, &run(At::Host(start)), &format!("{format:?}, {position}"));
        }
    }
}

#[test]
fn latent_rows_join_the_cache_where_the_step_says() {
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(48);
    let words = lab.zeros(4 * STEP_WORDS);
    let (nope, rope, rank) = (16, 8, 24);
    for format in FORMATS {
        for (position, start) in JOINED {
            let q_raw = lab.floats(&numbers(3 * (nope + rope), &mut rng));
            let kv_raw = lab.floats(&numbers(rank + rope, &mut rng));
            let norm = lab.floats(&numbers(rank, &mut rng));
            let table = lab.floats(&angles(1, 4, &mut rng));
            begin(&lab, &words, position);
            let run = |at| {
                let [cells, _] = caches(&lab, format);
                let absorbed = lab.space(4 * 3 * (rank + rope));
                let call = PrepareLatent {
                    q_raw: &q_raw,
                    kv_raw: &kv_raw,
                    kv_norm: &norm,
                    epsilon: 1e-5,
                    rotation: Rotation { table: &table, half: 4, pairs: Pairs::Neighbours },
                    absorbed: &absorbed,
                    cells: &cells,
                    tokens: 1,
                    heads: 3,
                    nope,
                    rope,
                    rank,
                    at,
                };
                prepare_latent(&lab.device, lab.device.compute(), call).unwrap();
                [lab.read_floats(&absorbed), cell_values(format, &lab.read(&cells.span))].concat()
            };
            let found = run(At::Step { words: &words, most: 20 });
            assert_same_bits(&found, &run(At::Host(start)), &format!("{format:?}, {position}"));
        }
    }
}

#[test]
fn heads_without_room_are_errors() {
    let Some(lab) = Lab::open() else { return };
    let [keys, values] = caches(&lab, CellFormat::F16);
    let raw = lab.zeros(4 * 4 * 32);
    let words = lab.zeros(4 * STEP_WORDS);
    let q = lab.space(4 * 4 * 32);
    let run = |words: &Span, most: usize| {
        let call = PrepareHeads {
            q_raw: &raw,
            is_gated: false,
            k_raw: &raw,
            v_raw: &raw,
            norms: None,
            limit: None,
            rotation: Rotation { table: &raw, half: 8, pairs: Pairs::Halves },
            q: &q,
            keys: &keys,
            values: &values,
            tokens: 1,
            heads: 4,
            kv_heads: 2,
            width: 32,
            at: At::Step { words, most },
        };
        prepare_heads(&lab.device, lab.device.compute(), call)
    };
    let is_shape = |result| matches!(result, Err(CudaError::Shape { .. }));
    run(&words, 20).unwrap();
    assert!(is_shape(run(&words, 21)));
    assert!(is_shape(run(&words, 0)));
    assert!(is_shape(run(&words.part(0..12), 20)));
}
