//! Which earlier tokens went a similar way through the layers, and what did
//! they use? The trajectory map of FineMoE (2502.05370), over the last tokens
//! instead of a library.

use crate::Shape;
use crate::forecast::fast;

/// Tokens that are remembered.
const ROOM: usize = 512;
/// What a layer's likeness keeps when the next one joins it.
const FADE: f32 = 0.8;
/// What a token inherits of the likeness of the tokens before it.
const INHERITED: f32 = 0.4;
/// What the same token id is worth, in layers with the same experts.
const SAME_TOKEN: f32 = 2.0;
/// How sharply likeness tells neighbours apart, one answer for each.
const SHARPNESS: [f32; Neighbours::ANSWERS] = [1.5, 5.0];
/// A neighbour that counts less than this share of the nearest is left out.
const LEAST: f32 = 0.02;
const NO_EXPERT: u16 = u16::MAX;

/// The last tokens' ways, and how like each is to the token that runs.
///
/// Memory: 2 bytes for each expert of a token, 512 tokens.
pub struct Neighbours {
    /// Per layer of the model.
    layers: Vec<Option<Ways>>,
    /// `[ROOM]`; `None` was not fed or not said.
    ids: Vec<Option<u32>>,
    /// Tokens that were remembered, the running one counted.
    held: usize,
    /// Where the running token is written.
    at: usize,
    /// `[ROOM]`: to the running token.
    likeness: Vec<f32>,
    /// `[widest]`, zero between calls.
    marks: Vec<f32>,
    now: Weighed,
    next: Weighed,
}

struct Ways {
    top_k: usize,
    /// `[ROOM][top_k]`.
    experts: Vec<u16>,
}

/// The nearest tokens with what each counts, per sharpness.
#[derive(Default)]
struct Weighed {
    fresh: bool,
    /// `[ROOM]`, scratch.
    powers: Vec<f32>,
    nearest: [Vec<(u32, f32)>; Neighbours::ANSWERS],
    /// One over the sum of the weights.
    scale: [f32; Neighbours::ANSWERS],
    /// The likeness of the nearest.
    best: f32,
}

impl Neighbours {
    /// Answers to each question.
    pub const ANSWERS: usize = 2;

    pub fn new(shape: &Shape) -> Self {
        let ways = |layer: &Option<crate::LayerShape>| {
            let top_k = layer.as_ref()?.top_k;
            Some(Ways { top_k, experts: vec![NO_EXPERT; ROOM * top_k] })
        };
        let widest = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(0);
        Self {
            layers: shape.layers.iter().map(ways).collect(),
            ids: vec![None; ROOM],
            held: 0,
            at: 0,
            likeness: vec![0.0; ROOM],
            marks: vec![0.0; widest],
            now: Weighed::default(),
            next: Weighed::default(),
        }
    }

    /// A token begins; it goes on where the last one was like others.
    pub fn begin_token(&mut self, id: Option<u32>) {
        if self.held > 0 {
            self.at = (self.at + 1) % ROOM;
        }
        self.held = (self.held + 1).min(ROOM);
        self.likeness.rotate_right(1);
        for (slot, likeness) in self.likeness.iter_mut().enumerate() {
            let same = id.is_some() && self.ids[slot] == id;
            *likeness = INHERITED * *likeness + if same { SAME_TOKEN } else { 0.0 };
        }
        self.ids[self.at] = id;
        for ways in self.layers.iter_mut().flatten() {
            ways.experts[self.at * ways.top_k..(self.at + 1) * ways.top_k].fill(NO_EXPERT);
        }
        self.changed();
    }

    /// The running token's layer used `experts` with shares of the gate's
    /// weight, which add up to one.
    pub fn routed(&mut self, layer: usize, experts: &[(u32, f32)]) {
        let Some(Some(ways)) = self.layers.get_mut(layer) else { return };
        for &(expert, share) in experts {
            self.marks[expert as usize] = share;
        }
        let marks = &self.marks;
        for (likeness, way) in self.likeness.iter_mut().zip(ways.experts.chunks_exact(ways.top_k)) {
            let shared = way.iter().map(|&e| marks.get(usize::from(e)).copied().unwrap_or(0.0));
            *likeness = FADE * *likeness + shared.sum::<f32>();
        }
        let own = &mut ways.experts[self.at * ways.top_k..(self.at + 1) * ways.top_k];
        for (to, &(expert, _)) in own.iter_mut().zip(experts) {
            *to = u16::try_from(expert).unwrap_or(NO_EXPERT);
        }
        for &(expert, _) in experts {
            self.marks[expert as usize] = 0.0;
        }
        self.changed();
    }

    fn changed(&mut self) {
        self.now.fresh = false;
        self.next.fresh = false;
    }

    /// Adds to `answers[ANSWERS][experts]` the share of the nearest tokens that
    /// used each expert of `layer`; with `next`, of the tokens behind those
    /// that are like the running one. Answers the likeness of the nearest.
    pub fn ask(&mut self, layer: usize, next: bool, answers: &mut [f32]) -> f32 {
        let (held, at) = (self.held, self.at);
        let Some(Some(ways)) = self.layers.get(layer) else { return 0.0 };
        let weighed = if next { &mut self.next } else { &mut self.now };
        if !weighed.fresh {
            weighed.weigh(&self.likeness, held, at, usize::from(next));
        }
        let experts = answers.len() / Self::ANSWERS;
        for (index, answer) in answers.chunks_exact_mut(experts.max(1)).enumerate() {
            for &(slot, weight) in &weighed.nearest[index] {
                let way = slot as usize * ways.top_k;
                for &expert in &ways.experts[way..way + ways.top_k] {
                    if let Some(answer) = answer.get_mut(usize::from(expert)) {
                        *answer += weight * weighed.scale[index];
                    }
                }
            }
        }
        weighed.best
    }

    /// Bytes that it holds.
    pub fn memory_bytes(&self) -> usize {
        self.layers.iter().flatten().map(|ways| 2 * ways.experts.len()).sum::<usize>()
            + (12 + 16 * Self::ANSWERS) * ROOM
    }
}

impl Weighed {
    /// `behind`: the neighbour is the token so many behind the similar one.
    fn weigh(&mut self, likeness: &[f32], held: usize, at: usize, behind: usize) {
        self.fresh = true;
        self.powers.clear();
        self.powers.extend_from_slice(likeness);
        // The running token is nobody's neighbour, and the last one has none
        // behind it; slots that were never used lie behind `at`.
        let others = held.saturating_sub(1 + behind);
        for (slot, likeness) in self.powers.iter_mut().enumerate() {
            let age = if slot <= at { at - slot } else { at + ROOM - slot };
            if age <= behind || age > others + behind || age + 1 >= ROOM {
                *likeness = f32::MIN;
            }
        }
        self.best = self.powers.iter().copied().fold(0.0, f32::max);
        let mut weights = [0.0; ROOM];
        for (index, sharpness) in SHARPNESS.iter().enumerate() {
            // All of them: without a branch this is a few vector operations.
            for (weight, likeness) in weights.iter_mut().zip(&self.powers) {
                *weight = fast::exp(sharpness * (likeness - self.best).max(-20.0));
            }
            let nearest = &mut self.nearest[index];
            nearest.clear();
            let mut sum = 0.0;
            for (slot, &weight) in weights.iter().enumerate().filter(|(_, w)| **w > LEAST) {
                if self.powers[slot] > f32::MIN {
                    sum += weight;
                    nearest.push((((slot + behind) % ROOM) as u32, weight));
                }
            }
            self.scale[index] = 1.0 / f32::max(sum, 1.0);
        }
    }
}
