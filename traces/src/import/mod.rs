//! Readers of other programs' traces.

pub mod csv;
pub mod responses;
pub mod rtrace;

mod passes;

/// What a file of another program may not say.
#[derive(Clone, Debug, Default)]
pub struct Hints {
    pub model: Option<String>,
    /// MoE layers, where their number is not in the file.
    pub layers: Option<usize>,
    /// Of every layer; else one more than the largest that was chosen.
    pub experts: Option<usize>,
    pub top_k: Option<usize>,
}
