//! Draws the tokens.

use super::Weights;
use crate::random::split_mix;
use crate::{Header, Provenance, Row, Source, TraceError};
use pregate_predictor::{LayerShape, Shape};

/// What a token keeps of the fading memories.
const FAST: f32 = 0.5;
const SLOW: f32 = 0.97;
/// Of the table of coupling, in which an entry is a byte.
const CELL: f32 = 16.0;

/// A trace that is drawn while it is read; the same again after a rewind.
pub struct Generator {
    header: Header,
    /// Of sequences, over and over.
    lengths: Vec<u32>,
    tokens: u64,
    seed: u64,
    weights: Weights,
    layers: usize,
    experts: usize,
    top_k: usize,
    /// `[layers, experts]`
    popularity: Vec<f32>,
    topic: Vec<f32>,
    slow: Vec<f32>,
    fast: Vec<f32>,
    /// `[layers, experts before, experts]`
    coupling: Vec<i8>,
    random: Random,
    /// The next token; how many sequences were begun; the next token's place
    /// in the last one, and how many are left of that.
    token: u64,
    begun: usize,
    position: u32,
    left: u32,
    /// Scratch: of one layer.
    logits: Vec<(f32, u16)>,
    before: Vec<u16>,
}

impl Generator {
    /// `tokens` of a model with `layers` equal layers, in sequences as long as
    /// `lengths` say, over and over (without any, in one); the source is called
    /// `from`.
    pub fn new(
        (layers, layer): (usize, LayerShape),
        weights: Weights,
        (tokens, lengths): (u64, &[u64]),
        (from, seed): (&str, u64),
    ) -> Self {
        let LayerShape { experts, top_k, .. } = layer;
        let source = Provenance::Synthetic { from: from.to_string(), seed };
        let shape = Shape { layers: vec![Some(layer); layers] };
        let model = format!("synthetic, {layers} layers, top-{top_k} of {experts}");
        let header = Header { model, fingerprint: None, shape, source };
        // Positions have 32 bits.
        let bounded = |&length: &u64| u32::try_from(length).unwrap_or(u32::MAX);
        let mut lengths: Vec<u32> = lengths.iter().map(bounded).filter(|&n| n > 0).collect();
        if lengths.is_empty() {
            lengths.push(u32::MAX);
        }
        // What makes the model; the same for any seed, as a model is.
        let mut fixed = Random(0x70e6a7e);
        let cells = layers * experts;
        let popularity = (0..cells).map(|_| fixed.normal()).collect();
        let coupling = (0..layers).flat_map(|_| calls(experts, &mut fixed)).collect();
        let mut generator = Self {
            header,
            lengths,
            tokens,
            seed,
            weights,
            layers,
            experts,
            top_k,
            popularity,
            topic: vec![0.0; cells],
            slow: vec![0.0; cells],
            fast: vec![0.0; cells],
            coupling,
            random: Random(0),
            token: 0,
            begun: 0,
            position: 0,
            left: 0,
            logits: Vec::new(),
            before: Vec::new(),
        };
        generator.restart();
        generator
    }

    /// The same model with other weights, from its first token on.
    pub fn reweigh(&mut self, weights: Weights) {
        self.weights = weights;
        self.restart();
    }

    fn restart(&mut self) {
        self.random = Random(self.seed ^ 0x5eed_0f70_6163_6573);
        (self.token, self.begun, self.position, self.left) = (0, 0, 0, 0);
    }

    fn begin_sequence(&mut self) {
        for list in [&mut self.topic, &mut self.slow, &mut self.fast] {
            list.iter_mut().for_each(|value| *value = self.random.normal());
        }
    }

