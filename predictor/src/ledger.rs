//! What forecasts were worth: how often they were right, what their bytes
//! saved and cost, and the switch that stops them where they lose.

mod price;

pub use price::{Pricing, Switch};

use crate::Shape;

/// How good a forecast's guesses were. It guesses as many experts as the
/// layer uses (top-k).
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Tally {
    /// Guesses that were judged, one per token and layer.
    pub guesses: u64,
    /// Experts that the layers asked for, in all.
    pub slots: u64,
    /// Of these, how many were guessed.
    pub named: u64,
    /// Guesses that named the whole set.
    pub whole: u64,
    /// The gate weights of the experts asked for, and of those guessed.
    pub gate_mass: f64,
    pub gate_mass_named: f64,
}

impl Tally {
    /// The share of the experts asked for that were guessed, 0..=1.
    pub fn slot_recall(&self) -> Option<f64> {
        (self.slots > 0).then(|| self.named as f64 / self.slots as f64)
    }

    /// The share of guesses that named every expert.
    pub fn whole_set_rate(&self) -> Option<f64> {
        (self.guesses > 0).then(|| self.whole as f64 / self.guesses as f64)
    }

    /// The share of the gate weight that was guessed.
    pub fn gate_mass_recall(&self) -> Option<f64> {
        (self.gate_mass > 0.0).then(|| self.gate_mass_named / self.gate_mass)
    }

    fn add(&mut self, other: &Tally) {
        self.guesses += other.guesses;
        self.slots += other.slots;
        self.named += other.named;
        self.whole += other.whole;
        self.gate_mass += other.gate_mass;
        self.gate_mass_named += other.gate_mass_named;
    }
}

/// Which forecast said something about which layer, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    pub layer: usize,
    /// Index into [`Ledger::columns`].
    pub column: usize,
    /// Layers ahead; 0: the guess about the next token, made when the layer
    /// had just run, or a router of the layer itself.
    pub ahead: usize,
}

/// The recall of one forecast.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Recall {
    pub forecast: &'static str,
    /// `None`: all layers together.
    pub layer: Option<usize>,
    pub ahead: usize,
    pub tally: Tally,
}

/// What a layer's prefetches moved, saved and cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Prefetches that were ordered.
    pub issued: u64,
    pub issued_bytes: u64,
    /// Those that the layer asked for.
    pub useful: u64,
    pub useful_bytes: u64,
    /// Those that the layer did not ask for; `issued - useful - wasted` are
    /// still open.
    pub wasted: u64,
    pub wasted_bytes: u64,
    /// Stall that useful ones saved, estimated at the link's speed.
    pub saved_ns: u64,
    /// Stall that useless ones caused, estimated at the link's speed, and the
    /// time of forecasting itself, measured.
    pub lost_ns: u64,
    /// Time that the layer waited for experts, measured.
    pub stall_ns: u64,
}

impl Traffic {
    /// The share of the bytes that were asked for, of those that are settled:
    /// precision at the issued budget.
    pub fn precision(&self) -> Option<f64> {
        let settled = self.useful_bytes.saturating_add(self.wasted_bytes);
        (settled > 0).then(|| self.useful_bytes as f64 / settled as f64)
    }

    fn add(&mut self, other: &Traffic) {
        self.issued = self.issued.saturating_add(other.issued);
        self.issued_bytes = self.issued_bytes.saturating_add(other.issued_bytes);
        self.useful = self.useful.saturating_add(other.useful);
        self.useful_bytes = self.useful_bytes.saturating_add(other.useful_bytes);
        self.wasted = self.wasted.saturating_add(other.wasted);
        self.wasted_bytes = self.wasted_bytes.saturating_add(other.wasted_bytes);
        self.saved_ns = self.saved_ns.saturating_add(other.saved_ns);
        self.lost_ns = self.lost_ns.saturating_add(other.lost_ns);
        self.stall_ns = self.stall_ns.saturating_add(other.stall_ns);
    }
}

/// What the link to the experts did.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Link {
    pub bytes: u64,
    /// At least one read was under way.
    pub busy_ns: u64,
    pub idle_ns: u64,
    /// What a byte takes, lately; 0 before anything was measured.
    pub ns_per_byte: f64,
}

/// One layer of the price list.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LayerPrice {
    pub layer: usize,
    pub traffic: Traffic,
    /// Prefetching for this layer is on.
    pub on: bool,
    /// How often it was switched off.
    pub switched_off: u64,
    /// Saved less lost time in the window.
    pub balance_ns: f64,
}

