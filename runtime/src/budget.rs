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
pub use sizes::{ExpertSizes, Sizes, frame_bytes};

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
    /// Frames of a class that are no slots; `None`: twice the experts of a
    /// token, and at least four. Fewer, at least one, where memory is short.
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
    /// Further frames, which experts are read into.
    pub ring: usize,
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
        /// In the order of [`Sizes::classes`].
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
            Mib(self.budget_bytes),
            Mib(self.missing_bytes()),
            Mib(self.parts.total()),
            Mib(weights_bytes),
            Mib(kv_bytes),
            Mib(scratch_bytes),
            Mib(process_bytes),
        )?;
        if !self.is_whole {
            write!(
                f,
                ", slots for the {} experts of one token in {} layers {}, ring {}",
                self.experts,
                self.moe_layers,
                Mib(self.parts.slots_bytes),
                Mib(self.parts.ring_bytes),
            )?;
        }
        f.write_str("); a larger budget or a shorter context helps")
    }
}

impl std::error::Error for TooSmall {}

/// Rounded up: a figure that is copied from a message must work.
struct Mib(u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = (u128::from(self.0) * 10).div_ceil(1 << 20);
        write!(f, "{}.{} MiB", tenths / 10, tenths % 10)
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
    let streaming = Parts { weights_bytes: sizes.dense_bytes, ..base };
    let mut frames = Frames::smallest(sizes, streaming);
    let is_whole = frames.slots.iter().all(|slots| *slots == 0) || whole.total() <= frames.total();
    if is_whole || frames.total() > budget_bytes {
        let parts = if is_whole { whole } else { frames.parts() };
        return Err(TooSmall {
            budget_bytes,
            parts,
            is_whole,
            moe_layers: sizes.moe().count(),
            experts: sizes.moe().map(|(_, layer)| layer.top_k).sum(),
        });
    }
    frames.grow(budget_bytes, request.ring);
    let parts = frames.parts();
    let classes = frames.class_plans();
    Ok(plan(parts, Placement::Streaming { slots: frames.slots, classes }))
}

/// Frames while they are being handed out.
struct Frames<'a> {
    sizes: &'a Sizes,
    /// Everything but the frames.
    base: Parts,
    classes: Vec<u64>,
    /// Per layer, the class of its frames.
    class_of: Vec<usize>,
    slots: Vec<usize>,
    ring: Vec<usize>,
}

impl<'a> Frames<'a> {
    fn smallest(sizes: &'a Sizes, base: Parts) -> Self {
        let classes = sizes.classes();
        let class = |layer: &Option<ExpertSizes>| {
            let frame_bytes = layer.as_ref().map(|layer| layer.frame_bytes);
            classes.iter().position(|class| Some(*class) == frame_bytes).unwrap_or(0)
        };
        let slots = |layer: &Option<ExpertSizes>| layer.as_ref().map_or(0, |layer| layer.top_k);
        Self {
            sizes,
            base,
            class_of: sizes.layers.iter().map(class).collect(),
            slots: sizes.layers.iter().map(slots).collect(),
            ring: vec![1; classes.len()],
            classes,
        }
    }

    fn parts(&self) -> Parts {
        let bytes = |count: usize, class: usize| self.classes[class].saturating_mul(count as u64);
        let sum = |parts: &mut dyn Iterator<Item = u64>| parts.fold(0, u64::saturating_add);
        let moe = self.sizes.moe().map(|(layer, _)| bytes(self.slots[layer], self.class_of[layer]));
        let ring = self.ring.iter().enumerate().map(|(class, frames)| bytes(*frames, class));
        Parts { slots_bytes: sum(&mut { moe }), ring_bytes: sum(&mut { ring }), ..self.base }
    }

    fn total(&self) -> u64 {
        self.parts().total()
    }

    /// Hands out frames in an order that does not depend on the budget, up to
    /// the first that does not fit.
    fn grow(&mut self, budget_bytes: u64, ring: Option<usize>) {
        let mut left = budget_bytes - self.total();
        let mut take = |bytes: u64| match left.checked_sub(bytes) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        };
        for class in 0..self.classes.len() {
            let of_class = self.sizes.moe().filter(|(layer, _)| self.class_of[*layer] == class);
            let per_token = of_class.map(|(_, layer)| layer.top_k).max().unwrap_or(0);
            let wanted = ring.unwrap_or((2 * per_token).max(SMALLEST_RING));
            while self.ring[class] < wanted {
                if !take(self.classes[class]) {
                    return;
                }
                self.ring[class] += 1;
            }
        }
        while let Some(layer) = self.emptiest() {
            if !take(self.classes[self.class_of[layer]]) {
                return;
            }
            self.slots[layer] += 1;
        }
    }

    /// The layer with the smallest share of its experts in slots; of equal
    /// ones the first. `None` when every expert has a slot.
    fn emptiest(&self) -> Option<usize> {
        let open = self.sizes.moe().filter(|(layer, sizes)| self.slots[*layer] < sizes.experts);
        let share = |layer: usize, experts: usize| (self.slots[layer] as u128, experts as u128);
        let least = open.min_by(|(a, x), (b, y)| {
            // a / x against b / y, without division.
            let ((a, x), (b, y)) = (share(*a, x.experts), share(*b, y.experts));
            (a * y).cmp(&(b * x))
        });
        least.map(|(layer, _)| layer)
    }

    fn class_plans(&self) -> Vec<ClassPlan> {
        let slots = |class: usize| {
            let of_class = self.slots.iter().zip(&self.class_of);
            of_class.filter(|(_, of)| **of == class).map(|(slots, _)| slots).sum()
        };
        let classes = self.classes.iter().zip(&self.ring).enumerate();
        classes
            .map(|(class, (frame_bytes, ring))| ClassPlan {
                frame_bytes: *frame_bytes,
                slots: slots(class),
                ring: *ring,
            })
            .collect()
    }
}

/// Reads in flight that keep a drive busy at 1-2 MiB each.
const SMALLEST_RING: usize = 4;

#[cfg(test)]
mod tests;
