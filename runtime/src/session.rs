//! One sequence of tokens on a model: feeding tokens, reading logits.

use crate::error::{Error, Result};
use crate::forward::cache::{Cache, KvFormat, cache_bytes};
use crate::forward::{Pass, Scratch, forward};
use crate::gpu::{GpuPass, GpuSession};
use crate::model::Model;
use crate::model::description::ModelDescription;
use crate::model::rope::Rope;
use pregate_predictor::{Fed, NoObserver, Observer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a session is made.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Positions to make room for; `None`: the model's limit, at most 8192.
    pub context: Option<usize>,
    pub kv: KvFormat,
    /// Tokens of a prompt that go through the model together. It changes
    /// memory and speed, never results.
    pub prefill_chunk: usize,
    /// On a GPU a token is submitted as one CUDA graph; else kernel by kernel.
    /// It changes speed, never results.
    pub graphs: bool,
    /// A GPU computes a token by itself, and waits for the host where an expert
    /// is missing; else the host launches layer by layer and looks at the
    /// choices between. It changes speed, never results. To be off where a
    /// launch returns only when it has run (`CUDA_LAUNCH_BLOCKING`, some
    /// debuggers and profilers), or copies queue behind launches
    /// (`CUDA_DEVICE_MAX_CONNECTIONS=1`): host and device would wait for each
    /// other, until a session that has met that twice goes on without.
    pub device_tokens: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            context: None,
            kv: KvFormat::F16,
            prefill_chunk: 512,
            graphs: true,
            device_tokens: true,
        }
    }
}

impl SessionOptions {
    /// Positions of a session on a model; an error if it was not made for so
    /// many.
    pub fn positions(&self, model: &ModelDescription) -> Result<usize> {
        let limit = model.context_limit;
        let context = self.context.unwrap_or(limit.min(DEFAULT_CONTEXT));
        if context == 0 || context > limit {
            return Err(Error::Request(format!(
                "a context of {context} tokens; allowed: 1..={limit} for this model"
            )));
        }
        Ok(context)
    }
}

/// What [`SessionOptions::context`] means when it is not given.
const DEFAULT_CONTEXT: usize = 8192;

/// A flag that ends a computation before its next layer; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What accompanies a run of the model.
pub struct Run<'a> {
    pub observer: &'a mut dyn Observer,
    pub cancel: &'a Cancel,
    /// Told the tokens done so far after each chunk.
    pub progress: Option<&'a mut dyn FnMut(usize)>,
}

/// Where a sequence's memory is, and what its passes leave.
enum Place {
    Host { cache: Cache, scratch: Box<Scratch> },
    Gpu(Box<GpuSession>),
}

/// One sequence. It is `Send`: move it to the thread that generates.
pub struct Session {
    model: Model,
    /// Different from that of every other session of the model.
    id: u64,
    place: Place,
    ropes: Vec<Rope>,
    tokens: Vec<u32>,
    prefill_chunk: usize,
}

impl Session {
    /// Makes room for the context; refuses one that the model was not made
    /// for.
    pub fn new(model: &Model, options: SessionOptions) -> Result<Self> {
        let context = options.positions(model.description())?;
        if options.prefill_chunk == 0 {
            return Err(Error::Request("a prefill chunk of 0 tokens; allowed: 1 and more".into()));
        }
        let description = model.description();
        let ropes: Vec<Rope> =
            description.ropes.iter().map(|rope| Rope::new(rope, context)).collect();
        let place = match model.gpu() {
            Some(_) => Place::Gpu(Box::new(GpuSession::new(model, &ropes, context, &options)?)),
            None => Place::Host {
                cache: Cache::new(description, context, options.kv)?,
                scratch: Box::default(),
            },
        };
        Ok(Self {
            place,
            ropes,
            tokens: Vec::new(),
            prefill_chunk: options.prefill_chunk,
            id: model.next_session(),
            model: model.clone(),
        })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the user should know about this sequence's speed; it may show
    /// while tokens are fed.
    pub fn warning(&self) -> Option<String> {
        match &self.place {
            Place::Host { .. } => None,
            Place::Gpu(session) => session.warning(),
        }
    }

    /// Tokens fed so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    pub fn context_limit(&self) -> usize {
        match &self.place {
            Place::Host { cache, .. } => cache.capacity,
            Place::Gpu(session) => session.capacity(),
        }
    }

    fn can_rewind(&self) -> bool {
        match &self.place {
            Place::Host { cache, .. } => cache.can_rewind(),
            Place::Gpu(session) => session.can_rewind(),
        }
    }

    /// Of the last pass that wanted any.
    fn logits(&self) -> &[f32] {
        match &self.place {
            Place::Host { scratch, .. } => scratch.logits(),
            Place::Gpu(session) => session.logits(),
        }
    }

