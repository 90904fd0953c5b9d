//! Routers, logits that are hard on rules, and what the CPU says to them.

use crate::lab::Lab;
use pregate_kernels::cuda::DeviceMatrix;
use pregate_kernels::cuda::router::{RouterLayer, RouterNorm, RouterNormKind};
use pregate_kernels::routing::{Scores, top};
use pregate_kernels::testing::{Inputs, Random, Weights, inputs, weights};
use pregate_kernels::{Format, RoutingRule, contract, ops};

/// Every kind of rule that `experts` allow, and whether a bias goes with it.
pub fn rules(experts: usize) -> Vec<(RoutingRule, bool)> {
    let scored = |top_k, scores, (groups, groups_used), renormalise, scale| RoutingRule::Scored {
        top_k: std::cmp::min(top_k, experts),
        scores,
        groups,
        groups_used,
        renormalise,
        scale,
    };
    let many = experts.min(16);
    let mut rules = vec![
        (scored(8, Scores::Softmax, (1, 1), true, 1.0), false),
        (scored(2, Scores::Softmax, (1, 1), false, 2.5), false),
        (scored(many, Scores::Sigmoid, (1, 1), true, 1.8), true),
        (RoutingRule::SoftmaxOfTopK { top_k: experts.min(4) }, false),
        (RoutingRule::SoftmaxOfTopK { top_k: many }, false),
        (RoutingRule::SparseMixer { top_k: 2, jitter: 0.01 }, false),
    ];
    for (groups, used) in [(4, 2), (8, 4), (2, 1), (experts / 2, 3)] {
        if experts.is_multiple_of(groups) && experts > groups && used < groups {
            rules.push((scored(6, Scores::Softmax, (groups, used), false, 16.0), false));
            rules.push((scored(8, Scores::Sigmoid, (groups, used), true, 2.5), true));
            rules.push((scored(3, Scores::Sigmoid, (groups, used), true, 1.0), false));
        }
    }
    rules
}

#[derive(Clone, Copy, Debug)]
pub enum Logits {
    Normal,
    /// Three values only.
    Ties,
    Equal,
    /// Zeros of both signs: all are equal.
    Zeros,
    /// Neighbours in binary32: many scores are equal and logits are not.
    Close,
    Rising,
    Falling,
    /// Every quarter is the same, so groups are worth the same.
    EqualGroups,
    SomeNan,
    AllNan,
    SomeInfinite,
    AllInfinite,
    AllMinusInfinite,
    Huge,
    /// Scores underflow.
    FarBelow,
}

impl Logits {
    pub const ALL: [Logits; 15] = [
        Logits::Normal,
        Logits::Ties,
        Logits::Equal,
        Logits::Zeros,
        Logits::Close,
        Logits::Rising,
        Logits::Falling,
        Logits::EqualGroups,
        Logits::SomeNan,
        Logits::AllNan,
        Logits::SomeInfinite,
        Logits::AllInfinite,
        Logits::AllMinusInfinite,
        Logits::Huge,
        Logits::FarBelow,
    ];
}

pub fn logits(kind: Logits, experts: usize, random: &mut Random) -> Vec<f32> {
    let infinite = [f32::INFINITY, f32::NEG_INFINITY];
    let mut values: Vec<f32> = (0..experts)
        .map(|i| match kind {
            Logits::Ties => random.pick(&[0.5, -1.25, 2.0]),
            Logits::Equal => 1.5,
            Logits::Zeros => random.pick(&[0.0, -0.0]),
            Logits::Close => f32::from_bits(1.0f32.to_bits() + random.below(40) as u32),
            Logits::Rising => i as f32 * 0.01 - 1.0,
            Logits::Falling => 3.0 - i as f32 * 0.01,
            Logits::SomeNan if random.below(3) == 0 => f32::NAN,
            Logits::AllNan => f32::NAN,
            Logits::SomeInfinite if random.below(4) == 0 => random.pick(&infinite),
            Logits::AllInfinite => f32::INFINITY,
            Logits::AllMinusInfinite => f32::NEG_INFINITY,
            Logits::Huge => random.normal() * 1e38,
            Logits::FarBelow => -120.0 + random.normal(),
            _ => 2.0 * random.normal(),
        })
        .collect();
    if matches!(kind, Logits::EqualGroups) {
        let quarter = (experts / 4).max(1);
        (quarter..experts).for_each(|i| values[i] = values[i % quarter]);
    }
    values
}

