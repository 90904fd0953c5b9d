//! One engine: what a run with few slots did is what its recording does again
//! in replay, with the same settings: the same hits, misses, evictions and
//! bytes.
//!
//! Without forecasts nothing of a token hangs on time, so everything has to be
//! equal, layer by layer. A chunk of a prompt may need more than the slots
//! hold; then who stays depends on which read landed first, and what is asked
//! for is all that can be equal. With forecasts two things are not in a trace: scores of
//! routers on states that only the run has (replay's blend misses these
//! sources), and when reads landed, which decides whether a read-ahead was
//! there in time, and how many were ordered. What must be equal all the same is
//! what was asked for, and that nothing is lost between the columns.

use pregate_kernels::{Cpu, CpuOptions};
use pregate_predictor::{Observer, Origin, Served};
use pregate_runtime::model::Source as Bring;
use pregate_runtime::store::disk::DiskOptions;
use pregate_runtime::{
    Cancel, LoadOptions, Model, OpenedModel, Residency, Run, Session, SessionOptions, Streaming,
};
use pregate_traces::record::Recorder;
use pregate_traces::replay::{Machine, Options, Report, Slots, replay};
use pregate_traces::{Header, Row};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SLOTS_BEYOND_TOP_K: usize = 2;
const RING: usize = 5;

/// Any machine: no figure reaches a count.
const MACHINE: &str = r#"
name = "any"
ram_bytes = 1e9
[cpu]
expert_gbs = 10
expert_gbs_beside = 8
dense_gbs = 10
start_ns = 1000
layer_ns = 1000
gmacs = 100
[disk]
gbs = 1
latency_ns = 100000
"#;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/pregate-demo.gguf")
}

fn load(forecast: &str, policy: &str) -> Model {
    let opened = OpenedModel::open(&demo(), &mut |_| {}).expect("the model in the repository");
    let layers = opened.layout().shape.layers.iter();
    let slots = |layer: &pregate_predictor::LayerShape| {
        (layer.top_k + SLOTS_BEYOND_TOP_K).min(layer.experts)
    };
    let slots = layers.map(|layer| layer.as_ref().map_or(0, slots)).collect();
    let source = Bring::Disk(DiskOptions { measure_ns: 0, ..Default::default() });
    let (forecast, policy) = (forecast.to_string(), policy.to_string());
    let streaming = Streaming { slots, ring: RING, source, forecast, policy, ..Default::default() };
    let backend = Arc::new(Cpu::new(CpuOptions { threads: Some(2), isa: None }).unwrap());
    let options = LoadOptions { backend, residency: Residency::Streamed(streaming) };
    opened.load(options, &mut |_| {}).unwrap()
}

/// Hits, misses and evictions of a layer as an observer hears them, and bytes
/// as the store counts them.
type Counts = Vec<[u64; 4]>;

/// Records, and counts what was told.
struct Told {
    recorder: Recorder,
    counts: Counts,
}

impl Observer for Told {
    fn fed(&mut self, fed: &pregate_predictor::Fed<'_>) {
        self.recorder.fed(fed);
    }

    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]) {
        self.recorder.routed(layer, position, experts, weights);
    }

    fn served(&mut self, served: &Served<'_>) {
        let [hits, misses, evictions, _] = &mut self.counts[served.layer];
        for (_, origin) in served.experts {
            *hits += u64::from(*origin == Origin::Hit);
            *misses += u64::from(*origin == Origin::Miss);
        }
        *evictions += served.evictions as u64;
        self.recorder.served(served);
    }
}

/// Two conversations of a prompt and greedy tokens behind it,
/// recorded to `path`.
fn record(model: &Model, path: &Path, prefill_chunk: usize) -> Counts {
    let store = model.store().expect("streamed");
    let shape = store.layout().shape.clone();
    let header = Header { shape: shape.clone(), ..Header::default() };
    let counts = vec![[0u64; 4]; shape.layers.len()];
    let mut told = Told { recorder: Recorder::create(path, &header).unwrap(), counts };
    let vocab = model.description().vocab as u32;
    for start in [5, 11] {
        let options = SessionOptions { prefill_chunk, ..Default::default() };
        let mut session = Session::new(model, options).unwrap();
        let mut next: Vec<u32> = (0..19).map(|at| (at * 37 + start) % vocab).collect();
        for _ in 0..24 {
            let cancel = Cancel::new();
            let mut run = Run { observer: &mut told, cancel: &cancel, progress: None };
            let logits = session.feed(&next, &mut run).unwrap();
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            next = vec![best.unwrap() as u32];
        }
    }
    let recording = told.recorder.finish();
    assert!(recording.error.is_none(), "{:?}", recording.error);
    assert_eq!(recording.tokens, 2 * (19 + 23));
    let stats = store.stats();
    let layers = stats.prefill.layers.iter().zip(&stats.decode.layers);
    for (counts, (prefill, decode)) in told.counts.iter_mut().zip(layers) {
        counts[3] = prefill.bytes_read() + decode.bytes_read();
    }
    told.counts
}

