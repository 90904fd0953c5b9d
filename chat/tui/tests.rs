//! The window with a scripted engine, drawn into a test terminal.

use super::{
    app::{App, Effect, EngineEvent},
    theme::Theme,
    view,
    worker::Worker,
};
use crate::{
    engine::{About, Answer, Engine, Message},
    exit::Failure,
};
use crossbeam::channel::{Receiver, unbounded};
use pregate_kernels::cuda::CudaError;
use pregate_runtime::{Cancel, Error, Event, Finish, Generated};
use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};
use std::time::Duration;

fn about() -> About {
    About {
        model: "test-model".to_string(),
        experts: "8 experts, 2 per token".to_string(),
        device: "cpu".to_string(),
        device_and_why: "cpu (the only one)".to_string(),
        context_limit: 2048,
        examples: vec!["list files by size".to_string()],
        notes: Vec::new(),
    }
}

/// Says its script word by word; "slow" waits to be cancelled, "panic" does.
struct Scripted;

impl Engine for Scripted {
    fn answer(
        &mut self,
        messages: &[Message],
        cancel: &Cancel,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Answer, Failure> {
        let question = &messages.last().expect("a question").content;
        on_event(Event::Prompt { done: 3, total: 9 });
        let mut finish = Finish::Stop;
        match question.as_str() {
            "panic" => panic!("scripted"),
            "lost" => {
                let lost = CudaError::Hung { at: "its work", seconds: 30 };
                return Err(Failure::Runtime(Error::Cuda(lost)));
            }
            "fail" => return Err(Failure::Usage("scripted refusal".to_string())),
            "slow" => {
                on_event(Event::Text("beginning"));
                while !cancel.is_cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                finish = Finish::Cancelled;
            }
            _ => format!("You said: {question} ({} messages)", messages.len())
                .split_inclusive(' ')
                .for_each(|word| on_event(Event::Text(word))),
        }
        let generated = Generated {
            text: String::new(),
            tokens: vec![0; 11],
            finish,
            prompt_tokens: 9,
            reused_tokens: 0,
            ttft: Duration::from_millis(12),
            decode: Duration::from_millis(100),
        };
        let notes = if question == "notes" { vec!["the disk is slow".to_string()] } else { vec![] };
        Ok(Answer { generated, context_used: 20, notes })
    }

    fn reset(&mut self) {}
}

struct Window {
    app: App,
    worker: Worker,
    inbox: Receiver<(u64, EngineEvent)>,
    terminal: Terminal<TestBackend>,
    quit: Option<u8>,
}

impl Window {
    fn new(width: u16, height: u16) -> Self {
        let (events, inbox) = unbounded();
        let worker = Worker::start(Box::new(Scripted), move |id, event| {
            let _ = events.send((id, event));
        });
        Self {
            app: App::new(about(), None, Theme::plain()),
            worker: worker.unwrap(),
            inbox,
            terminal: Terminal::new(TestBackend::new(width, height)).unwrap(),
            quit: None,
        }
    }

    fn press(&mut self, code: KeyCode, modifiers: KeyModifiers) {
        match self.app.key(KeyEvent::new(code, modifiers)) {
            Some(Effect::Ask { id, messages, cancel }) => self.worker.ask(id, messages, cancel),
            Some(Effect::Reset) => self.worker.reset(),
            Some(Effect::Quit(code)) => self.quit = Some(code),
            None => {}
        }
    }

    fn control(&mut self, c: char) {
        self.press(KeyCode::Char(c), KeyModifiers::CONTROL);
    }

    fn enter(&mut self, text: &str) {
        text.chars().for_each(|c| self.press(KeyCode::Char(c), KeyModifiers::NONE));
        self.press(KeyCode::Enter, KeyModifiers::NONE);
    }

    /// Handles what the engine says until `enough`.
    fn hear(&mut self, enough: impl Fn(&App) -> bool) {
        while !enough(&self.app) {
            let (id, event) = self.inbox.recv_timeout(Duration::from_secs(20)).unwrap();
            if let Some(failure) = self.app.engine(id, event) {
                self.quit = Some(failure.code());
            }
        }
    }

