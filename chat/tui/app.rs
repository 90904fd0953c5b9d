//! The state of the chat window and what keys and engine events do to it.
//! No terminal, no thread, no clock but the one it is given.

use super::{input::Input, theme::Theme, transcript::Transcript};
use crate::{
    engine::{About, Answer, Message, Role},
    exit::{DEVICE_FAILED, Failure, INTERRUPTED},
    save,
    slash::{self, Command, Line},
};
use pregate_runtime::{Cancel, Error, Event, Finish};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use std::time::Duration;

const KEYS: &str = "\
Enter send           Ctrl-J, Alt-Enter new line      Up, Down earlier questions
PgUp, PgDn scroll    Esc, Ctrl-C stop the answer     Ctrl-C twice, Ctrl-D quit";

/// What arrives from the engine's thread.
#[derive(Debug)]
pub enum EngineEvent {
    Prompt { done: usize, total: usize },
    Text(String),
    Done(Result<Answer, Failure>),
}

impl From<Event<'_>> for EngineEvent {
    fn from(event: Event<'_>) -> Self {
        match event {
            Event::Prompt { done, total } => EngineEvent::Prompt { done, total },
            Event::Text(text) => EngineEvent::Text(text.to_string()),
        }
    }
}

/// What the window asks of the world.
#[derive(Debug)]
pub enum Effect {
    /// Every event of the answer comes back with `id`.
    Ask {
        id: u64,
        messages: Vec<Message>,
        cancel: Cancel,
    },
    Reset,
    Quit(u8),
}

/// A running answer.
pub struct Running {
    id: u64,
    pub cancel: Cancel,
    pub prompt: Option<(usize, usize)>,
    pub pieces: usize,
    pub frame: usize,
}

pub struct App {
    pub about: About,
    pub theme: Theme,
    pub system: Option<String>,
    pub transcript: Transcript,
    pub input: Input,
    pub running: Option<Running>,
    pub last: Option<Answer>,
    /// Shown in place of the status line until the next key.
    pub hint: Option<String>,
    /// A Ctrl-C was pressed and the next one quits.
    armed: bool,
    asked: u64,
}

impl App {
    pub fn new(about: About, system: Option<String>, theme: Theme) -> Self {
        let input = Input::new(&theme);
        let mut app = Self {
            about,
            theme,
            system,
            transcript: Transcript::default(),
            input,
            running: None,
            last: None,
            hint: None,
            armed: false,
            asked: 0,
        };
        for note in app.about.notes.clone() {
            app.transcript.note(note);
        }
        app
    }

