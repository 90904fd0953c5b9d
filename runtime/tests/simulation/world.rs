//! A tiny model, what it answers with everything in memory, and the same
//! model on the simulated machine.

use super::device::Checked;
use super::disk::{Copies, Link};
use super::faults::Plan;
use super::golden;
use super::machine::{Compute, Machine, Settings, Watch};
use super::scratch::Scratch;
use super::tiny::tiny;
use pregate_kernels::{Backend, Cpu, CpuOptions};
use pregate_predictor::Ahead;
use pregate_predictor::forecast::{hostile, learned::Binding};
use pregate_runtime::model::Source;
use pregate_runtime::{
    Cancel, Error, LoadOptions, Model, OpenedModel, Residency, Run, Session, SessionOptions,
    StreamStats, Streaming,
};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

/// The first tokens of the two conversations that every run has.
pub const PROMPTS: [&[u32]; 2] = [&[5, 42, 79, 116, 153, 190, 227, 264, 301, 18, 55], &[7, 300]];
/// Greedy tokens behind each prompt.
pub const ANSWER: usize = 6;

/// Logits as bits: after the prompt and after each token, for both prompts.
pub type Bits = Vec<Vec<u32>>;

/// A model file and the right answers.
pub struct World {
    pub path: PathBuf,
    pub bytes: Arc<[u8]>,
    pub oracle: Bits,
    /// Experts and top-k of its MoE layers.
    pub experts: usize,
    pub top_k: usize,
    _scratch: Option<Scratch>,
}

/// How experts are kept and guessed in a run.
#[derive(Clone, Debug)]
pub struct Config {
    pub slots: usize,
    pub ring: usize,
    pub policy: &'static str,
    pub forecast: &'static str,
    pub horizon: usize,
    pub threshold: f32,
    pub prefill_chunk: usize,
    pub copies: Copies,
    pub threads: usize,
}

pub fn cpu(threads: usize) -> Arc<dyn Backend> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(threads), isa: None }).unwrap())
}

impl World {
    /// The generated model, in a file of its own named after `test`.
    pub fn tiny(test: &str) -> Self {
        let scratch = Scratch::new(&format!("simulation-{test}"));
        let path = scratch.write("tiny.gguf", &tiny());
        Self { _scratch: Some(scratch), ..Self::of(path) }
    }

    /// One of the golden models.
    pub fn golden(name: &str) -> Self {
        Self::of(golden::find(&format!("gguf/{name}.gguf")).expect("in the repository"))
    }

    fn of(path: PathBuf) -> Self {
        let bytes: Arc<[u8]> = std::fs::read(&path).unwrap().into();
        let opened = OpenedModel::open(&path, &mut |_| {}).unwrap();
        let (_, layer) = opened.layout().shape.moe().next().expect("an MoE layer");
        let (experts, top_k) = (layer.experts, layer.top_k);
        let options = LoadOptions { backend: cpu(2), residency: Residency::Lazy };
        let model = opened.load(options, &mut |_| {}).unwrap();
        let mut oracle = Vec::new();
        for prompt in PROMPTS {
            let mut session = Session::new(&model, SessionOptions::default()).unwrap();
            let mut logits = bits(session.feed_quietly(prompt).unwrap());
            for _ in 0..ANSWER {
                oracle.push(logits);
                let token = greedy(oracle.last().unwrap());
                logits = bits(session.feed_quietly(&[token]).unwrap());
            }
            oracle.push(logits);
        }
        Self { path, bytes, oracle, experts, top_k, _scratch: None }
    }

    /// The slots of the issue: k, k + 1, 2k, E / 2 and E.
    pub fn slots(&self) -> Vec<usize> {
        let (k, e) = (self.top_k, self.experts);
        let all: BTreeSet<usize> = [k, k + 1, 2 * k, e / 2, e].into();
        all.into_iter().filter(|&slots| k <= slots && slots <= e).collect()
    }

    /// Loads the model onto a machine.
    pub fn start(
        &self,
        config: &Config,
        link: Link,
        plan: Plan,
        seed: u64,
        cpu: &Arc<dyn Backend>,
    ) -> Running<'_> {
        let (copies, compute) = (config.copies, Compute::default());
        let settings = Settings { seed, link, copies, plan, step_ns: 20_000, compute };
        self.start_on(config, settings, cpu)
    }

    /// The same with more to choose.
    pub fn start_on(
        &self,
        config: &Config,
        settings: Settings,
        cpu: &Arc<dyn Backend>,
    ) -> Running<'_> {
        let Settings { link, plan, compute, .. } = settings;
        let machine = Machine::new(settings, vec![(self.path.clone(), self.bytes.clone())]);
        let opened = OpenedModel::open(&self.path, &mut |_| {}).unwrap();
        let layers = opened.layout().shape.layers.iter();
        let slots = layers.map(|layer| layer.map_or(0, |_| config.slots)).collect();
        let maker = machine.clone();
        // A file of trained forecasts, which know nothing, in every other run.
        let has_file = config.forecast.starts_with("learned") || config.threads > 1;
        let trained = has_file.then(|| {
            let fingerprint = Some(opened.fingerprint().unwrap());
            let binding = Binding { model: String::new(), fingerprint };
            let sizes = [40, 1, 2, 8, 1, 6, 4];
            Arc::new(hostile::untrained(&opened.layout().shape, binding, sizes))
        });
        let streaming = Streaming {
            slots,
            ring: config.ring,
            policy: config.policy.to_string(),
            forecast: config.forecast.to_string(),
            trained,
            horizon: config.horizon,
            ahead: Ahead { threshold: config.threshold, ..Ahead::default() },
            source: Source::Custom(Box::new(move |files, _, frames| {
                Ok(maker.connect(files, frames))
            })),
        };
        let backend = Arc::new(Checked { inner: cpu.clone(), machine: machine.clone() });
        let options = LoadOptions { backend, residency: Residency::Streamed(streaming) };
        let model = opened.load(options, &mut |_| {}).unwrap();
        Running { world: self, config: config.clone(), link, plan, compute, machine, model }
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

