//! How good forecasts are on sequences, asked as a runtime asks.

use super::corpus::Corpus;
use super::samples::DISTANCES;
use pregate_predictor::forecast::{Forecast, Forecaster, Known};
use pregate_predictor::ledger::Ledger;

/// Where a forecast is asked about the next token, which has no distance.
pub const NEXT_TOKEN: usize = 0;
/// Experts that are likelier than this would be read ahead.
const ISSUED: f32 = 0.5;

/// One forecast at one distance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    pub forecast: &'static str,
    /// Layers, or [`NEXT_TOKEN`].
    pub ahead: usize,
    pub questions: u64,
    /// Experts that were used.
    pub slots: u64,
    /// Of these, among the best k, 1.5 k and 2 k.
    pub named: [u64; 3],
    /// Questions with all of them among the best k.
    pub whole: u64,
    pub gate_mass: f64,
    pub gate_mass_named: f64,
    /// Experts that were said to be likelier than not, and used.
    pub issued: u64,
    pub issued_used: u64,
    /// Tenths of what was said: how many, their sum, and how many came true.
    pub said: [(u64, f64, u64); 10],
}

impl Score {
    /// The share of the used experts among the best k, 1.5 k, 2 k.
    pub fn recalls(&self) -> [f64; 3] {
        self.named.map(|named| named as f64 / self.slots.max(1) as f64)
    }

    /// The expected distance of what was said from what came true.
    pub fn calibration_error(&self) -> f64 {
        let all: u64 = self.said.iter().map(|said| said.0).sum();
        let off = self.said.iter().map(|&(_, sum, came)| (sum - came as f64).abs());
        off.sum::<f64>() / all.max(1) as f64
    }

    fn judge(&mut self, scores: &[f32], says_odds: bool, truth: &[u16], weights: &[f32]) {
        let k = truth.len();
        let (mut all, mut mass) = (true, 0.0);
        for (&expert, &weight) in truth.iter().zip(weights) {
            let own = scores[usize::from(expert)];
            // The lower index first among equals.
            let before = usize::from(expert);
            let rank = scores[..before].iter().filter(|&&score| score >= own).count()
                + scores[before..].iter().filter(|&&score| score > own).count();
            for (named, limit) in self.named.iter_mut().zip([k, 3 * k / 2, 2 * k]) {
                *named += u64::from(rank < limit);
            }
            all &= rank < k;
            self.gate_mass += f64::from(weight);
            mass += if rank < k { f64::from(weight) } else { 0.0 };
        }
        self.gate_mass_named += mass;
        self.questions += 1;
        self.slots += k as u64;
        self.whole += u64::from(all);
        if !says_odds {
            return;
        }
        for (expert, score) in scores.iter().enumerate() {
            let p = 1.0 / (1.0 + (-score).exp());
            let used = u64::from(truth.contains(&(expert as u16)));
            let said = &mut self.said[((10.0 * p) as usize).min(9)];
            *said = (said.0 + 1, said.1 + f64::from(p), said.2 + used);
            if p > ISSUED {
                self.issued += 1;
                self.issued_used += used;
            }
        }
    }
}

/// Judges forecasts on `sequences`, which they see one after the other;
/// `group` says which of the answers a sequence counts in. The first of each
/// answer's scores belong to `forecasts`, in order, by distance, then the
/// blend's.
pub fn evaluate(
    corpus: &Corpus,
    sequences: &[usize],
    forecasts: &mut [Box<dyn Forecast>],
    mut blend: Option<&mut Forecaster>,
    groups: usize,
    group: &dyn Fn(usize) -> usize,
) -> Vec<Vec<Score>> {
    let mut names: Vec<&'static str> = forecasts.iter().map(|forecast| forecast.name()).collect();
    names.extend(blend.as_ref().map(|_| "blend"));
    let mut scores = vec![Vec::new(); groups];
    for scores in &mut scores {
        for &forecast in &names {
            let distances = DISTANCES.into_iter().chain([NEXT_TOKEN]);
            let score = |ahead| Score { forecast, ahead, ..Score::default() };
            scores.extend(distances.map(score));
        }
    }
    let shape = corpus.shape();
    let columns = blend.as_ref().map(|blend| blend.columns()).unwrap_or_default();
    let horizon = blend.as_ref().map_or(0, |blend| blend.horizon());
    let mut ledger = Ledger::new(shape, columns, horizon);
    let mut walk = Walk::new(corpus);
    for &sequence in sequences {
        forecasts.iter_mut().for_each(|forecast| forecast.new_sequence());
        if let Some(blend) = &mut blend {
            blend.new_sequence();
        }
        let range = corpus.range(sequence);
        let end = range.end;
        for token in range {
            walk.token(token, end, forecasts, &mut scores[group(sequence)]);
            if let Some(blend) = &mut blend {
                let at = forecasts.len();
                walk.blend(token, end, at, blend, &mut ledger, &mut scores[group(sequence)]);
            }
        }
    }
    scores
}

