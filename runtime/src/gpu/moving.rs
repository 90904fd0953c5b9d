//! Experts that come and go: the expert store over frames of the device, and
//! copies of all of them in host memory.

use super::decider::Decider;
use super::experts::BlockShape;
use super::host_store::{HostStore, Pieces};
use super::mover::LinkMover;
use super::slots::SlotTable;
use super::vram::{Classes, MovingLayer, Vram};
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::model::description::ModelDescription;
use crate::model::weights::{GatedBlock, ModelWeights};
use crate::model::{Misses, Streaming, planner};
use crate::store::frames::{FrameId, Frames};
use crate::store::layout::ModelLayout;
use crate::store::{Clock, ExpertStore};
use pregate_kernels::ExpertWeights;
use pregate_kernels::cuda::{Device, LinkOptions, Span};
use pregate_predictor::ExpertId;
use std::sync::Arc;
use std::time::Instant;

/// What will move, before any memory is taken for it.
pub struct Plan {
    classes: Classes,
    streaming: Streaming,
    misses: Misses,
    host_bytes: u64,
}

impl Plan {
    /// The experts of each layer from `fixed` on move through the slots of
    /// `streaming`.
    ///
    /// # Errors
    /// [`Error::Request`]: lists of another length than the model.
    pub fn new(
        files: &ModelFiles,
        description: &ModelDescription,
        weights: &ModelWeights,
        fixed: &[usize],
        streaming: Streaming,
        misses: Misses,
    ) -> Result<Self> {
        let count = weights.layers.len();
        if fixed.len() != count || streaming.slots.len() != count {
            let [fixed, slots] = [fixed.len(), streaming.slots.len()];
            let problem = format!("{fixed} and {slots} layers of experts; the model has {count}");
            return Err(Error::Request(problem));
        }
        let mut layers = vec![None; count];
        for (index, moe) in weights.moe_layers() {
            let (experts, fixed) = (moe.experts.len(), fixed[index]);
            layers[index] = (fixed < experts).then(|| MovingLayer {
                shape: BlockShape::of(&moe.experts[0].view(files)),
                experts,
                fixed,
                top_k: description.top_k(index),
                slots: streaming.slots[index],
            });
        }
        let host = |layer: &MovingLayer| {
            (layer.experts - layer.fixed) as u64 * layer.shape.block_bytes as u64
        };
        let host_bytes = layers.iter().flatten().map(host).sum();
        let classes = Classes::new(&layers, streaming.ring);
        Ok(Self { classes, streaming, misses, host_bytes })
    }

    /// Of frames on the device, and of copies on the host.
    pub fn bytes(&self) -> [u64; 2] {
        [self.classes.bytes(), self.host_bytes]
    }

    /// Copies the experts to host memory, and the first ones to their slots in
    /// `memory`. `tell` hears the bytes that are done.
    pub fn start(
        self,
        device: &Device,
        files: &ModelFiles,
        weights: &ModelWeights,
        fixed: &[usize],
        (memory, slots): (Span, &Arc<SlotTable>),
        tell: &mut dyn FnMut(u64),
    ) -> Result<Moving> {
        let Self { classes, streaming, misses, host_bytes } = self;
        let mut planner = planner(&classes.shape, &streaming)?;
        for (index, _) in classes.shape.moe() {
            (0..fixed[index]).for_each(|expert| planner.fix(ExpertId::new(index, expert as u32)));
        }
        let pieces = Pieces::default();
        let mut filled = |done, _| tell(done);
        let host = HostStore::fill(device, files, weights, fixed, pieces, &mut filled)?;
        let (host, vram) = (Arc::new(host), Arc::new(Vram::new(memory, &classes)));
        let (source, frames_at) = (host.clone(), vram.clone());
        let options = LinkOptions { hung_after: device.patience(), ..LinkOptions::default() };
        let mover = LinkMover::new(device, source, frames_at, slots.clone(), &options)?;
        let started = Instant::now();
        let clock: Clock = Arc::new(move || started.elapsed().as_nanos() as u64);
        let Classes { shape, block_bytes, frames } = classes;
        let layout = ModelLayout::of_blocks(shape.clone(), block_bytes);
        let frames = Frames::without_memory(&frames);
        let store = ExpertStore::new(layout, frames, Box::new(mover), planner, clock, None);
        let mut done = host_bytes;
        for (index, layer) in shape.moe() {
            let slots = streaming.slots[index].min(layer.experts - fixed[index]);
            let first = (fixed[index]..fixed[index] + slots).map(|expert| expert as u32);
            store.warm(index, &first.collect::<Vec<_>>())?;
            done += slots as u64 * layer.expert_bytes;
            tell(done);
        }
        let filled = store.stats().prefill.link;
        let per_byte = filled.busy_ns as f64 / filled.bytes as f64;
        let per_byte = Some(per_byte).filter(|ns| ns.is_finite() && *ns > 0.0);
        let decider = Decider::new(misses, &shape, &streaming.slots, per_byte);
        store.begin_statistics();
        Ok(Moving { store, vram, slots: slots.clone(), host, decider })
    }
}

/// Experts that come and go.
pub struct Moving {
    store: ExpertStore,
    vram: Arc<Vram>,
    slots: Arc<SlotTable>,
    host: Arc<HostStore>,
    decider: Decider,
}

impl Moving {
    pub fn store(&self) -> &ExpertStore {
        &self.store
    }

    /// Who brings what is missing.
    pub fn decider(&self) -> &Decider {
        &self.decider
    }

    /// Where a frame starts, for the device.
    pub fn address(&self, frame: FrameId) -> u64 {
        self.vram.span(frame).address()
    }

    /// What the device calls a frame.
    pub fn entry(&self, frame: FrameId) -> u32 {
        self.slots.entry(&self.vram.span(frame))
    }

    /// The weights of an expert on the host.
    pub fn view<'a>(
        &'a self,
        files: &'a ModelFiles,
        place: (usize, usize),
        block: &'a GatedBlock,
    ) -> ExpertWeights<'a> {
        self.host.view(files, place, block)
    }

    /// See [`super::GpuModel::host_bytes`].
    pub fn host_bytes(&self) -> (u64, Option<(u64, String)>) {
        let refused = self.host.refused();
        let pageable = refused.map(|error| (self.host.pageable_bytes(), error.to_string()));
        (self.host.pinned_bytes(), pageable)
    }
}
