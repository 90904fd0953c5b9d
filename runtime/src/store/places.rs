//! Which frame holds which expert, and which frames are free.

use super::frames::{FrameId, Frames};
use super::slot::Generation;
use pregate_predictor::{ExpertId, Shape};

/// A frame and the generation under which it was filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub frame: FrameId,
    pub generation: Generation,
}

/// Every frame is in exactly one of three states here: free, lent to a fill,
/// or the place of an expert.
pub struct Places {
    /// Per layer and expert.
    of: Vec<Vec<Option<Place>>>,
    /// Per class.
    free: Vec<Vec<FrameId>>,
}

impl Places {
    pub fn new(shape: &Shape, frames: &Frames) -> Self {
        let experts = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
        let free = frames.classes().enumerate().map(|(class, spec)| {
            let frame = |index| FrameId { class: class as u16, index };
            // The first frame is taken first.
            (0..spec.frames as u32).rev().map(frame).collect()
        });
        Self {
            of: (0..shape.layers.len()).map(|layer| vec![None; experts(layer)]).collect(),
            free: free.collect(),
        }
    }

    pub fn get(&self, id: ExpertId) -> Option<Place> {
        self.of[id.layer()][id.expert()]
    }

    /// `id` is at `place` now.
    pub fn put(&mut self, id: ExpertId, place: Place) {
        let before = self.of[id.layer()][id.expert()].replace(place);
        debug_assert!(before.is_none(), "{id} has two frames");
    }

    /// `id` has no place any more; the answer is the one that it had.
    pub fn take(&mut self, id: ExpertId) -> Option<Place> {
        self.of[id.layer()][id.expert()].take()
    }

    /// A free frame, which is the caller's now.
    pub fn take_free(&mut self, class: usize) -> Option<FrameId> {
        self.free[class].pop()
    }

    pub fn give_back(&mut self, frame: FrameId) {
        let free = &mut self.free[usize::from(frame.class)];
        debug_assert!(!free.contains(&frame), "{frame:?} is free twice");
        free.push(frame);
    }

    pub fn free(&self, class: usize) -> usize {
        self.free[class].len()
    }
}
