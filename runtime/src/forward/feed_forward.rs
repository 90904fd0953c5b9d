//! Dense and Mixture-of-Experts feed-forward blocks.

use super::meter::{Meter, Work};
use super::rows::{buffer, for_each_row};
use super::streamed::{self, Streamed};
use super::{Chunk, Engine, project};
use crate::error::Result;
use crate::model::description::FeedForward;
use crate::model::router::RouterState;
use crate::model::weights::{FeedForwardWeights, MoeWeights};
use crate::session::Cancel;
use pregate_kernels::{
    Choice, ExpertGroup, ExpertRows, GatedActivation, Grouping, Linear, Routes, contract,
};
use pregate_predictor::Observer;

/// Buffers of the routed blocks.
#[derive(Default)]
pub struct Scratch {
    logits: Vec<f32>,
    shared: SharedBuffers,
    routes: Routes,
    grouping: Grouping,
    /// `[rows, hidden]`, see [`Grouping`]
    answers: Vec<f32>,
    choices: Vec<Choice>,
    /// One per token of the chunk, carried from layer to layer.
    states: Vec<RouterState>,
    ids: Vec<u32>,
    weights: Vec<f32>,
    pub streamed: streamed::Scratch,
}

impl Scratch {
    /// Starts a pass: no token has met a router yet.
    pub fn start(&mut self, tokens: usize) {
        self.states.truncate(tokens);
        self.states.iter_mut().for_each(RouterState::clear);
        self.states.resize_with(tokens, RouterState::default);
    }
}

/// What accompanies a pass through all its layers.
pub struct Companions<'a, 'm> {
    pub observer: &'a mut dyn Observer,
    pub cancel: &'a Cancel,
    pub meter: &'a mut Meter<'m>,
}

/// One block: `residual` is the stream in front of its norm, `normed` what
/// the norm made of it, `out` what the block adds; all `[tokens, hidden]`.
#[allow(clippy::too_many_arguments)]
pub fn run(
    engine: Engine<'_>,
    chunk: Chunk,
    layer: usize,
    weights: &FeedForwardWeights,
    scratch: &mut Scratch,
    residual: &[f32],
    normed: &[f32],
    out: &mut [f32],
    companions: &mut Companions<'_, '_>,
) -> Result<()> {
    let Engine { files, backend, description, .. } = engine;
    match (weights, &description.layers[layer].feed_forward) {
        (FeedForwardWeights::Dense(block), _) => {
            let block = block.view(files);
            backend.feed_forward(normed, chunk.tokens, block, GatedActivation::Silu, out);
        }
        (FeedForwardWeights::Moe(moe), FeedForward::Moe(m)) => {
            route(engine, chunk, layer, moe, m.experts, scratch, normed, companions.observer);
            let Scratch { logits, routes, grouping, answers, shared, streamed, .. } = scratch;
            grouping.gather(routes);
            let answers = buffer(answers, grouping.rows() * description.hidden);
            let mut shared = Shared::new(moe, m.activation, shared);
            match engine.store {
                Some(store) => {
                    companions.meter.lap(Work::Dense);
                    let block = Streamed {
                        engine,
                        store,
                        chunk,
                        layer,
                        description: m,
                        weights: moe,
                        routes,
                        grouping,
                        residual,
                        normed,
                        logits: &logits[..chunk.tokens * m.experts],
                    };
                    let Companions { observer, cancel, meter } = companions;
                    block.run(streamed, &mut shared, answers, meter, *observer, cancel)?;
                }
                None => {
                    resident(engine, chunk, moe, m.activation, grouping, normed, answers);
                    shared.compute(engine, chunk.tokens, normed);
                }
            }
            backend.combine(routes, grouping, answers, out);
            companions.meter.lap(Work::Experts);
            shared.add_to(engine, out);
        }
        _ => unreachable!("weights are made from the description"),
    }
    Ok(())
}

