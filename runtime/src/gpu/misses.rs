//! Experts that are not on the device: the host computes their rows while the
//! device computes the others, and both have the same bits.

use super::buffers::Chosen;
use super::pass::{Pass, words};
use super::weights::DeviceMoe;
use crate::error::Result;
use crate::model::weights::{FeedForwardWeights, GatedBlock};
use pregate_kernels::cuda::{CudaError, Event, Span};
use pregate_kernels::{Choice, ExpertGroup, ExpertRows, Grouping, Routes};

/// A layer's choices, once they are made.
pub struct Visit {
    ready: Event,
}

impl Visit {
    /// To be called behind the layer's norm and router.
    pub fn new(pass: &Pass<'_>) -> Result<Self, CudaError> {
        Ok(Self { ready: pass.stream().record()? })
    }

    /// Fills the rows of `answers`, `[tokens, k, hidden]`, whose experts are
    /// not on the device. Work of the device that was launched since
    /// [`Visit::new`] runs meanwhile; it must not touch these rows.
    pub fn compute(
        self,
        pass: &Pass<'_>,
        layer: usize,
        moe: &DeviceMoe,
        chosen: &Chosen,
        answers: &Span,
    ) -> Result<()> {
        let (tokens, k, hidden) = (pass.tokens, moe.top_k, pass.description.hidden);
        let copy = pass.device().copy();
        copy.wait(&self.ready)?;
        let ids = words(copy, &chosen.ids, tokens * k)?.map(u32::from_ne_bytes);
        let (mut routes, mut rows, mut missing) = (Routes::new(), Vec::new(), Vec::new());
        for (token, ids) in ids.collect::<Vec<_>>().chunks(k).enumerate() {
            missing.clear();
            for (choice, &expert) in ids.iter().enumerate() {
                if !moe.experts.is_resident(expert as usize) {
                    missing.push(Choice { expert, weight: 1.0 });
                    rows.push(token * k + choice);
                }
            }
            routes.push(&missing);
        }
        if rows.is_empty() {
            return Ok(());
        }
        let x: Vec<f32> =
            words(copy, &pass.buffers.normed, tokens * hidden)?.map(f32::from_ne_bytes).collect();
        let mut grouping = Grouping::default();
        grouping.gather(&routes);
        let mut found = vec![0.0; grouping.rows() * hidden];
        self::rows(pass, layer, moe, &x, &grouping, &mut found);
        send(pass, &rows, &grouping, &found, answers)
    }
}

/// What the missing experts answer, in the order of `grouping`.
fn rows(
    pass: &Pass<'_>,
    layer: usize,
    moe: &DeviceMoe,
    x: &[f32],
    grouping: &Grouping,
    answers: &mut [f32],
) {
    let engine = pass.engine;
    let FeedForwardWeights::Moe(weights) = &engine.weights.layers[layer].feed_forward else {
        unreachable!("the device's layers are the model's")
    };
    let block = |expert: u32| -> &GatedBlock { &weights.experts[expert as usize] };
    let groups: Vec<ExpertGroup<'_>> = (grouping.experts().enumerate())
        .map(|(index, expert)| grouping.group(index, block(expert).view(engine.files)))
        .collect();
    engine.backend.expert_rows(ExpertRows {
        x,
        tokens: pass.tokens,
        groups: &groups,
        activation: moe.activation,
        answers,
    });
}

/// Copies the rows of the missing choices, whose places are `rows`, to the
/// device; neighbours at once.
fn send(
    pass: &Pass<'_>,
    rows: &[usize],
    grouping: &Grouping,
    found: &[f32],
    answers: &Span,
) -> Result<()> {
    let hidden = pass.description.hidden;
    let mut bytes = Vec::new();
    let mut first = 0;
    for (index, &row) in rows.iter().enumerate() {
        let from = grouping.row_of(index) * hidden;
        let values = &found[from..from + hidden];
        bytes.extend(values.iter().flat_map(|value| value.to_ne_bytes()));
        if rows.get(index + 1) != Some(&(row + 1)) {
            let start = 4 * hidden * rows[first];
            let span = answers.part(start..start + bytes.len());
            pass.device().copy().upload(&span, &bytes)?;
            bytes.clear();
            first = index + 1;
        }
    }
    Ok(())
}