    /// Bytes that the KV cache takes when the context is full.
    pub fn cache_bytes(model: &Model, context: usize, kv: KvFormat) -> u64 {
        cache_bytes(model.description(), context, kv)
    }

    /// Starts over.
    pub fn reset(&mut self) {
        self.tokens.clear();
        match &mut self.place {
            Place::Host { cache, .. } => cache.reset(),
            Place::Gpu(session) => session.forget(),
        }
    }

    /// Keeps the longest common prefix of the sequence and `tokens` and
    /// answers its length, always less than `tokens.len()` so that there is
    /// something left to compute. A model with recurrent layers cannot go
    /// back: it keeps everything or starts over.
    pub fn keep_prefix(&mut self, tokens: &[u32]) -> usize {
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let keep = common.min(tokens.len().saturating_sub(1));
        if keep == self.tokens.len() {
            return keep;
        }
        if keep == 0 || !self.can_rewind() {
            self.reset();
            return 0;
        }
        self.tokens.truncate(keep);
        keep
    }

    /// Runs `tokens` behind the sequence so far; the answer is the logits of
    /// the last one, `[vocab]`. On an error or a cancelled run the sequence
    /// holds the chunks that were done.
    pub fn feed(&mut self, tokens: &[u32], run: &mut Run<'_>) -> Result<&[f32]> {
        self.feed_as(tokens, tokens.len() > 1, run)
    }

    /// As [`Session::feed`], of a prompt or not; observers are told.
    pub(crate) fn feed_as(
        &mut self,
        tokens: &[u32],
        is_prompt: bool,
        run: &mut Run<'_>,
    ) -> Result<&[f32]> {
        self.check(tokens)?;
        let last = tokens.len().div_ceil(self.prefill_chunk) - 1;
        for (index, chunk) in tokens.chunks(self.prefill_chunk).enumerate() {
            self.step((chunk, is_prompt), usize::from(index == last), run)?;
        }
        Ok(&self.logits()[..self.model.description().vocab])
    }

    /// As [`Session::feed`], with the logits of every token,
    /// `[tokens, vocab]`.
    pub fn feed_all(&mut self, tokens: &[u32], run: &mut Run<'_>) -> Result<Vec<f32>> {
        self.check(tokens)?;
        let mut all = Vec::new();
        for chunk in tokens.chunks(self.prefill_chunk) {
            all.extend_from_slice(self.step((chunk, true), chunk.len(), run)?);
        }
        Ok(all)
    }

    /// [`Session::feed`] without observer, progress or cancelling.
    pub fn feed_quietly(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        let mut run = Run { observer: &mut NoObserver, cancel: &Cancel::new(), progress: None };
        self.feed(tokens, &mut run)
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.model.description().vocab;
        if tokens.is_empty() {
            return Err(Error::Request("no tokens to run".to_string()));
        }
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::Request(format!("token id {id}; allowed: 0..{vocab}")));
        }
        let needed = self.tokens.len() + tokens.len();
        if needed > self.context_limit() {
            return Err(Error::ContextFull { needed, limit: self.context_limit() });
        }
        Ok(())
    }

    fn step(
        &mut self,
        (chunk, is_prompt): (&[u32], bool),
        wanted: usize,
        run: &mut Run<'_>,
    ) -> Result<&[f32]> {
        let (first_position, session) = (self.tokens.len(), self.id);
        if let Place::Host { .. } = self.place {
            run.observer.fed(&Fed { session, first_position, tokens: chunk, is_prompt });
        }
        let done = match &mut self.place {
            Place::Host { cache, scratch } => {
                let pass = Pass { ids: chunk, first_position, wanted, session };
                let engine = self.model.engine();
                forward(engine, &self.ropes, cache, scratch, pass, run.observer, run.cancel)
            }
            Place::Gpu(gpu) => {
                let pass = GpuPass { ids: chunk, first_position, wanted, session, is_prompt };
                gpu.forward(&self.model, &self.ropes, pass, run.observer, run.cancel)
            }
        };
        if let Err(error) = done {
            // Cells behind the sequence's end are written again before they
            // are read; a recurrent state has no way back.
            if !self.can_rewind() {
                self.reset();
            }
            return Err(error);
        }
        self.tokens.extend_from_slice(chunk);
        if let Some(progress) = &mut run.progress {
            progress(self.tokens.len());
        }
        Ok(&self.logits()[..wanted * self.model.description().vocab])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_and_models_are_send() {
        fn send<T: Send>() {}
        fn sync<T: Sync>() {}
        send::<Session>();
        send::<Model>();
        sync::<Model>();
        send::<Cancel>();
    }
}
