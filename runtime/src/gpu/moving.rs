//! Experts that come and go: the expert store over frames of the device, and
//! below it host memory with copies of all of them, or of some and with frames
//! that the others are read into.

use super::decider::Decider;
use super::experts::BlockShape;
use super::host_frames::HostFrames;
use super::host_store::{HostStore, Pieces};
use super::mover::{HostTiers, LinkMover};
use super::slots::SlotTable;
use super::vram::{Classes, MovingLayer, Vram};
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::model::description::ModelDescription;
use crate::model::weights::{GatedBlock, ModelWeights};
use crate::model::{BelowHost, Misses, Source, Streaming, planner, reader};
use crate::store::disk::DiskReport;
use crate::store::frames::{FrameId, Frames, PageLocked};
use crate::store::layout::ModelLayout;
use crate::store::{Clock, ExpertStore};
use pregate_kernels::ExpertWeights;
use pregate_kernels::cuda::{Device, Event, LinkOptions, Span};
use pregate_predictor::ExpertId;
use std::sync::Arc;
use std::time::Instant;

/// What will move, before any memory is taken for it.
pub struct Plan {
    classes: Classes,
    streaming: Streaming,
    misses: Misses,
    shapes: Arc<[Option<BlockShape>]>,
    /// The experts from this one on have blocks on the host, per layer.
    first: Vec<usize>,
    below: Option<BelowHost>,
    host_bytes: u64,
}

impl Plan {
    /// The experts of each layer from `fixed` on move through the slots of
    /// `streaming`.
    ///
    /// # Errors
    /// [`Error::Request`]: lists of another length than the model has layers,
    /// or `layout` classes; more experts on the host than move.
    pub fn new(
        (files, description, weights): (&ModelFiles, &ModelDescription, &ModelWeights),
        layout: &ModelLayout,
        fixed: &[usize],
        mut streaming: Streaming,
        misses: Misses,
    ) -> Result<Self> {
        let count = weights.layers.len();
        if fixed.len() != count || streaming.slots.len() != count {
            let [fixed, slots] = [fixed.len(), streaming.slots.len()];
            let problem = format!("{fixed} and {slots} layers of experts; the model has {count}");
            return Err(Error::Request(problem));
        }
        let below = match std::mem::replace(&mut streaming.source, Source::Host) {
            Source::HostAndDisk(below) => Some(below),
            _ => None,
        };
        let classes = layout.class_bytes.len();
        if let Some(frames) = below.as_ref().map(|below| below.frames.len())
            && frames != classes
        {
            let problem = format!("{frames} sizes of host frames; the model has {classes}");
            return Err(Error::Request(problem));
        }
        let mut layers = vec![None; count];
        let mut first = fixed.to_vec();
        for (index, moe) in weights.moe_layers() {
            let (experts, fixed) = (moe.experts.len(), fixed[index]);
            layers[index] = (fixed < experts).then(|| MovingLayer {
                shape: BlockShape::of(&moe.experts[0].view(files)),
                experts,
                fixed,
                top_k: description.top_k(index),
                slots: streaming.slots[index],
            });
            if let Some(below) = &below {
                let (kept, most) = (below.kept.get(index).copied(), experts - fixed);
                let kept = kept.filter(|&kept| kept <= most).ok_or_else(|| {
                    Error::Request(format!(
                        "{kept:?} experts of layer {index} on the host; {most} can leave the GPU"
                    ))
                })?;
                first[index] = experts - kept;
            }
        }
        let host = |(layer, first): (&Option<MovingLayer>, &usize)| {
            layer.map_or(0, |layer| (layer.experts - first) as u64 * layer.shape.block_bytes as u64)
        };
        let blocks_bytes: u64 = layers.iter().zip(&first).map(host).sum();
        let frames_bytes = below.as_ref().map_or(0, |below| below.frames_bytes(layout));
        let classes = Classes::new(&layers, streaming.ring);
        let shapes = layers.iter().map(|layer| layer.map(|layer| layer.shape)).collect();
        let host_bytes = blocks_bytes + frames_bytes;
        Ok(Self { classes, streaming, misses, shapes, first, below, host_bytes })
    }

    /// Of frames on the device, and of experts on the host.
    pub fn bytes(&self) -> [u64; 2] {
        [self.classes.bytes(), self.host_bytes]
    }

