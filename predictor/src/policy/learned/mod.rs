//! Evicts by what an expert is worth: a small network says, from how it was
//! used and from what came after moments like this one, how soon it is used
//! again. The network is the same for every expert, layer and model. Beside
//! it each layer can watch what other rules would have hit, and follow them
//! where they hit more.

mod features;
pub mod fitted;
mod network;
mod recall;
mod shadow;
mod usage;

pub use features::{FEATURES, Past};
pub use fitted::{Fitted, FittedError};
pub use network::{HIDDEN, HORIZONS, Network, NetworkError, PARAMETERS};

use super::{Event, Policy};
use crate::cache::{Candidates, Scope};
use crate::forecast::fast;
use crate::vocabulary::{ExpertId, Outlook, Shape};
use shadow::Shadows;

/// By what residents leave, the smallest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ranking {
    /// The network's answer.
    Value,
    /// The same with tables of the model.
    Fitted,
    /// Decayed use.
    Frequency,
    /// The last use.
    Recency,
}

impl Ranking {
    const ALL: [Self; 4] = [Self::Fitted, Self::Value, Self::Frequency, Self::Recency];

    /// As in [`Policy::rules`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Value => "value",
            Self::Fitted => "value with tables of this model",
            Self::Frequency => "frequency",
            Self::Recency => "recency",
        }
    }
}

/// How much a forecast's probability of the next use takes the place of the
/// network's own.
const FORECAST_SHARE: f32 = 0.5;

/// What a probability of one adds under [`Ranking::Frequency`].
const FORECAST_WEIGHT: f32 = 2.0;

/// The network is asked about so many residents of a layer, at least: those
/// with the smallest decayed use, of whom the least worth is one. It is asked
/// about two events' experts where that is more.
const ASKED: usize = 24;

/// What the network says of one expert.
#[derive(Clone, Copy, Debug, Default)]
struct Worth {
    plain: Answer,
    /// With the model's tables; the same without any.
    fitted: Answer,
    /// The layer's event that this was said in.
    event: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Answer {
    /// Discounted time to the next use.
    value: f32,
    /// The probability that the next token uses it.
    next: f32,
}

/// What answers are made of.
struct Known {
    network: Network,
    fitted: Option<Fitted>,
    past: Past,
}

#[derive(Default)]
struct Layer {
    /// Counts events; answers of others are old.
    event: u32,
    /// The residents' answers are of the last event.
    is_fresh: bool,
    /// `[experts]`
    worth: Vec<Worth>,
    is_resident: Vec<bool>,
    /// The resident that is worth least, if that is known.
    least: Option<u32>,
    /// `None` where one rule is set, and in dense layers.
    shadows: Option<Shadows>,
    /// Of [`HORIZONS`].
    horizon: usize,
    /// Residents that are asked about.
    asked: usize,
}

/// Evicts the expert of the least worth.
pub struct Learned {
    name: &'static str,
    scope: Scope,
    watches: bool,
    known: Known,
    layers: Vec<Layer>,
    ones: Vec<u32>,
    /// Scratch: experts with their worth.
    list: Vec<(f32, u32)>,
}

impl Learned {
    /// By the network alone.
    pub fn new(network: Network) -> Self {
        Self::named("learned", Scope::Layer, network, false)
    }

    /// By the network, or by frequency or recency in layers where shadow
    /// caches say that they hit more. Sharing slots hits more, however many
    /// there are (docs/measurements.md).
    pub fn adaptive(scope: Scope, network: Network) -> Self {
        let name = match scope {
            Scope::Layer => "adaptive-layer",
            Scope::Pool => "adaptive",
        };
        Self::named(name, scope, network, true)
    }

    /// As [`Learned::adaptive`], with what was trained on traces of the model
    /// as one rule more, and the first that counts. Tables of another shape
    /// than the cache's are left out.
    pub fn fitted(scope: Scope, network: Network, fitted: Fitted) -> Self {
        let name = match scope {
            Scope::Layer => "fitted-layer",
            Scope::Pool => "fitted",
        };
        Self::named(name, scope, network, true).with(fitted)
    }

