//! "Returned routed experts" in the JSON answers of vLLM and SGLang.
//!
//! - vLLM with `--enable-return-routed-experts`: `choices[i].routed_experts`
//!   is base64 of an `.npy` file, `[tokens - 1, layers, top_k]`, u8 or u16,
//!   prompt included (vllm-project/vllm, `entrypoints/openai/completion/
//!   protocol.py`; pull requests 28284, 44638). Older builds gave lists, the
//!   prompt's in `prompt_routed_experts` beside `choices`.
//! - SGLang with `--enable-return-routed-experts`: base64 of little-endian
//!   i32, flat `[tokens, layers, top_k]`, in `meta_info.routed_experts` or
//!   `choices[i].sgl_ext.routed_experts` (docs.sglang.io, "Returning Routed
//!   Experts"; pull requests 12162, 17434). It does not say its shape:
//!   [`super::Hints`] must.
//! - NVIDIA Dynamo: `{"data": base64, "shape", "dtype", "start"}`
//!   (ai-dynamo/dynamo, pull request 10529).
//!
//! The last token of an answer was never fed, so it has no row. A layer whose
//! ids are all zero in every token is a dense one that vLLM fills up; one whose
//! ids are all zero in some tokens was not computed for those. A file is one
//! answer, an array of answers, or one a line. Choices share their prompt's
//! array.

mod answer;
mod array;
mod read;

use super::{Hints, MAX_JSON};
use crate::limits;
use crate::{Header, Provenance, Row, Source, TraceError};
use answer::Answer;
use array::NONE;
use pregate_predictor::{LayerShape, Shape};
use serde::de::DeserializeSeed;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Answers in memory.
pub struct Responses {
    header: Header,
    answers: Vec<Answer>,
    /// Which layers have experts.
    is_moe: Vec<bool>,
    /// The next answer and token.
    next: (usize, usize),
    /// Scratch.
    experts: Vec<u16>,
}

/// # Errors
/// A file that cannot be read, is no JSON, or has no routed experts in it;
/// arrays that are none.
pub fn open(path: &Path, hints: &Hints) -> Result<Responses, TraceError> {
    let io = |source| TraceError::io(path, source);
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(io)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        TraceError::byte(path, error.utf8_error().valid_up_to() as u64, "not UTF-8, as JSON is")
    })?;
    if text.len() as u64 > MAX_JSON {
        return Err(TraceError::whole(path, "more than 256 MiB of answers; split the file"));
    }
    let mut found = read::Found::new(hints);
    let mut values = serde_json::Deserializer::from_str(&text);
    while !matches!(values.end(), Ok(())) {
        let line = |error: serde_json::Error, answer| {
            let what = match error.is_data() {
                true => format!("answer {answer}: {error}"),
                false => format!("no JSON: {error}"),
            };
            TraceError::line(path, error.line() as u64, what)
        };
        let read = read::Value { found: &mut found }.deserialize(&mut values);
        read.map_err(|error| line(error, found.seen))?;
    }
    Responses::new(found.answers, hints).map_err(|what| TraceError::whole(path, what))
}

impl Responses {
    fn new(answers: Vec<Answer>, hints: &Hints) -> Result<Self, String> {
        let first = answers.first().ok_or("no routed_experts in it")?;
        let (layers, top_k) = first.shape();
        if !(1..=limits::MAX_LAYERS).contains(&layers) {
            return Err(format!("{layers} layers; {} are allowed", limits::MAX_LAYERS));
        }
        let said = (hints.layers.unwrap_or(layers), hints.top_k.unwrap_or(top_k));
        if said != (layers, top_k) {
            let (said_layers, said_top_k) = said;
            return Err(format!(
                "{layers} layers and top-{top_k} in it, and --layers and --top-k say {said_layers} \
                 and {said_top_k}; --layers counts all layers of the model"
            ));
        }
        let mut is_moe = vec![false; layers];
        let mut largest = 0;
        for answer in &answers {
            let (own, own_top_k) = answer.shape();
            if (own, own_top_k) != (layers, top_k) {
                return Err(format!(
                    "an answer of {layers} layers and top-{top_k}, and one of {own} and \
                     top-{own_top_k}"
                ));
            }
            for ids in answer.arrays().map(|array| &array.ids) {
                for (index, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NONE) {
                    is_moe[index / top_k % layers] |= id != 0;
                    largest = largest.max(id);
                }
            }
        }
        let chosen = usize::from(largest) + 1;
        let experts = hints.experts.unwrap_or(chosen.max(top_k));
        if experts < chosen {
            return Err(format!(
                "{experts} experts, top-{top_k}, and expert {largest} was chosen; --experts of \
                 pregate trace import says what a file does not"
            ));
        }
        let layer = LayerShape { experts, top_k, expert_bytes: 0, class: 0 };
        let shape = Shape { layers: is_moe.iter().map(|is_moe| is_moe.then_some(layer)).collect() };
        limits::check(&shape)?;
        let source = Provenance::Imported { format: "routed_experts".into() };
        let model = hints.model.clone().unwrap_or_default();
        let header = Header { model, fingerprint: None, shape, source };
        Ok(Self { header, answers, is_moe, next: (0, 0), experts: Vec::new() })
    }
}

impl Source for Responses {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        row.clear();
        while self.answers.get(self.next.0).is_some_and(|answer| answer.tokens() == self.next.1) {
            self.next = (self.next.0 + 1, 0);
        }
        let (index, token) = self.next;
        let Some(answer) = self.answers.get(index) else { return Ok(false) };
        row.starts_sequence = token == 0;
        row.is_prompt = token < answer.prompt;
        row.pass_tokens = match token {
            0 if answer.prompt > 0 => answer.prompt as u32,
            _ => u32::from(!row.is_prompt),
        };
        row.position = answer.position(token);
        row.token = answer.token_id(token);
        for layer in 0..self.is_moe.len() {
            self.experts.clear();
            if self.is_moe[layer] {
                answer.experts(token, layer, &mut self.experts);
            }
            row.push_layer(&self.experts, &[]);
        }
        self.next.1 += 1;
        Ok(true)
    }

    fn tokens(&self) -> Option<u64> {
        Some(self.answers.iter().map(|answer| answer.tokens() as u64).sum())
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.next = (0, 0);
        Ok(())
    }
}
