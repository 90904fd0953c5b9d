//! Questions to the networks with the true answers, from running over
//! sequences the way a runtime does.

use super::corpus::Corpus;
use super::tokens::{Own, TokenCounts};
use pregate_predictor::forecast::learned::input::{Context, FIELDS, Input, Situation, TOKEN_FIELD};
use std::ops::Range;

/// Distances that are trained and judged, in layers.
pub const DISTANCES: [usize; 4] = [1, 2, 4, 8];

/// Questions about one layer.
#[derive(Default)]
pub struct Samples {
    /// Where each sample's sparse part ends.
    ends: Vec<u32>,
    sparse: Vec<(u32, u16)>,
    /// `[samples][fields * experts]`, the upper halves of f32.
    dense: Vec<u16>,
    dense_width: usize,
    /// `[samples][top_k]`.
    truth: Vec<u16>,
    top_k: usize,
    pub situations: Vec<Situation>,
}

/// The upper half of an f32, rounded.
fn short(value: f32) -> u16 {
    (value.to_bits().wrapping_add(0x8000) >> 16) as u16
}

fn long(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

impl Samples {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    fn push(&mut self, input: &Input, situation: Situation, truth: &[u16]) {
        self.sparse.extend(input.sparse.iter().map(|&(row, value)| (row, short(value))));
        self.ends.push(self.sparse.len() as u32);
        self.dense.extend(input.dense.iter().map(|&value| short(value)));
        self.dense_width = input.dense.len();
        self.truth.extend_from_slice(truth);
        self.top_k = truth.len();
        self.situations.push(situation);
    }

    pub fn truth(&self, sample: usize) -> &[u16] {
        &self.truth[sample * self.top_k..(sample + 1) * self.top_k]
    }

    /// Fills `input` with sample `sample`.
    pub fn get(&self, sample: usize, input: &mut Input) {
        let start = sample.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        let sparse = &self.sparse[start..self.ends[sample] as usize];
        input.sparse.clear();
        input.sparse.extend(sparse.iter().map(|&(row, value)| (row, long(value))));
        let dense = &self.dense[sample * self.dense_width..(sample + 1) * self.dense_width];
        input.dense.clear();
        input.dense.extend(dense.iter().map(|&value| long(value)));
    }
}

/// Which questions are asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// One layer ahead, and one of the others.
    Training,
    All,
}

/// Samples of the MoE layers `places` (their places among the MoE layers) from
/// `sequences`.
pub fn collect(
    corpus: &Corpus,
    sequences: &[usize],
    places: Range<usize>,
    reach: usize,
    counts: &TokenCounts,
    wanted: Wanted,
) -> Vec<Samples> {
    let shape = corpus.shape();
    let moe: Vec<usize> = shape.moe().map(|(layer, _)| layer).collect();
    let mut walk = Walk {
        corpus,
        context: Context::new(shape, reach),
        counts,
        wanted,
        input: Input::default(),
        samples: places.clone().map(|_| Samples::default()).collect(),
        end: 0,
        places,
        moe: &moe,
    };
    for &sequence in sequences {
        walk.context.new_sequence();
        // What a token's own sequence says about it is known from elsewhere, and
        // would not be there for a new one.
        let own = counts.own(corpus, sequence);
        walk.end = corpus.range(sequence).end;
        for token in corpus.range(sequence) {
            walk.token(token, &own);
        }
    }
    walk.samples
}

struct Walk<'a> {
    corpus: &'a Corpus,
    context: Context,
    counts: &'a TokenCounts,
    wanted: Wanted,
    input: Input,
    /// The token behind the sequence that runs.
    end: usize,
    places: Range<usize>,
    samples: Vec<Samples>,
    moe: &'a [usize],
}

impl Walk<'_> {
    fn token(&mut self, token: usize, own: &Own) {
        self.context.begin_token(self.corpus.ids[token]);
        for ahead in DISTANCES {
            self.ask(token, ahead - 1, Situation::Ahead(ahead), own);
        }
        let (mut experts, last) = (Vec::new(), self.moe.len());
        for place in 0..last {
            let layer = self.moe[place];
            experts.clear();
            experts.extend(self.corpus.experts(token, layer).iter().map(|&e| u32::from(e)));
            if experts.is_empty() {
                continue;
            }
            self.context.routed(layer, &experts, self.corpus.weights(token, layer));
            for ahead in DISTANCES {
                self.ask(token, place + ahead, Situation::Ahead(ahead), own);
            }
            self.ask(token, place, Situation::NextToken, own);
        }
    }

    fn ask(&mut self, token: usize, place: usize, situation: Situation, own: &Own) {
        if !self.places.contains(&place) {
            return;
        }
        let chosen = match (token * 31 + place * 7) % 4 {
            3 => Situation::NextToken,
            index => Situation::Ahead(DISTANCES[index + 1]),
        };
        let is_wanted =
            self.wanted == Wanted::All || situation == Situation::Ahead(1) || situation == chosen;
        let next = situation == Situation::NextToken;
        let asked = token + usize::from(next);
        let layer = self.moe[place];
        if !is_wanted || asked >= self.end {
            return;
        }
        let truth = self.corpus.experts(asked, layer);
        let Some(shape) = self.corpus.shape().layer(layer) else { return };
        if truth.len() != shape.top_k {
            return;
        }
        self.context.look(layer, situation, &mut self.input);
        if let (Some(id), false) = (self.corpus.ids[token], next) {
            let field = TOKEN_FIELD * (self.input.dense.len() / FIELDS);
            let field = &mut self.input.dense[field..][..shape.experts];
            self.counts.fill(place, id, Some(own), field);
        }
        self.samples[place - self.places.start].push(&self.input, situation, truth);
    }
}