    /// Draws layer `layer` of the next token; `before` has the experts of the
    /// layer before.
    fn choose(&mut self, layer: usize) {
        let range = layer * self.experts..(layer + 1) * self.experts;
        let weights = self.weights;
        let [popularity, topic, slow, fast] =
            [weights.popularity, weights.topic, weights.slow, weights.fast].map(|w| w as f32);
        let (keep_slow, keep_fast) = ((1.0 - SLOW * SLOW).sqrt(), (1.0 - FAST * FAST).sqrt());
        self.logits.clear();
        for (expert, at) in range.enumerate() {
            let [new_slow, new_fast, noise] = self.random.normals();
            self.slow[at] = SLOW * self.slow[at] + keep_slow * new_slow;
            self.fast[at] = FAST * self.fast[at] + keep_fast * new_fast;
            let logit = popularity * self.popularity[at]
                + topic * self.topic[at]
                + slow * self.slow[at]
                + fast * self.fast[at]
                + noise;
            self.logits.push((logit, expert as u16));
        }
        let call = weights.coupling as f32 / (CELL * (self.top_k as f32).sqrt());
        for &from in &self.before {
            let start = (layer * self.experts + usize::from(from)) * self.experts;
            let cells = &self.coupling[start..start + self.experts];
            let pairs = self.logits.iter_mut().zip(cells);
            pairs.for_each(|(logit, &cell)| logit.0 += call * f32::from(cell));
        }
        let by_logit = |a: &(f32, u16), b: &(f32, u16)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if self.top_k < self.experts {
            self.logits.select_nth_unstable_by(self.top_k, by_logit);
        }
        self.logits.truncate(self.top_k);
        self.logits.sort_unstable_by(by_logit);
        self.before.clear();
        self.before.extend(self.logits.iter().map(|&(_, expert)| expert));
    }
}

impl Source for Generator {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        row.clear();
        if self.token == self.tokens {
            return Ok(false);
        }
        row.starts_sequence = self.left == 0;
        if row.starts_sequence {
            self.begin_sequence();
            (self.position, self.left) = (0, self.lengths[self.begun % self.lengths.len()]);
            self.begun += 1;
        }
        row.pass_tokens = 1;
        row.position = self.position;
        self.before.clear();
        for layer in 0..self.layers {
            self.choose(layer);
            row.push_layer(&self.before, &[]);
        }
        self.token += 1;
        self.position += 1;
        self.left -= 1;
        Ok(true)
    }

    fn tokens(&self) -> Option<u64> {
        Some(self.tokens)
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.restart();
        Ok(())
    }
}

/// How much each expert calls for each of the next layer,
/// `[experts, experts]`. Over all callers an expert is called for and against
/// alike: how popular it is must not come from here.
fn calls(experts: usize, random: &mut Random) -> Vec<i8> {
    // A cube has few large entries, as transitions have.
    let call = |z: f32| z * z * z * CELL / 3.9;
    let calls: Vec<f32> = (0..experts * experts).map(|_| call(random.normal())).collect();
    let mut means = vec![0.0; experts];
    for row in calls.chunks_exact(experts) {
        means.iter_mut().zip(row).for_each(|(mean, call)| *mean += call / experts as f32);
    }
    let centred = calls.iter().enumerate().map(|(at, call)| call - means[at % experts]);
    centred.map(|call| call.clamp(-127.0, 127.0) as i8).collect()
}

/// Numbers from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        split_mix(&mut self.0)
    }

    /// Nearly normal: the sum of four numbers of 16 bits, mean 0, variance 1.
    fn normal(&mut self) -> f32 {
        shaped(self.next(), 16)
    }

    /// Three, each the sum of three numbers of 7 bits.
    fn normals(&mut self) -> [f32; 3] {
        let bits = self.next();
        [0, 21, 42].map(|shift| {
            let part = bits >> shift;
            let sum = (part & 127) + (part >> 7 & 127) + (part >> 14 & 127);
            // Mean 190.5; the variance of one is (128 * 128 - 1) / 12.
            (sum as f32 - 190.5) / 64.0
        })
    }
}

fn shaped(bits: u64, width: u32) -> f32 {
    let mask = (1u64 << width) - 1;
    let sum: u64 = (0..4).map(|part| bits >> (part * width) & mask).sum();
    let (mean, one) = (2.0 * mask as f32, (mask + 1) as f32);
    (sum as f32 - mean) / (one / 3f32.sqrt())
}
