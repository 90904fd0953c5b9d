//! Routing rules: logits in, experts and weights out, as pure functions.
//!
//! This is the definition that every backend reproduces bit for bit: scores
//! by the contract's [`exp`](contract::exp), sums one value after the other
//! in index order, ties to the lower index, NaN behind everything.

use crate::backend::Choice;
use crate::contract;

/// How the logits of one layer's router become experts and weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RoutingRule {
    /// Scores for all experts; all but the best groups closed; the best
    /// `top_k` by score plus bias, weighted by their scores without it.
    Scored {
        top_k: usize,
        scores: Scores,
        /// Groups of equal size, which divides the experts; 1: no groups.
        groups: usize,
        /// How many of them stay open.
        groups_used: usize,
        /// Weights are divided by their sum.
        renormalise: bool,
        /// Multiplies the weights.
        scale: f32,
    },
    /// The best `top_k` logits, softmax over those.
    SoftmaxOfTopK { top_k: usize },
    /// `top_k` choices one after the other, each weighted by a softmax over
    /// the experts within `2 * jitter` of the best (2310.00811, inference).
    SparseMixer { top_k: usize, jitter: f32 },
}

/// Scores of all experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// A group is worth its best expert (2405.04434).
    Softmax,
    /// Each expert for itself; a group is worth the sum of its best two
    /// (2412.19437).
    Sigmoid,
}

/// What the published implementations add to the sum that weights are divided
/// by.
pub const RENORMALISE_EPSILON: f32 = 1e-20;

impl RoutingRule {
    /// Experts that a token gets.
    pub fn top_k(&self) -> usize {
        match *self {
            RoutingRule::Scored { top_k, .. }
            | RoutingRule::SoftmaxOfTopK { top_k }
            | RoutingRule::SparseMixer { top_k, .. } => top_k,
        }
    }

    /// Appends the choice for `logits`, `[experts]`, in router order.
    /// `selection_bias`, `[experts]`, takes part in the choice of
    /// [`RoutingRule::Scored`], not in the weights.
    pub fn route(&self, logits: &[f32], selection_bias: Option<&[f32]>, choices: &mut Vec<Choice>) {
        match *self {
            RoutingRule::Scored { top_k, scores, renormalise, scale, .. } => {
                let scores = scores.of(logits);
                let mut ranking = scores.clone();
                if let Some(bias) = selection_bias {
                    ranking.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
                }
                self.close_groups(&mut ranking);
                let start = choices.len();
                choices.extend(
                    top(&ranking, top_k)
                        .into_iter()
                        .map(|expert| Choice { expert: expert as u32, weight: scores[expert] }),
                );
                finish_weights(&mut choices[start..], renormalise, scale);
            }
            RoutingRule::SoftmaxOfTopK { top_k } => {
                let chosen = top(logits, top_k);
                let mut weights: Vec<f32> = chosen.iter().map(|&expert| logits[expert]).collect();
                softmax(&mut weights);
                let pairs = chosen.into_iter().zip(weights);
                choices
                    .extend(pairs.map(|(expert, weight)| Choice { expert: expert as u32, weight }));
            }
            RoutingRule::SparseMixer { top_k, jitter } => {
                sparse_mixer(logits, top_k, jitter, choices);
            }
        }
    }

    /// Turns `logits`, `[experts]`, into finite scores whose order is the
    /// order in which the rule prefers experts.
    pub fn rank(&self, logits: &mut [f32], selection_bias: Option<&[f32]>) {
        // A softmax keeps the order of its logits; a bias behind a sigmoid
        // does not.
        if let (RoutingRule::Scored { .. }, Some(bias)) = (self, selection_bias) {
            let pairs = logits.iter_mut().zip(bias);
            pairs.for_each(|(score, bias)| *score = contract::sigmoid(*score) + bias);
        }
        self.close_groups(logits);
        finite(logits);
    }

