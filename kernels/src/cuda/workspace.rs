//! Device memory for the length of one operation of [`super::Cuda`].

use super::device::Device;
use super::error::CudaError;
use super::memory::{Arena, Span};
use super::rows::{Input, QuantisedSpans};
use super::{DeviceMatrix, dense};
use crate::format::{ActivationKind, Format};
use crate::matrix::Matrix;
use half::f16;

/// Of the first arena.
const FIRST_BYTES: usize = 1 << 20;

/// Memory that is handed out front to back and taken back as a whole. Grows
/// while operations need more; what one operation has needed is one arena for
/// the next.
pub(super) struct Workspace {
    device: Device,
    arenas: Vec<Arena>,
}

impl Workspace {
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), arenas: Vec::new() }
    }

    /// Takes everything back.
    pub fn clear(&mut self) -> Result<(), CudaError> {
        if self.arenas.len() > 1 {
            let bytes = self.arenas.iter().map(Arena::bytes).sum();
            self.arenas.clear();
            self.arenas.push(self.device.arena(bytes)?);
        }
        self.arenas.iter_mut().try_for_each(Arena::rewind)
    }

    /// An arena with room for `bytes`.
    fn arena(&mut self, bytes: usize) -> Result<&Arena, CudaError> {
        // Whatever is asked for starts at a multiple of 256.
        let needed = bytes.saturating_add(256);
        if self.arenas.last().is_none_or(|arena| arena.free_bytes() < needed) {
            let more = self.arenas.last().map_or(FIRST_BYTES, |arena| 2 * arena.bytes());
            self.arenas.push(self.device.arena(needed.max(more))?);
        }
        self.arenas.last().ok_or_else(|| CudaError::shape("workspace", "no arena"))
    }

    /// Memory of unspecified contents.
    pub fn room(&mut self, bytes: usize) -> Result<Span, CudaError> {
        self.arena(bytes)?.take(bytes, 256)
    }

    /// Room for f32 of these counts, multiplied.
    pub fn floats(&mut self, shape: &[usize]) -> Result<Span, CudaError> {
        self.room(4 * shape.iter().product::<usize>())
    }

    /// A copy of `bytes` on the device.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<Span, CudaError> {
        let span = self.room(bytes.len())?;
        self.device.compute().upload(&span, bytes)?;
        Ok(span)
    }

    pub fn upload_floats(&mut self, values: &[f32]) -> Result<Span, CudaError> {
        self.bytes(&bytes_of(values, f32::to_ne_bytes))
    }

    pub fn upload_halves(&mut self, values: &[f16]) -> Result<Span, CudaError> {
        self.bytes(&bytes_of(values, f16::to_ne_bytes))
    }

    pub fn upload_words(&mut self, values: &[i32]) -> Result<Span, CudaError> {
        self.bytes(&bytes_of(values, i32::to_ne_bytes))
    }

    /// The matrix with its rows behind each other in canonical block order.
    pub fn matrix(&mut self, matrix: &Matrix<'_>) -> Result<DeviceMatrix, CudaError> {
        let span = self.bytes(&canonical(matrix))?;
        DeviceMatrix::new(matrix.format(), matrix.rows(), matrix.cols(), span, 0)
    }

    /// `x` `[rows, cols]` as rows of `format` want it.
    pub fn input(
        &mut self,
        x: &Span,
        rows: usize,
        cols: usize,
        format: Format,
    ) -> Result<Prepared, CudaError> {
        if format.activation() == ActivationKind::F32 {
            return Ok(Prepared::Floats(x.clone()));
        }
        let group = format.block_len();
        let bytes = QuantisedSpans::bytes(group, rows, cols).saturating_add(3 * 256);
        let to = QuantisedSpans::take(self.arena(bytes)?, group, rows, cols)?;
        let call = dense::Quantise { rows, cols, x, stride: cols, to: &to };
        dense::quantise(&self.device, self.device.compute(), call)?;
        Ok(Prepared::Quantised(to))
    }

    /// Copies f32 from the device once what was launched has written them.
    pub fn download(&self, span: &Span, out: &mut [f32]) -> Result<(), CudaError> {
        let mut bytes = vec![0; 4 * out.len()];
        self.device.compute().download(&span.part(0..bytes.len()), &mut bytes)?;
        for (value, bytes) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *value = f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Ok(())
    }
}

/// [`Input`] that owns its spans.
pub(super) enum Prepared {
    Floats(Span),
    Quantised(QuantisedSpans),
}

impl Prepared {
    pub fn as_input(&self) -> Input<'_> {
        match self {
            Self::Floats(x) => Input::Floats(x),
            Self::Quantised(x) => Input::Quantised(x),
        }
    }
}

/// A matrix's rows behind each other in canonical block order.
pub(super) fn canonical(matrix: &Matrix<'_>) -> Vec<u8> {
    let mut all = Vec::with_capacity(matrix.weight_bytes());
    let mut scratch = Vec::new();
    for row in 0..matrix.rows() {
        all.extend_from_slice(matrix.row(row, &mut scratch));
    }
    all
}

fn bytes_of<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| bytes(*value)).collect()
}
