//! Experts in host memory, each one block as the device has it: what copies to
//! the device read, and what the host computes with while an expert is not
//! there.
//!
//! The memory is page-locked as far as the system gives it, in pieces: after a
//! refusal smaller ones are asked for, down to a least, and what is left lies
//! in ordinary memory, from which copies are slower.

use super::experts::BlockShape;
use crate::files::ModelFiles;
use crate::model::weights::{GatedBlock, ModelWeights};
use pregate_kernels::cuda::{
    CudaError, Device, ExpertMatrix, HostMemory, HostPart, Pinned, PinnedPart,
};
use pregate_kernels::{ExpertWeights, Matrix};
use std::sync::Arc;

/// Page-locked memory that is asked for at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// At first, at most.
    pub most_bytes: usize,
    /// Of pieces that are halved after a refusal; less is not asked for again.
    pub least_bytes: usize,
}

impl Default for Pieces {
    fn default() -> Self {
        Self { most_bytes: 1 << 30, least_bytes: 64 << 20 }
    }
}

/// An expert of a layer, and where its matrices are in its block.
type Wanted<'a> = (usize, BlockShape, &'a GatedBlock);

/// Experts of a model, from some index on in each layer.
pub struct HostStore {
    layers: Vec<Layer>,
    pinned_bytes: u64,
    pageable_bytes: u64,
    refused: Option<CudaError>,
}

struct Layer {
    /// The experts before this one have no block here.
    first: usize,
    shape: Option<BlockShape>,
    blocks: Vec<HostPart>,
}

impl HostStore {
    /// Copies the experts from `first` on of every layer of the model. `tell`
    /// hears the bytes that are done, and how many there are.
    ///
    /// # Errors
    /// A device that failed. That memory cannot be page-locked is no error:
    /// see [`HostStore::refused`].
    pub fn fill(
        device: &Device,
        files: &ModelFiles,
        weights: &ModelWeights,
        first: &[usize],
        pieces: Pieces,
        tell: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, CudaError> {
        let shape = |index: usize, experts: &[GatedBlock]| {
            (first[index] < experts.len()).then(|| BlockShape::of(&experts[0].view(files)))
        };
        let mut layers: Vec<Layer> =
            (first.iter()).map(|&first| Layer { first, shape: None, blocks: Vec::new() }).collect();
        let mut wanted = Vec::new();
        for (index, moe) in weights.moe_layers() {
            layers[index].shape = shape(index, &moe.experts);
            let Some(shape) = layers[index].shape else { continue };
            wanted.extend(moe.experts[first[index]..].iter().map(|block| (index, shape, block)));
        }
        let all: u64 = wanted.iter().map(|(_, shape, _)| shape.block_bytes as u64).sum();
        let mut store = Self { layers, pinned_bytes: 0, pageable_bytes: 0, refused: None };
        let Pieces { mut most_bytes, least_bytes } = pieces;
        let mut rest = &wanted[..];
        while !rest.is_empty() {
            let (count, bytes) = piece(rest, most_bytes);
            let pinned = match &store.refused {
                None => device.pinned(bytes),
                Some(refused) => Err(refused.clone()),
            };
            let (now, later) = rest.split_at(count);
            let parts = match pinned {
                Ok(pinned) => store.copy(files, now, pinned)?,
                Err(error) if error.is_sticky() => return Err(error),
                // Systems limit a single piece as well.
                Err(_) if store.refused.is_none() && count > 1 && bytes / 2 >= least_bytes => {
                    most_bytes = bytes / 2;
                    continue;
                }
                Err(error) => {
                    store.refused.get_or_insert(error);
                    store.copy_pageable(files, now)
                }
            };
            rest = later;
            for ((index, ..), part) in now.iter().zip(parts) {
                store.layers[*index].blocks.push(part);
            }
            tell(store.pinned_bytes + store.pageable_bytes, all);
        }
        Ok(store)
    }

    /// Blocks of `experts` in `pinned`, which has room for them.
    fn copy(
        &mut self,
        files: &ModelFiles,
        experts: &[Wanted<'_>],
        mut pinned: Pinned,
    ) -> Result<Vec<HostPart>, CudaError> {
        self.pinned_bytes += pinned.len() as u64;
        let mut ranges = Vec::with_capacity(experts.len());
        let mut end = 0;
        for (_, shape, block) in experts {
            let range = end..end + shape.block_bytes;
            write(&mut pinned[range.clone()], shape, &block.view(files));
            end = range.end;
            ranges.push(range);
        }
        let pinned = Arc::new(pinned);
        let part = |range| PinnedPart::new(pinned.clone(), range).map(HostPart::Pinned);
        ranges.into_iter().map(part).collect()
    }

    /// Blocks of `experts` in memory of their own.
    fn copy_pageable(&mut self, files: &ModelFiles, experts: &[Wanted<'_>]) -> Vec<HostPart> {
        let block = |(_, shape, block): &Wanted<'_>| {
            let mut bytes = vec![0; shape.block_bytes];
            write(&mut bytes, shape, &block.view(files));
            HostPart::Pageable(bytes.into())
        };
        self.pageable_bytes += experts.iter().map(|(_, of, _)| of.block_bytes as u64).sum::<u64>();
        experts.iter().map(block).collect()
    }

    /// The block of an expert that has one here.
    pub fn block(&self, layer: usize, expert: usize) -> Option<&HostPart> {
        let layer = self.layers.get(layer)?;
        layer.blocks.get(expert.checked_sub(layer.first)?)
    }

    /// The weights of an expert: those here, or those of the files.
    pub fn view<'a>(
        &'a self,
        files: &'a ModelFiles,
        (layer, expert): (usize, usize),
        block: &'a GatedBlock,
    ) -> ExpertWeights<'a> {
        let shape = self.layers.get(layer).and_then(|layer| layer.shape.as_ref());
        match self.block(layer, expert).zip(shape) {
            Some((bytes, shape)) => view(bytes.bytes(), shape, block),
            None => block.view(files),
        }
    }