/// Lets forecasts learn from `sequences` without asking them.
pub fn warm(corpus: &Corpus, sequences: &[usize], forecasts: &mut [Box<dyn Forecast>]) {
    let mut walk = Walk::new(corpus);
    for &sequence in sequences {
        forecasts.iter_mut().for_each(|forecast| forecast.new_sequence());
        for token in corpus.range(sequence) {
            walk.read(token);
            for forecast in forecasts.iter_mut() {
                forecast.begin_token(walk.id(token));
                for (place, &layer) in walk.moe.iter().enumerate() {
                    let weights = corpus.weights(token, layer);
                    forecast.routed(layer, &walk.paths[place], weights);
                }
            }
        }
    }
}

/// The same for a blend: its sources learn, its weights do not.
pub fn warm_blend(corpus: &Corpus, sequences: &[usize], blend: &mut Forecaster) {
    let mut walk = Walk::new(corpus);
    let mut path = vec![Vec::new(); corpus.shape().layers.len()];
    for &sequence in sequences {
        blend.new_sequence();
        for token in corpus.range(sequence) {
            walk.read(token);
            for (place, &layer) in walk.moe.iter().enumerate() {
                path[layer].clone_from(&walk.paths[place]);
            }
            blend.observe(walk.id(token), &path);
        }
    }
}

struct Walk<'a> {
    corpus: &'a Corpus,
    moe: Vec<usize>,
    /// `[MoE layers]`: the token's experts.
    paths: Vec<Vec<u32>>,
    /// `[layers]`: what is known of them.
    known: Vec<Vec<u32>>,
    nothing: Vec<Vec<u32>>,
    scores: Vec<f32>,
}

impl<'a> Walk<'a> {
    fn new(corpus: &'a Corpus) -> Self {
        let moe: Vec<usize> = corpus.shape().moe().map(|(layer, _)| layer).collect();
        Self {
            corpus,
            paths: vec![Vec::new(); moe.len()],
            known: vec![Vec::new(); corpus.shape().layers.len()],
            nothing: vec![Vec::new(); corpus.shape().layers.len()],
            scores: Vec::new(),
            moe,
        }
    }

    /// Without ids every token is a new one.
    fn id(&self, token: usize) -> u32 {
        self.corpus.ids[token].unwrap_or(u32::MAX - token as u32)
    }

    fn read(&mut self, token: usize) {
        for (path, &layer) in self.paths.iter_mut().zip(&self.moe) {
            path.clear();
            path.extend(self.corpus.experts(token, layer).iter().map(|&e| u32::from(e)));
        }
    }

    fn token(
        &mut self,
        token: usize,
        end: usize,
        forecasts: &mut [Box<dyn Forecast>],
        scores: &mut [Score],
    ) {
        self.read(token);
        let id = self.id(token);
        for (index, forecast) in forecasts.iter_mut().enumerate() {
            let scores = &mut scores[index * (DISTANCES.len() + 1)..];
            forecast.begin_token(id);
            self.known.iter_mut().for_each(Vec::clear);
            self.ask(token, 0, forecast.as_mut(), scores);
            for place in 0..self.moe.len() {
                let layer = self.moe[place];
                if self.paths[place].is_empty() {
                    continue;
                }
                forecast.routed(layer, &self.paths[place], self.corpus.weights(token, layer));
                self.known[layer].extend_from_slice(&self.paths[place]);
                self.ask(token, place + 1, forecast.as_mut(), scores);
                if token + 1 < end {
                    let nothing = std::mem::take(&mut self.nothing);
                    let known = Known { token: None, routed: &nothing };
                    let score = &mut scores[DISTANCES.len()];
                    self.ask_one(token + 1, place, known, forecast.as_mut(), score);
                    self.nothing = nothing;
                }
            }
        }
    }