/// All experts from where their files are mapped.
fn resident(
    engine: Engine<'_>,
    chunk: Chunk,
    moe: &MoeWeights,
    activation: GatedActivation,
    grouping: &Grouping,
    normed: &[f32],
    answers: &mut [f32],
) {
    let weights = |expert: u32| moe.experts[expert as usize].view(engine.files);
    let groups: Vec<ExpertGroup<'_>> = (grouping.experts().enumerate())
        .map(|(index, expert)| grouping.group(index, weights(expert)))
        .collect();
    let (tokens, groups) = (chunk.tokens, &groups[..]);
    engine.backend.expert_rows(ExpertRows { x: normed, tokens, groups, activation, answers });
}

/// Fills `scratch.routes` with every token's choice and tells the observer.
#[allow(clippy::too_many_arguments)]
fn route(
    engine: Engine<'_>,
    chunk: Chunk,
    layer: usize,
    moe: &MoeWeights,
    experts: usize,
    scratch: &mut Scratch,
    normed: &[f32],
    observer: &mut dyn Observer,
) {
    let logits = buffer(&mut scratch.logits, chunk.tokens * experts);
    let router = [&moe.router];
    project(engine.files, engine.backend, &router, normed, chunk.tokens, &mut [&mut *logits]);
    scratch.routes.clear();
    for (token, logits) in logits.chunks_exact(experts).enumerate() {
        scratch.choices.clear();
        moe.rule.route(logits, &mut scratch.states[token], &mut scratch.choices);
        scratch.routes.push(&scratch.choices);
        scratch.ids.clear();
        scratch.ids.extend(scratch.choices.iter().map(|choice| choice.expert));
        scratch.weights.clear();
        scratch.weights.extend(scratch.choices.iter().map(|choice| choice.weight));
        let position = chunk.first_position + token;
        observer.routed(layer, position, &scratch.ids, &scratch.weights);
    }
}

#[derive(Default)]
struct SharedBuffers {
    output: Vec<f32>,
    gates: Vec<f32>,
}

/// The shared expert of a block, gated where the model gates it.
pub struct Shared<'a> {
    weights: &'a MoeWeights,
    activation: GatedActivation,
    buffers: &'a mut SharedBuffers,
    tokens: usize,
}

impl<'a> Shared<'a> {
    fn new(
        weights: &'a MoeWeights,
        activation: GatedActivation,
        buffers: &'a mut SharedBuffers,
    ) -> Self {
        Self { weights, activation, buffers, tokens: 0 }
    }

    /// Computes it, if the block has one, for `normed`, `[tokens, hidden]`.
    pub fn compute(&mut self, engine: Engine<'_>, tokens: usize, normed: &[f32]) {
        let Some(block) = &self.weights.shared else { return };
        self.tokens = tokens;
        let width = engine.description.hidden;
        let output = buffer(&mut self.buffers.output, tokens * width);
        let block = block.view(engine.files);
        engine.backend.feed_forward(normed, tokens, block, self.activation, output);
        let gates = buffer(&mut self.buffers.gates, tokens);
        match self.weights.shared_gate {
            None => gates.fill(1.0),
            Some(weight) => {
                let weight = weight.view(engine.files);
                let job = Linear { weight, bias: None, out: gates };
                engine.backend.linear(normed, tokens, &mut [job]);
                gates.iter_mut().for_each(|gate| *gate = contract::sigmoid(*gate));
            }
        }
    }

    /// The gate and the output, `[hidden]`, of a single token.
    pub fn of_one_token(&self, hidden: usize) -> Option<(f32, &[f32])> {
        let is_computed = self.tokens == 1;
        is_computed.then(|| (self.buffers.gates[0], &self.buffers.output[..hidden]))
    }

    /// Adds what was computed to `out`, `[tokens, hidden]`.
    fn add_to(&self, engine: Engine<'_>, out: &mut [f32]) {
        if self.tokens == 0 {
            return;
        }
        let width = engine.description.hidden;
        let (output, gates) = (&self.buffers.output, &self.buffers.gates);
        for_each_row(engine.backend, out, width, |token, row| {
            let output = &output[token * width..(token + 1) * width];
            for (value, output) in row.iter_mut().zip(output) {
                *value += gates[token] * output;
            }
        });
    }
}
