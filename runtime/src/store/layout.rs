//! Where an expert's bytes are in the model's files and where they go in a
//! frame.
//!
//! Files keep a layer's gates, ups and downs apart, so an expert is a few
//! ranges of a file. Each becomes a [`Piece`]: the range grown to whole
//! blocks of [`ALIGN_BYTES`] bytes, one behind the other in the frame, so that
//! O_DIRECT can read it straight to its place. Ranges that touch or interleave
//! (gpt-oss stores gate and up row by row) become one piece.

use super::frames::ALIGN_BYTES;
use super::mover::Piece;
use crate::files::ModelFiles;
use crate::model::weights::{GatedBlock, ModelWeights};
use pregate_kernels::ExpertWeights;
use pregate_predictor::{LayerShape, Shape};
use std::ops::Range;
use std::sync::Arc;

/// One expert's places.
#[derive(Debug)]
pub struct ExpertLayout {
    pieces: Arc<[Piece]>,
    parts: Vec<Part>,
}

/// A range of a tensor and where it lies in the frame.
#[derive(Debug)]
struct Part {
    tensor: usize,
    range: Range<usize>,
    /// Of the range's first byte.
    at: usize,
}

impl ExpertLayout {
    /// The places of `block`, whose weights lie in `files`.
    pub fn new(files: &ModelFiles, block: &GatedBlock) -> Self {
        let mut extents: Vec<(usize, Range<usize>)> = block.extents().collect();
        let position = |tensor: usize, byte: usize| {
            let info = &files.tensors()[tensor];
            (info.file, info.offset + byte as u64)
        };
        extents.sort_by_key(|(tensor, range)| position(*tensor, range.start));
        let mut pieces: Vec<Piece> = Vec::new();
        let mut parts: Vec<Part> = Vec::new();
        for (tensor, range) in extents {
            let (file, start) = position(tensor, range.start);
            let end = start + range.len() as u64;
            let offset = start / ALIGN_BYTES as u64 * ALIGN_BYTES as u64;
            let behind = pieces.last().map_or(0, |piece| piece.at + piece.len);
            let touches = |piece: &Piece| piece.file == file && offset <= piece.end();
            if !pieces.last().is_some_and(touches) {
                pieces.push(Piece { file, offset, len: 0, needed: 0, at: behind });
            }
            let piece = pieces.last_mut().expect("pushed");
            piece.needed = piece.needed.max((end - piece.offset) as usize);
            piece.len = piece.needed.next_multiple_of(ALIGN_BYTES);
            let at = piece.at + (start - piece.offset) as usize;
            parts.push(Part { tensor, range, at });
        }
        Self { pieces: pieces.into(), parts }
    }

    pub fn pieces(&self) -> Arc<[Piece]> {
        self.pieces.clone()
    }

    /// Bytes that a frame for this expert needs, a multiple of [`ALIGN_BYTES`].
    pub fn frame_bytes(&self) -> usize {
        self.pieces.last().map_or(0, |piece| piece.at + piece.len)
    }

    /// Where reading starts: file and offset. The order of files.
    pub fn position(&self) -> (usize, u64) {
        self.pieces.first().map_or((0, 0), |piece| (piece.file, piece.offset))
    }

    /// The weights in a frame that holds this expert.
    ///
    /// # Panics
    /// If the frame is shorter than [`ExpertLayout::frame_bytes`], or `block`
    /// is not the one that this was made for.
    pub fn view<'a>(&self, block: &'a GatedBlock, frame: &'a [u8]) -> ExpertWeights<'a> {
        block.view_of(&|tensor, start| self.part(tensor, start, frame))
    }

    /// The bytes in a frame of what starts at byte `start` of a tensor.
    ///
    /// # Panics
    /// As [`ExpertLayout::view`].
    pub(crate) fn part<'a>(&self, tensor: usize, start: usize, frame: &'a [u8]) -> &'a [u8] {
        let part = self
            .parts
            .iter()
            // Parts may interleave, so `contains` would find a neighbour.
            .find(|part| part.tensor == tensor && part.range.start == start)
            .expect("the layout covers its expert");
        &frame[part.at..part.at + part.range.len()]
    }
}

