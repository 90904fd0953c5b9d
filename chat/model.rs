//! Opens models for the commands.

use crate::{demo, device::Device, exit::Failure, progress::Progress};
use pregate_runtime::{
    Error, LoadOptions, Model, ModelDescription,
    files::{Container, ModelFiles},
    text::{Limits, Tokenizer},
};
use std::path::{Path, PathBuf};

/// The named model, else the demo model.
pub fn path_or_demo(path: Option<&Path>) -> Result<PathBuf, Failure> {
    path.map_or_else(demo::find, |path| Ok(path.to_path_buf()))
}

/// Loads a model for `device` with a progress bar.
pub fn load(path: &Path, device: &Device) -> Result<Model, Failure> {
    let mut bar: Option<Progress> = None;
    let options = LoadOptions { backend: device.backend.clone() };
    let model = Model::load(path, options, &mut |progress| {
        bar.get_or_insert_with(|| Progress::new("loading", "layers", progress.layers))
            .set(progress.layers_done);
    })?;
    Ok(model)
}

/// The tokenizer alone, also of files that hold no weights.
pub fn tokenizer(files: &ModelFiles) -> Result<Tokenizer, Error> {
    match files.container() {
        Container::Gguf(metadata) => Tokenizer::from_gguf(metadata),
        Container::HuggingFace { folder, .. } => {
            Tokenizer::from_json_file(&folder.join("tokenizer.json"), Limits::default())
        }
    }
}

/// What people call it: the file's own name for itself, else the file's name.
pub fn name(description: &ModelDescription, path: &Path) -> String {
    let stem = || path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let named = description.name.clone().filter(|name| !name.trim().is_empty());
    named.or_else(stem).unwrap_or_else(|| "model".to_string())
}

/// "32 experts, 4 per token".
pub fn experts(description: &ModelDescription) -> String {
    match description.moe_layers().next() {
        Some((_, moe)) => format!("{} experts, {} per token", moe.experts, moe.top_k),
        None => "no experts".to_string(),
    }
}
