//! What a sequence leaves in a layer, on a device.

use super::buffers::ALIGN;
use crate::forward::cache::KvFormat;
use crate::model::description::{Mixer, ModelDescription};
use pregate_kernels::cuda::{Arena, CellFormat, CudaError, DeviceCells, Span};

/// The running state of a gated DeltaNet layer; see
/// [`crate::forward::cache::DeltaNetState`].
pub struct RecurrentState {
    pub conv: Span,
    pub memory: Span,
}

/// A layer's memory of a sequence.
pub enum LayerState {
    Attention { keys: DeviceCells, values: DeviceCells },
    Latent { rows: DeviceCells },
    DeltaNet(RecurrentState),
}

/// Bytes of all layers of a sequence of up to `capacity` positions.
pub fn bytes(description: &ModelDescription, capacity: usize, kv: KvFormat) -> usize {
    let layers = description.layers.iter();
    let parts = layers.flat_map(|layer| part_bytes(&layer.mixer, capacity, cell_format(kv)));
    parts.map(|bytes| bytes.next_multiple_of(ALIGN)).sum()
}

impl LayerState {
    /// From an arena of [`bytes`]; contents are unspecified.
    pub fn new(
        arena: &Arena,
        mixer: &Mixer,
        capacity: usize,
        kv: KvFormat,
    ) -> Result<Self, CudaError> {
        let format = cell_format(kv);
        let [first, second] =
            part_bytes(mixer, capacity, format).map(|bytes| arena.take(bytes, ALIGN));
        let cells = |span: Span, width: usize| {
            let (head_stride, position_stride) = (capacity * width, width);
            DeviceCells { format, span, head_stride, position_stride, width }
        };
        Ok(match mixer {
            Mixer::Attention(a) => Self::Attention {
                keys: cells(first?, a.head_dim),
                values: cells(second?, a.head_dim),
            },
            Mixer::Latent(l) => Self::Latent { rows: cells(first?, l.kv_rank + l.rope_dim) },
            Mixer::DeltaNet(_) => Self::DeltaNet(RecurrentState { conv: first?, memory: second? }),
        })
    }
}

fn cell_format(kv: KvFormat) -> CellFormat {
    match kv {
        KvFormat::F16 => CellFormat::F16,
        KvFormat::F32 => CellFormat::F32,
    }
}

/// Bytes of a layer's memory of a sequence: those of its two parts.
fn part_bytes(mixer: &Mixer, capacity: usize, format: CellFormat) -> [usize; 2] {
    let cells = |heads: usize, width: usize| heads * capacity * width * format.bytes();
    match mixer {
        Mixer::Attention(a) => [cells(a.kv_heads, a.head_dim); 2],
        Mixer::Latent(l) => [cells(1, l.kv_rank + l.rope_dim), 0],
        Mixer::DeltaNet(d) => {
            let channels = 2 * d.key_heads * d.key_dim + d.value_heads * d.value_dim;
            let memory = d.value_heads * d.key_dim * d.value_dim;
            [4 * (d.conv_kernel - 1) * channels, 4 * memory]
        }
    }
}
