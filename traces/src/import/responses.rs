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
//! ids are all zero in every token is a dense one that vLLM fills up. A file is
//! one answer, an array of answers, or one a line.

mod array;

use super::Hints;
use crate::{Header, Provenance, Row, Source, TraceError};
use array::Array;
use pregate_predictor::{LayerShape, Shape};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Answers are read whole; JSON takes a multiple of this in memory.
const MAX_BYTES: u64 = 256 << 20;
const MAX_LAYERS: usize = 4096;

/// Answers in memory.
pub struct Responses {
    header: Header,
    answers: Vec<Answer>,
    /// Which layers have experts.
    is_moe: Vec<bool>,
    /// The next answer and token.
    next: (usize, usize),
}

struct Answer {
    routed: Array,
    /// How many of the tokens were read as a prompt.
    prompt: usize,
    /// Of all tokens; empty where they are not said.
    ids: Vec<u32>,
}

/// # Errors
/// A file that cannot be read, is no JSON, or has no routed experts in it;
/// arrays that are none.
pub fn open(path: &Path, hints: &Hints) -> Result<Responses, TraceError> {
    let io = |source| TraceError::io(path, source);
    let file = File::open(path).map_err(io)?;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(io)?;
    let wrong = |what: String| TraceError::format(path, 0, what);
    if text.len() as u64 > MAX_BYTES {
        return Err(wrong("more than 256 MiB of answers; split the file".into()));
    }
    let mut answers = Vec::new();
    for (index, value) in serde_json::Deserializer::from_str(&text).into_iter().enumerate() {
        let value: Value = value.map_err(|error| {
            TraceError::format(path, error.line() as u64, format!("no JSON: {error}"))
        })?;
        let list = match value {
            Value::Array(list) => list,
            value => vec![value],
        };
        for answer in &list {
            read_answer(answer, hints, &mut answers)
                .map_err(|what| wrong(format!("answer {index}: {what}")))?;
        }
    }
    Responses::new(answers, hints).map_err(wrong)
}

/// Finds the arrays of one answer.
fn read_answer(value: &Value, hints: &Hints, answers: &mut Vec<Answer>) -> Result<(), String> {
    let array = |value: &Value| match value {
        Value::Null => Ok(None),
        value => Array::of(value, hints).map(Some),
    };
    let before = array(&value["prompt_routed_experts"])?;
    let usage = |value: &Value| value["prompt_tokens"].as_u64().map(|count| count as usize);
    let prompt = usage(&value["usage"]).or_else(|| usage(&value["meta_info"]));
    let prompt_ids = ids(&value["prompt_token_ids"]);
    let choices = value["choices"].as_array().map(Vec::as_slice).unwrap_or_default();
    let whole = [value].into_iter().filter(|_| choices.is_empty());
    for choice in choices.iter().chain(whole) {
        let places = [
            &choice["routed_experts"],
            &choice["sgl_ext"]["routed_experts"],
            &choice["meta_info"]["routed_experts"],
        ];
        let Some(place) = places.into_iter().find(|place| !place.is_null()) else { continue };
        let mut routed = Array::of(place, hints)?;
        let mut prompt = prompt.unwrap_or(0).saturating_sub(routed.start);
        if let Some(before) = &before {
            routed = before.followed_by(&routed)?;
            prompt = before.tokens;
        }
        let mut all = prompt_ids.get(routed.start..).unwrap_or_default().to_vec();
        let answered = [&choice["token_ids"], &choice["output_ids"]].into_iter().map(ids);
        all.extend(answered.flatten());
        // Ids that do not reach to the end belong to something else.
        let all = if all.len() >= routed.tokens { all } else { Vec::new() };
        answers.push(Answer { prompt: prompt.min(routed.tokens), routed, ids: all });
    }
    Ok(())
}

fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    value.as_array().and_then(|list| list.iter().map(id).collect()).unwrap_or_default()
}

impl Responses {
    fn new(answers: Vec<Answer>, hints: &Hints) -> Result<Self, String> {
        let first = answers.first().ok_or("no routed_experts in it")?;
        let (layers, top_k) = (first.routed.layers, first.routed.top_k);
        if !(1..=MAX_LAYERS).contains(&layers) || top_k == 0 {
            return Err(format!("{layers} layers and top-{top_k}; {MAX_LAYERS} layers at most"));
        }
        let mut is_moe = vec![false; layers];
        let mut largest = 0;
        for answer in &answers {
            let Array { layers: own, top_k: own_k, ids, .. } = &answer.routed;
            if (*own, *own_k) != (layers, top_k) {
                return Err(format!("answers of {layers} and of {own} layers, or of two top-k"));
            }
            for (index, id) in ids.iter().enumerate() {
                is_moe[index / top_k % layers] |= *id != 0;
                largest = largest.max(*id);
            }
        }
        let chosen = usize::try_from(largest).unwrap_or(0) + 1;
        let experts = hints.experts.unwrap_or(chosen);
        if experts < chosen || top_k > experts || experts > 1 << 16 {
            return Err(format!(
                "{experts} experts, top-{top_k}, and expert {largest} was chosen; --experts says \
                 what a file does not"
            ));
        }
        let layer = LayerShape { experts, top_k, expert_bytes: 0, class: 0 };
        let shape = Shape { layers: is_moe.iter().map(|is_moe| is_moe.then_some(layer)).collect() };
        let source = Provenance::Imported { format: "routed_experts".into() };
        let model = hints.model.clone().unwrap_or_default();
        let header = Header { model, fingerprint: None, shape, source };
        Ok(Self { header, answers, is_moe, next: (0, 0) })
    }
}

impl Source for Responses {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        row.clear();
        while self
            .answers
            .get(self.next.0)
            .is_some_and(|answer| answer.routed.tokens == self.next.1)
        {
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
        row.position = token as u32;
        row.token = answer.ids.get(token).copied();
        let mut experts = Vec::new();
        for layer in 0..self.is_moe.len() {
            experts.clear();
            let ids = answer.routed.ids(token, layer).iter().filter(|_| self.is_moe[layer]);
            // -1 and the like are places that nothing was written to.
            for id in ids.filter_map(|&id| u16::try_from(id).ok()) {
                if experts.contains(&id) {
                    // All zero: a token that was not computed here.
                    experts.clear();
                    break;
                }
                experts.push(id);
            }
            row.push_layer(&experts, &[]);
        }
        self.next.1 += 1;
        Ok(true)
    }

    fn tokens(&self) -> Option<u64> {
        Some(self.answers.iter().map(|answer| answer.routed.tokens as u64).sum())
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.next = (0, 0);
        Ok(())
    }
}
