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
/// Of an exponent: `e^-FARTHEST` is below [`LEAST`].
const FARTHEST: f32 = 4.0;
const NO_EXPERT: u16 = u16::MAX;
/// Bits of a set of tokens.
const WORDS: usize = ROOM / 64;

/// The last tokens' ways, and how like each is to the token that runs.
///
/// Memory, 512 tokens: 2 bytes for each expert of a token, and a bit for each
/// expert of the model.
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
    now: Weighed,
    next: Weighed,
}

struct Ways {
    top_k: usize,
    /// `[ROOM][top_k]`.
    experts: Vec<u16>,
    /// `[experts]`: who used it, a bit for each token.
    users: Vec<[u64; WORDS]>,
}

impl Ways {
    fn new(layer: &crate::LayerShape) -> Self {
        let top_k = layer.top_k;
        let users = vec![[0; WORDS]; layer.experts];
        Self { top_k, experts: vec![NO_EXPERT; ROOM * top_k], users }
    }

    /// The token at `slot` used `experts`, not what is written there.
    fn write(&mut self, slot: usize, experts: impl Iterator<Item = u32>) {
        let way = &mut self.experts[slot * self.top_k..(slot + 1) * self.top_k];
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        for &expert in &*way {
            if let Some(users) = self.users.get_mut(usize::from(expert)) {
                users[word] &= !bit;
            }
        }
        way.fill(NO_EXPERT);
        for (to, expert) in way.iter_mut().zip(experts) {
            *to = u16::try_from(expert).unwrap_or(NO_EXPERT);
            if let Some(users) = self.users.get_mut(usize::from(*to)) {
                users[word] |= bit;
            }
        }
    }
}

/// The nearest tokens with what each counts.
#[derive(Default)]
struct Weighed {
    fresh: bool,
    /// `[ROOM]`, scratch.
    powers: Vec<f32>,
    /// Slot, and the share that it counts for each sharpness.
    nearest: Vec<(u32, [f32; Neighbours::ANSWERS])>,
    /// The likeness of the nearest.
    best: f32,
}

impl Neighbours {
    /// Answers to each question.
    pub const ANSWERS: usize = 2;

    pub fn new(shape: &Shape) -> Self {
        Self {
            layers: shape.layers.iter().map(|layer| layer.as_ref().map(Ways::new)).collect(),
            ids: vec![None; ROOM],
            held: 0,
            at: 0,
            likeness: vec![0.0; ROOM],
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
            ways.write(self.at, std::iter::empty());
        }
        self.changed();
    }

    /// The running token's layer used `experts` with shares of the gate's
    /// weight, which add up to one.
    pub fn routed(&mut self, layer: usize, experts: &[(u32, f32)]) {
        let Some(Some(ways)) = self.layers.get_mut(layer) else { return };
        self.likeness.iter_mut().for_each(|likeness| *likeness *= FADE);
        for &(expert, share) in experts {
            let Some(users) = ways.users.get(expert as usize) else { continue };
            for (&word, likeness) in users.iter().zip(self.likeness.chunks_exact_mut(64)) {
                let mut left = word;
                while left != 0 {
                    likeness[left.trailing_zeros() as usize % 64] += share;
                    left &= left - 1;
                }
            }
        }
        ways.write(self.at, experts.iter().map(|&(expert, _)| expert));
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
        let (soft, sharp) = answers.split_at_mut(answers.len() / Self::ANSWERS);
        for &(slot, shares) in &weighed.nearest {
            let way = slot as usize * ways.top_k;
            for &expert in &ways.experts[way..way + ways.top_k] {
                let expert = usize::from(expert);
                if let (Some(soft), Some(sharp)) = (soft.get_mut(expert), sharp.get_mut(expert)) {
                    *soft += shares[0];
                    *sharp += shares[1];
                }
            }
        }
        weighed.best
    }

    /// Bytes that it holds.
    pub fn memory_bytes(&self) -> usize {
        let ways = |ways: &Ways| 2 * ways.experts.len() + 8 * WORDS * ways.users.len();
        self.layers.iter().flatten().map(ways).sum::<usize>() + (20 + 8 * Self::ANSWERS) * ROOM
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
        let ages = (0..=behind).chain((others + behind + 1).min(ROOM - 1)..ROOM);
        for age in ages {
            self.powers[(at + ROOM - age) % ROOM] = f32::MIN;
        }
        self.best = fast::largest(&self.powers, 0.0);
        // Who is farther counts less than `LEAST` at every sharpness.
        let cut = self.best - FARTHEST / SHARPNESS[0];
        let (mut slots, mut near, mut count) = ([0u32; ROOM], [0f32; ROOM], 0);
        for (slot, &likeness) in self.powers.iter().enumerate() {
            (slots[count], near[count]) = (slot as u32, likeness);
            count += usize::from(likeness > cut);
        }
        self.nearest.clear();
        let mut sums = [0.0; Neighbours::ANSWERS];
        for (&slot, &likeness) in slots[..count].iter().zip(&near[..count]) {
            let weights = SHARPNESS.map(|sharpness| {
                let weight = fast::exp(sharpness * (likeness - self.best));
                if weight > LEAST { weight } else { 0.0 }
            });
            sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight);
            self.nearest.push((((slot as usize + behind) % ROOM) as u32, weights));
        }
        let scales = sums.map(|sum| 1.0 / f32::max(sum, 1.0));
        for (_, weights) in &mut self.nearest {
            weights.iter_mut().zip(scales).for_each(|(weight, scale)| *weight *= scale);
        }
    }
}