    /// The same rule with what was trained on traces of the model; it keeps
    /// its name. Where layers watch, the tables are one rule more, and the
    /// first that counts.
    pub fn with(mut self, fitted: Fitted) -> Self {
        self.known.fitted = Some(fitted);
        self
    }

    fn named(name: &'static str, scope: Scope, network: Network, watches: bool) -> Self {
        Self {
            name,
            scope,
            watches,
            known: Known { network, fitted: None, past: Past::default() },
            layers: Vec::new(),
            ones: Vec::new(),
            list: Vec::new(),
        }
    }

    /// What each layer goes by now.
    pub fn ranking(&self, layer: usize) -> Ranking {
        let shadows = self.layers.get(layer).and_then(|layer| layer.shadows.as_ref());
        shadows.map_or(self.price(), Shadows::ranking)
    }

    /// Asks the network about the residents of `layer`, before what it goes by
    /// is of another token.
    fn refresh(&mut self, layer: usize) {
        let state = &mut self.layers[layer];
        let residents = state.is_resident.iter().enumerate().filter(|(_, is_here)| **is_here);
        self.list.clear();
        self.list.extend(residents.map(|(expert, _)| (0.0, expert as u32)));
        state.shorten(&self.known, layer, &mut self.list);
        for &(_, expert) in &self.list {
            state.ask(&self.known, layer, expert);
        }
        state.is_fresh = true;
    }

    /// What `id` is worth, with what forecasts say.
    fn worth(&mut self, id: ExpertId, ranking: Ranking, outlook: &dyn Outlook) -> f32 {
        let worth = self.layers[id.layer()].rank(&self.known, ranking, id);
        match (ranking, outlook.probability(id)) {
            (_, None) | (Ranking::Recency, _) => worth.value,
            (Ranking::Frequency, Some(probability)) => worth.value + FORECAST_WEIGHT * probability,
            (_, Some(probability)) => worth.with(probability),
        }
    }

    /// The rule whose answers can be compared between layers.
    fn price(&self) -> Ranking {
        if self.known.fitted.is_some() { Ranking::Fitted } else { Ranking::Value }
    }

    /// The first to leave of `layer`. Another layer's is looked for once
    /// between its events, at what forecasts said then.
    fn least(
        &mut self,
        layer: usize,
        candidates: &Candidates<'_>,
        incoming: ExpertId,
        outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        let ranking = self.ranking(layer);
        if layer != incoming.layer() {
            if self.layers[layer].least.is_none() {
                if !self.layers[layer].is_fresh {
                    self.refresh(layer);
                }
                // Of the others more is used, and nothing is known.
                let state = &self.layers[layer];
                self.list.clear();
                let asked = candidates.residents(layer).filter(|&expert| state.is_asked(expert));
                self.list.extend(asked.map(|expert| (0.0, expert)));
                self.layers[layer].least = self.smallest(layer, ranking, outlook);
            }
            let id = ExpertId::new(layer, self.layers[layer].least?);
            if candidates.allows(id) {
                return Some(id);
            }
        }
        self.list.clear();
        self.list.extend(candidates.experts(layer).map(|expert| (0.0, expert)));
        if matches!(ranking, Ranking::Value | Ranking::Fitted) {
            self.layers[layer].shorten(&self.known, layer, &mut self.list);
        }
        self.smallest(layer, ranking, outlook).map(|expert| ExpertId::new(layer, expert))
    }

    /// Of the list.
    fn smallest(&mut self, layer: usize, ranking: Ranking, outlook: &dyn Outlook) -> Option<u32> {
        let mut least: Option<(f32, u32)> = None;
        for index in 0..self.list.len() {
            let expert = self.list[index].1;
            let worth = self.worth(ExpertId::new(layer, expert), ranking, outlook);
            // The list has no order: of equals the first expert.
            if least.is_none_or(|(smallest, first)| {
                worth < smallest || worth == smallest && expert < first
            }) {
                least = Some((worth, expert));
            }
        }
        least.map(|(_, expert)| expert)
    }