pub fn greedy(bits: &[u32]) -> u32 {
    let logits: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
    golden::argmax(&logits)
}

/// A model on a machine.
pub struct Running<'w> {
    pub world: &'w World,
    pub config: Config,
    link: Link,
    plan: Plan,
    compute: Compute,
    pub machine: Machine,
    pub model: Model,
}

impl Running<'_> {
    pub fn session(&self) -> Session {
        let prefill_chunk = self.config.prefill_chunk;
        let options =
            SessionOptions { prefill_chunk, context: Some(64), ..SessionOptions::default() };
        Session::new(&self.model, options).unwrap()
    }

    /// Feeds tokens under all checks. After an error the session holds what
    /// was done of them.
    pub fn feed(
        &self,
        session: &mut Session,
        tokens: &[u32],
        cancel: &Cancel,
    ) -> Result<Vec<u32>, Error> {
        self.machine.begin(self.bound_ns(tokens.len()));
        let mut observer = Watch(self.machine.clone());
        let mut run = Run { observer: &mut observer, cancel, progress: None };
        let result = session.feed(tokens, &mut run).map(bits);
        self.machine.end();
        match &result {
            Ok(bits) => self.machine.note(bits),
            Err(error) => self.machine.note(error.to_string()),
        }
        self.check_rest();
        result
    }

    /// What a pass may take: every read that it can ask for, behind whatever
    /// was being read ahead, each as slow as the link and the faults allow.
    fn bound_ns(&self, tokens: usize) -> u64 {
        let layout = self.model.store().expect("streamed").layout();
        let pieces = layout.class_bytes.iter().map(|&bytes| bytes.div_ceil(self.link.chunk_bytes));
        let reads = pieces.max().unwrap_or(0) + 3;
        let passes = tokens.div_ceil(self.config.prefill_chunk);
        let demands = |layer: usize| {
            let shape = layout.shape.layer(layer);
            shape.map_or(0, |shape| shape.experts.min(tokens * shape.top_k) + 2 * self.config.ring)
        };
        let fills: usize = (0..layout.shape.layers.len()).map(demands).sum();
        let fills = (passes * fills) as u64;
        let read_ns = 2 * self.link.read_ns() + self.plan.slowest_ns();
        let Compute { expert_ns, attention_ns } = self.compute;
        let layers = (passes * layout.shape.layers.len()) as u64;
        let work_ns = fills * expert_ns + layers * attention_ns;
        fills * reads as u64 * read_ns + 20_000 * 1000 * fills.max(1) + work_ns
    }

    pub fn check_rest(&self) {
        let store = self.model.store().expect("streamed");
        let residents = store.with_planner(|planner| {
            let cache = planner.cache();
            let mut keys = BTreeSet::new();
            for (layer, shape) in store.layout().shape.moe() {
                let here: Vec<u32> = cache.resident(layer).collect();
                assert!(here.len() <= shape.experts, "I11: layer {layer}");
                keys.extend(here.iter().map(|&expert| (layer as u64) << 32 | u64::from(expert)));
            }
            let slots: usize = store.layout().shape.moe().count() * self.config.slots;
            assert!(keys.len() <= slots, "I11: {} of {slots} slots are taken", keys.len());
            keys
        });
        self.machine.check_rest(&residents, self.config.forecast != "none");
    }

    pub fn stats(&self) -> StreamStats {
        self.model.store().expect("streamed").stats()
    }

    /// Both conversations, their tokens interleaved after the prompts when
    /// `mixed`, against the oracle. `what` names the run.
    pub fn converse(&self, mixed: bool, what: &dyn Fn() -> String) {
        let mut sessions = PROMPTS.map(|prompt| (self.session(), prompt.to_vec(), 0));
        let cancel = Cancel::new();
        let steps = ANSWER + 1;
        for turn in 0..2 * steps {
            let which = if mixed { turn % 2 } else { turn / steps };
            let (session, next, done) = &mut sessions[which];
            let bits = match self.feed(session, next, &cancel) {
                Ok(bits) => bits,
                Err(error) => panic!("{}: {error}", what()),
            };
            let right = &self.world.oracle[which * steps + *done];
            assert!(bits == *right, "I1: {}: other logits at step {done}", what());
            *next = vec![greedy(&bits)];
            *done += 1;
        }
    }
}
