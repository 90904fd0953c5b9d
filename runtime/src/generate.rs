//! One answer: prompt in, text out as it is made.

use crate::error::{Error, Result};
use crate::sample::{Sampler, SamplerOptions};
use crate::session::{Cancel, Run, Session};
use crate::text::TextStream;
use pregate_predictor::Observer;
use std::time::{Duration, Instant};

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens of the answer at most.
    pub max_tokens: usize,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    pub sampler: SamplerOptions,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_tokens: 512, stop: Vec::new(), sampler: SamplerOptions::default() }
    }
}

/// What happens while an answer is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// So many of the prompt's tokens are done; reused ones count as done.
    Prompt { done: usize, total: usize },
    /// The next piece of the answer; pieces never split a character.
    Text(&'a str),
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its turn.
    Stop,
    /// A stop string appeared.
    StopString,
    /// [`GenerateOptions::max_tokens`] are there.
    Length,
    /// The context is full.
    ContextFull,
    /// [`Cancel::cancel`] was called.
    Cancelled,
}

/// An answer and what it took.
#[derive(Clone, Debug)]
pub struct Generated {
    pub text: String,
    /// Without the token that ended the turn.
    pub tokens: Vec<u32>,
    pub finish: Finish,
    pub prompt_tokens: usize,
    /// Leading tokens of the prompt that were in the KV cache already.
    pub reused_tokens: usize,
    /// From the call to the first token of the answer.
    pub ttft: Duration,
    /// From the first token of the answer to the last.
    pub decode: Duration,
}

impl Generated {
    /// Decoded tokens per second after the first one; `None` with fewer than
    /// two.
    pub fn decode_tok_s(&self) -> Option<f64> {
        let steps = self.tokens.len().checked_sub(1).filter(|&steps| steps > 0)?;
        Some(steps as f64 / self.decode.as_secs_f64().max(1e-9))
    }
}

impl Session {
    /// Answers `prompt` (all of it, from the sequence's start): what the
    /// session's KV cache shares with it is not computed again. A cancelled
    /// answer is an answer; a cancelled prompt is [`Error::Cancelled`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        cancel: &Cancel,
        observer: &mut dyn Observer,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Generated> {
        let started = Instant::now();
        let model = self.model().clone();
        let tokenizer = model.tokenizer()?;
        let mut sampler = Sampler::new(options.sampler.clone())?;
        prompt.iter().for_each(|&token| sampler.accept(token));

        let reused_tokens = self.keep_prefix(prompt);
        let mut logits = {
            let mut done = |done| on_event(Event::Prompt { done, total: prompt.len() });
            let mut run = Run { observer: &mut *observer, cancel, progress: Some(&mut done) };
            self.feed_as(&prompt[reused_tokens..], true, &mut run)?.to_vec()
        };

        let mut stream = TextStream::new(tokenizer, options.stop.iter().cloned());
        let mut answer = Generated {
            text: String::new(),
            tokens: Vec::new(),
            finish: Finish::Length,
            prompt_tokens: prompt.len(),
            reused_tokens,
            ttft: started.elapsed(),
            decode: Duration::ZERO,
        };
        let mut show = |text: &str, all: &mut String| {
            if !text.is_empty() {
                all.push_str(text);
                on_event(Event::Text(text));
            }
        };
        let mut last_token_at = Instant::now();
        let first_token_at = last_token_at;
        while answer.tokens.len() < options.max_tokens {
            let token = sampler.sample(&mut logits)?;
            sampler.accept(token);
            last_token_at = Instant::now();
            if tokenizer.is_eos(token) {
                answer.finish = Finish::Stop;
                break;
            }
            answer.tokens.push(token);
            let (text, stopped) = stream.push(tokenizer, token);
            show(&text, &mut answer.text);
            if stopped {
                answer.finish = Finish::StopString;
                break;
            }
            if answer.tokens.len() == options.max_tokens {
                break;
            }
            if self.position() == self.context_limit() {
                answer.finish = Finish::ContextFull;
                break;
            }
            let mut run = Run { observer: &mut *observer, cancel, progress: None };
            match self.feed(&[token], &mut run) {
                Ok(next) => logits.copy_from_slice(next),
                Err(Error::Cancelled) => {
                    answer.finish = Finish::Cancelled;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        show(&stream.finish(), &mut answer.text);
        answer.decode = last_token_at - first_token_at;
        Ok(answer)
    }
}