    /// The layer's event is another one now.
    fn changed(&mut self, layer: usize) {
        let state = &mut self.layers[layer];
        state.event = state.event.wrapping_add(1);
        state.is_fresh = false;
        state.least = None;
    }
}

impl Answer {
    /// The value, had the next use been as likely as the network and
    /// `forecast` say together: in between, in logarithms of the odds, so that
    /// who is sure is heard. What is not used next keeps its value.
    fn with(self, forecast: f32) -> f32 {
        let odds = |p: f32| {
            let p = p.clamp(1e-4, 1.0 - 1e-4);
            fast::ln(p / (1.0 - p))
        };
        let rest = ((self.value - self.next) / (1.0 - self.next).max(1e-3)).clamp(0.0, 1.0);
        let own = odds(self.next);
        let next = fast::sigmoid(own + FORECAST_SHARE * (odds(forecast) - own));
        next + (1.0 - next) * rest
    }
}

impl Layer {
    fn ask(&mut self, known: &Known, layer: usize, expert: u32) -> Worth {
        let worth = &mut self.worth[expert as usize];
        if worth.event != self.event {
            let hidden = known.network.hidden(&known.past.features(layer, expert));
            let answer = |also| Answer {
                value: known.network.answer(&hidden, self.horizon, also),
                next: known.network.answer(&hidden, 0, also),
            };
            let plain = answer(0.0);
            let fitted = known.fitted.as_ref().map(|fitted| answer(fitted.says(layer, expert)));
            *worth = Worth { plain, fitted: fitted.unwrap_or(plain), event: self.event };
        }
        *worth
    }

    /// Is the answer of the last event?
    fn is_asked(&self, expert: u32) -> bool {
        self.worth[expert as usize].event == self.event
    }

    /// Leaves those on the list that the network is asked about; as a set, for
    /// their order may change.
    fn shorten(&self, known: &Known, layer: usize, list: &mut Vec<(f32, u32)>) {
        let Some(usage) = known.past.usage(layer).filter(|_| list.len() > self.asked) else {
            return;
        };
        list.iter_mut().for_each(|(use_, expert)| *use_ = usage.frequency(*expert));
        let order = |a: &(f32, u32), b: &(f32, u32)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        list.select_nth_unstable_by(self.asked - 1, order);
        list.truncate(self.asked);
    }

    /// What `ranking` says of `id`, an expert of this layer.
    fn rank(&mut self, known: &Known, ranking: Ranking, id: ExpertId) -> Answer {
        let usage = known.past.usage(id.layer());
        let alone = |value: Option<f32>| Answer { value: value.unwrap_or(0.0), next: 0.0 };
        match ranking {
            Ranking::Value => self.ask(known, id.layer(), id.expert).plain,
            Ranking::Fitted => self.ask(known, id.layer(), id.expert).fitted,
            Ranking::Frequency => alone(usage.map(|usage| usage.frequency(id.expert))),
            Ranking::Recency => alone(usage.map(|usage| usage.recency(id.expert))),
        }
    }
}

impl Policy for Learned {
    fn name(&self) -> &'static str {
        self.name
    }

    fn scope(&self) -> Scope {
        self.scope
    }

    fn prepare(&mut self, shape: &Shape, slots: &[usize]) {
        self.known.past.prepare(shape);
        self.known.fitted.take_if(|fitted| !fitted.fits(shape));
        let experts: usize = shape.moe().map(|(_, layer)| layer.experts).sum();
        let all: usize = slots.iter().sum();
        // Where slots are many, experts stay long: a farther horizon.
        let horizon = if all.saturating_mul(8) >= experts * 3 { 2 } else { 1 };
        let first = usize::from(self.known.fitted.is_none());
        let rankings = &Ranking::ALL[first..];
        let layers = shape.layers.iter().zip(slots).map(|(layer, &slots)| {
            let experts = layer.as_ref().map_or(0, |layer| layer.experts);
            let watched = self.watches && (1..experts).contains(&slots);
            Layer {
                event: 1,
                worth: vec![Worth::default(); experts],
                is_resident: vec![false; experts],
                shadows: watched.then(|| Shadows::new(experts, slots, rankings)),
                horizon,
                asked: ASKED.max(2 * layer.as_ref().map_or(0, |layer| layer.top_k)),
                ..Layer::default()
            }
        });
        self.layers = layers.collect();
    }

