//! What a session has for tokens that the device computes by itself.

use super::GpuModel;
use super::serve::ServiceBuffers;
use super::token::{Graphs, TokenPath};
use crate::model::description::ModelDescription;
use crate::store::ExpertStore;
use pregate_kernels::cuda::{Arena, CudaError};

/// Why the device computes no token by itself.
pub enum NoToken {
    /// Nobody wants it to.
    Off,
    Refused(CudaError),
    /// The host came too late for two of them.
    Late(CudaError),
}

/// Of so many tokens two for which the host was late are no accident: a debugger
/// that runs launches one by one, copies that wait behind the launches that
/// wait for them, a disk that is too slow.
const NEARBY: u32 = 64;

/// Tokens that the device computes by itself.
pub struct Token {
    pub path: TokenPath,
    pub graphs: Option<Graphs>,
    /// Of the last token.
    pub step: u32,
    /// The last one for which the host was late.
    late: Option<u32>,
    /// Of entries of experts, with the token.
    pub updates: Vec<(u32, u32)>,
    pub buffers: ServiceBuffers,
}

impl Token {
    pub fn new(
        model: &GpuModel,
        arena: &Arena,
        description: &ModelDescription,
        graphs: bool,
    ) -> Result<Self, CudaError> {
        let horizon = model.store().map_or(0, ExpertStore::horizon);
        let path = TokenPath::new(model.device(), arena, description, &model.weights, horizon)?;
        let graphs = graphs.then(Graphs::default);
        let (updates, buffers) = (Vec::new(), ServiceBuffers::default());
        Ok(Self { path, graphs, step: 0, late: None, updates, buffers })
    }

    /// The host was late for the last token. Whether it was for one shortly
    /// before, too.
    pub fn is_late_again(&mut self) -> bool {
        let before = self.late.replace(self.step);
        before.is_some_and(|before| self.step.wrapping_sub(before) <= NEARBY)
    }
}