    /// Closes all but the best groups, if the rule has groups.
    fn close_groups(&self, ranking: &mut [f32]) {
        let RoutingRule::Scored { scores, groups, groups_used, .. } = *self else { return };
        if groups_used >= groups {
            return;
        }
        let size = ranking.len() / groups;
        let best = if scores == Scores::Sigmoid { 2 } else { 1 };
        let worth: Vec<f32> = ranking
            .chunks(size)
            .map(|group| sum(top(group, best).into_iter().map(|expert| group[expert])))
            .collect();
        let open = top(&worth, groups_used);
        for (index, group) in ranking.chunks_mut(size).enumerate() {
            if !open.contains(&index) {
                group.fill(f32::NEG_INFINITY);
            }
        }
    }
}

impl Scores {
    fn of(self, logits: &[f32]) -> Vec<f32> {
        let mut scores = logits.to_vec();
        match self {
            Scores::Softmax => softmax(&mut scores),
            Scores::Sigmoid => scores.iter_mut().for_each(|s| *s = contract::sigmoid(*s)),
        }
        scores
    }
}

fn finish_weights(choices: &mut [Choice], renormalise: bool, scale: f32) {
    if renormalise {
        let total = sum(choices.iter().map(|choice| choice.weight));
        choices.iter_mut().for_each(|choice| choice.weight /= total + RENORMALISE_EPSILON);
    }
    choices.iter_mut().for_each(|choice| choice.weight *= scale);
}

fn sparse_mixer(logits: &[f32], top_k: usize, jitter: f32, choices: &mut Vec<Choice>) {
    let mut open = logits.to_vec();
    for _ in 0..top_k {
        let expert = top(&open, 1)[0];
        let best = open[expert];
        // Everything farther than 2 * jitter from the best, relative to the
        // larger magnitude, takes no part in the normalisation.
        let near = open
            .iter()
            .zip(logits)
            .filter(|(_, logit)| (best - **logit) / logit.abs().max(best) <= 2.0 * jitter);
        let total = sum(near.map(|(score, _)| contract::exp(score - best)));
        choices.push(Choice { expert: expert as u32, weight: 1.0 / total });
        open[expert] = f32::NEG_INFINITY;
    }
}

/// One value after the other onto -0, as the standard library adds; nothing
/// at all gives -0.
fn sum(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(-0.0, |sum, value| sum + value)
}

/// Replaces what is not finite by less than everything that is.
pub fn finite(scores: &mut [f32]) {
    let finite = scores.iter().copied().filter(|score| score.is_finite());
    let lowest = finite.fold(0.0, f32::min).max(-1e30) - 1.0;
    scores.iter_mut().filter(|score| !score.is_finite()).for_each(|score| *score = lowest);
}

/// Indices of the `count` largest values, largest first; equal values in
/// index order. NaN counts as smallest.
pub fn top(values: &[f32], count: usize) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::with_capacity(count + 1);
    for (index, &value) in values.iter().enumerate() {
        let place = best
            .iter()
            .position(|&other| value > values[other] || (values[other].is_nan() && !value.is_nan()))
            .unwrap_or(best.len());
        if place < count {
            best.insert(place, index);
            best.truncate(count);
        }
    }
    best
}

