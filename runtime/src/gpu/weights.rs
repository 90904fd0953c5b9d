//! A model's weights on the device, layer by layer as
//! [`crate::model::weights`] has them.

use super::experts::{DeviceBlock, DeviceExperts};
use super::slots::SlotTable;
use super::upload::{DeviceProjection, Uploader};
use crate::error::Result;
use crate::model::description::{FeedForward, ModelDescription, NormKind};
use crate::model::weights::{
    AttentionWeights, DeltaNetWeights, FeedForwardWeights, KeyUp, LatentQuery, LatentWeights,
    MixerWeights, ModelWeights, MoeWeights, Norm, Weight,
};
use pregate_kernels::cuda::router::{RouterLayer, RouterNorm, RouterNormKind, RouterTable};
use pregate_kernels::cuda::{CudaError, Device, DeviceMatrix, Span};
use pregate_kernels::{Format, GatedActivation};
use std::sync::Arc;

pub struct DeviceWeights {
    pub head: DeviceProjection,
    pub final_norm: DeviceNorm,
    pub layers: Vec<DeviceLayer>,
    /// The routers of the MoE layers, in their order; `None` without any.
    pub routers: Option<RouterTable>,
    /// Where the routed experts are.
    pub slots: Arc<SlotTable>,
}

/// Weight and optional bias of a normalisation, `[width]`.
pub struct DeviceNorm {
    pub weight: Span,
    pub bias: Option<Span>,
}

pub struct DeviceLayer {
    pub mixer_norm: DeviceNorm,
    pub mixer: DeviceMixer,
    pub feed_forward_norm: DeviceNorm,
    pub feed_forward: DeviceFeedForward,
}

impl DeviceLayer {
    /// Its routed experts, if it has some.
    pub fn experts(&self) -> Option<&DeviceExperts> {
        match &self.feed_forward {
            DeviceFeedForward::Moe(moe) => Some(&moe.experts),
            DeviceFeedForward::Dense(_) => None,
        }
    }
}

pub enum DeviceMixer {
    Attention(Box<DeviceAttention>),
    Latent(Box<DeviceLatent>),
    DeltaNet(Box<DeviceDeltaNet>),
}

pub struct DeviceAttention {
    pub q: DeviceProjection,
    pub k: DeviceProjection,
    pub v: DeviceProjection,
    pub output: DeviceProjection,
    pub q_norm: Option<Span>,
    pub k_norm: Option<Span>,
    pub sinks: Option<Span>,
}

pub struct DeviceLatent {
    pub query: DeviceQuery,
    pub kv_down: DeviceProjection,
    pub kv_norm: Span,
    pub key_up: DeviceKeyUp,
    /// `[heads, value_dim, kv_rank]`; the first head's.
    pub value_up: DeviceMatrix,
    pub output: DeviceProjection,
}

pub enum DeviceQuery {
    Full(DeviceProjection),
    LowRank { down: DeviceProjection, norm: Span, up: DeviceProjection },
}

/// The first head's matrix of [`KeyUp`]; the others follow.
pub enum DeviceKeyUp {
    Rows(DeviceMatrix),
    Transposed(DeviceMatrix),
}

pub struct DeviceDeltaNet {
    pub qkv: DeviceProjection,
    pub gate: DeviceProjection,
    pub alpha: DeviceProjection,
    pub beta: DeviceProjection,
    pub conv: Span,
    pub decay: Span,
    pub decay_bias: Span,
    pub norm: Span,
    pub output: DeviceProjection,
}

pub enum DeviceFeedForward {
    Dense(DeviceBlock),
    Moe(Box<DeviceMoe>),
}

pub struct DeviceMoe {
    /// Index into [`DeviceWeights::routers`].
    pub router: usize,
    pub top_k: usize,
    pub activation: GatedActivation,
    pub experts: DeviceExperts,
    pub shared: Option<DeviceBlock>,
    pub shared_gate: Option<DeviceMatrix>,
}

impl DeviceWeights {
    /// Whether all experts stay on the device: it asks the host for nothing.
    pub fn is_whole(&self) -> bool {
        self.layers.iter().all(|layer| match &layer.feed_forward {
            DeviceFeedForward::Moe(moe) => moe.experts.is_whole(),
            DeviceFeedForward::Dense(_) => true,
        })
    }

