//! Readers of other programs' traces.

pub mod cache_eval;
pub mod csv;
pub mod jsonl;
pub mod responses;
pub mod rtrace;

mod passes;

/// Bytes of a JSON file that is read whole.
pub(crate) const MAX_JSON: u64 = 256 << 20;

/// What a file of another program may not say.
#[derive(Clone, Debug, Default)]
pub struct Hints {
    pub model: Option<String>,
    /// Of the model, dense ones too, where their number is not in the file. A
    /// file that says another is refused.
    pub layers: Option<usize>,
    /// Of every layer; else one more than the largest that was chosen.
    pub experts: Option<usize>,
    pub top_k: Option<usize>,
}
