//! What forecasts were worth: how often they were right, what their bytes
//! saved and cost, and the switch that stops them where they lose.

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

/// The ledger of one run.
pub struct Ledger {
    columns: Vec<&'static str>,
    horizon: usize,
    /// `[layers][columns][horizon + 1]`.
    tallies: Vec<Tally>,
}

impl Ledger {
    /// For the forecasts `columns` (see [`crate::forecast::Forecaster::columns`])
    /// and guesses up to `horizon` layers ahead.
    pub fn new(shape: &Shape, columns: Vec<&'static str>, horizon: usize) -> Self {
        let tallies = vec![Tally::default(); shape.layers.len() * columns.len() * (horizon + 1)];
        Self { columns, horizon, tallies }
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
}