    pub fn upload(
        device: &Device,
        up: &mut Uploader<'_>,
        description: &ModelDescription,
        weights: &ModelWeights,
        fixed: &[usize],
    ) -> Result<Self> {
        let mut routers = Vec::new();
        let mut layers = Vec::with_capacity(weights.layers.len());
        for (index, (layer, of)) in weights.layers.iter().zip(&description.layers).enumerate() {
            let feed_forward_norm = norm(up, &layer.feed_forward_norm)?;
            let feed_forward = match (&layer.feed_forward, &of.feed_forward) {
                (FeedForwardWeights::Dense(block), _) => {
                    DeviceFeedForward::Dense(DeviceExperts::dense(up, block)?)
                }
                (FeedForwardWeights::Moe(moe), FeedForward::Moe(m)) => {
                    let norm = router_norm(description.norm, &feed_forward_norm);
                    routers.push(router(up, moe, norm)?);
                    let shared = moe.shared.as_ref();
                    DeviceFeedForward::Moe(Box::new(DeviceMoe {
                        router: routers.len() - 1,
                        top_k: m.top_k,
                        activation: m.activation,
                        experts: DeviceExperts::routed(up, &moe.experts, fixed[index])?,
                        shared: shared.map(|block| DeviceExperts::dense(up, block)).transpose()?,
                        shared_gate: moe.shared_gate.map(|gate| up.matrix(&gate)).transpose()?,
                    }))
                }
                _ => unreachable!("weights are made from the description"),
            };
            layers.push(DeviceLayer {
                mixer_norm: norm(up, &layer.mixer_norm)?,
                mixer: mixer(up, &layer.mixer)?,
                feed_forward_norm,
                feed_forward,
            });
        }
        let head = up.projection(&weights.head)?;
        let final_norm = norm(up, &weights.final_norm)?;
        let routers = table(up, device, description.hidden, routers)?;
        let slots = Arc::new(slots(up, &layers)?);
        debug_assert!(up.dense.free_bytes() < 256, "{} bytes left over", up.dense.free_bytes());
        Ok(Self { head, final_norm, layers, routers, slots })
    }
}

fn slots(up: &mut Uploader<'_>, layers: &[DeviceLayer]) -> Result<SlotTable, CudaError> {
    let of = |layer: usize| layers[layer].experts();
    let counts: Vec<usize> =
        (0..layers.len()).map(|layer| of(layer).map_or(0, |experts| experts.count)).collect();
    let address = |layer, expert| of(layer).map_or(0, |experts| experts.address(expert));
    SlotTable::upload(up, &counts, address)
}

fn table(
    up: &Uploader<'_>,
    device: &Device,
    hidden: usize,
    routers: Vec<RouterLayer>,
) -> Result<Option<RouterTable>, CudaError> {
    if routers.is_empty() {
        return Ok(None);
    }
    RouterTable::new(&up.dense, device.compute(), hidden, routers).map(Some)
}

fn norm(up: &mut Uploader<'_>, norm: &Norm) -> Result<DeviceNorm, CudaError> {
    let weight = up.floats(&norm.weight)?;
    Ok(DeviceNorm { weight, bias: up.maybe_floats(norm.bias.as_deref())? })
}

fn router_norm(kind: NormKind, norm: &DeviceNorm) -> RouterNorm {
    let (kind, epsilon) = match kind {
        NormKind::Rms { epsilon } => (RouterNormKind::Rms, epsilon),
        NormKind::Layer { epsilon } => (RouterNormKind::Layer, epsilon),
    };
    let bias = norm.bias.clone().filter(|_| kind == RouterNormKind::Layer);
    RouterNorm { kind, epsilon, weight: norm.weight.clone(), bias }
}

fn router(
    up: &mut Uploader<'_>,
    moe: &MoeWeights,
    norm: RouterNorm,
) -> Result<RouterLayer, CudaError> {
    let (rule, selection_bias) = (moe.rule.on_device())
        .ok_or_else(|| CudaError::unsupported("a router that only the host knows"))?;
    Ok(RouterLayer {
        norm,
        weight: up.matrix(&moe.router.weight)?,
        bias: up.maybe_floats(moe.router.bias.as_deref())?,
        selection_bias: up.maybe_floats(selection_bias)?,
        rule,
    })
}