/// In place: `exp(value - largest)`, divided by their sum, which is added in
/// index order onto +0.
pub fn softmax(values: &mut [f32]) {
    let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for value in values.iter_mut() {
        *value = contract::exp(*value - largest);
        total += *value;
    }
    values.iter_mut().for_each(|value| *value /= total);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(scores: Scores, groups: usize, groups_used: usize) -> RoutingRule {
        let (top_k, renormalise, scale) = (2, false, 1.0);
        RoutingRule::Scored { top_k, scores, groups, groups_used, renormalise, scale }
    }

    fn route(rule: RoutingRule, logits: &[f32], bias: Option<&[f32]>) -> Vec<(u32, f32)> {
        let mut choices = Vec::new();
        rule.route(logits, bias, &mut choices);
        choices.iter().map(|choice| (choice.expert, choice.weight)).collect()
    }

    fn experts(rule: RoutingRule, logits: &[f32], bias: Option<&[f32]>) -> Vec<u32> {
        route(rule, logits, bias).iter().map(|choice| choice.0).collect()
    }

    #[test]
    fn groups_are_ranked_by_one_expert_or_by_two() {
        // Group 0 has the single best expert, group 1 the better pair.
        let logits = [3.0, -9.0, 2.0, 2.0];
        assert_eq!(experts(scored(Scores::Softmax, 2, 1), &logits, None), [0, 1]);
        assert_eq!(experts(scored(Scores::Sigmoid, 2, 1), &logits, None), [2, 3]);
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let rule = scored(Scores::Sigmoid, 2, 1);
        let answer = route(rule, &[0.0, 1.0, 5.0, 5.0], Some(&[9.0, 9.0, 0.0, 0.0]));
        assert_eq!(answer.iter().map(|choice| choice.0).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(answer[1].1, 0.5);
    }

    #[test]
    fn ties_go_to_the_lower_id_and_nan_goes_last() {
        assert_eq!(top(&[1.0, 2.0, 2.0, f32::NAN], 3), [1, 2, 0]);
        assert_eq!(top(&[f32::NAN, 1.0], 2), [1, 0]);
        assert_eq!(top(&[0.0, -0.0, 0.0], 3), [0, 1, 2]);
        assert_eq!(top(&[f32::NAN, f32::NEG_INFINITY, f32::NAN], 3), [1, 0, 2]);
    }

    #[test]
    fn weights_are_divided_by_their_sum_and_then_scaled() {
        let (top_k, scores, groups, groups_used) = (2, Scores::Softmax, 1, 1);
        let rule = RoutingRule::Scored {
            top_k,
            scores,
            groups,
            groups_used,
            renormalise: true,
            scale: 2.5,
        };
        let answer = route(rule, &[1.0, 3.0, 3.0, 0.0], None);
        assert_eq!(answer, [(1, 1.25), (2, 1.25)]);
        // Scores that vanish leave weights of zero rather than NaN.
        let far = [-200.0; 4];
        let rule = RoutingRule::Scored {
            top_k,
            scores: Scores::Sigmoid,
            groups,
            groups_used,
            renormalise: true,
            scale: 1.0,
        };
        assert_eq!(route(rule, &far, None), [(0, 0.0), (1, 0.0)]);
    }

    #[test]
    fn softmax_of_top_k_sums_to_one() {
        let answer = route(RoutingRule::SoftmaxOfTopK { top_k: 2 }, &[0.0, 2.0, 1.0], None);
        assert_eq!(answer[0].0, 1);
        assert!((answer[0].1 + answer[1].1 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn sparse_mixer_normalises_over_the_near_ones() {
        // 2.0 is not within 2 % of 4.0; once 4.0 is chosen, 1.99 is near 2.0,
        // and 4.0 is closed.
        let rule = RoutingRule::SparseMixer { top_k: 2, jitter: 0.01 };
        let answer = route(rule, &[2.0, 4.0, 1.99, -1.0], None);
        assert_eq!(answer[0], (1, 1.0));
        assert_eq!(answer[1].0, 0);
        let want = 1.0 / (1.0 + (-0.01f64).exp());
        assert!((f64::from(answer[1].1) - want).abs() < 1e-5, "{answer:?}");
    }

    #[test]
    fn ranks_are_finite_and_keep_the_order() {
        let mut broken = [f32::NAN, 2.0, f32::NEG_INFINITY, f32::INFINITY, -3.0];
        RoutingRule::SoftmaxOfTopK { top_k: 1 }.rank(&mut broken, None);
        assert_eq!(broken, [-4.0, 2.0, -4.0, -4.0, -3.0]);
    }
}
