//! Owns the forecasts, asks them, blends them, and lets the ledger judge them.

use super::blend::{Blend, Features, MAX_SOURCES, Spread, alone};
use super::guard::{Fault, Guarded};
use super::learned::Trained;
use super::{External, Forecast, Known, Source, catalogue, select};
use crate::ledger::{Answer, Ledger};
use crate::{ExpertId, LayerShape, Outlook, Shape};
use std::sync::Arc;

/// Layers that can be looked ahead.
pub const MAX_HORIZON: usize = 16;
/// MoE layers ahead that forecasts look, if nothing else is said.
pub const HORIZON: usize = 2;

/// How the forecaster works.
#[derive(Clone, Debug)]
pub struct Options {
    /// MoE layers ahead that are forecast after each layer, at most 16.
    pub horizon: usize,
    /// `false`: the sources count as they are, all alike, and nobody asks them
    /// about the next token. For one that was chosen by its name, and for tests
    /// that want a wrong forecast to stay wrong.
    pub learns: bool,
    /// Neighbouring layers that share the blend's weights.
    pub group: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { horizon: HORIZON, learns: true, group: 8 }
    }
}

/// One guess about one layer that waits for the truth. `ahead` 0 is the guess
/// about the next token that was made when the layer had just run.
struct Pending {
    waits: bool,
    features: Features,
    /// `[sources + 1]`: what each would choose, and the blend; empty where it
    /// did not answer.
    guesses: Vec<Vec<u32>>,
}

/// Scores from the runtime that wait for their layer.
struct Kept {
    waits: bool,
    kind: usize,
    ahead: usize,
    logits: Vec<f32>,
    guess: Vec<u32>,
}

struct Layer {
    shape: LayerShape,
    /// The next MoE layers, at most `horizon`.
    next: Vec<usize>,
    pending: Vec<Pending>,
    kept: Vec<Kept>,
    /// `[sources]`.
    spreads: Vec<Spread>,
    /// `[experts]`, the newest answer.
    probabilities: Vec<f32>,
    answered: bool,
    /// How far ahead a forecast that is alone and steady was asked about the
    /// running token: it need not be asked again.
    said: Option<usize>,
}

/// Forecasts, blend and what they said about each layer. Answers [`Outlook`]:
/// this token's run of a layer that is still ahead, else the next token's.
pub struct Forecaster {
    options: Options,
    sources: Vec<Guarded>,
    blends: Vec<Blend>,
    layers: Vec<Option<Layer>>,
    first: Vec<usize>,
    token: Option<u32>,
    path: Vec<Vec<u32>>,
    /// What a token knows before its first layer: nothing.
    nothing: Vec<Vec<u32>>,
    refused: u64,
    scratch: Vec<f32>,
}

impl Forecaster {
    /// With all useful forecasts.
    pub fn new(shape: &Shape, options: Options) -> Self {
        let names = &catalogue::NAMES[..catalogue::USEFUL];
        let horizon = options.horizon;
        let sources = names.iter().filter_map(|name| catalogue::by_name(name, shape, horizon));
        Self::with(shape, options, sources.collect())
    }

    /// With one forecast, taken as it is, or with `blend`: all useful ones.
    /// `None`: there is no such forecast.
    pub fn by_name(name: &str, shape: &Shape, horizon: usize) -> Option<Self> {
        if name == "blend" {
            return Some(Self::new(shape, Options { horizon, ..Options::default() }));
        }
        let forecast = catalogue::by_name(name, shape, horizon)?;
        let options = Options { horizon, learns: false, ..Options::default() };
        Some(Self::with(shape, options, vec![forecast]))
    }