    fn ask(&mut self, text: &str) {
        self.enter(text);
        self.hear(|app| app.running.is_none());
    }

    fn screen(&mut self) -> Vec<String> {
        self.terminal.draw(|frame| view::draw(frame, &mut self.app)).unwrap();
        let buffer = self.terminal.backend().buffer();
        let rows = buffer.content.chunks(buffer.area.width.max(1).into());
        rows.map(|row| {
            let text: String = row.iter().map(|cell| cell.symbol()).collect();
            text.trim_end().to_string()
        })
        .collect()
    }
}

#[test]
fn the_first_screen_teaches() {
    let mut window = Window::new(60, 12);
    assert_eq!(
        window.screen(),
        [
            "Pregate",
            "test-model · 8 experts, 2 per token",
            "cpu (the only one)",
            "",
            "Try:",
            "  list files by size",
            "",
            "Enter sends, Esc stops, /help shows the rest.",
            "",
            "────────────────────────────────────────────────────────────",
            "›  Ask something, or /help",
            "context 0/2048 · cpu                              test-model",
        ]
    );
}

#[test]
fn an_answer_streams_into_the_transcript() {
    let mut window = Window::new(60, 12);
    window.ask("hello wide 日本");
    assert_eq!(
        window.screen()[4..],
        [
            "  hello wide 日 本".to_string(),
            "".into(),
            "pregate".into(),
            "  You said: hello wide 日 本  (1 messages)".into(),
            "".into(),
            "─".repeat(60),
            "›  Ask something, or /help".into(),
            "100.0 tok/s · TTFT 12 ms · context 20/2048 · cpu  test-model".into(),
        ]
    );
    window.ask("again");
    let screen = window.screen().join("\n");
    assert!(screen.contains("You said: again (3 messages)"), "{screen}");
}

#[test]
fn escape_stops_and_the_part_is_kept() {
    let mut window = Window::new(60, 14);
    window.enter("slow");
    window.hear(|app| app.running.as_ref().is_some_and(|running| running.pieces > 0));
    assert!(window.screen()[13].contains("answering"), "{:?}", window.screen());
    window.press(KeyCode::Char('x'), KeyModifiers::NONE);
    window.press(KeyCode::Enter, KeyModifiers::NONE);
    assert!(window.screen()[13].contains("Esc stops it"), "a second question waits");
    assert_eq!(window.app.input.text(), "x");
    window.press(KeyCode::Esc, KeyModifiers::NONE);
    window.hear(|app| app.running.is_none());
    let screen = window.screen().join("\n");
    assert!(screen.contains("beginning") && screen.contains("stopped"), "{screen}");
}

#[test]
fn control_c_stops_first_and_quits_second() {
    let mut window = Window::new(60, 14);
    window.enter("slow");
    window.control('c');
    assert_eq!(window.quit, None);
    window.hear(|app| app.running.is_none());
    window.control('c');
    assert_eq!(window.quit, Some(130));

    let mut idle = Window::new(60, 14);
    idle.control('c');
    assert_eq!(idle.quit, None);
    assert!(idle.screen()[13].contains("Ctrl-C again"));
    idle.press(KeyCode::Char('x'), KeyModifiers::NONE);
    idle.control('c');
    assert_eq!(idle.quit, None, "another key in between disarms");
    idle.control('c');
    assert_eq!(idle.quit, Some(130));

    let mut left = Window::new(60, 14);
    left.control('d');
    assert_eq!(left.quit, Some(0));
}

#[test]
fn failures_and_panics_of_the_engine_are_shown_and_survived() {
    let mut window = Window::new(70, 20);
    window.ask("fail");
    assert!(window.screen().join("\n").contains("scripted refusal"));
    for _ in 0..6 {
        window.ask("panic");
    }
    let screen = window.screen().join("\n");
    assert!(screen.contains("internal error: the engine failed too often"), "{screen}");

    let mut window = Window::new(70, 20);
    window.ask("panic");
    window.ask("hello");
    assert!(window.screen().join("\n").contains("You said: hello (1 messages)"));
}

#[test]
fn a_gpu_that_failed_ends_the_chat() {
    let mut window = Window::new(70, 20);
    window.ask("fail");
    assert_eq!(window.quit, None);
    window.ask("lost");
    assert_eq!(window.quit, Some(75));
}

#[test]
fn commands_change_the_conversation() {
    let mut window = Window::new(70, 30);
    window.enter("/system be brief");
    window.ask("one");
    assert!(window.screen().join("\n").contains("You said: one (2 messages)"));
    window.enter("/nonsense");
    assert!(window.screen()[29].contains("no command /nonsense"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat.md");
    window.enter(&format!("/save {}", file.display()));
    let saved = std::fs::read_to_string(&file).unwrap();
    assert!(saved.contains("be brief") && saved.contains("You said: one"), "{saved}");
    window.enter("/reset");
    assert_eq!(window.app.conversation().len(), 1, "the system instruction stays");
    window.ask("two");
    assert!(window.screen().join("\n").contains("You said: two (2 messages)"));
    window.enter("/quit");
    assert_eq!(window.quit, Some(0));
}

#[test]
fn a_reset_question_says_nothing_in_the_next_one() {
    let mut window = Window::new(70, 30);
    window.enter("slow");
    window.hear(|app| app.running.as_ref().is_some_and(|running| running.pieces > 0));
    window.enter("/reset");
    window.ask("next");
    let screen = window.screen().join("\n");
    assert!(!screen.contains("beginning") && !screen.contains("stopped"), "{screen}");
    assert!(screen.contains("You said: next (1 messages)"), "{screen}");
}

/// A small generator, so that a failure repeats.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn any_size_and_any_keys_draw_without_panic() {
    let mut random = Random(7);
    let keys = [
        KeyCode::Up,
        KeyCode::Down,
        KeyCode::Left,
        KeyCode::Right,
        KeyCode::Home,
        KeyCode::End,
        KeyCode::PageUp,
        KeyCode::PageDown,
        KeyCode::Backspace,
        KeyCode::Delete,
        KeyCode::Tab,
        KeyCode::Esc,
        KeyCode::F(5),
        KeyCode::Char('a'),
        KeyCode::Char(' '),
        KeyCode::Char('w'),
        KeyCode::Char('u'),
        KeyCode::Char('k'),
        KeyCode::Char('z'),
        KeyCode::Char('日'),
        KeyCode::Char('\u{301}'),
        KeyCode::Char('👩'),
        KeyCode::Char('\u{200d}'),
        KeyCode::Char('\u{7}'),
        KeyCode::Char('`'),
    ];
    let modifiers = [KeyModifiers::NONE, KeyModifiers::CONTROL, KeyModifiers::ALT];
    let mut window = Window::new(80, 24);
    window.ask("some text so that there is something to wrap, 日本語 and `code` included");
    for step in 0..4000u64 {
        let (width, height) = match step % 7 {
            0 => (0, 0),
            1 => (1, 1),
            2 => (500, 200),
            3 => (random.below(4) as u16, random.below(60) as u16),
            4 => (random.below(90) as u16, random.below(4) as u16),
            _ => (random.below(90) as u16, random.below(40) as u16),
        };
        window.terminal.backend_mut().resize(width, height);
        for _ in 0..3 {
            let key = keys[random.below(keys.len() as u64) as usize];
            window.press(key, modifiers[random.below(3) as usize]);
        }
        if step % 50 == 0 {
            window.app.input.paste("pasted\ntext 日本語\u{1b}[31m\n\n");
        }
        if step % 97 == 0 && window.app.running.is_none() && step < 1000 {
            window.press(KeyCode::Enter, KeyModifiers::NONE);
            window.hear(|app| app.running.is_none());
        }
        if step % 300 == 0 {
            window.app.input.clear();
        }
        window.screen();
        window.quit = None;
    }
}

#[test]
fn what_happened_meanwhile_is_noted() {
    let mut window = Window::new(70, 20);
    window.ask("notes");
    assert!(window.screen().join("\n").contains("the disk is slow"));
}
