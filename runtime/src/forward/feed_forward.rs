//! Dense and Mixture-of-Experts feed-forward blocks.

use super::rows::{buffer, for_each_row};
use super::{Chunk, Engine, project};
use crate::model::description::FeedForward;
use crate::model::router::RouterState;
use crate::model::weights::{FeedForwardWeights, MoeWeights};
use pregate_kernels::{
    Choice, ExpertGroup, ExpertRows, GatedActivation, Grouping, Linear, Routes, contract,
};
use pregate_predictor::Observer;

/// Buffers of the routed blocks.
#[derive(Default)]
pub struct Scratch {
    logits: Vec<f32>,
    shared: Vec<f32>,
    shared_gate: Vec<f32>,
    routes: Routes,
    grouping: Grouping,
    /// `[rows, hidden]`, see [`Grouping`]
    answers: Vec<f32>,
    choices: Vec<Choice>,
    /// One per token of the chunk, carried from layer to layer.
    states: Vec<RouterState>,
    ids: Vec<u32>,
    weights: Vec<f32>,
}

impl Scratch {
    /// Starts a pass: no token has met a router yet.
    pub fn start(&mut self, tokens: usize) {
        self.states.truncate(tokens);
        self.states.iter_mut().for_each(RouterState::clear);
        self.states.resize_with(tokens, RouterState::default);
    }
}

/// `normed` and `out` are `[tokens, hidden]`.
#[allow(clippy::too_many_arguments)]
pub fn run(
    engine: Engine<'_>,
    chunk: Chunk,
    layer: usize,
    weights: &FeedForwardWeights,
    scratch: &mut Scratch,
    normed: &[f32],
    out: &mut [f32],
    observer: &mut dyn Observer,
) {
    let Engine { files, backend, description, .. } = engine;
    match (weights, &description.layers[layer].feed_forward) {
        (FeedForwardWeights::Dense(block), _) => {
            let block = block.view(files);
            backend.feed_forward(normed, chunk.tokens, block, GatedActivation::Silu, out);
        }
        (FeedForwardWeights::Moe(moe), FeedForward::Moe(m)) => {
            route(engine, chunk, layer, moe, m.experts, scratch, normed, observer);
            scratch.grouping.gather(&scratch.routes);
            let hidden = description.hidden;
            let answers = buffer(&mut scratch.answers, scratch.grouping.rows() * hidden);
            let groups: Vec<ExpertGroup<'_>> = (scratch.grouping.experts().enumerate())
                .map(|(index, expert)| {
                    scratch.grouping.group(index, moe.experts[expert as usize].view(files))
                })
                .collect();
            let (tokens, activation) = (chunk.tokens, m.activation);
            let rows = ExpertRows { x: normed, tokens, groups: &groups, activation, answers };
            backend.expert_rows(rows);
            backend.combine(&scratch.routes, &scratch.grouping, answers, out);
            if moe.shared.is_some() {
                add_shared(engine, chunk, moe, m.activation, scratch, normed, out);
            }
        }
        _ => unreachable!("weights are made from the description"),
    }
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

/// Adds the shared expert, gated where the model gates it.
fn add_shared(
    engine: Engine<'_>,
    chunk: Chunk,
    moe: &MoeWeights,
    activation: GatedActivation,
    scratch: &mut Scratch,
    normed: &[f32],
    out: &mut [f32],
) {
    let Some(block) = &moe.shared else { return };
    let width = engine.description.hidden;
    let shared = buffer(&mut scratch.shared, chunk.tokens * width);
    let block = block.view(engine.files);
    engine.backend.feed_forward(normed, chunk.tokens, block, activation, shared);
    let gates = buffer(&mut scratch.shared_gate, chunk.tokens);
    match moe.shared_gate {
        None => gates.fill(1.0),
        Some(weight) => {
            let weight = weight.view(engine.files);
            let job = Linear { weight, bias: None, out: gates };
            engine.backend.linear(normed, chunk.tokens, &mut [job]);
            gates.iter_mut().for_each(|gate| *gate = contract::sigmoid(*gate));
        }
    }
    let (shared, gates) = (&*shared, &*gates);
    for_each_row(engine.backend, out, width, |token, row| {
        let shared = &shared[token * width..(token + 1) * width];
        for (value, shared) in row.iter_mut().zip(shared) {
            *value += gates[token] * shared;
        }
    });
}
