//! What the chat needs of an engine: one answer to a conversation, piece by
//! piece. The chat windows know only this, so that tests can put a scripted
//! engine behind them.

use crate::exit::Failure;
pub use pregate_runtime::Cancel;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

impl Message {
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// What arrives while an answer is made.
#[derive(Clone, Debug, PartialEq)]
pub enum Step<'a> {
    /// Tokens of the prompt that are done, of so many.
    Prompt { done: usize, total: usize },
    /// The next piece of the answer.
    Text(&'a str),
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said that it is done.
    Stop,
    /// A stop text appeared.
    StopText,
    MaxTokens,
    ContextFull,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub finish: Finish,
    /// Tokens made.
    pub tokens: usize,
    pub prompt_tokens: usize,
    /// Of these, taken from the cache.
    pub reused_tokens: usize,
    /// From the question to the first token.
    pub ttft: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Tokens that the context holds now.
    pub context_used: usize,
}

impl Answer {
    /// Speed after the first token; none while there is nothing to measure.
    pub fn decode_tok_s(&self) -> Option<f64> {
        let seconds = self.decode.as_secs_f64();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }
}

/// What the chat shows about the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    pub model: String,
    /// "32 experts, 4 per token"
    pub experts: String,
    /// Device and why.
    pub device: String,
    pub context_limit: usize,
    /// Questions that the model answers well.
    pub examples: Vec<String>,
    /// Things to know before the first question.
    pub notes: Vec<String>,
}

/// One conversation partner.
pub trait Engine: Send {
    /// Answers the last of `messages`. A cancelled answer is an `Ok` with
    /// [`Finish::Cancelled`].
    fn answer(
        &mut self,
        messages: &[Message],
        cancel: &Cancel,
        on_step: &mut dyn FnMut(Step<'_>),
    ) -> Result<Answer, Failure>;

    /// Forgets everything, also after a panic inside [`Engine::answer`].
    fn reset(&mut self);
}