/// All experts' places, and what they mean for frames.
pub struct ModelLayout {
    /// Per layer of the model; empty for dense ones.
    pub layers: Vec<Vec<ExpertLayout>>,
    /// Sizes as the planner knows them; its classes index `class_bytes`.
    pub shape: Shape,
    /// Bytes of a frame per class.
    pub class_bytes: Vec<usize>,
}

impl ModelLayout {
    /// Blocks of their own, without a place in the files: experts of `shape`,
    /// whose classes have blocks of `class_bytes`.
    pub fn of_blocks(shape: Shape, class_bytes: Vec<usize>) -> Self {
        let expert = |bytes: u64| {
            let len = bytes as usize;
            let piece = Piece { file: 0, offset: 0, len, needed: len, at: 0 };
            ExpertLayout { pieces: Arc::new([piece]), parts: Vec::new() }
        };
        let experts = |layer: &Option<LayerShape>| -> Vec<ExpertLayout> {
            let layer = layer.iter().flat_map(|layer| (0..layer.experts).map(move |_| layer));
            layer.map(|layer| expert(layer.expert_bytes)).collect()
        };
        Self { layers: shape.layers.iter().map(experts).collect(), shape, class_bytes }
    }

    /// `top_k` answers for an MoE layer.
    pub fn new(files: &ModelFiles, weights: &ModelWeights, top_k: impl Fn(usize) -> usize) -> Self {
        let mut layers: Vec<Vec<ExpertLayout>> = Vec::new();
        layers.resize_with(weights.layers.len(), Vec::new);
        for (index, moe) in weights.moe_layers() {
            layers[index] =
                moe.experts.iter().map(|block| ExpertLayout::new(files, block)).collect();
        }
        let largest =
            |experts: &[ExpertLayout]| experts.iter().map(ExpertLayout::frame_bytes).max();
        let class_bytes = classes(layers.iter().filter_map(|experts| largest(experts)).collect());
        let shape = |(index, experts): (usize, &Vec<ExpertLayout>)| {
            let bytes = largest(experts)?;
            let class = class_bytes.iter().position(|&class| class >= bytes)?;
            Some(LayerShape {
                experts: experts.len(),
                top_k: top_k(index),
                expert_bytes: bytes as u64,
                class,
            })
        };
        let shape = Shape { layers: layers.iter().enumerate().map(shape).collect() };
        Self { layers, shape, class_bytes }
    }
}

/// Sizes closer than this share a class: the waste is less than what frames
/// that cannot be exchanged would cost.
const SAME_CLASS: f64 = 0.03;

/// Rising frame sizes for layers whose largest experts have `sizes` bytes.
fn classes(mut sizes: Vec<usize>) -> Vec<usize> {
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let mut classes: Vec<usize> = Vec::new();
    for size in sizes {
        if classes.last().is_none_or(|&class| (size as f64) < class as f64 * (1.0 - SAME_CLASS)) {
            classes.push(size);
        }
    }
    classes.reverse();
    classes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_sizes_share_a_class_and_every_size_has_one() {
        assert_eq!(classes(vec![100_000, 101_000, 150_000, 99_500]), [101_000, 150_000]);
        assert_eq!(classes(vec![]), [0usize; 0]);
        for sizes in [vec![4096, 8192, 12288], vec![5, 5, 5], vec![1000, 980, 960, 940, 920]] {
            let classes = classes(sizes.clone());
            for size in sizes {
                let class = classes.iter().find(|class| **class >= size).unwrap();
                assert!(size as f64 >= *class as f64 * 0.97 - 1.0, "{size} in {classes:?}");
            }
        }
    }
}
