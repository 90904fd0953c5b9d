//! Weights as f32, exactly as ggml defines them.

use crate::block::{Block, Minimum};
use crate::format::Format;
use half::{bf16, f16};

/// Writes the `out.len()` elements of a row in canonical block order.
///
/// Every product and sum rounds once, in ggml's order: the scale of a
/// sub-block first, then the element, then the minimum. Infinite and NaN
/// scales pass through.
///
/// Panics if `bytes` is not exactly the row's blocks.
pub fn dequantize_row(format: Format, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        format.row_bytes(out.len()),
        Some(bytes.len()),
        "a row of {} elements of {format}",
        out.len()
    );
    match format {
        Format::F32 => convert(bytes, out, f32::from_le_bytes),
        Format::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        Format::Bf16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        _ => {
            let blocks = bytes.chunks_exact(format.block_bytes());
            for (bytes, out) in blocks.zip(out.chunks_exact_mut(format.block_len())) {
                dequantize_block(&Block::unpack(format, bytes), out);
            }
        }
    }
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (elements, rest) = bytes.as_chunks::<N>();
    debug_assert!(rest.is_empty());
    for (element, out) in elements.iter().zip(out) {
        *out = value(*element);
    }
}

fn dequantize_block(block: &Block, out: &mut [f32]) {
    let weights = block.weights[..block.len].chunks_exact(block.sub_len);
    for (j, (weights, out)) in weights.zip(out.chunks_exact_mut(block.sub_len)).enumerate() {
        let scale = block.d * f32::from(block.scales[j]);
        let min = block.min * f32::from(block.mins[j]);
        for (&weight, out) in weights.iter().zip(out) {
            let value = scale * f32::from(weight);
            *out = match block.minimum {
                Minimum::None => value,
                Minimum::Added => value + min,
                Minimum::Subtracted => value - min,
            };
        }
    }
}