    /// The same with what was trained: its forecasts join the blend, and have
    /// names of their own. `None`: there is no such forecast, or `trained` has
    /// none of this name.
    pub fn by_name_with(
        name: &str,
        shape: &Shape,
        horizon: usize,
        trained: &Arc<Trained>,
    ) -> Option<Self> {
        if name == "blend" {
            let names = catalogue::NAMES[..catalogue::USEFUL].iter();
            let online = names.filter_map(|name| catalogue::by_name(name, shape, horizon));
            let learned = catalogue::LEARNED[..catalogue::LEARNED_USEFUL].iter();
            let learned = learned.filter_map(|name| catalogue::learned(name, trained));
            let options = Options { horizon, ..Options::default() };
            return Some(Self::with(shape, options, online.chain(learned).collect()));
        }
        let Some(forecast) = catalogue::learned(name, trained) else {
            return Self::by_name(name, shape, horizon);
        };
        let options = Options { horizon, learns: false, ..Options::default() };
        Some(Self::with(shape, options, vec![forecast]))
    }

    /// With these forecasts; what the runtime computes ([`External`]) joins
    /// them by itself. Names should differ. At most 28 are taken.
    pub fn with(
        shape: &Shape,
        mut options: Options,
        mut forecasts: Vec<Box<dyn Forecast>>,
    ) -> Self {
        options.horizon = options.horizon.min(MAX_HORIZON);
        options.group = options.group.max(1);
        forecasts.truncate(MAX_SOURCES - Source::KINDS);
        let sources: Vec<_> = forecasts.into_iter().map(Guarded::new).collect();
        let columns = sources.len() + Source::KINDS;
        let is_strong = |column: &usize| {
            sources.get(*column).is_none_or(|source| source.name() == catalogue::STRONG)
        };
        let strong = (0..columns).filter(is_strong).fold(0, |set, column| set | 1 << column);
        let moe: Vec<usize> = shape.moe().map(|(layer, _)| layer).collect();
        let after = |layer: Option<usize>| -> Vec<usize> {
            let later = moe.iter().filter(|&&l| layer.is_none_or(|layer| l > layer));
            later.take(options.horizon).copied().collect()
        };
        let layers = shape.layers.iter().enumerate();
        let layers = layers.map(|(index, layer)| {
            let layer = layer.as_ref().filter(|layer| layer.experts > 0 && layer.top_k > 0)?;
            Some(Layer::new(*layer, after(Some(index)), columns, options.horizon))
        });
        let widest = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(0);
        let groups = shape.layers.len().div_ceil(options.group);
        Self {
            layers: layers.collect(),
            blends: vec![Blend::new(columns, strong, options.learns); groups],
            first: after(None),
            token: None,
            path: shape.layers.iter().map(|_| Vec::new()).collect(),
            nothing: vec![Vec::new(); shape.layers.len()],
            refused: 0,
            scratch: vec![0.0; widest],
            options,
            sources,
        }
    }

