//! Models on a GPU have the bits of the CPU: every architecture, with all of
//! their experts on the device, half of them, or none; prompts in
//! pieces, tokens behind them, and what the routers chose. Long prompts, whose
//! attention has another order of sums, are compared by tolerance.

#[path = "support/golden.rs"]
#[allow(dead_code)]
mod golden;

use golden::{argmax, models};
use pregate_kernels::cuda::Device;
use pregate_kernels::{Cpu, CpuOptions, Isa};
use pregate_predictor::{LayerShape, Observer};
use pregate_runtime::model::Source;
use pregate_runtime::{
    Cancel, GpuExperts, KvFormat, LoadOptions, Misses, Model, OpenedModel, Residency, Run, Session,
    SessionOptions, Streaming,
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
    let options =
        SessionOptions { context: Some(64), kv, prefill_chunk: 12, ..SessionOptions::default() };
    let mut session = Session::new(model, options).unwrap();
    let vocab = model.description().vocab as u32;
    let prompt: Vec<u32> = (0..20).map(|i| (i * 37 + 5) % vocab).collect();
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

/// Ways to place experts; see [`on_gpu`].
const WAYS: usize = 5;

/// All experts on the device; about half of each layer, the host computes the
/// others; none; few slots that experts are copied to; one expert and slots,
/// and whatever is faster.
fn on_gpu(path: &Path, device: Device, way: usize) -> Residency {
    let opened = OpenedModel::open(path, &mut |_| {}).unwrap();
    let layers = &opened.layout().shape.layers;
    let of = |count: &dyn Fn(&LayerShape) -> usize| -> Vec<usize> {
        layers.iter().map(|layer| layer.as_ref().map_or(0, count)).collect()
    };
    let slots = |ring| {
        let slots = of(&|layer| (layer.top_k + 1).min(layer.experts));
        Streaming { slots, ring, source: Source::Host, ..Streaming::default() }
    };
    let experts = match way {
        0 => GpuExperts::All,
        1 => GpuExperts::Some { fixed: of(&|layer| layer.experts.div_ceil(2)) },
        2 => GpuExperts::Some { fixed: of(&|_| 0) },
        3 => GpuExperts::Moving { fixed: of(&|_| 0), streaming: slots(2), misses: Misses::Copied },
        _ => GpuExperts::Moving { fixed: of(&|_| 1), streaming: slots(1), misses: Misses::Auto },
    };
    Residency::Gpu { device, experts }
}

#[test]
fn every_architecture_has_the_bits_of_the_cpu() {
    for (index, path) in models().into_iter().enumerate() {
        let Some(device) = testing::device() else { return };
        let kv = if index % 2 == 0 { KvFormat::F16 } else { KvFormat::F32 };
        let expected = answer(&load(&path, Residency::Lazy), kv);
        let found = answer(&load(&path, on_gpu(&path, device, index % WAYS)), kv);
        assert!(found.0 == expected.0, "{}: other logits", path.display());
        assert!(found.1 == expected.1, "{}: other choices", path.display());
        assert!(!found.1.is_empty(), "{}", path.display());
    }
}

/// Logits after a prompt of 80 tokens in one pass, and after a token more.
fn long_prompt(model: &Model) -> Vec<f32> {
    let options = SessionOptions { context: Some(96), ..SessionOptions::default() };
    let mut session = Session::new(model, options).unwrap();
    let vocab = model.description().vocab as u32;
    let prompt: Vec<u32> = (0..80).map(|i| (i * i * 31 + i * 7 + 3) % vocab).collect();
    let mut logits = session.feed_quietly(&prompt).unwrap().to_vec();
    logits.extend_from_slice(session.feed_quietly(&[5]).unwrap());
    logits
}

/// The root of the mean square of what two lists of logits are apart, in
/// standard deviations of the second.
fn apart(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let count = wanted.len() as f64;
    let mean = wanted.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let variance = wanted.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count;
    let squares = found.iter().zip(wanted).map(|(a, b)| f64::from(a - b).powi(2));
    (squares.sum::<f64>() / count / variance).sqrt()
}

/// Queries and probabilities of attention are rounded to 11 bits, and gated
/// DeltaNet's chunks have another order of sums. Behind quantised activations
/// that may tip a code of 8 bits, so the measure is what these codes cost
/// themselves: the CPU's distance from the reference, which has none.
#[test]
fn long_prompts_are_as_near_to_the_cpu_as_their_kernels_promise() {
    let paths = ["gguf/qwen3_moe_k256.Q4_K_M.gguf", "hf/qwen3_5_moe_text"];
    for path in paths.map(|path| golden::find(path).expect("it is in the repository")) {
        let Some(device) = testing::device() else { return };
        let cpu = long_prompt(&load(&path, Residency::Lazy));
        let found = apart(&long_prompt(&load(&path, on_gpu(&path, device, 0))), &cpu);
        let backend = Arc::new(pregate_kernels::Reference);
        let options = LoadOptions { backend, residency: Residency::Lazy };
        let reference = long_prompt(&Model::load(&path, options, &mut |_| {}).unwrap());
        let price = apart(&reference, &cpu);
        println!("{}: {found:.1e}, reference {price:.1e}", path.display());
        assert!(found > 0.0, "{}: no other kernel ran", path.display());
        assert!(found < price.max(1e-5), "{}: {found}, {price}", path.display());
    }
}

/// Whatever the number of tokens that share a layer's copies, each has its own
/// attention: the passes' borders are not in the answer.
#[test]
fn a_prompt_has_the_same_answer_in_one_pass_and_in_several() {
    let Some(device) = testing::device() else { return };
    let path = golden::find("gguf/qwen3_moe_k256.Q4_K_M.gguf").expect("it is in the repository");
    let model = load(&path, on_gpu(&path, device, 3));
    let vocab = model.description().vocab as u32;
    let prompt: Vec<u32> = (0..200).map(|i| (i * i * 31 + i * 7 + 3) % vocab).collect();
    let answer = |prefill_chunk| {
        let options =
            SessionOptions { context: Some(256), prefill_chunk, ..SessionOptions::default() };
        let mut session = Session::new(&model, options).unwrap();
        let before = model.store().unwrap().stats().prefill.passes;
        let logits = session.feed_quietly(&prompt).unwrap().to_vec();
        (logits, model.store().unwrap().stats().prefill.passes - before)
    };
    let ((one, passes), (three, more)) = (answer(2048), answer(80));
    assert_eq!((passes, more), (1, 3), "passes over the layers");
    assert!(one == three, "{:.1e} apart", apart(&one, &three));
}
