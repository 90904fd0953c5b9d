//! Traces in memory, as training wants them.

use crate::random::split_mix;
use crate::{Header, Row, Sequence, Source, TraceError};
use pregate_predictor::{LayerShape, Shape};

/// An expert that was not recorded.
const NONE: u16 = u16::MAX;

/// Longer sequences are cut, so that some of a single one can be held out.
const LONGEST: u64 = 2048;

/// The tokens of one or more traces of one model.
pub struct Corpus {
    pub header: Header,
    /// Experts of a token, all layers.
    stride: usize,
    /// `[layers]`: where a layer's experts begin in a token's.
    starts: Vec<usize>,
    /// `[tokens][stride]`, rank order, filled up with `NONE`.
    experts: Vec<u16>,
    /// As `experts`; empty where a trace has none.
    weights: Vec<f32>,
    /// `[tokens]`.
    pub ids: Vec<Option<u32>>,
    /// Runs of tokens that belong together, with what is known of them.
    pub sequences: Vec<Sequence>,
}

impl Corpus {
    pub fn new(header: Header) -> Self {
        let mut stride = 0;
        let starts = header.shape.layers.iter().map(|layer| {
            let start = stride;
            stride += layer.as_ref().map_or(0, |layer| layer.top_k);
            start
        });
        let starts = starts.collect();
        let (experts, weights, ids, sequences) = Default::default();
        Self { header, stride, starts, experts, weights, ids, sequences }
    }

    /// What makes a trace with this header another model's.
    pub fn differs(&self, header: &Header) -> Option<String> {
        let both = self.header.fingerprint.zip(header.fingerprint);
        match both.is_some_and(|(here, there)| here != there) {
            true => Some("it was recorded with another model than the traces before".to_string()),
            false => self.differs_in_shape(&header.shape),
        }
    }

    /// What makes `shape` another model's.
    pub fn differs_in_shape(&self, shape: &Shape) -> Option<String> {
        let (here, there) = (self.shape().layers.len(), shape.layers.len());
        if here != there {
            return Some(format!("it has {there} layers, the traces have {here}"));
        }
        let of = |layer: &Option<LayerShape>| layer.as_ref().map(|l| (l.experts, l.top_k));
        let mut pairs = self.shape().layers.iter().zip(&shape.layers);
        let layer = pairs.position(|(here, there)| of(here) != of(there))?;
        let words = |shape: &Shape| match of(&shape.layers[layer]) {
            Some((experts, top_k)) => format!("top-{top_k} of {experts} experts"),
            None => "no experts".to_string(),
        };
        let (here, there) = (words(self.shape()), words(shape));
        Some(format!("its layer {layer} has {there}, the traces' has {here}"))
    }

    /// Adds a trace of the corpus's model (see [`Corpus::differs`]), at most up
    /// to `limit` tokens in all; whether all of it had room. A layer that used
    /// more experts than the shape says counts with the first ones. The first
    /// fingerprint is the corpus's.
    ///
    /// # Errors
    /// What the source says.
    pub fn add(&mut self, source: &mut dyn Source, limit: usize) -> Result<bool, TraceError> {
        self.header.fingerprint = self.header.fingerprint.or(source.header().fingerprint);
        let labels = source.sequences().to_vec();
        let mut labels = labels.into_iter().peekable();
        let mut row = Row::default();
        let mut token = 0u64;
        while self.ids.len() < limit && source.next(&mut row)? {
            let length = self.sequences.last().map_or(0, |sequence| sequence.tokens);
            if row.starts_sequence || token == 0 || length == LONGEST {
                while labels.next_if(|label| label.start < token).is_some() {}
                let label = labels.next_if(|label| label.start == token);
                let before = self.sequences.last().filter(|_| !row.starts_sequence && token > 0);
                let label = label.or_else(|| before.cloned()).unwrap_or_default();
                let start = self.ids.len() as u64;
                self.sequences.push(Sequence { start, tokens: 0, ..label });
            }
            self.push(&row);
            token += 1;
        }
        // One more row is read to know.
        Ok(self.ids.len() < limit || !source.next(&mut row)?)
    }

    fn push(&mut self, row: &Row) {
        let base = self.experts.len();
        self.experts.resize(base + self.stride, NONE);
        self.weights.resize(base + self.stride, 0.0);
        for (layer, &start) in self.starts.iter().enumerate().take(row.layers()) {
            let room = self.top_k(layer);
            let to = &mut self.experts[base + start..base + start + room];
            to.iter_mut().zip(row.experts(layer)).for_each(|(to, &expert)| *to = expert);
            let to = &mut self.weights[base + start..base + start + room];
            to.iter_mut().zip(row.weights(layer)).for_each(|(to, &weight)| *to = weight);
        }
        self.ids.push(row.token);
        if let Some(sequence) = self.sequences.last_mut() {
            sequence.tokens += 1;
        }
    }

    pub fn shape(&self) -> &Shape {
        &self.header.shape
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// The tokens of a sequence.
    pub fn range(&self, sequence: usize) -> std::ops::Range<usize> {
        let sequence = &self.sequences[sequence];
        sequence.start as usize..(sequence.start + sequence.tokens) as usize
    }

    fn top_k(&self, layer: usize) -> usize {
        self.shape().layer(layer).map_or(0, |layer| layer.top_k)
    }

    /// The experts of `token` in `layer`, rank order.
    pub fn experts(&self, token: usize, layer: usize) -> &[u16] {
        let start = token * self.stride + self.starts[layer];
        let experts = &self.experts[start..start + self.top_k(layer)];
        &experts[..experts.iter().position(|&expert| expert == NONE).unwrap_or(experts.len())]
    }

    /// `token` as a row, without weights.
    pub fn row(&self, token: usize) -> Row {
        let mut row = Row::default();
        (row.token, row.pass_tokens) = (self.ids[token], 1);
        (0..self.starts.len()).for_each(|layer| row.push_layer(self.experts(token, layer), &[]));
        row
    }

    /// Their weights; all zero where none were recorded.
    pub fn weights(&self, token: usize, layer: usize) -> &[f32] {
        let start = token * self.stride + self.starts[layer];
        &self.weights[start..start + self.experts(token, layer).len()]
    }
}

/// Numbers from a seed.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        split_mix(&mut self.0)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (((self.bits() >> 32) * limit as u64) >> 32) as usize
    }

    /// In 0..1.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 24) as f32
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
}
