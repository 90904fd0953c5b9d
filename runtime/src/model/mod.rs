//! A loaded model: files, description, weights and the device that computes.

mod checks;
pub mod description;
mod experts;
mod fingerprint;
mod from_gguf;
mod from_hf;
mod keys;
mod load;
pub mod rope;
pub mod router;
mod tensors;
pub mod weights;

use crate::error::{Error, Result};
use crate::files::{Container, ModelFiles};
use crate::forward::Engine;
use crate::gpu::GpuModel;
use crate::store::disk::{self, DiskOptions, DiskReport};
use crate::store::frames::{ClassSpec, Frames};
use crate::store::layout::ModelLayout;
use crate::store::mover::Mover;
use crate::store::{Clock, ExpertStore};
use crate::text::{ChatTemplate, Limits, Tokenizer};
use description::ModelDescription;
use pregate_kernels::Backend;
use pregate_kernels::cuda::Device;
use pregate_predictor::forecast::learned::Trained;
use pregate_predictor::forecast::{self, Forecaster};
use pregate_predictor::{Ahead, Cache, Planner, Shape, policy};
use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use weights::{GatedBlock, ModelWeights};

/// What a model is loaded onto.
pub struct LoadOptions {
    pub backend: Arc<dyn Backend>,
    pub residency: Residency,
}

/// Where weights are while the model is used.
#[derive(Default)]
pub enum Residency {
    /// In the mapped files; they come from disk page by page, when a
    /// computation touches them.
    #[default]
    Lazy,
    /// As [`Residency::Lazy`], but all are read while loading, in large pages
    /// where the system has them. The fastest for a model that fits in memory.
    Resident,
    /// Routed experts come from disk just in time; all other weights are read
    /// into memory while loading. The fastest for a model that does not fit.
    Streamed(Streaming),
    /// On a GPU.
    Gpu { device: Device, experts: GpuExperts },
}

/// Which routed experts are on a GPU. The host keeps all that may be absent.
#[derive(Default)]
pub enum GpuExperts {
    #[default]
    All,
    /// So many per layer of the model, always the same: its first ones.
    Some { fixed: Vec<usize> },
    /// As [`GpuExperts::Some`]; others come and go.
    Moving { fixed: Vec<usize>, streaming: Streaming, misses: Misses },
}

/// What becomes of experts that a token needs and a GPU does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Misses {
    /// Whatever is faster, as measured while running.
    #[default]
    Auto,
    /// The host computes them.
    Host,
    /// They are copied to the device.
    Copied,
}

/// How experts are streamed. The numbers come from [`crate::budget`].
pub struct Streaming {
    /// Experts to keep per layer of the model, 0 for dense layers.
    pub slots: Vec<usize>,
    /// Further frames of each size, which experts are read into.
    pub ring: usize,
    /// One of [`pregate_predictor::policy::NAMES`].
    pub policy: String,
    /// One of [`pregate_predictor::forecast::NAMES`], "blend" or "none".
    pub forecast: String,
    /// What was trained from traces of this model; joins the blend, and adds
    /// [`pregate_predictor::forecast::LEARNED`] to the names; its tables join
    /// the policies that learned. Where a GPU keeps a part of each layer's
    /// experts for good, it is not used.
    pub trained: Option<Arc<Trained>>,
    /// MoE layers that forecasts look ahead.
    pub horizon: usize,
    /// When a forecast becomes a read.
    pub ahead: Ahead,
    pub source: Source,
}

impl Default for Streaming {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            ring: 8,
            policy: policy::DEFAULT.to_string(),
            forecast: "blend".to_string(),
            trained: None,
            horizon: pregate_predictor::forecast::HORIZON,
            ahead: Ahead::default(),
            source: Source::Disk(DiskOptions::default()),
        }
    }
}

/// What brings experts.
pub enum Source {
    /// The model's files.
    Disk(DiskOptions),
    /// Host memory; only of [`GpuExperts::Moving`].
    Host,
    /// Host memory that has no room for all of them; likewise.
    HostAndDisk(BelowHost),
    /// Something else that reads them: the simulated disk of the tests.
    Custom(Box<MakeMover>),
}

/// Experts that neither a GPU nor the host keeps: they are read when they are
/// needed.
pub struct BelowHost {
    /// Experts that the host keeps, per layer of the model: the last ones.
    pub kept: Vec<usize>,
    /// Frames that the others are read into, per class of the model's layout.
    pub frames: Vec<usize>,
    /// [`Source::Disk`], or [`Source::Custom`].
    pub source: Box<Source>,
}

