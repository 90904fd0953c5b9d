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

use gguf_builder::{Gguf, u32 as number};
use golden::argmax;
use pregate_kernels::cuda::Device;
use pregate_kernels::{Backend, Cpu, CpuOptions, Routes};
use pregate_predictor::{Ahead, NoObserver, forecast, policy};
use pregate_runtime::gpu::HostFrames;
use pregate_runtime::model::{BelowHost, Source};
use pregate_runtime::store::disk::{DiskChoice, DiskOptions};
use pregate_runtime::store::{ExpertStore, Missing, PassInfo};
use pregate_runtime::{
    Cancel, GpuExperts, LoadOptions, Misses, Model, OpenedModel, Residency, Session,
    SessionOptions, StreamStats, Streaming,
};
use pregate_standin::{Drain, Exclusive, testing};
use scratch::Scratch;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Experts of a layer, and those of a token, in the tiny model.
const EXPERTS: usize = 16;
const TOP_K: usize = 2;
/// Configurations in a run over the stand-in, and on a GPU: the first of them.
const SAMPLE: usize = 320;
const SAMPLE_ON_GPU: usize = 50;
/// Page-locked memory that a system gives which does not limit it.
const UNLIMITED: u64 = u64::MAX >> 1;
/// Longer than what decode's kernels take at once, and shorter.
const PROMPTS: [&[u32]; 2] = [&[5, 42, 79, 116, 153, 190, 227, 264, 301], &[7, 300]];
/// Greedy tokens behind each prompt.
const ANSWER: usize = 2;

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

/// The host has no room for all experts.
#[derive(Clone, Copy, Debug)]
struct Below {
    /// Per layer that it keeps.
    kept: usize,
    /// Per class of sizes, that others are read into.
    frames: usize,
    disk: DiskChoice,
}

