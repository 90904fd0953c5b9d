//! The same bits as on the CPU, wherever experts are and however they come: on
//! the GPU for good, in slots, computed by the host, copied; whatever the
//! forecast, the policy, the pieces of a prompt, page-locked memory or none,
//! and copies and launches that land early, late or in any order.

#[path = "support/gguf_builder.rs"]
mod gguf_builder;
#[path = "support/golden.rs"]
#[allow(dead_code)]
mod golden;
#[path = "support/scratch.rs"]
mod scratch;
#[path = "support/tiny.rs"]
mod tiny;

use golden::argmax;
use pregate_kernels::cuda::{Device, DeviceOptions, Modules};
use pregate_kernels::{Backend, Cpu, CpuOptions};
use pregate_predictor::{Ahead, forecast, policy};
use pregate_runtime::model::Source;
use pregate_runtime::{
    GpuExperts, LoadOptions, Misses, Model, OpenedModel, Residency, Session, SessionOptions,
    StreamStats, Streaming,
};
use pregate_standin::{Drain, Standin, testing};
use scratch::Scratch;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Experts of a layer, and those of a token, in the tiny model.
const EXPERTS: usize = 16;
const TOP_K: usize = 2;
/// Configurations in a run of the tests.
const SAMPLE: usize = 320;
/// Longer than what decode's kernels take at once, and shorter.
const PROMPTS: [&[u32]; 2] = [&[5, 42, 79, 116, 153, 190, 227, 264, 301], &[7, 300]];
/// Greedy tokens behind each prompt.
const ANSWER: usize = 3;

/// Numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ (word >> 31)) % limit as u64) as usize
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

#[derive(Clone, Debug)]
struct Config {
    /// `None`: all experts stay on the device.
    fixed: Option<usize>,
    /// `None`: the other experts stay on the host.
    slots: Option<usize>,
    ring: usize,
    misses: Misses,
    forecast: &'static str,
    horizon: usize,
    policy: &'static str,
    prefill_chunk: usize,
    /// A token is one graph.
    graphs: bool,
    drain: Drain,
    /// Page-locked memory that the system gives.
    pinned: u64,
}

impl Config {
    /// Every value of every axis comes up; what would not work is not drawn.
    fn draw(random: &mut Random, seed: u64) -> Self {
        let fixed = random.pick(&[None, Some(0), Some(0), Some(0), Some(1), Some(8)]);
        let moving = fixed.map_or(0, |fixed| EXPERTS - fixed);
        let slots = [TOP_K, TOP_K + 1, 2 * TOP_K, EXPERTS / 2, moving];
        let slots = random.pick(&slots.map(|slots| slots.min(moving)));
        let forecasts: Vec<&str> = ["none", "blend"].into_iter().chain(forecast::NAMES).collect();
        Self {
            fixed,
            slots: (fixed.is_some() && random.below(8) > 0).then_some(slots),
            ring: random.pick(&[1, 2, 3, 8]),
            misses: random.pick(&[Misses::Auto, Misses::Host, Misses::Copied]),
            forecast: random.pick(&forecasts),
            horizon: random.pick(&[1, 2]),
            policy: random.pick(&policy::NAMES),
            prefill_chunk: random.pick(&[2, 4, 64, 64]),
            graphs: random.below(3) > 0,
            drain: random.pick(&[Drain::Lazy, Drain::Eager, Drain::Random(seed + 1)]),
            pinned: random.pick(&[u64::MAX >> 1, u64::MAX >> 1, 0]),
        }
    }

    fn residency(&self, device: Device, layers: usize) -> Residency {
        let per_layer = |count| vec![count; layers];
        let streaming = |slots| Streaming {
            slots: per_layer(slots),
            ring: self.ring,
            policy: self.policy.to_string(),
            forecast: self.forecast.to_string(),
            horizon: self.horizon,
            // A low bar, so that guesses are acted upon.
            ahead: Ahead { threshold: 0.1, ..Ahead::default() },
            source: Source::Host,
        };
        let experts = match (self.fixed, self.slots) {
            (None, _) => GpuExperts::All,
            (Some(fixed), None) => GpuExperts::Some { fixed: per_layer(fixed) },
            (Some(fixed), Some(slots)) => GpuExperts::Moving {
                fixed: per_layer(fixed),
                streaming: streaming(slots),
                misses: self.misses,
            },
        };
        Residency::Gpu { device, experts }
    }
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap())
}

