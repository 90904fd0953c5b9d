//! `pregate run`: one answer on standard output.

use crate::{
    cli::RunArgs,
    commands::tokenize::read_text,
    device::Device,
    engine::{Message, Role},
    exit::Failure,
    local::Local,
    model,
    progress::Progress,
    signals, tui,
};
use pregate_runtime::{Cancel, Event, Finish, Generated};
use std::io::{self, IsTerminal, Write};

pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let prompt = match args.prompt.as_deref() {
        Some("-") | None => read_text()?,
        Some(text) => text.to_string(),
    };
    if prompt.trim().is_empty() {
        return Err(Failure::Usage("the prompt is empty".to_string()));
    }
    let path = model::path_or_demo(args.model.model.as_deref())?;
    let device = Device::open(&args.model.device)?;
    device.announce();
    let model = model::load(&path, &device)?;
    let mut engine = Local::new(&model, &args.session, &args.sampling, args.model.model.is_none())?;
    if !args.raw {
        engine.notes().iter().for_each(|note| eprintln!("note: {note}"));
    }
    let cancel = Cancel::new();
    signals::cancel_on_interrupt(cancel.clone())?;
    let seed = engine.seed();

    let mut printer = Printer::new(cancel.clone());
    let mut bar = None;
    let mut on_event = |event: Event<'_>| match event {
        Event::Prompt { done, total } => {
            bar.get_or_insert_with(|| Progress::new("reading", "tokens", total)).set(done);
        }
        Event::Text(text) => {
            bar = None;
            printer.print(text);
        }
    };
    let answer = if args.raw {
        engine.complete(&prompt, &cancel, &mut on_event)
    } else {
        let system = args.system.iter().map(|text| Message::new(Role::System, text));
        let messages: Vec<Message> =
            system.chain([Message::new(Role::User, prompt.trim_end())]).collect();
        engine.chat(&messages, &cancel, &mut on_event)
    };
    drop(bar);
    printer.end()?;
    let answer = answer?;
    if args.stats {
        eprintln!("{}", stats(&answer, seed));
    }
    match answer.finish {
        Finish::Cancelled => Err(Failure::Interrupted),
        Finish::ContextFull => {
            eprintln!("note: the context is full; --context makes it larger");
            Ok(())
        }
        _ => Ok(()),
    }
}

fn stats(answer: &Generated, seed: u64) -> String {
    let prompt_tokens = answer.prompt_tokens - answer.reused_tokens;
    let prompt_speed = prompt_tokens as f64 / answer.ttft.as_secs_f64().max(1e-9);
    let decode = answer.decode_tok_s().map_or("-".to_string(), |speed| format!("{speed:.1}"));
    format!(
        "stats: {} prompt tokens at {prompt_speed:.1} tok/s, TTFT {:.1} ms, {} tokens at \
         {decode} tok/s, seed {seed}",
        answer.prompt_tokens,
        answer.ttft.as_secs_f64() * 1e3,
        answer.tokens.len(),
    )
}

/// Standard output, piece by piece. When nobody reads any more, it stops the
/// answer.
struct Printer {
    to_terminal: bool,
    cancel: Cancel,
    failed: Option<io::Error>,
    ended_with_newline: bool,
}

impl Printer {
    fn new(cancel: Cancel) -> Self {
        let to_terminal = io::stdout().is_terminal();
        Self { to_terminal, cancel, failed: None, ended_with_newline: false }
    }

    fn print(&mut self, text: &str) {
        if self.failed.is_some() {
            return;
        }
        self.ended_with_newline = text.ends_with('\n');
        let mut out = io::stdout().lock();
        // A file gets what the model said; a terminal nothing that steers it.
        let written = match self.to_terminal {
            true => out.write_all(tui::clean(text).as_bytes()),
            false => out.write_all(text.as_bytes()),
        };
        if let Err(error) = written.and_then(|()| out.flush()) {
            self.failed = Some(error);
            self.cancel.cancel();
        }
    }

    fn end(mut self) -> Result<(), Failure> {
        if !self.ended_with_newline {
            self.print("\n");
        }
        self.failed.map_or(Ok(()), |error| Err(Failure::output(error)))
    }
}
