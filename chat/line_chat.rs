//! The chat for terminals that can only print lines, and for pipes.

use crate::{
    engine::{About, Engine, Message, Role},
    exit::{DEVICE_FAILED, Failure, INTERRUPTED},
    output, save,
    signals::{self, Signal},
    slash::{self, Command, Line},
    tui,
};
use pregate_runtime::{Cancel, Error, Event};
use std::{
    io::{self, BufRead, IsTerminal, Write},
    sync::{Arc, Mutex, PoisonError},
};

/// The answer that is being written, for the signal thread.
type Current = Arc<Mutex<Option<Cancel>>>;

struct Chat {
    engine: Box<dyn Engine>,
    system: Option<String>,
    /// Without the system instruction.
    messages: Vec<Message>,
    current: Current,
    to_terminal: bool,
}

/// Runs the chat until the input ends; the exit code.
pub fn chat(
    engine: Box<dyn Engine>,
    about: &About,
    system: Option<String>,
    why: &str,
) -> Result<u8, Failure> {
    eprintln!("note: chatting line by line, because {why}; /help lists the commands");
    about.notes.iter().for_each(|note| eprintln!("note: {note}"));
    let current = Current::default();
    stop_on_interrupt(current.clone())?;
    let to_terminal = io::stdout().is_terminal();
    let mut chat = Chat { engine, system, messages: Vec::new(), current, to_terminal };
    let prompting = io::stdin().is_terminal();
    let mut line = Vec::new();
    loop {
        if prompting {
            write_out("> ")?;
        }
        line.clear();
        let mut input = io::stdin().lock();
        let read = input.read_until(b'\n', &mut line);
        if read.map_err(|error| Failure::io("standard input", error))? == 0 {
            if prompting {
                write_out("\n")?;
            }
            return Ok(0);
        }
        match slash::parse(&String::from_utf8_lossy(&line)) {
            Line::Empty => {}
            Line::Wrong(why) => eprintln!("note: {why}"),
            Line::Question(text) => chat.ask(text)?,
            Line::Command(Command::Quit) => return Ok(0),
            Line::Command(command) => chat.command(command)?,
        }
    }
}

/// The first SIGINT stops a running answer; without one, it ends the chat.
fn stop_on_interrupt(current: Current) -> Result<(), Failure> {
    signals::forward(move |signal| {
        let running = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (signal, running) {
            (Signal::Interrupt, Some(cancel)) if !cancel.is_cancelled() => cancel.cancel(),
            (Signal::Interrupt, _) => std::process::exit(INTERRUPTED.into()),
            (Signal::Terminate(code), _) => std::process::exit(code.into()),
        }
    })
}

impl Chat {
    fn ask(&mut self, question: String) -> Result<(), Failure> {
        let cancel = Cancel::new();
        self.set_current(Some(cancel.clone()));
        let mut messages = self.conversation();
        messages.push(Message::new(Role::User, &question));
        let mut failed = None;
        let result = self.engine.answer(&messages, &cancel, &mut |event| {
            let Event::Text(text) = event else { return };
            let text = if self.to_terminal { tui::clean(text) } else { text.to_string() };
            if failed.is_none()
                && let Err(failure) = write_out(&text)
            {
                failed = Some(failure);
                cancel.cancel();
            }
        });
        self.set_current(None);
        failed.map_or(Ok(()), Err)?;
        output::line("")?;
        match result {
            Ok(answer) => {
                if let Some(note) = tui::why_it_ended(answer.generated.finish) {
                    eprintln!("note: {note}");
                }
                answer.notes.iter().for_each(|note| eprintln!("note: {note}"));
                if !answer.generated.text.is_empty() {
                    self.messages.push(Message::new(Role::User, question));
                    self.messages.push(Message::new(Role::Assistant, answer.generated.text));
                }
            }
            Err(Failure::Runtime(Error::Cancelled)) => eprintln!("note: stopped"),
            // Only a new process gets the GPU back.
            Err(failure) if failure.code() == DEVICE_FAILED => return Err(failure),
            Err(failure) => eprintln!("pregate: {failure}"),
        }
        Ok(())
    }

    fn command(&mut self, command: Command) -> Result<(), Failure> {
        match command {
            Command::Help => output::line(slash::HELP)?,
            Command::ShowSystem => output::line(self.system.as_deref().unwrap_or("none"))?,
            Command::SetSystem(text) => self.system = text,
            Command::Reset => {
                self.messages.clear();
                self.engine.reset();
            }
            Command::Save { file, replace } => {
                match save::conversation(&file, replace, &self.conversation()) {
                    Ok(()) => eprintln!("note: saved to {}", file.display()),
                    Err(failure) => eprintln!("note: not saved: {failure}"),
                }
            }
            Command::Quit => {}
        }
        Ok(())
    }

    fn conversation(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new(Role::System, text));
        system.chain(self.messages.iter().cloned()).collect()
    }

    fn set_current(&self, cancel: Option<Cancel>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = cancel;
    }
}

fn write_out(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::output)
}
