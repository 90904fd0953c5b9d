//! Models on a GPU have the bits of the CPU: every architecture, prompts in
//! pieces, tokens behind them, and what the routers chose.

#[path = "support/golden.rs"]
#[allow(dead_code)]
mod golden;

use golden::{argmax, models};
use pregate_kernels::{Cpu, CpuOptions, Isa};
use pregate_predictor::Observer;
use pregate_runtime::{
    Cancel, KvFormat, LoadOptions, Model, Residency, Run, Session, SessionOptions,
};
use pregate_standin::testing;
use std::path::Path;
use std::sync::Arc;

/// Layer, position, experts and the bits of their weights.
type Choice = (usize, usize, Vec<u32>, Vec<u32>);

#[derive(Default)]
struct Routes(Vec<Choice>);

impl Observer for Routes {
    fn routed(&mut self, layer: usize, position: usize, ids: &[u32], weights: &[f32]) {
        let weights = weights.iter().map(|weight| weight.to_bits()).collect();
        self.0.push((layer, position, ids.to_vec(), weights));
    }
}

fn load(path: &Path, residency: Residency) -> Model {
    let cpu = Cpu::new(CpuOptions { threads: Some(2), isa: Some(Isa::Scalar) }).unwrap();
    let options = LoadOptions { backend: Arc::new(cpu), residency };
    Model::load(path, options, &mut |_| {}).unwrap()
}

/// Logits and choices of a prompt and of greedy tokens behind it, as bits;
/// then of another prompt that shares its beginning.
fn answer(model: &Model, kv: KvFormat) -> (Vec<u32>, Vec<Choice>) {
    let options = SessionOptions { context: Some(64), kv, prefill_chunk: 5 };
    let mut session = Session::new(model, options).unwrap();
    let vocab = model.description().vocab as u32;
    let prompt: Vec<u32> = (0..9).map(|i| (i * 37 + 5) % vocab).collect();
    let other: Vec<u32> = (0..6).map(|i| if i < 4 { prompt[i] } else { 7 + i as u32 }).collect();
    let (mut bits, mut routes) = (Vec::new(), Routes::default());
    let cancel = Cancel::new();
    let mut feed = |session: &mut Session, tokens: &[u32]| {
        let mut run = Run { observer: &mut routes, cancel: &cancel, progress: None };
        let logits = session.feed(tokens, &mut run).unwrap().to_vec();
        bits.extend(logits.iter().map(|logit| logit.to_bits()));
        argmax(&logits)
    };
    let mut next = feed(&mut session, &prompt);
    for _ in 0..2 {
        next = feed(&mut session, &[next]);
    }
    let kept = session.keep_prefix(&other);
    feed(&mut session, &other[kept..]);
    let mut run = Run { observer: &mut routes, cancel: &cancel, progress: None };
    let all = session.feed_all(&prompt[..3], &mut run).unwrap();
    bits.extend(all.iter().map(|logit| logit.to_bits()));
    routes.0.sort();
    (bits, routes.0)
}

#[test]
fn every_architecture_has_the_bits_of_the_cpu() {
    for (index, path) in models().into_iter().enumerate() {
        let Some(device) = testing::device() else { return };
        let kv = if index % 2 == 0 { KvFormat::F16 } else { KvFormat::F32 };
        let expected = answer(&load(&path, Residency::Lazy), kv);
        let found = answer(&load(&path, Residency::Gpu(device)), kv);
        assert!(found.0 == expected.0, "{}: other logits", path.display());
        assert!(found.1 == expected.1, "{}: other choices", path.display());
        assert!(!found.1.is_empty(), "{}", path.display());
    }
}