impl BelowHost {
    /// The frames of each class; none has fewer than two.
    pub fn specs(&self, layout: &ModelLayout) -> Vec<ClassSpec> {
        let all = layout.class_bytes.iter().enumerate();
        let frames = |class| self.frames.get(class).copied().unwrap_or(0).max(2);
        all.map(|(class, &frame_bytes)| ClassSpec { frame_bytes, frames: frames(class) }).collect()
    }

    /// Of all frames.
    pub fn frames_bytes(&self, layout: &ModelLayout) -> u64 {
        let specs = self.specs(layout).into_iter();
        specs.map(|spec| spec.frame_bytes as u64 * spec.frames as u64).sum()
    }
}

/// Makes a mover for the model's files, and the clock of its machine.
pub type MakeMover =
    dyn FnOnce(&ModelFiles, &ModelLayout, &Arc<Frames>) -> Result<(Box<dyn Mover>, Clock)> + Send;

/// How far loading is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Of the files, while they are read into memory; 0 before and without.
    pub bytes_done: u64,
    pub bytes: u64,
    pub layers_done: usize,
    pub layers: usize,
}

/// A model whose files are opened and checked, and for which no large memory
/// was taken yet.
pub struct OpenedModel {
    files: ModelFiles,
    description: ModelDescription,
    weights: ModelWeights,
    layout: ModelLayout,
    tokenizer: OnceLock<Tokenizer>,
}

impl OpenedModel {
    /// Maps the files at `path` (a GGUF file or a folder) and checks every
    /// tensor that the architecture needs.
    pub fn open(path: &Path, progress: &mut dyn FnMut(LoadProgress)) -> Result<Self> {
        let files = ModelFiles::open(path)?;
        let description = describe(&files)?;
        let mut done = LoadProgress { layers: description.layers.len(), ..Default::default() };
        let weights = load::load_weights(&files, &description, &mut |layers_done| {
            done.layers_done = layers_done;
            progress(done);
        })?;
        let layout = ModelLayout::new(&files, &weights, |layer| description.top_k(layer));
        Ok(Self { files, description, weights, layout, tokenizer: OnceLock::new() })
    }

    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    pub fn description(&self) -> &ModelDescription {
        &self.description
    }

    pub fn weights(&self) -> &ModelWeights {
        &self.weights
    }

    /// Where experts lie in the files and in frames.
    pub fn layout(&self) -> &ModelLayout {
        &self.layout
    }

    /// As [`Model::fingerprint`].
    ///
    /// # Errors
    /// Files that cannot be read any more.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        fingerprint::fingerprint(&self.files, &self.description, &self.weights)
    }

    /// As [`Model::tokenizer`], which is this one: who plans memory reads it
    /// first.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        tokenizer(&self.tokenizer, &self.files, self.description.vocab)
    }

    /// Weight bytes that one decoded token reads, with average experts.
    pub fn bytes_per_token(&self) -> u64 {
        self.weights.bytes_per_token(&self.description)
    }

    /// Brings the weights to where `options` wants them.
    pub fn load(
        mut self,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Model> {
        let layers = self.description.layers.len();
        let done = LoadProgress { layers, layers_done: layers, ..Default::default() };
        let mut tell = |bytes_done, bytes| progress(LoadProgress { bytes_done, bytes, ..done });
        self.fits(&options.residency)?;
        let mut gpu = None;
        let store = match options.residency {
            Residency::Lazy => None,
            Residency::Gpu { device, experts } => {
                let of = (&self.files, &self.description, &self.weights);
                let model = GpuModel::upload(device, of, self.layout, experts, &mut tell)?;
                if model.host_frames().is_some() {
                    // A file that changes is an error value here as well: what
                    // the host needs beside experts is read by position.
                    self.files.hold(&[], &mut |_, _| {})?;
                }
                gpu = Some(model);
                None
            }
            Residency::Resident => {
                self.files.make_resident(&mut tell)?;
                None
            }
            Residency::Streamed(streaming) => {
                let which = self.tensors_of_every_token();
                self.files.hold(&which, &mut tell)?;
                Some(open_store(&self.files, self.layout, streaming)?)
            }
        };
        let shared = Shared {
            files: self.files,
            description: self.description,
            weights: self.weights,
            backend: options.backend,
            store,
            gpu,
            sessions: AtomicU64::new(0),
            tokenizer: self.tokenizer,
            template: OnceLock::new(),
        };
        Ok(Model { shared: Arc::new(shared) })
    }

    /// Were forecasts that come with `residency` trained for this model?
    fn fits(&self, residency: &Residency) -> Result<()> {
        let streaming = match residency {
            Residency::Streamed(streaming) => streaming,
            Residency::Gpu { experts: GpuExperts::Moving { streaming, .. }, .. } => streaming,
            _ => return Ok(()),
        };
        let Some(trained) = &streaming.trained else { return Ok(()) };
        let here = self.fingerprint()?;
        let wrong = |error| Error::Request(format!("trained forecasts of another model: {error}"));
        trained.check(&self.layout.shape, Some(&here)).map_err(wrong)
    }

    /// All tensors but those of routed experts and, unless it is the head as
    /// well, the embedding, of which a token needs one row.
    pub(crate) fn tensors_of_every_token(&self) -> Vec<usize> {
        let experts = self.weights.moe_layers().flat_map(|(_, moe)| &moe.experts);
        let mut beside: HashSet<usize> =
            experts.flat_map(GatedBlock::extents).map(|(tensor, _)| tensor).collect();
        let embedding = self.weights.embedding.tensor();
        if self.weights.head.weight.tensor() != embedding {
            beside.insert(embedding);
        }
        (0..self.files.tensors().len()).filter(|tensor| !beside.contains(tensor)).collect()
    }
}