/// Logits as bits, after each prompt and after each token behind it.
fn converse(model: &Model, prefill_chunk: usize, graphs: bool) -> Vec<Vec<u32>> {
    let options =
        SessionOptions { context: Some(32), prefill_chunk, graphs, ..SessionOptions::default() };
    let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect();
    let mut all: Vec<Vec<u32>> = Vec::new();
    for prompt in PROMPTS {
        let mut session = Session::new(model, options).unwrap();
        let mut logits = session.feed_quietly(prompt).unwrap().to_vec();
        all.push(bits(&logits));
        for _ in 0..ANSWER {
            logits = session.feed_quietly(&[argmax(&logits)]).unwrap().to_vec();
            all.push(bits(&logits));
        }
    }
    all
}

/// Nothing is silently inert.
fn check_statistics(config: &Config, stats: &StreamStats) {
    let (prefill, decode) = (stats.prefill.total(), stats.decode.total());
    let moving = EXPERTS - config.fixed.unwrap_or(0);
    let slots = config.slots.unwrap_or(0);
    assert!(prefill.requests() + decode.requests() > 0, "{config:?}: nothing was asked for");
    let (missed, left) = (prefill.misses + decode.misses, prefill.left + decode.left);
    let read = prefill.bytes_read() + decode.bytes_read();
    if 2 * slots < moving {
        assert!(missed > 0, "{config:?}: nothing was missing");
        match config.misses {
            Misses::Host => assert_eq!(left, missed, "{config:?}"),
            // Those of a token for which there is no frame are the host's.
            Misses::Copied => {
                let enough = config.forecast == "none" && config.ring >= TOP_K;
                assert!(read > 0 && (left == 0 || !enough), "{config:?}: {left} left, {read}");
            }
            Misses::Auto => assert!(left > 0 || read > 0, "{config:?}: nobody brought them"),
        }
    }
    if slots == moving {
        assert_eq!(missed, 0, "{config:?}: all were there");
    }
}

fn check(standin: &Standin, path: &Path, expected: &[Vec<u32>], config: &Config) {
    standin.reset();
    standin.set_drain(config.drain);
    let device = Device::open(0, &DeviceOptions { modules: Modules::Named }).unwrap();
    let opened = OpenedModel::open(path, &mut |_| {}).unwrap();
    let layers = opened.layout().shape.layers.len();
    let residency = config.residency(device, layers);
    // What staging took before does not count.
    standin.set_pinned(config.pinned);
    let options = LoadOptions { backend: cpu(), residency };
    let model = opened.load(options, &mut |_| {}).unwrap();
    standin.set_pinned(u64::MAX >> 1);
    let found = converse(&model, config.prefill_chunk, config.graphs);
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(found == expected, "{config:?}: other logits at step {at}");
    }
    assert_eq!(found.len(), expected.len());
    if let Some(store) = model.store() {
        check_statistics(config, &store.stats());
        let (pinned, pageable) = model.gpu().unwrap().host_bytes();
        assert_eq!(pageable.is_some(), config.pinned == 0, "{config:?}: {pinned} pinned");
    }
    drop(model);
    let violations = standin.take_violations();
    assert!(violations.is_empty(), "{config:?}: {violations:?}");
}

fn tiny_model(scratch: &Scratch) -> PathBuf {
    scratch.write("tiny.gguf", &tiny::tiny())
}

/// 320 configurations, drawn by a seed: `PREGATE_IDENTITY=<number>` draws
/// others.
#[test]
fn experts_anywhere_give_the_bits_of_the_cpu() {
    let Some(standin) = testing::standin() else { return };
    let standin = standin.exclusive();
    let scratch = Scratch::new("gpu-identity");
    let path = tiny_model(&scratch);
    let options = LoadOptions { backend: cpu(), residency: Residency::Lazy };
    let expected = converse(&Model::load(&path, options, &mut |_| {}).unwrap(), 64, true);
    let asked = std::env::var("PREGATE_IDENTITY").ok().and_then(|seed| seed.parse().ok());
    let mut random = Random(asked.unwrap_or(1));
    let started = std::time::Instant::now();
    for seed in 0..SAMPLE as u64 {
        check(&standin, &path, &expected, &Config::draw(&mut random, seed));
    }
    println!("{SAMPLE} configurations in {:.1?}", started.elapsed());
}