    /// The columns of the ledger: forecasts, kinds of external scores, blend.
    pub fn columns(&self) -> Vec<&'static str> {
        let own = self.sources.iter().map(Guarded::name);
        own.chain((0..Source::KINDS).map(Source::kind_name)).chain(["blend"]).collect()
    }

    /// Layers ahead that are forecast.
    pub fn horizon(&self) -> usize {
        self.options.horizon
    }

    /// A token enters layer 0, decode. Forecasts its first layers.
    pub fn begin_token(&mut self, token: u32) {
        self.token = Some(token);
        self.path.iter_mut().for_each(Vec::clear);
        for layer in self.layers.iter_mut().flatten() {
            layer.kept.iter_mut().for_each(|kept| kept.waits = false);
            layer.pending[1..].iter_mut().for_each(|pending| pending.waits = false);
            layer.said = None;
        }
        self.sources.iter_mut().for_each(|source| source.begin_token(token));
        self.forecast(None, &|_| true);
    }

    /// What follows has nothing to do with what was.
    pub fn new_sequence(&mut self) {
        self.token = None;
        self.path.iter_mut().for_each(Vec::clear);
        for layer in self.layers.iter_mut().flatten() {
            layer.kept.iter_mut().for_each(|kept| kept.waits = false);
        }
        self.begin_chunk();
        self.sources.iter_mut().for_each(Guarded::new_sequence);
    }

    /// A chunk of a prompt begins: what was guessed of the next token is about
    /// none of its tokens, and not about the one behind it.
    pub fn begin_chunk(&mut self) {
        for layer in self.layers.iter_mut().flatten() {
            layer.pending.iter_mut().for_each(|pending| pending.waits = false);
            layer.answered = false;
        }
    }

    /// Takes scores that the runtime computed, before their layer is routed.
    /// They count in the next [`Self::forecast`]. Scores for a layer that is
    /// not there, of a wrong length or staler than the horizon are refused
    /// and counted; what is not finite in them is repaired.
    pub fn external(&mut self, external: &External<'_>) {
        let kind = external.source.kind();
        let ahead = external.source.ahead();
        let layer = self.layers.get_mut(external.target).and_then(Option::as_mut);
        let kept = layer.and_then(|layer| {
            let (top_k, experts) = (layer.shape.top_k, layer.shape.experts);
            let kept = layer.kept.iter_mut().find(|k| k.kind == kind && k.ahead == ahead)?;
            (external.logits.len() == experts).then_some((kept, top_k))
        });
        let Some((kept, top_k)) = kept else {
            self.refused += 1;
            return;
        };
        kept.logits.copy_from_slice(external.logits);
        select::sanitise(&mut kept.logits);
        select::best(&kept.logits, top_k, &mut kept.guess);
        kept.waits = true;
    }

    /// Layer `layer` asked for `experts` with `weights` (rank order). Judges
    /// what was forecast, teaches the forecasts, and, where the answer is a
    /// probability, guesses what the next token will ask for here. Ids that the
    /// layer has not are left out.
    pub fn routed(&mut self, layer: usize, experts: &[u32], weights: &[f32], ledger: &mut Ledger) {
        let Some(Some(state)) = self.layers.get_mut(layer) else { return };
        let limit = state.shape.experts;
        let clean = experts.len() <= limit
            && weights.len() == experts.len()
            && experts.iter().all(|&expert| (expert as usize) < limit)
            && (1..experts.len()).all(|at| !experts[..at].contains(&experts[at]));
        if !clean || experts.is_empty() {
            self.refused += 1;
            return;
        }
        let blend_column = self.sources.len() + Source::KINDS;
        let blend = &mut self.blends[layer / self.options.group];
        // What was said of this token says nothing of the next one.
        state.answered = false;
        state.judge(layer, experts, weights, self.sources.len(), blend_column, ledger);
        for pending in state.pending.iter_mut().filter(|pending| pending.waits) {
            blend.learn(&pending.features, experts);
            pending.waits = false;
        }
        for source in &mut self.sources {
            source.routed(layer, experts, weights);
        }
        self.path[layer].clear();
        self.path[layer].extend_from_slice(experts);
        // Only eviction asks for it, and takes no scores ([`Outlook`] below).
        if self.options.learns {
            self.ask(layer, 0);
        }
    }

    /// Teaches a whole token without judging or guessing, for a prompt: `path
    /// [layers]`, rank order, empty for dense layers.
    pub fn observe(&mut self, token: u32, path: &[Vec<u32>]) {
        self.sources.iter_mut().for_each(|source| source.begin_token(token));
        for (layer, experts) in path.iter().enumerate() {
            let Some(Some(state)) = self.layers.get(layer) else { continue };
            let limit = state.shape.experts;
            if experts.is_empty() || experts.iter().any(|&e| e as usize >= limit) {
                continue;
            }
            let even = 1.0 / experts.len() as f32;
            self.scratch.resize(self.scratch.len().max(experts.len()), 0.0);
            self.scratch[..experts.len()].fill(even);
            for source in &mut self.sources {
                source.routed(layer, experts, &self.scratch[..experts.len()]);
            }
        }
    }

    /// Asks for those of the next layers that are `wanted`, after layer `after`
    /// was routed (`None`: before the first). May be called again when more is
    /// known.
    pub fn forecast(&mut self, after: Option<usize>, wanted: &dyn Fn(&usize) -> bool) {
        let next = match after {
            None => &self.first,
            Some(layer) => match self.layers.get(layer) {
                Some(Some(layer)) => &layer.next,
                _ => return,
            },
        };
        for index in 0..next.len() {
            let next = match after {
                None => &self.first,
                Some(layer) => &self.layers[layer].as_ref().expect("checked above").next,
            };
            let target = next[index];
            if wanted(&target) {
                self.ask(target, index + 1);
            }
        }
    }

    /// The layers that [`Self::forecast`] looks at after `after`, nearest
    /// first.
    pub fn ahead(&self, after: Option<usize>) -> &[usize] {
        match after {
            None => &self.first,
            Some(layer) => match self.layers.get(layer) {
                Some(Some(layer)) => &layer.next,
                _ => &[],
            },
        }
    }

    /// The newest probabilities of layer `layer`, `[experts]`, all in 0..=1;
    /// `None` where nothing was ever forecast.
    pub fn probabilities(&self, layer: usize) -> Option<&[f32]> {
        let layer = self.layers.get(layer)?.as_ref()?;
        layer.answered.then_some(&layer.probabilities)
    }

    /// What forecasts did that they must not do.
    pub fn faults(&self) -> impl Iterator<Item = Fault> + '_ {
        self.sources.iter().filter_map(Guarded::fault)
    }

    /// Inputs that did not fit the model and were left out.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Bytes that the forecasts hold.
    pub fn memory_bytes(&self) -> usize {
        let own = |layer: &Layer| {
            let row = 4 * layer.shape.experts;
            let columns = self.sources.len() + Source::KINDS;
            layer.pending.len() * row * (2 * columns + 1) + layer.kept.len() * row + row
        };
        self.sources.iter().map(Guarded::memory_bytes).sum::<usize>()
            + self.layers.iter().flatten().map(own).sum::<usize>()
    }

    /// Asks every source about `target`, `ahead` layers ahead (0: the next
    /// token), and blends.
    fn ask(&mut self, target: usize, ahead: usize) {
        let Some(Some(layer)) = self.layers.get_mut(target) else { return };
        let top_k = layer.shape.top_k;
        let blend = &mut self.blends[target / self.options.group];
        let known = Known {
            token: self.token.filter(|_| ahead > 0),
            routed: if ahead > 0 { &self.path } else { &self.nothing },
        };
        let is_alone = !self.options.learns && layer.kept.iter().all(|kept| !kept.waits);
        if let Some(said) = layer.said.filter(|_| is_alone && ahead > 0) {
            return layer.repeat(said, ahead);
        }
        layer.said = None;
        let Pending { waits, features, guesses } = &mut layer.pending[ahead];
        features.clear(ahead as u8);
        let scores = &mut self.scratch[..layer.shape.experts];
        if let ([source], true) = (&mut self.sources[..], is_alone) {
            *waits = source.scores(target, &known, scores);
            if *waits {
                let [guess, .., of_blend] = &mut guesses[..] else { return };
                let threshold = threshold(scores, top_k, guess);
                of_blend.clone_from(guess);
                features.situation.sources = 1;
                let scale = layer.spreads[0].after(scores);
                alone(scores, threshold, scale, &mut layer.probabilities);
                layer.answered = true;
                layer.said = Some(ahead).filter(|&ahead| ahead > 0 && source.is_steady());
            }
            return;
        }
        for (index, source) in self.sources.iter_mut().enumerate() {
            guesses[index].clear();
            if source.scores(target, &known, scores) {
                let threshold = threshold(scores, top_k, &mut guesses[index]);
                features.set(index, scores, threshold, layer.spreads[index].after(scores));
            }
        }
        for kind in 0..Source::ZeroStaleness.kind() {
            let of_kind = layer.kept.iter().filter(|k| ahead > 0 && k.waits && k.kind == kind);
            let Some(freshest) = of_kind.min_by_key(|kept| kept.ahead) else { continue };
            let index = self.sources.len() + kind;
            let threshold = threshold(&freshest.logits, top_k, &mut guesses[index]);
            let scale = layer.spreads[index].after(&freshest.logits);
            features.set(index, &freshest.logits, threshold, scale);
        }
        *waits = features.situation.sources != 0;
        if *waits {
            blend.predict(features);
            let last = guesses.len() - 1;
            select::best(&features.probabilities, top_k, &mut guesses[last]);
            layer.probabilities.copy_from_slice(&features.probabilities);
            layer.answered = true;
        }
    }
}

