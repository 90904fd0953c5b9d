//! What forecasts were worth: how often they were right, what their bytes
//! saved and cost, and the switches that stop them where they lose.

mod books;
mod price;
mod wall;

pub use books::{LayerPrice, Traffic};
pub use price::{Pricing, Switch};

use crate::Shape;
use books::Books;
use wall::Wall;

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

/// What went through the layers: prefetches for tokens and for chunks have
/// books and switches of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pass {
    Token,
    /// Of a prompt.
    Chunk,
}

/// The ledger of one run.
pub struct Ledger {
    columns: Vec<&'static str>,
    horizon: usize,
    /// `[layers][columns][horizon + 1]`.
    tallies: Vec<Tally>,
    tokens: Books,
    chunks: Books,
    /// Copies of experts that the CPU computes; time is counted in tokens.
    kept: Books,
    wall: Wall,
    /// What runs.
    pass: Pass,
    link: Link,
    link_window_bytes: f64,
}

impl Ledger {
    /// For the forecasts `columns` (see [`crate::forecast::Forecaster::columns`])
    /// and guesses up to `horizon` layers ahead.
    pub fn new(shape: &Shape, columns: Vec<&'static str>, horizon: usize) -> Self {
        Self::with_pricing(shape, columns, horizon, Pricing::default())
    }

    /// The same with other settings of the switch for tokens.
    pub fn with_pricing(
        shape: &Shape,
        columns: Vec<&'static str>,
        horizon: usize,
        pricing: Pricing,
    ) -> Self {
        let layers = shape.layers.len();
        Self {
            tallies: vec![Tally::default(); layers * columns.len() * (horizon + 1)],
            tokens: Books::new(layers, pricing),
            chunks: Books::new(layers, Pricing::of_chunks()),
            kept: Books::new(layers, pricing),
            wall: Wall::default(),
            pass: Pass::Token,
            link: Link::default(),
            columns,
            horizon,
            link_window_bytes: pricing.link_window_bytes,
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

    fn books(&mut self) -> &mut Books {
        match self.pass {
            Pass::Token => &mut self.tokens,
            Pass::Chunk => &mut self.chunks,
        }
    }

    /// A prefetch for `layer` was ordered.
    pub fn issued(&mut self, layer: usize, bytes: u64) {
        self.books().issued(layer, bytes);
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
        let is_priced = self.link.ns_per_byte > 0.0;
        self.books().useful(layer, bytes, saved_ns, is_priced);
    }

    /// `layer` ran without an expert that was prefetched for it, or the
    /// expert was dropped before. `in_the_way_bytes` of it were moved while a
    /// demand waited.
    pub fn wasted(&mut self, layer: usize, bytes: u64, in_the_way_bytes: u64) {
        let ns_per_byte = self.link.ns_per_byte;
        self.books().wasted(layer, bytes, in_the_way_bytes, ns_per_byte);
    }

    /// Forecasting for `layer` took the token's thread `ns`.
    pub fn spent(&mut self, layer: usize, ns: u64) {
        self.books().spent(layer, ns);
    }

    /// `layer` waited for its experts.
    pub fn stalled(&mut self, layer: usize, stall_ns: u64) {
        self.books().stalled(layer, stall_ns);
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
            let share = (bytes as f64 / self.link_window_bytes).min(1.0);
            let first = link.ns_per_byte == 0.0;
            link.ns_per_byte += if first { now } else { share * (now - link.ns_per_byte) };
        }
    }

    /// The pass that ran is over: its window moves on. A `pass` begins.
    pub fn next_pass(&mut self, pass: Pass) {
        self.books().next_pass();
        if self.pass == Pass::Token {
            self.kept.next_pass();
        }
        self.pass = pass;
    }

    /// The pass that ran took `ns`, all in all. Where this is never told, only
    /// estimates decide.
    pub fn passed(&mut self, ns: u64) {
        if self.pass == Pass::Token {
            self.wall.token(ns);
        }
    }

    /// Is what forecasts say worth acting on, as far as the time of passes
    /// tells? It is until they tell.
    pub fn pays(&self) -> bool {
        self.wall.on()
    }

    /// How often tokens with read-aheads took longer than those without, so
    /// that they were switched off in all layers.
    pub fn switched_off(&self) -> u64 {
        self.wall.switched_off()
    }

    /// In a pass as the one that runs, is prefetching for `layer` worth its
    /// price? Yes as long as nothing is known about the link.
    pub fn allows(&self, layer: usize) -> bool {
        match self.pass {
            Pass::Token => self.wall.on() && self.tokens.allows(layer),
            Pass::Chunk => self.chunks.allows(layer),
        }
    }

    /// A copy was ordered of an expert that the CPU computes and later tokens
    /// will use.
    pub fn kept_issued(&mut self, layer: usize, bytes: u64) {
        self.kept.issued(layer, bytes);
    }

    /// It was used for the first time, which saved `saved_ns`.
    pub fn kept_used(&mut self, layer: usize, bytes: u64, saved_ns: u64) {
        self.kept.useful(layer, bytes, saved_ns, true);
    }

    /// It left, or never came, without being used.
    pub fn kept_wasted(&mut self, layer: usize, bytes: u64) {
        self.kept.wasted(layer, bytes, 0, self.link.ns_per_byte.max(f64::MIN_POSITIVE));
    }

    /// It delayed somebody, or who left for it was missed, by `ns`.
    pub fn kept_lost(&mut self, layer: usize, ns: u64) {
        self.kept.spent(layer, ns);
    }

    /// Is keeping experts of `layer` worth its price?
    pub fn allows_keeping(&self, layer: usize) -> bool {
        self.kept.allows(layer)
    }

    /// The price list of what was kept, of the layers where something was.
    pub fn kept_prices(&self) -> Vec<LayerPrice> {
        self.kept.prices()
    }

    /// The same of all layers together.
    pub fn kept_traffic(&self) -> Traffic {
        self.kept.traffic()
    }

    /// The price list of the layers that prefetched something for tokens, or
    /// made them wait.
    pub fn prices(&self) -> Vec<LayerPrice> {
        self.tokens.prices()
    }

    /// The same for chunks of prompts.
    pub fn chunk_prices(&self) -> Vec<LayerPrice> {
        self.chunks.prices()
    }

    /// All layers together, for tokens.
    pub fn traffic(&self) -> Traffic {
        self.tokens.traffic()
    }

    /// The same for chunks of prompts.
    pub fn chunk_traffic(&self) -> Traffic {
        self.chunks.traffic()
    }

    /// What the link did.
    pub fn link_use(&self) -> Link {
        self.link
    }
}
