//! What a sequence leaves in a layer, on a device.

use super::buffers::ALIGN;
use crate::forward::cache::KvFormat;
use crate::model::description::{Mixer, ModelDescription};
use pregate_kernels::cuda::{CellFormat, CudaError, Device, DeviceCells, Span, Stream};

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

/// A sequence's memory on a device.
pub struct SequenceState {
    pub layers: Vec<LayerState>,
    /// That of all gated DeltaNet layers, one behind the other; empty where
    /// there are none.
    recurrent: Span,
    /// `recurrent` before the last token that may have to be computed again.
    before: Option<Span>,
}

/// Bytes of all layers of a sequence of up to `capacity` positions.
pub fn bytes(description: &ModelDescription, capacity: usize, kv: KvFormat) -> usize {
    let layers = description.layers.iter();
    layers.map(|layer| layer_bytes(&layer.mixer, capacity, kv)).sum()
}

/// Bytes of the recurrent state of a sequence: of a copy of it, where a token
/// may have to be computed again.
pub fn recurrent_bytes(description: &ModelDescription) -> usize {
    let layers = description.layers.iter().map(|layer| &layer.mixer);
    let recurrent = layers.filter(|mixer| matches!(mixer, Mixer::DeltaNet(_)));
    recurrent.map(|mixer| layer_bytes(mixer, 0, KvFormat::F32)).sum()
}

impl SequenceState {
    /// Contents are unspecified. `keeps_copy`: [`SequenceState::keep`] is to
    /// be used.
    pub fn new(
        device: &Device,
        description: &ModelDescription,
        (capacity, kv): (usize, KvFormat),
        keeps_copy: bool,
    ) -> Result<Self, CudaError> {
        let again = recurrent_bytes(description);
        let copied = if keeps_copy { again } else { 0 };
        let arena = device.arena((bytes(description, capacity, kv) + copied).max(1))?;
        let recurrent = arena.take(again, ALIGN)?;
        let before = keeps_copy.then(|| arena.take(again, ALIGN)).transpose()?;
        let mut taken = 0;
        let layers = description.layers.iter().map(|layer| {
            let bytes = layer_bytes(&layer.mixer, capacity, kv);
            let span = if let Mixer::DeltaNet(_) = layer.mixer {
                taken += bytes;
                recurrent.part(taken - bytes..taken)
            } else {
                arena.take(bytes, ALIGN)?
            };
            Ok(LayerState::new(&span, &layer.mixer, capacity, kv))
        });
        let layers = layers.collect::<Result<_, CudaError>>()?;
        Ok(Self { layers, recurrent, before })
    }

    /// Recurrent state cannot go back, but by one token that was kept.
    pub fn can_rewind(&self) -> bool {
        self.recurrent.bytes() == 0
    }

    /// For a new sequence. Cells need no clearing: positions are written before
    /// they are read.
    pub fn clear(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.fill(&self.recurrent, 0)
    }

    /// Before a token that may have to be computed again, which is launched on
    /// `stream`.
    pub fn keep(&self, stream: &Stream) -> Result<(), CudaError> {
        self.before.as_ref().map_or(Ok(()), |before| stream.copy(&self.recurrent, before))
    }

    /// As it was before that token. `false`: recurrent state has gone on.
    pub fn go_back(&self, stream: &Stream) -> Result<bool, CudaError> {
        match &self.before {
            Some(before) => stream.copy(before, &self.recurrent).map(|()| true),
            None => Ok(self.can_rewind()),
        }
    }
}

impl LayerState {
    /// In a span of [`layer_bytes`].
    fn new(span: &Span, mixer: &Mixer, capacity: usize, kv: KvFormat) -> Self {
        let format = cell_format(kv);
        let [bytes, more] = part_bytes(mixer, capacity, format);
        let second = bytes.next_multiple_of(ALIGN);
        let [first, second] = [span.part(0..bytes), span.part(second..second + more)];
        let cells = |span: Span, width: usize| {
            let (head_stride, position_stride) = (capacity * width, width);
            DeviceCells { format, span, head_stride, position_stride, width }
        };
        match mixer {
            Mixer::Attention(a) => Self::Attention {
                keys: cells(first, a.head_dim),
                values: cells(second, a.head_dim),
            },
            Mixer::Latent(l) => Self::Latent { rows: cells(first, l.kv_rank + l.rope_dim) },
            Mixer::DeltaNet(_) => Self::DeltaNet(RecurrentState { conv: first, memory: second }),
        }
    }
}

fn cell_format(kv: KvFormat) -> CellFormat {
    match kv {
        KvFormat::F16 => CellFormat::F16,
        KvFormat::F32 => CellFormat::F32,
    }
}

/// Bytes of a layer's memory of a sequence, with what is between its parts.
fn layer_bytes(mixer: &Mixer, capacity: usize, kv: KvFormat) -> usize {
    let parts = part_bytes(mixer, capacity, cell_format(kv));
    parts.iter().map(|bytes| bytes.next_multiple_of(ALIGN)).sum()
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
