//! Rows of a file that names its choices one by one, in the order in which
//! they were made: a token at a time, or a chunk of a prompt layer by layer.

use crate::Row;
use std::collections::HashMap;

/// Choices of one pass at most; 16 MiB of them.
const MOST: usize = 1 << 20;

/// One choice of a router.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Tells the tokens of a pass apart; `None` where the file does not, and
    /// then every `top_k` choices of a layer are a token's.
    pub token: Option<u64>,
    pub layer: u32,
    /// The order among those of the token and layer.
    pub rank: u64,
    pub expert: u16,
    pub weight: Option<f32>,
    /// Of the token.
    pub token_id: Option<u32>,
}

/// The choices between two decreases of the layer.
#[derive(Default)]
pub struct Pass {
    choices: Vec<Choice>,
    /// Token of the pass, and index into `choices`; sorted.
    order: Vec<(usize, usize)>,
    /// Of each token, where it begins in `order`.
    starts: Vec<usize>,
    owners: HashMap<u64, usize>,
}

impl Pass {
    pub fn is_empty(&self) -> bool {
        self.choices.is_empty()
    }

    /// Choices.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// Does `choice` begin another pass? Models with one MoE layer have a
    /// pass a token.
    pub fn ends_before(&self, choice: &Choice, has_one_layer: bool) -> bool {
        self.choices.last().is_some_and(|last| {
            choice.layer < last.layer || (has_one_layer && choice.token != last.token)
        })
    }

    pub fn push(&mut self, choice: Choice) -> Result<(), String> {
        if self.choices.len() == MOST {
            return Err(format!("more than {MOST} choices before the layers begin again"));
        }
        self.choices.push(choice);
        Ok(())
    }

    /// The number of tokens; they come in the order in which they were named.
    pub fn tokens(&mut self, top_k: usize) -> usize {
        self.owners.clear();
        self.order.clear();
        let mut layer = None;
        let mut within = 0;
        for (index, choice) in self.choices.iter().enumerate() {
            if layer.replace(choice.layer) != Some(choice.layer) {
                within = 0;
            }
            let key = choice.token.unwrap_or((within / top_k) as u64);
            within += 1;
            let next = self.owners.len();
            self.order.push((*self.owners.entry(key).or_insert(next), index));
        }
        let choices = &self.choices;
        self.order
            .sort_by_key(|&(owner, index)| (owner, choices[index].layer, choices[index].rank));
        let is_first = |at: &usize| *at == 0 || self.order[*at].0 != self.order[*at - 1].0;
        self.starts.clear();
        self.starts.extend((0..self.order.len()).filter(is_first));
        self.starts.len()
    }

    /// Fills `row` with the id and the experts of token `token` of
    /// [`Self::tokens`], for a model of `layers` layers.
    ///
    /// # Errors
    /// An expert twice in a layer; weights of some experts and not of others.
    pub fn fill(&self, token: usize, layers: usize, row: &mut Row) -> Result<(), String> {
        let end = self.starts.get(token + 1).copied().unwrap_or(self.order.len());
        let own = self.order[self.starts[token]..end].iter().map(|&(_, at)| &self.choices[at]);
        row.token = own.clone().find_map(|choice| choice.token_id);
        let has_weights = own.clone().any(|choice| choice.weight.is_some());
        let (mut experts, mut weights) = (Vec::new(), Vec::new());
        let mut next = own.peekable();
        for layer in 0..layers as u32 {
            experts.clear();
            weights.clear();
            while let Some(choice) = next.next_if(|choice| choice.layer == layer) {
                if experts.contains(&choice.expert) {
                    let expert = choice.expert;
                    return Err(format!("layer {layer}: expert {expert} twice for a token"));
                }
                if has_weights && choice.weight.is_none() {
                    let expert = choice.expert;
                    return Err(format!(
                        "layer {layer}: expert {expert} has no weight, and others of its token have"
                    ));
                }
                experts.push(choice.expert);
                weights.extend(choice.weight);
            }
            row.push_layer(&experts, &weights);
        }
        Ok(())
    }

    pub fn clear(&mut self) {
        self.choices.clear();
    }
}