fn mixer(up: &mut Uploader<'_>, weights: &MixerWeights) -> Result<DeviceMixer, CudaError> {
    Ok(match weights {
        MixerWeights::Attention(w) => DeviceMixer::Attention(Box::new(attention(up, w)?)),
        MixerWeights::Latent(w) => DeviceMixer::Latent(Box::new(latent(up, w)?)),
        MixerWeights::DeltaNet(w) => DeviceMixer::DeltaNet(Box::new(delta_net(up, w)?)),
    })
}

fn attention(up: &mut Uploader<'_>, w: &AttentionWeights) -> Result<DeviceAttention, CudaError> {
    Ok(DeviceAttention {
        q: up.projection(&w.q)?,
        k: up.projection(&w.k)?,
        v: up.projection(&w.v)?,
        output: up.projection(&w.output)?,
        q_norm: up.maybe_floats(w.q_norm.as_deref())?,
        k_norm: up.maybe_floats(w.k_norm.as_deref())?,
        sinks: up.maybe_floats(w.sinks.as_deref())?,
    })
}

fn latent(up: &mut Uploader<'_>, w: &LatentWeights) -> Result<DeviceLatent, CudaError> {
    let query = match &w.query {
        LatentQuery::Full(full) => DeviceQuery::Full(up.projection(full)?),
        LatentQuery::LowRank { down, norm, up: raise } => DeviceQuery::LowRank {
            down: up.projection(down)?,
            norm: up.floats(norm)?,
            up: up.projection(raise)?,
        },
    };
    let heads = |is_rows: bool| {
        w.key_up.iter().map(move |key| match key {
            KeyUp::Rows(weight) if is_rows => Some(*weight),
            KeyUp::Transposed(weight) if !is_rows => Some(*weight),
            _ => None,
        })
    };
    let all = |is_rows| heads(is_rows).collect::<Option<Vec<Weight>>>();
    let key_up = match (all(true), all(false)) {
        (Some(rows), _) => DeviceKeyUp::Rows(up.matrices(&rows)?),
        (_, Some(columns)) => DeviceKeyUp::Transposed(up.matrices(&columns)?),
        _ => return Err(CudaError::unsupported("heads whose key matrices lie in two ways")),
    };
    Ok(DeviceLatent {
        query,
        kv_down: up.projection(&w.kv_down)?,
        kv_norm: up.floats(&w.kv_norm)?,
        key_up,
        value_up: up.matrices(&w.value_up)?,
        output: up.projection(&w.output)?,
    })
}

fn delta_net(up: &mut Uploader<'_>, w: &DeltaNetWeights) -> Result<DeviceDeltaNet, CudaError> {
    Ok(DeviceDeltaNet {
        qkv: up.projection(&w.qkv)?,
        gate: up.projection(&w.gate)?,
        alpha: up.projection(&w.alpha)?,
        beta: up.projection(&w.beta)?,
        conv: up.floats(&w.conv)?,
        decay: up.floats(&w.decay)?,
        decay_bias: up.floats(&w.decay_bias)?,
        norm: up.floats(&w.norm)?,
        output: up.projection(&w.output)?,
    })
}

impl DeviceMixer {
    /// Formats of the matrices that read the normalised stream.
    pub fn first_formats(&self) -> Vec<Format> {
        let formats = |list: &[&DeviceProjection]| list.iter().map(|p| p.weight.format).collect();
        match self {
            DeviceMixer::Attention(w) => formats(&[&w.q, &w.k, &w.v]),
            DeviceMixer::Latent(w) => match &w.query {
                DeviceQuery::Full(query) => formats(&[query, &w.kv_down]),
                DeviceQuery::LowRank { down, .. } => formats(&[down, &w.kv_down]),
            },
            DeviceMixer::DeltaNet(w) => formats(&[&w.qkv, &w.gate, &w.alpha, &w.beta]),
        }
    }
}