    pub fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    /// Bytes that could not be page-locked.
    pub fn pageable_bytes(&self) -> u64 {
        self.pageable_bytes
    }

    /// Why some memory is not page-locked.
    pub fn refused(&self) -> Option<&CudaError> {
        self.refused.as_ref()
    }
}

/// How many of `experts`, at least one, make a piece of at most `most_bytes`,
/// and of how many bytes.
fn piece(experts: &[Wanted<'_>], most_bytes: usize) -> (usize, usize) {
    let (mut count, mut bytes) = (0, 0);
    for (_, shape, _) in experts {
        if count > 0 && bytes + shape.block_bytes > most_bytes {
            break;
        }
        count += 1;
        bytes += shape.block_bytes;
    }
    (count, bytes)
}

fn write(block: &mut [u8], shape: &BlockShape, weights: &ExpertWeights<'_>) {
    write_matrices(block, shape, [&weights.gate, &weights.up, &weights.down]);
}

/// Writes the rows of gate, up and down to their places in a block, and zeros
/// between them.
pub fn write_matrices(block: &mut [u8], shape: &BlockShape, matrices: [&Matrix<'_>; 3]) {
    block.fill(0);
    let mut scratch = Vec::new();
    for (matrix, place) in matrices.into_iter().zip([shape.gate, shape.up, shape.down]) {
        let mut at = place.offset;
        for row in 0..matrix.rows() {
            let row = matrix.row(row, &mut scratch);
            block[at..at + row.len()].copy_from_slice(row);
            at += row.len();
        }
    }
}

/// The weights of an expert in a block.
fn view<'a>(bytes: &'a [u8], shape: &BlockShape, block: &'a GatedBlock) -> ExpertWeights<'a> {
    let matrix = |place: ExpertMatrix, rows: usize, cols: usize| {
        let matrix = Matrix::new(place.format, rows, cols, &bytes[place.offset..]);
        matrix.expect("the block was made for this shape")
    };
    ExpertWeights {
        gate: matrix(shape.gate, shape.inner, shape.hidden),
        up: matrix(shape.up, shape.inner, shape.hidden),
        down: matrix(shape.down, shape.hidden, shape.inner),
        gate_bias: block.gate.bias.as_deref(),
        up_bias: block.up.bias.as_deref(),
        down_bias: block.down.bias.as_deref(),
    }
}

#[cfg(test)]
mod tests;
