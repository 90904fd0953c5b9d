//! What a model asks of memory.

use crate::files::ModelFiles;
use crate::model::description::ModelDescription;
use crate::model::weights::{FeedForwardWeights, GatedBlock, ModelWeights, Place, Weight};
use pregate_predictor::{LayerShape, Shape};
use std::collections::HashSet;
use std::ops::Range;

/// A model's sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of all files: what a mapped model takes.
    pub whole_bytes: u64,
    /// What streaming keeps in memory: all tensors but those of routed
    /// experts, and but the embedding table where it is not also the head.
    pub dense_bytes: u64,
    /// The layers' experts; classes index `class_bytes`.
    pub shape: Shape,
    /// Bytes of a frame per class: one expert with its alignment, a multiple
    /// of 4096.
    pub class_bytes: Vec<u64>,
}

impl Sizes {
    pub fn of(files: &ModelFiles, description: &ModelDescription, weights: &ModelWeights) -> Self {
        let mut class_bytes = Vec::new();
        let mut layers = vec![None; description.layers.len()];
        for (index, moe) in description.moe_layers() {
            let frame_bytes = frame_bytes(files, &weights.layers[index].feed_forward);
            let class = class_bytes.iter().position(|class| *class == frame_bytes);
            let class = class.unwrap_or_else(|| {
                class_bytes.push(frame_bytes);
                class_bytes.len() - 1
            });
            let (experts, top_k) = (moe.experts, moe.top_k);
            layers[index] = Some(LayerShape { experts, top_k, expert_bytes: frame_bytes, class });
        }
        Self {
            whole_bytes: files.total_bytes(),
            dense_bytes: dense_bytes(files, weights),
            shape: Shape { layers },
            class_bytes,
        }
    }
}

/// Tensors in memory start at multiples of this.
const TENSOR_ALIGN: usize = 64;

fn dense_bytes(files: &ModelFiles, weights: &ModelWeights) -> u64 {
    let mut streamed = HashSet::new();
    for layer in &weights.layers {
        if let FeedForwardWeights::Moe(moe) = &layer.feed_forward {
            for expert in &moe.experts {
                for projection in [&expert.gate, &expert.up, &expert.down] {
                    streamed.insert(projection.weight.tensor);
                    if let Place::Pairs { scales, .. } = projection.weight.place {
                        streamed.insert(scales);
                    }
                }
            }
        }
    }
    if weights.head.weight.tensor != weights.embedding.tensor {
        streamed.insert(weights.embedding.tensor);
    }
    let kept = files.tensors().iter().enumerate().filter(|(index, _)| !streamed.contains(index));
    kept.map(|(_, tensor)| tensor.bytes.next_multiple_of(TENSOR_ALIGN) as u64).sum()
}

/// What whole blocks of files are read in.
const ALIGN: u64 = 4096;

/// Bytes of a frame that holds any one expert of a layer: every contiguous
/// range of the files, widened to whole blocks of 4096 bytes. 0 for a dense
/// layer.
fn frame_bytes(files: &ModelFiles, weights: &FeedForwardWeights) -> u64 {
    match weights {
        FeedForwardWeights::Dense(_) => 0,
        FeedForwardWeights::Moe(moe) => {
            moe.experts.iter().map(|expert| block_bytes(files, expert)).max().unwrap_or(0)
        }
    }
}

fn block_bytes(files: &ModelFiles, block: &GatedBlock) -> u64 {
    let matrices = [&block.gate, &block.up, &block.down].map(|projection| &projection.weight);
    let mut ranges: Vec<(usize, Range<u64>)> =
        matrices.into_iter().flat_map(|weight| ranges(files, weight)).collect();
    ranges.sort_by_key(|(file, range)| (*file, range.start));
    let (mut sum, mut before) = (0, (usize::MAX, 0));
    for (file, range) in ranges {
        let end = range.end.next_multiple_of(ALIGN);
        // Neighbours may share a block, and interleaved rows all of it.
        let shared = if before.0 == file { before.1 } else { 0 };
        let start = (range.start / ALIGN * ALIGN).max(shared);
        sum += end.saturating_sub(start);
        before = (file, end.max(shared));
    }
    sum
}

/// Where the matrix lies in the files, its neighbours between its rows
/// included.
fn ranges(files: &ModelFiles, weight: &Weight) -> Vec<(usize, Range<u64>)> {
    let range = |tensor: usize, start: usize, bytes: usize| {
        let tensor = &files.tensors()[tensor];
        let start = tensor.offset + start as u64;
        (tensor.file, start..start + bytes as u64)
    };
    let Weight { tensor, format, rows, cols, place } = *weight;
    let last = |step: usize| rows.saturating_sub(1) * step;
    match place {
        Place::Rows { start, step } => {
            let row_bytes = format.row_bytes(cols).unwrap_or(0);
            vec![range(tensor, start, (last(step) + 1) * row_bytes)]
        }
        Place::Columns { start, pitch, step } => {
            let elements = last(step) + cols.saturating_sub(1) * pitch + 1;
            vec![range(tensor, start, elements * format.block_bytes())]
        }
        Place::Pairs { start, scales, scales_start, step } => {
            let groups = (last(step) + 1) * (cols / 32);
            vec![range(tensor, start, groups * 16), range(scales, scales_start, groups)]
        }
    }
}