    /// About the layers behind the one before `place`.
    fn ask(
        &mut self,
        token: usize,
        place: usize,
        forecast: &mut dyn Forecast,
        scores: &mut [Score],
    ) {
        // The farthest first, as time goes: the nearest is what is learned from.
        for (index, ahead) in DISTANCES.into_iter().enumerate().rev() {
            if place + ahead <= self.moe.len() {
                let routed = std::mem::take(&mut self.known);
                let known = Known { token: Some(self.id(token)), routed: &routed };
                self.ask_one(token, place + ahead - 1, known, forecast, &mut scores[index]);
                self.known = routed;
            }
        }
    }

    fn ask_one(
        &mut self,
        token: usize,
        place: usize,
        known: Known<'_>,
        forecast: &mut dyn Forecast,
        score: &mut Score,
    ) {
        let layer = self.moe[place];
        let truth = self.corpus.experts(token, layer);
        let experts = self.corpus.shape().layer(layer).map_or(0, |layer| layer.experts);
        self.scores.clear();
        self.scores.resize(experts, 0.0);
        if !truth.is_empty() && forecast.scores(layer, &known, &mut self.scores) {
            let says_odds = score.forecast != "previous-token";
            score.judge(&self.scores, says_odds, truth, self.corpus.weights(token, layer));
        }
    }

    fn blend(
        &mut self,
        token: usize,
        end: usize,
        at: usize,
        blend: &mut Forecaster,
        ledger: &mut Ledger,
        scores: &mut [Score],
    ) {
        let scores = &mut scores[at * (DISTANCES.len() + 1)..];
        blend.begin_token(self.id(token));
        let paths = std::mem::take(&mut self.paths);
        for place in 0..=self.moe.len() {
            let after = place.checked_sub(1).map(|place| self.moe[place]);
            if let Some(layer) = after {
                let weights = self.corpus.weights(token, layer);
                blend.routed(layer, &paths[place - 1], weights, ledger);
                if token + 1 < end {
                    self.judge_blend(token + 1, place - 1, blend, &mut scores[DISTANCES.len()]);
                }
            }
            let wanted: Vec<usize> = DISTANCES
                .iter()
                .filter_map(|ahead| self.moe.get(place + ahead - 1))
                .copied()
                .collect();
            blend.forecast(after, &|layer| wanted.contains(layer));
            for (index, ahead) in DISTANCES.into_iter().enumerate() {
                if place + ahead <= self.moe.len() {
                    self.judge_blend(token, place + ahead - 1, blend, &mut scores[index]);
                }
            }
        }
        self.paths = paths;
    }

    fn judge_blend(&mut self, token: usize, place: usize, blend: &Forecaster, score: &mut Score) {
        let layer = self.moe[place];
        let truth = self.corpus.experts(token, layer);
        let Some(probabilities) = blend.probabilities(layer) else { return };
        self.scores.clear();
        let odds = |&p: &f32| (p.clamp(1e-6, 1.0 - 1e-6) / (1.0 - p.clamp(1e-6, 1.0 - 1e-6))).ln();
        self.scores.extend(probabilities.iter().map(odds));
        if !truth.is_empty() {
            score.judge(&self.scores, true, truth, self.corpus.weights(token, layer));
        }
    }
}

/// The scores as a table, one forecast and distance a line.
pub fn table(scores: &[Score]) -> String {
    use std::fmt::Write;
    let mut text = format!(
        "{:22} {:>5} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>6}\n",
        "forecast", "ahead", "k", "1.5k", "2k", "whole", "mass", "issued", "right", "ECE"
    );
    for score in scores.iter().filter(|score| score.questions > 0) {
        let ahead = match score.ahead {
            NEXT_TOKEN => "token".to_string(),
            ahead => ahead.to_string(),
        };
        let [k, more, twice] = score.recalls();
        let questions = score.questions as f64;
        let whole = score.whole as f64 / questions;
        let mass = score.gate_mass_named / score.gate_mass.max(1e-9);
        let name = score.forecast;
        _ = write!(
            text,
            "{name:22} {ahead:>5} {k:7.3} {more:7.3} {twice:7.3} {whole:7.3} {mass:7.3}"
        );
        if score.said.iter().any(|said| said.0 > 0) {
            let issued = score.issued as f64 / questions;
            let right = score.issued_used as f64 / score.issued.max(1) as f64;
            _ = write!(text, " {issued:7.2} {right:7.3} {:6.3}", score.calibration_error());
        }
        text.push('\n');
    }
    text
}
