//! What the host gives a pass, and what its routers chose, on the device.

use super::buffers::ALIGN;
use crate::model::description::ModelDescription;
use crate::model::rope::Rope;
use pregate_kernels::cuda::{Arena, CudaError, Span};
use std::ops::Range;

/// Memory for passes of so many tokens.
pub struct Exchange {
    /// All that the host gives, in one piece: residual stream, starts, tables.
    pub inputs: Span,
    /// Of `inputs`: the residual stream, `[tokens, hidden]`.
    pub x: Span,
    /// Of `inputs`: i32 `[2]`, 0 and the number of tokens, for dense blocks.
    pub dense_starts: Span,
    /// Of `inputs`, per rope: `[tokens, half, 2]`.
    pub tables: Vec<Span>,
    /// Per MoE layer, i32 and f32 `[tokens, top_k]`.
    pub choices: Vec<Chosen>,
    /// All of `choices`.
    pub all_choices: Span,
}

/// Where a layer's choice goes.
pub struct Chosen {
    pub ids: Span,
    pub weights: Span,
    /// Where both are in [`Exchange::all_choices`], in bytes.
    pub range: Range<usize>,
}

/// Where everything is: in the inputs, and in the choices.
struct Layout {
    x: Range<usize>,
    dense_starts: Range<usize>,
    tables: Vec<Range<usize>>,
    choices: Vec<Range<usize>>,
}

impl Layout {
    fn of(description: &ModelDescription, tokens: usize) -> Self {
        let x = 0..4 * tokens * description.hidden;
        let start = x.end.next_multiple_of(ALIGN);
        let dense_starts = start..start + 8;
        let mut end = dense_starts.end;
        let mut table = |half: usize| {
            let start = end.next_multiple_of(ALIGN);
            end = start + 8 * tokens * half;
            start..end
        };
        let tables = description.ropes.iter().map(|rope| table(rope.dim / 2)).collect();
        let mut end = 0;
        let mut chosen = |top_k: usize| {
            let start = end;
            end += 2 * (4 * tokens * top_k).next_multiple_of(ALIGN);
            start..end
        };
        let choices = description.moe_layers().map(|(_, moe)| chosen(moe.top_k)).collect();
        Self { x, dense_starts, tables, choices }
    }

    fn inputs_bytes(&self) -> usize {
        self.tables.last().unwrap_or(&self.dense_starts).end
    }

    fn choices_bytes(&self) -> usize {
        self.choices.last().map_or(0, |range| range.end).max(ALIGN)
    }
}

impl Exchange {
    /// Bytes of [`Exchange::new`].
    pub fn bytes(description: &ModelDescription, tokens: usize) -> usize {
        let layout = Layout::of(description, tokens);
        layout.inputs_bytes().next_multiple_of(ALIGN) + layout.choices_bytes()
    }

    /// Bytes of what the host gives for so many tokens.
    pub fn inputs_bytes(description: &ModelDescription, tokens: usize) -> usize {
        Layout::of(description, tokens).inputs_bytes()
    }

    pub fn new(
        arena: &Arena,
        description: &ModelDescription,
        tokens: usize,
    ) -> Result<Self, CudaError> {
        let layout = Layout::of(description, tokens);
        let inputs = arena.take(layout.inputs_bytes(), ALIGN)?;
        let all_choices = arena.take(layout.choices_bytes(), ALIGN)?;
        let chosen = |range: Range<usize>| {
            let half = (range.start + range.end) / 2;
            let (ids, weights) = (range.start..half, half..range.end);
            Chosen { ids: all_choices.part(ids), weights: all_choices.part(weights), range }
        };
        Ok(Self {
            x: inputs.part(layout.x),
            dense_starts: inputs.part(layout.dense_starts),
            tables: layout.tables.into_iter().map(|range| inputs.part(range)).collect(),
            choices: layout.choices.into_iter().map(chosen).collect(),
            inputs,
            all_choices,
        })
    }

    /// What to write to `inputs`, up to its last byte that matters, for the
    /// tokens from `first_position` on whose residual stream is `x`.
    pub fn fill(
        &self,
        (x, tokens): (&[f32], usize),
        (ropes, first_position): (&[Rope], usize),
        table: &mut Vec<[f32; 2]>,
        out: &mut Vec<u8>,
    ) {
        let start = self.inputs.address();
        out.clear();
        out.extend(x.iter().flat_map(|value| value.to_ne_bytes()));
        out.resize((self.dense_starts.address() - start) as usize, 0);
        out.extend([0, tokens as i32].into_iter().flat_map(i32::to_ne_bytes));
        for (rope, span) in ropes.iter().zip(&self.tables) {
            out.resize((span.address() - start) as usize, 0);
            rope.fill(first_position, tokens, table);
            out.extend(table.iter().flatten().flat_map(|value| value.to_ne_bytes()));
        }
    }
}
