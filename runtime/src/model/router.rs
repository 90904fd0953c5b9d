//! Routing rules: logits in, a list of (expert, weight) of any length out.

use super::description::{MoeDescription, RouterKind};
use pregate_kernels::{Choice, contract};

/// What a router carries for one token from layer to layer: gating residuals
/// (MoE++, 2410.07348) keep the last logits, recurrent routers (2408.06793) a
/// hidden state. Empty before a token's first router; the published rules
/// below leave it so.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterState {
    pub values: Vec<f32>,
}

impl RouterState {
    pub fn clear(&mut self) {
        self.values.clear();
    }
}

/// One layer's routing rule.
///
/// The answer's length is the rule's business: top-p rules vary it, null
/// experts shorten it. `choices` arrives empty and leaves in router order:
/// falling weight as far as the rule defines one, the order in which the
/// combine adds.
pub trait Router: Send + Sync {
    /// `logits` is `[experts]`, bias included.
    fn route(&self, logits: &[f32], state: &mut RouterState, choices: &mut Vec<Choice>);

    /// Turns `logits`, `[experts]`, into finite scores whose order is the order
    /// in which the rule prefers experts: what a forecast goes by when it
    /// applies a router to another state than its own.
    fn rank(&self, logits: &mut [f32]) {
        finite(logits);
    }
}

/// Replaces what is not finite by less than everything that is.
fn finite(scores: &mut [f32]) {
    let finite = scores.iter().copied().filter(|score| score.is_finite());
    let lowest = finite.fold(0.0, f32::min).max(-1e30) - 1.0;
    scores.iter_mut().filter(|score| !score.is_finite()).for_each(|score| *score = lowest);
}

