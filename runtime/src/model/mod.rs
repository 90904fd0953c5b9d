//! A loaded model: files, description, weights and the device that computes.

mod checks;
pub mod description;
mod experts;
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
use crate::text::{ChatTemplate, Limits, Tokenizer};
use description::ModelDescription;
use pregate_kernels::Backend;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use weights::ModelWeights;

/// What a model is loaded onto.
#[derive(Clone)]
pub struct LoadOptions {
    pub backend: Arc<dyn Backend>,
    pub residency: Residency,
}

/// When weights come from disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residency {
    /// Page by page, when a computation touches them.
    #[default]
    Lazy,
    /// All at once while loading, in large pages where the system has them,
    /// if the files have at most so many bytes; else lazily. The fastest for
    /// a model that fits in memory.
    Resident { at_most_bytes: u64 },
}

/// How far loading is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Of the files, while they are read into memory; 0 before and without.
    pub bytes_done: u64,
    pub bytes: u64,
    pub layers_done: usize,
    pub layers: usize,
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
    tokenizer: OnceLock<Tokenizer>,
    template: OnceLock<ChatTemplate>,
}

impl Model {
    /// Maps the files at `path` (a GGUF file or a folder) and checks every
    /// tensor that the architecture needs. Weights stay in the files.
    pub fn load(
        path: &Path,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        let mut files = ModelFiles::open(path)?;
        let description = describe(&files)?;
        let layers = description.layers.len();
        let mut done = LoadProgress { layers, ..Default::default() };
        let weights = load::load_weights(&files, &description, &mut |layers_done| {
            done.layers_done = layers_done;
            progress(done);
        })?;
        if let Residency::Resident { at_most_bytes } = options.residency
            && files.total_bytes() <= at_most_bytes
        {
            files.make_resident(&mut |bytes_done, bytes| {
                progress(LoadProgress { bytes_done, bytes, ..done });
            })?;
        }
        let shared = Shared {
            files,
            description,
            weights,
            backend: options.backend,
            tokenizer: OnceLock::new(),
            template: OnceLock::new(),
        };
        Ok(Self { shared: Arc::new(shared) })
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
        if let Some(tokenizer) = self.shared.tokenizer.get() {
            return Ok(tokenizer);
        }
        let tokenizer = match self.files().container() {
            Container::Gguf(metadata) => Tokenizer::from_gguf(metadata)?,
            Container::HuggingFace { folder, .. } => {
                Tokenizer::from_json_file(&folder.join("tokenizer.json"), Limits::default())?
            }
        };
        let rows = self.description().vocab;
        if tokenizer.vocab_size() > rows {
            return Err(Error::invalid(
                &self.files().paths()[0],
                None,
                "vocabulary",
                format!("{} tokens", tokenizer.vocab_size()),
                format!("at most the {rows} rows of the output layer"),
            ));
        }
        Ok(self.shared.tokenizer.get_or_init(|| tokenizer))
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
        let description = self.description();
        self.weights().bytes_per_token(|layer| match &description.layers[layer].feed_forward {
            description::FeedForward::Moe(moe) => moe.top_k,
            description::FeedForward::Dense { .. } => 0,
        })
    }

    pub(crate) fn engine(&self) -> Engine<'_> {
        Engine {
            files: self.files(),
            description: self.description(),
            weights: self.weights(),
            backend: self.backend(),
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
