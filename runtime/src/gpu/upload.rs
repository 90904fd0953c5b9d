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

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// What every token reads.
    Dense,
    /// Routed experts.
    Experts,
}

/// Puts bytes behind each other into an arena for each [`Memory`].
pub struct Uploader<'a> {
    device: &'a Device,
    pub files: &'a ModelFiles,
    pub dense: Arena,
    experts: Span,
    /// Of `experts`, in bytes.
    used: usize,
    done: u64,
    tell: &'a mut dyn FnMut(u64),
}

impl<'a> Uploader<'a> {
    /// `bytes`: of everything that will be uploaded, padded, and with experts
    /// the room for what comes later. `tell` hears the bytes that are done.
    pub fn new(
        device: &'a Device,
        files: &'a ModelFiles,
        [dense, experts]: [u64; 2],
        tell: &'a mut dyn FnMut(u64),
    ) -> Result<Self, CudaError> {
        let dense = device.arena(dense.max(1) as usize)?;
        let experts = device.arena(experts.max(1) as usize)?.take(experts as usize, ALIGN)?;
        Ok(Self { device, files, dense, experts, used: 0, done: 0, tell })
    }

    /// Room for all experts that are there at once.
    pub fn experts(&self) -> &Span {
        &self.experts
    }

    /// What is left of it.
    pub fn rest(&self) -> Span {
        self.experts.part(self.used..self.experts.bytes())
    }

    /// Memory of unspecified contents, to be written.
    fn room(&mut self, memory: Memory, bytes: usize) -> Result<Writer, CudaError> {
        let span = match memory {
            Memory::Dense => self.dense.take(bytes, ALIGN)?,
            Memory::Experts => {
                let (needed, free) = (padded(bytes), (self.experts.bytes() - self.used) as u64);
                if needed > free {
                    return Err(CudaError::OutOfMemory { needed, free });
                }
                let start = self.used;
                self.used += needed as usize;
                self.experts.part(start..start + bytes)
            }
        };
        Ok(Writer { span, written: 0, piece: Vec::new() })
    }

    /// The span of a writer that has got all its bytes.
    fn end(&mut self, mut writer: Writer) -> Result<Span, CudaError> {
        writer.flush(self.device)?;
        self.done += padded(writer.written);
        (self.tell)(self.done);
        Ok(writer.span)
    }

    /// A copy of `bytes` on the device.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<Span, CudaError> {
        let mut writer = self.room(Memory::Dense, bytes.len())?;
        writer.write(self.device, bytes)?;
        self.end(writer)
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
        let first = weights[0].view(self.files);
        let mut writer = self.room(Memory::Dense, first.weight_bytes() * weights.len())?;
        for weight in weights {
            writer.rows(self.device, &weight.view(self.files))?;
        }
        let span = self.end(writer)?;
        DeviceMatrix::new(first.format(), first.rows(), first.cols(), span, 0)
    }

    /// Puts matrices behind each other, each where `starts` says, into a block
    /// of `bytes`.
    pub fn block(
        &mut self,
        memory: Memory,
        bytes: usize,
        parts: &[(Matrix<'_>, usize)],
    ) -> Result<Span, CudaError> {
        let mut writer = self.room(memory, bytes)?;
        for (matrix, start) in parts {
            writer.pad(self.device, *start)?;
            writer.rows(self.device, matrix)?;
        }
        writer.pad(self.device, bytes)?;
        self.end(writer)
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

/// Bytes that are copied at once.
const PIECE_BYTES: usize = 4 << 20;

/// A span that is being written from front to back, in pieces: the host never
/// holds a large matrix twice.
pub struct Writer {
    span: Span,
    /// With those in `piece`.
    written: usize,
    piece: Vec<u8>,
}

impl Writer {
    pub fn write(&mut self, device: &Device, bytes: &[u8]) -> Result<(), CudaError> {
        self.piece.extend_from_slice(bytes);
        self.written += bytes.len();
        if self.piece.len() >= PIECE_BYTES { self.flush(device) } else { Ok(()) }
    }

    /// Zeros up to byte `start`.
    fn pad(&mut self, device: &Device, start: usize) -> Result<(), CudaError> {
        const ZEROS: [u8; ALIGN] = [0; ALIGN];
        self.write(device, &ZEROS[..start - self.written])
    }

    /// The rows of a matrix in canonical block order.
    fn rows(&mut self, device: &Device, matrix: &Matrix<'_>) -> Result<(), CudaError> {
        let mut scratch = Vec::new();
        (0..matrix.rows()).try_for_each(|row| self.write(device, matrix.row(row, &mut scratch)))
    }

    fn flush(&mut self, device: &Device) -> Result<(), CudaError> {
        let start = self.written - self.piece.len();
        device.compute().upload(&self.span.part(start..self.written), &self.piece)?;
        self.piece.clear();
        Ok(())
    }
}
