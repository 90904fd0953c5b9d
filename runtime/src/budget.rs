//! Divides a budget of memory once, before anything large is taken: weights,
//! KV cache, scratch, slots for experts and the ring that they are read into.
//! Pure arithmetic; whoever calls it has measured what it needs to know.
//!
//! Either the whole model fits and is used where it is mapped, or its experts
//! are streamed: every MoE layer gets slots for at least the experts of one
//! token, and no part is ever larger than the plan says.

mod scratch;
mod sizes;

pub use scratch::{Chunk, scratch_bytes};
pub use sizes::Sizes;

use crate::model::{Residency, Streaming};
use pregate_predictor::LayerShape;
use serde::Serialize;
use std::fmt;

/// What memory is asked for, and how much of it there is.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// For everything that this process holds, in bytes.
    pub budget_bytes: u64,
    /// What the process holds already: code, tokenizer, small vectors.
    pub process_bytes: u64,
    /// Of the KV cache with a full context.
    pub kv_bytes: u64,
    /// Of the forward pass; see [`scratch_bytes`].
    pub scratch_bytes: u64,
    /// Frames of each class that are no slots; `None`: twice the experts of
    /// a token, and at least four. Fewer, at least one, where memory is short.
    pub ring: Option<usize>,
}

/// Where every byte of a budget goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    pub process_bytes: u64,
    /// The whole model, or all of it but experts and embedding rows.
    pub weights_bytes: u64,
    pub kv_bytes: u64,
    pub scratch_bytes: u64,
    pub slots_bytes: u64,
    pub ring_bytes: u64,
}

impl Parts {
    pub fn total(&self) -> u64 {
        let parts = [
            self.process_bytes,
            self.weights_bytes,
            self.kv_bytes,
            self.scratch_bytes,
            self.slots_bytes,
            self.ring_bytes,
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// The frames of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ClassPlan {
    pub frame_bytes: u64,
    /// Frames that hold experts between tokens, of all layers of the class.
    pub slots: usize,
}

/// How the experts are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// All weights stay in the mapped files, all in memory.
    Whole,
    Streaming {
        /// Per layer of the model, 0 for dense layers.
        slots: Vec<usize>,
        /// Further frames of each class, which experts are read into.
        ring: usize,
        /// As in [`Sizes::class_bytes`].
        classes: Vec<ClassPlan>,
    },
}

/// A budget, divided. `parts.total() + left_bytes == budget_bytes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    pub budget_bytes: u64,
    pub parts: Parts,
    pub left_bytes: u64,
    pub placement: Placement,
}

impl Plan {
    pub fn is_whole(&self) -> bool {
        self.placement == Placement::Whole
    }

    /// What to load a model with.
    pub fn residency(&self) -> Residency {
        self.residency_with(Streaming::default())
    }

    /// The same, with `streaming` for all but the numbers of this plan.
    pub fn residency_with(&self, streaming: Streaming) -> Residency {
        match &self.placement {
            Placement::Whole => Residency::Resident,
            Placement::Streaming { slots, ring, .. } => {
                Residency::Streamed(Streaming { slots: slots.clone(), ring: *ring, ..streaming })
            }
        }
    }

    /// Per layer of the model; `None` if there are none to count.
    pub fn slots(&self) -> Option<&[usize]> {
        match &self.placement {
            Placement::Whole => None,
            Placement::Streaming { slots, .. } => Some(slots),
        }
    }
}

/// The smallest plan that would work, and why there is none for less.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooSmall {
    pub budget_bytes: u64,
    /// What the smallest plan takes.
    pub parts: Parts,
    pub is_whole: bool,
    /// MoE layers, and the experts of one token in all of them.
    pub moe_layers: usize,
    pub experts: usize,
}

impl TooSmall {
    pub fn missing_bytes(&self) -> u64 {
        self.parts.total().saturating_sub(self.budget_bytes)
    }
}

impl fmt::Display for TooSmall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { process_bytes, weights_bytes, kv_bytes, scratch_bytes, .. } = self.parts;
        let weights = if self.is_whole { "all weights" } else { "weights without experts" };
        write!(
            f,
            "a budget of {} is {} too small: the smallest that works is {} ({weights} {}, KV \
             cache {}, scratch {}, the program itself {}",
            Megabytes(self.budget_bytes),
            Megabytes(self.missing_bytes()),
            Megabytes(self.parts.total()),
            Megabytes(weights_bytes),
            Megabytes(kv_bytes),
            Megabytes(scratch_bytes),
            Megabytes(process_bytes),
        )?;
        if !self.is_whole {
            write!(
                f,
                ", slots for the {} experts of one token in {} layers {}, ring {}",
                self.experts,
                self.moe_layers,
                Megabytes(self.parts.slots_bytes),
                Megabytes(self.parts.ring_bytes),
            )?;
        }
        f.write_str("); a larger budget or a shorter context helps")
    }
}

impl std::error::Error for TooSmall {}

/// Rounded up: a figure that is copied from a message must work.
struct Megabytes(u64);

impl fmt::Display for Megabytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = (u128::from(self.0) * 10).div_ceil(1_000_000);
        write!(f, "{}.{} MB", tenths / 10, tenths % 10)
    }
}

