//! The networks at work: one per layer, asked for one target at a time.

use super::Trained;
use super::at_work::AtWork;
use super::input::{Context, Input, Situation, TOKEN_FIELD};
use super::network::Sizes;
use super::tables::Places;
use crate::forecast::{Forecast, Known};
use std::sync::Arc;

/// Steps of [`AtWork::adapt`]: rows of experts, and what every question shares.
pub const RATES: (f32, f32) = (0.02, 0.002);

/// A network per layer, which goes on learning in its last part.
pub struct LearnedNetwork {
    trained: Arc<Trained>,
    places: Places,
    sizes: Sizes,
    context: Context,
    /// Where the running token's odds are.
    row: Option<usize>,
    /// Per MoE layer.
    layers: Vec<Layer>,
    learns: bool,
}

struct Layer {
    network: AtWork,
    /// See [`AtWork::uses`].
    is_base_fresh: bool,
    /// See [`AtWork::add_token`].
    is_token_fresh: bool,
    /// The newest question about the running token, and its answer.
    asked: Question,
    /// A question about the next token.
    next: Question,
}

#[derive(Default)]
struct Question {
    waits: bool,
    input: Input,
    /// `[hidden + experts]`.
    sums: Vec<f32>,
}

impl LearnedNetwork {
    /// `learns`: weights go on following what is seen. `None`: the file has no
    /// networks.
    pub fn new(trained: Arc<Trained>, learns: bool) -> Option<Self> {
        let sizes = trained.dimensions.network();
        if trained.networks.is_empty() {
            return None;
        }
        let question = || Question { sums: vec![0.0; sizes.sums()], ..Question::default() };
        let layer = |parts| Layer {
            network: AtWork::new(sizes, parts),
            is_base_fresh: false,
            is_token_fresh: false,
            asked: question(),
            next: question(),
        };
        Some(Self {
            places: Places::new(&trained),
            sizes,
            context: Context::new(&trained.shape, trained.dimensions.reach),
            row: None,
            layers: trained.networks.iter().map(layer).collect(),
            trained,
            learns,
        })
    }
}

impl Forecast for LearnedNetwork {
    fn name(&self) -> &'static str {
        if self.learns { "learned-network" } else { "learned-network-fixed" }
    }

    fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool {
        let Some(Some(place)) = self.places.of.get(target).copied() else { return false };
        let situation = match known.token {
            None => Situation::NextToken,
            Some(_) => Situation::Ahead(self.places.ahead(place, known)),
        };
        let layer = &mut self.layers[place];
        let (question, is_ahead) = match situation {
            Situation::NextToken => (&mut layer.next, false),
            Situation::Ahead(_) => (&mut layer.asked, true),
        };
        let input = &mut question.input;
        self.context.look(target, situation, input);
        if let (Some(row), true) = (self.row, is_ahead) {
            let field = &mut input.dense[TOKEN_FIELD * self.sizes.experts..];
            self.trained.add_odds(row, place, 1.0, field);
        }
        if !std::mem::replace(&mut layer.is_base_fresh, true) {
            layer.network.uses(input);
        }
        let has_token = is_ahead && self.row.is_some();
        if has_token && !std::mem::replace(&mut layer.is_token_fresh, true) {
            layer.network.add_token(input);
        }
        layer.network.forward(input, has_token, &mut question.sums);
        question.waits = true;
        let answer = &question.sums[self.sizes.hidden..];
        scores.copy_from_slice(&answer[..scores.len()]);
        true
    }

    fn routed(&mut self, layer: usize, experts: &[u32], weights: &[f32]) {
        let Some(Some(place)) = self.places.of.get(layer).copied() else { return };
        let state = &mut self.layers[place];
        let Question { waits, input, sums } = &mut state.asked;
        if std::mem::take(waits) && self.learns {
            state.network.adapt(input, sums, experts, RATES);
        }
        (state.is_base_fresh, state.is_token_fresh) = (false, false);
        self.context.routed(layer, experts, weights);
    }

    fn begin_token(&mut self, token: u32) {
        self.row = self.trained.row(token);
        for layer in &mut self.layers {
            (layer.asked.waits, layer.is_token_fresh) = (false, false);
        }
        self.context.begin_token(Some(token));
    }

    fn new_sequence(&mut self) {
        self.row = None;
        for layer in &mut self.layers {
            layer.asked.waits = false;
            (layer.is_base_fresh, layer.is_token_fresh) = (false, false);
        }
        self.context.new_sequence();
    }

    fn memory_bytes(&self) -> usize {
        let layers = self.layers.iter().map(|layer| layer.network.memory_bytes());
        layers.sum::<usize>() + self.context.memory_bytes()
    }
}