fn open_store(
    files: &ModelFiles,
    layout: ModelLayout,
    streaming: Streaming,
) -> Result<ExpertStore> {
    let planner = planner(&layout.shape, &streaming)?;
    let frames = Frames::new(&ExpertStore::specs(&layout, &streaming.slots, streaming.ring))?;
    let (mover, clock, disk) = reader(streaming.source, files, &layout, &frames)?;
    Ok(ExpertStore::new(layout, frames, mover, planner, clock, disk))
}

/// What reads experts into `frames`, the clock of its machine, and what the
/// probe of the disk found.
pub(crate) fn reader(
    source: Source,
    files: &ModelFiles,
    layout: &ModelLayout,
    frames: &Arc<Frames>,
) -> Result<(Box<dyn Mover>, Clock, Option<DiskReport>)> {
    match source {
        Source::Disk(options) => {
            let started = std::time::Instant::now();
            let clock: Clock = Arc::new(move || started.elapsed().as_nanos() as u64);
            let names = files.paths().iter().cloned();
            let files: Vec<_> = names.zip(files.identities()).collect();
            let (mover, report) = disk::probe(&files, frames, &options)?;
            Ok((mover, clock, Some(report)))
        }
        Source::Custom(make) => {
            let (mover, clock) = make(files, layout, frames)?;
            Ok((mover, clock, None))
        }
        Source::Host | Source::HostAndDisk(_) => {
            let message = "experts that come from host memory need a GPU that they go to";
            Err(Error::Request(message.to_string()))
        }
    }
}

/// Who decides what comes and who leaves, for experts of `shape`.
pub(crate) fn planner(shape: &Shape, streaming: &Streaming) -> Result<Planner> {
    let Streaming { slots, ring, policy, forecast, trained, horizon, ahead, .. } = streaming;
    let unknown = |what: &str, name: &str, allowed: String| {
        Error::Request(format!("{what} {name:?}; allowed: {allowed}"))
    };
    let trained = trained.as_ref().filter(|trained| trained.check(shape, None).is_ok());
    let tables = trained.and_then(|trained| trained.value.as_ref());
    let Some(rule) = policy::by_name_with(policy, tables) else {
        return Err(unknown("eviction policy", policy, policy::NAMES.join(", ")));
    };
    let cache =
        Cache::new(shape, slots, rule).map_err(|error| Error::Request(error.to_string()))?;
    let forecaster = match trained {
        Some(trained) => Forecaster::by_name_with(forecast, shape, *horizon, trained),
        None => Forecaster::by_name(forecast, shape, *horizon),
    };
    if forecaster.is_none() && forecast != "none" {
        if forecast::LEARNED.contains(&forecast.as_str()) {
            let problem = format!("{forecast} needs a file of trained forecasts that has it");
            return Err(Error::Request(format!("{problem} (--predictor, for all experts)")));
        }
        let names = forecast::NAMES.join(", ");
        return Err(unknown("forecast", forecast, format!("none, blend, {names}")));
    }
    if *ring == 0 {
        return Err(Error::Request("a ring of 0 frames; allowed: 1 and more".to_string()));
    }
    Ok(Planner::new(shape, cache, forecaster, *ahead))
}

/// A model ready to run. Cloning is cheap: clones share everything.
#[derive(Clone)]
pub struct Model {
    shared: Arc<Shared>,
}

