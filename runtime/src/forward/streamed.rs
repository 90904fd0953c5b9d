//! Routed experts that come from the expert store.

use super::feed_forward::Shared;
use super::meter::{Meter, Work};
use super::rows::buffer;
use super::{Chunk, Engine, norm_rows, project};
use crate::error::Result;
use crate::model::description::MoeDescription;
use crate::model::weights::{FeedForwardWeights, LayerWeights, MoeWeights};
use crate::session::Cancel;
use crate::store::{Event, ExpertStore};
use pregate_kernels::{ExpertGroup, ExpertRows, Grouping, Routes};
use pregate_predictor::Observer;
use pregate_predictor::forecast::{External, Source};

/// Buffers of forecasts.
#[derive(Default)]
pub struct Scratch {
    state: Vec<f32>,
    normed: Vec<f32>,
    logits: Vec<f32>,
    order: Vec<u32>,
    /// Layers that a forecast was made for.
    targets: Vec<usize>,
}

/// One layer's experts.
pub struct Streamed<'a> {
    pub engine: Engine<'a>,
    pub store: &'a ExpertStore,
    pub chunk: Chunk,
    pub layer: usize,
    pub description: &'a MoeDescription,
    pub weights: &'a MoeWeights,
    pub routes: &'a Routes,
    pub grouping: &'a Grouping,
    /// The residual stream that the routers ahead are applied to,
    /// `[tokens, hidden]`.
    pub residual: &'a [f32],
    /// Input of the experts, `[tokens, hidden]`.
    pub normed: &'a [f32],
    /// What the layer's own router answered, `[tokens, experts]`.
    pub logits: &'a [f32],
}

impl Streamed<'_> {
    /// Fills the rows of `answers`, `[rows, hidden]`, expert by expert as they
    /// arrive. `shared` is computed while the disk works; forecasts want it.
    pub fn run(
        &self,
        scratch: &mut Scratch,
        shared: &mut Shared<'_>,
        answers: &mut [f32],
        meter: &mut Meter<'_>,
        observer: &mut dyn Observer,
        cancel: &Cancel,
    ) -> Result<()> {
        scratch.order.clear();
        if self.chunk.tokens == 1 {
            // Router order: the most important first.
            scratch.order.extend(self.routes.of(0).iter().map(|choice| choice.expert));
        } else {
            scratch.order.extend(self.grouping.experts());
            scratch.order.sort_by_key(|&expert| self.store.position(self.layer, expert));
        }
        let forecasts = self.chunk.tokens == 1 && self.store.horizon() > 0;
        if forecasts && self.store.wants(self.layer) {
            // The control: a forecast from the very state that the router saw
            // must name every expert, or the books of forecasts are wrong.
            let logits = buffer(&mut scratch.logits, self.logits.len());
            logits.copy_from_slice(self.logits);
            self.weights.rule.rank(logits);
            let (source, target) = (Source::ZeroStaleness, self.layer);
            self.store.control(&External { source, target, logits });
        }
        let mut event = self.store.begin(self.layer, &scratch.order, self.routes);
        meter.lap(Work::Overhead);
        shared.compute(self.engine, self.chunk.tokens, self.normed);
        meter.lap(Work::Dense);
        if forecasts {
            let started = event.now_ns();
            let shared = shared.of_one_token(self.engine.description.hidden);
            self.foresee(scratch, &mut event, shared);
            event.prefetch();
            event.spent(&scratch.targets, event.now_ns() - started);
        }
        loop {
            let before = event.waited_ns();
            let mut arrived = event.next(cancel)?;
            meter.lap_with_wait(Work::Overhead, event.waited_ns() - before);
            if arrived.is_empty() {
                break;
            }
            arrived.sort_unstable_by_key(|arrived| arrived.expert);
            let groups: Vec<ExpertGroup<'_>> = arrived
                .iter()
                .filter_map(|arrived| {
                    let block = &self.weights.experts[arrived.expert as usize];
                    let weights = self.store.view(self.layer, block, arrived);
                    Some(self.grouping.group(self.grouping.index_of(arrived.expert)?, weights))
                })
                .collect();
            self.engine.backend.expert_rows(ExpertRows {
                x: self.normed,
                tokens: self.chunk.tokens,
                groups: &groups,
                activation: self.description.activation,
                answers,
            });
            meter.lap(Work::Experts);
        }
        event.finish(self.chunk.first_position, self.chunk.tokens, observer);
        meter.lap(Work::Overhead);
        Ok(())
    }

    /// The routers of the next layers on this layer's state: pre-gated
    /// lookahead (2308.12066) without training, as a forecast.
    fn foresee(&self, scratch: &mut Scratch, event: &mut Event<'_>, shared: Option<(f32, &[f32])>) {
        let layers = &self.engine.weights.layers;
        let mut targets = std::mem::take(&mut scratch.targets);
        targets.clear();
        let is_moe =
            |&layer: &usize| matches!(layers[layer].feed_forward, FeedForwardWeights::Moe(_));
        let ahead = (self.layer + 1..layers.len()).filter(is_moe).take(self.store.horizon());
        targets.extend(ahead.filter(|&layer| event.wants(layer)));
        for &target in &targets {
            let ahead = (self.layer + 1..=target).filter(is_moe).count() as u8;
            self.ask_router(scratch, event, target, self.residual, Source::StaleGate { ahead });
            if let Some((gate, shared)) = shared {
                let mut state = std::mem::take(&mut scratch.state);
                state.clear();
                state.extend(self.residual.iter().zip(shared).map(|(x, y)| x + gate * y));
                let source = Source::StaleGateShared { ahead };
                self.ask_router(scratch, event, target, &state, source);
                scratch.state = state;
            }
        }
        scratch.targets = targets;
    }

    fn ask_router(
        &self,
        scratch: &mut Scratch,
        event: &mut Event<'_>,
        target: usize,
        state: &[f32],
        source: Source,
    ) {
        let Scratch { normed, logits, .. } = scratch;
        let logits = router_scores(self.engine, target, state, normed, logits);
        event.foresee(&External { source, target, logits });
    }
}

