//! The chat on a real pseudo-terminal: whatever ends it, the terminal is as it
//! was before.
#![cfg(unix)]

use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize},
};
use std::{
    ffi::OsString,
    fs::File,
    io::{Read, Write},
    os::unix::ffi::OsStringExt,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(60);
const LEAVE_ALTERNATE_SCREEN: &str = "\u{1b}[?1049l";
const SHOW_CURSOR: &str = "\u{1b}[?25h";
const NO_BRACKETED_PASTE: &str = "\u{1b}[?2004l";

struct Terminal {
    keyboard: File,
    /// Kept open, so that the modes can be read after the child is gone.
    slave: File,
    before: Termios,
    child: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn start(arguments: &[&str], term: &str) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = OsString::from_vec(ptsname(&master, Vec::new()).unwrap().into_bytes());
        let slave = File::options().read(true).write(true).open(name).unwrap();
        resize(&slave, 80, 24);
        let before = tcgetattr(&slave).unwrap();
        let stdio = || Stdio::from(slave.try_clone().unwrap());
        let child = Command::new(env!("CARGO_BIN_EXE_pregate"))
            .args(arguments)
            .env("TERM", term)
            .env_remove("LC_ALL")
            .env_remove("LC_CTYPE")
            .env_remove("LANG")
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let keyboard = File::from(master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut screen, collected) = (keyboard.try_clone().unwrap(), seen.clone());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                collected.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Self { keyboard, slave, before, child, seen }
    }

    /// The full-screen chat, drawn and waiting.
    fn chat() -> Self {
        let mut terminal = Self::start(&["chat", "-t", "1", "--temperature", "0"], "xterm");
        terminal.wait_for("Ask something");
        let raw = tcgetattr(&terminal.slave).unwrap();
        assert!(!raw.local_modes.contains(LocalModes::ICANON), "the chat reads single keys");
        terminal
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    fn wait_for(&mut self, wanted: &str) {
        let started = Instant::now();
        while !self.text().contains(wanted) {
            let ended = self.child.try_wait().unwrap();
            let waiting = started.elapsed() < PATIENCE && ended.is_none();
            assert!(waiting, "no {wanted:?}; ended: {ended:?}; seen:\n{}", self.text());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn type_keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end; the exit code.
    fn end(&mut self) -> i32 {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().expect("an exit, not a death by signal");
            }
            assert!(started.elapsed() < PATIENCE, "it does not end; seen:\n{}", self.text());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn assert_restored(&mut self) {
        let after = tcgetattr(&self.slave).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        assert_eq!(after.output_modes, self.before.output_modes);
        let started = Instant::now();
        for code in [LEAVE_ALTERNATE_SCREEN, SHOW_CURSOR, NO_BRACKETED_PASTE] {
            while !self.text().contains(code) {
                assert!(started.elapsed() < PATIENCE, "{code:?} was not sent");
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

#[test]
fn every_way_out_gives_the_terminal_back() {
    for (signals, code) in
        [(&[Signal::INT, Signal::INT][..], 130), (&[Signal::TERM], 143), (&[Signal::HUP], 129)]
    {
        let mut terminal = Terminal::chat();
        for (index, &signal) in signals.iter().enumerate() {
            if index > 0 {
                terminal.wait_for("Ctrl-C again");
            }
            terminal.signal(signal);
        }
        assert_eq!(terminal.end(), code, "{signals:?}");
        terminal.assert_restored();
    }
    for (keys, code) in [("\u{4}", 0), ("/quit\r", 0), ("\u{3}\u{3}", 130)] {
        let mut terminal = Terminal::chat();
        terminal.type_keys(keys);
        assert_eq!(terminal.end(), code, "{keys:?}");
        terminal.assert_restored();
    }
}

#[test]
fn signals_while_an_answer_is_made() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut terminal = Terminal::chat();
        terminal.type_keys("tell me all about find\r");
        // The heading over the answer, which has just begun.
        terminal.wait_for("pregate");
        terminal.signal(signal);
        assert_eq!(terminal.end(), code);
        terminal.assert_restored();
    }
}

#[test]
fn a_storm_of_sizes_does_no_harm() {
    let mut terminal = Terminal::chat();
    let sizes = [(1, 1), (500, 200), (0, 0), (3, 40), (200, 2), (80, 24)];
    for round in 0..100 {
        let (columns, rows) = sizes[round % sizes.len()];
        resize(&terminal.slave, columns, rows);
        terminal.signal(Signal::WINCH);
        thread::sleep(Duration::from_millis(10));
    }
    resize(&terminal.slave, 80, 24);
    terminal.signal(Signal::WINCH);
    terminal.type_keys("extract a tar.gz archive\r");
    terminal.wait_for("TTFT");
    terminal.type_keys("\u{4}");
    assert_eq!(terminal.end(), 0);
    terminal.assert_restored();
}

#[test]
fn a_terminal_that_can_only_print_lines_gets_lines() {
    for term in ["dumb", ""] {
        let mut terminal = Terminal::start(&["chat", "-t", "1", "--temperature", "0"], term);
        terminal.wait_for("line by line");
        terminal.wait_for("> ");
        terminal.type_keys("extract a tar.gz archive\n");
        terminal.wait_for("tar x");
        terminal.type_keys("\u{4}");
        assert_eq!(terminal.end(), 0);
        assert!(!terminal.text().contains('\u{1b}'), "no escape sequences: {}", terminal.text());
    }
}
