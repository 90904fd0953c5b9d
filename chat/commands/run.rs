//! `pregate run`: one answer on standard output.

use crate::{
    cli::{RunArgs, StatsForm},
    commands::tokenize::read_text,
    device::Device,
    engine::{Message, Role},
    exit::Failure,
    ledger,
    local::Local,
    memory,
    model::{self, Loaded},
    notices,
    output::bytes,
    plan::Needs,
    progress::Progress,
    record::Record,
    signals,
    splits::{self, LayerReport},
    statistics::{self, FromDisk, PageLocked, Way},
    tui,
};
use pregate_runtime::{Cancel, Event, Finish, Generated, Model, StreamStats, store::ExpertStore};
use serde::Serialize;
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
    let needs = Needs::new(&args.memory, args.session.options());
    let Loaded { model, session, .. } = model::load(&path, &device, &needs)?;
    let mut engine = Local::new(session, &args.sampling, args.model.model.is_none())?;
    let record = Record::start(args.record.as_deref(), &model, &path, &args.memory)?;
    engine.record(record.clone());
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
            notices::tell_of_disk(&model);
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
    let printed = printer.end();
    record.iter().for_each(Record::finish);
    printed?;
    notices::tell_of_disk(&model);
    engine.warn();
    let answer = answer?;
    let ledger = if args.ledger { ledger::report(&model) } else { None };
    match (args.ledger, &ledger) {
        (true, None) => eprintln!("{}", ledger::NOTHING),
        (true, Some(report)) if args.stats != Some(StatsForm::Json) => {
            let lines = report.lines().into_iter().chain(splits::lines(&model));
            lines.for_each(|line| eprintln!("{line}"));
        }
        (true, Some(_)) => {}
        (false, _) => notices::tell_of_forecasts(&model),
    }
    if let Some(form) = args.stats {
        eprintln!("{}", Stats::new(&answer, seed, &model, ledger).show(form)?);
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

/// The fields of `--stats json`; scripts read them by name.
#[derive(Serialize)]
struct Stats {
    prompt_tokens: usize,
    prompt_tok_s: f64,
    ttft_ms: f64,
    tokens: usize,
    decode_tok_s: Option<f64>,
    seed: u64,
    /// Memory of the process's own, without the page cache, at the end.
    held_bytes: Option<u64>,
    /// `null` where the whole model is in memory.
    stream: Option<StreamStats>,
    /// `null` where no experts are copied to a GPU.
    host_memory: Option<PageLocked>,
    /// `null` where none come from disk below that.
    from_disk: Option<FromDisk>,
    /// Who brought what the GPU missed; `null` where nothing did.
    splits: Option<Vec<LayerReport>>,
    #[serde(skip)]
    way: Way,
    /// With `--ledger`.
    ledger: Option<ledger::Report>,
}

impl Stats {
    fn new(answer: &Generated, seed: u64, model: &Model, ledger: Option<ledger::Report>) -> Self {
        let computed = answer.prompt_tokens - answer.reused_tokens;
        Self {
            prompt_tokens: answer.prompt_tokens,
            prompt_tok_s: computed as f64 / answer.ttft.as_secs_f64().max(1e-9),
            ttft_ms: answer.ttft.as_secs_f64() * 1e3,
            tokens: answer.tokens.len(),
            decode_tok_s: answer.decode_tok_s(),
            seed,
            held_bytes: memory::held_bytes(),
            stream: model.store().map(ExpertStore::stats),
            host_memory: PageLocked::of(model),
            from_disk: FromDisk::of(model),
            splits: splits::report(model),
            way: Way::of(model),
            ledger,
        }
    }

    fn show(&self, form: StatsForm) -> Result<String, Failure> {
        if form == StatsForm::Json {
            return serde_json::to_string(self)
                .map_err(|error| Failure::Internal(error.to_string()));
        }
        let decode = self.decode_tok_s.map_or("-".to_string(), |speed| format!("{speed:.1}"));
        let held = self.held_bytes.map_or(String::new(), |held| format!(", {} held", bytes(held)));
        let mut text = format!(
            "stats: {} prompt tokens at {:.1} tok/s, TTFT {:.1} ms, {} tokens at {decode} tok/s, \
             seed {}{held}",
            self.prompt_tokens, self.prompt_tok_s, self.ttft_ms, self.tokens, self.seed,
        );
        let lines = self.stream.iter().flat_map(|stats| statistics::lines(stats, self.way));
        for line in lines.chain(self.from_disk.as_ref().map(FromDisk::line)) {
            text.push_str("\nstats: ");
            text.push_str(&line);
        }
        Ok(text)
    }
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
