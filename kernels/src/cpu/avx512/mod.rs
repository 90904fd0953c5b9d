//! AVX-512 with VNNI (Intel since Ice Lake, AMD since Zen 4): decode in
//! [`decode`] and [`permute`], prefill in [`batch`] over panels of sixteen rows.

// Register arrays are indexed in step, several at a time.
#![allow(clippy::needless_range_loop)]

mod attention;
mod batch;
mod decode;
mod elementwise;
mod float;
mod permute;
mod simd;
mod unpack;

pub(crate) use batch::Packed;
pub(crate) use unpack::Panel;

use super::kernels::{
    Activation, ActivationMut, Activations, Cells, Isa, Kernels, Layout, Order, Rows, Scratch, Tile,
};
use super::pool::Columns;
use crate::backend::GatedActivation;
use crate::format::Format;

/// Whether this machine has every feature that the `simd!` macro names.
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

/// The same, and byte permutes across a register.
pub(crate) fn has_byte_permutes() -> bool {
    is_available() && is_x86_feature_detected!("avx512vbmi")
}

/// Handed out by [`Isa::kernels`] only where [`is_available`], with byte
/// permutes only where [`has_byte_permutes`].
pub(crate) struct Avx512 {
    pub(crate) has_byte_permutes: bool,
}

// SAFETY of every call below: `Isa::kernels` asserts that the machine has the
// features that the callee names, and nothing else makes the trait object.
impl Kernels for Avx512 {
    fn isa(&self) -> Isa {
        if self.has_byte_permutes { Isa::Avx512Vbmi } else { Isa::Avx512Vnni }
    }

    fn order(&self, format: Format) -> Order {
        match format {
            Format::F32 | Format::F16 | Format::Bf16 | Format::Q6K => Order::Natural,
            // The same arrangement, so one copy serves both.
            Format::Q5K => Order::Own(Format::Q4K),
            Format::Q3K => Order::Own(Format::Q2K),
            Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Iq4Nl | Format::Mxfp4 => {
                Order::Own(Format::Q4_0)
            }
            // Natural, but padded to whole groups of eight blocks.
            Format::Q8_0 => Order::Own(format),
            Format::Q4_0 | Format::Q2K | Format::Q4K | Format::Iq4Xs => Order::Own(format),
        }
    }

    fn quantise(&self, x: &[f32], group: usize, layout: Layout, out: ActivationMut<'_>) {
        // SAFETY: see above.
        unsafe { elementwise::quantise(x, group, layout, out) }
    }

    fn rows(&self, rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.rows);
        // SAFETY: see above; `permute` only with the feature that it names.
        unsafe {
            match self.has_byte_permutes {
                true => permute::rows(rows, x, out),
                false => decode::rows(rows, x, out),
            }
        }
    }

    fn batch_from(&self, _format: Format) -> usize {
        // Unpacking sixteen rows costs as much as one to two tokens, a half
        // tile as much as one and a half.
        4
    }

    fn tile_shape(&self, _format: Format) -> (usize, usize) {
        (batch::TOKENS, 16)
    }

    fn pack(&self, format: Format, x: &Activations, tokens: &[u32], out: &mut Tile) {
        batch::pack(format, x, tokens, out);
    }

    fn batch(
        &self,
        rows: Rows<'_>,
        tiles: &[Tile],
        scratch: &mut Scratch,
        out: &mut Columns<'_, f32>,
    ) {
        // SAFETY: see above.
        unsafe { batch::batch(rows, tiles, scratch, out) }
    }

    fn gate(&self, activation: GatedActivation, gate: &mut [f32], up: &[f32]) {
        // SAFETY: see above.
        unsafe { elementwise::gate(activation, gate, up) }
    }

    fn axpy(&self, w: f32, y: &[f32], out: &mut [f32]) {
        // SAFETY: see above.
        unsafe { elementwise::axpy(w, y, out) }
    }

    fn dequantise(&self, format: Format, row: &[u8], out: &mut [f32]) {
        // SAFETY: see above.
        unsafe { float::dequantise(format, row, out) }
    }

    fn scores(
        &self,
        queries: &[f32],
        width: usize,
        keys: Cells<'_>,
        count: usize,
        scale: f32,
        out: &mut [f32],
        out_stride: usize,
    ) {
        // SAFETY: see above.
        unsafe { attention::scores(queries, width, keys, count, scale, out, out_stride) }
    }

    fn softmax_chunk(&self, scores: &mut [f32], first: usize) -> (f32, f32) {
        // SAFETY: see above.
        unsafe { attention::softmax_chunk(scores, first) }
    }

    fn values(
        &self,
        weights: &[f32],
        weight_stride: usize,
        ranges: &[(usize, usize)],
        values: Cells<'_>,
        width: usize,
        acc: &mut [f32],
    ) {
        // SAFETY: see above.
        unsafe { attention::values(weights, weight_stride, ranges, values, width, acc) }
    }

    fn merge(&self, acc: &mut [f32], a: f32, part: &[f32], b: f32) {
        // SAFETY: see above.
        unsafe { elementwise::merge(acc, a, part, b) }
    }
}