    /// Copies experts to host memory, and the first ones to their slots in
    /// `memory`. `tell` hears the bytes that are done.
    pub fn start(
        self,
        device: &Device,
        (files, weights, layout): (&ModelFiles, &ModelWeights, ModelLayout),
        fixed: &[usize],
        (memory, slots): (Span, &Arc<SlotTable>),
        tell: &mut dyn FnMut(u64),
    ) -> Result<Moving> {
        let Self { classes, streaming, misses, shapes, first, below, host_bytes } = self;
        let mut planner = planner(&classes.shape, &streaming)?;
        for (index, _) in classes.shape.moe() {
            (0..fixed[index]).for_each(|expert| planner.fix(ExpertId::new(index, expert as u32)));
        }
        let pieces = Pieces::default();
        let mut filled = |done, _| tell(done);
        let blocks = HostStore::fill(device, files, weights, &first, pieces, &mut filled)?;
        let mut disk = None;
        let mut page_locked = PageLocked::default();
        let frames = match below {
            None => None,
            Some(below) => {
                let specs = below.specs(&layout);
                let refused = blocks.refused().cloned();
                let (frames, found) = Frames::page_locked(&specs, device, refused)?;
                page_locked = found;
                let (mover, _, report) = reader(*below.source, files, &layout, &frames)?;
                disk = report;
                Some(Arc::new(HostFrames::new(layout, weights, frames, mover)))
            }
        };
        let tiers = HostTiers { blocks: Arc::new(blocks), frames, shapes };
        let vram = Arc::new(Vram::new(memory, &classes));
        let options = LinkOptions { hung_after: device.patience(), ..LinkOptions::default() };
        let mover = LinkMover::new(device, tiers.clone(), vram.clone(), slots.clone(), &options)?;
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
        // Reads from disk are no price of the link.
        let is_of_link = tiers.frames.is_none() && per_byte.is_finite() && per_byte > 0.0;
        let per_byte = is_of_link.then_some(per_byte);
        let decider = Decider::new(misses, &shape, &streaming.slots, per_byte);
        store.begin_statistics();
        let slots = slots.clone();
        Ok(Moving { store, vram, slots, host: tiers, page_locked, disk, decider })
    }
}

/// Experts that come and go.
pub struct Moving {
    store: ExpertStore,
    vram: Arc<Vram>,
    slots: Arc<SlotTable>,
    host: HostTiers,
    /// Of the frames of host memory.
    page_locked: PageLocked,
    disk: Option<DiskReport>,
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

    /// Work that reads `frames` was launched; `mark` is behind it.
    pub fn launched(&self, frames: impl Iterator<Item = FrameId>, mark: Event) {
        self.vram.launched(frames, mark);
    }

    /// What the device calls a frame.
    pub fn entry(&self, frame: FrameId) -> u32 {
        self.slots.entry(&self.vram.span(frame))
    }

    /// The weights of an expert that has a block on the host.
    pub fn view<'a>(
        &'a self,
        files: &'a ModelFiles,
        place: (usize, usize),
        block: &'a GatedBlock,
    ) -> ExpertWeights<'a> {
        self.host.blocks.view(files, place, block)
    }

    /// What experts without a block on the host are read into; `None`: there
    /// are no such.
    pub fn frames(&self) -> Option<&HostFrames> {
        self.host.frames.as_deref()
    }

    /// Whether an expert has a block on the host.
    pub fn has_block(&self, layer: usize, expert: usize) -> bool {
        self.host.blocks.block(layer, expert).is_some()
    }

    /// What the probe of the disk found; `None`: nothing is read from it.
    pub fn disk(&self) -> Option<&DiskReport> {
        self.disk.as_ref()
    }

    /// See [`super::GpuModel::host_bytes`].
    pub fn host_bytes(&self) -> (u64, Option<(u64, String)>) {
        let (blocks, frames) = (&self.host.blocks, &self.page_locked);
        let refused = blocks.refused().or(frames.refused.as_ref());
        let pageable_bytes = blocks.pageable_bytes() + frames.pageable_bytes;
        let pageable = refused.map(|error| (pageable_bytes, error.to_string()));
        (blocks.pinned_bytes() + frames.pinned_bytes, pageable)
    }
}