/// A bias of the choice as large as the scores it is added to.
pub fn selection_bias(experts: usize, random: &mut Random) -> Vec<f32> {
    (0..experts).map(|_| random.pick(&[0.0, 0.25, -0.5, 0.1]) + 0.01 * random.normal()).collect()
}

/// The ids and weights that the rule gives.
pub fn routed(rule: RoutingRule, logits: &[f32], bias: Option<&[f32]>) -> (Vec<i32>, Vec<f32>) {
    let mut choices = Vec::new();
    rule.route(logits, bias, &mut choices);
    choices.iter().map(|choice| (choice.expert as i32, choice.weight)).unzip()
}

/// The `count` experts that the rule ranks first, with their scores.
pub fn ranked(
    rule: RoutingRule,
    logits: &[f32],
    bias: Option<&[f32]>,
    count: usize,
) -> (Vec<i32>, Vec<f32>) {
    let mut scores = logits.to_vec();
    rule.rank(&mut scores, bias);
    let best = top(&scores, count.min(scores.len()));
    let mut ids: Vec<i32> = best.iter().map(|&expert| expert as i32).collect();
    let mut values: Vec<f32> = best.iter().map(|&expert| scores[expert]).collect();
    ids.resize(count, -1);
    values.resize(count, f32::NEG_INFINITY);
    (ids, values)
}

/// A router on the host.
pub struct Router {
    pub format: Format,
    pub hidden: usize,
    pub rows: Vec<u8>,
    pub norm: RouterNormKind,
    pub epsilon: f32,
    pub norm_weight: Vec<f32>,
    pub norm_bias: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
    pub selection_bias: Option<Vec<f32>>,
    pub rule: RoutingRule,
}

impl Router {
    pub fn random(
        format: Format,
        kind: Weights,
        (experts, hidden): (usize, usize),
        (rule, biased): (RoutingRule, bool),
        random: &mut Random,
    ) -> Self {
        Self {
            format,
            hidden,
            rows: weights(format, kind, experts, hidden, random),
            norm: RouterNormKind::Rms,
            epsilon: 1e-6,
            norm_weight: inputs(Inputs::Normal, hidden, random),
            norm_bias: None,
            bias: None,
            selection_bias: biased.then(|| selection_bias(experts, random)),
            rule,
        }
    }

    /// A router that answers with `logits` to every state.
    pub fn constant(
        logits: Vec<f32>,
        hidden: usize,
        rule: (RoutingRule, bool),
        random: &mut Random,
    ) -> Self {
        let shape = (logits.len(), hidden);
        let zeros = Self::random(Format::Bf16, Weights::Zeros, shape, rule, random);
        Self { bias: Some(logits), ..zeros }
    }

    pub fn experts(&self) -> usize {
        self.rows.len() / self.format.row_bytes(self.hidden).unwrap()
    }

    pub fn normed(&self, state: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; state.len()];
        match self.norm {
            RouterNormKind::Rms => ops::rms_norm(state, &self.norm_weight, self.epsilon, &mut out),
            RouterNormKind::Layer => {
                let bias = self.norm_bias.as_deref();
                ops::layer_norm(state, &self.norm_weight, bias, self.epsilon, &mut out);
            }
        }
        out
    }

    pub fn logits_of_normed(&self, normed: &[f32]) -> Vec<f32> {
        let row_bytes = self.format.row_bytes(self.hidden).unwrap();
        let rows = self.rows.chunks_exact(row_bytes).enumerate();
        rows.map(|(expert, row)| {
            let product = contract::dot(self.format, row, normed);
            self.bias.as_ref().map_or(product, |bias| product + bias[expert])
        })
        .collect()
    }

    pub fn logits(&self, state: &[f32]) -> Vec<f32> {
        self.logits_of_normed(&self.normed(state))
    }

    pub fn upload(&self, lab: &Lab) -> RouterLayer {
        let floats = |values: &Option<Vec<f32>>| values.as_ref().map(|v| lab.floats(v));
        // Not at the start of its span, as matrices lie in a large one.
        let offset = 16;
        let mut bytes = vec![0xee; offset];
        bytes.extend_from_slice(&self.rows);
        let span = lab.bytes(&bytes);
        RouterLayer {
            norm: RouterNorm {
                kind: self.norm,
                epsilon: self.epsilon,
                weight: lab.floats(&self.norm_weight),
                bias: floats(&self.norm_bias),
            },
            weight: DeviceMatrix::new(self.format, self.experts(), self.hidden, span, offset)
                .unwrap(),
            bias: floats(&self.bias),
            selection_bias: floats(&self.selection_bias),
            rule: self.rule,
        }
    }
}