#[derive(Clone, Debug)]
struct Config {
    /// `None`: all experts stay on the device.
    fixed: Option<usize>,
    /// `None`: the other experts stay on the host.
    slots: Option<usize>,
    ring: usize,
    below: Option<Below>,
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
    /// Accesses of kernels are looked at, which is slow.
    checks: bool,
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
            below: (random.below(3) == 0).then(|| Below {
                kept: random.pick(&[0, 0, 1, moving / 2]).min(moving),
                frames: random.pick(&[2, TOP_K + 1, 2 * TOP_K, EXPERTS]),
                disk: random.pick(&[DiskChoice::Auto, DiskChoice::Buffered]),
            }),
            misses: random.pick(&[Misses::Auto, Misses::Host, Misses::Copied]),
            forecast: random.pick(&forecasts),
            horizon: random.pick(&[1, 2]),
            policy: random.pick(&policy::NAMES),
            prefill_chunk: random.pick(&[2, 4, 64, 64]),
            graphs: random.below(3) > 0,
            drain: random.pick(&[Drain::Lazy, Drain::Eager, Drain::Random(seed + 1)]),
            pinned: random.pick(&[UNLIMITED, UNLIMITED, 0]),
            checks: random.below(5) == 0,
        }
    }

    fn source(&self, layers: usize, classes: usize) -> Source {
        let Some(Below { kept, frames, disk }) = self.below else { return Source::Host };
        let options = DiskOptions { choice: disk, measure_ns: 0, ..DiskOptions::default() };
        let source = Box::new(Source::Disk(options));
        Source::HostAndDisk(BelowHost {
            kept: vec![kept; layers],
            frames: vec![frames; classes],
            source,
        })
    }

    fn residency(&self, device: Device, [layers, classes]: [usize; 2]) -> Residency {
        let per_layer = |count| vec![count; layers];
        let streaming = |slots| Streaming {
            slots: per_layer(slots),
            ring: self.ring,
            policy: self.policy.to_string(),
            forecast: self.forecast.to_string(),
            trained: None,
            horizon: self.horizon,
            // A low bar, so that guesses are acted upon.
            ahead: Ahead { threshold: 0.1, ..Ahead::default() },
            source: self.source(layers, classes),
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
        assert_eq!(session.warning(), None, "graphs {graphs}");
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

/// Where a configuration runs: the stand-in, or with `PREGATE_TEST_GPU=1` the
/// first GPU, whose order and page-locked memory nobody sets.
struct Place(Option<Exclusive<'static>>);

impl Place {
    /// `None`, and it was said why: there is nothing to run on.
    fn find() -> Option<Self> {
        // Before anything is opened: the other test has the machine till then.
        let standin = testing::standin().map(|standin| standin.exclusive());
        testing::device().map(|_| Self(standin))
    }

    /// The configurations that are drawn first, as they are possible here.
    fn draw(&self, seed: u64) -> Vec<Config> {
        let count = if self.0.is_some() { SAMPLE } else { SAMPLE_ON_GPU };
        let mut random = Random(seed);
        let mut all: Vec<_> =
            (0..count as u64).map(|seed| Config::draw(&mut random, seed)).collect();
        if self.0.is_none() {
            all.iter_mut().for_each(|config| config.pinned = UNLIMITED);
        }
        all
    }

    /// A device in the order of copies and launches that `config` asks for.
    fn open(&self, config: &Config) -> Device {
        if let Some(standin) = &self.0 {
            standin.reset();
            standin.set_drain(config.drain);
            standin.set_checks(config.checks);
        }
        testing::device().expect("it was there before")
    }

    fn set_pinned(&self, bytes: u64) {
        if let Some(standin) = &self.0 {
            standin.set_pinned(bytes);
        }
    }

    /// What the stand-in found wrong; a GPU's own faults are errors of calls.
    fn violations(&self) -> Vec<String> {
        self.0.as_ref().map_or_else(Vec::new, |standin| standin.take_violations())
    }
}

fn check(place: &Place, path: &Path, expected: &[Vec<u32>], config: &Config) {
    let device = place.open(config);
    let opened = OpenedModel::open(path, &mut |_| {}).unwrap();
    let layout = opened.layout();
    let sizes = [layout.shape.layers.len(), layout.class_bytes.len()];
    let residency = config.residency(device, sizes);
    // What staging took before does not count.
    place.set_pinned(config.pinned);
    let options = LoadOptions { backend: cpu(), residency };
    let model = opened.load(options, &mut |_| {}).unwrap();
    place.set_pinned(UNLIMITED);
    let found = converse(&model, config.prefill_chunk, config.graphs);
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(found == expected, "{config:?}: other logits at step {at}");
    }
    assert_eq!(found.len(), expected.len());
    if let Some(store) = model.store() {
        check_statistics(config, &store.stats());
        let (pinned, pageable) = model.gpu().unwrap().host_bytes();
        assert_eq!(pageable.is_some(), config.pinned == 0, "{config:?}: {pinned} pinned");
        let read = model.gpu().unwrap().host_frames().map(HostFrames::stats);
        assert_eq!(read.is_some(), config.below.is_some());
        assert!(read.is_none_or(|read| read.misses > 0 && read.bytes_read > 0), "{read:?}");
    }
    drop(model);
    let violations = place.violations();
    assert!(violations.is_empty(), "{config:?}: {violations:?}");
}

fn tiny_model(scratch: &Scratch) -> PathBuf {
    scratch.write("tiny.gguf", &tiny::tiny())
}

/// Set in the process that runs the second half of the configurations.
const SECOND_HALF: &str = "PREGATE_IDENTITY_SECOND_HALF";

/// The second half, in a process of its own: the stand-in computes on one core.
fn second_half(test: &'static str) -> JoinHandle<Output> {
    std::thread::spawn(move || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).env(SECOND_HALF, "1").output().unwrap()
    })
}

/// 320 configurations, or 50 on a GPU, drawn by a seed:
/// `PREGATE_IDENTITY=<number>` draws others.
#[test]
fn experts_anywhere_give_the_bits_of_the_cpu() {
    let Some(place) = Place::find() else { return };
    let scratch = Scratch::new("gpu-identity");
    let path = tiny_model(&scratch);
    let options = LoadOptions { backend: cpu(), residency: Residency::Lazy };
    let expected = converse(&Model::load(&path, options, &mut |_| {}).unwrap(), 64, true);
    let asked = std::env::var("PREGATE_IDENTITY").ok().and_then(|seed| seed.parse().ok());
    let mut configs = place.draw(asked.unwrap_or(1));
    let mut other = None;
    if place.0.is_some() {
        let second = configs.split_off(configs.len() / 2);
        if std::env::var_os(SECOND_HALF).is_some() {
            configs = second;
        } else {
            other = Some(second_half("experts_anywhere_give_the_bits_of_the_cpu"));
        }
    }
    let started = std::time::Instant::now();
    for config in &configs {
        check(&place, &path, &expected, config);
    }
    println!("{} configurations in {:.1?}", configs.len(), started.elapsed());
    if let Some(other) = other {
        let output = other.join().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success() && text.contains("1 passed"), "second half: {text}");
    }
}

