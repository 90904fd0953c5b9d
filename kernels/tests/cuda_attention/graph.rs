//! A layer's attention as one graph: captured once, launched for token after
//! token.

use crate::lab::{Lab, assert_same_bits};
use crate::support::{angles, begin, cell_bytes};
use pregate_kernels::cuda::{
    At, Attend, AttendPlan, CellFormat, CudaError, DeviceCells, Graph, Pairs, PrepareHeads,
    PrepareLatent, Rotation, STEP_WORDS, Span, attend, prepare_heads, prepare_latent,
};
use pregate_kernels::testing::Random;

/// Positions that the graphs are for: two chunks and a little.
const MOST: usize = 520;
/// Tokens one after the other over the border of a chunk, a rewind, the last
/// position.
const POSITIONS: [usize; 8] = [253, 254, 255, 256, 257, 12, 13, MOST - 1];
const HEADS: usize = 4;
const HALF: usize = 8;

fn normal(count: usize, rng: &mut Random) -> Vec<f32> {
    (0..count).map(|_| rng.normal()).collect()
}

/// A cache of `heads` heads that holds something at every position, the same
/// each time.
fn cells(lab: &Lab, format: CellFormat, heads: usize, width: usize) -> DeviceCells {
    let values = normal(heads * MOST * width, &mut Random::new(51));
    let span = lab.bytes(&cell_bytes(format, &values));
    DeviceCells { format, span, head_stride: MOST * width, position_stride: width, width }
}

/// What the host or earlier launches give a token.
struct Token {
    raw: [Span; 3],
    table: Span,
}

impl Token {
    fn new(lab: &Lab, counts: [usize; 3]) -> Self {
        Self { raw: counts.map(|count| lab.space(4 * count)), table: lab.space(8 * HALF) }
    }

    /// The next one, in the same memory.
    fn renew(&self, lab: &Lab, rng: &mut Random) {
        for span in &self.raw {
            upload(lab, span, &normal(span.bytes() / 4, rng));
        }
        upload(lab, &self.table, &angles(1, HALF, rng));
    }

    fn rotation(&self, pairs: Pairs) -> Rotation<'_> {
        Rotation { table: &self.table, half: HALF, pairs }
    }
}

fn upload(lab: &Lab, span: &Span, values: &[f32]) {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
    lab.device.compute().upload(span, &bytes).unwrap();
}

/// A layer's own memory on one side.
struct Layer {
    caches: Vec<DeviceCells>,
    q: Span,
    out: Span,
    scratch: Span,
    counters: Span,
}

impl Layer {
    fn new(lab: &Lab, caches: Vec<DeviceCells>, value_width: usize) -> Self {
        Self {
            // Of latent attention, what `prepare_latent` leaves: 0.75.
            q: lab.filled(4 * HEADS * caches[0].width, 0x3f),
            out: lab.space(4 * HEADS * value_width),
            scratch: lab.space(Attend::scratch_bytes(1, HEADS, value_width, MOST)),
            counters: lab.zeros(4 * HEADS),
            caches,
        }
    }

    fn attend<'a>(&'a self, keys: &'a DeviceCells, values: &'a DeviceCells) -> Attend<'a> {
        Attend {
            q: &self.q,
            tokens: 1,
            heads: HEADS,
            kv_heads: 1,
            keys,
            values,
            at: At::Host(0),
            scale: 0.125,
            window: None,
            sinks: None,
            gate: None,
            out: &self.out,
            scratch: &self.scratch,
            counters: &self.counters,
            plan: None,
        }
    }
}

/// Captures `run` once and compares its launches with those that are told the
/// position, which have their own layer: answers after every token, and in
/// the end the caches.
#[track_caller]
fn compare(
    lab: &Lab,
    token: &Token,
    layers: &[Layer; 2],
    run: impl Fn(&Layer, At<'_>) -> Result<(), CudaError>,
) {
    let [graphed, told] = layers;
    let (stream, words) = (lab.device.compute(), lab.zeros(4 * STEP_WORDS));
    let at = At::Step { words: &words, most: MOST };
    let graph = Graph::capture(stream, || run(graphed, at)).unwrap();
    let mut rng = Random::new(52);
    for position in POSITIONS {
        token.renew(lab, &mut rng);
        begin(lab, &words, position as i32);
        graph.launch(stream).unwrap();
        run(told, At::Host(position)).unwrap();
        let [found, want] = layers.each_ref().map(|layer| lab.read_floats(&layer.out));
        assert!(want.iter().all(|value| value.is_finite()), "{want:?}");
        assert_same_bits(&found, &want, &format!("at {position}"));
    }
    for (found, want) in graphed.caches.iter().zip(&told.caches) {
        assert!(lab.read(&found.span) == lab.read(&want.span), "other cells");
    }
}

#[test]
fn a_graph_of_heads_serves_token_after_token() {
    let Some(lab) = Lab::open() else { return };
    let cases = [
        (CellFormat::F16, None, false),
        (CellFormat::F32, Some(200), false),
        (CellFormat::F16, Some(300), true),
    ];
    for (format, window, merges_apart) in cases {
        let width = 64;
        let token = Token::new(&lab, [HEADS * width, 2 * width, 2 * width]);
        let layers = [(); 2].map(|()| {
            let caches = vec![cells(&lab, format, 2, width), cells(&lab, format, 2, width)];
            Layer::new(&lab, caches, width)
        });
        compare(&lab, &token, &layers, |layer, at| {
            let [q_raw, k_raw, v_raw] = &token.raw;
            let (keys, values) = (&layer.caches[0], &layer.caches[1]);
            let call = PrepareHeads {
                q_raw,
                is_gated: false,
                k_raw,
                v_raw,
                norms: None,
                limit: None,
                rotation: token.rotation(Pairs::Halves),
                q: &layer.q,
                keys,
                values,
                tokens: 1,
                heads: HEADS,
                kv_heads: 2,
                width,
                at,
            };
            prepare_heads(&lab.device, lab.device.compute(), call)?;
            let plan = Some(AttendPlan { tile: 4, merges_apart });
            let call = Attend { kv_heads: 2, at, window, plan, ..layer.attend(keys, values) };
            attend(&lab.device, lab.device.compute(), call)
        });
    }
}

#[test]
fn a_graph_of_latent_attention_serves_token_after_token() {
    let Some(lab) = Lab::open() else { return };
    let (nope, rope, rank) = (16, 16, 32);
    for format in [CellFormat::F16, CellFormat::F32] {
        let token = Token::new(&lab, [HEADS * (nope + rope), rank + rope, rank]);
        let layers =
            [(); 2].map(|()| Layer::new(&lab, vec![cells(&lab, format, 1, rank + rope)], rank));
        compare(&lab, &token, &layers, |layer, at| {
            let [q_raw, kv_raw, kv_norm] = &token.raw;
            let rows = &layer.caches[0];
            let call = PrepareLatent {
                q_raw,
                kv_raw,
                kv_norm,
                epsilon: 1e-5,
                rotation: token.rotation(Pairs::Neighbours),
                absorbed: &layer.q,
                cells: rows,
                tokens: 1,
                heads: HEADS,
                nope,
                rope,
                rank,
                at,
            };
            prepare_latent(&lab.device, lab.device.compute(), call)?;
            let values = DeviceCells { width: rank, ..rows.clone() };
            let call = Attend { at, ..layer.attend(rows, &values) };
            attend(&lab.device, lab.device.compute(), call)
        });
    }
}
