//! What the chat needs of an engine: one answer to a conversation, piece by
//! piece. The chat windows know only this, so that tests can put a scripted
//! engine behind them.

use crate::exit::Failure;
use pregate_runtime::{Cancel, Event, Generated};

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

impl Role {
    /// As chat templates spell it.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

impl Message {
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// An answer and what it took.
#[derive(Clone, Debug)]
pub struct Answer {
    pub generated: Generated,
    /// Tokens that the context holds now.
    pub context_used: usize,
    /// Things to know that happened meanwhile.
    pub notes: Vec<String>,
}

/// What the chat shows about the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    pub model: String,
    /// "32 experts, 4 per token"
    pub experts: String,
    pub device: String,
    /// The device and why it was chosen.
    pub device_and_why: String,
    pub context_limit: usize,
    /// Questions that the model answers well.
    pub examples: Vec<String>,
    /// Things to know before the first question.
    pub notes: Vec<String>,
}

/// One conversation partner.
pub trait Engine: Send {
    /// Answers the last of `messages`. A cancelled answer is an `Ok` with
    /// [`pregate_runtime::Finish::Cancelled`].
    fn answer(
        &mut self,
        messages: &[Message],
        cancel: &Cancel,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Answer, Failure>;

    /// Forgets everything, also after a panic inside [`Engine::answer`].
    fn reset(&mut self);
}
