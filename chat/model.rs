//! Opens models for the commands.

use crate::{
    demo,
    device::Device,
    exit::Failure,
    plan::{self, Needs, Planned},
    progress::Progress,
    statistics::PageLocked,
};
use pregate_kernels::cuda::CudaError;
use pregate_predictor::Shape;
use pregate_runtime::{
    Error, LoadOptions, Model, ModelDescription, OpenedModel, Session, SessionOptions,
    budget::Sizes, gpu::GpuModel, store::ExpertStore,
};
use std::path::{Path, PathBuf};

/// The named model, else the demo model.
pub fn path_or_demo(path: Option<&Path>) -> Result<PathBuf, Failure> {
    path.map_or_else(demo::find, |path| Ok(path.to_path_buf()))
}

/// A model whose weights are where its plan wants them, and a sequence on it.
pub struct Loaded {
    pub model: Model,
    pub session: Session,
    /// What was planned; less than at first where the GPU refused memory.
    pub planned: Planned,
}

/// Loads a model for `device` with a progress bar, after saying on standard
/// error how the memory is divided.
pub fn load(path: &Path, device: &Device, needs: &Needs) -> Result<Loaded, Failure> {
    let opened = open(path)?;
    let planned = plan::make(&opened, device, needs)?;
    planned.announce();
    place(path, opened, device, needs, planned)
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

/// Bytes of routed experts that a token reads.
pub fn routed_bytes(shape: &Shape) -> u64 {
    shape.moe().map(|(_, layer)| layer.top_k as u64 * layer.expert_bytes).sum()
}

/// Bytes of everything else that a token reads.
pub fn other_bytes(opened: &OpenedModel) -> u64 {
    opened.bytes_per_token().saturating_sub(routed_bytes(&Sizes::of(opened).shape))
}

/// Brings the weights to where the plan wants them, and makes room for a
/// sequence. Where a GPU refuses memory that it seemed to have, the next
/// smaller plan is tried, and one line says so.
pub fn place(
    path: &Path,
    opened: OpenedModel,
    device: &Device,
    needs: &Needs,
    mut planned: Planned,
) -> Result<Loaded, Failure> {
    let mut refused = None;
    let mut tried = try_place(opened, device, needs, &planned);
    let (model, session) = loop {
        match tried {
            Ok(placed) => break placed,
            Err(Failure::Runtime(Error::Cuda(error @ CudaError::OutOfMemory { .. }))) => {
                // What was opened went with the try.
                let opened = open(path)?;
                planned = plan::make_smaller(&opened, device, needs, &planned, &error)?;
                tried = try_place(opened, device, needs, &planned);
                refused = Some(error);
            }
            Err(failure) => return Err(failure),
        }
    };
    if let Some((error, gpu)) = refused.zip(planned.gpu.as_ref()) {
        eprintln!("note: {error}: less is used of it: {}", gpu.parts_line(planned.context));
    }
    if let Some(why) = PageLocked::of(&model).and_then(|memory| memory.warning()) {
        eprintln!("warning: {why}");
    }
    if let Some(why) = session.warning() {
        eprintln!("warning: {why}");
    }
    planned.predictor_note(&model);
    let below = model.gpu().and_then(GpuModel::disk);
    if let Some(disk) = model.store().and_then(ExpertStore::disk).or(below) {
        eprintln!("disk: {}", plan::disk_line(disk));
    }
    Ok(Loaded { model, session, planned })
}

fn try_place(
    opened: OpenedModel,
    device: &Device,
    needs: &Needs,
    planned: &Planned,
) -> Result<(Model, Session), Failure> {
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
    let graphs = device.gpu.as_ref().is_none_or(|gpu| gpu.graphs);
    let device_tokens = device.gpu.as_ref().is_none_or(|gpu| gpu.device_tokens);
    let usual = needs.session.prefill_chunk;
    let prefill_chunk = planned.gpu.as_ref().map_or(usual, |gpu| gpu.prefill_chunk);
    let options = SessionOptions { graphs, device_tokens, prefill_chunk, ..needs.session };
    let session = Session::new(&model, options)?;
    Ok((model, session))
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
