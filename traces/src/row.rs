//! What a trace holds, whatever file it came from: a header, and one row per
//! token.

use crate::format::Dropped;
use pregate_predictor::{Origin, Shape};
use serde::{Deserialize, Serialize};

/// What is known about all tokens of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The name of the model; empty if nobody said.
    pub model: String,
    /// A digest of what makes routing and forecasts fit a model (see
    /// `pregate-runtime`); `None` in traces of other programs.
    pub fingerprint: Option<[u8; 32]>,
    /// Layers, experts, top-k, and bytes of an expert; 0 bytes where a trace of
    /// another program does not say.
    pub shape: Shape,
    pub source: Provenance,
}

/// How a trace came to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provenance {
    /// Routers of a model answered, here.
    #[default]
    Recorded,
    /// Read from a file of this format of another program.
    Imported { format: String },
    /// Made up after the statistics of a real trace. Every report says so.
    Synthetic { from: String, seed: u64 },
}

/// What a file says about a run of tokens that belong together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sequence {
    /// The first token, counted over the trace.
    pub start: u64,
    pub tokens: u64,
    /// Where the text came from; empty if the file does not say.
    #[serde(default)]
    pub dataset: String,
    #[serde(default)]
    pub category: String,
    /// The source calls it a degenerate loop.
    #[serde(default)]
    pub is_repetitive: bool,
}

/// What routers chose for one token, layer by layer, and what that cost.
///
/// A reader fills the same row again and again; nothing is allocated for a
/// token once the largest has been seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// What follows has nothing to do with the rows before.
    pub starts_sequence: bool,
    /// Of the first token of a pass: how many tokens went through the layers
    /// together. 0 for the others of a chunk; 1 for a token that went alone.
    pub pass_tokens: u32,
    /// The pass is a prompt's (or a chunk of one).
    pub is_prompt: bool,
    /// Counted from the start of the sequence.
    pub position: u32,
    /// What was fed; ids of one trace are comparable with each other.
    pub token: Option<u32>,
    /// Per layer of the model, where its experts end in `experts`; a dense
    /// layer, or one of which nothing was recorded, has none.
    ends: Vec<u32>,
    /// In rank order, distinct in a layer.
    experts: Vec<u16>,
    /// As `experts`; empty where no weights were recorded.
    weights: Vec<f32>,
    /// What the pass that starts here cost, per MoE layer in ascending order;
    /// empty where it was not recorded, and for the others of a chunk.
    pub served: Vec<LayerServed>,
}

/// What one layer's experts cost in one pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerServed {
    pub layer: u32,
    /// Distinct experts of the pass, with where they were.
    pub origins: Vec<(u16, Origin)>,
    /// That left a slot for one of them.
    pub evictions: u32,
    /// That arrived meanwhile, for this layer or ahead.
    pub bytes: u64,
    pub stall_ns: u64,
}

impl Row {
    /// Empties the row, keeping its memory.
    pub fn clear(&mut self) {
        let Self { ends, experts, weights, served, .. } = std::mem::take(self);
        *self = Self { ends, experts, weights, served, ..Self::default() };
        self.ends.clear();
        self.experts.clear();
        self.weights.clear();
        self.served.clear();
    }

    /// The next layer: `experts` in rank order, with as many `weights` or none
    /// in the whole row.
    pub fn push_layer(&mut self, experts: &[u16], weights: &[f32]) {
        debug_assert!(weights.is_empty() || weights.len() == experts.len());
        self.experts.extend_from_slice(experts);
        self.weights.extend_from_slice(weights);
        let end = u32::try_from(self.experts.len()).expect("a token has less than 2^32 experts");
        self.ends.push(end);
    }

    /// Layers that were pushed.
    pub fn layers(&self) -> usize {
        self.ends.len()
    }

    /// The experts of a layer, in rank order.
    pub fn experts(&self, layer: usize) -> &[u16] {
        &self.experts[self.range(layer)]
    }

    /// The weights of a layer; none where they were not recorded.
    pub fn weights(&self, layer: usize) -> &[f32] {
        match self.weights.is_empty() {
            true => &[],
            false => &self.weights[self.range(layer)],
        }
    }

    fn range(&self, layer: usize) -> std::ops::Range<usize> {
        let start = layer.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        start..self.ends[layer] as usize
    }
}

/// A trace, read from front to back.
pub trait Source {
    fn header(&self) -> &Header;

    /// Fills `row` with the next token; `false` behind the last one, and then
    /// the row is empty. Every row keeps to the header: it has as many layers,
    /// experts below the layer's number and distinct, at most `u16::MAX`
    /// layers.
    ///
    /// # Errors
    /// A file that cannot be read, or breaks its format.
    fn next(&mut self, row: &mut Row) -> Result<bool, crate::TraceError>;

    /// Tokens of the trace, where the format says so beforehand.
    fn tokens(&self) -> Option<u64> {
        None
    }

    /// The sequences with their labels, in order; empty where the format has
    /// no labels or cannot say beforehand.
    fn sequences(&self) -> &[Sequence] {
        &[]
    }

    /// What a report should say about the rows that were read so far: a file
    /// that was cut off, passes that are missing.
    fn notice(&self) -> Option<String> {
        None
    }

    /// What is missing before and behind the rows that were read so far, since
    /// the beginning. What is missing right before a row counts with it.
    fn dropped(&self) -> Dropped {
        Dropped::default()
    }

    /// May the last pass have fewer tokens than it says, since the file was
    /// cut off?
    fn may_end_within_pass(&self) -> bool {
        false
    }

    /// Compares the files with the digests that came with them, if any did;
    /// reads all of them then.
    ///
    /// # Errors
    /// A file that cannot be read, or has another digest.
    fn verify(&self) -> Result<(), crate::TraceError> {
        Ok(())
    }

    /// Begins again.
    ///
    /// # Errors
    /// A file that cannot be read.
    fn rewind(&mut self) -> Result<(), crate::TraceError>;
}
