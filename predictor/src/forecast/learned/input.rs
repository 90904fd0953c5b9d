//! What the network of a layer is told: the experts of earlier layers of this
//! token, of the tokens before, and what tokens like it used. The same code
//! serves training and running, so that both see the same numbers.

use super::neighbours::Neighbours;
use crate::Shape;
use crate::forecast::fast;

/// Layers of this token that can be known, counted back from the target.
pub const REACH: usize = 11;
/// Of these, the nearest known ones that are told.
pub const WINDOW: usize = 8;
/// Tokens after which a use counts half.
const HALF_LIVES: [f32; 4] = [1.0, 4.0, 16.0, 64.0];
/// Added to shares before a logarithm is taken.
const FLOOR: f32 = 0.02;
/// Fields with decayed use.
pub const USES: usize = HALF_LIVES.len();
/// Values per expert: uses at four rates, two answers of neighbours, and what
/// the token id says.
pub const FIELDS: usize = USES + Neighbours::ANSWERS + 1;
/// Where the token's own is.
pub const TOKEN_FIELD: usize = FIELDS - 1;

/// How much is known of the token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Situation {
    /// Its layers up to so many before the target, at least 1.
    Ahead(usize),
    /// Nothing: it is the token after the running one.
    NextToken,
}

impl Situation {
    /// Situations that are told apart: 1, 2, 3..=5, 6 and more, next token.
    pub const COUNT: usize = 5;

    pub fn index(self) -> usize {
        match self {
            Situation::Ahead(0..=1) => 0,
            Situation::Ahead(2) => 1,
            Situation::Ahead(3..=5) => 2,
            Situation::Ahead(_) => 3,
            Situation::NextToken => 4,
        }
    }
}

/// Rows of the sparse part of a network: layers back, the previous token,
/// situations, and how near the nearest neighbour is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rows {
    /// Layers back that have rows.
    pub reach: usize,
    /// Of the widest layer.
    pub experts: usize,
}

impl Rows {
    pub fn back(self, layers: usize, expert: u32) -> u32 {
        ((layers - 1) * self.experts) as u32 + expert
    }

    pub fn previous(self, expert: u32) -> u32 {
        (self.reach * self.experts) as u32 + expert
    }

    pub fn situation(self, situation: Situation) -> u32 {
        ((self.reach + 1) * self.experts + situation.index()) as u32
    }

    pub fn likeness(self) -> u32 {
        ((self.reach + 1) * self.experts + Situation::COUNT) as u32
    }

    pub fn count(self) -> usize {
        (self.reach + 1) * self.experts + Situation::COUNT + 1
    }
}

/// One question to a network.
#[derive(Clone, Debug, Default)]
pub struct Input {
    /// Row and value.
    pub sparse: Vec<(u32, f32)>,
    /// `[FIELDS][experts]`, of the widest layer.
    pub dense: Vec<f32>,
}

/// What happened so far.
pub struct Context {
    rows: Rows,
    layers: Vec<Option<Past>>,
    /// MoE layers in order.
    moe: Vec<usize>,
    /// `[layers]`: its place in `moe`.
    places: Vec<usize>,
    neighbours: Neighbours,
}

struct Past {
    /// The share of experts that a token uses.
    base: f32,
    /// `[rates][experts]`, of the widest layer, like all fields.
    uses: Vec<f32>,
    /// Of the newest token, with shares of the gate's weight.
    last: Vec<(u32, f32)>,
}

impl Context {
    pub fn new(shape: &Shape, reach: usize) -> Self {
        let moe: Vec<usize> = shape.moe().map(|(layer, _)| layer).collect();
        let experts = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(0);
        let past = |layer: &Option<crate::LayerShape>| {
            let layer = layer.as_ref()?;
            let base = (layer.top_k as f32 / layer.experts.max(1) as f32).min(0.99);
            Some(Past {
                base,
                uses: vec![base; USES * experts],
                last: Vec::with_capacity(layer.top_k),
            })
        };
        let mut places = vec![0; shape.layers.len()];
        moe.iter().enumerate().for_each(|(place, &layer)| places[layer] = place);
        Self {
            rows: Rows { reach, experts },
            layers: shape.layers.iter().map(past).collect(),
            moe,
            places,
            neighbours: Neighbours::new(shape),
        }
    }

    pub fn begin_token(&mut self, id: Option<u32>) {
        self.neighbours.begin_token(id);
    }

    /// The running token's `layer` used `experts` with `weights` (as many, or
    /// none).
    pub fn routed(&mut self, layer: usize, experts: &[u32], weights: &[f32]) {
        let Some(Some(past)) = self.layers.get_mut(layer) else { return };
        let sum: f32 = weights.iter().sum();
        let even = 1.0 / experts.len().max(1) as f32;
        past.last.clear();
        for (rank, &expert) in experts.iter().enumerate() {
            let share = weights.get(rank).map_or(even, |weight| weight / sum);
            let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { even };
            past.last.push((expert, share));
        }
        for (rate, uses) in past.uses.chunks_exact_mut(self.rows.experts.max(1)).enumerate() {
            let keep = keep(HALF_LIVES[rate]);
            uses.iter_mut().for_each(|share| *share *= keep);
            for &expert in experts {
                uses[expert as usize] += 1.0 - keep;
            }
        }
        self.neighbours.routed(layer, &past.last);
    }

    /// What came before has nothing to do with what follows. Neighbours stay:
    /// they have to be alike to count.
    pub fn new_sequence(&mut self) {
        for past in self.layers.iter_mut().flatten() {
            past.uses.fill(past.base);
            past.last.clear();
        }
    }

    /// Fills `input` for layer `target`. The token's own field stays zero.
    pub fn look(&mut self, target: usize, situation: Situation, input: &mut Input) {
        input.sparse.clear();
        input.dense.clear();
        let Some(Some(past)) = self.layers.get(target) else { return };
        let rows = self.rows;
        input.sparse.push((rows.situation(situation), 1.0));
        if let Situation::Ahead(ahead) = situation {
            let place = self.places[target];
            for back in (ahead.max(1)..=rows.reach.min(place)).take(WINDOW) {
                let Some(source) = &self.layers[self.moe[place - back]] else { continue };
                let count = source.last.len() as f32;
                let value = |share: f32| 0.5 + 0.5 * share * count;
                let rows = source.last.iter().map(|&(e, share)| (rows.back(back, e), value(share)));
                input.sparse.extend(rows);
            }
        }
        input.sparse.extend(past.last.iter().map(|&(expert, _)| (rows.previous(expert), 1.0)));
        input.dense.resize(FIELDS * rows.experts, 0.0);
        let (uses, rest) = input.dense.split_at_mut(past.uses.len());
        let inverse = 1.0 / (past.base + FLOOR);
        for (field, share) in uses.iter_mut().zip(&past.uses) {
            *field = fast::ln((share + FLOOR) * inverse);
        }
        let answers = &mut rest[..Neighbours::ANSWERS * rows.experts];
        let next = situation == Situation::NextToken;
        let likeness = self.neighbours.ask(target, next, answers);
        input.sparse.push((rows.likeness(), 0.25 * likeness));
    }

    /// Bytes that it holds.
    pub fn memory_bytes(&self) -> usize {
        self.neighbours.memory_bytes()
            + self.layers.iter().flatten().map(|past| 4 * past.uses.len()).sum::<usize>()
    }
}

/// What a share keeps from one token to the next.
fn keep(half_life: f32) -> f32 {
    // `0.5^(1 / half_life)`, with functions that are alike on all machines.
    fast::exp(-std::f32::consts::LN_2 / half_life)
}
