//! What a sequence remembers: keys and values per position, or the running
//! state of recurrent layers.

use crate::error::{Error, Result};
use crate::model::description::{Mixer, ModelDescription};
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use pregate_kernels::{KvCells, KvView};

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvFormat {
    #[default]
    F16,
    F32,
}

impl KvFormat {
    fn bytes(self) -> usize {
        match self {
            KvFormat::F16 => 2,
            KvFormat::F32 => 4,
        }
    }
}

/// Per head `[capacity, width]` cells. Memory is taken lazily by the
/// operating system as positions are written.
pub struct Cells {
    store: Store,
    capacity: usize,
    width: usize,
}

enum Store {
    /// Bits of binary16, so that zeroed memory costs nothing.
    F16(Vec<u16>),
    F32(Vec<f32>),
}

impl Cells {
    fn new(format: KvFormat, heads: usize, capacity: usize, width: usize) -> Result<Self> {
        let too_large = || {
            Error::Request(format!(
                "no memory for the KV cache of {capacity} positions; ask for a smaller --context"
            ))
        };
        let len = heads.checked_mul(capacity).and_then(|n| n.checked_mul(width));
        let len = len.ok_or_else(too_large)?;
        // Reserving first turns a refusal into an error instead of an abort.
        let store = match format {
            KvFormat::F16 => {
                Vec::<u16>::new().try_reserve_exact(len).map_err(|_| too_large())?;
                Store::F16(vec![0; len])
            }
            KvFormat::F32 => {
                Vec::<f32>::new().try_reserve_exact(len).map_err(|_| too_large())?;
                Store::F32(vec![0.0; len])
            }
        };
        Ok(Self { store, capacity, width })
    }

    /// Stores one position of one head, `[width]`.
    pub fn write(&mut self, head: usize, position: usize, values: &[f32]) {
        let start = (head * self.capacity + position) * self.width;
        let range = start..start + self.width;
        match &mut self.store {
            Store::F16(bits) => {
                bits[range].reinterpret_cast_mut::<f16>().convert_from_f32_slice(values)
            }
            Store::F32(cells) => cells[range].copy_from_slice(values),
        }
    }

    /// All positions, the leading `width` cells of each.
    pub fn view(&self, width: usize) -> KvView<'_> {
        KvView {
            cells: match &self.store {
                Store::F16(bits) => KvCells::F16(bits.reinterpret_cast()),
                Store::F32(cells) => KvCells::F32(cells),
            },
            head_stride: self.capacity * self.width,
            position_stride: self.width,
            width,
        }
    }
}

/// One layer's memory of a sequence.
pub enum LayerCache {
    Attention {
        keys: Cells,
        values: Cells,
    },
    /// One row `[latent | rotary key]` per position.
    Latent {
        rows: Cells,
    },
    DeltaNet(DeltaNetState),
}

/// The running state of a gated DeltaNet layer.
pub struct DeltaNetState {
    /// The last `conv_kernel - 1` inputs of the convolution, oldest first,
    /// `[conv_kernel - 1, channels]`.
    pub conv: Vec<f32>,
    /// `[value_heads, key_dim, value_dim]`
    pub memory: Vec<f32>,
}

/// All layers' memory of one sequence.
pub struct Cache {
    pub layers: Vec<LayerCache>,
    /// Positions that fit.
    pub capacity: usize,
}

impl Cache {
    pub fn new(model: &ModelDescription, capacity: usize, format: KvFormat) -> Result<Self> {
        let layers = model
            .layers
            .iter()
            .map(|layer| {
                Ok(match &layer.mixer {
                    Mixer::Attention(a) => LayerCache::Attention {
                        keys: Cells::new(format, a.kv_heads, capacity, a.head_dim)?,
                        values: Cells::new(format, a.kv_heads, capacity, a.head_dim)?,
                    },
                    Mixer::Latent(l) => LayerCache::Latent {
                        rows: Cells::new(format, 1, capacity, l.kv_rank + l.rope_dim)?,
                    },
                    Mixer::DeltaNet(d) => {
                        let channels = 2 * d.key_heads * d.key_dim + d.value_heads * d.value_dim;
                        LayerCache::DeltaNet(DeltaNetState {
                            conv: vec![0.0; (d.conv_kernel - 1) * channels],
                            memory: vec![0.0; d.value_heads * d.key_dim * d.value_dim],
                        })
                    }
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers, capacity })
    }

    /// Forgets everything. Cells need no clearing: positions are written
    /// before they are read.
    pub fn reset(&mut self) {
        for layer in &mut self.layers {
            if let LayerCache::DeltaNet(state) = layer {
                state.conv.fill(0.0);
                state.memory.fill(0.0);
            }
        }
    }

    /// Whether positions can be dropped from the end: recurrent state cannot
    /// go back.
    pub fn can_rewind(&self) -> bool {
        !self.layers.iter().any(|layer| matches!(layer, LayerCache::DeltaNet(_)))
    }
}

/// Bytes that a full cache of `capacity` positions takes.
pub fn cache_bytes(model: &ModelDescription, capacity: usize, format: KvFormat) -> u64 {
    let cells = |width: usize| (width * format.bytes()) as u64 * capacity as u64;
    model
        .layers
        .iter()
        .map(|layer| match &layer.mixer {
            Mixer::Attention(a) => 2 * cells(a.kv_heads * a.head_dim),
            Mixer::Latent(l) => cells(l.kv_rank + l.rope_dim),
            Mixer::DeltaNet(d) => 4 * (d.value_heads * d.key_dim * d.value_dim) as u64,
        })
        .sum()
}