/// The rule that a description asks for. `selection_bias` is `[experts]`:
/// the bias of the choice, where the rule has one.
pub fn router_for(moe: &MoeDescription, selection_bias: Option<Vec<f32>>) -> Box<dyn Router> {
    let top_k = moe.top_k;
    match moe.router {
        RouterKind::Softmax { renormalise, scale } => Box::new(Grouped {
            top_k,
            scores: Scores::Softmax,
            groups: 1,
            groups_used: 1,
            selection_bias: None,
            renormalise,
            scale,
        }),
        RouterKind::SoftmaxOfTopK => Box::new(SoftmaxOfTopK { top_k }),
        RouterKind::GroupedSoftmax { groups, groups_used, renormalise, scale } => {
            Box::new(Grouped {
                top_k,
                scores: Scores::Softmax,
                groups,
                groups_used,
                selection_bias: None,
                renormalise,
                scale,
            })
        }
        RouterKind::BiasedSigmoid { groups, groups_used, renormalise, scale } => {
            Box::new(Grouped {
                top_k,
                scores: Scores::Sigmoid,
                groups,
                groups_used,
                selection_bias,
                renormalise,
                scale,
            })
        }
        RouterKind::SparseMixer { jitter } => Box::new(SparseMixer { top_k, jitter }),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Scores {
    Softmax,
    Sigmoid,
}

/// Scores, group limit, top-k, weights from the unbiased scores.
struct Grouped {
    top_k: usize,
    scores: Scores,
    groups: usize,
    groups_used: usize,
    selection_bias: Option<Vec<f32>>,
    renormalise: bool,
    scale: f32,
}

impl Router for Grouped {
    fn route(&self, logits: &[f32], _: &mut RouterState, choices: &mut Vec<Choice>) {
        let mut scores = logits.to_vec();
        match self.scores {
            Scores::Softmax => softmax(&mut scores),
            Scores::Sigmoid => scores.iter_mut().for_each(|s| *s = contract::sigmoid(*s)),
        }
        let mut ranking = scores.clone();
        if let Some(bias) = &self.selection_bias {
            ranking.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
        }
        if self.groups_used < self.groups {
            self.close_groups(&mut ranking);
        }
        for expert in top(&ranking, self.top_k) {
            choices.push(Choice { expert: expert as u32, weight: scores[expert] });
        }
        if self.renormalise {
            let total: f32 = choices.iter().map(|choice| choice.weight).sum();
            // The published implementations add 1e-20 for sigmoid scores.
            choices.iter_mut().for_each(|choice| choice.weight /= total + 1e-20);
        }
        choices.iter_mut().for_each(|choice| choice.weight *= self.scale);
    }

    fn rank(&self, logits: &mut [f32]) {
        // A softmax keeps the order of its logits; a bias behind a sigmoid
        // does not.
        if let Some(bias) = &self.selection_bias {
            let biased =
                |(score, bias): (&mut f32, &f32)| *score = contract::sigmoid(*score) + bias;
            logits.iter_mut().zip(bias).for_each(biased);
        }
        if self.groups_used < self.groups {
            self.close_groups(logits);
        }
        finite(logits);
    }
}

impl Grouped {
    /// Closes all but the best groups: DeepSeek-V2 ranks a group by its best
    /// expert, V3 by the sum of its best two.
    fn close_groups(&self, ranking: &mut [f32]) {
        let size = ranking.len() / self.groups;
        let best = if self.scores == Scores::Sigmoid { 2 } else { 1 };
        let worth: Vec<f32> = ranking
            .chunks(size)
            .map(|group| top(group, best).iter().map(|&expert| group[expert]).sum())
            .collect();
        let open = top(&worth, self.groups_used);
        for (index, group) in ranking.chunks_mut(size).enumerate() {
            if !open.contains(&index) {
                group.fill(f32::NEG_INFINITY);
            }
        }
    }
}

struct SoftmaxOfTopK {
    top_k: usize,
}

impl Router for SoftmaxOfTopK {
    fn route(&self, logits: &[f32], _: &mut RouterState, choices: &mut Vec<Choice>) {
        let chosen = top(logits, self.top_k);
        let mut weights: Vec<f32> = chosen.iter().map(|&expert| logits[expert]).collect();
        softmax(&mut weights);
        choices.extend(
            chosen
                .iter()
                .zip(weights)
                .map(|(&expert, weight)| Choice { expert: expert as u32, weight }),
        );
    }
}

/// Phi-3.5-MoE's inference rule (SparseMixer, 2310.00811).
struct SparseMixer {
    top_k: usize,
    jitter: f32,
}

impl Router for SparseMixer {
    fn route(&self, logits: &[f32], _: &mut RouterState, choices: &mut Vec<Choice>) {
        let mut open = logits.to_vec();
        for _ in 0..self.top_k {
            let expert = top(&open, 1)[0];
            let best = open[expert];
            // Everything farther than 2 * jitter from the best, relative to
            // the larger magnitude, takes no part in the normalisation.
            let total: f32 = open
                .iter()
                .zip(logits)
                .filter(|(_, logit)| (best - **logit) / logit.abs().max(best) <= 2.0 * self.jitter)
                .map(|(score, _)| contract::exp(score - best))
                .sum();
            choices.push(Choice { expert: expert as u32, weight: 1.0 / total });
            open[expert] = f32::NEG_INFINITY;
        }
    }
}

/// Indices of the `count` largest values, largest first; equal values in
/// index order. NaN counts as smallest.
fn top(values: &[f32], count: usize) -> Vec<usize> {
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

fn softmax(values: &mut [f32]) {
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

    fn route(router: &dyn Router, logits: &[f32]) -> Vec<(u32, f32)> {
        let mut choices = Vec::new();
        router.route(logits, &mut RouterState::default(), &mut choices);
        choices.iter().map(|choice| (choice.expert, choice.weight)).collect()
    }

    fn grouped(scores: Scores, bias: Option<Vec<f32>>) -> Grouped {
        Grouped {
            top_k: 2,
            scores,
            groups: 2,
            groups_used: 1,
            selection_bias: bias,
            renormalise: false,
            scale: 1.0,
        }
    }

    #[test]
    fn the_best_ranked_are_the_chosen() {
        let bias = |shift: f32| (0..8).map(|e| shift * ((e * 5 % 8) as f32 - 3.5)).collect();
        let rules: [Box<dyn Router>; 5] = [
            Box::new(grouped(Scores::Softmax, None)),
            Box::new(grouped(Scores::Sigmoid, Some(bias(0.3)))),
            Box::new(Grouped { groups: 1, ..grouped(Scores::Sigmoid, Some(bias(0.1))) }),
            Box::new(SoftmaxOfTopK { top_k: 2 }),
            Box::new(SparseMixer { top_k: 2, jitter: 0.01 }),
        ];
        for seed in 0..50u32 {
            let logits: Vec<f32> =
                (0..8).map(|e| ((seed * 7 + e * 13) % 29) as f32 * 0.3 - 4.0).collect();
            for rule in &rules {
                let mut ranking = logits.clone();
                rule.rank(&mut ranking);
                assert!(ranking.iter().all(|score| score.is_finite()));
                let best: Vec<u32> = top(&ranking, 2).iter().map(|&e| e as u32).collect();
                let chosen: Vec<u32> = route(&**rule, &logits).iter().map(|c| c.0).collect();
                assert_eq!(best, chosen, "{logits:?}");
            }
        }
        let mut broken = [f32::NAN, 2.0, f32::NEG_INFINITY, f32::INFINITY];
        SoftmaxOfTopK { top_k: 1 }.rank(&mut broken);
        assert_eq!(top(&broken, 1), [1]);
    }

    #[test]
    fn groups_are_ranked_by_one_expert_or_by_two() {
        // Group 0 has the single best expert, group 1 the better pair.
        let logits = [3.0, -9.0, 2.0, 2.0];
        let softmax: Vec<u32> =
            route(&grouped(Scores::Softmax, None), &logits).iter().map(|c| c.0).collect();
        let sigmoid: Vec<u32> =
            route(&grouped(Scores::Sigmoid, None), &logits).iter().map(|c| c.0).collect();
        assert_eq!(softmax, [0, 1]);
        assert_eq!(sigmoid, [2, 3]);
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let answer =
            route(&grouped(Scores::Sigmoid, Some(vec![9.0, 9.0, 0.0, 0.0])), &[0.0, 1.0, 5.0, 5.0]);
        assert_eq!(answer.iter().map(|c| c.0).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(answer[1].1, 0.5);
    }

    /// A rule that none of the published models has: top-p over logits with
    /// a gating residual, and a null expert whose choice computes nothing.
    struct TopPWithResidual {
        mass: f32,
        null_expert: u32,
    }

    impl Router for TopPWithResidual {
        fn route(&self, logits: &[f32], state: &mut RouterState, choices: &mut Vec<Choice>) {
            let carried = state.values.iter().copied().chain(std::iter::repeat(0.0));
            let mut scores: Vec<f32> = logits.iter().zip(carried).map(|(l, c)| l + c).collect();
            state.values = scores.clone();
            softmax(&mut scores);
            let mut sum = 0.0;
            for expert in top(&scores, scores.len()) {
                if sum >= self.mass {
                    break;
                }
                sum += scores[expert];
                if expert as u32 != self.null_expert {
                    choices.push(Choice { expert: expert as u32, weight: scores[expert] });
                }
            }
        }
    }

    #[test]
    fn a_rule_may_vary_the_length_drop_experts_and_carry_state() {
        let rule = TopPWithResidual { mass: 0.6, null_expert: 2 };
        let mut state = RouterState::default();
        let mut lengths = Vec::new();
        for logits in [[4.0, 0.0, 0.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 6.0]] {
            let mut choices = Vec::new();
            rule.route(&logits, &mut state, &mut choices);
            lengths.push(choices.len());
        }
        // One expert; two of three equal ones; the null expert alone.
        assert_eq!(lengths, [1, 2, 0]);
        assert_eq!(state.values, [0.0, 0.0, 6.0]);
    }

    #[test]
    fn ties_go_to_the_lower_id_and_nan_goes_last() {
        assert_eq!(top(&[1.0, 2.0, 2.0, f32::NAN], 3), [1, 2, 0]);
        assert_eq!(top(&[f32::NAN, 1.0], 2), [1, 0]);
    }

    #[test]
    fn softmax_of_top_k_sums_to_one() {
        let answer = route(&SoftmaxOfTopK { top_k: 2 }, &[0.0, 2.0, 1.0]);
        assert_eq!(answer[0].0, 1);
        assert!((answer[0].1 + answer[1].1 - 1.0).abs() < 1e-6);
    }
}
