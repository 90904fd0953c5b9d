//! The network as launches: what a pass gives its stream, in order, and what
//! is read back behind it.

use super::buffers::{Buffers, FEW_TOKENS};
use super::pass::{Pass, from_row, words};
use super::state::LayerState;
use super::token::TokenPath;
use super::weights::{DeviceFeedForward, DeviceLayer, DeviceMixer};
use super::{attention, delta_net, feed_forward, latent};
use crate::model::description::Mixer;
use pregate_kernels::cuda::CudaError;
use pregate_predictor::Observer;

/// All launches of a pass but the head's: leaves the final norm of the last
/// `wanted` tokens in `normed`. `block` launches a layer's feed-forward block.
pub fn launch<E: From<CudaError>>(
    pass: &Pass<'_>,
    layers: &[LayerState],
    wanted: usize,
    block: &mut dyn FnMut(usize, &DeviceLayer) -> Result<bool, E>,
) -> Result<(), E> {
    let weights = &pass.model.weights;
    // Whether `delta` holds what the last block adds.
    let mut has_delta = false;
    let described = layers.iter().zip(&pass.description.layers);
    for (index, (layer, (state, of))) in weights.layers.iter().zip(described).enumerate() {
        pass.norm(&layer.mixer_norm, has_delta, pass.tokens, &layer.mixer.first_formats())?;
        match (&layer.mixer, state, &of.mixer) {
            (
                DeviceMixer::Attention(w),
                LayerState::Attention { keys, values },
                Mixer::Attention(a),
            ) => {
                attention::run(pass, a, w, keys, values)?;
            }
            (DeviceMixer::Latent(w), LayerState::Latent { rows }, Mixer::Latent(l)) => {
                latent::run(pass, l, w, rows)?;
            }
            (DeviceMixer::DeltaNet(w), LayerState::DeltaNet(state), Mixer::DeltaNet(d)) => {
                delta_net::run(pass, d, w, state)?;
            }
            _ => unreachable!("state and weights are made from one description"),
        }
        has_delta = block(index, layer)?;
    }
    if wanted == 0 {
        return Ok(());
    }
    // Of more rows only pieces are quantised, by `head`.
    let format = (wanted <= FEW_TOKENS).then_some(weights.head.weight.format);
    Ok(pass.norm(&weights.final_norm, has_delta, wanted, format.as_slice())?)
}

/// All launches of a token that the device computes by itself. `launched`
/// hears 0 behind the first launch, then of each layer whose launches were
/// made, and may serve those before it: more than a driver takes at once would
/// wait for the device, and the device for the host.
pub fn launch_token<E: From<CudaError>>(
    pass: &Pass<'_>,
    path: &TokenPath,
    layers: &[LayerState],
    launched: &mut dyn FnMut(usize) -> Result<(), E>,
) -> Result<(), E> {
    path.begin(pass)?;
    launched(0)?;
    launch(pass, layers, 1, &mut |index, layer: &DeviceLayer| -> Result<bool, E> {
        let (norm, block) = (&layer.feed_forward_norm, &layer.feed_forward);
        let has_delta = feed_forward::step(pass, path, index, norm, block)?;
        launched(index)?;
        Ok(has_delta)
    })?;
    let projection = &pass.model.weights.head;
    let input = pass.normed(projection.weight.format);
    Ok(pass.product(projection, 1, input, &pass.buffers.logits)?)
}

/// Appends the logits of what [`launch`] left, a few tokens at a time: the
/// vocabulary is the widest of all.
pub fn head(pass: &Pass<'_>, wanted: usize, logits: &mut Vec<f32>) -> Result<(), CudaError> {
    let Buffers { normed, logits: out, .. } = pass.buffers;
    let projection = &pass.model.weights.head;
    let (rows, cols) = (projection.weight.rows, projection.weight.cols);
    for first in (0..wanted).step_by(FEW_TOKENS) {
        let tokens = FEW_TOKENS.min(wanted - first);
        let x = from_row(normed, first, cols);
        let format = projection.weight.format;
        let input = match wanted {
            0..=FEW_TOKENS => pass.normed(format),
            _ => pass.input(format, &x, (tokens, cols), cols)?,
        };
        pass.product(projection, tokens, input, out)?;
        logits.extend(words(pass.stream(), out, tokens * rows)?.map(f32::from_ne_bytes));
    }
    Ok(())
}

/// Tells the observer what the routers of a pass chose.
pub fn tell(pass: &Pass<'_>, observer: &mut dyn Observer) -> Result<(), CudaError> {
    let all = &pass.exchange.all_choices;
    let words: Vec<[u8; 4]> = words(pass.stream(), all, all.bytes() / 4)?.collect();
    for (index, layer) in pass.model.weights.layers.iter().enumerate() {
        let DeviceFeedForward::Moe(moe) = &layer.feed_forward else { continue };
        let chosen = &pass.exchange.choices[moe.router];
        let (ids, weights) = words[chosen.range.start / 4..chosen.range.end / 4]
            .split_at((chosen.range.end - chosen.range.start) / 8);
        let of = |words: &[[u8; 4]], token: usize| words[token * moe.top_k..][..moe.top_k].to_vec();
        for token in 0..pass.tokens {
            let ids: Vec<u32> = of(ids, token).into_iter().map(u32::from_ne_bytes).collect();
            let weights: Vec<f32> =
                of(weights, token).into_iter().map(f32::from_ne_bytes).collect();
            observer.routed(index, pass.first_position + token, &ids, &weights);
        }
    }
    Ok(())
}
