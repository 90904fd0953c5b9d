//! Experts and dense blocks on the device: each is one block [gate | up |
//! down], which kernels find through a table of addresses.

use super::upload::{Memory, Uploader};
use crate::model::weights::GatedBlock;
use pregate_kernels::cuda::{CudaError, ExpertMatrix, Span};
use pregate_kernels::{ExpertWeights, Matrix};

/// Where matrices start in a block.
const MATRIX_ALIGN: usize = 16;
/// Where blocks start.
const BLOCK_ALIGN: usize = 256;

/// Where the matrices of experts of one shape are in their blocks.
#[derive(Clone, Copy)]
pub struct BlockShape {
    pub hidden: usize,
    pub inner: usize,
    pub block_bytes: usize,
    pub gate: ExpertMatrix,
    pub up: ExpertMatrix,
    pub down: ExpertMatrix,
}

impl BlockShape {
    pub fn of(weights: &ExpertWeights<'_>) -> Self {
        let mut end = 0;
        let mut place = |matrix: &Matrix<'_>| {
            let placed = ExpertMatrix { format: matrix.format(), offset: end };
            end = (end + matrix.weight_bytes()).next_multiple_of(MATRIX_ALIGN);
            placed
        };
        let (gate, up, down) = (place(&weights.gate), place(&weights.up), place(&weights.down));
        Self {
            hidden: weights.down.rows(),
            inner: weights.down.cols(),
            block_bytes: end.next_multiple_of(BLOCK_ALIGN),
            gate,
            up,
            down,
        }
    }
}

/// Biases of experts, `[experts, rows]`.
pub struct Biases {
    pub gate: Option<Span>,
    pub up: Option<Span>,
    pub down: Option<Span>,
}

/// The experts of a layer, of which the first never leave.
pub struct DeviceExperts {
    pub count: usize,
    pub shape: BlockShape,
    /// u64 `[experts]`; 0 for those that are not fixed.
    pub table: Span,
    pub biases: Biases,
    /// What the table points at.
    fixed: Vec<Span>,
}

/// A dense block: a table of one expert.
pub type DeviceBlock = DeviceExperts;

impl DeviceExperts {
    pub fn is_fixed(&self, expert: usize) -> bool {
        expert < self.fixed.len()
    }

    /// Whether none of them ever leaves.
    pub fn is_whole(&self) -> bool {
        self.fixed.len() == self.count
    }

    /// Address of an expert that never leaves, else 0.
    pub fn address(&self, expert: usize) -> u64 {
        self.fixed.get(expert).map_or(0, Span::address)
    }

    /// A block that every token takes.
    pub fn dense(up: &mut Uploader<'_>, block: &GatedBlock) -> Result<DeviceBlock, CudaError> {
        Self::upload(up, std::slice::from_ref(block), 1, Memory::Dense)
    }

    /// Routed experts, of which the first `fixed` are uploaded.
    pub fn routed(
        up: &mut Uploader<'_>,
        experts: &[GatedBlock],
        fixed: usize,
    ) -> Result<Self, CudaError> {
        Self::upload(up, experts, fixed, Memory::Experts)
    }

    fn upload(
        up: &mut Uploader<'_>,
        experts: &[GatedBlock],
        fixed: usize,
        memory: Memory,
    ) -> Result<Self, CudaError> {
        let shape = BlockShape::of(&experts[0].view(up.files));
        let mut blocks = Vec::with_capacity(fixed);
        for (index, expert) in experts.iter().enumerate() {
            let weights = expert.view(up.files);
            let other = BlockShape::of(&weights);
            if [other.gate, other.up, other.down] != [shape.gate, shape.up, shape.down] {
                return Err(CudaError::unsupported("experts of different formats in a layer"));
            }
            if index >= fixed {
                continue;
            }
            let ExpertWeights { gate, up: upper, down, .. } = weights;
            let parts =
                [(gate, shape.gate.offset), (upper, shape.up.offset), (down, shape.down.offset)];
            blocks.push(up.block(memory, shape.block_bytes, &parts)?);
        }
        let biases = Biases {
            gate: biases(up, experts, |block| block.gate.bias.as_deref())?,
            up: biases(up, experts, |block| block.up.bias.as_deref())?,
            down: biases(up, experts, |block| block.down.bias.as_deref())?,
        };
        let address = |index: usize| blocks.get(index).map_or(0, Span::address);
        let addresses = (0..experts.len()).flat_map(|index| address(index).to_ne_bytes());
        let table = up.bytes(&addresses.collect::<Vec<u8>>())?;
        Ok(Self { count: experts.len(), shape, table, biases, fixed: blocks })
    }
}

fn biases(
    up: &mut Uploader<'_>,
    experts: &[GatedBlock],
    of: impl Fn(&GatedBlock) -> Option<&[f32]>,
) -> Result<Option<Span>, CudaError> {
    let given: Vec<&[f32]> = experts.iter().filter_map(of).collect();
    match given.len() {
        0 => Ok(None),
        count if count == experts.len() => up.floats(&given.concat()).map(Some),
        _ => Err(CudaError::unsupported("experts with and without biases in a layer")),
    }
}
