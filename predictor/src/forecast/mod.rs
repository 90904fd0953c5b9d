//! Forecasts: which experts will a layer ask for? All stand behind one trait
//! and are observed with one ledger. A forecast changes timing, never tokens.

mod blend;
mod catalogue;
pub(crate) mod fast;
mod forecaster;
mod guard;
pub mod hostile;
pub mod learned;
mod marginal;
mod pairs;
mod recency;
mod select;
mod token;
mod transition;

pub use catalogue::{LEARNED, LEARNED_USEFUL, NAMES, USEFUL, by_name, learned as learned_by_name};
pub use forecaster::{Forecaster, HORIZON, MAX_HORIZON, Options};
pub use guard::Fault;
pub use recency::{Frequency, PreviousToken};
pub use token::TokenMemory;
pub use transition::{NaiveBayes, Transition};

/// One way to guess. Implementations are deterministic and bounded in memory.
pub trait Forecast: Send {
    /// Its name in the ledger and on the command line.
    fn name(&self) -> &'static str;

    /// Fills `scores[experts]` for the next time that layer `target` runs:
    /// higher is likelier, all finite. Scores are comparable inside one call;
    /// their scale should be alike between calls. `false`: nothing to say,
    /// and `scores` may hold anything.
    fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool;

    /// The truth: layer `layer` asked for `experts` (rank order, distinct, all
    /// below the layer's number of experts) with `weights` (as many). Called
    /// once per token and layer, layers in ascending order.
    fn routed(&mut self, layer: usize, experts: &[u32], weights: &[f32]);

    /// A new token enters layer 0.
    fn begin_token(&mut self, token: u32);

    /// The next token has nothing to do with the last one.
    fn new_sequence(&mut self);

    /// Whether what it says of a layer ahead stays the same until that layer
    /// runs, or another token begins. Then it need not be asked twice.
    fn is_steady(&self) -> bool {
        false
    }

    /// Bytes that it holds.
    fn memory_bytes(&self) -> usize {
        0
    }
}

/// What is known when a forecast is asked.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The token that will reach the target layer; `None` if it is the next
    /// token, which is not sampled yet.
    pub token: Option<u32>,
    /// The experts of that token's layers so far, `[layers]`, rank order;
    /// empty where the layer is dense or was not routed yet.
    pub routed: &'a [Vec<u32>],
}

/// Scores that the runtime computed: a router applied to another state.
#[derive(Clone, Copy, Debug)]
pub struct External<'a> {
    pub source: Source,
    /// The layer whose router answered.
    pub target: usize,
    /// `[experts]`: what the router selects by (with its selection bias, if
    /// it has one), before the softmax.
    pub logits: &'a [f32],
}

/// Which state the router was applied to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The hidden state `ahead` MoE layers before the target, as [`Options::horizon`] counts.
    StaleGate { ahead: u8 },
    /// The same plus the output of that layer's shared expert.
    StaleGateShared { ahead: u8 },
    /// The target's own input before its attention.
    OwnGateBeforeAttention,
    /// The control: the very state that the router will see. It is judged,
    /// and never used.
    ZeroStaleness,
}

impl Source {
    /// Kinds of sources.
    pub const KINDS: usize = 4;

    /// The kind, whatever the distance: `0..KINDS`.
    pub fn kind(self) -> usize {
        match self {
            Source::StaleGate { .. } => 0,
            Source::StaleGateShared { .. } => 1,
            Source::OwnGateBeforeAttention => 2,
            Source::ZeroStaleness => 3,
        }
    }

    /// The name of a kind in the ledger.
    pub fn kind_name(kind: usize) -> &'static str {
        ["stale-gate", "stale-gate-shared", "own-gate", "control"][kind]
    }
}
