//! What came after moments like this one.
//!
//! Text repeats itself: names, phrases, templates, loops. Where it does, so
//! does routing, token after token. So the last tokens are kept with the
//! experts that each layer chose, and each of them has a score: how far the
//! layers chose there what they choose now, and one token back, and two,
//! counting half as much each. The best of them are asked when they used an
//! expert next. It is the attention of an induction head, over routing
//! (Olsson et al., arXiv 2209.11895, section 2), without weights to train.
//!
//! The score looks at the first two ranks: one byte per token and layer each,
//! compared sixteen at a time by compilers for any 64-bit processor.

use crate::vocabulary::{LayerShape, Shape};

/// Tokens that are kept. 8,192 close 0.01 to 0.04 more of the way from LRU to
/// Belady, in four times the time.
pub const TOKENS: usize = 2048;

/// Moments that are asked.
pub const MATCHES: usize = 8;

/// Layers that take part in the score, at most: so a score fits a byte.
const SCORED: usize = 32;

/// The best moments are looked for after every so many scored layers.
const SEARCH: usize = 4;

/// How far after a moment its next use of an expert is looked for, in tokens.
const WINDOW: usize = 64;

/// Moments are looked for in blocks of so many, whose best is known.
const BLOCK: usize = 64;

/// An expert that is used again after `d` tokens is worth `DISCOUNTS^(d - 1)`.
pub const DISCOUNTS: [f32; 3] = [0.7, 0.92, 0.98];

/// A moment that was like this one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Match {
    /// Tokens ago, 1 or more.
    distance: usize,
    /// Its share of the say of all of them.
    weight: f32,
}

/// One layer's past, by slot: a token's place in the ring.
struct Layer {
    top_k: usize,
    /// Its place among the scored layers.
    scored: Option<usize>,
    /// `[ranks][tokens]`: the low byte of the expert of ranks 0 and 1.
    columns: Vec<Vec<u8>>,
    /// `[tokens][top_k]`: what was chosen, `u16::MAX` where there are fewer.
    chosen: Vec<u16>,
    /// `[experts][tokens / 64]`: a bit for each token that used it.
    uses: Vec<u64>,
    /// Of the current pass: tokens that were written.
    written: usize,
}

/// The last tokens, and which of them are like the current one.
#[derive(Default)]
pub struct Recall {
    layers: Vec<Option<Layer>>,
    /// Where the current token is. Slots descend, so that a token `d` ago is
    /// at `slot + d`, and distances ascend with slots.
    slot: usize,
    /// Tokens before the current one, at most `TOKENS - 1`.
    known: usize,
    /// `[tokens]` by distance: the score of the tokens before the current one.
    before: Vec<u8>,
    /// The same, of the layers of the current one that have run.
    now: Vec<u8>,
    /// Scratch: both.
    total: Vec<u8>,
    scored_layers: usize,
    /// What a moment that is the same could have scored so far.
    most: f32,
    matches: Vec<Match>,
    /// The best score, as a share of `most`.
    quality: f32,
}

impl Recall {
    pub fn prepare(&mut self, shape: &Shape) {
        let stride = shape.moe().count().div_ceil(SCORED).max(1);
        let mut moe = 0;
        let layers = shape.layers.iter().map(|layer| {
            let layer = layer.as_ref()?;
            let scored = moe % stride == 0;
            moe += 1;
            Some(Layer::new(layer, scored.then_some((moe - 1) / stride)))
        });
        *self = Self { layers: layers.collect(), ..Self::default() };
        self.scored_layers = moe.div_ceil(stride);
        self.before = vec![0; TOKENS];
        self.now = vec![0; TOKENS];
        self.total = vec![0; TOKENS];
    }

    /// A token (or a chunk) begins.
    pub fn next_token(&mut self) {
        let written = self.layers.iter().flatten().map(|layer| layer.written).max().unwrap_or(0);
        self.layers.iter_mut().flatten().for_each(|layer| layer.written = 0);
        // A chunk ends with several tokens; scores go on behind its last one.
        for _ in 0..written.min(TOKENS) {
            self.slot = (self.slot + TOKENS - 1) % TOKENS;
            self.known = (self.known + 1).min(TOKENS - 1);
        }
        let perfect = (2 * self.scored_layers) as f32;
        self.most = perfect;
        match written {
            0 | 1 => {
                for (before, now) in self.before.iter_mut().zip(&self.now) {
                    *before = before.saturating_add(*now) >> 1;
                }
            }
            _ => self.before.fill(0),
        }
        self.now.fill(0);
    }

    /// What follows is like nothing that was before, so far.
    pub fn new_sequence(&mut self) {
        self.before.fill(0);
        self.now.fill(0);
        self.matches.clear();
        self.quality = 0.0;
    }