/// The scores by which the router of MoE layer `target` would choose if
/// `state`, `[hidden]`, were the residual stream in front of it.
pub fn router_scores<'s>(
    engine: Engine<'_>,
    target: usize,
    state: &[f32],
    normed: &mut Vec<f32>,
    logits: &'s mut Vec<f32>,
) -> &'s mut [f32] {
    let layer = &engine.weights.layers[target];
    let FeedForwardWeights::Moe(moe) = &layer.feed_forward else {
        unreachable!("forecasts are made for MoE layers")
    };
    let normed = buffer(normed, state.len());
    norm_rows(engine, &layer.feed_forward_norm, state, normed);
    let logits = buffer(logits, moe.experts.len());
    project(engine.files, engine.backend, &[&moe.router], normed, 1, &mut [&mut *logits]);
    moe.rule.rank(logits);
    logits
}

/// Passes between two in which the routers of all layers are tried before
/// their attention.
const TRIAL_EVERY: usize = 8;

/// Before a layer's attention: its own router on the stream as it is now. For
/// the first MoE layer, which no earlier router forecasts, it says what to
/// fetch while the attention is computed. For the others it says hardly more
/// than the router before them did (`docs/measurements.md`), so it is only
/// judged, in some of the passes.
pub fn foresee_own(
    engine: Engine<'_>,
    chunk: Chunk,
    layer: usize,
    residual: &[f32],
    scratch: &mut Scratch,
    meter: &mut Meter<'_>,
) {
    let layers = &engine.weights.layers;
    let is_moe = |layer: &LayerWeights| matches!(layer.feed_forward, FeedForwardWeights::Moe(_));
    let Some(store) = engine.store.filter(|store| store.horizon() > 0) else { return };
    let is_first = !layers[..layer].iter().any(is_moe);
    let is_trial = chunk.first_position.is_multiple_of(TRIAL_EVERY);
    if !is_moe(&layers[layer]) || !(is_first || is_trial) || !store.wants(layer) {
        return;
    }
    meter.lap(Work::Dense);
    let Scratch { normed, logits, .. } = scratch;
    let logits = router_scores(engine, layer, residual, normed, logits);
    let external = External { source: Source::OwnGateBeforeAttention, target: layer, logits };
    match is_first {
        true => store.foresee(&external),
        false => store.control(&external),
    }
    meter.lap(Work::Overhead);
}
