//! The full-screen chat.

mod app;
mod input;
mod terminal;
#[cfg(test)]
mod tests;
mod theme;
mod transcript;
mod view;
mod worker;
mod wrap;

pub use app::why_it_ended;
pub use terminal::restore;
pub use wrap::clean;

use crate::{
    engine::{About, Engine},
    exit::Failure,
    signals::{self, Signal},
};
use app::{App, Effect, EngineEvent};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use ratatui::crossterm::event::{self, Event as TerminalEvent};
use std::{
    io, thread,
    time::{Duration, Instant},
};
use terminal::Screen;
use theme::Theme;
use worker::Worker;

enum Event {
    Terminal(TerminalEvent),
    /// The keyboard is gone.
    Closed,
    Signal(Signal),
    Engine(u64, EngineEvent),
}

/// Frames follow each other no faster than this.
const FRAME: Duration = Duration::from_millis(16);
/// The spinner's step.
const TICK: Duration = Duration::from_millis(100);
/// Without any event the window still notices a lost terminal.
const IDLE: Duration = Duration::from_secs(1);

/// Runs the chat until the user leaves; the exit code.
pub fn chat(engine: Box<dyn Engine>, about: About, system: Option<String>) -> Result<u8, Failure> {
    let theme = Theme::from_environment(|name| std::env::var(name).ok());
    let (events, inbox) = unbounded();
    let engine_events = events.clone();
    let worker = Worker::start(engine, move |id, event| {
        let _ = engine_events.send(Event::Engine(id, event));
    })
    .map_err(no_thread)?;
    let signal_events = events.clone();
    signals::forward(move |signal| {
        let _ = signal_events.send(Event::Signal(signal));
    })?;
    let mut screen = Screen::take().map_err(|error| Failure::io("terminal", error))?;
    read_keys(events).map_err(no_thread)?;
    let mut app = App::new(about, system, theme);
    let code = run(&mut screen, &mut app, &worker, &inbox);
    drop(screen);
    code
}

fn no_thread(error: io::Error) -> Failure {
    Failure::Resources(format!("cannot start a thread: {error}"))
}

/// The keyboard on its own thread, which ends with the process.
fn read_keys(events: Sender<Event>) -> io::Result<()> {
    let read = move || {
        loop {
            let event = event::read().map_or(Event::Closed, Event::Terminal);
            let closed = matches!(event, Event::Closed);
            if events.send(event).is_err() || closed {
                return;
            }
        }
    };
    thread::Builder::new().name("keys".to_string()).spawn(read).map(drop)
}

fn run(
    screen: &mut Screen,
    app: &mut App,
    worker: &Worker,
    inbox: &Receiver<Event>,
) -> Result<u8, Failure> {
    let mut ticked = Instant::now();
    loop {
        screen
            .terminal
            .draw(|frame| view::draw(frame, app))
            .map_err(|error| Failure::io("terminal", error))?;
        let drawn = Instant::now();
        let wait = if app.running.is_some() { TICK } else { IDLE };
        match inbox.recv_timeout(wait) {
            Ok(event) => {
                if let Some(end) = handle(event, app, worker) {
                    return end;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(0),
        }
        // What comes within a frame is drawn together.
        while let Ok(event) = inbox.recv_deadline(drawn + FRAME) {
            if let Some(end) = handle(event, app, worker) {
                return end;
            }
        }
        if ticked.elapsed() >= TICK {
            ticked = Instant::now();
            app.tick();
        }
    }
}

/// The exit code, or what failed, if this ends the chat.
fn handle(event: Event, app: &mut App, worker: &Worker) -> Option<Result<u8, Failure>> {
    let effect = match event {
        Event::Terminal(TerminalEvent::Key(key)) => app.key(key),
        Event::Terminal(TerminalEvent::Paste(text)) => {
            app.input.paste(&text);
            None
        }
        // Sizes are asked for at every frame.
        Event::Terminal(_) => None,
        Event::Closed => Some(Effect::Quit(0)),
        Event::Signal(Signal::Interrupt) => app.interrupt(),
        Event::Signal(Signal::Terminate(code)) => Some(Effect::Quit(code)),
        Event::Engine(id, event) => match app.engine(id, event) {
            Some(failure) => return Some(Err(failure)),
            None => None,
        },
    };
    match effect? {
        Effect::Ask { id, messages, cancel } => worker.ask(id, messages, cancel),
        Effect::Reset => worker.reset(),
        Effect::Quit(code) => return Some(Ok(code)),
    }
    None
}
