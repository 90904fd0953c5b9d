//! Frames of the expert store in device memory: blocks of experts that come
//! and go while a model runs.

use super::experts::BlockShape;
use crate::store::frames::FrameId;
use pregate_kernels::cuda::Span;
use pregate_predictor::{LayerShape, Shape};

/// Layers whose blocks are equally long share frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// As the planner knows them; of the experts that move.
    pub shape: Shape,
    /// Of a block, per class.
    pub block_bytes: Vec<usize>,
    /// Frames per class: slots, and the ring.
    pub frames: Vec<usize>,
}

/// A layer whose experts from `fixed` on move.
#[derive(Clone, Copy)]
pub struct MovingLayer {
    pub shape: BlockShape,
    pub experts: usize,
    pub fixed: usize,
    pub top_k: usize,
    pub slots: usize,
}

impl Classes {
    /// `layers` of the model, `None` where nothing moves.
    pub fn new(layers: &[Option<MovingLayer>], ring: usize) -> Self {
        let mut block_bytes: Vec<usize> =
            layers.iter().flatten().map(|layer| layer.shape.block_bytes).collect();
        block_bytes.sort_unstable();
        block_bytes.dedup();
        let class_of = |bytes: usize| block_bytes.partition_point(|&other| other < bytes);
        let shape = |layer: &Option<MovingLayer>| {
            layer.map(|layer| LayerShape {
                experts: layer.experts,
                top_k: layer.top_k.min(layer.experts - layer.fixed),
                expert_bytes: layer.shape.block_bytes as u64,
                class: class_of(layer.shape.block_bytes),
            })
        };
        let mut frames = vec![ring; block_bytes.len()];
        for layer in layers.iter().flatten() {
            frames[class_of(layer.shape.block_bytes)] += layer.slots;
        }
        let shape = Shape { layers: layers.iter().map(shape).collect() };
        Self { shape, block_bytes, frames }
    }

    /// Of all frames.
    pub fn bytes(&self) -> u64 {
        let classes = self.block_bytes.iter().zip(&self.frames);
        classes.map(|(&bytes, &frames)| bytes as u64 * frames as u64).sum()
    }
}

/// Where frames are.
pub struct Vram {
    /// Class by class, frame by frame.
    memory: Span,
    /// Per class: where its first frame starts in `memory`, and bytes of one.
    classes: Vec<(usize, usize)>,
}

impl Vram {
    /// `memory` has [`Classes::bytes`] bytes.
    pub fn new(memory: Span, classes: &Classes) -> Self {
        let mut start = 0;
        let class = |(&bytes, &frames): (&usize, &usize)| {
            let class = (start, bytes);
            start += bytes * frames;
            class
        };
        let classes = classes.block_bytes.iter().zip(&classes.frames).map(class).collect();
        debug_assert!(start <= memory.bytes());
        Self { memory, classes }
    }

    pub fn span(&self, frame: FrameId) -> Span {
        let (start, bytes) = self.classes[usize::from(frame.class)];
        let at = start + frame.index as usize * bytes;
        self.memory.part(at..at + bytes)
    }
}