/// The ledger of one run.
pub struct Ledger {
    columns: Vec<&'static str>,
    horizon: usize,
    /// `[layers][columns][horizon + 1]`.
    tallies: Vec<Tally>,
    /// `[layers]`.
    traffic: Vec<Traffic>,
    switches: Vec<Switch>,
    link: Link,
    pricing: Pricing,
}

impl Ledger {
    /// For the forecasts `columns` (see [`crate::forecast::Forecaster::columns`])
    /// and guesses up to `horizon` layers ahead.
    pub fn new(shape: &Shape, columns: Vec<&'static str>, horizon: usize) -> Self {
        Self::with_pricing(shape, columns, horizon, Pricing::default())
    }

    /// The same with other settings of the switch.
    pub fn with_pricing(
        shape: &Shape,
        columns: Vec<&'static str>,
        horizon: usize,
        pricing: Pricing,
    ) -> Self {
        let layers = shape.layers.len();
        Self {
            tallies: vec![Tally::default(); layers * columns.len() * (horizon + 1)],
            traffic: vec![Traffic::default(); layers],
            switches: vec![Switch::new(&pricing); layers],
            link: Link::default(),
            columns,
            horizon,
            pricing,
        }
    }

    /// The names of the forecasts.
    pub fn columns(&self) -> &[&'static str] {
        &self.columns
    }

    fn index(&self, answer: Answer) -> Option<usize> {
        let fits = answer.column < self.columns.len() && answer.ahead <= self.horizon;
        let row = answer.layer.checked_mul(self.columns.len())?.checked_add(answer.column)?;
        fits.then(|| row * (self.horizon + 1) + answer.ahead)
    }

    /// A forecast guessed `guess` (top-k ids), the layer asked for `experts`
    /// with `weights`.
    pub fn judge(&mut self, answer: Answer, guess: &[u32], experts: &[u32], weights: &[f32]) {
        let Some(index) = self.index(answer) else { return };
        let Some(tally) = self.tallies.get_mut(index) else { return };
        let mut named = 0;
        for (expert, weight) in experts.iter().zip(weights) {
            let weight = if weight.is_finite() { f64::from(weight.abs()) } else { 0.0 };
            tally.gate_mass += weight;
            if guess.contains(expert) {
                named += 1;
                tally.gate_mass_named += weight;
            }
        }
        tally.guesses += 1;
        tally.slots += experts.len() as u64;
        tally.named += named;
        tally.whole += u64::from(named == experts.len() as u64);
    }

    /// How good one forecast was.
    pub fn tally(&self, answer: Answer) -> Tally {
        self.index(answer).and_then(|index| self.tallies.get(index)).copied().unwrap_or_default()
    }

    /// Every forecast per layer and distance, where something was judged.
    pub fn recalls(&self) -> Vec<Recall> {
        let per_layer = self.columns.len() * (self.horizon + 1);
        let judged = self.tallies.iter().enumerate().filter(|(_, tally)| tally.guesses > 0);
        let row = |(index, &tally): (usize, &Tally)| Recall {
            forecast: self.columns[index % per_layer / (self.horizon + 1)],
            layer: Some(index / per_layer),
            ahead: index % (self.horizon + 1),
            tally,
        };
        judged.map(row).collect()
    }

    /// Every forecast per distance, all layers together.
    pub fn totals(&self) -> Vec<Recall> {
        let per_layer = self.recalls();
        let mut totals: Vec<Recall> = Vec::new();
        for row in per_layer {
            let same = |t: &&mut Recall| t.forecast == row.forecast && t.ahead == row.ahead;
            match totals.iter_mut().find(same) {
                Some(total) => total.tally.add(&row.tally),
                None => totals.push(Recall { layer: None, ..row }),
            }
        }
        totals
    }

    /// A prefetch for `layer` was ordered.
    pub fn issued(&mut self, layer: usize, bytes: u64) {
        let Some(traffic) = self.traffic.get_mut(layer) else { return };
        traffic.issued += 1;
        traffic.issued_bytes = traffic.issued_bytes.saturating_add(bytes);
    }

    /// What a read of `bytes` takes at the link's speed.
    pub fn demand_ns(&self, bytes: u64) -> u64 {
        (bytes as f64 * self.link.ns_per_byte) as u64
    }

