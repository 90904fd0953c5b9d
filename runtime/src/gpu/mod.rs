//! Models on a GPU: weights, KV cache and every activation stay on the
//! device; of a pass the host gives the embedded tokens and takes the logits.
//! Where a model is larger than the device's memory, the host keeps the rest
//! of the experts and computes with them.
//!
//! The passes here compute what [`crate::forward`] computes, launch for
//! operation, with the same bits; of long prompts, attention and gated DeltaNet
//! are within a tolerance (`runtime/tests/gpu_models.rs`).

mod attention;
mod buffers;
mod delta_net;
mod experts;
mod feed_forward;
mod latent;
mod misses;
mod needs;
mod pass;
mod session;
mod upload;
mod weights;

pub use needs::{GpuParts, GpuShare, all_resident, host_scratch_bytes};
pub use session::{GpuPass, GpuSession};

use crate::error::Result;
use crate::files::ModelFiles;
use crate::model::description::ModelDescription;
use crate::model::weights::ModelWeights;
use pregate_kernels::cuda::Device;
use weights::DeviceWeights;

/// A model's weights on a device.
pub struct GpuModel {
    device: Device,
    weights: DeviceWeights,
}

impl GpuModel {
    /// Uploads all weights but routed experts, and the first `resident` of the
    /// experts of each layer of the model; `tell` hears the bytes that are done, and how many
    /// there are.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`]: the device has no room, or lacks a kernel for
    /// some shape of the model.
    pub fn upload(
        device: Device,
        files: &ModelFiles,
        description: &ModelDescription,
        weights: &ModelWeights,
        resident: &[usize],
        tell: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let weights = DeviceWeights::upload(&device, files, description, weights, resident, tell)?;
        Ok(Self { device, weights })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }
}