/// What lies between the scores that a source would choose and the others;
/// `guess` gets the chosen ones.
fn threshold(scores: &[f32], top_k: usize, guess: &mut Vec<u32>) -> f32 {
    select::best(scores, top_k + 1, guess);
    let last = scores[guess[guess.len() - 1] as usize];
    guess.truncate(top_k);
    let chosen = scores[guess[guess.len() - 1] as usize];
    0.5 * (chosen + last)
}

impl Source {
    /// Layers between state and router.
    fn ahead(self) -> usize {
        match self {
            Source::StaleGate { ahead } | Source::StaleGateShared { ahead } => usize::from(ahead),
            Source::OwnGateBeforeAttention | Source::ZeroStaleness => 0,
        }
    }
}

impl Layer {
    fn new(shape: LayerShape, next: Vec<usize>, columns: usize, horizon: usize) -> Self {
        let pending = |_| Pending {
            waits: false,
            features: Features::new(columns, shape.experts),
            guesses: vec![Vec::with_capacity(shape.top_k + 1); columns + 1],
        };
        let stale = |kind| (1..=horizon).map(move |ahead| (kind, ahead));
        let kept = stale(0).chain(stale(1)).chain([(2, 0), (3, 0)]).map(|(kind, ahead)| Kept {
            waits: false,
            kind,
            ahead,
            logits: vec![0.0; shape.experts],
            guess: Vec::with_capacity(shape.top_k + 1),
        });
        Self {
            shape,
            next,
            pending: (0..=horizon).map(pending).collect(),
            kept: kept.collect(),
            spreads: vec![Spread::default(); columns],
            probabilities: vec![0.0; shape.experts],
            answered: false,
            said: None,
        }
    }

