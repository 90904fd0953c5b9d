//! What tells whether traces and trained forecasts fit a model.

use super::description::ModelDescription;
use super::weights::{FeedForwardWeights, ModelWeights, Place};
use crate::error::Result;
use crate::files::ModelFiles;
use pregate_kernels::dequantize_row;
use sha2::{Digest, Sha256};

/// Rows of each router that are looked at, spread evenly.
const ROWS: usize = 8;

/// SHA-256 over what makes routing: the architecture's name, the width of the
/// residual stream, the number of layers, and of each MoE layer its index,
/// experts, top-k, eight rows of its router as f32, and the router's bias.
///
/// Not covered: the model's name, its files' container, and how experts are
/// quantised, so that a GGUF file and the folder it was made from agree where
/// routers were kept as they were (F32, or BF16 in both). Fine-tuned weights
/// that leave routers alone agree too.
pub(super) fn fingerprint(
    files: &ModelFiles,
    description: &ModelDescription,
    weights: &ModelWeights,
) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update(b"pregate routing 1\0");
    hash.update(description.architecture.gguf_name());
    let number = |hash: &mut Sha256, number: usize| hash.update((number as u64).to_le_bytes());
    number(&mut hash, description.hidden);
    number(&mut hash, description.layers.len());
    let (mut scratch, mut row_values) = (Vec::new(), Vec::new());
    for (index, moe) in description.moe_layers() {
        [index, moe.experts, moe.top_k].into_iter().for_each(|n| number(&mut hash, n));
        let FeedForwardWeights::Moe(moe) = &weights.layers[index].feed_forward else { continue };
        let router = &moe.router.weight;
        // Loaders store routers so; another way of lying would be another
        // fingerprint.
        if matches!(router.place, Place::Rows { .. }) {
            row_values.resize(router.cols, 0.0f32);
            for row in (0..ROWS.min(router.rows)).map(|n| n * router.rows / ROWS.min(router.rows)) {
                let bytes = router.read_row(files, row, &mut scratch)?;
                dequantize_row(router.format, bytes, &mut row_values);
                row_values.iter().for_each(|value| hash.update(value.to_bits().to_le_bytes()));
            }
        }
        let bias = moe.router.bias.iter().flatten();
        bias.for_each(|value| hash.update(value.to_bits().to_le_bytes()));
    }
    Ok(hash.finalize().into())
}
