//! Chat templates: a conversation in, the model's prompt format out.
//!
//! Templates come from model files and are not trusted. They run in a sandbox:
//! source, nesting, instructions, ranges, recursion and output are bounded,
//! and there is nothing to include, import or change.

use super::{
    moment::Moment, template_functions::environment, template_rewrite::rewrite,
    template_scan::check,
};
use crate::error::{Error, Result, printable};
use minijinja::value::{Serde, Value};
use serde_json::{Map, Value as Json};
use std::io::{self, Write};

/// Instructions for a render, and more for every message. Of llama.cpp's 70
/// collected templates the hungriest needs 4,224 for six messages with tools.
const FUEL: u64 = 1_000_000;
const FUEL_PER_MESSAGE: u64 = 20_000;
/// Bytes of rendered prompt.
const MOST_OUTPUT_BYTES: usize = 16 << 20;
/// Parser, compiler and interpreter recurse natively; with the bounds of
/// `template_scan` this is enough for the deepest source that passes.
const STACK_BYTES: usize = 64 << 20;

const CHATML: &str = "\
{%- for message in messages %}\
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// One message of a conversation: `role`, `content` and whatever else the
/// model's template looks at (`tool_calls`, `reasoning_content`, `name`, ...).
#[derive(Clone, Debug, PartialEq)]
pub struct Message(pub Map<String, Json>);

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_string(), Json::String(role.into()));
        fields.insert("content".to_string(), Json::String(content.into()));
        Self(fields)
    }

    /// From a JSON object with a `role`.
    pub fn from_json(value: Json) -> Result<Self> {
        match value {
            Json::Object(fields) if fields.get("role").is_some_and(Json::is_string) => {
                Ok(Self(fields))
            }
            _ => Err(Error::Request("a message is an object with a \"role\" string".to_string())),
        }
    }

    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Json::as_str).unwrap_or_default()
    }
}

/// What a render needs beside the template.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// Function descriptions, as a JSON array.
    pub tools: Option<Json>,
    /// Ends the prompt where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// More variables, such as `enable_thinking`.
    pub extra: Map<String, Json>,
    /// The date that `strftime_now` shows; a template that asks for one
    /// without it fails.
    pub now: Option<Moment>,
}

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    named: Vec<(String, String)>,
    is_fallback: bool,
}

impl ChatTemplate {
    /// Checks a template; `named` are the special tokens that it may use as
    /// variables (`bos_token`, ...; see [`super::Tokenizer::named_tokens`]).
    pub fn compile(source: &str, named: &[(String, String)]) -> Result<Self> {
        check(source)?;
        let source = rewrite(source);
        on_a_large_stack(|| {
            let environment = environment(None, FUEL).map_err(template_error)?;
            environment.template_from_named_str("chat", &source).map_err(template_error)?;
            Ok(())
        })?;
        Ok(Self { source, named: named.to_vec(), is_fallback: false })
    }

    /// ChatML, for models without a template. Callers say so where they use
    /// it: a model that was not trained on it answers badly.
    pub fn fallback() -> Self {
        Self { source: CHATML.to_string(), named: Vec::new(), is_fallback: true }
    }

    /// Whether it is [`ChatTemplate::fallback`].
    pub fn is_fallback(&self) -> bool {
        self.is_fallback
    }

    /// The prompt of a conversation, as Hugging Face's `apply_chat_template`
    /// renders it. Strings of users should be protected first; [`super::chat`]
    /// does.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        let fuel = FUEL + FUEL_PER_MESSAGE * messages.len() as u64;
        on_a_large_stack(|| {
            let mut context: Map<String, Json> = Map::new();
            for (name, text) in &self.named {
                context.insert(name.clone(), Json::String(text.clone()));
            }
            let list = messages.iter().map(|message| Json::Object(message.0.clone())).collect();
            context.insert("messages".to_string(), Json::Array(list));
            let tools = options.tools.clone().unwrap_or(Json::Null);
            context.insert("tools".to_string(), tools);
            context.insert("documents".to_string(), Json::Null);
            context.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
            context.extend(options.extra.clone());

            let environment = environment(options.now, fuel).map_err(template_error)?;
            let template = environment
                .template_from_named_str("chat", &self.source)
                .map_err(template_error)?;
            let mut output = Bounded::default();
            let rendered = template.render_captured_to(Value::from(Serde(&context)), &mut output);
            match rendered {
                _ if output.overflowed => Err(Error::Template(format!(
                    "the prompt is longer than {MOST_OUTPUT_BYTES} bytes"
                ))),
                Err(error) => Err(template_error(error)),
                Ok(_) => String::from_utf8(output.bytes)
                    .map_err(|error| Error::Template(error.to_string())),
            }
        })
    }
}

#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MOST_OUTPUT_BYTES {
            self.overflowed = true;
            return Err(io::Error::other("the prompt is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn template_error(error: minijinja::Error) -> Error {
    let mut cause = &error;
    // The innermost error says what happened, the outermost where.
    while let Some(next) = std::error::Error::source(cause).and_then(|e| e.downcast_ref()) {
        cause = next;
    }
    let what = match cause.detail() {
        Some(detail) => detail.to_string(),
        None => cause.kind().to_string(),
    };
    match error.line() {
        Some(line) => Error::Template(format!("line {line}: {}", printable(what))),
        None => Error::Template(printable(what)),
    }
}

fn on_a_large_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("chat template".to_string())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| Error::Template(format!("no thread to run it: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(Error::Template("the engine panicked".to_string())))
    })
}
