//! Frames of the expert store in device memory: blocks of experts that come
//! and go while a model runs.

use super::experts::BlockShape;
use crate::store::frames::FrameId;
use pregate_kernels::cuda::{Event, Span};
use pregate_predictor::{LayerShape, Shape};
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

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
    readers: Mutex<Readers>,
}

/// The last work that was launched to read each frame.
#[derive(Default)]
struct Readers {
    /// Launches, the newest last, by number.
    launches: VecDeque<(u64, Event)>,
    next: u64,
    last: HashMap<FrameId, u64>,
}

/// Launches that are told apart: what read a frame before these counts as the
/// oldest of them.
const LAUNCHES: usize = 64;

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
        Self { memory, classes, readers: Mutex::default() }
    }

    /// Work that reads `frames` was launched; `mark` is behind it.
    pub fn launched(&self, frames: impl Iterator<Item = FrameId>, mark: Event) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let number = readers.next;
        readers.next += 1;
        readers.last.extend(frames.map(|frame| (frame, number)));
        readers.launches.push_back((number, mark));
        if readers.launches.len() > LAUNCHES {
            readers.launches.pop_front();
        }
    }

    /// What a frame's new contents have to wait for; `None`: no work that was
    /// launched ever read it.
    pub fn reader(&self, frame: FrameId) -> Option<Event> {
        let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        // Kept: the copy that asks may be given up before it starts.
        let number = readers.last.get(&frame)?;
        let at = readers.launches.partition_point(|(other, _)| other < number);
        readers.launches.get(at).map(|(_, mark)| mark.clone())
    }

    pub fn span(&self, frame: FrameId) -> Span {
        let (start, bytes) = self.classes[usize::from(frame.class)];
        let at = start + frame.index as usize * bytes;
        self.memory.part(at..at + bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pregate_kernels::cuda::{Device, DeviceOptions, Modules};
    use pregate_standin::testing;

    fn frame(index: u32) -> FrameId {
        FrameId { class: 0, index }
    }

    /// Marks are told apart by whether what they stand behind has ended.
    #[test]
    fn a_frame_waits_for_the_last_launch_that_reads_it() {
        let Some(standin) = testing::standin() else { return };
        let _turn = standin.exclusive();
        let device = Device::open(0, &DeviceOptions { modules: Modules::Named }).unwrap();
        let arena = device.arena(4096).unwrap();
        let classes = Classes {
            shape: Shape { layers: Vec::new() },
            block_bytes: vec![256],
            frames: vec![4],
        };
        let vram = Vram::new(arena.take(1024, 256).unwrap(), &classes);
        let mark = || {
            let mark = device.compute().record().unwrap();
            mark.synchronize().unwrap();
            mark
        };
        assert!(vram.reader(frame(0)).is_none(), "nobody read it");
        vram.launched([frame(0), frame(1)].into_iter(), mark());
        for _ in 1..LAUNCHES {
            vram.launched([frame(1)].into_iter(), mark());
        }
        assert!(vram.reader(frame(0)).unwrap().is_complete().unwrap());
        assert!(vram.reader(frame(0)).is_some(), "also for the next who asks");
        standin.hang(1);
        let running = device.compute().record().unwrap();
        vram.launched([frame(2)].into_iter(), running.clone());
        let is_complete = |index| vram.reader(frame(index)).unwrap().is_complete().unwrap();
        // The first launch is told apart no more, and has ended all the same.
        assert_eq!([0, 1, 2].map(is_complete), [true, true, false]);
        assert!(vram.reader(frame(3)).is_none());
        standin.release();
    }
}
