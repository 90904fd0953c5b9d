//! Weights on their way to the device.

use crate::error::Result;
use crate::files::ModelFiles;
use crate::model::weights::{Projection, Weight};
use pregate_kernels::Matrix;
use pregate_kernels::cuda::{Arena, CudaError, Device, DeviceMatrix, Span};

/// Where matrices and vectors start: what every kernel can read.
const ALIGN: usize = 256;
/// Of the arenas that weights are put into, but for the last.
const ARENA_BYTES: u64 = 1 << 30;

/// Puts bytes behind each other into arenas that it allocates.
pub struct Uploader<'a> {
    device: &'a Device,
    pub files: &'a ModelFiles,
    arena: Option<Arena>,
    done: u64,
    /// Of everything that will be uploaded, about.
    all: u64,
    tell: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Uploader<'a> {
    pub fn new(
        device: &'a Device,
        files: &'a ModelFiles,
        all: u64,
        tell: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        Self { device, files, arena: None, done: 0, all, tell }
    }

    /// Memory of unspecified contents.
    pub fn room(&mut self, bytes: usize) -> Result<Span, CudaError> {
        let needed = bytes.max(1).next_multiple_of(ALIGN);
        if self.arena.as_ref().is_none_or(|arena| arena.free_bytes() < needed) {
            let left = self.all.saturating_sub(self.done).clamp(needed as u64, ARENA_BYTES);
            self.arena = Some(self.device.arena(needed.max(left as usize))?);
        }
        let arena = self.arena.as_ref().ok_or_else(|| CudaError::unsupported("no arena"))?;
        arena.take(bytes, ALIGN)
    }

    /// A copy of `bytes` on the device.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<Span, CudaError> {
        let span = self.room(bytes.len())?;
        self.write(&span, bytes)?;
        Ok(span)
    }

    /// Fills a span of the same length.
    pub fn write(&mut self, span: &Span, bytes: &[u8]) -> Result<(), CudaError> {
        self.device.compute().upload(span, bytes)?;
        self.done += bytes.len() as u64;
        (self.tell)(self.done, self.all.max(self.done));
        Ok(())
    }

    pub fn floats(&mut self, values: &[f32]) -> Result<Span, CudaError> {
        self.bytes(&values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>())
    }

    pub fn maybe_floats(&mut self, values: Option<&[f32]>) -> Result<Option<Span>, CudaError> {
        values.map(|values| self.floats(values)).transpose()
    }

    pub fn matrix(&mut self, weight: &Weight) -> Result<DeviceMatrix, CudaError> {
        self.matrices(std::slice::from_ref(weight))
    }

    /// Matrices of one shape behind each other; the answer describes the
    /// first.
    pub fn matrices(&mut self, weights: &[Weight]) -> Result<DeviceMatrix, CudaError> {
        let (mut all, mut scratch) = (Vec::new(), Vec::new());
        for weight in weights {
            rows(&weight.view(self.files), &mut scratch, &mut all);
        }
        let first = weights[0].view(self.files);
        let span = self.bytes(&all)?;
        DeviceMatrix::new(first.format(), first.rows(), first.cols(), span, 0)
    }

    pub fn projection(&mut self, projection: &Projection) -> Result<DeviceProjection, CudaError> {
        let weight = self.matrix(&projection.weight)?;
        let bias = self.maybe_floats(projection.bias.as_deref())?;
        Ok(DeviceProjection { weight, bias })
    }
}

/// A matrix with an optional bias `[rows]`.
pub struct DeviceProjection {
    pub weight: DeviceMatrix,
    pub bias: Option<Span>,
}

/// Appends the rows of a matrix in canonical block order.
pub fn rows(matrix: &Matrix<'_>, scratch: &mut Vec<u8>, to: &mut Vec<u8>) {
    to.reserve(matrix.weight_bytes());
    for row in 0..matrix.rows() {
        to.extend_from_slice(matrix.row(row, scratch));
    }
}