    pub fn key(&mut self, key: KeyEvent) -> Option<Effect> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        let alt = key.modifiers.contains(KeyModifiers::ALT);
        let shift = key.modifiers.contains(KeyModifiers::SHIFT);
        if control && key.code == KeyCode::Char('c') {
            return self.interrupt();
        }
        self.armed = false;
        self.hint = None;
        match key.code {
            KeyCode::Esc => self.stop(),
            KeyCode::Char('d') if control && self.input.is_empty() => return Some(Effect::Quit(0)),
            KeyCode::PageUp => self.transcript.page(-1),
            KeyCode::PageDown => self.transcript.page(1),
            KeyCode::Home if control => self.transcript.scroll_to_top(),
            KeyCode::End if control => self.transcript.scroll_to_bottom(),
            KeyCode::Char('l') if control => self.transcript.scroll_to_bottom(),
            KeyCode::Enter if !alt && !shift && !control => return self.submit(),
            _ => {
                self.input.key(key);
            }
        }
        None
    }

    /// Ctrl-C or SIGINT.
    pub fn interrupt(&mut self) -> Option<Effect> {
        if self.armed {
            return Some(Effect::Quit(INTERRUPTED));
        }
        self.armed = true;
        if self.running.is_some() {
            self.stop();
        } else {
            self.input.clear();
        }
        self.hint = Some("press Ctrl-C again to quit".to_string());
        None
    }

    fn stop(&mut self) {
        if let Some(running) = &self.running {
            running.cancel.cancel();
        }
    }

    fn submit(&mut self) -> Option<Effect> {
        if self.running.is_some() && !matches!(slash::parse(&self.input.text()), Line::Command(_)) {
            self.hint = Some("an answer is being written; Esc stops it".to_string());
            return None;
        }
        match slash::parse(&self.input.submit()) {
            Line::Empty => None,
            Line::Wrong(why) => {
                self.hint = Some(why);
                None
            }
            Line::Question(text) => {
                self.transcript.question(text);
                let cancel = Cancel::default();
                self.asked += 1;
                let id = self.asked;
                self.running =
                    Some(Running { id, cancel: cancel.clone(), prompt: None, pieces: 0, frame: 0 });
                Some(Effect::Ask { id, messages: self.conversation(), cancel })
            }
            Line::Command(command) => self.command(command),
        }
    }

    fn command(&mut self, command: Command) -> Option<Effect> {
        match command {
            Command::Help => self.transcript.note(format!("{}\n\n{KEYS}", slash::HELP)),
            Command::ShowSystem => self.transcript.note(match &self.system {
                Some(text) => format!("system: {text}"),
                None => "no system instruction".to_string(),
            }),
            Command::SetSystem(text) => {
                self.transcript.note(match &text {
                    Some(text) => format!("system: {text}"),
                    None => "system instruction removed".to_string(),
                });
                self.system = text;
            }
            Command::Save { file, replace } => {
                let messages = self.conversation();
                let result = save::conversation(&file, replace, &messages);
                self.transcript.note(match result {
                    Ok(()) => format!("saved to {}", file.display()),
                    Err(failure) => format!("not saved: {failure}"),
                });
            }
            Command::Quit => return Some(Effect::Quit(0)),
            Command::Reset => {
                self.stop();
                self.running = None;
                self.last = None;
                self.transcript = Transcript::default();
                return Some(Effect::Reset);
            }
        }
        None
    }

    /// The conversation as the model should see it: the system instruction,
    /// every answered question, the open one.
    pub fn conversation(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new(Role::System, text));
        system.chain(self.transcript.messages()).collect()
    }

    /// What the engine said about question `id`; late words about one that
    /// was reset are ignored. The answer ends the chat: only a new process gets
    /// a GPU that failed back.
    pub fn engine(&mut self, id: u64, event: EngineEvent) -> Option<Failure> {
        let running = self.running.as_mut().filter(|running| running.id == id)?;
        match event {
            EngineEvent::Prompt { done, total } => running.prompt = Some((done, total)),
            EngineEvent::Text(text) => {
                running.prompt = None;
                running.pieces += 1;
                self.transcript.append(&text);
            }
            EngineEvent::Done(result) => {
                self.running = None;
                match result {
                    Ok(answer) => self.finished(answer),
                    Err(Failure::Runtime(Error::Cancelled)) => self.transcript.note("stopped"),
                    Err(failure) if failure.code() == DEVICE_FAILED => return Some(failure),
                    Err(failure) => self.transcript.error(failure.to_string()),
                }
            }
        }
        None
    }

    fn finished(&mut self, answer: Answer) {
        if let Some(note) = why_it_ended(answer.generated.finish) {
            self.transcript.note(note);
        }
        answer.notes.iter().for_each(|note| self.transcript.note(note));
        self.last = Some(answer);
    }

    /// The left part of the status line.
    pub fn status(&self) -> String {
        if let Some(hint) = &self.hint {
            return hint.clone();
        }
        let separator = self.theme.separator;
        if let Some(running) = &self.running {
            let spinner = self.theme.spinner[running.frame % self.theme.spinner.len()];
            let doing = match running.prompt {
                _ if running.cancel.is_cancelled() => "stopping".to_string(),
                Some((done, total)) => format!("reading {done} of {total} tokens"),
                None if running.pieces == 0 => "thinking".to_string(),
                None => "answering".to_string(),
            };
            return format!("{spinner} {doing}{separator}Esc stops");
        }
        // The figures first: a narrow window cuts the end.
        let mut parts = Vec::new();
        if let Some(answer) = &self.last {
            if let Some(speed) = answer.generated.decode_tok_s() {
                parts.push(format!("{speed:.1} tok/s"));
            }
            parts.push(format!("TTFT {}", short(answer.generated.ttft)));
        }
        let used = self.last.as_ref().map_or(0, |answer| answer.context_used);
        parts.push(format!("context {used}/{}", self.about.context_limit));
        parts.push(self.about.device.clone());
        parts.join(separator)
    }

    pub fn tick(&mut self) {
        if let Some(running) = &mut self.running {
            running.frame = running.frame.wrapping_add(1);
        }
    }
}

/// What a person should know about the end of an answer.
pub fn why_it_ended(finish: Finish) -> Option<&'static str> {
    match finish {
        Finish::Stop | Finish::StopString => None,
        Finish::Cancelled => Some("stopped"),
        Finish::Length => Some("cut at --max-tokens"),
        Finish::ContextFull => Some("the context is full; /reset begins a new conversation"),
    }
}

/// A duration in the unit that a person would use.
pub fn short(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 0.9995 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.1} s") }
}
