//! Weights on their way to the device.

use crate::files::ModelFiles;
use crate::model::weights::{Projection, Weight};
use pregate_kernels::Matrix;
use pregate_kernels::cuda::{Arena, CudaError, Device, DeviceMatrix, Span};

/// Where matrices and vectors start: what every kernel can read.
const ALIGN: usize = 256;

/// What `bytes` take in an [`Uploader`]'s arena.
pub fn padded(bytes: usize) -> u64 {
    bytes.max(1).next_multiple_of(ALIGN) as u64
}

/// Puts bytes behind each other into one arena.
pub struct Uploader<'a> {
    device: &'a Device,
    pub files: &'a ModelFiles,
    pub arena: Arena,
    done: u64,
    tell: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Uploader<'a> {
    /// `bytes`: of everything that will be uploaded, padded.
    pub fn new(
        device: &'a Device,
        files: &'a ModelFiles,
        bytes: u64,
        tell: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self, CudaError> {
        let arena = device.arena(bytes as usize)?;
        Ok(Self { device, files, arena, done: 0, tell })
    }

    /// A copy of `bytes` on the device.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<Span, CudaError> {
        let span = self.arena.take(bytes.len(), ALIGN)?;
        self.device.compute().upload(&span, bytes)?;
        self.done += padded(bytes.len());
        (self.tell)(self.done, self.arena.bytes() as u64);
        Ok(span)
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