    /// `layer` asked for a prefetched expert for the first time. As a demand
    /// it would have taken [`Ledger::demand_ns`], of which `not_saved_ns` were
    /// waited nevertheless, or would have passed unnoticed.
    pub fn useful(&mut self, layer: usize, bytes: u64, not_saved_ns: u64) {
        let saved_ns = self.demand_ns(bytes).saturating_sub(not_saved_ns);
        let (Some(traffic), Some(switch)) =
            (self.traffic.get_mut(layer), self.switches.get_mut(layer))
        else {
            return;
        };
        traffic.useful += 1;
        traffic.useful_bytes = traffic.useful_bytes.saturating_add(bytes);
        traffic.saved_ns = traffic.saved_ns.saturating_add(saved_ns);
        if self.link.ns_per_byte > 0.0 {
            switch.settled(saved_ns as f64);
        }
    }

    /// `layer` ran without an expert that was prefetched for it, or the
    /// expert was dropped before. `in_the_way_bytes` of it were moved while a
    /// demand waited.
    pub fn wasted(&mut self, layer: usize, bytes: u64, in_the_way_bytes: u64) {
        let surcharge = self.pricing.surcharge * bytes as f64;
        let lost_ns = ((in_the_way_bytes as f64 + surcharge) * self.link.ns_per_byte) as u64;
        let (Some(traffic), Some(switch)) =
            (self.traffic.get_mut(layer), self.switches.get_mut(layer))
        else {
            return;
        };
        traffic.wasted += 1;
        traffic.wasted_bytes = traffic.wasted_bytes.saturating_add(bytes);
        traffic.lost_ns = traffic.lost_ns.saturating_add(lost_ns);
        if self.link.ns_per_byte > 0.0 {
            switch.settled(-(lost_ns as f64));
        }
    }

    /// Forecasting for `layer` took the token's thread `ns`.
    pub fn spent(&mut self, layer: usize, ns: u64) {
        let (Some(traffic), Some(switch)) =
            (self.traffic.get_mut(layer), self.switches.get_mut(layer))
        else {
            return;
        };
        traffic.lost_ns = traffic.lost_ns.saturating_add(ns);
        switch.spent(ns as f64);
    }

    /// `layer` waited for its experts.
    pub fn stalled(&mut self, layer: usize, stall_ns: u64) {
        if let Some(traffic) = self.traffic.get_mut(layer) {
            traffic.stall_ns = traffic.stall_ns.saturating_add(stall_ns);
        }
    }

    /// The link moved `bytes` in `busy_ns` and was idle for `idle_ns` since
    /// the last call. Also tells the ledger what a byte takes: before the
    /// first token, give it the measured speed of the plan.
    pub fn link(&mut self, bytes: u64, busy_ns: u64, idle_ns: u64) {
        let link = &mut self.link;
        link.bytes = link.bytes.saturating_add(bytes);
        link.busy_ns = link.busy_ns.saturating_add(busy_ns);
        link.idle_ns = link.idle_ns.saturating_add(idle_ns);
        if bytes > 0 && busy_ns > 0 {
            let now = busy_ns as f64 / bytes as f64;
            // A call about more bytes says more.
            let share = (bytes as f64 / self.pricing.link_window_bytes).min(1.0);
            let first = link.ns_per_byte == 0.0;
            link.ns_per_byte += if first { now } else { share * (now - link.ns_per_byte) };
        }
    }

    /// A token is done: the window moves on.
    pub fn next_token(&mut self) {
        self.switches.iter_mut().for_each(|switch| switch.next_token(&self.pricing));
    }

    /// Is prefetching for `layer` worth its price? Yes as long as nothing is
    /// known about the link.
    pub fn allows(&self, layer: usize) -> bool {
        self.switches.get(layer).is_some_and(Switch::on)
    }

    /// The price list of the layers that prefetched something or stalled.
    pub fn prices(&self) -> Vec<LayerPrice> {
        let layers = self.traffic.iter().zip(&self.switches).enumerate();
        let used = layers.filter(|(_, (traffic, _))| **traffic != Traffic::default());
        let price = |(layer, (traffic, switch)): (usize, (&Traffic, &Switch))| LayerPrice {
            layer,
            traffic: *traffic,
            on: switch.on(),
            switched_off: switch.switched_off(),
            balance_ns: switch.balance_ns(),
        };
        used.map(price).collect()
    }

    /// All layers together.
    pub fn traffic(&self) -> Traffic {
        let mut total = Traffic::default();
        self.traffic.iter().for_each(|traffic| total.add(traffic));
        total
    }

    /// What the link did.
    pub fn link_use(&self) -> Link {
        self.link
    }
}
