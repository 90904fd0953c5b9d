//! Renders chat templates for a comparison with another implementation.
//!
//! Reads one JSON object per line from stdin: `template` (source), `messages`,
//! `tools`, `add_generation_prompt`, `variables` (special tokens and more
//! variables), `now` (seconds since 1970). Writes one JSON object per line:
//! `{"text": ...}` or `{"error": ...}`.

use pregate_runtime::text::{ChatTemplate, Message, Moment, RenderOptions};
use serde_json::{Value, json};
use std::io::BufRead;

fn render(case: &Value) -> Result<String, String> {
    let source = case["template"].as_str().unwrap_or_default();
    let template = ChatTemplate::compile(source, &[]).map_err(|error| error.to_string())?;
    let messages: Vec<Message> = case["messages"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|message| Message(message.as_object().cloned().unwrap_or_default()))
        .collect();
    let options = RenderOptions {
        tools: Some(case["tools"].clone()).filter(|tools| !tools.is_null()),
        add_generation_prompt: case["add_generation_prompt"] == true,
        extra: case["variables"].as_object().cloned().unwrap_or_default(),
        now: case["now"].as_i64().map(|seconds| Moment { seconds }),
    };
    template.render(&messages, &options).map_err(|error| error.to_string())
}

fn main() {
    for line in std::io::stdin().lock().lines() {
        let case: Value = serde_json::from_str(&line.expect("a line")).expect("JSON");
        let answer = match render(&case) {
            Ok(text) => json!({ "text": text }),
            Err(error) => json!({ "error": error }),
        };
        println!("{answer}");
    }
}
