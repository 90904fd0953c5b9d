//! What a model asks of memory.

use crate::files::ModelFiles;
use crate::model::description::{FeedForward, ModelDescription};
use crate::model::weights::{FeedForwardWeights, GatedBlock, ModelWeights, Place, Weight};
use std::ops::Range;

/// The routed experts of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertSizes {
    pub experts: usize,
    /// Experts of one token; slots that the layer needs at least.
    pub top_k: usize,
    /// Bytes that one expert takes in memory, a multiple of 4096.
    pub frame_bytes: u64,
    /// Weight bytes of one expert.
    pub expert_bytes: u64,
}

/// A model's sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of all files: what a mapped model takes.
    pub whole_bytes: u64,
    /// What streaming keeps in memory: all matrices but the routed experts,
    /// and but the embedding table where it is not also the head.
    pub dense_bytes: u64,
    /// One per layer of the model; `None`: no routed experts.
    pub layers: Vec<Option<ExpertSizes>>,
}

impl Sizes {
    /// `frame_bytes` says what one expert of a layer takes in memory; see
    /// [`frame_bytes`].
    pub fn of(
        files: &ModelFiles,
        description: &ModelDescription,
        weights: &ModelWeights,
        frame_bytes: impl Fn(usize) -> u64,
    ) -> Self {
        let layers = description.layers.iter().zip(&weights.layers).enumerate();
        let experts = layers.map(|(index, (layer, weights))| match layer.feed_forward {
            FeedForward::Dense { .. } => None,
            FeedForward::Moe(ref moe) => Some(ExpertSizes {
                experts: moe.experts,
                top_k: moe.top_k,
                frame_bytes: frame_bytes(index),
                expert_bytes: largest_expert(&weights.feed_forward),
            }),
        });
        Self {
            whole_bytes: files.total_bytes(),
            dense_bytes: weights.bytes_per_token(|_| 0),
            layers: experts.collect(),
        }
    }

    /// The MoE layers with their indices.
    pub fn moe(&self) -> impl Iterator<Item = (usize, &ExpertSizes)> {
        self.layers.iter().enumerate().filter_map(|(index, layer)| Some((index, layer.as_ref()?)))
    }

    /// The distinct frame sizes in the order of their first layers. Layers of
    /// one class may share frames.
    pub fn classes(&self) -> Vec<u64> {
        let mut classes = Vec::new();
        for (_, layer) in self.moe() {
            if !classes.contains(&layer.frame_bytes) {
                classes.push(layer.frame_bytes);
            }
        }
        classes
    }
}

fn largest_expert(weights: &FeedForwardWeights) -> u64 {
    match weights {
        FeedForwardWeights::Dense(_) => 0,
        FeedForwardWeights::Moe(moe) => {
            moe.experts.iter().map(|expert| expert.bytes()).max().unwrap_or(0)
        }
    }
}

/// What whole blocks of files are read in.
const ALIGN: u64 = 4096;

/// Bytes of a frame that holds any one expert of a layer: every contiguous
/// range of the files, widened to whole blocks of 4096 bytes. 0 for a dense
/// layer.
pub fn frame_bytes(files: &ModelFiles, weights: &FeedForwardWeights) -> u64 {
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