    /// What was said `said` layers ahead is said again `ahead` layers ahead.
    fn repeat(&mut self, said: usize, ahead: usize) {
        if let Ok([from, to]) = self.pending.get_disjoint_mut([said, ahead]) {
            to.guesses.clone_from(&from.guesses);
            to.features.clear(ahead as u8);
            to.features.situation.sources = 1;
            to.waits = true;
        }
    }

    /// Tells the ledger how good every waiting guess was.
    fn judge(
        &mut self,
        layer: usize,
        experts: &[u32],
        weights: &[f32],
        own: usize,
        blend: usize,
        ledger: &mut Ledger,
    ) {
        for (ahead, pending) in self.pending.iter().enumerate().filter(|(_, p)| p.waits) {
            let guesses = pending.guesses.iter().enumerate();
            for (column, guess) in guesses.filter(|(column, _)| *column < own || *column == blend) {
                if column == blend || pending.features.situation.sources >> column & 1 == 1 {
                    ledger.judge(Answer { layer, column, ahead }, guess, experts, weights);
                }
            }
        }
        for kept in self.kept.iter_mut().filter(|kept| kept.waits) {
            let answer = Answer { layer, column: own + kept.kind, ahead: kept.ahead };
            ledger.judge(answer, &kept.guess, experts, weights);
            kept.waits = false;
        }
    }
}

impl Outlook for Forecaster {
    /// Scores that are taken as they are rank, and are no probabilities: used
    /// as ones they cost up to a tenth of the hits (`docs/measurements.md`).
    fn probability(&self, id: ExpertId) -> Option<f32> {
        if !self.options.learns {
            return None;
        }
        self.probabilities(id.layer())?.get(id.expert()).copied()
    }
}
