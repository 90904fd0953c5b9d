//! Readers of other programs' traces.

pub mod cache_eval;
pub mod csv;
pub mod jsonl;
pub mod responses;
pub mod rtrace;

mod passes;

use crate::Header;

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

impl Hints {
    /// For files that say everything: the model's name is replaced.
    ///
    /// # Errors
    /// A figure that is not the file's.
    pub(crate) fn apply(&self, header: &mut Header) -> Result<(), String> {
        same("layers", self.layers, header.shape.layers.len())?;
        for (_, layer) in header.shape.moe() {
            same("experts", self.experts, layer.experts)?;
            same("top-k", self.top_k, layer.top_k)?;
        }
        header.model = self.model.clone().unwrap_or_else(|| std::mem::take(&mut header.model));
        Ok(())
    }
}

/// # Errors
/// Something else was `said` than the file has.
fn same(option: &str, said: Option<usize>, has: usize) -> Result<(), String> {
    match said.filter(|&said| said != has) {
        Some(said) => Err(format!("--{option} says {said}, and the file has {has}")),
        None => Ok(()),
    }
}
