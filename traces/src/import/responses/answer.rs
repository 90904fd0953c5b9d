//! One choice of an answer.

use super::array::{Array, NONE};
use std::sync::Arc;

pub struct Answer {
    /// The prompt's, where it is an array of its own; shared by all choices.
    pub before: Option<Arc<Array>>,
    pub routed: Array,
    /// How many of the tokens were read as a prompt.
    pub prompt: usize,
    /// Of the prompt, from the sequence's start, and of what was answered;
    /// both empty where they are not said.
    pub prompt_ids: Arc<[u32]>,
    pub answer_ids: Vec<u32>,
}

impl Answer {
    /// Layers and top-k.
    pub fn shape(&self) -> (usize, usize) {
        (self.routed.layers, self.routed.top_k)
    }

    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.before.as_deref().into_iter().chain([&self.routed])
    }

    pub fn tokens(&self) -> usize {
        self.arrays().map(|array| array.tokens).sum()
    }

    /// Counted from the sequence's start, which may have been left out.
    pub fn position(&self, token: usize) -> u32 {
        u32::try_from(self.start() + token).unwrap_or(u32::MAX)
    }

    fn start(&self) -> usize {
        self.before.as_ref().map_or(self.routed.start, |before| before.start)
    }

    pub fn token_id(&self, token: usize) -> Option<u32> {
        let place = self.start() + token;
        let answered = || self.answer_ids.get(place.checked_sub(self.prompt_ids.len())?);
        self.prompt_ids.get(place).or_else(answered).copied()
    }

    /// Whether the ids reach to the last token; others belong to something
    /// else.
    pub fn has_all_ids(&self) -> bool {
        self.prompt_ids.len() + self.answer_ids.len() >= self.start() + self.tokens()
    }

    /// What the router chose; nothing for a layer that was not computed.
    pub fn experts(&self, token: usize, layer: usize, experts: &mut Vec<u16>) {
        let ids = self.ids(token, layer);
        if !is_blank(ids) {
            experts.extend(ids.iter().filter(|&&id| id != NONE));
        }
    }

    fn ids(&self, token: usize, layer: usize) -> &[u16] {
        let before = self.before.as_ref().map_or(0, |before| before.tokens);
        match (&self.before, token.checked_sub(before)) {
            (Some(before), None) => before.ids(token, layer),
            (_, token) => self.routed.ids(token.unwrap_or(0), layer),
        }
    }

    /// # Errors
    /// Says where an expert was chosen twice: no router does, so the numbers
    /// were cut into the wrong rows.
    pub fn check(&self) -> Result<(), String> {
        let mut sorted = Vec::new();
        let (layers, _) = self.shape();
        for (token, layer) in (0..self.tokens()).flat_map(|t| (0..layers).map(move |l| (t, l))) {
            sorted.clear();
            self.experts(token, layer, &mut sorted);
            sorted.sort_unstable();
            if let Some(two) = sorted.windows(2).find(|two| two[0] == two[1]) {
                return Err(format!(
                    "token {token}, layer {layer} has expert {} twice: is that the model's number \
                     of layers and top-k? (--layers counts dense ones too)",
                    two[0]
                ));
            }
        }
        Ok(())
    }
}

/// All zero: nothing was written there, as no router says 0 twice.
fn is_blank(ids: &[u16]) -> bool {
    ids.len() > 1 && ids.iter().all(|&id| id == 0)
}
