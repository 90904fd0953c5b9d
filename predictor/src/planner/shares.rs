//! How many of the last tokens chose each expert, and what that says about a
//! chunk of a prompt.

use crate::vocabulary::{LayerShape, Shape};

/// Beyond twice so many tokens the older ones count half.
const WINDOW: f32 = 1024.0;

/// So many tokens without preferences are thought to have come before the
/// first.
const PRIOR: f32 = 32.0;

/// A token chooses much like its neighbours, so that `t` of them ask for no
/// more different experts than `t^INDEPENDENT` that have nothing in common
/// would. Fitted with the two numbers above on gpt-oss-20b and
/// DeepSeek-V2-Lite routing in chunks of 4 to 512 tokens.
const INDEPENDENT: f32 = 0.8;

/// What is alike within a sixteenth counts as equal.
const GRADES: f32 = 16.0;

/// Use of experts per layer, of tokens and chunks alike.
pub struct Shares {
    layers: Vec<Layer>,
}

struct Layer {
    /// `[experts]`: tokens that chose each, of `tokens`.
    uses: Vec<f32>,
    tokens: f32,
}

impl Shares {
    pub fn new(shape: &Shape) -> Self {
        let experts = |layer: &Option<LayerShape>| layer.map_or(0, |layer| layer.experts);
        let layer = |layer| Layer { uses: vec![0.0; experts(layer)], tokens: 0.0 };
        Self { layers: shape.layers.iter().map(layer).collect() }
    }

    /// The next token chose `experts`.
    pub fn routed(&mut self, layer: usize, experts: &[u32]) {
        let layer = &mut self.layers[layer];
        for &expert in experts {
            layer.uses[expert as usize] += 1.0;
        }
        layer.tokens += 1.0;
        if layer.tokens >= 2.0 * WINDOW {
            layer.tokens *= 0.5;
            layer.uses.iter_mut().for_each(|uses| *uses *= 0.5);
        }
    }

    /// The experts of MoE layer `index` that a chunk of `tokens` needs with at
    /// least the probability `threshold`: likeliest first, and of those that
    /// are about equal in the order of their numbers, which is that of files.
    pub fn needed(
        &self,
        (index, shape): (usize, &LayerShape),
        tokens: usize,
        threshold: f32,
    ) -> Vec<(f32, u32)> {
        let layer = &self.layers[index];
        let before = PRIOR * shape.top_k as f32 / shape.experts.max(1) as f32;
        let chances = (tokens as f32).powf(INDEPENDENT);
        let probability = |uses: &f32| {
            let share = (uses + before) / (layer.tokens + PRIOR);
            1.0 - (1.0 - share.min(1.0)).powf(chances)
        };
        let all = layer.uses.iter().map(probability).zip(0..);
        let mut needed: Vec<(f32, u32)> = all.filter(|&(p, _)| p >= threshold).collect();
        let grade = |p: f32| (p * GRADES) as u32;
        needed.sort_by(|a, b| grade(b.0).cmp(&grade(a.0)).then(a.1.cmp(&b.1)));
        needed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_past_all_are_alike_and_more_tokens_need_more() {
        let shape = Shape::uniform(1, 64, 4, 1);
        let (shares, layer) = (Shares::new(&shape), shape.moe().next().unwrap());
        let one = shares.needed(layer, 1, 0.0);
        assert!(one.iter().all(|&(p, _)| (p - 0.0625).abs() < 1e-6), "{one:?}");
        assert!(one.iter().map(|&(_, expert)| expert).eq(0..64));
        // Twelve that have nothing in common would be enough.
        assert!(shares.needed(layer, 12, 0.5).is_empty());
        assert_eq!(shares.needed(layer, 64, 0.5).len(), 64);
    }

    #[test]
    fn what_was_chosen_comes_first_and_is_forgotten_in_time() {
        let shape = Shape::uniform(1, 64, 2, 1);
        let (mut shares, layer) = (Shares::new(&shape), shape.moe().next().unwrap());
        (0..5000).for_each(|_| shares.routed(0, &[40, 7]));
        let likely = shares.needed(layer, 4, 0.5);
        assert!(likely.iter().map(|&(_, expert)| expert).eq([7, 40]), "{likely:?}");
        (0..5000).for_each(|_| shares.routed(0, &[9, 3]));
        let likely = shares.needed(layer, 4, 0.5);
        assert!(likely.iter().map(|&(_, expert)| expert).eq([3, 9]), "{likely:?}");
        (0..5000).for_each(|token| shares.routed(0, &[40, 7 + token % 2]));
        let likely = shares.needed(layer, 4, 0.5);
        assert!(likely.iter().map(|&(_, expert)| expert).eq([40, 7, 8]), "{likely:?}");
    }
}