struct Shared {
    files: ModelFiles,
    description: ModelDescription,
    weights: ModelWeights,
    backend: Arc<dyn Backend>,
    store: Option<ExpertStore>,
    gpu: Option<GpuModel>,
    /// Made so far.
    sessions: AtomicU64,
    tokenizer: OnceLock<Tokenizer>,
    template: OnceLock<ChatTemplate>,
}

impl Model {
    /// [`OpenedModel::open`] and [`OpenedModel::load`].
    pub fn load(
        path: &Path,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        OpenedModel::open(path, progress)?.load(options, progress)
    }

    /// Where experts come from, if they come and go: to memory, or to a GPU.
    pub fn store(&self) -> Option<&ExpertStore> {
        self.shared.store.as_ref().or_else(|| self.gpu()?.store())
    }

    /// The weights on a GPU, if they are there.
    pub fn gpu(&self) -> Option<&GpuModel> {
        self.shared.gpu.as_ref()
    }

    pub(crate) fn next_session(&self) -> u64 {
        self.shared.sessions.fetch_add(1, Ordering::Relaxed)
    }

    pub fn description(&self) -> &ModelDescription {
        &self.shared.description
    }

    pub fn files(&self) -> &ModelFiles {
        &self.shared.files
    }

    pub fn weights(&self) -> &ModelWeights {
        &self.shared.weights
    }

    pub fn backend(&self) -> &dyn Backend {
        &*self.shared.backend
    }

    /// The tokenizer: of a folder's `tokenizer.json`, or built from a GGUF
    /// file's metadata. It is read when it is first asked for.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        tokenizer(&self.shared.tokenizer, self.files(), self.description().vocab)
    }

    /// The model's chat template, or [`ChatTemplate::fallback`] if its files
    /// have none: callers say so ([`ChatTemplate::is_fallback`]).
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        if let Some(template) = self.shared.template.get() {
            return Ok(template);
        }
        let tokenizer = self.tokenizer()?;
        let template = match tokenizer.chat_template() {
            Some(source) => ChatTemplate::compile(source, tokenizer.named_tokens())?,
            None => ChatTemplate::fallback(),
        };
        Ok(self.shared.template.get_or_init(|| template))
    }

    /// Weight bytes that one decoded token reads, with average experts.
    pub fn bytes_per_token(&self) -> u64 {
        self.weights().bytes_per_token(self.description())
    }

    /// A digest of what makes routing: traces and trained forecasts of models
    /// with the same one fit. Covers architecture, shape and routers, not the
    /// name, the container or how experts are quantised (`fingerprint.rs`).
    ///
    /// # Errors
    /// Files that cannot be read any more.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        fingerprint::fingerprint(self.files(), self.description(), self.weights())
    }

    pub(crate) fn engine(&self) -> Engine<'_> {
        Engine {
            files: self.files(),
            description: self.description(),
            weights: self.weights(),
            backend: self.backend(),
            store: self.shared.store.as_ref(),
        }
    }
}

/// What is in `cell`, or what is read from `files`: a vocabulary of at most
/// `rows` tokens.
fn tokenizer<'a>(
    cell: &'a OnceLock<Tokenizer>,
    files: &ModelFiles,
    rows: usize,
) -> Result<&'a Tokenizer> {
    if let Some(tokenizer) = cell.get() {
        return Ok(tokenizer);
    }
    let tokenizer = read_tokenizer(files)?;
    if tokenizer.vocab_size() > rows {
        return Err(Error::invalid(
            &files.paths()[0],
            None,
            "vocabulary",
            format!("{} tokens", tokenizer.vocab_size()),
            format!("at most the {rows} rows of the output layer"),
        ));
    }
    Ok(cell.get_or_init(|| tokenizer))
}

/// The tokenizer alone, also of files that hold no weights.
pub fn read_tokenizer(files: &ModelFiles) -> Result<Tokenizer> {
    match files.container() {
        Container::Gguf(metadata) => Tokenizer::from_gguf(metadata),
        Container::HuggingFace { folder, .. } => {
            Tokenizer::from_json_file(&folder.join("tokenizer.json"), Limits::default())
        }
    }
}

/// The description alone: what `pregate inspect` shows without loading.
pub fn describe(files: &ModelFiles) -> Result<ModelDescription> {
    match files.container() {
        Container::Gguf(metadata) => from_gguf::describe(files, metadata),
        Container::HuggingFace { folder, config } => from_hf::describe(folder, config),
    }
}