    fn rules(&self) -> Vec<(&'static str, usize)> {
        let layers = |ranking| {
            let moe = (0..self.layers.len()).filter(|&layer| !self.layers[layer].worth.is_empty());
            moe.filter(|&layer| self.ranking(layer) == ranking).count()
        };
        let all = Ranking::ALL.into_iter().map(|ranking| (ranking.name(), layers(ranking)));
        all.filter(|&(_, layers)| layers > 0).collect()
    }

    fn used(&mut self, event: &Event<'_>) {
        self.known.past.used(event);
        if let Some(fitted) = self.known.fitted.as_mut().filter(|_| event.tokens == 1) {
            fitted.used(event.layer, event.experts);
        }
        self.changed(event.layer);
        let layer = &mut self.layers[event.layer];
        let Some(mut shadows) = layer.shadows.take_if(|_| event.tokens == 1) else { return };
        shadows.used(event.experts, &mut |ranking, list| {
            if matches!(ranking, Ranking::Value | Ranking::Fitted) {
                layer.shorten(&self.known, event.layer, list);
            }
            for (worth, expert) in list {
                let id = ExpertId::new(event.layer, *expert);
                *worth = layer.rank(&self.known, ranking, id).value;
            }
        });
        layer.shadows = Some(shadows);
    }

    fn used_last(&mut self, layer: usize, experts: &[u32]) {
        self.ones.resize(experts.len().max(self.ones.len()), 1);
        self.known.past.used_last(layer, experts, &self.ones[..experts.len()]);
        if let Some(fitted) = &mut self.known.fitted {
            // Tokens of a chunk come layer by layer, so nothing is before.
            fitted.next_token();
            fitted.used(layer, experts);
        }
        self.changed(layer);
    }

    fn inserted(&mut self, id: ExpertId) {
        let layer = &mut self.layers[id.layer()];
        layer.is_resident[id.expert()] = true;
        layer.least = None;
        if layer.is_fresh {
            layer.ask(&self.known, id.layer(), id.expert);
        }
    }

    fn removed(&mut self, id: ExpertId) {
        let layer = &mut self.layers[id.layer()];
        layer.is_resident[id.expert()] = false;
        if layer.least == Some(id.expert) {
            layer.least = None;
        }
    }

    fn victim(
        &mut self,
        candidates: &Candidates<'_>,
        incoming: ExpertId,
        outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        // Of several layers each offers one by its own rule; what the network
        // says of them can be compared.
        let mut least: Option<(f32, ExpertId)> = None;
        for layer in candidates.layers() {
            let Some(id) = self.least(layer, candidates, incoming, outlook) else { continue };
            let price = self.worth(id, self.price(), outlook);
            if least.is_none_or(|(smallest, _)| price < smallest) {
                least = Some((price, id));
            }
        }
        let (price, victim) = least?;
        let stays =
            !candidates.is_of_event(victim) || price < self.worth(incoming, self.price(), outlook);
        stays.then_some(victim)
    }

    fn next_token(&mut self) {
        if self.scope == Scope::Pool {
            for layer in 0..self.layers.len() {
                if !self.layers[layer].is_fresh {
                    self.refresh(layer);
                }
            }
        }
        self.known.past.next_token();
        if let Some(fitted) = &mut self.known.fitted {
            fitted.next_token();
        }
    }

    fn new_sequence(&mut self) {
        self.known.past.new_sequence();
    }
}
