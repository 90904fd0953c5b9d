//! What a session has for tokens that the device computes by itself.

use super::GpuModel;
use super::network::launch_token;
use super::pass::Pass;
use super::serve::ServiceBuffers;
use super::state::LayerState;
use super::token::{Graphs, TokenPath};
use crate::model::description::ModelDescription;
use crate::store::ExpertStore;
use pregate_kernels::cuda::{Arena, CudaError};

/// Why the device computes no token by itself.
pub enum NoToken {
    /// Nobody wants it to.
    Off,
    Refused(CudaError),
}

/// Tokens that the device computes by itself.
pub struct Token {
    pub path: TokenPath,
    pub graphs: Option<Graphs>,
    pub rehearsed: Rehearsed,
    /// Of the last token.
    pub step: u32,
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
        Ok(Self { path, graphs, rehearsed: Rehearsed::default(), step: 0, updates, buffers })
    }
}

/// For how many positions the launches of a token were rehearsed last.
#[derive(Default)]
pub struct Rehearsed(Option<usize>);

impl Rehearsed {
    /// Loads what the launches of the pass, a token, need: that may wait for
    /// the device, which must not wait for the host then.
    pub fn ensure(&mut self, pass: &Pass<'_>, layers: &[LayerState]) -> Result<(), CudaError> {
        let Some(step) = pass.step.filter(|step| self.0 != Some(step.most)) else { return Ok(()) };
        pass.stream().rehearse(|| launch_token(pass, step.path, layers, &mut |_| Ok(())))?;
        self.0 = Some(step.most);
        Ok(())
    }
}
