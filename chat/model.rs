//! Opens models for the commands.

use crate::{
    demo,
    device::Device,
    exit::Failure,
    output::bytes,
    plan::{self, Needs, Planned},
    progress::Progress,
};
use pregate_runtime::{LoadOptions, Model, ModelDescription, OpenedModel, store::ExpertStore};
use std::path::{Path, PathBuf};

/// The named model, else the demo model.
pub fn path_or_demo(path: Option<&Path>) -> Result<PathBuf, Failure> {
    path.map_or_else(demo::find, |path| Ok(path.to_path_buf()))
}

/// Loads a model for `device` with a progress bar, after saying on standard
/// error how the memory is divided.
pub fn load(path: &Path, device: &Device, needs: &Needs) -> Result<Model, Failure> {
    let opened = open(path)?;
    let planned = plan::make(&opened, device, needs)?;
    planned.announce();
    place(opened, device, &planned)
}

/// A model whose weights are still on disk, with a progress bar. Its
/// tokenizer is there already, if it has one: a plan must count it.
pub fn open(path: &Path) -> Result<OpenedModel, Failure> {
    let mut bar: Option<Progress> = None;
    let opened = OpenedModel::open(path, &mut |progress| {
        bar.get_or_insert_with(|| Progress::new("loading", "layers", progress.layers))
            .set(progress.layers_done);
    })?;
    // Who needs it will hear what is wrong with it.
    let _ = opened.tokenizer();
    Ok(opened)
}

/// Brings the weights to where the plan wants them.
pub fn place(opened: OpenedModel, device: &Device, planned: &Planned) -> Result<Model, Failure> {
    let mut bar: Option<Progress> = None;
    let megabytes = |bytes: u64| (bytes / 1_000_000) as usize;
    let options =
        LoadOptions { backend: device.backend.clone(), residency: planned.residency(device) };
    let model = opened.load(options, &mut |progress| {
        bar.get_or_insert_with(|| {
            Progress::new("reading weights", "MB", megabytes(progress.bytes))
        })
        .set(megabytes(progress.bytes_done));
    })?;
    drop(bar);
    if let Some((pageable, why)) = model.gpu().and_then(|gpu| gpu.host_bytes().1) {
        eprintln!(
            "warning: {} of experts are in memory that is not page-locked ({why}): copies of \
             these to the GPU are slower",
            bytes(pageable)
        );
    }
    if let Some(disk) = model.store().and_then(ExpertStore::disk) {
        eprintln!("disk: {}", plan::disk_line(disk));
    }
    Ok(model)
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