    /// The current token chose `experts` in `layer`, rank order.
    pub fn used(&mut self, layer: usize, experts: &[u32]) {
        let Some(Some(state)) = self.layers.get_mut(layer) else { return };
        if state.written > 0 {
            return;
        }
        state.write(self.slot, experts);
        let Some(scored) = state.scored else { return };
        let (slot, known) = (self.slot, self.known);
        // Distances 1..=known are the slots behind this one, around the end.
        let straight = known.min(TOKENS - 1 - slot);
        let (near, far) = self.now[1..=known].split_at_mut(straight);
        for column in &state.columns {
            for &expert in experts.iter().take(state.columns.len()) {
                let expert = expert as u8;
                count_equal(near, &column[slot + 1..], expert);
                count_equal(far, column, expert);
            }
        }
        self.most += state.columns.len() as f32;
        if scored % SEARCH == 0 {
            self.search();
        }
    }

    /// One of the last tokens of a chunk chose `experts` in `layer`.
    pub fn used_last(&mut self, layer: usize, experts: &[u32]) {
        let Some(Some(state)) = self.layers.get_mut(layer) else { return };
        let ago = state.written % TOKENS;
        state.write((self.slot + TOKENS - ago) % TOKENS, experts);
    }

    /// Finds the moments with the best scores, the nearest of equals first.
    fn search(&mut self) {
        let parts = self.before.iter().zip(&self.now);
        for (total, (before, now)) in self.total.iter_mut().zip(parts) {
            *total = before.saturating_add(*now);
        }
        self.total[self.known + 1..].fill(0);
        self.total[0] = 0;
        let largest = |block: &[u8]| block.iter().fold(0, |most: u8, &score| most.max(score));
        let mut blocks = [0; TOKENS / BLOCK];
        for (most, block) in blocks.iter_mut().zip(self.total.chunks_exact(BLOCK)) {
            *most = largest(block);
        }
        self.matches.clear();
        let mut best = 0;
        let mut sum = 0.0;
        for _ in 0..MATCHES {
            let score = largest(&blocks);
            if score == 0 {
                break;
            }
            best = best.max(score);
            let block = blocks.iter().position(|&most| most == score).expect("one is the most");
            let scores = &mut self.total[block * BLOCK..][..BLOCK];
            let place = scores.iter().position(|&one| one == score).expect("it is in its block");
            scores[place] = 0;
            blocks[block] = largest(scores);
            let weight = say(f32::from(best - score) / self.most);
            sum += weight;
            self.matches.push(Match { distance: block * BLOCK + place, weight });
        }
        self.matches.iter_mut().for_each(|found| found.weight /= sum);
        self.quality = f32::from(best) / self.most;
    }

    /// How like the best moment is, 0 to 1.
    pub fn quality(&self) -> f32 {
        self.quality
    }

    /// What `expert` of `layer`, which has run, was worth after the moments
    /// like this, for each of [`DISCOUNTS`].
    pub fn worth(&self, layer: usize, expert: u32) -> [f32; 3] {
        let Some(Some(state)) = self.layers.get(layer) else { return [0.0; 3] };
        let words = TOKENS / 64;
        let uses = &state.uses[expert as usize * words..][..words];
        let mut sum = [0.0; 3];
        for found in &self.matches {
            let Some(ahead) = next_use(uses, self.slot + found.distance, found.distance) else {
                continue;
            };
            for (sum, powers) in sum.iter_mut().zip(&POWERS) {
                *sum += found.weight * powers[ahead - 1];
            }
        }
        sum
    }
}

impl Layer {
    fn new(shape: &LayerShape, scored: Option<usize>) -> Self {
        let columns = if scored.is_some() { shape.top_k.min(2) } else { 0 };
        Self {
            top_k: shape.top_k,
            scored,
            columns: vec![vec![0; TOKENS]; columns],
            chosen: vec![u16::MAX; TOKENS * shape.top_k],
            uses: vec![0; shape.experts * TOKENS / 64],
            written: 0,
        }
    }

    fn write(&mut self, slot: usize, experts: &[u32]) {
        self.written += 1;
        let (word, bit) = (slot / 64, 1u64 << (slot % 64));
        let chosen = &mut self.chosen[slot * self.top_k..][..self.top_k];
        for (rank, old) in chosen.iter_mut().enumerate() {
            if *old != u16::MAX {
                self.uses[usize::from(*old) * (TOKENS / 64) + word] &= !bit;
            }
            let new = experts.get(rank).and_then(|&expert| u16::try_from(expert).ok());
            *old = new.unwrap_or(u16::MAX);
        }
        for &new in chosen.iter().filter(|&&new| new != u16::MAX) {
            self.uses[usize::from(new) * (TOKENS / 64) + word] |= bit;
        }
        for (rank, column) in self.columns.iter_mut().enumerate() {
            column[slot] = experts.get(rank).map_or(u8::MAX, |&expert| expert as u8);
        }
    }
}

/// Adds one to each score whose token chose `expert`.
fn count_equal(scores: &mut [u8], column: &[u8], expert: u8) {
    for (score, &chosen) in scores.iter_mut().zip(column) {
        *score = score.wrapping_add(u8::from(chosen == expert));
    }
}

