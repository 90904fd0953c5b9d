//! Finds the arrays in the JSON of answers while it is parsed: what is not
//! asked for is never held, so that a file takes no more than a few times its
//! size in memory, whatever is in it.

use super::answer::Answer;
use super::array::{Array, Routed};
use crate::import::Hints;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::sync::Arc;

/// Choices with experts, in a file and in an answer.
const MAX_CHOICES: usize = 1 << 18;

/// What was read so far.
pub struct Found<'h> {
    hints: &'h Hints,
    pub answers: Vec<Answer>,
    /// Answers, with and without experts.
    pub seen: u64,
}

impl<'h> Found<'h> {
    pub fn new(hints: &'h Hints) -> Self {
        Self { hints, answers: Vec::new(), seen: 0 }
    }
}

/// An answer, and a choice in it: some servers put all in the answer.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields {
    prompt_routed_experts: Option<Routed>,
    routed_experts: Option<Routed>,
    sgl_ext: Option<Extension>,
    meta_info: Option<Extension>,
    usage: Option<Usage>,
    prompt_token_ids: Option<Vec<u32>>,
    token_ids: Option<Vec<u32>>,
    output_ids: Option<Vec<u32>>,
    choices: Option<Choices>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Extension {
    routed_experts: Option<Routed>,
    prompt_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: Option<usize>,
}

/// Those that have experts; of the others only that they are there.
#[derive(Default)]
struct Choices {
    are_there: bool,
    kept: Vec<Fields>,
}

impl Fields {
    fn take_routed(&mut self) -> Option<Routed> {
        let of = |extension: &mut Option<Extension>| extension.as_mut()?.routed_experts.take();
        let own = self.routed_experts.take();
        own.or_else(|| of(&mut self.sgl_ext)).or_else(|| of(&mut self.meta_info))
    }

    fn has_routed(&self) -> bool {
        let of = |extension: &Option<Extension>| {
            extension.as_ref().is_some_and(|fields| fields.routed_experts.is_some())
        };
        self.routed_experts.is_some() || of(&self.sgl_ext) || of(&self.meta_info)
    }
}

impl Found<'_> {
    fn add(&mut self, mut answer: Fields) -> Result<(), String> {
        let before = answer.prompt_routed_experts.take();
        let before = before.map(|routed| routed.array(self.hints)).transpose()?;
        let before = before.filter(|array| array.tokens > 0).map(Arc::new);
        let usage = answer.usage.as_ref().and_then(|usage| usage.prompt_tokens);
        let meta = answer.meta_info.as_ref().and_then(|meta| meta.prompt_tokens);
        let prompt = usage.or(meta);
        let prompt_ids: Arc<[u32]> = answer.prompt_token_ids.take().unwrap_or_default().into();
        let choices = answer.choices.take().unwrap_or_default();
        let whole = Some(answer).filter(|_| !choices.are_there);
        for mut choice in choices.kept.into_iter().chain(whole) {
            let Some(routed) = choice.take_routed() else { continue };
            let routed = routed.array(self.hints)?;
            if routed.tokens == 0 && before.is_none() {
                continue;
            }
            let answer_ids = [choice.token_ids.take(), choice.output_ids.take()];
            let found = Answer {
                prompt: 0,
                before: before.clone(),
                routed: follow(before.as_deref(), routed)?,
                prompt_ids: prompt_ids.clone(),
                answer_ids: answer_ids.into_iter().flatten().flatten().collect(),
            };
            self.keep(found, prompt)?;
        }
        Ok(())
    }

    fn keep(&mut self, mut found: Answer, prompt: Option<usize>) -> Result<(), String> {
        found.check()?;
        let own = prompt.unwrap_or(0).saturating_sub(found.routed.start);
        let before = found.before.as_ref().map(|before| before.tokens);
        found.prompt = before.unwrap_or(own).min(found.tokens());
        if !found.has_all_ids() {
            (found.prompt_ids, found.answer_ids) = (Arc::new([]), Vec::new());
        }
        if self.answers.len() == MAX_CHOICES {
            return Err(format!("more than {MAX_CHOICES} choices; split the file"));
        }
        self.answers.push(found);
        Ok(())
    }
}

/// The answer's array behind the prompt's.
fn follow(before: Option<&Array>, routed: Array) -> Result<Array, String> {
    let Some(before) = before else { return Ok(routed) };
    let shape = |array: &Array| (array.layers, array.top_k);
    match routed.tokens == 0 || shape(before) == shape(&routed) {
        // An empty list says no shape.
        true => Ok(Array { layers: before.layers, top_k: before.top_k, ..routed }),
        false => Err("prompt and answer have arrays of two shapes".into()),
    }
}

/// The next value of a file: an answer, or a list of them.
pub struct Value<'f, 'h> {
    pub found: &'f mut Found<'h>,
}

impl<'de> DeserializeSeed<'de> for Value<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an answer or a list of answers")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        let answer = Fields::deserialize(MapAccessDeserializer::new(map))?;
        self.found.add(answer).map_err(A::Error::custom)?;
        self.found.seen += 1;
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Value { found: &mut *self.found })?.is_some() {}
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(ChoicesVisitor)
    }
}

struct ChoicesVisitor;

impl<'de> Visitor<'de> for ChoicesVisitor {
    type Value = Choices;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of choices")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Choices, A::Error> {
        let mut choices = Choices::default();
        while let Some(choice) = list.next_element::<Fields>()? {
            choices.are_there = true;
            if choice.has_routed() {
                choices.kept.push(choice);
            }
            if choices.kept.len() > MAX_CHOICES {
                return Err(A::Error::custom(format!("more than {MAX_CHOICES} choices")));
            }
        }
        Ok(choices)
    }
}
