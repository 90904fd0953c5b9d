//! Frames in memory and the mover that fills them, as the drive sees them.

use super::frames::{FrameId, Frames};
use super::layout::ModelLayout;
use super::mover::{Done, Fill, MoveError, Mover};
use super::places::{Place, Places};
use super::{expert_of, key_of};
use crate::error::Error;
use pregate_predictor::drive::{Landed, Moved, Tier, Urgency};
use pregate_predictor::{ExpertId, Landing};
use std::sync::Arc;

/// Frames, who is in them, and what brings the next.
pub(super) struct StoreTier {
    pub layout: Arc<ModelLayout>,
    pub frames: Arc<Frames>,
    pub mover: Box<dyn Mover>,
    pub places: Places,
    /// A device that is alone reads no frame of the layers before this one any
    /// more in this pass.
    passed: usize,
    /// Frames without an expert that it may still read.
    limbo: Vec<FrameId>,
}

impl StoreTier {
    pub fn new(layout: Arc<ModelLayout>, frames: Arc<Frames>, mover: Box<dyn Mover>) -> Self {
        let places = Places::new(&layout.shape, &frames);
        Self { layout, frames, mover, places, passed: usize::MAX, limbo: Vec::new() }
    }
}

impl Tier for StoreTier {
    type Error = Error;

    fn free(&self, class: usize) -> usize {
        self.places.free(class)
    }

    fn bytes_of(&self, id: ExpertId) -> u64 {
        self.layout.layers[id.layer()][id.expert()].frame_bytes() as u64
    }

    fn submit(&mut self, id: ExpertId, urgency: Urgency) {
        let class = self.layout.shape.layer(id.layer()).map_or(0, |layer| layer.class);
        let Some(frame) = self.places.take_free(class) else {
            unreachable!("the drive has looked for a free frame for {id}")
        };
        let Some(ticket) = self.frames.claim(frame) else {
            unreachable!("a free frame is neither pinned nor being filled")
        };
        let pieces = self.layout.layers[id.layer()][id.expert()].pieces();
        self.mover.submit(Fill { key: key_of(id), ticket, pieces, urgency });
    }

    fn promote(&mut self, id: ExpertId) {
        self.mover.promote(key_of(id));
    }

    fn discard(&mut self, id: ExpertId) {
        self.mover.discard(key_of(id));
    }

    fn vacate(&mut self, id: ExpertId) {
        let Some(Place { frame, .. }) = self.places.take(id) else {
            unreachable!("{id} has a frame")
        };
        let released = self.frames.release(frame);
        debug_assert!(released, "{frame:?} of {id} is in use");
        self.mover.vacated(key_of(id));
        match id.layer() < self.passed {
            true => self.places.give_back(frame),
            false => self.limbo.push(frame),
        }
    }

    fn next(&mut self, wait_ns: u64) -> Option<Landed<Error>> {
        let done = self.mover.next(wait_ns)?;
        let id = expert_of(done.key);
        let landing = match &done.result {
            Ok(()) => Landing::Ready,
            Err(MoveError::Discarded) => Landing::Discarded,
            Err(_) => Landing::Failed,
        };
        if landing == Landing::Ready {
            self.places.put(id, Place { frame: done.frame, generation: done.generation });
        } else {
            self.places.give_back(done.frame);
        }
        let Done { bytes, submitted_ns, ended_ns, result, .. } = done;
        let error = result.err().map(Error::from);
        Some(Landed { id, landing, bytes, submitted_ns, ended_ns, error })
    }

    fn now_ns(&self) -> u64 {
        self.mover.now_ns()
    }

    fn moved(&self) -> Moved {
        let counters = self.mover.counters();
        Moved { bytes: counters.bytes, busy_ns: counters.busy_ns }
    }

    fn queued(&self) -> u64 {
        self.mover.queued()
    }

    fn remaining(&self, id: ExpertId) -> Option<u64> {
        self.mover.remaining(key_of(id))
    }

    fn begin_pass(&mut self) {
        // No device is in a pass: every frame without an expert is free, and
        // what leaves now is out of its sight before it begins.
        self.passed = usize::MAX;
        for frame in std::mem::take(&mut self.limbo) {
            self.places.give_back(frame);
        }
    }

    fn passed(&mut self, layer: usize) {
        self.passed = layer;
    }
}