/// What a moment counts whose score is so much worse than the best, as a
/// share of a perfect one: close to `e^(-10 gap)`, and 0 from 0.4 on.
fn say(gap: f32) -> f32 {
    let square = (1.0 - 2.5 * gap).max(0.0) * (1.0 - 2.5 * gap).max(0.0);
    square * square
}

/// Tokens from `slot` (counted around the ring) to the next of `uses`, `most`
/// at most; `None` beyond [`WINDOW`].
fn next_use(uses: &[u64], slot: usize, most: usize) -> Option<usize> {
    let slot = slot % TOKENS;
    let (word, bits) = (slot / 64, slot % 64);
    let below = uses[(word + TOKENS / 64 - 1) % (TOKENS / 64)];
    // The next token in the highest bit.
    let window = match bits {
        0 => below,
        _ => uses[word] << (64 - bits) | below >> bits,
    };
    let ahead = window.leading_zeros() as usize + 1;
    (ahead <= WINDOW.min(most)).then_some(ahead)
}

/// `[discounts][tokens]`: its powers from 0 on.
const POWERS: [[f32; WINDOW]; 3] = {
    let mut powers = [[1.0; WINDOW]; 3];
    let mut index = 0;
    while index < 3 {
        let mut token = 1;
        while token < WINDOW {
            powers[index][token] = powers[index][token - 1] * DISCOUNTS[index];
            token += 1;
        }
        index += 1;
    }
    powers
};

#[cfg(test)]
mod tests {
    use super::*;

    /// One layer, top-2 of 300.
    fn recall() -> Recall {
        let mut recall = Recall::default();
        recall.prepare(&Shape::uniform(1, 300, 2, 1));
        recall
    }

    fn token(recall: &mut Recall, experts: &[u32]) {
        recall.next_token();
        recall.used(0, experts);
    }

    /// What the definition says, by looking at every token.
    fn plainly(past: &[[u32; 2]], distance: usize, expert: u32) -> Option<usize> {
        let at = past.len() - 1 - distance;
        (1..=WINDOW.min(distance)).find(|ahead| past[at + ahead].contains(&expert))
    }

    #[test]
    fn next_uses_are_those_of_the_tokens_themselves_all_around_the_ring() {
        let mut recall = recall();
        let mut past = Vec::new();
        let mut state = 1u64;
        for _ in 0..2 * TOKENS + 300 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let first = (state >> 33) as u32 % 300;
            let experts = [first, (first + 1 + (state >> 50) as u32 % 299) % 300];
            token(&mut recall, &experts);
            past.push(experts);
        }
        let layer = recall.layers[0].as_ref().unwrap();
        for distance in (1..TOKENS).step_by(7) {
            for expert in (0..300).step_by(11) {
                let uses = &layer.uses[expert * TOKENS / 64..][..TOKENS / 64];
                let found = next_use(uses, recall.slot + distance, distance);
                assert_eq!(found, plainly(&past, distance, expert as u32), "{distance} {expert}");
            }
        }
    }

    #[test]
    fn a_text_that_comes_again_says_what_it_used() {
        let mut recall = recall();
        let text: Vec<[u32; 2]> = (0..120).map(|i| [i * 2 % 300, (i * 2 + 1) % 300]).collect();
        text.iter().for_each(|experts| token(&mut recall, experts));
        text[..40].iter().for_each(|experts| token(&mut recall, experts));
        assert_eq!(recall.matches[0].distance, 120);
        let worth = |expert| recall.worth(0, expert);
        // Token 40 is next, then 41; token 39 is now, and 30 was before.
        let near = |found: f32, want: f32| assert!((found - want).abs() < 1e-3, "{found} {want}");
        near(worth(80)[0], 1.0);
        near(worth(82)[0], 0.7);
        near(worth(83)[1], 0.92);
        assert_eq!(worth(60), [0.0; 3]);
        // Scores are whole numbers, so halving loses something.
        assert!(recall.quality() > 0.7);
        recall.new_sequence();
        assert_eq!(recall.worth(0, 80), [0.0; 3]);
    }

    #[test]
    fn the_last_tokens_of_a_chunk_are_remembered_in_their_order() {
        let mut recall = recall();
        recall.next_token();
        for i in 0..16 {
            recall.used_last(0, &[i * 2, i * 2 + 1]);
        }
        token(&mut recall, &[200, 201]);
        token(&mut recall, &[6, 7]);
        // As after token 3: token 4 comes next, and 200 twelve tokens later.
        assert_eq!(recall.matches[0].distance, 14);
        assert!((recall.worth(0, 8)[0] - 1.0).abs() < 1e-6);
        assert!((recall.worth(0, 200)[1] - 0.92f32.powi(12)).abs() < 1e-4);
    }

    #[test]
    fn experts_beyond_top_k_and_none_at_all_are_no_harm() {
        let mut recall = recall();
        token(&mut recall, &[1, 2, 3, 4]);
        token(&mut recall, &[]);
        token(&mut recall, &[299]);
        token(&mut recall, &[1, 2]);
        assert!((recall.worth(0, 299)[0] - 0.7).abs() < 1e-6);
        assert_eq!(recall.worth(7, 1), [0.0; 3]);
    }
}
