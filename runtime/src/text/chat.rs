//! A conversation to token ids, with users' text kept apart from markup.

use super::{
    template::{ChatTemplate, Message, RenderOptions},
    tokenizer::{TextKind, Tokenizer},
};
use crate::error::Result;
use serde_json::{Map, Value};

/// Ids of the prompt for `messages`, as Hugging Face's `apply_chat_template`
/// gives them, except that control-token text inside messages and tools stays
/// text. In earlier answers (role `assistant`) tags around reasoning stay
/// whole, because templates look for them.
pub fn encode_chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    options: &RenderOptions,
) -> Result<Vec<u32>> {
    let messages: Vec<Message> =
        messages.iter().map(|message| protect_message(tokenizer, message)).collect();
    let user = |text: &str| tokenizer.protect(text).into_owned();
    let options = RenderOptions {
        tools: options.tools.as_ref().map(|tools| protect(tools, &user)),
        ..options.clone()
    };
    let prompt = template.render(&messages, &options)?;
    tokenizer.encode(&prompt, TextKind::Rendered)
}

fn protect_message(tokenizer: &Tokenizer, message: &Message) -> Message {
    let is_answer = message.role() == "assistant";
    let change = |text: &str| match is_answer {
        true => tokenizer.protect_answer(text).into_owned(),
        false => tokenizer.protect(text).into_owned(),
    };
    Message(protect_fields(&message.0, &change))
}

fn protect_fields(
    fields: &Map<String, Value>,
    change: &dyn Fn(&str) -> String,
) -> Map<String, Value> {
    fields.iter().map(|(key, value)| (change(key), protect(value, change))).collect()
}

fn protect(value: &Value, change: &dyn Fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(change(text)),
        Value::Array(list) => {
            Value::Array(list.iter().map(|value| protect(value, change)).collect())
        }
        Value::Object(fields) => Value::Object(protect_fields(fields, change)),
        other => other.clone(),
    }
}
