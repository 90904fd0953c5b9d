//! Experts that come from disk give the bits of experts that are in memory,
//! for every architecture and storage, however few slots there are.

#[path = "support/golden.rs"]
#[allow(dead_code)]
mod golden;

use golden::{argmax, models};
use pregate_kernels::{Backend, Cpu, CpuOptions};
use pregate_predictor::forecast::hostile::untrained;
use pregate_predictor::forecast::learned::{Binding, Trained};
use pregate_runtime::model::Source;
use pregate_runtime::store::disk::{DiskChoice, DiskOptions};
use pregate_runtime::{
    LoadOptions, Model, OpenedModel, Residency, Session, SessionOptions, Streaming,
};
use std::path::Path;
use std::sync::Arc;

/// Logits of a prompt and of greedy tokens behind it, as bits.
fn answer(model: &Model, prefill_chunk: usize) -> Vec<u32> {
    let options = SessionOptions { prefill_chunk, ..Default::default() };
    let mut session = Session::new(model, options).unwrap();
    let vocab = model.description().vocab as u32;
    let prompt: Vec<u32> = (0..11).map(|i| (i * 37 + 5) % vocab).collect();
    let mut bits = Vec::new();
    let mut logits = session.feed_quietly(&prompt).unwrap().to_vec();
    for _ in 0..6 {
        bits.extend(logits.iter().map(|logit| logit.to_bits()));
        logits = session.feed_quietly(&[argmax(&logits)]).unwrap().to_vec();
    }
    bits
}

fn streamed(path: &Path, backend: Arc<dyn Backend>, disk: DiskChoice, extra: usize) -> Model {
    let opened = OpenedModel::open(path, &mut |_| {}).unwrap();
    let slots = opened.layout().shape.layers.iter();
    let slots = slots.map(|layer| layer.map_or(0, |l| (l.top_k + extra).min(l.experts))).collect();
    let source = Source::Disk(DiskOptions { choice: disk, measure_ns: 0, ..Default::default() });
    // Forecasts of a file change timing as others do, and never bits.
    let fingerprint = Some(opened.fingerprint().unwrap());
    let trained = (extra > 0).then(|| nonsense(&opened, fingerprint));
    let streaming = Streaming { slots, ring: 1 + extra, source, trained, ..Default::default() };
    opened
        .load(LoadOptions { backend, residency: Residency::Streamed(streaming) }, &mut |_| {})
        .unwrap()
}

/// A file for this shape, bound to a fingerprint.
fn nonsense(model: &OpenedModel, fingerprint: Option<[u8; 32]>) -> Arc<Trained> {
    let binding = Binding { model: "nonsense".to_string(), fingerprint };
    let sizes = [40, 1, 2, 8, 1, 6, 4];
    let trained = untrained(&model.layout().shape, binding, sizes);
    Arc::new(Trained::parse(&trained.to_bytes()).unwrap())
}

#[test]
fn trained_forecasts_of_another_model_are_refused() {
    let backend: Arc<dyn Backend> =
        Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap());
    let path = models().into_iter().find(|path| path.ends_with("qwen3_moe.Q8_0.gguf")).unwrap();
    let load = |forecast: &str, fingerprint: Option<[u8; 32]>| {
        let opened = OpenedModel::open(&path, &mut |_| {}).unwrap();
        let slots = opened.layout().shape.layers.iter().map(|l| l.map_or(0, |l| l.top_k)).collect();
        let trained = fingerprint.map(|fingerprint| nonsense(&opened, Some(fingerprint)));
        let forecast = forecast.to_string();
        let streaming = Streaming { slots, trained, forecast, ..Default::default() };
        let residency = Residency::Streamed(streaming);
        opened.load(LoadOptions { backend: backend.clone(), residency }, &mut |_| {})
    };
    let here = OpenedModel::open(&path, &mut |_| {}).unwrap().fingerprint().unwrap();
    let columns = |model: Model| {
        model.store().unwrap().with_planner(|planner| planner.forecaster().unwrap().columns())
    };
    assert!(columns(load("blend", Some(here)).unwrap()).contains(&"learned-network"));
    assert!(columns(load("learned-path", Some(here)).unwrap()).contains(&"learned-path"));
    let error = load("blend", Some([1; 32])).err().unwrap().to_string();
    assert!(error.contains("nonsense") && error.contains("010101"), "{error}");
    let error = load("learned-network", None).err().unwrap().to_string();
    assert!(error.contains("learned-network needs a file"), "{error}");
}

#[test]
fn every_architecture_gives_the_bits_of_the_resident_run() {
    let backend: Arc<dyn Backend> =
        Arc::new(Cpu::new(CpuOptions { threads: Some(2), isa: None }).unwrap());
    let ways = [(DiskChoice::Auto, 0), (DiskChoice::Threads, 1), (DiskChoice::Buffered, 2)];
    for (path, (disk, extra)) in models().into_iter().zip(ways.into_iter().cycle()) {
        let options = LoadOptions { backend: backend.clone(), residency: Residency::Lazy };
        let resident = answer(&Model::load(&path, options, &mut |_| {}).unwrap(), 4);
        let model = streamed(&path, backend.clone(), disk, extra);
        let what = format!("{}, {disk}, {extra} slots more than top-k", path.display());
        assert!(answer(&model, 4) == resident, "{what}: other bits");
        let stats = model.store().unwrap().stats();
        let (prefill, decode) = (stats.prefill.total(), stats.decode.total());
        assert!(prefill.bytes_read() + decode.bytes_read() > 0, "{what}: no expert was read");
        assert_eq!(stats.decode.tokens, 6, "{what}");
    }
}

/// Two sessions of one model, on two threads, with slots for one token.
#[test]
fn sessions_side_by_side_give_the_bits_of_the_resident_run() {
    let backend: Arc<dyn Backend> =
        Arc::new(Cpu::new(CpuOptions { threads: Some(2), isa: None }).unwrap());
    let path = models().into_iter().find(|path| path.ends_with("qwen3_moe.Q8_0.gguf")).unwrap();
    let options = LoadOptions { backend: backend.clone(), residency: Residency::Lazy };
    let resident = Model::load(&path, options, &mut |_| {}).unwrap();
    let resident = [1, 4].map(|chunk| answer(&resident, chunk));
    let model = streamed(&path, backend, DiskChoice::Auto, 0);
    std::thread::scope(|scope| {
        for (chunk, resident) in [1, 4, 4].into_iter().zip([0, 1, 1].map(|i| &resident[i])) {
            let model = &model;
            scope.spawn(move || {
                for _ in 0..8 {
                    assert!(answer(model, chunk) == *resident, "chunks of {chunk}: other bits");
                }
            });
        }
    });
    let stats = model.store().unwrap().stats();
    // Seventeen tokens an answer, eleven of a prompt: one by one, or in chunks
    // of four, four and three.
    let (decode, prefill) = (8 * (17 + 6 + 6), 8 * (11 + 11));
    assert_eq!((stats.decode.tokens, stats.prefill.tokens), (decode, prefill));
}
