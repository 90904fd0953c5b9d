//! The engine of this process: a model, a session and a chat template.

use crate::{
    cli::SamplingArgs,
    device::Device,
    engine::{About, Answer, Engine, Message},
    exit::Failure,
    model, notices,
    record::Record,
};
use pregate_runtime::{
    Cancel, Dry, Event, GenerateOptions, Generated, SamplerOptions, Session,
    text::{self, ChatTemplate, Moment, RenderOptions, TextKind, Tokenizer, encode_chat},
};
use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// The temperature that nobody asked for.
const TEMPERATURE: f32 = 0.6;
/// One answer in four of the demo model goes astray at 0.3 already.
const TEMPERATURE_OF_DEMO: f32 = 0.0;

pub struct Local {
    session: Session,
    template: ChatTemplate,
    options: GenerateOptions,
    /// The session's warning that was told.
    warned: Option<String>,
    record: Option<Record>,
}

impl Local {
    /// The session's warning was told.
    pub fn new(session: Session, sampling: &SamplingArgs, is_demo: bool) -> Result<Self, Failure> {
        let model = session.model();
        let tokenizer = model.tokenizer()?;
        let template = model.chat_template()?.clone();
        let options_of_answers = generate_options(sampling, is_demo, tokenizer);
        options_of_answers.sampler.check()?;
        let warned = session.warning();
        Ok(Self { session, template, options: options_of_answers, warned, record: None })
    }

    /// From here on, routing is recorded.
    pub fn record(&mut self, record: Option<Record>) {
        self.record = record;
    }

    /// What to say before the first answer.
    pub fn notes(&self) -> Vec<String> {
        let text = "this model has no chat template; the built-in ChatML is used, which it may \
                    not understand";
        self.template.is_fallback().then(|| text.to_string()).into_iter().collect()
    }

    pub fn about(&self, device: &Device, path: &Path, examples: Vec<String>) -> About {
        let description = self.session.model().description();
        About {
            model: model::name(description, path),
            experts: model::experts(description),
            device: device.describe(),
            device_and_why: device.line.clone(),
            context_limit: self.session.context_limit(),
            examples,
            notes: self.notes(),
        }
    }

    pub fn seed(&self) -> u64 {
        self.options.sampler.seed
    }

    pub fn context_used(&self) -> usize {
        self.session.position()
    }

    /// Says on standard error what has slowed the answers down since.
    pub fn warn(&mut self) {
        notices::tell_of_session(&self.session, &mut self.warned);
    }

    /// Continues a text as it is, without the template.
    pub fn complete(
        &mut self,
        text: &str,
        cancel: &Cancel,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Generated, Failure> {
        let prompt = self.session.model().tokenizer()?.encode(text, TextKind::Plain)?;
        self.generate(&prompt, cancel, on_event)
    }

    pub fn chat(
        &mut self,
        messages: &[Message],
        cancel: &Cancel,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Generated, Failure> {
        let messages: Vec<text::Message> = messages
            .iter()
            .map(|message| text::Message::new(message.role.name(), message.content.as_str()))
            .collect();
        let options = RenderOptions {
            add_generation_prompt: true,
            now: Some(now()),
            ..RenderOptions::default()
        };
        let tokenizer = self.session.model().tokenizer()?;
        let prompt = encode_chat(tokenizer, &self.template, &messages, &options)?;
        self.generate(&prompt, cancel, on_event)
    }

    fn generate(
        &mut self,
        prompt: &[u32],
        cancel: &Cancel,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Generated, Failure> {
        let Self { session, options, record, .. } = self;
        let answer = Record::during(record.as_ref(), |observer| {
            session.generate(prompt, options, cancel, observer, on_event)
        })?;
        // Another answer draws other numbers, the same ones in every run with
        // this seed.
        self.options.sampler.seed = self.options.sampler.seed.wrapping_add(1);
        Ok(answer)
    }
}

impl Engine for Local {
    fn answer(
        &mut self,
        messages: &[Message],
        cancel: &Cancel,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Answer, Failure> {
        let generated = self.chat(messages, cancel, on_event)?;
        let mut notes = notices::of_disk(self.session.model());
        notes.extend(notices::of_session(&self.session, &mut self.warned));
        Ok(Answer { generated, context_used: self.context_used(), notes })
    }

    fn reset(&mut self) {
        self.session.reset();
    }
}

fn generate_options(args: &SamplingArgs, is_demo: bool, tokenizer: &Tokenizer) -> GenerateOptions {
    let temperature = if is_demo { TEMPERATURE_OF_DEMO } else { TEMPERATURE };
    GenerateOptions {
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        sampler: SamplerOptions {
            temperature: args.temperature.unwrap_or(temperature),
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repetition_penalty: args.repeat_penalty,
            presence_penalty: args.presence_penalty,
            frequency_penalty: args.frequency_penalty,
            dry: (args.dry > 0.0).then(|| Dry {
                multiplier: args.dry,
                breakers: repetition_breakers(tokenizer),
                ..Dry::default()
            }),
            seed: args.seed.unwrap_or_else(|| now_since_epoch().as_nanos() as u64),
            ..SamplerOptions::default()
        },
    }
}

/// Line ends and control tokens: lists and turns look alike without being a
/// loop.
fn repetition_breakers(tokenizer: &Tokenizer) -> Vec<u32> {
    (0..tokenizer.vocab_size() as u32)
        .filter(|&id| tokenizer.is_special(id) || tokenizer.token_bytes(id).contains(&b'\n'))
        .collect()
}

fn now_since_epoch() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// For templates that show the date; in UTC.
fn now() -> Moment {
    Moment { seconds: now_since_epoch().as_secs() as i64 }
}