fn replayed(path: &Path, model: &Model, forecast: &str, policy: &str) -> Report {
    let mut trace = pregate_traces::open(path).unwrap();
    let planner =
        |layer: usize| model.store().unwrap().with_planner(|planner| planner.cache().slots(layer));
    let layers = trace.header().shape.layers.len();
    let options = Options {
        slots: Slots::Layers((0..layers).map(planner).collect()),
        ring: Some(RING),
        forecast: forecast.to_string(),
        policy: policy.to_string(),
        horizon: 2,
        ..Options::default()
    };
    let machine = Machine::from_toml(MACHINE).unwrap();
    replay(&mut *trace, &machine, &options, &mut |_| {}).unwrap()
}

/// A file of this test's own.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("pregate-one-engine-{}-{name}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_run_and_its_replay_have_the_same_counts_in_every_layer() {
    for policy in ["lru", "forecast-aware", "least-stale-pool"] {
        let scratch = Scratch::new(policy);
        let model = load("none", policy);
        let ran = record(&model, &scratch.0, 1);
        let report = replayed(&scratch.0, &model, "none", policy);
        let file = std::fs::metadata(demo()).unwrap().len();
        let [mut hits, mut evictions] = [0u64, 0];
        for (layer, (ran, found)) in ran.iter().zip(&report.layers).enumerate() {
            let counts = found.counts;
            // Whole blocks of the file are read, up to its end: some experts
            // take a block more than others.
            let experts = &model.store().unwrap().layout().layers[layer];
            let missed = found.expert_accesses.iter().zip(&found.expert_hits);
            let bytes = missed.zip(experts).map(|((accesses, hits), expert)| {
                let pieces = expert.pieces();
                let there = pieces.iter().map(|piece| (file - piece.offset).min(piece.len as u64));
                u64::from(accesses - hits) * there.sum::<u64>()
            });
            let bytes: u64 = bytes.sum();
            let found = [counts.hits, counts.misses, counts.evictions, bytes];
            assert_eq!(*ran, found, "{policy}, layer {layer}");
            hits += ran[0];
            evictions += ran[2];
        }
        assert!(hits > 100 && evictions > 100, "{policy}: {hits} hits, {evictions} evictions");
    }
}

#[test]
fn a_prompt_is_one_to_its_last_token() {
    let scratch = Scratch::new("prompt");
    let model = load("none", "lru");
    // 19 tokens in chunks of 6.
    record(&model, &scratch.0, 6);
    let mut trace = pregate_traces::open(&scratch.0).unwrap();
    let (mut row, mut prompts, mut single) = (Row::default(), 0, 0);
    while trace.next(&mut row).unwrap() {
        assert_eq!(row.is_prompt, row.position < 19);
        prompts += u64::from(row.is_prompt);
        single += u64::from(row.is_prompt && row.pass_tokens == 1);
    }
    assert_eq!((prompts, single), (2 * 19, 2));
    let report = replayed(&scratch.0, &model, "none", "lru");
    assert_eq!((report.prompts.passes, report.prompts.tokens), (8, 38));
    assert_eq!((report.decode.passes, report.decode.tokens), (46, 46));
}

#[test]
fn with_forecasts_as_much_is_asked_for_and_nothing_is_lost() {
    let scratch = Scratch::new("forecast");
    let model = load("transition", "forecast-aware");
    record(&model, &scratch.0, 8);
    let report = replayed(&scratch.0, &model, "transition", "forecast-aware");
    let stats = model.store().unwrap().stats();
    let (prefill, decode) = (stats.prefill.total(), stats.decode.total());
    assert_eq!(report.prompts.counts.accesses, prefill.requests());
    assert_eq!(report.decode.counts.accesses, decode.requests());
    assert_eq!((report.prompts.passes, report.decode.passes), (6, 46));
    assert_eq!(stats.prefill.passes, report.prompts.passes);
    for counts in [report.prompts.counts, report.decode.counts] {
        let found = counts.hits + counts.early + counts.in_flight + counts.misses;
        assert_eq!(counts.accesses, found);
    }
    assert!(report.decode.counts.early + report.decode.counts.in_flight > 0);
    // The recording says what the run's own columns were.
    let mut trace = pregate_traces::open(&scratch.0).unwrap();
    let (mut row, mut recorded) = (Row::default(), 0);
    while trace.next(&mut row).unwrap() {
        recorded += row.served.iter().map(|layer| layer.origins.len() as u64).sum::<u64>();
    }
    assert_eq!(recorded, prefill.requests() + decode.requests());
}
