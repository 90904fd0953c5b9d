//! Routing rules: logits in, a list of (expert, weight) of any length out.

use super::description::{MoeDescription, RouterKind};
use pregate_kernels::Choice;
use pregate_kernels::routing::{self, RoutingRule, Scores};

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

    /// The rule as numbers that a device can follow, and the bias of its
    /// choice, `[experts]`; `None`: only the host knows it.
    fn on_device(&self) -> Option<(RoutingRule, Option<&[f32]>)> {
        None
    }

    /// Turns `logits`, `[experts]`, into finite scores whose order is the order
    /// in which the rule prefers experts: what a forecast goes by when it
    /// applies a router to another state than its own.
    fn rank(&self, logits: &mut [f32]) {
        routing::finite(logits);
    }
}

/// The rule that a description asks for. `selection_bias` is `[experts]`:
/// the bias of the choice, where the rule has one.
pub fn router_for(moe: &MoeDescription, selection_bias: Option<Vec<f32>>) -> Box<dyn Router> {
    let rule = rule_for(moe);
    let has_bias = matches!(moe.router, RouterKind::BiasedSigmoid { .. });
    Box::new(Published { rule, selection_bias: selection_bias.filter(|_| has_bias) })
}

fn rule_for(moe: &MoeDescription) -> RoutingRule {
    let top_k = moe.top_k;
    let scored = |scores, (groups, groups_used), renormalise, scale| RoutingRule::Scored {
        top_k,
        scores,
        groups,
        groups_used,
        renormalise,
        scale,
    };
    match moe.router {
        RouterKind::Softmax { renormalise, scale } => {
            scored(Scores::Softmax, (1, 1), renormalise, scale)
        }
        RouterKind::SoftmaxOfTopK => RoutingRule::SoftmaxOfTopK { top_k },
        RouterKind::GroupedSoftmax { groups, groups_used, renormalise, scale } => {
            scored(Scores::Softmax, (groups, groups_used), renormalise, scale)
        }
        RouterKind::BiasedSigmoid { groups, groups_used, renormalise, scale } => {
            scored(Scores::Sigmoid, (groups, groups_used), renormalise, scale)
        }
        RouterKind::SparseMixer { jitter } => RoutingRule::SparseMixer { top_k, jitter },
    }
}

/// A published rule, whose arithmetic every backend shares.
struct Published {
    rule: RoutingRule,
    selection_bias: Option<Vec<f32>>,
}

impl Router for Published {
    fn route(&self, logits: &[f32], _: &mut RouterState, choices: &mut Vec<Choice>) {
        self.rule.route(logits, self.selection_bias.as_deref(), choices);
    }

    fn on_device(&self) -> Option<(RoutingRule, Option<&[f32]>)> {
        Some((self.rule, self.selection_bias.as_deref()))
    }

    fn rank(&self, logits: &mut [f32]) {
        self.rule.rank(logits, self.selection_bias.as_deref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pregate_kernels::routing::{softmax, top};

    fn route(router: &dyn Router, logits: &[f32]) -> Vec<(u32, f32)> {
        let mut choices = Vec::new();
        router.route(logits, &mut RouterState::default(), &mut choices);
        choices.iter().map(|choice| (choice.expert, choice.weight)).collect()
    }

    fn published(rule: RoutingRule, selection_bias: Option<Vec<f32>>) -> Published {
        Published { rule, selection_bias }
    }

    fn grouped(scores: Scores, groups: usize, bias: Option<Vec<f32>>) -> Published {
        let (top_k, groups_used, renormalise, scale) = (2, 1, false, 1.0);
        published(
            RoutingRule::Scored { top_k, scores, groups, groups_used, renormalise, scale },
            bias,
        )
    }

    #[test]
    fn the_best_ranked_are_the_chosen() {
        let bias = |shift: f32| (0..8).map(|e| shift * ((e * 5 % 8) as f32 - 3.5)).collect();
        let rules: [Box<dyn Router>; 5] = [
            Box::new(grouped(Scores::Softmax, 2, None)),
            Box::new(grouped(Scores::Sigmoid, 2, Some(bias(0.3)))),
            Box::new(grouped(Scores::Sigmoid, 1, Some(bias(0.1)))),
            Box::new(published(RoutingRule::SoftmaxOfTopK { top_k: 2 }, None)),
            Box::new(published(RoutingRule::SparseMixer { top_k: 2, jitter: 0.01 }, None)),
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
        published(RoutingRule::SoftmaxOfTopK { top_k: 1 }, None).rank(&mut broken);
        assert_eq!(top(&broken, 1), [1]);
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
}