/// Divides `request.budget_bytes` over a model of `sizes`.
///
/// The whole model is taken where it fits. Otherwise every MoE layer gets
/// slots for the experts of one token and every class one ring frame; what is
/// left fills the rings, then goes slot by slot to the layer with the smallest
/// share of its experts in slots. A larger budget never gets a layer fewer
/// slots.
///
/// # Errors
/// The budget is smaller than the smallest plan.
pub fn divide(sizes: &Sizes, request: &Request) -> Result<Plan, TooSmall> {
    let base = Parts {
        process_bytes: request.process_bytes,
        kv_bytes: request.kv_bytes,
        scratch_bytes: request.scratch_bytes,
        ..Parts::default()
    };
    let whole = Parts { weights_bytes: sizes.whole_bytes, ..base };
    let budget_bytes = request.budget_bytes;
    let plan = |parts: Parts, placement| Plan {
        budget_bytes,
        parts,
        left_bytes: budget_bytes - parts.total(),
        placement,
    };
    if whole.total() <= budget_bytes {
        return Ok(plan(whole, Placement::Whole));
    }
    let base = Parts { weights_bytes: sizes.dense_bytes, ..base };
    let mut frames = Frames::smallest(sizes, base);
    let smallest = frames.parts();
    if sizes.shape.moe().next().is_none() || smallest.total() > budget_bytes {
        let is_whole = sizes.shape.moe().next().is_none() || whole.total() <= smallest.total();
        return Err(TooSmall {
            budget_bytes,
            parts: if is_whole { whole } else { smallest },
            is_whole,
            moe_layers: sizes.shape.moe().count(),
            experts: frames.slots.iter().sum(),
        });
    }
    frames.grow(budget_bytes, request.ring);
    let (parts, classes) = (frames.parts(), frames.class_plans());
    let Frames { slots, ring, .. } = frames;
    Ok(plan(parts, Placement::Streaming { slots, ring, classes }))
}

/// Frames while they are being handed out.
struct Frames<'a> {
    sizes: &'a Sizes,
    /// Everything but the frames.
    base: Parts,
    /// Per layer of the model.
    slots: Vec<usize>,
    /// Of each class.
    ring: usize,
}

impl<'a> Frames<'a> {
    fn smallest(sizes: &'a Sizes, base: Parts) -> Self {
        let top_k = |layer: &Option<LayerShape>| layer.map_or(0, |layer| layer.top_k);
        let slots = sizes.shape.layers.iter().map(top_k).collect();
        Self { sizes, base, slots, ring: 1 }
    }

    fn parts(&self) -> Parts {
        let slots = self.sizes.shape.moe().map(|(index, layer)| {
            let frame_bytes = self.sizes.class_bytes[layer.class];
            frame_bytes.saturating_mul(self.slots[index] as u64)
        });
        Parts {
            slots_bytes: slots.fold(0, u64::saturating_add),
            ring_bytes: self.ring_step().saturating_mul(self.ring as u64),
            ..self.base
        }
    }

    /// One frame more of each class.
    fn ring_step(&self) -> u64 {
        self.sizes.class_bytes.iter().copied().fold(0, u64::saturating_add)
    }

    /// Hands out frames in an order that does not depend on the budget, up to
    /// the first that does not fit.
    fn grow(&mut self, budget_bytes: u64, ring: Option<usize>) {
        let mut left = budget_bytes - self.parts().total();
        let top_k = self.sizes.shape.moe().map(|(_, layer)| layer.top_k).max().unwrap_or(0);
        let wanted = ring.unwrap_or((2 * top_k).max(SMALLEST_RING));
        while self.ring < wanted {
            let Some(rest) = left.checked_sub(self.ring_step()) else { return };
            left = rest;
            self.ring += 1;
        }
        while let Some((index, layer)) = self.emptiest() {
            let Some(rest) = left.checked_sub(self.sizes.class_bytes[layer.class]) else { return };
            left = rest;
            self.slots[index] += 1;
        }
    }

    /// The layer with the smallest share of its experts in slots; of equal
    /// ones the first. `None` when every expert has a slot.
    fn emptiest(&self) -> Option<(usize, &'a LayerShape)> {
        let sizes = self.sizes;
        let open = sizes.shape.moe().filter(|(index, layer)| self.slots[*index] < layer.experts);
        open.min_by(|(a, x), (b, y)| {
            // slots[a] / x.experts against slots[b] / y.experts.
            let [slots_a, slots_b] = [self.slots[*a] as u128, self.slots[*b] as u128];
            (slots_a * y.experts as u128).cmp(&(slots_b * x.experts as u128))
        })
    }

    fn class_plans(&self) -> Vec<ClassPlan> {
        let slots = |class: usize| {
            let of_class = self.sizes.shape.moe().filter(|(_, layer)| layer.class == class);
            of_class.map(|(index, _)| self.slots[index]).sum()
        };
        let classes = self.sizes.class_bytes.iter().enumerate();
        classes
            .map(|(class, &frame_bytes)| ClassPlan { frame_bytes, slots: slots(class) })
            .collect()
    }
}

/// Reads in flight that keep a drive busy at 1-2 MiB each.
const SMALLEST_RING: usize = 4;

#[cfg(test)]
mod tests;
