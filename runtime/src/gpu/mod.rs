//! Models on a GPU: weights, KV cache and every activation stay on the
//! device; of a pass the host gives the embedded tokens and takes the logits.
//! Where a model is larger than the device's memory, the host keeps the rest
//! of the experts and computes with them.
//!
//! The passes here compute what [`crate::forward`] computes, launch for
//! operation, with the same bits; of long prompts, attention and gated DeltaNet
//! are within a tolerance (`runtime/tests/gpu_models.rs`).

mod alone;
mod attention;
mod buffers;
mod decider;
mod delta_net;
mod exchange;
mod experts;
mod feed_forward;
mod host_frames;
mod host_rows;
mod host_share;
mod host_store;
mod latent;
mod misses;
mod mover;
mod moving;
mod needs;
mod network;
mod pass;
mod serve;
mod session;
mod slots;
mod state;
mod token;
mod upload;
mod vram;
mod weights;

pub use host_frames::{Asker, HostFrames, HostFramesStats};
pub use host_share::{DiskShare, HostTooSmall};
pub use needs::{GpuParts, GpuRoom, GpuShare, NoShare, host_scratch_bytes};
pub use session::{GpuPass, GpuSession};

use crate::error::Result;
use crate::files::ModelFiles;
use crate::model::GpuExperts;
use crate::model::description::ModelDescription;
use crate::model::weights::ModelWeights;
use crate::store::ExpertStore;
use crate::store::disk::DiskReport;
use crate::store::layout::ModelLayout;
use moving::Moving;
use needs::{dense_bytes, experts_bytes};
use pregate_kernels::cuda::{Device, Entered};
use pregate_predictor::roofline::Machine;
use pregate_predictor::split::{LayerSplit, Seed};
use slots::SlotTable;
use upload::Uploader;
use weights::{DeviceLayer, DeviceWeights};

/// A model's weights on a device, and what of its experts comes and goes.
pub struct GpuModel {
    device: Device,
    weights: DeviceWeights,
    moving: Option<Moving>,
    /// Held while all fields above are dropped.
    leaving: Option<Entered>,
}

impl GpuModel {
    /// Uploads all weights but routed experts, and of these what `experts`
    /// says; `tell` hears the bytes that are done, and how many there are.
    /// Behind the device's gate: nobody else computes on it meanwhile, and
    /// `tell` must not.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`]: the device has no room, or lacks a kernel for
    /// some shape of the model. [`crate::Error::Request`]: `experts` does not
    /// fit the model.
    pub fn upload(
        device: Device,
        (files, description, weights): (&ModelFiles, &ModelDescription, &ModelWeights),
        layout: ModelLayout,
        experts: GpuExperts,
        tell: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        // Also while what was made is dropped, where the rest is refused.
        let _entered = device.enter();
        let (fixed, streaming) = match experts {
            GpuExperts::All => (needs::all(weights), None),
            GpuExperts::Some { fixed } => (fixed, None),
            GpuExperts::Moving { fixed, streaming, misses } => (fixed, Some((streaming, misses))),
        };
        let plan = streaming
            .map(|(streaming, misses)| {
                let of = (files, description, weights);
                moving::Plan::new(of, &layout, &fixed, streaming, misses)
            })
            .transpose()?;
        let dense = dense_bytes(files, weights);
        let fixed_bytes = experts_bytes(files, weights, &fixed);
        let moving_bytes = plan.as_ref().map_or([0; 2], moving::Plan::bytes);
        let total = dense + fixed_bytes + moving_bytes.iter().sum::<u64>();
        let mut told = 0;
        let mut tell_all = |done: u64| {
            told = done;
            tell(done, total);
        };
        let [frames_bytes, _] = moving_bytes;
        let bytes = [dense, fixed_bytes + frames_bytes];
        let mut uploader = Uploader::new(&device, files, bytes, &mut tell_all)?;
        let weights_there =
            DeviceWeights::upload(&device, &mut uploader, description, weights, &fixed)?;
        let frames = (uploader.rest(), &weights_there.slots);
        let moving = plan
            .map(|plan| {
                let of = (files, weights, layout);
                plan.start(&device, of, &fixed, frames, &mut |done| {
                    tell(dense + fixed_bytes + done, total);
                })
            })
            .transpose()?;
        debug_assert!(told <= total);
        Ok(Self { device, weights: weights_there, moving, leaving: None })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The experts that come and go, if some do.
    pub fn store(&self) -> Option<&ExpertStore> {
        self.moving.as_ref().map(Moving::store)
    }

    fn layers(&self) -> &[DeviceLayer] {
        &self.weights.layers
    }

    /// Where experts are, for the device.
    fn slots(&self) -> &SlotTable {
        &self.weights.slots
    }

    /// What is there of experts that come and go.
    fn moving(&self) -> Option<&Moving> {
        self.moving.as_ref()
    }

    /// Who brought what was missing in each layer, and why; `None`: nothing
    /// comes and goes, or the user chose.
    pub fn splits(&self) -> Option<Vec<LayerSplit>> {
        self.moving.as_ref()?.decider().report()
    }

    /// What experts that neither the device nor the host keeps are read into;
    /// `None`: there are no such.
    pub fn host_frames(&self) -> Option<&HostFrames> {
        self.moving.as_ref()?.frames()
    }

    /// What the probe of the disk found; `None`: nothing is read from it.
    pub fn disk(&self) -> Option<&DiskReport> {
        self.moving.as_ref()?.disk()
    }

    /// How often the host was likely to be asked for a layer's misses, and how
    /// often its threads were roused before; `None`: nothing comes and goes.
    pub fn roused(&self) -> Option<(u64, u64)> {
        Some(self.moving.as_ref()?.decider().roused())
    }

    /// What was measured of this machine, before the first token: what the
    /// split of misses starts from instead of usual prices.
    pub fn measured(&self, machine: &Machine) {
        if let Some(moving) = &self.moving {
            moving.decider().seed(&Seed::from(machine));
        }
    }

    /// Bytes of experts in page-locked memory of the host, and in other memory
    /// with the reason.
    pub fn host_bytes(&self) -> (u64, Option<(u64, String)>) {
        self.moving.as_ref().map_or((0, None), Moving::host_bytes)
    }
}

impl Drop for GpuModel {
    fn drop(&mut self) {
        self.leaving = Some(self.device.enter());
    }
}
