//! Opens models for the commands.

use crate::{demo, device::Device, exit::Failure, memory, progress::Progress};
use pregate_runtime::{
    Error, LoadOptions, LoadProgress, Model, ModelDescription, OpenedModel, Residency,
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
    // Room is left for the KV cache, buffers and everybody else.
    let at_most_bytes = memory::available_bytes() / 10 * 8;
    let mut read = false;
    let mut show = |progress: LoadProgress| {
        if progress.bytes == 0 {
            bar.get_or_insert_with(|| Progress::new("loading", "layers", progress.layers))
                .set(progress.layers_done);
        } else {
            if !std::mem::replace(&mut read, true) {
                bar = None;
            }
            let megabytes = |bytes: u64| (bytes / 1_000_000) as usize;
            bar.get_or_insert_with(|| {
                Progress::new("reading weights", "MB", megabytes(progress.bytes))
            })
            .set(megabytes(progress.bytes_done));
        }
    };
    let opened = OpenedModel::open(path, &mut show)?;
    let residency = match opened.files().total_bytes() <= at_most_bytes {
        true => Residency::Resident,
        false => Residency::Lazy,
    };
    let model =
        opened.load(LoadOptions { backend: device.backend.clone(), residency }, &mut show)?;
    if !read {
        eprintln!(
            "weights: {:.1} GB, more than fits in memory now ({:.1} GB): read from disk as needed, slowly",
            model.files().total_bytes() as f64 / 1e9,
            at_most_bytes as f64 / 1e9,
        );
    }
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