/// A token's pass in which the host computes what is missing, and an idle link
/// brings it for later; without the device.
fn keep_what_is_missing(store: &ExpertStore, token: usize) {
    let (cancel, routes) = (Cancel::new(), Routes::new());
    let pass = PassInfo { ids: &[0], session: 99, is_start: false, keeps_ahead: true };
    let turn = store.begin_pass(pass, &cancel).unwrap();
    for layer in store.layout().shape.moe().map(|(layer, _)| layer) {
        let experts = [0, 5].map(|at| ((3 * token / 2 + at) % EXPERTS) as u32);
        let mut leave = |missing: Missing<'_>| missing.missing.to_vec();
        let mut event = store.begin_shared(layer, &experts, &routes, &mut leave);
        let left = event.left().to_vec();
        event.keep(left.into_iter().map(|id| (id, 1000)));
        let mut there = Vec::new();
        while event.more(&cancel, &mut there).unwrap() > 0 {}
        drop(there);
        event.settled();
        event.finish(0, 1, &mut NoObserver);
    }
    drop(turn);
}

/// What is copied for later tokens takes slots between them and in them, and
/// the bits stay the CPU's.
#[test]
fn what_the_host_computed_is_kept() {
    let Some(standin) = testing::standin() else { return };
    let standin = standin.exclusive();
    standin.set_checks(false);
    let scratch = Scratch::new("gpu-identity-kept");
    let path = tiny_model(&scratch);
    let answers = |residency| {
        let options = LoadOptions { backend: cpu(), residency };
        let model = Model::load(&path, options, &mut |_| {}).unwrap();
        let options = SessionOptions { context: Some(64), ..SessionOptions::default() };
        let mut session = Session::new(&model, options).unwrap();
        let mut logits = session.feed_quietly(PROMPTS[0]).unwrap().to_vec();
        let mut all = logits.clone();
        for token in 0..40 {
            if let Some(store) = model.store() {
                keep_what_is_missing(store, token);
            }
            logits = session.feed_quietly(&[argmax(&logits)]).unwrap().to_vec();
            all.extend_from_slice(&logits);
        }
        drop(session);
        (all.iter().map(|logit| logit.to_bits()).collect::<Vec<u32>>(), model)
    };
    let (expected, plain) = answers(Residency::Lazy);
    let layers = plain.description().layers.len();
    for (drain, policy) in [(Drain::Eager, "lru"), (Drain::Random(5), "forecast-aware")] {
        let config = Config {
            fixed: Some(0),
            slots: Some(EXPERTS / 2),
            ring: 4,
            below: None,
            misses: Misses::Auto,
            forecast: "none",
            horizon: 1,
            policy,
            prefill_chunk: 64,
            graphs: true,
            drain,
            pinned: UNLIMITED,
            checks: false,
        };
        standin.set_drain(drain);
        let device = testing::device().expect("the stand-in opens");
        let (found, model) = answers(config.residency(device, [layers, 0]));
        assert!(found == expected, "{policy}: other logits");
        let store = model.store().unwrap();
        let kept = store.with_planner(|planner| planner.ledger().kept_traffic());
        assert!(kept.issued >= 10 && kept.useful > 0 && kept.saved_ns >= 1000, "{kept:?}");
    }
    assert!(standin.take_violations().is_empty());
}

/// A session's first graph is for 256 positions; behind them it needs another,
/// and has both.
#[test]
fn a_context_that_outgrows_a_graph_gives_the_bits_of_the_cpu() {
    let Some(standin) = testing::standin() else { return };
    let standin = standin.exclusive();
    standin.set_checks(false);
    let scratch = Scratch::new("gpu-identity-graphs");
    let longer = Gguf::from_bytes(&tiny::tiny()).replace("qwen3moe.context_length", number(300));
    let path = scratch.write("tiny.gguf", &longer.build());
    let answers = |residency| {
        let options = LoadOptions { backend: cpu(), residency };
        let model = Model::load(&path, options, &mut |_| {}).unwrap();
        let options =
            SessionOptions { context: Some(300), prefill_chunk: 16, ..SessionOptions::default() };
        let mut session = Session::new(&model, options).unwrap();
        let prompt: Vec<u32> = (0..253).map(|i| (i * 37 + 5) % 300).collect();
        let mut logits = session.feed_quietly(&prompt).unwrap().to_vec();
        let mut all = logits.clone();
        for _ in 253..258 {
            logits = session.feed_quietly(&[argmax(&logits)]).unwrap().to_vec();
            all.extend_from_slice(&logits);
        }
        all.iter().map(|logit| logit.to_bits()).collect::<Vec<u32>>()
    };
    let expected = answers(Residency::Lazy);
    let device = testing::device().expect("the stand-in opens");
    let found = answers(Residency::Gpu { device, experts: GpuExperts::All });
    assert!(found == expected);
    assert_eq!(standin.calls_of("cuGraphInstantiateWithFlags"), 2);
    assert!(standin.take_violations().is_empty());
}
